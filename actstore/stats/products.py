"""Products of rows, streamed: what RSA, CKA and dimensionality need, in one pass and d x d memory.

Rows are first taken to a *space*: as they are ("linear"), to unit length ("cosine"), or to unit
length about their own mean ("correlation"). There, similarities of rows i and j are
``c_ij = d_i . d_j + p_i + p_j`` plus a constant, where d_i is the row about a fixed shift near the
mean. Sums over all pairs of rows of products of two such similarities follow from the widths'
cross product of the rows and a border of three columns (p, g, 1); nothing is tokens x tokens.

The shift is what keeps the digits: similarities may all lie in 0.9999..1, neurons at 3000 +- 10.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "SPACES",
    "Core",
    "PairSums",
    "Products",
    "cka",
    "debiased_cka",
    "in_space",
    "participation_ratio",
    "rsa",
]

SPACES = ("linear", "cosine", "correlation")
P, G, ONE = range(3)
"""Columns of the border: p, g and 1 of each row."""

_SLICE_ROWS = 512
_ROUNDING = 1e-9


def in_space(x_td: np.ndarray, space: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows in a space, and which of them have a direction there.

    Parameters
    ----------
    x_td : ndarray (token, neuron)
    space : {"linear", "cosine", "correlation"}

    Returns
    -------
    rows : ndarray of float64 (token, neuron)
        Rows without a direction are 0.
    valid : ndarray of bool (token,)

    Examples
    --------
    >>> rows, valid = in_space(np.array([[3.0, 4.0], [0.0, 0.0]]), "cosine")
    >>> rows.tolist(), valid.tolist()
    ([[0.6, 0.8], [0.0, 0.0]], [True, False])
    """
    x = np.array(x_td, np.float64)
    if space == "linear":
        return x, np.ones(len(x), bool)
    valid: np.ndarray = np.any(x, axis=1)
    if space == "correlation":
        valid = x.max(1) > x.min(1)
        x -= x.mean(1, keepdims=True)
    norm = np.sqrt(np.einsum("td,td->t", x, x))
    x /= np.where(valid, norm, 1)[:, np.newaxis]
    x[~valid] = 0
    return x, valid


@dataclass(frozen=True)
class Core:
    """A part of a cross product that is summed in one pass.

    Attributes
    ----------
    a, b : int
        Two views; the same for a view's product with itself.
    rows : slice
        Of neurons of the first.
    """

    a: int
    b: int
    rows: slice


@dataclass(frozen=True)
class PairSums:
    """Sums over rows of two views, the second's letters being E, q, h.

    Attributes
    ----------
    squares : float
        Of the entries of the cross product D'E.
    bilinear : float
        D'E between the sums of D and of E.
    left, right : ndarray (neuron, 3), (3, neuron)
        D' times the second's border; the first's border times E.
    corner : ndarray (3, 3)
        Product of the borders.
    """

    squares: float
    bilinear: float
    left: np.ndarray
    right: np.ndarray
    corner: np.ndarray

    def swapped(self) -> PairSums:
        """The same of the two views in the other order."""
        return PairSums(self.squares, self.bilinear, self.right.T, self.left.T, self.corner.T)

    def __add__(self, other: PairSums) -> PairSums:
        """With the squares of another part of the cross product; the borders are the same."""
        return PairSums(
            self.squares + other.squares,
            self.bilinear + other.bilinear,
            self.left,
            self.right,
            self.corner,
        )


class _Cross:
    """Running products of two views."""

    def __init__(self, a: int, b: int, rows: slice) -> None:
        self.a, self.b, self.rows = a, b, rows
        self.core: Any = 0.0
        self.left: Any = 0.0
        self.right: Any = 0.0
        self.corner: Any = 0.0

    def add(self, x: _Rows, y: _Rows) -> None:
        # Of one array with itself, numpy computes one half only.
        part = x.core if self.rows == slice(0, x.core.shape[1]) else x.core[:, self.rows]
        product = part.T @ (part if self.a == self.b and part is x.core else y.core)
        if isinstance(self.core, float):
            self.core = product.astype(np.float64)
        else:
            self.core += product
        self.left = self.left + _border(x.core, y.border)
        self.right = self.right + _border(y.core, x.border).T
        self.corner = self.corner + x.border.T @ y.border

    def less(self, other: _Cross) -> _Cross:
        """Without the rows of another."""
        rest = _Cross(self.a, self.b, self.rows)
        for name in ("core", "left", "right", "corner"):
            setattr(rest, name, getattr(self, name) - getattr(other, name))
        return rest

    def sums(self) -> PairSums:
        total, other = self.left[self.rows, ONE], self.right[ONE]
        return PairSums(
            float(np.vdot(self.core, self.core)),
            float(total @ (self.core @ other)),
            self.left,
            self.right,
            self.corner,
        )


