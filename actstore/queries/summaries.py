"""Summaries of distributions: moments, means, distance from a normal, quantiles."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ..stats.histogram import Histogram
from ..stats.moments import Moments
from ..stats.quantiles import Quantiles, following
from ..stats.shape import NormalDistance, normal_grid
from .engine import Output, Pass, stream
from .registry import query
from .result import Result, assemble
from .rows import PER, Per, check, element, fractions_of, groups_of, row_dims
from .selection import Data, Names, Numbers, Source, Tokens, select

__all__ = ["mean_activation", "moments", "normality", "quantiles"]

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


def _moment_outputs(
    names: Sequence[str], source: Source, chosen: np.ndarray, per: str
) -> dict[str, Output]:
    dims, shape = row_dims(source, chosen, per)
    return {
        name: Output(
            dims,
            shape,
            np.int64 if name == "count" else np.float64,
            {"long_name": _MOMENTS[name][0], "units": _MOMENTS[name][1]},
        )
        for name in names
    }


@query('--layers -1 --tokens "position > 0"')
def moments(
    data: Data,
    *,
    stages: Names = None,
    layers: Numbers = None,
    tokens: Tokens = None,
    neurons: Numbers = None,
    by: str | None = None,
    exclude_sinks: str | None = None,
    per: Per = "neuron",
) -> Result:
    """Mean, variance, skewness, kurtosis, extremes and zeros, per neuron, head or layer.

    Parameters
    ----------
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
    selection = select(data, stages, layers, tokens, neurons, by, exclude_sinks)
    check("per", per, PER)

    def passes(source: Source, chosen: np.ndarray) -> list[Pass]:
        return [Pass(Moments(groups_of(source, chosen, per)), sketch=True)]

    outputs = partial(_moment_outputs, list(_MOMENTS), per=per)
    return assemble("moments", selection, stream(selection, passes, outputs), {"per": per})


@query('--stages mlp_post --by condition --tokens "position > 0"')
def mean_activation(
    data: Data,
    *,
    stages: Names = None,
    layers: Numbers = None,
    tokens: Tokens = None,
    neurons: Numbers = None,
    by: str | None = None,
    exclude_sinks: str | None = None,
) -> Result:
    """Mean activation of each neuron, and of each group of tokens beside one another.

    Parameters
    ----------

    Returns
    -------
    Dataset
        mean and count (layer, neuron), with `by` (layer, neuron, group).

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> acts = xr.DataArray(np.float32([[1, 5], [2, 5], [4, 7]]), dims=("token", "neuron"))
    >>> acts = acts.assign_coords(condition=("token", ["a", "a", "b"]))
    >>> mean_activation(acts, by="condition").compute()["mean"].values.tolist()
    [[[1.5, 4.0], [5.0, 7.0]]]
    """
    selection = select(data, stages, layers, tokens, neurons, by, exclude_sinks)

    def passes(source: Source, chosen: np.ndarray) -> list[Pass]:
        return [Pass(Moments(groups_of(source, chosen, "neuron")), sketch=True)]

    outputs = partial(_moment_outputs, ["mean", "count"], per="neuron")
    results = {
        stage: d.transpose("layer", "neuron", ...)
        for stage, d in stream(selection, passes, outputs).items()
    }
    return assemble("mean_activation", selection, results, {})


