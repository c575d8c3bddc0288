"""Single values and single neurons: scatters, pair plots, conditions, top tokens."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import xarray as xr

from ..errors import UnknownNameError, UsageError
from .style import (
    INK,
    POINTS,
    Result,
    check_dims,
    described,
    facets,
    group_colours,
    heading,
    holding,
    layers_of,
    legend,
    literally,
    loaded,
    named,
    new_axes,
    panels,
    share_legend,
    stage_colour,
    stages_of,
    tick_whole,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = [
    "condition_scatter",
    "conditions",
    "means",
    "pair_plot",
    "samples",
    "scatter",
    "top_tokens",
    "top_tokens_panels",
]

MOST_POINTS = 100_000
"""Points of one scatter; more would only cover one another."""

MOST_PAIRED = 8
"""Layers of a pair plot."""

MOST_RANKS = 40
"""Tokens of one list."""

MOST_LISTS = 12
"""Neurons whose top tokens are shown beside one another."""


def scatter(
    data: xr.DataArray | xr.Dataset,
    ax: Axes | None = None,
    *,
    along: Literal["neuron", "token"] = "neuron",
) -> Axes:
    """Draw every value of some tokens: over neurons, tokens coloured, or the other way round.

    Parameters
    ----------
    data : DataArray or Dataset
        Activations of one stage and layer, as ``store["mlp_out"].sel(layer=3)[:100]``, or the
        result of `actstore.sample`.
    ax : Axes, optional
        Where to draw; default a new figure.
    along : {"neuron", "token"}
        What the horizontal axis is.

    Returns
    -------
    Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> ax = scatter(data[1], Figure().subplots())
    >>> ax.get_xlabel()
    'neuron'
    """
    if along not in ("neuron", "token"):
        raise UnknownNameError("axis", along, ("neuron", "token"))
    if isinstance(data, xr.Dataset):
        data = holding(data, "sample", "activation")
        data = data["activation"]
    row = "sample" if "sample" in data.dims else "token"
    missing = {row, "neuron"} - set(data.dims)
    if missing:
        raise UsageError(
            f"the data have dimensions {data.dims}: a scatter is of (token, neuron), as "
            'store["mlp_out"].sel(layer=3)[:100], or as actstore.sample gives with unit="token"'
        )
    check_dims(data, row, "neuron")
    ax = new_axes(ax)
    values = data.transpose(..., row, "neuron").values.reshape(-1, data.sizes["neuron"])
    present = np.flatnonzero(np.isfinite(values).any(axis=1))
    step = max(1, -(-len(present) * values.shape[1] // MOST_POINTS))
    values = values[present[::step]]
    token, neuron = np.indices(values.shape)
    neuron = data["neuron"].values[neuron]
    x, colour = (neuron, token) if along == "neuron" else (token, neuron)
    # In no order: else the last colour would cover the others.
    mixed = np.random.default_rng(0).permutation(values.size)
    x, y, colour = (a.ravel()[mixed] for a in (x, values, colour))
    size = 7 if len(y) < 10_000 else 3
    ax.scatter(x, y, size, c=colour, alpha=0.4, cmap="plasma", **POINTS)
    tick_whole(ax)
    some = f" ({len(values):,} of {len(present):,})" if step > 1 else ""
    words = ("neuron", f"a colour for each token{some}")
    if along == "token":
        words = (f"token, in order{some}", "a colour for each neuron")
    about = data.to_dataset(name="activation")
    title = ", ".join(filter(None, (heading(about, but=["neuron"]), words[1])))
    return tidy(ax, title, words[0], "activation")


def samples(result: Result, figure: Figure | SubFigure | None = None) -> np.ndarray:
    """Draw a sample: tokens as scatters over neurons and over tokens, values as a pair plot.

    Parameters
    ----------
    result : Dataset or DataTree
        From `actstore.sample`. Tokens: of one layer; values: of one stage.
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
    >>> axes = samples(actstore.sample(data, layers=1, n=10), Figure())
    >>> [ax.get_xlabel() for ax in axes.flat]
    ['neuron', 'token, in order']
    """
    result = loaded(result)
    parts = stages_of(result)
    first = holding(next(iter(parts.values())), "sample", "activation")
    if "neuron" not in first["activation"].dims:
        return pair_plot(result, figure)  # type: ignore[arg-type]
    axes = panels(figure, len(parts), 2, (4.6, 3))
    for row, part in zip(axes, parts.values(), strict=True):
        scatter(part, row[0], along="neuron")
        scatter(part, row[1], along="token")
    return axes


def pair_plot(result: xr.Dataset, figure: Figure | SubFigure | None = None) -> np.ndarray:
    """Draw every layer against every other: scatters below, correlations above, histograms between.

    Parameters
    ----------
    result : Dataset
        From `actstore.sample` with ``unit="value"``: one stage, 2 to 8 layers.
    figure : Figure or SubFigure, optional
        Where to draw; default a new figure.

    Returns
    -------
    ndarray of Axes (layer, layer)

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> axes = pair_plot(actstore.sample(data, unit="value", n=50), Figure())
    >>> axes.shape
    (3, 3)
    """
    result = holding(result, "sample", "activation")
    drawn = result["activation"]
    check_dims(drawn, "layer", "sample")
    (stage,) = parts = stages_of(result)
    layers, names = layers_of(parts)
    if not 2 <= len(layers) <= MOST_PAIRED:
        raise UsageError(
            f"a pair plot of {len(layers)} layers: give 2 to {MOST_PAIRED}, with layers='0-3' "
            "(--layers 0-3) in the query or as result.sel(layer=[0, 1, 2, 3])"
        )
    values = drawn.transpose(..., "layer", "sample").values.reshape(len(layers), -1)
    values = values[:, np.isfinite(values).all(axis=0)]
    colour = stage_colour(stage) if stage else INK
    n = len(layers)
    axes = panels(figure, n, n, (1.5, 1.5), MOST_PAIRED**2, sharex="col")
    names = [
        name if name != str(k) else f"layer {k}" for k, name in zip(layers, names, strict=True)
    ]
    for i, row in enumerate(axes):
        for j, ax in enumerate(row):
            if i == j:
                ax.hist(values[i], bins=40, color=colour)
            elif i > j:
                ax.scatter(values[j], values[i], s=5, alpha=0.4, color=colour, **POINTS)
            else:
                r = correlation(values[i], values[j])
                style = {"ha": "center", "va": "center", "transform": ax.transAxes, "color": INK}
                ax.text(0.5, 0.5, f"r = {r:.2f}", fontsize=9, **style)
                ax.set_axis_off()
            tidy(ax, x=names[j] if i == n - 1 else "", y=names[i] if j == 0 else "")
            ax.tick_params(labelleft=j == 0 < i, labelbottom=i == n - 1)
    return axes


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or not (np.ptp(x) and np.ptp(y)):
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def conditions(result: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw mean activations over neurons, a colour for each condition.

    Parameters
    ----------
    result : Dataset
        From `actstore.mean_activation`, of one stage and layer.
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
    >>> data = data.assign_coords(condition=("token", ["internal", "terminal"] * 10))
    >>> result = actstore.mean_activation(data, layers=1, by="condition")
    >>> ax = conditions(result, Figure().subplots())
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['internal', 'terminal']
    """
    result = holding(result, "mean_activation", "mean")
    means = _condition_means(result)
    ax = new_axes(ax)
    neurons = np.atleast_1d(result["neuron"].values)
    single = len(means) == 1
    (stage,) = stages_of(result)
    colours = [stage_colour(stage) if stage else INK] if single else group_colours(len(means))
    for (key, y), colour, marker in zip(means.items(), colours, "os^Dv<>P" * 99, strict=False):
        ax.scatter(neurons, y, s=9, marker=marker, color=colour, alpha=0.6, label=key, **POINTS)
    if not single:
        by = str(result.attrs.get("by", ""))
        legend(ax, by, markerscale=1.6)
    tick_whole(ax)
    return tidy(ax, heading(result, but=["neuron"]), "neuron", "mean activation")


