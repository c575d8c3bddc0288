"""Layers by layers: covariance, correlation and shared variance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..schema import layer_name
from .style import (
    BLANK,
    Result,
    cells_of,
    check_dims,
    grouping,
    heading,
    holding,
    new_axes,
    panels,
    scale_bar,
    stages_of,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["layer_covariance_matrix", "layer_covariances"]


_LAYER_WORDS = {
    "covariance": "covariance (activation^2)",
    "correlation": "correlation",
    "r_squared": "shared variance (R², %)",
}


def layer_covariance_matrix(
    result: xr.Dataset,
    variable: str = "r_squared",
    ax: Axes | None = None,
    *,
    colours: dict[str, Any] | None = None,
) -> Axes:
    """Draw covariance, correlation or R squared of every layer with every other.

    Parameters
    ----------
    result : Dataset
        From `actstore.layer_covariance`, of one stage.
    variable : {"covariance", "correlation", "r_squared"}
        What to draw; R squared as per cent of shared variance.
    ax : Axes, optional
        Where to draw; default a new figure.
    colours : dict, optional
        Limits and map (``vmin``, ``vmax``, ``cmap``), where several panels share a colour bar;
        default the matrix's own, with a bar.

    Returns
    -------
    Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="hidden")
    >>> ax = layer_covariance_matrix(actstore.layer_covariance(data), ax=Figure().subplots())
    >>> [t.get_text() for t in ax.get_xticklabels()]
    ['emb', 'h.0', 'h.1']
    """
    result = holding(result, "layer_covariance", variable)
    check_dims(result[variable], "layer", "layer_b")
    ax = new_axes(ax)
    stage = next(iter(stages_of(result)))
    own = result[variable].transpose(..., "layer", "layer_b").values
    own = own.reshape(own.shape[-2:]) * (100 if variable == "r_squared" else 1)
    # Another stage of the result may have more layers.
    there = result["covariance"].notnull() if "covariance" in result else result[variable].notnull()
    rows, columns = (there.any([d for d in there.dims if d != k]) for k in ("layer", "layer_b"))
    if not rows.any():
        rows, columns = xr.ones_like(rows), xr.ones_like(columns)
    own = own[np.ix_(rows, columns)]
    far = float(np.nanmax(np.abs(own), initial=1e-300))
    own_look = {"vmin": -far, "vmax": far, "cmap": "RdBu_r"}
    look = colours or ({"vmin": 0, "vmax": 100} if variable == "r_squared" else own_look)
    image = ax.imshow(own, **look, origin="lower")
    ax.set_facecolor(BLANK)
    if colours is None:
        scale_bar([image], [ax], _LAYER_WORDS[variable])
    second = str(result.attrs.get("stage_b", stage))
    sides = (ax.yaxis, stage, rows[rows]["layer"]), (ax.xaxis, second, columns[columns]["layer_b"])
    for axis, side, layers in sides:
        every = -(-len(layers) // 9)
        names = [layer_name(side, int(n)) for n in layers.values[::every]]
        axis.set_ticks(range(0, len(layers), every), names)
    title = ", ".join(filter(None, (heading(result, grouping(result)), _SHORT[variable])))
    group = heading(result, ["stage", "layer"])
    words = (f"layer of {second}", f"layer of {stage}") if second != stage else ("layer", "layer")
    return tidy(ax, "\n".join(filter(None, (title, group))), *words)


_SHORT = {"covariance": "covariance", "correlation": "correlation", "r_squared": "R²"}


def layer_covariances(result: Result, figure: Figure | SubFigure | None = None) -> np.ndarray:
    """Draw covariance and R squared of layers side by side, for each stage and group.

    Parameters
    ----------
    result : Dataset
        From `actstore.layer_covariance`.
    figure : Figure or SubFigure, optional
        Where to draw; default a new figure.

    Returns
    -------
    ndarray of Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> axes = layer_covariances(actstore.layer_covariance(data), Figure())
    >>> [ax.get_title(loc="left") for ax in axes.flat]
    ['mlp_out, covariance', 'mlp_out, R²']
    """
    result = holding(result, "layer_covariance", "covariance")
    cells = [own for part in stages_of(result).values() for own in cells_of(part)]
    rows, columns = (len(cells), 2) if len(cells) < 3 else (-(-len(cells) // 2), 4)
    axes = panels(figure, rows, columns, (3.3, 2.7))
    places = axes.reshape(-1, 2)
    for both, cell in zip(places, cells, strict=False):
        layer_covariance_matrix(cell, "covariance", both[0])
        layer_covariance_matrix(cell, "r_squared", both[1])
    for both in places[len(cells) :]:
        for ax in both:
            ax.set_axis_off()
    return axes