@dataclass(frozen=True)
class _Rows:
    """A block's rows of one view, about the shift."""

    core: np.ndarray  # float32 (t, d)
    border: np.ndarray  # float64 (t, 3)
    valid: np.ndarray  # bool (t,)

    def of(self, chosen: np.ndarray) -> _Rows:
        return _Rows(self.core[chosen], self.border[chosen], self.valid[chosen])


def _border(core: np.ndarray, border: np.ndarray) -> np.ndarray:
    """core' border in float64, without a copy of the whole core."""
    total = np.zeros((core.shape[1], 3))
    for top in range(0, len(core), _SLICE_ROWS):
        part = slice(top, top + _SLICE_ROWS)
        total += core[part].astype(np.float64).T @ border[part]
    return total


class Products:
    """Cross products of several views over the same tokens, block by block.

    Parameters
    ----------
    space : {"linear", "cosine", "correlation"}
    cores : iterable of Core
        What to sum.
    pairs : iterable of (int, int)
        Views whose rows are left out of `own` where the other has no direction.
    keep_zeros : bool
        Whether a row without a direction has similarity 0 with every other (as scikit-learn has
        it) instead of being left out of the pair.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(50, 4))
    >>> products = Products("cosine", [Core(0, 0, slice(0, 4))], [])
    >>> products.add([x[:20]]); products.add([x[20:]])
    >>> u = x / np.linalg.norm(x, axis=1, keepdims=True)
    >>> sums = products.pair(0, 0)
    >>> bool(np.isclose(rsa(sums, sums, sums), 1))
    True
    """

    def __init__(
        self,
        space: str,
        cores: Iterable[Core],
        pairs: Iterable[tuple[int, int]],
        keep_zeros: bool = False,
    ) -> None:
        self.space, self.keep_zeros = space, keep_zeros
        self._pairs = [(a, b) for a, b in pairs if a != b]
        self.dropped = dict.fromkeys(self._pairs, 0)
        self._shifts: dict[int, np.ndarray] = {}
        self._crosses = [_Cross(c.a, c.b, c.rows) for c in cores]
        # Products of a view with itself over the rows that another view has no direction for.
        self._missing: dict[tuple[int, int, int], _Cross] = {}

    def add(self, blocks: Sequence[np.ndarray]) -> None:
        """Add the next rows of each view, (token, neuron) each."""
        views = {v for c in self._crosses for v in (c.a, c.b)} | {v for p in self._pairs for v in p}
        rows = {view: self._about_shift(view, blocks[view]) for view in views}
        for cross in self._crosses:
            cross.add(rows[cross.a], rows[cross.b])
        for a, b in self._pairs:
            both = rows[a].valid & rows[b].valid
            dropped = len(both) - np.count_nonzero(both)
            self.dropped[a, b] += int(dropped)
            if dropped:
                self._set_apart(rows, a, b)
                self._set_apart(rows, b, a)

    def _set_apart(self, rows: dict[int, _Rows], own: int, other: int) -> None:
        chosen = rows[own].valid & ~rows[other].valid
        if not chosen.any():
            return
        part = rows[own].of(chosen)
        for cross in self._crosses:
            if cross.a == cross.b == own:
                key = (own, other, cross.rows.start)
                self._missing.setdefault(key, _Cross(own, own, cross.rows)).add(part, part)

    def _about_shift(self, view: int, block: np.ndarray) -> _Rows:
        t, d = block.shape
        core, border = np.empty((t, d), np.float32), np.empty((t, 3))
        valid = np.empty(t, bool)
        if view not in self._shifts:
            u, own = in_space(block, self.space)
            self._shifts[view] = u[own].mean(0) if own.any() else np.zeros(d)
            del u
        shift = self._shifts[view]
        for top in range(0, t, _SLICE_ROWS):
            at = slice(top, min(t, top + _SLICE_ROWS))
            u, own = in_space(block[at], self.space)
            if self.keep_zeros:
                own[:] = True
            u -= shift
            square = np.einsum("td,td->t", u, u)
            p = -square / 2 if self.space == "linear" else u @ shift
            g = square if self.space == "linear" else square + 2 * p
            core[at] = u
            core[at][~own] = 0
            border[at] = np.stack([p, g, np.ones(len(p))], 1) * own[:, np.newaxis]
            valid[at] = own
        return _Rows(core, border, valid)

    def pair(self, a: int, b: int) -> PairSums:
        """Sums of two views over the rows that both have a direction for."""
        return self._total(c for c in self._crosses if (c.a, c.b) == (a, b))

    def own(self, view: int, other: int) -> PairSums:
        """Sums of a view with itself, over the rows that another has a direction for, too."""
        crosses = [c for c in self._crosses if c.a == c.b == view]
        missing = self._missing
        return self._total(
            c.less(missing[key]) if (key := (view, other, c.rows.start)) in missing else c
            for c in crosses
        )

    def whole(self, view: int) -> np.ndarray:
        """Scatter of a linear view about its mean, (neuron, neuron)."""
        (cross,) = [c for c in self._crosses if c.a == c.b == view]
        total, n = cross.right[ONE], cross.corner[ONE, ONE]
        return cross.core - np.outer(total, total / n)

    @staticmethod
    def _total(crosses: Iterable[_Cross]) -> PairSums:
        parts = [c.sums() for c in crosses]
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total


