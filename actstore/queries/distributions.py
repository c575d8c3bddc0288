"""Distributions of activations: moments and histograms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ..errors import UnknownNameError, UsageError
from ..stats.histogram import Histogram
from ..stats.moments import Moments
from .engine import Output, stream
from .registry import query
from .result import Result, assemble
from .selection import Data, Source, select

__all__ = ["histogram", "moments"]

Per = Literal["layer", "neuron", "head"]
_MAX_BINS = 100_000

_MOMENTS = {
    "count": ("values", "1"),
    "mean": ("mean", "activation"),
    "variance": ("variance (ddof 1)", "activation^2"),
    "std": ("standard deviation (ddof 1)", "activation"),
    "skewness": ("skewness", "1"),
    "kurtosis": ("excess kurtosis (0 for a normal)", "1"),
    "min": ("minimum", "activation"),
    "max": ("maximum", "activation"),
    "zero_fraction": ("fraction of exact zeros", "1"),
    "positive_fraction": ("fraction above zero", "1"),
}


@query
def moments(
    data: Data,
    *,
    stages: str | Sequence[str] | None = None,
    layers: str | int | Sequence[int] | None = None,
    tokens: str | np.ndarray | None = None,
    neurons: str | int | Sequence[int] | None = None,
    by: str | None = None,
    per: Per = "neuron",
) -> Result:
    """Mean, variance, skewness, kurtosis, extremes and zeros, per neuron, head or layer.

    Parameters
    ----------
    data : Store, path or DataArray
        What to ask.
    stages : str or sequence of str, optional
        Stages, as "mlp_pre,mlp_post"; default all.
    layers : str, int or sequence of int, optional
        Layers, as "0,3-5" or "-1"; default all.
    tokens : str or ndarray of bool, optional
        Tokens, as "position > 0 and condition == 'terminal'", or a mask; default all.
    neurons : str, int or sequence of int, optional
        Neurons, as "0,3-5"; default all.
    by : str, optional
        Label column to split by.
    per : {"neuron", "layer", "head"}
        What each row of the result is about.

    Returns
    -------
    Dataset
        Variables (layer, [neuron or head]): count, mean, variance (ddof 1), std, skewness,
        kurtosis (Fisher's), min, max, zero_fraction, positive_fraction. Undefined values (the
        variance of one token, the skewness of a constant) are NaN.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> acts = xr.DataArray(np.float32([[1, 0], [2, 0], [3, 0]]), dims=("token", "neuron"))
    >>> result = moments(acts).compute()
    >>> result["mean"].values.tolist(), result["zero_fraction"].values.tolist()
    ([[2.0, 0.0]], [[0.0, 1.0]])
    """
    selection = select(data, stages, layers, tokens, neurons, by)
    _check_per(per)

    def statistic(source: Source, chosen: np.ndarray) -> Moments:
        return Moments(_pools(source, chosen, per))

    def outputs(source: Source, chosen: np.ndarray) -> dict[str, Output]:
        dims, shape = _rows(source, chosen, per)
        return {
            name: Output(
                dims,
                shape,
                np.int64 if name == "count" else np.float64,
                {"long_name": text, "units": units},
            )
            for name, (text, units) in _MOMENTS.items()
        }

    results = stream(selection, statistic, outputs)
    return assemble("moments", selection, results, {"per": per})


@query
def histogram(
    data: Data,
    *,
    stages: str | Sequence[str] | None = None,
    layers: str | int | Sequence[int] | None = None,
    tokens: str | np.ndarray | None = None,
    neurons: str | int | Sequence[int] | None = None,
    by: str | None = None,
    bins: int | Sequence[float] = 100,
    range: tuple[float, float] | None = None,
    density: bool = False,
    per: Per = "layer",
) -> Result:
    """Histogram of activation values, per layer, head or neuron.

    Parameters
    ----------
    data : Store, path or DataArray
        What to ask.
    stages : str or sequence of str, optional
        Stages, as "mlp_pre,mlp_post"; default all.
    layers : str, int or sequence of int, optional
        Layers, as "0,3-5" or "-1"; default all.
    tokens : str or ndarray of bool, optional
        Tokens, as "position > 0", or a mask; default all.
    neurons : str, int or sequence of int, optional
        Neurons, as "0,3-5"; default all.
    by : str, optional
        Label column to split by.
    bins : int or sequence of float
        Number of bins of equal width, or their edges, ascending ("start:stop:count" on the
        command line).
    range : tuple of float, optional
        Ends of the bins where `bins` is a number; required then.
    density : bool
        Divide by the count inside the range and the bin's width.
    per : {"layer", "head", "neuron"}
        What each histogram is about.

    Returns
    -------
    Dataset
        counts or density (layer, [neuron or head,] bin), edges (edge), below, above and nonfinite:
        values outside the range and NaN, which are never dropped in silence. Bins are closed on
        the left, the last one on both sides.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> acts = xr.DataArray(np.float32([[0.5, 1.5], [1.0, 9.0]]), dims=("token", "neuron"))
    >>> result = histogram(acts, bins=2, range=(0, 2)).compute()
    >>> result["counts"].values.tolist(), result["above"].values.tolist()
    ([[1, 2]], [1])
    """
    selection = select(data, stages, layers, tokens, neurons, by)
    _check_per(per)
    edges = _edges(bins, range)

    def statistic(source: Source, chosen: np.ndarray) -> Histogram:
        return Histogram(edges, _pools(source, chosen, per), density)

    def outputs(source: Source, chosen: np.ndarray) -> dict[str, Output]:
        dims, shape = _rows(source, chosen, per)
        main = "density" if density else "counts"
        values = {"long_name": "probability density", "units": "1/activation"}
        counts = {"long_name": "values in the bin", "units": "1"}
        return {
            main: Output(
                (*dims, "bin"),
                (*shape, len(edges) - 1),
                np.float64 if density else np.int64,
                values if density else counts,
            ),
            "below": Output(dims, shape, np.int64, {"long_name": "values below the range"}),
            "above": Output(dims, shape, np.int64, {"long_name": "values above the range"}),
            "nonfinite": Output(dims, shape, np.int64, {"long_name": "NaN values"}),
        }

    described = {"long_name": "bin edge", "units": "activation"}
    centres = {"long_name": "bin centre", "units": "activation"}
    results = {
        stage: d.assign(edges=("edge", edges, described)).assign_coords(
            bin=("bin", (edges[1:] + edges[:-1]) / 2, centres)
        )
        for stage, d in stream(selection, statistic, outputs).items()
    }
    parameters = {"bins": bins, "range": range, "density": density, "per": per}
    return assemble("histogram", selection, results, parameters)


def _check_per(per: str) -> None:
    if per not in ("layer", "neuron", "head"):
        raise UnknownNameError("value of per", per, ("neuron", "layer", "head"))


def _edges(bins: Any, limits: tuple[float, float] | None) -> np.ndarray:
    if isinstance(bins, (int, np.integer)):
        if not 1 <= bins <= _MAX_BINS:
            raise UsageError(f"bins is {bins}: it must be from 1 to {_MAX_BINS:,}")
        if limits is None:
            raise UsageError(
                f"bins={bins} needs a range, for example range=(-5, 5) (--range=-5,5), or give "
                "the edges themselves (--bins=-5:5:101)"
            )
        low, high = map(float, limits)
        if not (np.isfinite([low, high]).all() and low < high):
            raise UsageError(f"range {limits!r}: the first number must be below the second")
        return np.linspace(low, high, int(bins) + 1)
    edges = np.asarray(bins, dtype=np.float64)
    good = edges.ndim == 1 and 2 <= len(edges) <= _MAX_BINS + 1 and np.isfinite(edges).all()
    if not (good and (np.diff(edges) > 0).all()):
        raise UsageError(f"bins {bins!r}: give a number of bins, or edges that ascend")
    return edges


def _pools(source: Source, neurons: np.ndarray, per: str) -> np.ndarray | None:
    """Row of the result that each neuron goes to; None for a row each."""
    if per == "layer":
        return np.zeros(len(neurons), np.int64)
    if per == "neuron":
        return np.arange(len(neurons))
    return np.unique(_heads(source)[neurons], return_inverse=True)[1]


def _rows(source: Source, neurons: np.ndarray, per: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if per == "layer":
        return (), ()
    if per == "neuron":
        return ("neuron",), (len(neurons),)
    return ("head",), (len(np.unique(_heads(source)[neurons])),)


def _heads(source: Source) -> np.ndarray:
    if source.heads is None:
        raise UsageError(
            f"stage {source.stage} is not made of heads: per='head' works on attn_z only"
        )
    return source.heads
