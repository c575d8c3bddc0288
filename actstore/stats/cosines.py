"""Cosines of pairs of tokens, block by block: their distribution, and the pair at a quantile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Blocks", "Cosines", "cosines", "normal_rows"]

_BLOCK = 1024
_FINE = 65_536


@dataclass(frozen=True)
class Blocks:
    """Unit rows by blocks, so that all pairs can be gone through without holding all rows.

    Attributes
    ----------
    n : int
        Rows.
    read : callable
        ``read(start, stop)`` gives unit rows, float64 (row, neuron), 0 for those without a
        direction.
    halves : bool
        Pairs of a row of the first half with one of the second, instead of all pairs.
    """

    n: int
    read: Callable[[int, int], np.ndarray]
    halves: bool = False

    def pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray | None, int, int]]:
        """Yield matrices of cosines, which of their entries are pairs (None: all), and the
        numbers of their first row and column; a pair's row is the earlier one."""
        half = self.n // 2
        for a, b in self._bounds(0, half) if self.halves else self._bounds(0, self.n):
            rows = self.read(a, b)
            for c, d in self._bounds(half if self.halves else a, self.n):
                others = rows if c == a else self.read(c, d)
                matrix = np.clip(rows @ others.T, -1, 1)
                keep = None
                there, too = rows.any(1), others.any(1)
                if not (there.all() and too.all()):
                    keep = np.outer(there, too)
                if c == a:
                    upper = np.triu(np.ones(matrix.shape, bool), 1)
                    keep = upper if keep is None else keep & upper
                yield matrix, keep, a, c

    @staticmethod
    def _bounds(start: int, stop: int) -> list[tuple[int, int]]:
        return [(a, min(a + _BLOCK, stop)) for a in range(start, stop, _BLOCK)]


@dataclass(frozen=True)
class Cosines:
    """What is found out about all the pairs.

    Attributes
    ----------
    counts : ndarray of int (bin,)
    below, above, pairs : int
    mean, mean_square : float
    values : ndarray (quantile,)
        Cosine of the pair at each quantile; NaN where there is no pair.
    first, second : ndarray of int (quantile,)
        Its two rows; -1 where there is none.
    """

    counts: np.ndarray
    below: int
    above: int
    pairs: int
    mean: float
    mean_square: float
    values: np.ndarray
    first: np.ndarray
    second: np.ndarray


def cosines(blocks: Blocks, edges: np.ndarray, quantiles: Sequence[float]) -> Cosines:
    """Histogram all cosines and find the pairs at quantiles.

    Parameters
    ----------
    blocks : Blocks
    edges : ndarray (bin + 1,)
    quantiles : sequence of float
        The pair at q is number floor(q (pairs - 1)) in the order of cosines.

    Examples
    --------
    >>> rows = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    >>> found = cosines(Blocks(3, lambda a, b: rows[a:b]), np.array([-1, 0.5, 1]), [0, 1])
    >>> found.counts.tolist(), found.values.tolist(), found.first.tolist(), found.second.tolist()
    ([1, 2], [0.0, 0.8], [0, 1], [1, 2])
    """
    counts, fine = np.zeros(len(edges) - 1, np.int64), np.zeros(_FINE, np.int64)
    below = above = pairs = 0
    total = squares = 0.0
    for matrix, keep, _, _ in blocks.pairs():
        values = matrix.ravel() if keep is None else matrix[keep]
        counts += np.histogram(values, edges)[0]
        below += int(np.count_nonzero(values < edges[0]))
        above += int(np.count_nonzero(values > edges[-1]))
        pairs += len(values)
        total += float(values.sum())
        squares += float(values @ values)
        fine += np.bincount(_fine(values), minlength=_FINE)
    ranks = [int(q * (pairs - 1)) for q in quantiles] if pairs else []
    found = _at_ranks(blocks, ranks, fine)
    n = len(quantiles)
    values_q, rows_q = np.full(n, np.nan), np.full((n, 2), -1)
    for i, (value, *rows) in enumerate(found):
        values_q[i], rows_q[i] = value, rows
    mean, square = (total / pairs, squares / pairs) if pairs else (np.nan, np.nan)
    first, second = rows_q.T
    return Cosines(counts, below, above, pairs, mean, square, values_q, first, second)


def _fine(values: np.ndarray) -> np.ndarray:
    """Bin of each cosine in a fine table from -1 to 1."""
    place = (values + 1) * (_FINE / 2)
    return np.minimum(place.astype(np.int64), _FINE - 1)


def _at_ranks(blocks: Blocks, ranks: list[int], fine: np.ndarray) -> list[tuple[float, int, int]]:
    """Cosine and rows of the pairs with certain ranks, in one more pass over the pairs."""
    if not ranks:
        return []
    ends = np.cumsum(fine)
    bins = np.searchsorted(ends, ranks, side="right")
    wanted = np.unique(bins)
    kept: dict[int, list[np.ndarray]] = {int(b): [] for b in wanted}
    for matrix, keep, top, left in blocks.pairs():
        place = _fine(matrix)
        for b in wanted:
            inside = place == b
            rows, columns = np.nonzero(inside if keep is None else inside & keep)
            if len(rows):
                kept[int(b)].append(np.stack([matrix[rows, columns], top + rows, left + columns]))
    found = []
    for rank, b in zip(ranks, bins, strict=True):
        values, first, second = np.concatenate(kept[int(b)], axis=1)
        order = np.lexsort((second, first, values))
        at = order[rank - (ends[b - 1] if b else 0)]
        found.append((float(values[at]), int(first[at]), int(second[at])))
    return found


def normal_rows(n: int, dimensions: int, seed: int) -> np.ndarray:
    """Directions of n draws of an isotropic normal, (n, dimensions)."""
    x = np.random.default_rng(seed).standard_normal((n, dimensions))
    return x / np.linalg.norm(x, axis=1, keepdims=True)
