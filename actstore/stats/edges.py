"""Where the bins of a histogram lie: numpy's rules, for many histograms at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from .streaming import LayerSketch, State

__all__ = ["RULES", "Extremes", "automatic_bins", "even_edges", "snapped_edges"]

RULES = ("freedman_diaconis", "sturges", "one_bin", "capped")
"""How the number of bins of a histogram with ``bins="fd"`` came about."""


@dataclass(frozen=True)
class Extremes:
    """Smallest and largest finite value of each group of neurons: NaN where there is none.

    Parameters
    ----------
    groups : ndarray of int (neuron,)
        Row of the result that each neuron goes to.
    """

    groups: np.ndarray

    @property
    def pooled(self) -> bool:
        return not self.groups.any()

    def chunk(self, values_tn: np.ndarray, tokens_t: np.ndarray | None = None) -> State:
        low, high = values_tn.min(axis=0), values_tn.max(axis=0)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            finite = np.isfinite(values_tn)
            some = finite.any(axis=0)
            low = np.where(some, values_tn.min(axis=0, initial=np.inf, where=finite), np.nan)
            high = np.where(some, values_tn.max(axis=0, initial=-np.inf, where=finite), np.nan)
        return pool_extremes(low, high, self.groups[: len(low)])

    def combine(self, a: State, b: State) -> State:
        return {"min": np.fmin(a["min"], b["min"]), "max": np.fmax(a["max"], b["max"])}

    def from_sketch(self, layer: LayerSketch) -> State:
        moments = layer.moments()
        return pool_extremes(moments["min"], moments["max"], self.groups)

    def finalize(self, state: State) -> dict[str, Any]:
        return dict(state)


def pool_extremes(low: np.ndarray, high: np.ndarray, groups: np.ndarray) -> State:
    """Extremes of groups of neurons; NaN only where all are."""
    rows = int(groups.max(initial=0)) + 1
    lowest, highest = np.full(rows, np.nan, low.dtype), np.full(rows, np.nan, high.dtype)
    np.fmin.at(lowest, groups, low)
    np.fmax.at(highest, groups, high)
    return {"min": lowest, "max": highest}


def even_edges(low: np.ndarray, high: np.ndarray, bins: int | np.ndarray) -> np.ndarray:
    """Edges of bins of equal width, as `numpy.histogram` makes them.

    Parameters
    ----------
    low, high : ndarray (row,)
        Ends, in the type in which the edges are made: float64, or the data's own to follow numpy
        to the bit. Where they are the same, half a unit is left on either side.
    bins : int or ndarray of int (row,)
        Number of bins; rows with fewer than the largest number end in NaN.

    Returns
    -------
    ndarray (row, edge)

    Examples
    --------
    >>> even_edges(np.array([0.0, 3.0]), np.array([2.0, 3.0]), np.array([2, 1]))
    array([[0. , 1. , 2. ],
           [2.5, 3.5, nan]])
    """
    half = np.where(low == high, 0.5, 0).astype(low.dtype)
    low, high = low - half, high + half
    sizes = np.broadcast_to(bins, low.shape)
    edges = np.full((len(low), int(sizes.max(initial=1)) + 1), np.nan, low.dtype)
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size)
        edges[rows, : size + 1] = np.linspace(low[rows], high[rows], size + 1, axis=-1)
    return edges


def snapped_edges(edges: np.ndarray) -> np.ndarray:
    """Edges moved to where a table of float32 values by their upper 16 bits can be cut.

    Parameters
    ----------
    edges : ndarray of float64 (edge,)
        Ascending.

    Returns
    -------
    ndarray of float64
        The first moved down, the last up, each other one to the nearest cut; of those that meet
        one is left. The last is the largest value below its cut, since the last bin is closed.

    Examples
    --------
    >>> snapped_edges(np.array([0.5, 1.001, 2.0])).round(4).tolist()
    [0.5, 1.0, 2.0156]
    """
    cuts = _cuts()
    above = np.searchsorted(cuts, edges, side="right")  # cuts[above - 1] <= edge < cuts[above]
    low, high = cuts[np.maximum(above - 1, 0)], cuts[np.minimum(above, len(cuts) - 1)]
    moved = np.where(edges - low <= high - edges, low, high)
    moved[0] = low[0]
    moved = np.unique(moved[:-1])
    end = np.nextafter(high[-1].astype(np.float32), np.float32(-np.inf))
    return np.append(moved[moved < end], np.float64(end))


@cache
def _cuts() -> np.ndarray:
    """The least float32 of every run of values with the same upper 16 bits, but around zero.

    The runs of 0.0 and -0.0 are one, as those are the same number.
    """
    ends = (np.arange(1, 0x7F80, dtype=np.uint32) << 16).view(np.float32)
    below = np.nextafter(-ends[::-1], np.float32(0))
    least = np.finfo(np.float32).min
    return np.concatenate([[least], below, ends, [np.inf]]).astype(np.float64)


def automatic_bins(
    count: np.ndarray,
    iqr: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    *,
    cap: int,
    sturges: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Number of bins by the rule of Freedman and Diaconis, 2 IQR / n^(1/3) wide.

    Parameters
    ----------
    count, iqr, low, high : ndarray (row,)
        Values inside the range, their interquartile range, and the range.
    cap : int
        Most bins.
    sturges : bool
        Where the IQR is 0, fall back to Sturges' rule, log2(n) + 1 bins; else to one bin, as
        numpy does.

    Returns
    -------
    bins : ndarray of int (row,)
    rule : ndarray of int8 (row,)
        Index into `RULES`.

    Examples
    --------
    >>> one = np.ones(1)
    >>> automatic_bins(1000 * one, 0.5 * one, 0 * one, 10 * one, cap=1000, sturges=True)
    (array([100]), array([0], dtype=int8))
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        bins = np.ceil((high - low) / (2.0 * iqr * count ** (-1.0 / 3.0)))
        narrow = np.ceil(np.log2(count) + 1)
    rule = np.zeros(len(bins), np.int8)
    no_spread = ~(iqr > 0) | ~np.isfinite(bins)
    fallback = no_spread & (high > low) & sturges
    bins = np.where(no_spread, np.where(fallback, narrow, 1), bins)
    rule[no_spread], rule[fallback] = RULES.index("one_bin"), RULES.index("sturges")
    rule[bins > cap] = RULES.index("capped")
    return np.clip(bins, 1, cap).astype(np.int64), rule
