"""Shapes of neurons' distributions: mass near zero, peaks, distance from a normal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np

from .histogram import Histogram
from .streaming import State

__all__ = ["NormalDistance", "Peaks", "Rescale", "Zeroness", "find_peak", "normal_grid"]

RUN = 20
"""Bins, of 50, that a run at half a peak's height must exceed to be taken by its middle."""


@dataclass(frozen=True)
class Rescale:
    """Values about a centre of each neuron, in a unit of each neuron.

    Parameters
    ----------
    centre, unit : ndarray (neuron,)
        The result is ``(x - centre) * layer_std / unit``.
    layer_std : float
    notebook : bool
        In float32 and in that order of operations, as the notebooks compute it; else in float64.
    """

    centre: np.ndarray
    unit: np.ndarray
    layer_std: float
    notebook: bool

    def __call__(self, values_tn: np.ndarray) -> np.ndarray:
        if not self.notebook:
            return (values_tn - self.centre) * (self.layer_std / self.unit)
        centre, unit = self.centre.astype(np.float32), self.unit.astype(np.float32)
        return (values_tn.astype(np.float32) - centre) * np.float32(self.layer_std) / unit


@dataclass(frozen=True)
class Zeroness:
    """How many values of each neuron are small beside the layer's spread.

    Results: score, small values over the others (inf where there are no others), and zeroed,
    whether the score is above `ratio`.

    Parameters
    ----------
    layer_std : float
    threshold, ratio : float
    notebook : bool
        Scale in float32, as the notebook does.
    """

    layer_std: float
    threshold: float
    ratio: float
    notebook: bool

    def chunk(self, values_tn: np.ndarray, tokens_t: np.ndarray | None = None) -> State:
        kind = np.float32 if self.notebook else np.float64
        values = values_tn if values_tn.dtype == np.float64 else values_tn.astype(np.float32)
        with np.errstate(divide="ignore"):
            scale = kind(1) / kind(self.layer_std)
        small, large = _count_small(np.ascontiguousarray(values), scale, kind(self.threshold))
        return {"small": small, "large": large}

    def combine(self, a: State, b: State) -> State:
        return {name: a[name] + b[name] for name in a}

    def finalize(self, state: State) -> dict[str, Any]:
        with np.errstate(divide="ignore", invalid="ignore"):
            score = state["small"] / state["large"]
        return {"score": score, "zeroed": score > self.ratio}


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _count_small(x, scale, threshold):  # type: ignore[no-untyped-def]
    small = np.zeros(x.shape[1], np.int64)
    large = np.zeros(x.shape[1], np.int64)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            v = abs(x[i, j]) * scale
            small[j] += v < threshold
            large[j] += v >= threshold
    return small, large


@dataclass(frozen=True)
class Peaks:
    """The peak nearest zero of each neuron's histogram.

    Results: position, n_peaks, centred_on_zero, run_low and run_high (neuron,), peak_position
    (neuron, peak); and `extra`.

    Parameters
    ----------
    histogram : Histogram
        One row a neuron.
    height : float
        Least count of a peak; below 1, a fraction of the tokens.
    distance : float
        Least distance between peaks, in bins of 50.
    threshold : float
        Peaks nearer to zero than so many `layer_std` are centred on it.
    layer_std : float
    notebook : bool
    """

    histogram: Histogram
    height: float
    distance: float
    threshold: float
    layer_std: float
    notebook: bool
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def most(self) -> int:
        """Upper limit of the number of peaks of a histogram."""
        bins = self.histogram.edges.shape[1] - 1
        return most_peaks(bins, self.distance)

    def chunk(self, values_tn: np.ndarray, tokens_t: np.ndarray | None = None) -> State:
        return self.histogram.chunk(values_tn)

    def combine(self, a: State, b: State) -> State:
        return self.histogram.combine(a, b)

    def finalize(self, state: State) -> dict[str, Any]:
        counts, edges = state["counts"], self.histogram.edges
        tokens = counts.sum(axis=1) + state["below"] + state["above"] + state["nonfinite"]
        bins = counts.shape[1]
        position, low, high = np.full((3, len(counts)), np.nan)
        places = np.full((len(counts), self.most), np.nan)
        n_peaks = np.zeros(len(counts), np.int64)
        middle = (edges[:, :-1] + edges[:, 1:]) / 2
        for i, own in enumerate(counts):
            height = self.height * tokens[i] if self.height < 1 else self.height
            found = find_peak(own, middle[i], height, self.distance, padded=not self.notebook)
            if found is None:
                continue
            peaks, at, left, right = found
            n_peaks[i] = len(peaks)
            places[i, : len(peaks)] = middle[i, peaks]
            position[i] = middle[i, at]
            low[i], high[i] = edges[i, min(left + 1, bins)], edges[i, right]
        with np.errstate(divide="ignore", invalid="ignore"):
            centred = np.abs(position) / self.layer_std < self.threshold
        return {
            **self.extra,
            "position": position,
            "n_peaks": n_peaks,
            "centred_on_zero": centred,
            "peak_position": places,
            "run_low": low,
            "run_high": high,
        }


