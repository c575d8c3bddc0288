"""Covariance, correlation and R squared between the layers of a stage, or of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..aliases import only_stage
from ..errors import UsageError
from ..stats.layers import LayerProducts
from .engine import Output
from .joint import Answers, Rows, View
from .registry import query
from .result import Result, provenance
from .rows import check
from .selection import Data, Names, Numbers, Selection, Source, Tokens, select
from .units import Unit, labelled, place_of, rows_of_groups, view_of

__all__ = ["layer_covariance"]

Per = Literal["flattened", "neuron"]
PER = ("flattened", "neuron")

_BLOCK_NBYTES = 2**26


@dataclass(frozen=True)
class _Layers:
    """Asks how the layers of a stage go together, or with those of another stage.

    Views are None where a layer is missing.
    """

    layers: tuple[View | None, ...]
    others: tuple[View, ...] | None
    per: str

    def of_rows(self, rows: Rows) -> Answers:
        views = [v for v in (*self.layers, *(self.others or ())) if v is not None]
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
        columns, shape = there, (len(self.layers),) * 2
        if self.others is not None:
            n = len(there)
            found = {name: values[:n, n:] for name, values in found.items()}
            columns, shape = np.arange(len(self.others)), (len(self.layers), len(self.others))
        whole = {n: np.full(shape, np.nan) for n in found}
        for name, values in found.items():
            whole[name][np.ix_(there, columns)] = values
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
    stage_b: str | None = None,
) -> Result:
    """Covariance, correlation and R squared between every two layers of a stage, or of two stages.

    Parameters
    ----------
    per : {"flattened", "neuron"}
        "flattened" takes every (token, neuron) for one sample about the mean of all; "neuron"
        compares each neuron with itself at the other layer, and averages over neurons (those that
        are constant left out of correlations).
    stage_b : str, optional
        Compare each stage's layers with those of this one, which has as many neurons.

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
    other = None
    if stage_b is not None:
        stage_b = only_stage(stage_b, selection.all_sources(), kind="value of stage_b")
        other = _other(selection, stage_b)
    if other is None and len(every) < 2:
        raise UsageError(f"there is but layer {every[0]}: covariance between layers needs two")
    columns = every
    if other is not None:
        columns = [n for n in other.layers if layers is None or n in every]
        if not columns:
            raise UsageError(f"{stage_b} has none of the layers asked; it has {other.layers}")
    described = {
        "covariance": ("covariance (ddof 1)", "activation^2"),
        "correlation": ("correlation", "1"),
        "r_squared": ("squared correlation", "1"),
    }
    shape = len(every), len(columns)
    outputs = {
        name: Output(("layer", "layer_b"), shape, np.float64, {"long_name": text, "units": units})
        for name, (text, units) in described.items()
    }
    units = [_unit(selection, s, every, per, other, columns) for s in selection.sources]
    names = np.array([s.stage for s in selection.sources], object)
    made = labelled(selection, units, "stage", names, outputs, 2**31)
    made = made.assign_coords(layer=every, layer_b=columns)
    made = made.isel(stage=0) if len(selection.sources) == 1 else made
    parameters = {"per": per, "stage_b": stage_b}
    made = made.assign_attrs(provenance("layer_covariance", selection, parameters, 1))
    return made if stage_b is None else made.assign_attrs(stage_b=stage_b)


def _other(selection: Selection, stage_b: str) -> Source:
    other = selection.all_sources()[stage_b]
    for source in selection.sources:
        if source.width != other.width:
            raise UsageError(
                f"stages {source.stage} and {stage_b} have {source.width:,} and {other.width:,} "
                "neurons: covariance between their layers needs as many of both; rsa and cka "
                "compare any two"
            )
    return other


def _unit(
    selection: Selection,
    source: Source,
    layers: list[int],
    per: str,
    other: Source | None,
    columns: list[int],
) -> Unit:
    neurons, own = selection.neurons[source.stage], selection.layers[source.stage]
    views = tuple(view_of(source, n, neurons) if n in own else None for n in layers)
    others = None
    if other is not None:
        others = tuple(view_of(other, n, neurons) for n in columns)
    asked = [
        [(rows, _Layers(views, others, per))] if len(rows.tokens) else []
        for rows in rows_of_groups(selection)
    ]
    return Unit(place_of(selection, "stage", source.stage), asked)
