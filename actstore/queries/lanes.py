"""Lanes: runs of one layer's blocks, each read once and folded by several statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from ..arrays import ShardedArray
from ..stats.streaming import State, Statistic

__all__ = ["Lane", "keep_memory", "run_lane"]

PIECE_NBYTES = 4 * 2**20
"""What is read at a time where neurons are pooled: it stays in the cache."""


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

        In pieces: a few inner chunks at a time, one upon the other, which stay in the cache. Rows
        are then values of the tokens given, but of some neurons only, and the tokens come again
        with the others.
        """
        if in_pieces and isinstance(self.array, ShardedArray) and isinstance(self.neurons, slice):
            yield from self._pieces(self.array)
            return
        for a, b in pairwise(self.bounds):
            rows = self._chosen(a, b)
            if len(rows):
                values = self._read(slice(rows[0], rows[-1] + 1))
                for group, part in self._parts(rows):
                    yield group, _rows(values, part - rows[0]), part
                del values  # before the next is read, so that its memory is used again

    def _pieces(self, array: ShardedArray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Bounds are those of rows of inner chunks; of each shard, those with tokens that count."""
        layout = array.layout
        wanted: dict[int, dict[int, tuple[int, list[tuple[int, np.ndarray]]]]] = {}
        for a, b in pairwise(self.bounds.tolist()):
            tokens = self._chosen(a, b)
            if len(tokens):
                block, inside = divmod(a, layout.rows)
                parts = list(self._parts(tokens))
                wanted.setdefault(block, {})[inside // layout.chunk_rows] = a, parts
        for block, chosen in wanted.items():
            for i, values in array.pieces(self.layer_index, block, chosen, PIECE_NBYTES):
                a, parts = chosen[i]
                for group, part in parts:
                    yield group, _rows(values, part - a).reshape(-1, values.shape[2]), part

    def _chosen(self, a: int, b: int) -> np.ndarray:
        """Numbers of the tokens from a to b that count."""
        if self.mask is None:
            return np.arange(a, b)
        start = self.bounds[0]
        return a + np.flatnonzero(self.mask[a - start : b - start])

    def _parts(self, tokens: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Tokens by group."""
        if self.codes is None:
            yield 0, tokens
            return
        codes = self.codes[tokens - self.bounds[0]]
        for group in np.unique(codes):
            yield int(group), tokens[codes == group]

    def _read(self, tokens: slice) -> np.ndarray:
        columns = self.neurons
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
    """Some rows (..., row, neuron), ascending; without a copy where none lies between."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return values[..., rows[0] : rows[-1] + 1, :]
    return values[..., rows, :]


def _hull(neurons: np.ndarray) -> slice:
    return slice(int(neurons.min()), int(neurons.max()) + 1)
