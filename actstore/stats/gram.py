"""Similarities of every token with every other, where there are few enough tokens for that.

One Gram matrix, of rows about their mean, serves cosine, correlation and distance, CKA and the
spectrum.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np

__all__ = [
    "Gram",
    "Jackknife",
    "cka",
    "correlate",
    "debiased_cka",
    "jackknife",
    "permuted",
    "ranked",
    "standardised",
]


@dataclass(frozen=True)
class Gram:
    """Inner products of the rows of one view, about a shift near their mean.

    Products of float32 rows are taken in float32: about the shift that loses nothing that
    matters, and all else is float64.

    Attributes
    ----------
    products : ndarray of float64 (token, token)
        Of rows about the shift.
    along : ndarray (token,)
        Inner products of those rows with the shift.
    shift_square : float
        Of the shift with itself.
    row_means : ndarray (token,)
        Mean over neurons of every row, as it was.
    there, varies : ndarray of bool (token,)
        Rows that are not all 0, and that are not all the same.
    width : int
    """

    products: np.ndarray
    along: np.ndarray
    shift_square: float
    row_means: np.ndarray
    there: np.ndarray
    varies: np.ndarray
    width: int

    @classmethod
    def of(cls, x_td: np.ndarray) -> Gram:
        """Of rows (token, neuron)."""
        kind = np.float64 if x_td.dtype == np.float64 else np.float32
        x = np.ascontiguousarray(x_td, kind)
        shift = x.mean(0, dtype=np.float64).astype(kind)
        wide = shift.astype(np.float64)
        about, *of_rows = _about(x, shift)
        products = (about @ about.T).astype(np.float64)
        along, means, there, varies = of_rows
        return cls(products, along, float(wide @ wide), means, there, varies, x.shape[1])

    @cached_property
    def centred(self) -> np.ndarray:
        """Inner products of rows about their mean, which the shift is only near."""
        rows = self.products.mean(1)
        return self.products - rows[:, None] - (rows - rows.mean())

    def similarity(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Similarity of all pairs of rows, and which rows have one.

        Parameters
        ----------
        metric : {"cosine", "correlation", "sqeuclidean"}
            "sqeuclidean" is a distance.

        Returns
        -------
        matrix : ndarray (token, token)
            0 beside rows that have none.
        valid : ndarray of bool (token,)

        Examples
        --------
        >>> matrix, valid = Gram.of(np.array([[1.0, 0.0], [1.0, 1.0]])).similarity("cosine")
        >>> matrix.round(3).tolist()
        [[1.0, 0.707], [0.707, 1.0]]
        """
        own = np.diagonal(self.products)
        if metric == "sqeuclidean":
            distances = own[:, None] + own - 2 * self.products
            return np.maximum(distances, 0, out=distances), np.ones(len(own), bool)
        inner = self.products + self.along[:, None]
        inner += self.along + self.shift_square
        valid = self.there
        if metric == "correlation":
            inner -= self.width * np.outer(self.row_means, self.row_means)
            valid = self.varies
        unit = np.zeros(len(own))
        unit[valid] = 1 / np.sqrt(np.diagonal(inner)[valid])
        inner *= unit[:, None]
        inner *= unit
        return inner, valid


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _about(x, shift):  # type: ignore[no-untyped-def]
    """Rows about a shift, and what `Gram` keeps of every row, in one reading."""
    n, width = x.shape
    about = np.empty_like(x)
    along, means = np.empty(n), np.empty(n)
    there, varies = np.empty(n, np.bool_), np.empty(n, np.bool_)
    for i in range(n):
        total, inner, nonzero, different = 0.0, 0.0, False, False
        first = x[i, 0]
        for j in range(width):
            value = x[i, j]
            rest = value - shift[j]
            about[i, j] = rest
            total += np.float64(value)
            inner += np.float64(rest) * np.float64(shift[j])
            nonzero |= value != 0
            different |= value != first
        along[i], means[i], there[i], varies[i] = inner, total / width, nonzero, different
    return about, along, means, there, varies


def standardised(matrix: np.ndarray) -> np.ndarray:
    """A symmetric matrix about the mean of what is off its diagonal, with nothing on it."""
    n = len(matrix)
    mean = (matrix.sum() - np.trace(matrix)) / max(n * (n - 1), 1)
    rest = matrix - mean
    np.fill_diagonal(rest, 0)
    return rest


