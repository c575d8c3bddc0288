"""Similarity: matrices of tokens and of layers; RSA and CKA of pairs of stages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..errors import UsageError
from ..schema import layer_name
from .cosines import cosine_densities
from .dimensions import over_layers, panels_over_layers
from .style import (
    BLANK,
    INK,
    MARKERS,
    MOST_IN_LEGEND,
    Result,
    bar_rows,
    check_dims,
    described,
    facets,
    group_colours,
    grouping,
    heading,
    holding,
    legend,
    literally,
    loaded,
    named,
    new_axes,
    panel_heading,
    panels,
    scale_bar,
    shades,
    share_legend,
    spread,
    stages_of,
    tick_layers,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = [
    "comparisons",
    "layer_matrix",
    "pair_bars",
    "pair_map",
    "pair_profile",
    "token_matrices",
    "token_matrix",
]

MOST_TOKENS = 5000
"""Rows of a matrix; a picture has fewer dots."""

_MOST_SHARP = 300

_ALONE = (4.2, 3.8)
"""Inches of a matrix without others beside it."""

_METRICS = {"euclidean": "distance"}

_STORES = ("store", "store_b")

_WEAK = 0.05
"""p-values above are marked."""


# -- tokens by tokens ------------------------------------------------------------------------------


def token_matrix(
    result: xr.Dataset, ax: Axes | None = None, *, colours: dict[str, Any] | None = None
) -> Axes:
    """Draw the similarity of every token with every other.

    The scale leaves out the similarity of tokens with themselves.

    Parameters
    ----------
    result : Dataset
        From `actstore.cosine_matrix`, of one stage and layer.
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
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> one = actstore.cosine_matrix(data, layers=1)
    >>> ax = token_matrix(one, Figure().subplots())
    >>> ax.images[0].get_array().shape, ax.get_title(loc="left")
    ((20, 20), 'mlp_out, layer 1')
    """
    result = _held(result)
    check_dims(result["similarity"], "token", "token_b")
    ax = new_axes(ax)
    values = _matrix(result)
    look = colours or shades([_others(result)])
    # Rows thinner than a dot are averaged, else some would not be seen; others stay sharp.
    thin = len(values) > _MOST_SHARP
    image = ax.imshow(values, **look, interpolation="antialiased" if thin else "nearest")
    ax.set_facecolor(BLANK)
    if colours is None:
        scale_bar([image], [ax], _metric(result))
    for axis, dim in ((ax.xaxis, "token_b"), (ax.yaxis, "token")):
        axis.set_major_locator(_whole(5))
        axis.set_major_formatter(partial(_tick, result[dim].values))
    first, second = "token", "token"
    if "stage_b" in result.attrs:
        first, second = f"token at {_stage(result)}", f"token at {result.attrs['stage_b']}"
    if "store_b" in result.attrs:
        first += f" of {result.attrs.get('store', '')}"
        second += f" of {result.attrs['store_b']}"
    return tidy(ax, panel_heading(result), second, first)


def _held(result: Any) -> xr.Dataset:
    """A result with its matrices, checked to be no larger than a picture can show."""
    result = holding(result, "cosine_matrix", "similarity")
    n = max(result.sizes["token"], result.sizes["token_b"])
    if n > MOST_TOKENS:
        raise UsageError(
            f"a picture has too few dots for a matrix of {n:,} tokens: ask for at most "
            f"{MOST_TOKENS:,} with tokens=, or for reduce='histogram'"
        )
    return result


def _matrix(result: xr.Dataset) -> np.ndarray:
    drawn = result["similarity"].transpose(..., "token", "token_b").values
    return drawn.reshape(drawn.shape[-2:])


def _others(result: xr.Dataset) -> np.ndarray:
    """Similarities of a part; of a stage with itself, only of different tokens."""
    values = _matrix(result)
    if {"stage_b", "store_b"} & result.attrs.keys() or len(values) < 2:
        return values
    return values[~np.eye(len(values), dtype=bool)]


def _whole(most: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=True, steps=[1, 2, 5, 10])


def _tick(tokens: np.ndarray, at: float, _: int) -> str:
    """The token that a row or column of a matrix is about."""
    return f"{tokens[round(at)]}" if 0 <= at < len(tokens) else ""


def _stage(result: xr.Dataset) -> str:
    return next(iter(stages_of(result))) or "the other"


def _metric(result: xr.Dataset) -> str:
    metric = str(result.attrs.get("metric", "cosine"))
    return _METRICS.get(metric, metric)


def token_matrices(result: Result, figure: Figure | SubFigure | None = None) -> np.ndarray:
    """Draw matrices of tokens in panels that share a scale; or what they were reduced to.

    Stages are the columns, layers and groups the rows; what varies alone fills rows in turn.
    Histograms are drawn as `cosine_densities` does, means over layers.

    Parameters
    ----------
    result : Dataset or DataTree
        From `actstore.cosine_matrix`.
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
    >>> axes = token_matrices(actstore.cosine_matrix(data), Figure())
    >>> axes.shape
    (1, 3)
    """
    result = loaded(result)
    if isinstance(result, xr.Dataset) and "density" in result:
        return cosine_densities(result, figure)
    if isinstance(result, xr.Dataset) and "mean" in result:
        return panels_over_layers([partial(over_layers, variable="mean")], result, figure)
    rows = [_cells(d) for d in _datasets(result)]
    (columns,) = {len(row) for group in rows for row in group}
    cells = [cell for group in rows for row in group for cell in row]
    drawn = [cell for cell in cells if cell is not None]
    colours = shades(_others(cell) for cell in drawn)
    draw = partial(token_matrix, colours=colours)
    several = columns if 1 < columns < len(cells) else None
    axes = spread(draw, cells, figure, (2.7, 2.7) if len(cells) > 1 else _ALONE, several)
    images = [image for ax in axes.flat for image in ax.images]
    scale_bar(images, list(axes.flat), _metric(drawn[0]))
    return axes


def _datasets(result: Result) -> list[xr.Dataset]:
    """The groups of a result; what the whole was asked with is said of each."""
    if isinstance(result, xr.Dataset):
        return [result]
    return [d.to_dataset().assign_attrs(result.attrs) for d in result.children.values()]


def _cells(result: xr.Dataset) -> list[list[xr.Dataset | None]]:
    """A row for each layer, in it each stage; None where a stage has no such layer."""
    result = _held(result)
    result = result if "layer" in result.dims else result.expand_dims("layer")
    parts = stages_of(result).values()
    layers = np.unique(np.concatenate([part["layer"].values for part in parts]))
    return [
        [part.sel(layer=[n]) if n in part["layer"].values else None for part in parts]
        for n in layers
    ]


# -- layers by layers ------------------------------------------------------------------------------


def layer_matrix(
    result: xr.Dataset, ax: Axes | None = None, *, colours: dict[str, Any] | None = None
) -> Axes:
    """Draw RSA or CKA of every layer with every other; a layer with itself, where not asked, blank.

    Parameters
    ----------
    result : Dataset
        From `actstore.rsa` or `actstore.cka` with ``pairs="layers"``, of one stage.
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
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> ax = layer_matrix(actstore.cka(data, pairs="layers"), Figure().subplots())
    >>> ax.images[0].get_array().shape
    (3, 3)
    """
    result, name = _compared(result)
    if "layer_a" not in result.coords:
        raise UsageError(
            f"this result has no pairs of layers: ask {name} with pairs='layers' (--pairs layers)"
        )
    check_dims(result[name], "pair")
    ax = new_axes(ax)
    a, b, values = _square(result, name)
    image = ax.imshow(values, **(colours or shades([values])), origin="lower")
    ax.set_facecolor(BLANK)
    if colours is None:
        scale_bar([image], [ax], described(result[name]))
    stage = _stage(result)
    for axis, layers in ((ax.yaxis, a), (ax.xaxis, b)):
        _tick_names(axis, [layer_name(stage, n) for n in layers])
    both = "store_b" in result.attrs
    first, second = (f"layer of {result.attrs.get(k, '')}" if both else "layer" for k in _STORES)
    return tidy(ax, panel_heading(result) or name.upper(), second, first)


def _compared(result: Any) -> tuple[xr.Dataset, str]:
    """A comparison with its values, and the variable that holds it."""
    result = holding(result, "rsa", "rsa", "cka")
    return result, "rsa" if "rsa" in result else "cka"


def _square(result: xr.Dataset, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Layers of the rows and columns, and the matrix; symmetric if each pair was asked once."""
    values = result[name].values.ravel()
    a, b = (np.atleast_1d(result[c].values) for c in ("layer_a", "layer_b"))
    there = np.isfinite(values) if np.isfinite(values).any() else slice(None)
    a, b, values = a[there], b[there], values[there]
    if (a < b).all():
        a, b, values = np.append(a, b), np.append(b, a), np.append(values, values)
    rows, columns = np.unique(a), np.unique(b)
    matrix = np.full((len(rows), len(columns)), np.nan)
    matrix[np.searchsorted(rows, a), np.searchsorted(columns, b)] = values
    return rows, columns, matrix


