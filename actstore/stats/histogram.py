"""Histograms by numpy's rule, per column or over all columns, compiled and mergeable."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from .streaming import State

__all__ = ["Histogram", "count_in_bins"]


@dataclass(frozen=True)
class Histogram:
    """Counts in given bins.

    Parameters
    ----------
    edges : ndarray (edge,) or (group, edge)
        Ascending, float64.
    groups : ndarray of int (neuron,), optional
        Row of the result that each neuron is counted in; default all in one.
    density : bool
        Finish as a density over the count inside the range.
    """

    edges: np.ndarray
    groups: np.ndarray | None = None
    density: bool = False

    def chunk(self, values_tn: np.ndarray) -> State:
        return count_in_bins(values_tn, self.edges, self.groups)

    def combine(self, a: State, b: State) -> State:
        return {name: a[name] + b[name] for name in a}

    def finalize(self, state: State) -> dict[str, np.ndarray]:
        if not self.density:
            return dict(state)
        counts = state["counts"]
        inside = counts.sum(axis=-1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            return {**state, "density": counts / inside / np.diff(self.edges)}


def count_in_bins(
    values_tn: np.ndarray, edges: np.ndarray, groups: np.ndarray | None = None
) -> State:
    """Count values in bins.

    Parameters
    ----------
    values_tn : ndarray (token, neuron)
        float32 (others are cast).
    edges : ndarray (edge,) or (group, edge)
        Ascending; bins are closed on the left, the last one on both sides, as in
        `numpy.histogram` with float64 edges.
    groups : ndarray of int (neuron,), optional
        Row of the result for each neuron.

    Returns
    -------
    dict
        counts (group, bin), and below, above, nonfinite (group,): values outside, never dropped
        in silence. Infinities count as below and above, NaN as nonfinite.

    Examples
    --------
    >>> state = count_in_bins(np.array([[0.0, 1.0, 2.0]], "float32"), np.array([0.0, 1.0, 2.0]))
    >>> state["counts"]
    array([[1, 2]])
    """
    values = np.ascontiguousarray(values_tn, np.float32)
    if groups is None:
        groups = np.zeros(values.shape[1], np.int64)
    table = np.atleast_2d(np.asarray(edges, np.float64))
    rows = int(groups.max()) + 1 if len(groups) else 1
    table = np.ascontiguousarray(np.broadcast_to(table, (max(rows, len(table)), table.shape[1])))
    counts, below, above, nonfinite = _count(values, table, groups)
    return {"counts": counts, "below": below, "above": above, "nonfinite": nonfinite}


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _count(x, edges, groups):  # type: ignore[no-untyped-def]
    rows, bins = edges.shape[0], edges.shape[1] - 1
    # The first and last columns collect what is outside; one more is for NaN.
    counts = np.zeros((rows, bins + 3), np.int64)
    first = edges[:, 0].copy()
    last = edges[:, -1].copy()
    scale = np.empty(rows)
    even = np.empty(rows, np.bool_)
    for g in range(rows):
        width = last[g] - first[g]
        scale[g] = bins / width if width > 0 else 0.0
        even[g] = True
        for k in range(bins):
            if abs(edges[g, k] - (first[g] + k * width / bins)) > 0.4 * width / bins:
                even[g] = False
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            g = groups[j]
            v = np.float64(x[i, j])
            if v >= first[g] and v <= last[g]:
                if even[g]:
                    # A first guess is off by one bin at most; the edges themselves decide.
                    k = min(int((v - first[g]) * scale[g]), bins - 1)
                    if v < edges[g, k]:
                        k -= 1
                    elif k < bins - 1 and v >= edges[g, k + 1]:
                        k += 1
                else:
                    low, high = 0, bins
                    while high - low > 1:
                        mid = (low + high) // 2
                        if v >= edges[g, mid]:
                            low = mid
                        else:
                            high = mid
                    k = low
                counts[g, k + 1] += 1
            elif v < first[g]:
                counts[g, 0] += 1
            elif v > last[g]:
                counts[g, bins + 1] += 1
            else:
                counts[g, bins + 2] += 1
    return counts[:, 1 : bins + 1].copy(), counts[:, 0], counts[:, bins + 1], counts[:, bins + 2]
