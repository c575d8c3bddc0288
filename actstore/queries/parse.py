"""Text to the value of a query's parameter, the same for the command line and the server."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import UnionType
from typing import Any, Literal

import numpy as np

from ..errors import UnknownNameError, UsageError

__all__ = ["Kind", "kind_of", "parse_number_list"]

MAX_STEPS = 100_000
"""Most numbers that ``start:stop:count`` may stand for."""

_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class Kind:
    """What the text of a parameter may be, from its annotation.

    Attributes
    ----------
    name : {"string", "integer", "number", "boolean", "array"}
        An array is a number, a comma list of numbers, or ``start:stop:count``.
    choices : tuple of str
        The words that it may be; empty where it may be others. Of an array, words that it may be
        instead of numbers.
    optional : bool
        Whether it may be left out for None.
    parse : callable
        ``parse(name, text)`` gives the value; the name is for messages.
    """

    name: Literal["string", "integer", "number", "boolean", "array"]
    choices: tuple[str, ...]
    optional: bool
    parse: Callable[[str, str], Any]


@cache
def kind_of(annotation: Any) -> Kind:
    """The kind of a parameter's text.

    Examples
    --------
    >>> kind_of(int | None).parse("k", "20"), kind_of(bool).parse("density", "true")
    (20, True)
    """
    union = typing.get_origin(annotation) in (UnionType, typing.Union)
    parts = typing.get_args(annotation) if union else (annotation,)
    optional = type(None) in parts
    inner = [p for p in parts if p is not type(None)]
    words = tuple(w for p in inner if typing.get_origin(p) is Literal for w in typing.get_args(p))
    if any(float in typing.get_args(p) for p in inner) and str not in inner:
        return Kind("array", words, optional, partial(_word_or_numbers, words))
    if words:
        return Kind("string", words, optional, partial(_word, words))
    if inner == [bool]:
        return Kind("boolean", (), optional, _truth)
    if inner == [int]:
        return Kind("integer", (), optional, _integer)
    if inner == [float]:
        return Kind("number", (), optional, _number)
    return Kind("string", (), optional, _as_it_is)


def parse_number_list(name: str, text: str) -> int | float | list[float]:
    """A number, a comma list of numbers, or ``start:stop:count`` for evenly spaced ones.

    Examples
    --------
    >>> parse_number_list("bins", "50"), parse_number_list("bins", "-1:1:3")
    (50, [-1.0, 0.0, 1.0])
    >>> parse_number_list("q", "0.5")
    0.5
    >>> parse_number_list("range", "-5,5")
    [-5.0, 5.0]
    """
    try:
        if ":" in text:
            start, stop, count = text.split(":")
            steps = int(count)
            if not 1 <= steps <= MAX_STEPS:
                raise UsageError(f"{name} {text!r}: give a count from 1 to {MAX_STEPS:,}")
            with np.errstate(over="ignore", invalid="ignore"):
                return [_finite(v) for v in np.linspace(_finite(start), _finite(stop), steps)]
        if "," in text:
            return [_finite(part) for part in text.split(",")]
        return _finite(text) if set(text) & set(".eE") else int(text)
    except UsageError:
        raise
    except ValueError:
        raise UsageError(
            f"{name} {text!r} is not understood: write a number, a comma list such as 0,1,2.5, "
            "or start:stop:count for evenly spaced numbers"
        ) from None


def _finite(text: str | float) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _as_it_is(name: str, text: str) -> str:
    return text


def _word(words: tuple[str, ...], name: str, text: str) -> str:
    if text not in words:
        raise UnknownNameError(f"value of {name}", text, words)
    return text


def _word_or_numbers(words: tuple[str, ...], name: str, text: str) -> Any:
    return text if text in words else parse_number_list(name, text)


def _truth(name: str, text: str) -> bool:
    if text.lower() not in _TRUTH:
        raise UnknownNameError(f"value of {name}", text, ("true", "false"))
    return _TRUTH[text.lower()]


def _integer(name: str, text: str) -> int:
    if not re.fullmatch(r"-?\d{1,18}", text.strip(), re.ASCII):
        raise UsageError(f"{name} {text!r} is not understood: write a whole number such as 20")
    if name == "seed" and int(text) < 0:
        raise UsageError(f"seed {text!r}: seeds are 0 or more")
    return int(text)


def _number(name: str, text: str) -> float:
    try:
        return _finite(text)
    except ValueError:
        raise UsageError(
            f"{name} {text!r} is not understood: write a finite number such as 0.5"
        ) from None
