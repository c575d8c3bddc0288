"""Lanes: runs of one layer's blocks, each read once and folded by several statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from ..stats.streaming import State, Statistic
from ..store import ShardedArray

__all__ = ["Lane", "keep_memory", "run_lane"]

PIECE_NBYTES = 4 * 2**20
"""What is read at a time where neurons are pooled: it stays in the cache."""

MAX_GAPS = 4
"""More gaps between the tokens of a block than this are closed by copying."""


@dataclass(frozen=True)
class Lane:
    """A run of one layer's blocks, and which of their values count.

    Attributes
    ----------
    array : sliceable
        (layer, token, neuron).
    layer_index : int
    bounds : ndarray of int
        Token numbers at which the blocks begin and end.
    neurons : slice or ndarray of int
    mask : ndarray of bool or None
        Over the lane's tokens.
    codes : ndarray of int or None
        Group of each of the lane's tokens.
    n_groups : int
    """

    array: Any
    layer_index: int
    bounds: np.ndarray
    neurons: slice | np.ndarray
    mask: np.ndarray | None
    codes: np.ndarray | None
    n_groups: int

    def blocks(self, *, in_pieces: bool) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (group, values (token, neuron), token numbers) of each block, none empty.

        In pieces: some of the neurons at a time, which stay in the cache, and runs of tokens
        without the gaps between, which need not be copied together.
        """
        start = self.bounds[0]
        for a, b in pairwise(self.bounds):
            rows = a + (
                np.arange(b - a)
                if self.mask is None
                else np.flatnonzero(self.mask[a - start : b - start])
            )
            if not len(rows):
                continue
            parts = list(self._parts(rows, in_pieces))
            for columns in self._columns(b - a) if in_pieces else [self.neurons]:
                values = self._read(slice(rows[0], rows[-1] + 1), columns)
                for group, part in parts:
                    yield group, _rows(values, part - rows[0]), part
                del values  # before the next is read, so that its memory is used again

    def _parts(self, tokens: np.ndarray, in_pieces: bool) -> Iterator[tuple[int, np.ndarray]]:
        """Tokens by group, or cut at their gaps, if those are few."""
        if self.codes is not None:
            codes = self.codes[tokens - self.bounds[0]]
            for group in np.unique(codes):
                yield int(group), tokens[codes == group]
            return
        gaps = np.flatnonzero(np.diff(tokens) > 1) + 1
        for part in np.split(tokens, gaps) if in_pieces and len(gaps) < MAX_GAPS else [tokens]:
            yield 0, part

    def _columns(self, rows: int) -> list[slice | np.ndarray]:
        """The neurons in runs of whole inner chunks."""
        if not (isinstance(self.neurons, slice) and isinstance(self.array, ShardedArray)):
            return [self.neurons]
        unit = self.array.layout.chunk_width
        fit = PIECE_NBYTES // (rows * self.array.dtype.itemsize * unit)
        step = max(1, fit) * unit
        return [slice(j, j + step) for j in range(0, self.neurons.stop, step)]

    def _read(self, tokens: slice, columns: slice | np.ndarray) -> np.ndarray:
        hull = columns if isinstance(columns, slice) else _hull(columns)
        values = self.array[self.layer_index, tokens, hull]
        if not isinstance(values, np.ndarray):
            values = values.compute(scheduler="synchronous")
        return values if isinstance(columns, slice) else values[:, columns - hull.start]


def run_lane(lane: Lane, *statistics: Sequence[Statistic]) -> list[list[State | None]]:
    """States of several statistics, each one a group: [statistic][group], None without tokens."""
    keep_memory()
    states: list[list[State | None]] = [[None] * lane.n_groups for _ in statistics]
    every = [s for by_group in statistics for s in by_group if s is not None]
    in_pieces = all(getattr(s, "pooled", False) for s in every)
    for group, values, tokens in lane.blocks(in_pieces=in_pieces):
        for own, by_group in zip(states, statistics, strict=True):
            statistic, old = by_group[group], own[group]
            new = statistic.chunk(values, tokens)
            own[group] = new if old is None else statistic.combine(old, new)
        del values
    return states


@cache
def keep_memory() -> None:
    """Make the C library keep the memory of blocks that are let go, for the next ones.

    glibc gives freed memory back to the system, to be had again page by page at the price of a
    third of a scan, unless it has seen a block of such a size let go before.
    """
    np.empty(2**25 - 2**16, np.uint8)


def _rows(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some rows, ascending; without a copy where none lies between."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return values[rows[0] : rows[-1] + 1]
    return values[rows]


def _hull(neurons: np.ndarray) -> slice:
    return slice(int(neurons.min()), int(neurons.max()) + 1)
