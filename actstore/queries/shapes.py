"""Shapes of neurons' distributions: mass near zero, peaks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..errors import UsageError
from ..stats.edges import even_edges
from ..stats.histogram import Histogram
from ..stats.moments import Moments
from ..stats.shape import Peaks, Zeroness, most_peaks
from .engine import Output, Pass, stream
from .registry import query
from .result import Result, assemble
from .rows import COMPAT, Compat, check, element, per_neuron
from .selection import Data, Names, Numbers, Source, Tokens, select

__all__ = ["peaks", "zeroness"]

MAX_PEAK_BINS = 10_000


@query("--stages attn_z --layers 3 --ratio 1")
def zeroness(
    data: Data,
    *,
    stages: Names = None,
    layers: Numbers = None,
    tokens: Tokens = None,
    neurons: Numbers = None,
    by: str | None = None,
    exclude_sinks: str | None = None,
    threshold: float = 1.0,
    ratio: float = 1.0,
    compat: Compat = "textbook",
) -> Result:
    """How much of each neuron's mass is near zero, beside the spread of its layer.

    Parameters
    ----------
    threshold : float
        A value is near zero below so many layer stds; the layer std is the mean of the stds of
        all the layer's neurons, whichever are asked.
    ratio : float
        A neuron is zeroed whose score is above this.
    compat : {"textbook", "notebook"}
        "notebook" scales in float32.

    Returns
    -------
    Dataset
        score (layer, neuron), values near zero over the others: inf where there are no others,
        NaN where a layer has no spread; and zeroed (layer, neuron). The data are read twice.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> acts = xr.DataArray(np.float32([[0, 3], [0, -3], [1, 4]]), dims=("token", "neuron"))
    >>> result = zeroness(acts).compute()
    >>> result["score"].values.tolist(), result["zeroed"].values.tolist()
    ([[inf, 0.0]], [[True, False]])
    """
    selection = select(data, stages, layers, tokens, neurons, by, exclude_sinks)
    check("compat", compat, COMPAT)
    count = partial(_zeroness, threshold=threshold, ratio=ratio, notebook=compat == "notebook")

    def passes(source: Source, chosen: np.ndarray) -> list[Pass]:
        return [Pass(Moments(), whole=True, sketch=True), Pass(count)]

    def outputs(source: Source, chosen: np.ndarray) -> dict[str, Output]:
        return {
            "score": per_neuron(chosen, np.float64, "values near zero over the others"),
            "zeroed": per_neuron(chosen, bool, "score above the ratio"),
        }

    parameters = {"threshold": threshold, "ratio": ratio, "compat": compat}
    return assemble("zeroness", selection, stream(selection, passes, outputs), parameters)


def _zeroness(results: dict[str, Any], threshold: float, ratio: float, notebook: bool) -> Zeroness:
    return Zeroness(float(results["std"].mean()), threshold, ratio, notebook)


@query("--stages attn_z --layers 3 --height 0.02")
def peaks(
    data: Data,
    *,
    stages: Names = None,
    layers: Numbers = None,
    tokens: Tokens = None,
    neurons: Numbers = None,
    by: str | None = None,
    exclude_sinks: str | None = None,
    bins: int = 50,
    height: float = 200,
    distance: float = 40,
    threshold: float = 1.0,
    compat: Compat = "textbook",
) -> Result:
    """Peaks of each neuron's histogram, and the one nearest zero.

    Where the run of bins around that one above half its height is longer than 20 bins of 50, its
    middle is taken instead.

    Parameters
    ----------
    bins : int
        Bins of the histogram, over each neuron's own range.
    height : float
        Least count of a peak; below 1, a fraction of the tokens.
    distance : float
        Least distance between peaks, in bins of 50: with other bins it is scaled.
    threshold : float
        A peak is centred on zero if it is nearer than so many layer stds; the layer std is the
        mean of the stds of all the layer's neurons, whichever are asked.
    compat : {"textbook", "notebook"}
        "notebook" makes edges in the data's own type, and sees no peak in the first or last bin.

    Returns
    -------
    Dataset
        position (layer, neuron), NaN where no bin reaches the height; n_peaks; centred_on_zero;
        run_low and run_high, the ends of the run; peak_position (layer, neuron, peak), all peaks
        in ascending order, padded with NaN. The data are read twice.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> acts = np.float32([[0, 4], [0, 5], [0, 5], [1, 6]])
    >>> result = peaks(xr.DataArray(acts, dims=("token", "neuron")), height=2).compute()
    >>> result["position"].values.round(1).tolist(), result["centred_on_zero"].values.tolist()
    ([[0.0, 5.0]], [[True, False]])
    """
    selection = select(data, stages, layers, tokens, neurons, by, exclude_sinks)
    check("compat", compat, COMPAT)
    if not 3 <= bins <= MAX_PEAK_BINS:
        raise UsageError(f"bins is {bins}: it must be from 3 to {MAX_PEAK_BINS:,}")
    if not (height > 0 and distance > 0):
        raise UsageError(f"height is {height} and distance {distance}: both must be above 0")

    def passes(source: Source, chosen: np.ndarray) -> list[Pass]:
        notebook = compat == "notebook"
        kind = element(source) if notebook else np.dtype(np.float64)
        search = _PeakSearch(chosen, kind, bins, height, distance, threshold, notebook)
        return [Pass(Moments(), whole=True, sketch=True), Pass(search)]

    def outputs(source: Source, chosen: np.ndarray) -> dict[str, Output]:
        most = most_peaks(bins, distance)
        every = {"long_name": "positions of all peaks", "units": "activation"}
        return {
            "position": per_neuron(chosen, np.float64, "position of the peak", "activation"),
            "n_peaks": per_neuron(chosen, np.int64, "number of peaks"),
            "centred_on_zero": per_neuron(chosen, bool, "whether the peak is near zero"),
            "run_low": per_neuron(chosen, np.float64, "low end of the run", "activation"),
            "run_high": per_neuron(chosen, np.float64, "high end of the run", "activation"),
            "peak_position": Output(("neuron", "peak"), (len(chosen), most), np.float64, every),
        }

    parameters = {
        "bins": bins,
        "height": height,
        "distance": distance,
        "threshold": threshold,
        "compat": compat,
    }
    return assemble("peaks", selection, stream(selection, passes, outputs), parameters)


@dataclass(frozen=True)
class _PeakSearch:
    """Makes the second pass from the moments of all the layer's neurons."""

    chosen: np.ndarray
    kind: np.dtype[Any]
    bins: int
    height: float
    distance: float
    threshold: float
    notebook: bool

    def __call__(self, moments: dict[str, Any]) -> Peaks:
        low, high = (moments[name][self.chosen].astype(self.kind) for name in ("min", "max"))
        histogram = Histogram(even_edges(low, high, self.bins), np.arange(len(self.chosen)))
        return Peaks(
            histogram,
            self.height,
            self.distance,
            self.threshold,
            float(moments["std"].mean()),
            self.notebook,
        )