def rsa(pair: PairSums, first: PairSums, second: PairSums, distances: bool = False) -> float:
    """Pearson correlation of two views' similarities over all pairs of distinct rows.

    Parameters
    ----------
    pair, first, second : PairSums
        Of the two views, and of each with itself over the same rows.
    distances : bool
        Of squared Euclidean distances, from products in linear space.

    Returns
    -------
    float
        NaN where either has no spread.

    Notes
    -----
    With D, p, g of one view and E, q, h of the other (g_i = c_ii): the sum over all i, j of
    c_ij c'_ij is |D'E|^2 + 2 (D'q).(D'1) + 2 (E'p).(E'1) + 2 n p.q + 2 (p.1)(q.1), from which the
    terms i = j, g.h, are taken.
    """
    n = pair.corner[ONE, ONE]
    pairs = n * (n - 1)
    if pairs <= 0:
        return np.nan
    sum_a = _sum_of_similarities(pair.left[:, ONE], pair.corner[:, ONE], n, distances)
    sum_b = _sum_of_similarities(pair.right[ONE], pair.corner[ONE], n, distances)
    cross = _sum_of_products(pair, distances) - sum_a * sum_b / pairs
    spread_a = _spread(first, sum_a, pairs, distances)
    spread_b = _spread(second, sum_b, pairs, distances)
    return float(cross / np.sqrt(spread_a * spread_b))


def _spread(own: PairSums, total: float, pairs: float, distances: bool) -> float:
    """Sum of squared differences from the mean; NaN where it is nothing but rounding."""
    squares = _sum_of_products(own, distances)
    spread = squares - total**2 / pairs
    return spread if spread > _ROUNDING * squares else np.nan


def _sum_of_similarities(total: np.ndarray, border: np.ndarray, n: float, distances: bool) -> float:
    diagonal = 0 if distances else border[G]
    return float(total @ total + 2 * n * border[P] - diagonal)


def _sum_of_products(s: PairSums, distances: bool) -> float:
    n = s.corner[ONE, ONE]
    all_pairs = (
        s.squares
        + 2 * s.left[:, P] @ s.left[:, ONE]
        + 2 * s.right[P] @ s.right[ONE]
        + 2 * n * s.corner[P, P]
        + 2 * s.corner[P, ONE] * s.corner[ONE, P]
    )
    return float(all_pairs - (0 if distances else s.corner[G, G]))


def cka(pair: PairSums, first: PairSums, second: PairSums) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019), from products in linear space."""
    return _aligned(_centred_squares(pair), _centred_squares(first), _centred_squares(second))


def debiased_cka(pair: PairSums, first: PairSums, second: PairSums) -> float:
    """CKA by the unbiased estimator of HSIC (Song et al. 2012); may be below 0."""
    return _aligned(_unbiased_hsic(pair), _unbiased_hsic(first), _unbiased_hsic(second))


def _aligned(cross: float, first: float, second: float) -> float:
    return float(cross / np.sqrt(first * second)) if first > 0 and second > 0 else np.nan


def _centred_squares(s: PairSums) -> float:
    """Squares of the entries of the cross covariance, times n^2."""
    a, b, n = s.left[:, ONE], s.right[ONE], s.corner[ONE, ONE]
    return float(s.squares - 2 * s.bilinear / n + (a @ a) * (b @ b) / n**2)


def _unbiased_hsic(s: PairSums) -> float:
    """HSIC_1 from inner products without their diagonals."""
    n = s.corner[ONE, ONE]
    if n < 4:
        return np.nan
    a, b = s.left[:, ONE], s.right[ONE]
    diagonal = s.corner[G, G]
    trace = s.squares - diagonal
    sum_a, sum_b = a @ a - s.corner[G, ONE], b @ b - s.corner[ONE, G]
    chain = s.bilinear - a @ s.left[:, G] - b @ s.right[G] + diagonal
    value = trace + sum_a * sum_b / ((n - 1) * (n - 2)) - 2 * chain / (n - 2)
    return float(value / (n * (n - 3)))


def participation_ratio(own: PairSums) -> float:
    """(sum of eigenvalues)^2 / sum of their squares, of a linear view's covariance."""
    total, n = own.left[:, ONE], own.corner[ONE, ONE]
    trace = own.corner[G, ONE] - total @ total / n
    squares = _centred_squares(own)
    return float(trace**2 / squares) if squares > 0 else np.nan
