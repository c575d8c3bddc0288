"""Mutual information and covariance of all pairs of vectors, outliers left out pair by pair.

The samples are the entries at which two vectors are compared (two tokens' neurons, say). An entry
is left out of a pair where it is an outlier of either vector; so the range, and with it the bins,
can differ from pair to pair. They rarely do: each vector is binned once, and again only for pairs
whose mask takes one of its ends away.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np

__all__ = [
    "Binned",
    "copula_information",
    "copula_ranks",
    "covariances",
    "pair_information",
    "prepare",
]

_MOST_TWICE = np.uint32(4096)
"""Cells of a table that is worth keeping twice."""

_EPS = 1e-12
"""What the notebook adds inside the logarithm; to first order it takes so much from each bin."""


@dataclass(frozen=True)
class Binned:
    """Vectors made ready for pairing.

    Attributes
    ----------
    values : ndarray of float64 (vector, sample)
    keep : ndarray of bool (vector, sample)
        Not an outlier of its own vector.
    low, high : ndarray (vector,)
        Ends of what is kept.
    codes : ndarray of uint8 (vector, sample)
        Bin between those ends; 0 where not kept.
    starts, outliers : ndarray of int64
        Samples not kept, vector after vector; vector i has ``outliers[starts[i] : starts[i+1]]``.
    bins : int
    """

    values: np.ndarray
    keep: np.ndarray
    low: np.ndarray
    high: np.ndarray
    codes: np.ndarray
    starts: np.ndarray
    outliers: np.ndarray
    bins: int

    @cached_property
    def centred(self) -> np.ndarray:
        """Values about the mean of what is kept; 0 where not kept."""
        kept = np.maximum(self.keep.sum(1, keepdims=True), 1)
        values = np.where(self.keep, self.values, 0)
        values -= values.sum(1, keepdims=True) / kept
        values[~self.keep] = 0
        return values

    @cached_property
    def left_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Samples that some vector does not keep, and which of the vectors do not, as 0 and 1."""
        samples = np.flatnonzero(~self.keep.all(0))
        return samples, (~self.keep[:, samples]).astype(np.float64)

    def permuted(self, order: np.ndarray) -> Binned:
        """With the samples in another order."""
        return prepare_kept(self.values[:, order], self.keep[:, order], self.bins)


def prepare(x_vs: np.ndarray, bins: int, threshold: float) -> Binned:
    """Find outliers and bin each vector.

    Parameters
    ----------
    x_vs : ndarray (vector, sample)
    bins : int
        At most 255.
    threshold : float
        A sample further from its vector's mean than so many standard deviations (ddof 1) is an
        outlier; 0 for none.
    """
    x = np.array(x_vs, np.float64)
    keep = np.isfinite(x)
    if threshold > 0 and x.shape[1] > 1:
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = x.std(1, ddof=1, keepdims=True)
            keep &= ~(np.abs((x - x.mean(1, keepdims=True)) / spread) > threshold)
    return prepare_kept(x, keep, bins)


def prepare_kept(x: np.ndarray, keep: np.ndarray, bins: int) -> Binned:
    """`prepare` with the outliers known."""
    low = x.min(1, initial=np.inf, where=keep)
    high = x.max(1, initial=-np.inf, where=keep)
    codes = np.zeros(x.shape, np.uint8)
    _bin_all(x, keep, low, high, bins, codes)
    vectors, outliers = np.nonzero(~keep)
    starts = np.searchsorted(vectors, np.arange(len(x) + 1))
    return Binned(x, keep, low, high, codes, starts, outliers, bins)


@numba.njit(nogil=True, cache=True)
def _bin_all(x, keep, low, high, bins, codes):  # type: ignore[no-untyped-def]
    for v in range(x.shape[0]):
        _bin(x[v], keep[v], low[v], high[v], bins, codes[v])


