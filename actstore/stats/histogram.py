"""Histograms by numpy's rule, per column or over all columns, compiled and mergeable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numba
import numpy as np

from .streaming import LayerSketch, State

__all__ = ["Bins", "Histogram", "count_in_bins"]

_RUN = 512
_COLUMNS = 128
_NEAR = 1e-9


@dataclass(frozen=True)
class Histogram:
    """Counts in given bins.

    Parameters
    ----------
    edges : ndarray (edge,) or (group, edge)
        Ascending; a row with fewer bins than others ends in NaN.
    groups : ndarray of int (neuron,), optional
        Row of the result that each neuron is counted in; default all in one.
    density : bool
        Finish as a density over the count inside the range.
    transform : callable, optional
        From values (token, neuron) to the values that are counted.
    extra : dict
        More results, passed on as they are.
    """

    edges: np.ndarray
    groups: np.ndarray | None = None
    density: bool = False
    transform: Callable[[np.ndarray], np.ndarray] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def bins(self) -> Bins:
        return Bins.of(self.edges, self.groups)

    @property
    def pooled(self) -> bool:
        return self.transform is None and self.bins.groups is None

    def chunk(self, values_tn: np.ndarray, tokens_t: np.ndarray | None = None) -> State:
        if self.transform is not None:
            values_tn = self.transform(values_tn)
        return self.bins.count(values_tn)

    def combine(self, a: State, b: State) -> State:
        return {name: a[name] + b[name] for name in a}

    def from_sketch(self, layer: LayerSketch) -> State:
        """Of one row, and of values as they are stored, in 16 bits."""
        return self.bins.count_repeated(*layer.values())

    def finalize(self, state: State) -> dict[str, Any]:
        results = {**self.extra, **state, "edges": self.edges}
        if self.density:
            counts = state["counts"]
            inside = counts.sum(axis=-1, keepdims=True)
            width = np.diff(self.edges).astype(np.float64)
            with np.errstate(divide="ignore", invalid="ignore"):
                results["density"] = counts / width / inside
        return results


def count_in_bins(
    values_tn: np.ndarray, edges: np.ndarray, groups: np.ndarray | None = None
) -> State:
    """Count values in bins.

    Parameters
    ----------
    values_tn : ndarray (token, neuron)
        float32 or float64 (others are cast to float32).
    edges : ndarray (edge,) or (group, edge)
        Ascending; bins are closed on the left, the last one on both sides, as in
        `numpy.histogram`. NaN at the end of a row: it has fewer bins.
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
    return Bins.of(edges, groups).count(values_tn)


@dataclass(frozen=True)
class Bins:
    """Edges made ready for counting.

    Slots of a row: 0 is below the range, then the bins, then above. A value's slot is guessed by
    arithmetic. Where the guess lies within `slack` of an edge, the edges themselves decide;
    elsewhere they need not be looked at.

    Attributes
    ----------
    bounds : ndarray of float64 (group, edge + 2)
        Slot k holds ``bounds[k] <= v < bounds[k + 1]``.
    groups : ndarray of int (neuron,) or None
        None: everything in row 0.
    sizes : ndarray of int32 (group,)
        Bins of each row.
    first, scale, slack : ndarray of float64 (group,)
        Where in the row a value lies: ``(v - first) * scale``, in bins, give or take `slack`.
    even : ndarray of bool (group,)
        Whether the guess is off by one slot at most.
    """

    bounds: np.ndarray
    groups: np.ndarray | None
    sizes: np.ndarray
    first: np.ndarray
    scale: np.ndarray
    slack: np.ndarray
    even: np.ndarray

    @classmethod
    def of(cls, edges: np.ndarray, groups: np.ndarray | None = None) -> Bins:
        table = np.atleast_2d(np.asarray(edges, np.float64))
        rows = 1 if groups is None else int(groups.max(initial=0)) + 1
        table = np.broadcast_to(table, (max(rows, len(table)), table.shape[1]))
        sizes = np.maximum(np.isfinite(table).sum(axis=1) - 1, 0).astype(np.int32)
        every = np.arange(len(table))
        first, last = table[:, 0], table[every, sizes]
        bounds = np.full((len(table), table.shape[1] + 2), np.nan)  # nothing is above NaN
        bounds[:, 0], bounds[:, 1:-1] = -np.inf, table
        bounds[every, sizes + 1] = np.nextafter(last, np.inf)  # the last bin is closed
        bounds[sizes == 0, 1:] = np.nan
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            scale = sizes / (last - first)
            off = np.abs((table - first[:, None]) * scale[:, None] - np.arange(table.shape[1]))
        off = np.where(np.isnan(table), 0, off).max(axis=1)
        even = (sizes == 0) | (np.isfinite(scale) & (off < 0.4))
        guessed = even & (sizes > 0)
        return cls(
            bounds,
            None if groups is None or len(table) == 1 else groups,
            sizes,
            np.where(guessed, first, 0.0),
            np.where(guessed, scale, 0.0),
            np.where(guessed, off + _NEAR, 1.0),  # of a whole bin: every value is looked up
            even,
        )

    def count(self, values_tn: np.ndarray) -> State:
        """Count values (token, neuron); see `count_in_bins`."""
        kind = np.float64 if values_tn.dtype == np.float64 else np.float32
        values = np.ascontiguousarray(values_tn, kind)
        # One more column for NaN.
        table = np.zeros((len(self.bounds), self.bounds.shape[1]), np.int64)
        given = (self.bounds, self.sizes, self.first, self.scale, self.slack, self.even)
        if self.groups is None:
            _count_all(values.reshape(-1), table[0], *(a[0] for a in given))
        else:
            _count_columns(values, table, self.groups, *given)
        return self._state(table)

    def count_repeated(self, values: np.ndarray, times: np.ndarray) -> State:
        """Count values of which each comes several times, into the first row."""
        table = np.zeros((len(self.bounds), self.bounds.shape[1]), np.int64)
        slots = np.searchsorted(self.bounds[0], values, side="right") - 1
        np.add.at(table[0], slots, times.astype(np.int64))
        return self._state(table)

    def _state(self, table: np.ndarray) -> State:
        counts, nonfinite = table[:, 1:-2].copy(), table[:, -1].copy()
        every = np.arange(len(table))
        above = table[every, self.sizes + 1]
        inside = np.arange(counts.shape[1]) < self.sizes[:, None]
        below = table[:, 0].copy()
        no_bins = self.sizes == 0
        nonfinite[no_bins] += below[no_bins]
        below[no_bins] = 0
        return {
            "counts": np.where(inside, counts, 0),
            "below": below,
            "above": above,
            "nonfinite": nonfinite,
        }


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _guess(v, first, scale, size):  # type: ignore[no-untyped-def]
    """A slot's number, with its fraction; 0.5 for what is well below, or NaN."""
    f = (v - first) * scale
    f = f if f > -0.5 else -0.5  # so written that NaN becomes -0.5
    return (f if f < size + 0.5 else size + 0.5) + 1.0


