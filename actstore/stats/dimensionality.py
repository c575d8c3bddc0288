"""Dimensionality from eigenvalues of covariance, and from nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

__all__ = [
    "TwoNN",
    "components_needed",
    "effective_dimension",
    "null_participation_ratio",
    "participation_ratio",
    "twonn",
    "variances",
]

_DISCARDED = 0.1
_GROUPS = 20
_NEIGHBOURS = 4


def variances(scatter: np.ndarray, n: int, most: int) -> np.ndarray:
    """Eigenvalues of the covariance, largest first.

    Parameters
    ----------
    scatter : ndarray (k, k)
        Centred: products of neurons summed over tokens, or of tokens over neurons.
    n : int
        Tokens.
    most : int
        Eigenvalues that there can be; further ones are rounding.

    Examples
    --------
    >>> x = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    >>> variances(x.T @ x, 4, 2).round(3).tolist()
    [2.667, 0.667]
    """
    if n < 2 or not np.isfinite(scatter).all():
        return np.full(most, np.nan)
    values = _eigenvalues(scatter)[::-1][:most]
    return np.maximum(values, 0) / (n - 1)


@numba.njit(nogil=True, cache=True)
def _eigenvalues(symmetric):  # type: ignore[no-untyped-def]
    """LAPACK's, as numpy's, which however keeps other threads waiting."""
    return np.linalg.eigvalsh(symmetric)


def participation_ratio(scatter: np.ndarray) -> float:
    """(sum of eigenvalues)^2 / sum of their squares, without them: trace and Frobenius norm."""
    squares = np.vdot(scatter, scatter)
    return float(np.trace(scatter) ** 2 / squares) if squares > 0 else np.nan


def effective_dimension(values: np.ndarray, threshold: float, notebook: bool = False) -> float:
    """Components that are needed to reach a fraction of the variance.

    Parameters
    ----------
    values : ndarray
        Eigenvalues, largest first.
    threshold : float
        Between 0 and 1.
    notebook : bool
        Instead the zero-based index of the first component at which the fraction is strictly
        exceeded.

    Examples
    --------
    >>> effective_dimension(np.array([8.0, 1.0, 1.0]), 0.9)
    2.0
    """
    total = values.sum()
    if not total > 0:
        return np.nan
    fraction = np.cumsum(values) / total
    if notebook:
        above = np.flatnonzero(fraction > threshold)
        return float(above[0]) if len(above) else np.nan
    # The last ones may sum to 1 - 1e-16.
    reached = np.flatnonzero(fraction >= min(threshold, fraction[-1]) - 1e-12)
    return float(reached[0] + 1)


def components_needed(
    scatter: np.ndarray, n: int, most: int, threshold: float, notebook: bool = False
) -> float:
    """`effective_dimension` of a scatter matrix, as float64 eigenvalues give it.

    Eigenvalues in float32 cost less and are used where their error, which LAPACK keeps to a few
    roundings of the largest, cannot move the count.

    Parameters
    ----------
    scatter, n, most
        As of `variances`.
    threshold, notebook
        As of `effective_dimension`.

    Examples
    --------
    >>> components_needed(np.diag([8.0, 1.0, 1.0]), 4, 3, 0.95)
    3.0
    """
    total = np.trace(scatter)
    if n > 1 and np.isfinite(total) and total > 0:
        values = _eigenvalues((scatter / total).astype(np.float32))[::-1][:most].astype(float)
        error = 8 * len(scatter) * np.finfo(np.float32).eps * values[0]
        if np.abs(np.cumsum(values) - threshold).min() > error and threshold < 1 - error:
            return effective_dimension(np.maximum(values, 0), threshold, notebook)
    return effective_dimension(variances(scatter, n, most), threshold, notebook)


def null_participation_ratio(n: int, width: int) -> float:
    """Expected participation ratio of as many tokens of isotropic normal data.

    Examples
    --------
    >>> null_participation_ratio(2, 768)
    1.0
    """
    if n < 2:
        return np.nan
    free = n - 1
    return (free * width + 2) / (free + width + 1)


@dataclass(frozen=True)
class TwoNN:
    """An intrinsic dimension.

    Attributes
    ----------
    dimension, stderr : float
    points : int
        Tokens used.
    duplicates : int
        Tokens left out because another has the same values.
    """

    dimension: float
    stderr: float
    points: int
    duplicates: int


def twonn(x_td: np.ndarray) -> TwoNN:
    """Intrinsic dimension from the ratio of distances to the two nearest neighbours.

    Facco et al. (2017): the slope through the origin of -log(1 - F(mu)) over log(mu), the largest
    tenth of the ratios left out. The standard error is a jackknife's over 20 groups of tokens.

    Parameters
    ----------
    x_td : ndarray (token, neuron)

    Examples
    --------
    >>> plane = np.random.default_rng(0).normal(size=(800, 2)) @ np.eye(2, 10)
    >>> 1.7 < twonn(plane).dimension < 2.3
    True
    """
    x = np.unique(np.asarray(x_td), axis=0).astype(np.float64)
    n, duplicates = len(x), len(x_td) - len(x)
    if n < 5:
        return TwoNN(np.nan, np.nan, n, duplicates)
    first, second = nearest(x)
    log_mu = np.log(second / first)
    order = np.random.default_rng(0).permutation(n)
    groups = np.empty(n, np.int64)
    groups[order] = np.arange(n) % min(_GROUPS, n)
    left = np.array([_slope(log_mu[groups != g]) for g in range(groups.max() + 1)])
    k = len(left)
    error = np.sqrt((k - 1) / k * np.sum((left - left.mean()) ** 2))
    return TwoNN(_slope(log_mu), float(error), n, duplicates)


def _slope(log_mu: np.ndarray) -> float:
    n = len(log_mu)
    kept = np.sort(log_mu)[: int(n * (1 - _DISCARDED))]
    survival = -np.log(1 - np.arange(1, len(kept) + 1) / n)
    square = kept @ kept
    return float(kept @ survival / square) if square > 0 else np.nan


def nearest(x_td: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances to the nearest and second nearest other row.

    Candidates come from inner products; their distances are then computed from the differences,
    which lose no digits.
    """
    n = len(x_td)
    x = x_td - x_td.mean(0)
    own = np.einsum("td,td->t", x, x)
    first, second = np.empty(n), np.empty(n)
    near = min(_NEIGHBOURS, n - 1)
    step = max(1, 2**24 // n)
    for top in range(0, n, step):
        rows = np.arange(top, min(n, top + step))
        squares = own[rows, None] + own - 2 * (x[rows] @ x.T)
        squares[np.arange(len(rows)), rows] = np.inf
        candidates = np.argpartition(squares, near - 1, axis=1)[:, :near]
        for i, chosen in zip(rows, candidates, strict=True):
            difference = x[chosen] - x[i]
            distances = np.sort(np.einsum("td,td->t", difference, difference))
            first[i], second[i] = np.sqrt(distances[:2])
    return first, second
