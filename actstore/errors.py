"""Every error that actstore raises on purpose, in one hierarchy.

::

    ActstoreError
    ├── UsageError            the question is wrong (exit status 2; also a ValueError)
    │   ├── UnknownNameError      a stage, layer, query, column ... that is not there
    │   ├── CorpusError           the input text or tokens
    │   ├── ExpressionError       a token expression
    │   └── PlanError             the arguments do not fit together, or not the output that exists
    ├── ModelError            the model or its tokenizer cannot be used
    ├── CaptureError          the model gave something that cannot be stored
    │   ├── NonFiniteError        NaN or inf
    │   └── HalfOverflowError     a finite value that float16 cannot hold
    ├── WriteError            the store cannot be written (disk full, locked, read only)
    └── StoreError            a store cannot be read
        ├── NotAStoreError
        ├── UnfinishedStoreError
        ├── NewerFormatError
        └── CorruptStoreError     a missing or damaged object

A message names the bad value, the allowed ones, the nearest match and what to do next.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "ActstoreError",
    "CaptureError",
    "CorpusError",
    "CorruptStoreError",
    "ExpressionError",
    "HalfOverflowError",
    "ModelError",
    "NewerFormatError",
    "NonFiniteError",
    "NotAStoreError",
    "PlanError",
    "StoreError",
    "UnfinishedStoreError",
    "UnknownNameError",
    "UsageError",
    "WriteError",
]


class ActstoreError(Exception):
    """Base of every error that actstore raises on purpose."""


class UsageError(ActstoreError, ValueError):
    """The question is wrong: a bad argument, name, expression or input."""


class UnknownNameError(UsageError):
    """A name that is not there; the message lists those that are.

    Parameters
    ----------
    kind : str
        What the name should have been ("stage", "layer", ...).
    name : object
        The name that was asked for.
    allowed : iterable
        The names that exist.
    hint : str, optional
        What to do next.

    Attributes
    ----------
    kind, name, allowed
        As given; the last two as text.
    nearest : str or None
        The name that was probably meant.

    Examples
    --------
    >>> print(UnknownNameError("stage", "mlp_pots", ["mlp_pre", "mlp_post"]))
    unknown stage 'mlp_pots': did you mean 'mlp_post'? Known: mlp_pre, mlp_post.
    """

    def __init__(self, kind: str, name: object, allowed: Iterable[object], hint: str = "") -> None:
        names = [str(a) for a in allowed]
        near = get_close_matches(str(name), names, n=1, cutoff=0.5)
        guess = f": did you mean {near[0]!r}?" if near else "."
        known = ", ".join(names) if names else "none"
        self.kind, self.name, self.allowed = kind, str(name), names
        self.nearest = near[0] if near else None
        super().__init__(
            f"unknown {kind} {name!r}{guess} Known: {known}." + (f" {hint}" if hint else "")
        )


class CorpusError(UsageError):
    """The input text or tokens cannot be used."""


class ExpressionError(UsageError):
    """A token expression does not parse, or asks for what is not there."""


class PlanError(UsageError):
    """The arguments do not fit together, or not the output that exists."""


class ModelError(ActstoreError):
    """The model or its tokenizer cannot be loaded or hooked."""


class CaptureError(ActstoreError):
    """The model gave something that cannot be stored."""


class NonFiniteError(CaptureError):
    """NaN or inf among the activations."""


class HalfOverflowError(CaptureError):
    """A finite value that float16 cannot hold."""


class WriteError(ActstoreError):
    """The store cannot be written."""


class StoreError(ActstoreError):
    """A store cannot be read."""


class NotAStoreError(StoreError):
    """The path holds no actstore store."""


class UnfinishedStoreError(StoreError):
    """The store is still being written."""


class NewerFormatError(StoreError):
    """The store was written in a format newer than this version reads."""


class CorruptStoreError(StoreError):
    """An object of the store is missing or damaged."""