@numba.njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _search(v, bounds, start, size):  # type: ignore[no-untyped-def]
    low, n = 0, size + 2
    while n > 1:
        half = n // 2
        low += half * np.int64(v >= bounds[start + low + half])  # no branch to mispredict
        n -= half
    return np.int32(low)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _count_all(x, table, bounds, size, first, scale, slack, even):  # type: ignore[no-untyped-def]
    """All values into one row. Guesses go by runs, so that they are made many at a time.

    Unsigned indices spare numba the question whether they count from the end.
    """
    nan = len(table) - 1
    slots = np.empty(_RUN, np.int32)
    for begin in range(0, len(x), _RUN):
        run = x[begin : begin + _RUN]
        near = np.int32(0)
        for j in range(len(run)):
            v = np.float64(run[j])
            f = _guess(v, first, scale, size)
            k = np.int32(f)
            near += np.int32((abs(f - k - 0.5) > 0.5 - slack) | (v != v))
            slots[j] = k
        if near and not even:
            slots[:] = 0
            n = size + 2
            while n > 1:  # a step of the search for the whole run at once
                half = np.int32(n // 2)
                for j in range(len(run)):
                    end = bounds[np.uint32(slots[j] + half)]
                    slots[j] += half * np.int32(np.float64(run[j]) >= end)
                n -= half
            for j in range(len(run)):
                slots[j] = slots[j] if run[j] == run[j] else nan
        elif near:
            for j in range(len(run)):
                v, k = np.float64(run[j]), np.uint32(slots[j])
                off = np.int32(v >= bounds[k + np.uint32(1)]) - np.int32(v < bounds[k])
                slots[j] = slots[j] + off if v == v else nan
        for j in range(len(run)):
            table[np.uint32(slots[j])] += 1


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _count_columns(x, table, groups, bounds, sizes, firsts, scales, slacks, evens):  # type: ignore[no-untyped-def]
    """Each column into the row of its group; few columns at a time, so that tables stay cached."""
    tokens, width = x.shape
    stride = table.shape[1]
    counts, edges = table.reshape(-1), bounds.reshape(-1)
    slots = np.empty(_COLUMNS, np.int32)
    first, scale, slack = np.empty(_COLUMNS), np.empty(_COLUMNS), np.empty(_COLUMNS)
    size, start = np.empty(_COLUMNS, np.int32), np.empty(_COLUMNS, np.int64)
    even = np.empty(_COLUMNS, np.bool_)
    for left in range(0, width, _COLUMNS):
        columns = min(_COLUMNS, width - left)
        for j in range(columns):
            g = groups[left + j]
            first[j], scale[j], slack[j] = firsts[g], scales[g], slacks[g]
            size[j], start[j], even[j] = sizes[g], g * stride, evens[g]
        for i in range(tokens):
            run = x[i, left : left + columns]
            near = np.int32(0)
            for j in range(columns):
                v = np.float64(run[j])
                f = _guess(v, first[j], scale[j], size[j])
                k = np.int32(f)
                near += np.int32((abs(f - k - 0.5) > 0.5 - slack[j]) | (v != v))
                slots[j] = k
            if near:
                for j in range(columns):
                    v, s = np.float64(run[j]), start[j]
                    k = slots[j] if even[j] else _search(v, edges, s, size[j])
                    at = np.uint64(s + k)
                    k += np.int32(v >= edges[at + np.uint64(1)]) - np.int32(v < edges[at])
                    slots[j] = k if v == v else stride - 1
            for j in range(columns):
                counts[np.uint64(start[j] + slots[j])] += 1