def condition_scatter(result: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw the mean activations of two conditions against one another, a point for each neuron.

    Parameters
    ----------
    result : Dataset
        From `actstore.mean_activation` with ``by=``, of one stage, layer and two conditions.
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
    >>> data = data.assign_coords(condition=("token", ["internal", "terminal"] * 10))
    >>> result = actstore.mean_activation(data, layers=1, by="condition")
    >>> ax = condition_scatter(result, Figure().subplots())
    >>> ax.get_xlabel()
    'mean activation, condition internal'
    """
    result = holding(result, "mean_activation", "mean")
    means = _condition_means(result)
    by = str(result.attrs.get("by"))
    if len(means) != 2:
        pair = list(result[by].values[:2]) if len(means) > 2 else ["internal", "terminal"]
        raise UsageError(
            f"{len(means)} conditions: this scatter is of two, from by=LABEL and then, where there "
            f"are more, result.sel({by}={[str(p) for p in pair]})"
        )
    ax = new_axes(ax)
    (first, x), (second, y) = means.items()
    (stage,) = stages_of(result)
    ax.axline((0, 0), slope=1, color="#b8bec9", linewidth=0.8, zorder=0)
    ax.scatter(x, y, s=9, alpha=0.5, color=stage_colour(stage) if stage else INK, **POINTS)
    there = np.isfinite(x) & np.isfinite(y)
    r = correlation(x[there], y[there])
    title = ", ".join(filter(None, (heading(result, but=["neuron"]), f"r = {r:.3f}")))
    return tidy(ax, title, f"mean activation, {by} {first}", f"mean activation,\n{by} {second}")


def _condition_means(result: xr.Dataset) -> dict[str, np.ndarray]:
    """Means over neurons, for each condition."""
    by = str(result.attrs.get("by"))
    drawn = result["mean"]
    check_dims(drawn, "neuron", *([by] if by in drawn.dims else []))
    if by not in drawn.dims:
        return {"": drawn.values.ravel()}
    values = drawn.transpose(by, ...).values.reshape(drawn.sizes[by], -1)
    return dict(zip(map(named, drawn[by].values), values, strict=True))


def means(result: Result, figure: Figure | SubFigure | None = None) -> np.ndarray:
    """Draw mean activations: of two conditions over neurons and against one another.

    Several stages or layers have a panel each: the scatter where there are two conditions, else
    the means over neurons.

    Parameters
    ----------
    result : Dataset or DataTree
        From `actstore.mean_activation`.
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
    >>> data = data.assign_coords(condition=("token", ["internal", "terminal"] * 10))
    >>> result = actstore.mean_activation(data, layers=1, by="condition")
    >>> axes = means(result, Figure())
    >>> axes.shape
    (1, 2)
    """
    result = loaded(result)
    parts = stages_of(result)
    by = str(result.attrs.get("by"))
    two = next(iter(parts.values())).sizes.get(by) == 2
    draw = condition_scatter if two else conditions
    if len(parts) == 1 and all(part.sizes.get("layer", 1) == 1 for part in parts.values()) and two:
        (part,) = parts.values()
        axes = panels(figure, 1, 2, (4.2, 3.4))
        conditions(part, axes[0, 0])
        condition_scatter(part, axes[0, 1])
        return axes
    axes = facets(draw, result, figure, (3.2, 3.0) if two else (3.6, 2.4), [by])
    share_legend(axes)
    return axes


def top_tokens(result: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw the top tokens of one neuron as a list of bars, best first.

    Parameters
    ----------
    result : Dataset
        From `actstore.top_tokens`, of one stage, layer and neuron.
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
    >>> result = actstore.top_tokens(data, layers=1, neurons=2, k=5)
    >>> ax = top_tokens(result, Figure().subplots())
    >>> len(ax.patches)
    5
    """
    result = holding(result, "top_tokens", "value")
    check_dims(result["value"], "rank")
    if result.sizes.get("rank", 1) > MOST_RANKS:
        raise UsageError(
            f"{result.sizes['rank']:,} tokens do not fit a list: ask for k of at most "
            f"{MOST_RANKS}, or select, as result.isel(rank=slice(20))"
        )
    ax = new_axes(ax)
    (stage,) = stages_of(result)
    value, token = result["value"].values.ravel(), result["token"].values.ravel()
    there = token >= 0
    value, token = value[there], token[there]
    if "token_text" in result.coords:
        names = [readable(str(t)) for t in result["token_text"].values.ravel()[there]]
    else:
        names = [f"token {t}" for t in token]
    rank = np.arange(len(value))
    ax.barh(rank, value, color=stage_colour(stage) if stage else INK, height=0.7)
    ax.set_yticks(rank, names)
    for label in ax.get_yticklabels():
        literally(label)
    ax.set_ylim(len(value) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    return tidy(ax, heading(result), described(result["value"]))


def top_tokens_panels(result: Result, figure: Figure | SubFigure | None = None) -> np.ndarray:
    """Draw the top tokens of several neurons; of more than 12, those with the largest values.

    Parameters
    ----------
    result : Dataset or DataTree
        From `actstore.top_tokens`.
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
    >>> axes = top_tokens_panels(actstore.top_tokens(data, layers=1, k=5), Figure())
    >>> axes.shape
    (1, 4)
    """
    cells: list[tuple[float, xr.Dataset]] = []
    total = 0
    sign = 1 if json.loads(result.attrs.get("parameters", "{}")).get("largest", True) else -1
    result = loaded(result)
    for part in stages_of(result).values():
        part = holding(part, "top_tokens", "value")
        best = part["value"].isel(rank=0)
        strength = np.nan_to_num(sign * best.values, nan=-np.inf).ravel()
        total += strength.size
        for i in np.argsort(-strength, kind="stable")[:MOST_LISTS]:
            at = dict(zip(best.dims, np.unravel_index(i, best.shape), strict=True))
            cells.append((strength[i], part.isel({d: [int(k)] for d, k in at.items()})))
    cells = sorted(cells, key=lambda cell: -cell[0])[:MOST_LISTS]
    columns = min(len(cells), 4)
    ranks = cells[0][1].sizes["rank"]
    axes = panels(figure, -(-len(cells) // columns), columns, (2.6, 0.7 + 0.17 * ranks))
    for ax, (_, part) in zip(axes.flat, cells, strict=False):
        top_tokens(part, ax)
    for ax in axes.flat[len(cells) :]:
        ax.set_axis_off()
    if total > len(cells):
        what = "largest" if sign > 0 else "smallest"
        axes.flat[0].figure.supxlabel(
            f"{len(cells)} of {total:,} neurons: those with the {what} values", fontsize=8
        )
    return axes


def readable(text: str) -> str:
    """A token's text in quotes: what cannot be seen, or the font does not have, is escaped."""
    known = _characters()
    shown = repr(text)
    return "".join(c if ord(c) in known else c.encode("unicode_escape").decode() for c in shown)


@lru_cache(maxsize=1)
def _characters() -> frozenset[int]:
    """What the font can draw."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())