def most_peaks(bins: int, distance: float) -> int:
    """Upper limit of the number of peaks of a histogram."""
    return (bins - 1) // int(np.ceil(_scaled(distance, bins))) + 1


def _scaled(bins_of_50: float, bins: int) -> float:
    return max(1.0, bins_of_50 * bins / 50)


def find_peak(
    counts: np.ndarray, middle: np.ndarray, height: float, distance: float, *, padded: bool
) -> tuple[np.ndarray, int, int, int] | None:
    """Find the peaks of a histogram and choose the one nearest zero.

    Parameters
    ----------
    counts, middle : ndarray (bin,)
        The histogram, and the middles of its bins.
    height : float
        Least count of a peak.
    distance : float
        Least distance between peaks, in bins of 50.
    padded : bool
        See a peak in the first or last bin too.

    Returns
    -------
    peaks : ndarray of int
        Bins of all peaks.
    at : int
        The chosen one's; where the run of bins around it above half its height is long, the
        middle of the run.
    left, right : int
        The first bins on either side that are not in the run (without padding: the first bin
        ends it in any case).

    None where no bin reaches the height.

    Examples
    --------
    >>> find_peak(np.array([1, 9, 1, 0]), np.arange(4.0), 5, 40, padded=True)
    (array([1]), 1, 0, 2)
    """
    from scipy.signal import find_peaks

    bins = len(counts)
    shift = 1 if padded else 0
    heights = np.pad(counts, shift)
    peaks = find_peaks(heights, height=height, distance=_scaled(distance, bins))[0] - shift
    if not len(peaks):
        return None
    at = int(peaks[np.argmin(np.abs(middle[peaks]))])
    above = 2 * counts > counts[at]
    left = right = at
    while left > -shift and above[left]:
        left -= 1
    while right < bins and above[right]:
        right += 1
    if right - left > RUN * bins / 50:
        at = (left + right) // 2
    return peaks, at, left, right


def normal_grid() -> np.ndarray:
    """Standard scores at which distributions are compared with a normal."""
    return np.linspace(-5, 5, 201)


@dataclass(frozen=True)
class NormalDistance:
    """Largest difference between a cumulative histogram and the normal of its mean and std.

    Parameters
    ----------
    histogram : Histogram
        With edges at ``mean + std * normal_grid()``.
    extra : dict
        More results, passed on as they are.
    """

    histogram: Histogram
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def pooled(self) -> bool:
        return self.histogram.pooled

    def chunk(self, values_tn: np.ndarray, tokens_t: np.ndarray | None = None) -> State:
        return self.histogram.chunk(values_tn)

    def combine(self, a: State, b: State) -> State:
        return self.histogram.combine(a, b)

    def finalize(self, state: State) -> dict[str, Any]:
        from scipy.special import ndtr

        counts = np.column_stack([state["below"], state["counts"]])
        total = counts.sum(axis=1) + state["above"]
        with np.errstate(divide="ignore", invalid="ignore"):
            cumulative = counts.cumsum(axis=1) / total[:, None]
        distance = np.abs(cumulative - ndtr(normal_grid())).max(axis=1)
        distance[np.isnan(self.histogram.edges).any(axis=1)] = np.nan
        return {**self.extra, "distance": distance}
