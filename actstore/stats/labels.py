"""What binned values tell about a label: counts by bin and label, streamed; information of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from .streaming import State

__all__ = ["LabelCounts", "bin_ends", "shuffled_information", "table_information"]

_DRAWN_CELLS = 2**20
"""Cells of tables that are drawn at a time."""


def bin_ends(
    mean: np.ndarray, std: np.ndarray, low: np.ndarray, high: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the bins of each neuron: of its values, but no further than outliers begin.

    Parameters
    ----------
    mean, std, low, high : ndarray (neuron,)
        Of all values; std with ddof 1.
    threshold : float
        Standard deviations from the mean beyond which a value is an outlier; 0 for none.

    Examples
    --------
    >>> bin_ends(*np.array([[1.0], [2.0], [0.0], [30.0]]), 5.0)
    (array([0.]), array([11.]))
    """
    if threshold > 0:
        reach = threshold * np.nan_to_num(std)  # of a single value there is no spread
        low, high = np.maximum(low, mean - reach), np.minimum(high, mean + reach)
    half = np.where(low == high, 0.5, 0)  # as numpy does
    return low - half, high + half


@dataclass(frozen=True)
class LabelCounts:
    """How often each neuron's values fall into each bin, label by label.

    Parameters
    ----------
    low, high : ndarray (neuron,)
        Ends of the bins; what lies beyond is counted in the first or last one.
    bins : int
    labels : ndarray of int32
        Label of every token of the data, by its number.
    n_labels : int
    """

    low: np.ndarray
    high: np.ndarray
    bins: int
    labels: np.ndarray
    n_labels: int

    def chunk(self, values_tn: np.ndarray, tokens_t: np.ndarray) -> State:
        kind = np.float64 if values_tn.dtype == np.float64 else np.float32
        values = np.ascontiguousarray(values_tn, kind)
        counts = np.zeros((values.shape[1], self.bins, self.n_labels), np.int64)
        step = (self.high - self.low) / self.bins
        _count(values, self.labels[tokens_t], self.low, step, counts)
        return {"counts": counts}

    def combine(self, a: State, b: State) -> State:
        return {"counts": a["counts"] + b["counts"]}

    def finalize(self, state: State) -> dict[str, Any]:
        return dict(state)


@numba.njit(nogil=True, cache=True)
def _count(values, labels, low, step, counts):  # type: ignore[no-untyped-def]
    """numpy's bins: edge k at k * step + low, closed on the left; NaN is in none."""
    bins = counts.shape[1]
    for i in range(values.shape[0]):
        label = labels[i]
        for j in range(values.shape[1]):
            v = np.float64(values[i, j])
            if not (v == v and step[j] > 0):
                continue
            guess = (v - low[j]) / step[j]
            b = bins - 1 if guess >= bins else (0 if guess < 0 else int(guess))
            while b > 0 and v < b * step[j] + low[j]:
                b -= 1
            while b < bins - 1 and v >= (b + 1) * step[j] + low[j]:
                b += 1
            counts[j, b, label] += 1


def table_information(counts: np.ndarray, correct: bool) -> np.ndarray:
    """Mutual information in bits of tables of counts, (..., bin, label); NaN of empty ones.

    Parameters
    ----------
    counts : ndarray (..., bin, label)
    correct : bool
        Correct the bias after Miller and Madow: add (Kx + Ky - Kxy - 1) / (2 N ln 2).

    Examples
    --------
    >>> float(table_information(np.array([[2, 0], [0, 2]]), False))
    1.0
    """
    n = counts.sum((-2, -1))
    parts = [counts.reshape(*counts.shape[:-2], -1), counts.sum(-1), counts.sum(-2)]
    joint, bins, labels = (np.where(c > 0, c * np.log2(np.maximum(c, 1)), 0).sum(-1) for c in parts)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Hx + Hy - Hxy, with H = log2 N - sum(c log2 c) / N.
        found = np.log2(n) + (joint - bins - labels) / n
        if correct:
            k_joint, k_bins, k_labels = ((c > 0).sum(-1) for c in parts)
            found = found + (k_bins + k_labels - k_joint - 1) / (2 * n * np.log(2))
    return np.where(n > 0, found, np.nan)


def shuffled_information(
    counts: np.ndarray, shuffles: int, seed: int, correct: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of `table_information` with the labels shuffled.

    Shuffling keeps the totals of bins and of labels, and the tables that it makes of them are
    hypergeometric: so tables are drawn, and the data need not be read again.

    Parameters
    ----------
    counts : ndarray of int (table, bin, label)
    shuffles : int
    seed : int
    correct : bool
        As of `table_information`.

    Returns
    -------
    mean, std : ndarray (table,)
        std with ddof 1.

    Examples
    --------
    >>> mean, std = shuffled_information(np.array([[[50, 0], [0, 50]]]), 200, 0, False)
    >>> mean.round(3), std.round(3)
    (array([0.008]), array([0.012]))
    """
    random = np.random.default_rng(seed)
    mean, std = np.empty((2, len(counts)))
    step = max(1, _DRAWN_CELLS // (shuffles * counts[0].size))
    for top in range(0, len(counts), step):
        some = counts[top : top + step]
        own = table_information(_draw(some, shuffles, random), correct)
        mean[top : top + step], std[top : top + step] = own.mean(0), own.std(0, ddof=1)
    return mean, std


def _draw(counts: np.ndarray, shuffles: int, random: np.random.Generator) -> np.ndarray:
    """Tables (shuffle, table, bin, label) with the totals of those given."""
    tables, bins, labels = counts.shape
    drawn = np.empty((shuffles, tables, bins, labels), np.int64)
    left = np.broadcast_to(counts.sum(2), (shuffles, tables, bins)).copy()
    for k, total in enumerate(counts.sum(1).T[:-1]):
        wanted = np.broadcast_to(total, (shuffles, tables)).copy()
        rest = left.sum(2)
        for b in range(bins):
            rest -= left[:, :, b]
            taken = random.hypergeometric(left[:, :, b], rest, wanted)
            drawn[:, :, b, k] = taken
            wanted -= taken
        left -= drawn[..., k]
    drawn[..., -1] = left
    return drawn
