"""Chosen rows or values out of a stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .streaming import State

__all__ = ["Rows", "Values"]


@dataclass(frozen=True)
class Rows:
    """All the rows that come, in their order; result: activation (n, neuron).

    Parameters
    ----------
    n : int
        Rows of the result; where fewer come, the rest is NaN.
    """

    n: int

    def chunk(self, values_tn: np.ndarray, tokens_t: np.ndarray | None = None) -> State:
        return {"activation": np.array(values_tn)}

    def combine(self, a: State, b: State) -> State:
        return {"activation": np.concatenate([a["activation"], b["activation"]])}

    def finalize(self, state: State) -> dict[str, Any]:
        return {"activation": _filled(state["activation"], self.n)}


@dataclass(frozen=True)
class Values:
    """Single values; result: activation (n,).

    Parameters
    ----------
    n : int
        Length of the result; where fewer come, the rest is NaN.
    tokens : ndarray of int (value,)
        Token of each value, ascending.
    columns : ndarray of int (value,)
        Column of each.
    """

    n: int
    tokens: np.ndarray
    columns: np.ndarray

    def chunk(self, values_tn: np.ndarray, tokens_t: np.ndarray) -> State:
        rows = np.searchsorted(tokens_t, self.tokens).clip(max=len(tokens_t) - 1)
        here = tokens_t[rows] == self.tokens
        return {"activation": values_tn[rows[here], self.columns[here]]}

    def combine(self, a: State, b: State) -> State:
        return {"activation": np.concatenate([a["activation"], b["activation"]])}

    def finalize(self, state: State) -> dict[str, Any]:
        return {"activation": _filled(state["activation"], self.n)}


def _filled(values: np.ndarray, n: int) -> np.ndarray:
    kind = values.dtype if values.dtype.kind == "f" else np.dtype(np.float64)
    full = np.full((n, *values.shape[1:]), np.nan, kind)
    full[: len(values)] = values
    return full
