"""Covariance, correlation and R squared between the layers of a stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import UsageError
from ..stats.layers import LayerProducts
from .engine import Output
from .joint import Answers, Rows, View
from .registry import query
from .result import Result, provenance
from .rows import check
from .selection import Data, Names, Numbers, Selection, Tokens, select
from .units import Unit, labelled, place_of, rows_of_groups, view_of

__all__ = ["layer_covariance"]

Per = Literal["flattened", "neuron"]
PER = ("flattened", "neuron")

_BLOCK_NBYTES = 2**28


@dataclass(frozen=True)
class _Layers:
    """Asks how the layers of a stage go together; views are None where a layer is missing."""

    layers: tuple[View | None, ...]
    per: str

    def of_rows(self, rows: Rows) -> Answers:
        views = [v for v in self.layers if v is not None]
        products, width = LayerProducts(), views[0].width
        step = max(1, _BLOCK_NBYTES // (8 * width * len(views)))
        for top in range(0, len(rows.tokens), step):
            products.add([view.read(rows.tokens[top : top + step]) for view in views])
        if self.per == "neuron":
            found = _described(products.by_neuron())
            with np.errstate(invalid="ignore"):
                # A constant neuron has no correlation, and the others still have.
                found = {name: _mean_of_finite(values) for name, values in found.items()}
        else:
            found = _described(products.flattened())
        there = np.flatnonzero([v is not None for v in self.layers])
        whole = {n: np.full((len(self.layers),) * 2, np.nan) for n in found}
        for name, values in found.items():
            whole[name][np.ix_(there, there)] = values
        return whole


def _described(covariance: np.ndarray) -> dict[str, np.ndarray]:
    """Correlation and R squared beside a covariance (layer, layer[, neuron])."""
    variance = np.einsum("aa...->a...", covariance)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt(variance[:, None] * variance[None])
        correlation = np.where(spread > 0, np.clip(covariance / spread, -1, 1), np.nan)
    return {"covariance": covariance, "correlation": correlation, "r_squared": correlation**2}


def _mean_of_finite(values: np.ndarray) -> np.ndarray:
    there = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(there, values, 0).sum(-1) / there.sum(-1)


@query('--stages hidden --tokens "position > 0"')
def layer_covariance(
    data: Data,
    *,
    stages: Names = None,
    layers: Numbers = None,
    tokens: Tokens = None,
    neurons: Numbers = None,
    by: str | None = None,
    exclude_sinks: str | None = None,
    per: Per = "flattened",
) -> Result:
    """Covariance, correlation and R squared between every two layers of a stage.

    Parameters
    ----------
    per : {"flattened", "neuron"}
        "flattened" takes every (token, neuron) for one sample about the mean of all; "neuron"
        compares each neuron with itself at the other layer, and averages over neurons (those that
        are constant left out of correlations).

    Returns
    -------
    Dataset
        covariance (ddof 1), correlation and r_squared (stage, layer, layer_b).

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> acts = np.float32([[[1, 5], [2, 0]], [[2, 10], [4, 0]]])
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"))
    >>> layer_covariance(data).compute()["correlation"].values.round(6).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    selection = select(data, stages, layers, tokens, neurons, by, exclude_sinks)
    check("per", per, PER)
    every = sorted({n for own in selection.layers.values() for n in own})
    if len(every) < 2:
        raise UsageError(f"there is but layer {every[0]}: covariance between layers needs two")
    n = len(every)
    described = {
        "covariance": ("covariance (ddof 1)", "activation^2"),
        "correlation": ("correlation", "1"),
        "r_squared": ("squared correlation", "1"),
    }
    outputs = {
        name: Output(("layer", "layer_b"), (n, n), np.float64, {"long_name": text, "units": units})
        for name, (text, units) in described.items()
    }
    units = [_unit(selection, source.stage, every, per) for source in selection.sources]
    names = np.array([s.stage for s in selection.sources], object)
    made = labelled(selection, units, "stage", names, outputs, 2**31)
    made = made.assign_coords(layer=every, layer_b=every)
    made = made.isel(stage=0) if len(selection.sources) == 1 else made
    return made.assign_attrs(provenance("layer_covariance", selection, {"per": per}, 1))


def _unit(selection: Selection, stage: str, layers: list[int], per: str) -> Unit:
    (source,) = [s for s in selection.sources if s.stage == stage]
    own = selection.layers[stage]
    views = tuple(
        view_of(source, layer, selection.neurons[stage]) if layer in own else None
        for layer in layers
    )
    asked = [
        [(rows, _Layers(views, per))] if len(rows.tokens) else []
        for rows in rows_of_groups(selection)
    ]
    return Unit(place_of(selection, "stage", stage), asked)