@query("--stages mlp_pre --layers 3 --neurons 0-9")
def normality(
    data: Data,
    *,
    stages: Names = None,
    layers: Numbers = None,
    tokens: Tokens = None,
    neurons: Numbers = None,
    by: str | None = None,
    exclude_sinks: str | None = None,
    per: Per = "neuron",
) -> Result:
    """How far distributions are from normal: skewness, kurtosis, distance to the matching normal.

    Parameters
    ----------
    per : {"neuron", "layer", "head"}
        What each row of the result is about.

    Returns
    -------
    Dataset
        Variables (layer, [neuron or head]): skewness, kurtosis (Fisher's), and distance, the
        largest difference between the cumulative histogram and the normal distribution of the
        same mean and standard deviation, at 201 edges from 5 standard deviations below the mean
        to 5 above: 0 for a normal, at most 1. The data are read twice.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> draws = np.random.default_rng(0).normal(size=(1000, 1)).astype("float32")
    >>> acts = xr.DataArray(np.hstack([draws, draws > 1]), dims=("token", "neuron"))
    >>> normality(acts).compute()["distance"].values.round(2).tolist()
    [[0.01, 0.51]]
    """
    selection = select(data, stages, layers, tokens, neurons, by, exclude_sinks)
    check("per", per, PER)

    def passes(source: Source, chosen: np.ndarray) -> list[Pass]:
        groups = groups_of(source, chosen, per)
        return [
            Pass(Moments(groups), sketch=True),
            Pass(partial(_normal_distance, groups=groups)),
        ]

    def outputs(source: Source, chosen: np.ndarray) -> dict[str, Output]:
        dims, shape = row_dims(source, chosen, per)
        text = "distance from the normal of the same mean and std"
        distance = Output(dims, shape, np.float64, {"long_name": text, "units": "1"})
        return {
            **_moment_outputs(["skewness", "kurtosis"], source, chosen, per),
            "distance": distance,
        }

    return assemble("normality", selection, stream(selection, passes, outputs), {"per": per})


def _normal_distance(results: dict[str, Any], groups: np.ndarray) -> NormalDistance:
    mean, std = results["mean"][:, None], results["std"][:, None]
    edges = np.where(std > 0, mean + std * normal_grid(), np.nan)
    kept = {name: results[name] for name in ("skewness", "kurtosis")}
    return NormalDistance(Histogram(edges, groups), kept)


@query("--layers -1 --q 0.01,0.5,0.99")
def quantiles(
    data: Data,
    *,
    stages: Names = None,
    layers: Numbers = None,
    tokens: Tokens = None,
    neurons: Numbers = None,
    by: str | None = None,
    exclude_sinks: str | None = None,
    q: float | Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95),
    per: Per = "layer",
) -> Result:
    """Exact quantiles of activation values, interpolated linearly between neighbours.

    Parameters
    ----------
    q : float or sequence of float
        Fractions of the sorted values, from 0 to 1.
    per : {"layer", "head", "neuron"}
        What each row of the result is about.

    Returns
    -------
    Dataset
        quantile (layer, [neuron or head,] q); NaN where a value is NaN. Quantiles are found digit
        by digit, in memory that does not grow with the data; the attribute ``passes`` says how
        often the data are read for that.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> acts = xr.DataArray(np.float32([[1], [2], [3], [10]]), dims=("token", "neuron"))
    >>> quantiles(acts, q=[0.5, 1]).compute()["quantile"].values.tolist()
    [[2.5, 10.0]]
    """
    selection = select(data, stages, layers, tokens, neurons, by, exclude_sinks)
    check("per", per, PER)
    fractions = fractions_of("q", q)

    def passes(source: Source, chosen: np.ndarray) -> list[Pass]:
        groups = groups_of(source, chosen, per)
        search = quantile_search(source, groups, fractions, selection.attrs["tokens_used"])
        return quantile_passes(search, len(chosen) == source.width)

    def outputs(source: Source, chosen: np.ndarray) -> dict[str, Output]:
        dims, shape = row_dims(source, chosen, per)
        attrs = {"long_name": "quantile", "units": "activation"}
        return {"quantile": Output((*dims, "q"), (*shape, len(fractions)), np.float64, attrs)}

    results = {
        stage: d.assign_coords(q=("q", np.array(fractions), {"long_name": "fraction of values"}))
        for stage, d in stream(selection, passes, outputs).items()
    }
    return assemble("quantiles", selection, results, {"q": q, "per": per})


def quantile_search(
    source: Source, groups: np.ndarray, q: tuple[float, ...], tokens: int
) -> Quantiles:
    """The first pass of a search in a source's own values."""
    dtype = element(source)
    significant = 16 if source.dtype == "bfloat16" else 8 * dtype.itemsize
    return Quantiles(q, groups, dtype, significant, tokens * len(groups))


def quantile_passes(search: Quantiles, whole: bool) -> list[Pass]:
    """All the passes of a search; over whole layers, sketches know the first 16 bits."""
    known = whole and search.rows == 1 and search.digit == 16
    return [Pass(search, sketch=known), *[Pass(following)] * (search.passes - 1)]