@numba.njit(nogil=True, cache=True)
def _bin(values, keep, low, high, bins, codes):  # type: ignore[no-untyped-def]
    """numpy's bins: edges by linspace, closed on the left, the last one on both sides."""
    if low == high:
        low, high = low - 0.5, high + 0.5
    step = (high - low) / bins
    for i in range(len(values)):
        if not keep[i]:
            codes[i] = 0
            continue
        v = values[i]
        b = min(max(int((v - low) / step), 0), bins - 1)
        while b > 0 and v < b * step + low:
            b -= 1
        while b < bins - 1 and v >= (b + 1) * step + low:
            b += 1
        codes[i] = b


def pair_information(a: Binned, b: Binned, own: bool) -> tuple[np.ndarray, ...]:
    """Plug-in mutual information of every vector of one set with every one of another, in bits.

    Parameters
    ----------
    a, b : Binned
    own : bool
        The sets are the same: only pairs i < j are computed; the rest is NaN.

    Returns
    -------
    information : ndarray (vector, vector)
        NaN where nothing is kept.
    samples : ndarray of int64 (vector, vector)
        Kept.
    occupied : ndarray of int64 (vector, vector)
        Kx + Ky - Kxy: bins that are not empty, for the correction after Miller and Madow.

    Examples
    --------
    >>> x = prepare(np.array([[0.0, 0, 1, 1], [5, 5, 9, 9], [1, 2, 1, 2]]), 15, 0)
    >>> pair_information(x, x, True)[0].round(6)[0, 1:].tolist()
    [1.0, 0.0]
    """
    samples = a.values.shape[1]
    counts = np.arange(samples + 1, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = np.where(counts > 0, counts * np.log2(counts), 0)
    return _pairs(
        *(a.values, a.keep, a.low, a.high, a.codes, a.starts, a.outliers),
        *(b.values, b.keep, b.low, b.high, b.codes, b.starts, b.outliers),
        a.bins,
        entropy,
        own,
    )


@numba.njit(nogil=True, cache=True)
def _pairs(x, keep_x, low_x, high_x, codes_x, starts_x, out_x, y, keep_y, low_y, high_y, codes_y, starts_y, out_y, bins, entropy, own):  # type: ignore[no-untyped-def]  # fmt: skip  # noqa: E501
    n, m, d = len(x), len(y), x.shape[1]
    information = np.full((n, m), np.nan)
    samples, occupied = np.zeros((n, m), np.int64), np.zeros((n, m), np.int64)
    cells = np.uint32(bins * bins)
    # Two tables in turn: the same cell twice in a row would wait for itself to be written.
    apart = cells if cells <= _MOST_TWICE else np.uint32(0)
    joint = np.empty(cells + apart, np.int32)
    places, again = np.empty(d, np.uint32), np.empty(d, np.uint32)
    first, second = np.empty(d, np.uint8), np.empty(d, np.uint8)
    both = np.empty(d, np.bool_)
    for i in range(n):
        for k in range(d):
            places[k] = codes_x[i, k] * np.uint32(bins) + np.uint32(k & 1) * apart
        for j in range(i + 1 if own else 0, m):
            masked = starts_x[i + 1] - starts_x[i]
            again_x = again_y = False
            for o in range(starts_y[j], starts_y[j + 1]):
                k = out_y[o]
                if keep_x[i, k]:
                    masked += 1
                    again_x |= x[i, k] == low_x[i] or x[i, k] == high_x[i]
            for o in range(starts_x[i], starts_x[i + 1]):
                k = out_x[o]
                if keep_y[j, k]:
                    again_y |= y[j, k] == low_y[j] or y[j, k] == high_y[j]
            kept = d - masked
            samples[i, j] = kept
            if kept == 0:
                continue
            cx, cy, at = codes_x[i], codes_y[j], places
            if again_x or again_y:
                for k in range(d):
                    both[k] = keep_x[i, k] and keep_y[j, k]
            if again_x:
                low, high = _ends(x[i], both)
                _bin(x[i], both, low, high, bins, first)
                cx, at = first, again
                for k in range(d):
                    again[k] = first[k] * np.uint32(bins) + np.uint32(k & 1) * apart
            if again_y:
                low, high = _ends(y[j], both)
                _bin(y[j], both, low, high, bins, second)
                cy = second
            joint[:] = 0
            for k in range(d):
                joint[at[k] + np.uint32(cy[k])] += 1
            for c in range(apart):
                joint[c] += joint[cells + c]
            for o in range(starts_x[i], starts_x[i + 1]):
                k = out_x[o]
                joint[cx[k] * np.int64(bins) + cy[k]] -= 1
            for o in range(starts_y[j], starts_y[j + 1]):
                k = out_y[o]
                if keep_x[i, k]:
                    joint[cx[k] * np.int64(bins) + cy[k]] -= 1
            total = 0.0
            used = 0
            for r in range(bins):
                row = column = 0
                for c in range(bins):
                    cell = joint[r * bins + c]
                    row += cell
                    column += joint[c * bins + r]
                    total -= entropy[cell]
                    used -= cell > 0
                total += entropy[row] + entropy[column]
                used += (row > 0) + (column > 0)
            # Hx + Hy - Hxy, with H = log2 N - sum(c log2 c) / N.
            information[i, j] = entropy[kept] / kept - total / kept - used * _EPS / np.log(2.0)
            occupied[i, j] = used
    return information, samples, occupied


@numba.njit(nogil=True, cache=True)
def _ends(values, keep):  # type: ignore[no-untyped-def]
    low, high = np.inf, -np.inf
    for i in range(len(values)):
        if keep[i]:
            low, high = min(low, values[i]), max(high, values[i])
    return low, high


def covariances(a: Binned, b: Binned) -> np.ndarray:
    """Covariance (ddof 1) of every vector with every other, over what both keep.

    A matrix product of values about their means, and what the other's outliers take away from
    their sums: products over those samples only, which are few.
    """
    (at_a, out_a), (at_b, out_b) = a.left_out, b.left_out
    x, y = a.centred, b.centred
    sums_x = x.sum(1)[:, None] - x[:, at_b] @ out_b.T
    sums_y = y.sum(1) - out_a @ y[:, at_a].T
    _, in_a, in_b = np.intersect1d(at_a, at_b, assume_unique=True, return_indices=True)
    n = a.keep.sum(1)[:, None] - out_b.sum(1) + out_a[:, in_a] @ out_b[:, in_b].T
    with np.errstate(invalid="ignore", divide="ignore"):
        sums = x @ y.T - sums_x * sums_y / n
        return np.where(n > 1, sums / (n - 1), np.nan)


def copula_ranks(x_vs: np.ndarray) -> np.ndarray:
    """Vectors as normal scores of their ranks, standardised (Ince et al. 2017)."""
    from scipy.special import ndtri
    from scipy.stats import rankdata

    scores = ndtri(rankdata(x_vs, axis=1) / (x_vs.shape[1] + 1))
    scores -= scores.mean(1, keepdims=True)
    length = np.linalg.norm(scores, axis=1, keepdims=True)
    return np.divide(scores, length, out=np.zeros_like(scores), where=length > 0)


def copula_information(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mutual information in bits of the Gaussian copulas of all pairs, corrected for its bias.

    Parameters
    ----------
    a, b : ndarray (vector, sample)
        From `copula_ranks`.

    Returns
    -------
    ndarray (vector, vector)
        Of the same vector twice as much as float64 can tell, about 25 bits.
    """
    from scipy.special import psi

    n = a.shape[1]
    most = 1 - np.finfo(np.float64).eps
    correlation = np.clip(a @ b.T, -most, most)
    nats = -0.5 * np.log1p(-(correlation**2))
    bias = (psi((n - 1) / 2) - psi((n - 2) / 2)) / 2 if n > 2 else np.nan
    return (nats - bias) / np.log(2)
