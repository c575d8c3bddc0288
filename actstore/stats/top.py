"""The largest values of each column and where they are, compiled and mergeable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from .streaming import LayerSketch, State

__all__ = ["Top"]

_COLUMNS = 64
_NONE = np.int64(2**62)


@dataclass(frozen=True)
class Top:
    """The k largest or smallest values of each neuron, best first, ties to the earlier token.

    Results: value (NaN where there are fewer than k) and token (-1 there), both (neuron, k).

    Parameters
    ----------
    k : int
    largest : bool
    """

    k: int
    largest: bool = True

    def chunk(self, values_tn: np.ndarray, tokens_t: np.ndarray) -> State:
        kind = np.float64 if values_tn.dtype == np.float64 else np.float32
        values = np.ascontiguousarray(values_tn, kind)
        best = np.full((values.shape[1], self.k), -np.inf, kind)
        tokens = np.full(best.shape, _NONE)
        _insert(values, tokens_t.astype(np.int64), best, tokens, 1 if self.largest else -1)
        return {"value": best, "token": tokens}

    def combine(self, a: State, b: State) -> State:
        value, token = np.empty_like(a["value"]), np.empty_like(a["token"])
        _merge(a["value"], a["token"], b["value"], b["token"], value, token)
        return {"value": value, "token": token}

    def from_sketch(self, layer: LayerSketch) -> State:
        values, tokens = (a[:, : self.k] for a in layer.extremes(self.largest))
        sign = 1 if self.largest else -1
        return {
            "value": np.where(tokens < 0, -np.inf, sign * values),
            "token": np.where(tokens < 0, _NONE, tokens),
        }

    def finalize(self, state: State) -> dict[str, Any]:
        found = state["token"] != _NONE
        sign = 1 if self.largest else -1
        return {
            "value": np.where(found, sign * state["value"].astype(np.float64), np.nan),
            "token": np.where(found, state["token"], -1),
        }


@numba.njit(nogil=True, cache=True)
def _insert(x, numbers, best, tokens, sign):  # type: ignore[no-untyped-def]
    """Keep sorted lists of the largest ``sign * x``; few columns at a time stay cached."""
    k = best.shape[1]
    for left in range(0, x.shape[1], _COLUMNS):
        for i in range(x.shape[0]):
            for j in range(left, min(x.shape[1], left + _COLUMNS)):
                v = sign * x[i, j]
                own = best[j]
                # A list that is not full takes -inf too; NaN goes nowhere.
                if not (v > own[k - 1] or (v == own[k - 1] and tokens[j, k - 1] == _NONE)):
                    continue
                at = k - 1
                while at > 0 and (own[at - 1] < v or tokens[j, at - 1] == _NONE):
                    own[at] = own[at - 1]
                    tokens[j, at] = tokens[j, at - 1]
                    at -= 1
                own[at] = v
                tokens[j, at] = numbers[i]


@numba.njit(nogil=True, cache=True)
def _merge(a, a_tokens, b, b_tokens, out, out_tokens):  # type: ignore[no-untyped-def]
    k = a.shape[1]
    for j in range(a.shape[0]):
        p = q = 0
        for i in range(k):
            x, y = a[j, p], b[j, q]
            first = x > y or (x == y and a_tokens[j, p] < b_tokens[j, q])
            if first:
                out[j, i], out_tokens[j, i] = x, a_tokens[j, p]
                p += 1
            else:
                out[j, i], out_tokens[j, i] = y, b_tokens[j, q]
                q += 1