def correlate(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of the entries off the diagonal of two `standardised` matrices."""
    spread_a, spread_b = np.vdot(a, a), np.vdot(b, b)
    if not (_varies(a, spread_a) and _varies(b, spread_b)):
        return np.nan
    return float(np.vdot(a, b) / np.sqrt(spread_a * spread_b))


def _varies(matrix: np.ndarray, spread: float) -> bool:
    """Whether entries differ by more than rounding of similarities about 1."""
    return bool(spread > 1e-28 * max(matrix.size, 1)) and len(matrix) > 2


def ranked(matrix: np.ndarray) -> np.ndarray:
    """Ranks of the entries above the diagonal, ties shared, as a symmetric matrix."""
    from scipy.stats import rankdata

    upper = np.triu_indices(len(matrix), 1)
    ranks = np.zeros(matrix.shape)
    ranks[upper] = rankdata(matrix[upper])
    return ranks + ranks.T


def cka(a: np.ndarray, b: np.ndarray) -> float:
    """Linear CKA of two centred Gram matrices."""
    return _aligned(np.vdot(a, b), np.vdot(a, a), np.vdot(b, b))


def debiased_cka(a: np.ndarray, b: np.ndarray) -> float:
    """CKA by the unbiased estimator of HSIC (Song et al. 2012); may be below 0."""
    return _aligned(_unbiased_hsic(a, b), _unbiased_hsic(a, a), _unbiased_hsic(b, b))


def _aligned(cross: float, first: float, second: float) -> float:
    return float(cross / np.sqrt(first * second)) if first > 0 and second > 0 else np.nan


def _unbiased_hsic(a: np.ndarray, b: np.ndarray) -> float:
    n = len(a)
    if n < 4:
        return np.nan
    own_a, own_b = np.diagonal(a), np.diagonal(b)
    rows_a, rows_b = a.sum(1) - own_a, b.sum(1) - own_b
    value = (
        np.vdot(a, b)
        - own_a @ own_b
        + rows_a.sum() * rows_b.sum() / ((n - 1) * (n - 2))
        - 2 * (rows_a @ rows_b) / (n - 2)
    )
    return float(value / (n * (n - 3)))


# -- uncertainty ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Jackknife:
    """What is left of a correlation when one group of tokens at a time is left out."""

    values: np.ndarray

    def reach(self, level: float = 0.95) -> float:
        """Half the width of a confidence interval, of Fisher's z and by Student's t.

        Examples
        --------
        >>> round(Jackknife(np.array([0.5, 0.52, 0.48])).reach(), 2)
        0.13
        """
        from scipy.stats import t

        groups = len(self.values)
        if groups < 2:
            return np.nan
        z = np.arctanh(np.clip(self.values, -1 + 1e-15, 1 - 1e-15))
        error = np.sqrt((groups - 1) / groups * np.sum((z - z.mean()) ** 2))
        return float(t.ppf((1 + level) / 2, groups - 1) * error)


def jackknife(a: np.ndarray, b: np.ndarray, groups: np.ndarray) -> Jackknife:
    """Correlations of two `standardised` matrices without one group of tokens at a time.

    Parameters
    ----------
    a, b : ndarray (token, token)
    groups : ndarray of int (token,)
    """
    n = len(a)
    terms = [(a, None), (b, None), (a, a), (b, b), (a, b)]
    rows = np.stack([x.sum(1) if y is None else np.einsum("ij,ij->i", x, y) for x, y in terms])
    whole = rows.sum(1)
    left = []
    for group in np.unique(groups):
        own = np.flatnonzero(groups == group)
        inner = [m[np.ix_(own, own)] for m in (a, b)]
        within = np.array(
            [x.sum() for x in inner]
            + [np.vdot(inner[i], inner[j]) for i, j in ((0, 0), (1, 1), (0, 1))]
        )
        sums = whole - 2 * rows[:, own].sum(1) + within
        rest = n - len(own)
        pairs = rest * (rest - 1)
        if pairs < 2:
            left.append(np.nan)
            continue
        spread = (sums[2] - sums[0] ** 2 / pairs) * (sums[3] - sums[1] ** 2 / pairs)
        left.append((sums[4] - sums[0] * sums[1] / pairs) / np.sqrt(spread) if spread > 0 else 0)
    return Jackknife(np.array(left))


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def permuted(a, b, order):  # type: ignore[no-untyped-def]
    """Sum of products of a matrix and another whose tokens stand in another order.

    Parameters
    ----------
    a, b : float64 (token, token)
    order : int64 (token,)
    """
    n = len(order)
    total = 0.0
    for i in range(n):
        row, other = a[i], b[order[i]]
        part = 0.0
        for j in range(n):
            part += row[j] * other[order[j]]
        total += part
    return total
