"""Pictures of results: a result and an optional Axes in, the Axes out.

Matplotlib only, no global state; colours run with depth for layers and are fixed for stages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from .errors import UsageError
from .schema import STAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["histogram", "profile", "stage_colour"]

_COLOURS = (
    "#4c566a",
    "#88a0b9",
    "#7b9e6b",
    "#3b6e4f",
    "#b07aa1",
    "#8e5572",
    "#e0a030",
    "#2a78b8",
    "#d1495b",
    "#4aa8a0",
)


def histogram(result: xr.Dataset, ax: Axes | None = None, *, log: bool = False) -> Axes:
    """Draw histograms: one line for each stage, or each layer, coloured by depth.

    Parameters
    ----------
    result : Dataset
        From `actstore.histogram`, per layer; several stages and one layer, or one stage.
    ax : Axes, optional
        Where to draw; default a new figure.
    log : bool
        Logarithmic counts.

    Returns
    -------
    Axes
    """
    ax = _axes(ax)
    name = "density" if "density" in result else "counts"
    if result[name].dims[-1] != "bin" or set(result[name].dims) - {"stage", "layer", "bin"}:
        raise UsageError(
            f"this histogram has dimensions {result[name].dims}: draw one per layer, with "
            "per='layer' and without by, or select first, as result.sel(layer=3)"
        )
    values = result[name].values.reshape(-1, result.sizes["bin"])
    edges = result["edges"].values.reshape(-1, result["edges"].shape[-1])
    rows = [(s, n) for s in _stages(result) for n in np.atleast_1d(result["layer"].values)]
    by_stage = "stage" in result[name].dims
    depth = _depth([n for _, n in rows])
    for i, ((stage, layer), row) in enumerate(zip(rows, values, strict=True)):
        edge = edges[min(i, len(edges) - 1)]
        colour = stage_colour(stage) if by_stage else depth[i]
        label = stage if by_stage else f"layer {layer}"
        ax.stairs(row, edge, color=colour, label=label, linewidth=1.3)
    ax.set_xlabel("activation")
    ax.set_ylabel("probability density" if name == "density" else "values in the bin")
    ax.set_yscale("log" if log else "linear")
    if not log:
        ax.set_ylim(bottom=0)
    layers = np.unique([n for _, n in rows])
    where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
    ax.set_title(where if by_stage else f"{rows[0][0]}, {where}")
    if by_stage or len(rows) <= 12:
        ax.legend(frameon=False, fontsize="small")
    return ax


def profile(result: xr.Dataset, variable: str, ax: Axes | None = None) -> Axes:
    """Draw one variable over layers, a line for each stage.

    Parameters
    ----------
    result : Dataset
        With dims (stage, layer) or (layer).
    variable : str
        What to draw.
    ax : Axes, optional
        Where to draw; default a new figure.

    Returns
    -------
    Axes
    """
    ax = _axes(ax)
    drawn = result[variable]
    if set(drawn.dims) - {"stage", "layer"}:
        raise UsageError(f"{variable} has dimensions {drawn.dims}: a profile is over layers alone")
    for stage in _stages(result):
        line = drawn.sel(stage=stage) if "stage" in drawn.dims else drawn
        colour = stage_colour(stage)
        ax.plot(result["layer"], line, "o-", color=colour, label=stage, markersize=4)
    ax.set_xlabel("layer")
    ax.set_xticks(result["layer"].values)
    ax.set_ylabel(str(drawn.attrs.get("long_name", variable)))
    ax.legend(frameon=False, fontsize="small")
    return ax


def stage_colour(stage: str) -> str:
    """The colour of a stage, the same in every picture."""
    order = list(STAGES)
    return _COLOURS[order.index(stage) if stage in order else hash(stage) % len(_COLOURS)]


def _stages(result: xr.Dataset) -> list[str]:
    return [str(s) for s in np.atleast_1d(result["stage"].values)] if "stage" in result else [""]


def _depth(layers: list[Any]) -> np.ndarray:
    """A colour for each layer, from shallow to deep."""
    import matplotlib as mpl

    values = np.asarray(layers, float)
    span = np.ptp(values) or 1.0
    return mpl.colormaps["plasma"](0.05 + 0.85 * (values - values.min()) / span)


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(6, 4), layout="constrained")[1]
