"""What each row of a result is about: a layer, a head or a neuron; and checks of choices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from ..errors import UnknownNameError, UsageError
from .engine import Output
from .selection import Source

__all__ = [
    "COMPAT",
    "PER",
    "Compat",
    "Per",
    "check",
    "check_seed",
    "element",
    "fractions_of",
    "groups_of",
    "per_neuron",
    "row_dims",
]

Per = Literal["layer", "head", "neuron"]
PER = ("layer", "head", "neuron")

Compat = Literal["textbook", "notebook"]
COMPAT = ("textbook", "notebook")

MAX_FRACTIONS = 1000


def check(parameter: str, value: Any, allowed: Iterable[Any]) -> None:
    """Refuse a value that is not among those allowed."""
    if value not in allowed:
        raise UnknownNameError(f"value of {parameter}", value, allowed)


def check_seed(seed: int) -> None:
    """Refuse what no random numbers can start from."""
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise UsageError(f"seed is {seed!r}: it must be a whole number from 0")


def groups_of(source: Source, neurons: np.ndarray, per: str) -> np.ndarray:
    """Row of the result that each neuron goes to."""
    if per == "layer":
        return np.zeros(len(neurons), np.int64)
    if per == "neuron":
        return np.arange(len(neurons))
    return np.unique(_heads(source)[neurons], return_inverse=True)[1]


def row_dims(
    source: Source, neurons: np.ndarray, per: str
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Dimensions of the rows, and their lengths."""
    if per == "layer":
        return (), ()
    if per == "neuron":
        return ("neuron",), (len(neurons),)
    return ("head",), (len(np.unique(_heads(source)[neurons])),)


def per_neuron(neurons: np.ndarray, dtype: Any, long_name: str, units: str = "1") -> Output:
    """A variable with a value for each neuron."""
    return Output(("neuron",), (len(neurons),), dtype, {"long_name": long_name, "units": units})


def element(source: Source) -> np.dtype[Any]:
    """Type in which the source's values are counted and sorted."""
    kinds = {"float16": np.float16, "float32": np.float32, "bfloat16": np.float32}
    return np.dtype(kinds.get(source.dtype, np.float64))


def _heads(source: Source) -> np.ndarray:
    if source.heads is None:
        raise UsageError(
            f"stage {source.stage} is not made of heads: per='head' works on attn_z only"
        )
    return source.heads


def fractions_of(parameter: str, values: float | Sequence[float]) -> tuple[float, ...]:
    """Quantiles asked for, each from 0 to 1."""
    fractions = tuple(float(f) for f in np.atleast_1d(np.asarray(values, np.float64)))
    if not 1 <= len(fractions) <= MAX_FRACTIONS:
        raise UsageError(
            f"{parameter} has {len(fractions):,} fractions: give 1 to {MAX_FRACTIONS:,}"
        )
    bad = [f for f in fractions if not 0 <= f <= 1]
    if bad:
        hint = f"; the {bad[0]:g}th percentile is {bad[0] / 100:g}" if 1 < bad[0] <= 100 else ""
        raise UsageError(f"{parameter} holds {bad[0]:g}: fractions go from 0 to 1{hint}")
    return fractions
