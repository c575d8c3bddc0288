"""Cosines between pairs of tokens, and those of normal data."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..errors import UsageError
from .dimensions import columns_of, over_layers
from .style import (
    INK,
    Depth,
    Result,
    check_dims,
    colour_bar,
    cut,
    described,
    facets,
    grouping,
    heading,
    holding,
    layers_of,
    legend,
    new_axes,
    overlaid,
    panels,
    stages_of,
    tidy,
    varying,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["baseline_densities", "baselines", "cosine_densities", "cosine_density"]

_DASHES = ("-", "--", "-.", ":")

_METRICS = {"euclidean": "distance", "correlation": "correlation"}


def cosine_density(
    result: xr.Dataset,
    ax: Axes | None = None,
    *,
    baseline: xr.Dataset | None = None,
    depth: Depth | None = None,
) -> Axes:
    """Draw how cosines of pairs of tokens are distributed, a line for each stage, layer or group.

    Dots are the quantiles. One line alone has vertical lines for them, and beside it the cosines of
    normal data where they are given.

    Parameters
    ----------
    result : Dataset
        From `actstore.cosine_pairs`; one dimension besides ``bin`` and ``quantile`` may be longer
        than 1, none with a baseline.
    ax : Axes, optional
        Where to draw; default a new figure.
    baseline : Dataset, optional
        From `actstore.gaussian_baseline`, of the same stage and layer or of more.
    depth : Depth, optional
        Colours of layers, where several panels share a colour bar; default the result's own layers,
        with a bar.

    Returns
    -------
    Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> pairs, normal = actstore.cosine_pairs(data), actstore.gaussian_baseline(data)
    >>> ax = cosine_density(pairs.sel(layer=1), Figure().subplots(), baseline=normal)
    >>> ax.get_legend().get_texts()[-1].get_text()
    'normal, 4 dimensions'
    """
    result = holding(result, "cosine_pairs", "density")
    allowed = ["stage", "layer", *grouping(result)] if baseline is None else []
    along = next(iter(check_dims(result["density"].isel(bin=0), *allowed, most=1)), "")
    ax = new_axes(ax)
    overlaid(partial(_density, ax, not along), result, along, ax, depth)
    heights = result["density"].max("bin").values.ravel()
    heights = heights[np.isfinite(heights)]
    high = cut(ax, heights) if len(heights) else ""
    if baseline is not None:
        baseline = holding(baseline, "gaussian_baseline", "density")
        _normal(ax, result, baseline, heights.max(initial=0))
    ax.locator_params(axis="x", nbins=5)
    tidy(ax, heading(result), _words(result, along), described(result["density"]) + high)
    if not along and len(ax.get_legend_handles_labels()[1]) > 1:
        lines = 1 + ax.get_xlabel().count("\n")
        legend(
            ax, loc="upper center", ncols=2, bbox_to_anchor=(0.5, 0), borderaxespad=3 + 1.5 * lines
        )
    return ax


def _density(ax: Axes, alone: bool, part: xr.Dataset, colour: Any, label: str) -> None:
    """One curve, with its quantiles."""
    values, edges = part["density"].values.ravel(), part["edges"].values.ravel()
    if not np.isfinite(values).all():
        return
    ax.stairs(values, edges, color=colour, label=label, linewidth=1.3)
    if alone:
        ax.stairs(values, edges, color=colour, fill=True, alpha=0.3)
    if "cosine" not in part:
        return
    quantiles = zip(np.atleast_1d(part["quantile"]), part["cosine"].values.ravel(), strict=True)
    for (q, at), dash in zip(quantiles, _DASHES * len(values), strict=False):
        top = values[np.searchsorted(edges, at, "right").clip(1, len(values)) - 1]
        if alone:
            words = f"quantile {q:g}: {at:.3f}".replace("-", "−")
            ax.axvline(at, color=colour, linewidth=1, linestyle=dash, label=words)
        else:
            ax.plot(at, top, "o", color=colour, markersize=3)


def _normal(ax: Axes, part: xr.Dataset, baseline: xr.Dataset, highest: float) -> None:
    """Curves of normal data; what is far above the data's, and the matching one's, is cut."""
    edges = baseline["edges"].values
    if "matching_density" in baseline:
        own = _same_place(baseline, part)
        check_dims(own["matching_density"], "bin")
        values, n = own["matching_density"].values.ravel(), own["matching_dimension"].item()
        highest = max(highest, np.nan_to_num(values).max())
        label = f"normal, {n:,.0f} dimensions (matching)"
        ax.stairs(values, edges, color=INK, linewidth=1.3, label=label)
    every = baseline["density"].transpose(..., "bin").values.reshape(-1, len(edges) - 1)
    for i, (n, values) in enumerate(zip(np.atleast_1d(baseline["dimension"]), every, strict=True)):
        label = f"normal, {n:,} dimensions"
        label += f" (goes to {values.max():.3g})" if values.max() > 1.1 * highest else ""
        dash = _DASHES[1 + i % (len(_DASHES) - 1)]
        ax.stairs(values, edges, color="#717581", linewidth=0.9, linestyle=dash, label=label)
    ax.set_ylim(0, 1.1 * highest if highest else None)


def _same_place(baseline: xr.Dataset, part: xr.Dataset) -> xr.Dataset:
    """The part of a baseline that is about the same stage, layer and group."""
    for name in ("stage", "layer", *grouping(part)):
        if name not in part.coords or name not in baseline.coords:
            continue
        value = part[name].values.ravel()[0]
        if value not in np.atleast_1d(baseline[name].values):
            raise UsageError(
                f"the baseline is not about {name} {value}: ask gaussian_baseline for the same "
                "stages, layers and groups as cosine_pairs"
            )
        if baseline[name].ndim:
            baseline = baseline.sel({name: [value]})
    return baseline


def _words(result: xr.Dataset, along: str) -> str:
    """The horizontal label; says how many pairs the bins leave out."""
    metric = _METRICS.get(str(result.attrs.get("metric")), "cosine")
    outside = sum(int(np.nansum(result[n].values.clip(0))) for n in ("below", "above"))
    words = f"{metric} of two tokens" + (f"; {outside:,} pairs outside" if outside else "")
    if along and "quantile" in result.coords:
        fractions = ", ".join(f"{q:g}" for q in np.atleast_1d(result["quantile"]))
        words += f"\ndots: quantiles {fractions}"
    return words


def cosine_densities(
    result: Result,
    figure: Figure | SubFigure | None = None,
    *,
    baseline: xr.Dataset | None = None,
) -> np.ndarray:
    """Draw how cosines of pairs of tokens are distributed, in panels.

    The lines of a panel are layers where there are several; else groups; else stages. With a
    baseline, every stage, layer and group has a panel of its own.

    Parameters
    ----------
    result : Dataset
        From `actstore.cosine_pairs`, or from `actstore.cosine_matrix` with ``reduce="histogram"``.
    figure : Figure or SubFigure, optional
        Where to draw; default a new figure.
    baseline : Dataset, optional
        From `actstore.gaussian_baseline`, of the same stages, layers and groups.

    Returns
    -------
    ndarray of Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> axes = cosine_densities(actstore.cosine_pairs(data), Figure())
    >>> axes.shape
    (1, 1)
    """
    result = holding(result, "cosine_pairs", "density")
    if baseline is not None:
        baseline = holding(baseline, "gaussian_baseline", "density")
        return facets(partial(cosine_density, baseline=baseline), result, figure, (4.4, 3.6))
    long = varying(result["density"].isel(bin=0))
    group = result.attrs.get("by")
    along = next((d for d in ("layer", group) if d in long), "")
    if len(long) < 2:
        axes = panels(figure, 1, 1, (5, 3.6))
        cosine_density(result, axes[0, 0])
        return axes
    depth = Depth(*layers_of(stages_of(result))) if along == "layer" else None
    axes = facets(partial(cosine_density, depth=depth), result, figure, (3.6, 2.6), [along])
    if depth:
        colour_bar(depth, list(axes.flat))
    return axes


def baseline_densities(result: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw cosines of pairs of normal draws, a line for each number of dimensions.

    Parameters
    ----------
    result : Dataset
        From `actstore.gaussian_baseline`.
    ax : Axes, optional
        Where to draw; default a new figure.

    Returns
    -------
    Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> normal = actstore.gaussian_baseline(data, dimensions=[5, 50])
    >>> ax = baseline_densities(normal, Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['5', '50']
    """
    result = holding(result, "gaussian_baseline", "density")
    check_dims(result["density"], "dimension", "bin")
    if "dimension" not in result["density"].dims:
        result = result.expand_dims("dimension")
    ax = new_axes(ax)

    def line(part: xr.Dataset, colour: Any, label: str) -> None:
        values, edges = part["density"].values.ravel(), part["edges"].values.ravel()
        ax.stairs(values, edges, color=colour, label=label, linewidth=1.3)

    overlaid(line, result, "dimension", ax)
    high = cut(ax, result["density"].max("bin").values.tolist())
    ax.locator_params(axis="x", nbins=5)
    return tidy(ax, "normal data", "cosine of two draws", f"probability density{high}")


def baselines(result: Result, figure: Figure | SubFigure | None = None) -> np.ndarray:
    """Draw cosines of normal draws, and the dimension at which they match each stage and layer.

    Parameters
    ----------
    result : Dataset
        From `actstore.gaussian_baseline`.
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
    >>> axes = baselines(actstore.gaussian_baseline(data, dimensions=5), Figure())
    >>> [ax.get_xlabel() for ax in axes.flat]
    ['cosine of two draws', 'layer']
    """
    result = holding(result, "gaussian_baseline", "density")
    columns = columns_of(result) if "matching_dimension" in result else []
    axes = panels(figure, 1, 1 + len(columns), (4, 3))
    baseline_densities(result, axes[0, 0])
    for ax, part in zip(axes[0, 1:], columns, strict=True):
        over_layers(part, "matching_dimension", ax)
    return axes