def _tick_names(axis: Any, names: Sequence[str]) -> None:
    """Ticks at rows or columns of a matrix, few enough to be read."""
    every = -(-len(names) // 13)
    axis.set_ticks(range(0, len(names), every), [named(n) for n in names[::every]])
    for text in axis.get_ticklabels():
        literally(text)


# -- pairs of stages -------------------------------------------------------------------------------


def pair_profile(result: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw RSA or CKA over layers, a line for each pair of stages; bands are 95% intervals.

    Where p-values were asked for, open markers are pairs and layers with one above 0.05.

    Parameters
    ----------
    result : Dataset
        From `actstore.rsa` or `actstore.cka`, of pairs of stages; at most 8.
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
    >>> result = actstore.rsa(data, data_b=data + acts[::-1])
    >>> ax = pair_profile(result, Figure().subplots())
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('layer', 'correlation of similarities')
    """
    result, name = _compared(result)
    check_dims(result[name], "layer", "pair")
    pairs = np.atleast_1d(result["pair"].values)
    if len(pairs) > MOST_IN_LEGEND:
        raise UsageError(
            f"{len(pairs)} pairs cannot be told apart: select at most {MOST_IN_LEGEND}, as "
            f"result.sel(pair={list(map(str, pairs[:2]))}), or draw them with "
            "actstore.plot.pair_map"
        )
    ax = new_axes(ax)
    layers: Any = np.atleast_1d(result["layer"].values)
    tables = _tables(result, name, "layer")
    looks = zip(pairs, group_colours(len(pairs)), MARKERS, strict=False)
    for i, (pair, colour, marker) in enumerate(looks):
        own = {key: table[i] for key, table in tables.items()}
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4}
        ax.plot(layers, own["value"], label=named(pair), **style)
        if "low" in own:
            ax.fill_between(layers, own["low"], own["high"], color=colour, alpha=0.15, linewidth=0)
        if "p" in own:
            weak = own["p"] > _WEAK
            at = layers[weak], own["value"][weak]
            ax.plot(*at, linestyle="", markerfacecolor="white", **style)
    tick_layers(ax, layers, list(map(str, layers)))
    if len(pairs) > 1:
        legend(ax, loc="upper left", bbox_to_anchor=(1, 1))
    notes = [f"open: p > {_WEAK}"] if "p" in tables and (tables["p"] > _WEAK).any() else []
    notes += ["bands: 95% intervals"] if "low" in tables else []
    return tidy(ax, _title(result, name), "; ".join(["layer", *notes]), described(result[name]))


def _tables(result: xr.Dataset, name: str, across: str) -> dict[str, np.ndarray]:
    """Values, ends of their intervals, and p-values, as (pair, across), where they are there."""
    names = {"value": name, "low": f"{name}_low", "high": f"{name}_high", "p": "p_value"}
    return {key: _table(result, own, across) for key, own in names.items() if own in result}


def _table(result: xr.Dataset, name: str, across: str) -> np.ndarray:
    """Values (pair, across), also where either is but one."""
    drawn = result[name]
    for dim in ("pair", across):
        drawn = drawn if dim in drawn.dims else drawn.expand_dims(dim)
    return drawn.transpose("pair", across, ...).values.reshape(drawn.sizes["pair"], -1)


def _title(result: xr.Dataset, name: str) -> str:
    words = [heading(result), name.upper()]
    if result["pair"].size == 1:
        words.append(named(result["pair"].values.ravel()[0]))
    return ", ".join(filter(None, words))


def pair_bars(result: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Draw RSA or CKA at one layer, a bar for each pair, or for each group of each pair.

    Error bars are 95% intervals; p-values stand beside the names.

    Parameters
    ----------
    result : Dataset
        From `actstore.rsa` or `actstore.cka`, of one layer or of pairs of any stages and layers.
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
    >>> result = actstore.rsa(data, pairs="mlp_out@0:mlp_out@1,mlp_out@1:mlp_out@2")
    >>> ax = pair_bars(result, Figure().subplots())
    >>> [text.get_text() for text in ax.get_yticklabels()]
    ['mlp_out@0:mlp_out@1', 'mlp_out@1:mlp_out@2']
    """
    result, name = _compared(result)
    group = str(result.attrs.get("by"))
    check_dims(result[name], "pair", *grouping(result))
    ax = new_axes(ax)
    pairs = [named(p) for p in np.atleast_1d(result["pair"].values)]
    keys = np.atleast_1d(result[group].values) if group in result.coords else np.zeros(1)
    many = len(keys) > 1
    own = {key: table.T for key, table in _tables(result, name, group).items()}
    if "p" in own and not many:
        pairs = [f"{pair}, p = {p:.2g}" for pair, p in zip(pairs, own["p"][0], strict=True)]
    reach = None
    if "low" in own:
        reach = np.stack([own["value"] - own["low"], own["high"] - own["value"]]).clip(0)
    colours = group_colours(len(keys) if many else len(pairs))
    if not many and len(pairs) > MOST_IN_LEGEND:
        colours = [INK] * len(pairs)
    bar_rows(ax, pairs, own["value"], colours, [named(k) for k in keys], reach)
    ax.axvline(0, color=INK, linewidth=0.8)
    if many:
        legend(ax, group, loc="upper left", bbox_to_anchor=(1, 1))
    notes = ["lines: 95% intervals"] if reach is not None else []
    words = "; ".join([described(result[name]), *notes])
    return tidy(ax, ", ".join(filter(None, (heading(result), name.upper()))), words)


def pair_map(
    result: xr.Dataset, ax: Axes | None = None, *, colours: dict[str, Any] | None = None
) -> Axes:
    """Draw RSA or CKA of many pairs of stages over layers, a row for each pair.

    Parameters
    ----------
    result : Dataset
        From `actstore.rsa` or `actstore.cka`, of pairs of stages.
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
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> result = actstore.rsa(data, data_b=data + acts[::-1])
    >>> ax = pair_map(result, Figure().subplots())
    >>> ax.images[0].get_array().shape
    (1, 3)
    """
    result, name = _compared(result)
    check_dims(result[name], "layer", "pair")
    ax = new_axes(ax)
    values = _table(result, name, "layer")
    image = ax.imshow(values, **(colours or shades([values])), aspect="auto")
    ax.set_facecolor(BLANK)
    if colours is None:
        scale_bar([image], [ax], described(result[name]))
    pairs = np.atleast_1d(result["pair"].values)
    ax.set_yticks(range(len(pairs)), [named(p) for p in pairs])
    _tick_names(ax.xaxis, [str(n) for n in np.atleast_1d(result["layer"].values)])
    ax.tick_params(length=0)
    return tidy(ax, _title(result, name), "layer")


def comparisons(result: Result, figure: Figure | SubFigure | None = None) -> np.ndarray:
    """Draw RSA or CKA of any shape: matrices of layers, profiles over layers, or bars.

    Groups have a panel each, or a bar each. More than 8 pairs over layers are drawn as a map.

    Parameters
    ----------
    result : Dataset
        From `actstore.rsa` or `actstore.cka`.
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
    >>> axes = comparisons(actstore.rsa(data, pairs="layers"), Figure())
    >>> axes[0, 0].images[0].get_array().shape
    (3, 3)
    """
    result, name = _compared(result)
    pairs, layers = result.sizes.get("pair", 1), result.sizes.get("layer", 1)
    between = "layer_a" in result.coords and "stage_a" not in result.coords
    groups = result.sizes.get(str(result.attrs.get("by")), 1)
    if not between and layers == 1:
        height = 0.8 + 0.2 * pairs * max(1.2, 0.7 * groups)
        axes = panels(figure, 1, 1, (5 if groups == 1 else 6, height))
        pair_bars(result, axes[0, 0])
        return axes
    if not between and pairs <= MOST_IN_LEGEND:
        axes = facets(pair_profile, result, figure, (4.4, 3.0), ["layer"])
        if axes.size > 1:
            share_legend(axes)
        return axes
    colours = shades([result[name].values])
    draw = partial(layer_matrix if between else pair_map, colours=colours)
    matrix = (2.9, 2.8) if groups * len(stages_of(result)) > 1 else _ALONE
    size = matrix if between else (1.8 + 0.2 * layers, 0.8 + 0.18 * pairs)
    axes = facets(draw, result, figure, size, ["layer"])
    images = [image for ax in axes.flat for image in ax.images]
    scale_bar(images, list(axes.flat), described(result[name]))
    return axes
