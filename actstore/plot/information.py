"""Pairs of tokens or neurons: their mutual information and covariance."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ..errors import UsageError
from ..queries.flat import pairs
from .dimensions import over_layers, panels_over_layers
from .samples import correlation
from .style import (
    BLANK,
    INK,
    MARKERS,
    POINTS,
    Depth,
    Result,
    check_dims,
    colour_bar,
    cut,
    described,
    facets,
    group_colours,
    grouping,
    heading,
    holding,
    layers_of,
    legend,
    loaded,
    named,
    new_axes,
    overlaid,
    panel_heading,
    panels,
    scale_bar,
    shades,
    share_legend,
    spread,
    stage_colour,
    stages_of,
    thin_ticks,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = [
    "information",
    "information_density",
    "information_depth",
    "information_map",
    "information_matrix",
    "information_scatter",
]

_NAMES = ("mutual_information", "covariance")

_MOST_ROWS = 5000
_MOST_POINTS = 4000
"""Of a scatter; more would hide one another."""

_WIDE = 50
"""Means that differ by so much make an axis logarithmic."""

_INNER = (0.005, 0.995)
"""Quantiles between which the colours of matrices run: a few pairs lie far out."""


# -- matrices of pairs -----------------------------------------------------------------------------


def information_matrix(
    result: xr.Dataset,
    variable: str = "mutual_information",
    ax: Axes | None = None,
    *,
    colours: dict[str, Any] | None = None,
) -> Axes:
    """Draw mutual information or covariance of every token with every other, or of neurons.

    The colours run from the 0.5th to the 99.5th percentile of the pairs.

    Parameters
    ----------
    result : Dataset
        From `actstore.mutual_information` or `actstore.pairwise_covariance`, of one stage and
        layer; with groups, one of them, as ``tree["internal"].to_dataset()``.
    variable : {"mutual_information", "covariance"}
        What to draw.
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
    >>> acts = np.random.default_rng(0).normal(size=(20, 50)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("token", "neuron"), name="mlp_out")
    >>> one = actstore.mutual_information(data)
    >>> ax = information_matrix(one, ax=Figure().subplots())
    >>> ax.images[0].get_array().shape
    (20, 20)
    """
    result = _one(result, variable)
    first = _paired_dim(result)
    check_dims(result[variable], first, f"{first}_b")
    ax = new_axes(ax)
    values = result[variable].transpose(..., first, f"{first}_b").values
    values = values.reshape(values.shape[-2:])
    look = colours or _look([_flat(result, variable)])
    thin = max(values.shape) > 300  # rows thinner than a dot are averaged
    image = ax.imshow(values, **look, interpolation="antialiased" if thin else "nearest")
    ax.set_facecolor(BLANK)
    for axis, dim in ((ax.xaxis, f"{first}_b"), (ax.yaxis, first)):
        axis.set_major_formatter(partial(_tick, result[dim].values))
    ax.locator_params(nbins=5, integer=True, steps=[1, 2, 5, 10])
    if colours is None:
        scale_bar([image], [ax], _words(result[variable]))
    return tidy(ax, panel_heading(result), first, first)


def _tick(numbers: np.ndarray, at: float, _: int) -> str:
    """The token or neuron that a row or column of a matrix is about."""
    return f"{numbers[round(at)]}" if 0 <= at < len(numbers) else ""


def _one(result: Any, *names: str) -> xr.Dataset:
    """A dataset with matrices of pairs, small enough to be drawn."""
    result = holding(result, "mutual_information", *names)
    first = _paired_dim(result)
    n = max(result.sizes[first], result.sizes[f"{first}_b"])
    if n > _MOST_ROWS:
        raise UsageError(
            f"a picture has too few dots for a matrix of {n:,} {first}s: ask for at most "
            f"{_MOST_ROWS:,}, or for reduce='histogram'"
        )
    return result


def _paired_dim(result: xr.Dataset) -> str:
    for dim in ("token", "neuron"):
        if f"{dim}_b" in result.dims:
            return dim
    raise UsageError(
        "this result has no matrices of pairs: ask mutual_information or pairwise_covariance "
        "without reduce"
    )


def _flat(result: xr.Dataset, variable: str) -> np.ndarray:
    """Values of the pairs, each once, those that are defined."""
    values = pairs(result[[variable]])[variable].values.ravel()
    return values[np.isfinite(values)]


def _look(values: Sequence[np.ndarray]) -> dict[str, Any]:
    every = np.concatenate([*values, np.empty(0)])
    return shades([np.quantile(every, _INNER) if len(every) else every])


def _words(variable: xr.DataArray) -> str:
    """An axis label; that covariance is divided by n - 1 can be read elsewhere."""
    return described(variable).replace(" (ddof 1)", "")


def _parts(result: Result) -> dict[str, xr.Dataset]:
    """Each group of a result of pairs by its name; "" where it has none."""
    if isinstance(result, xr.DataTree):
        nodes = [node.to_dataset().assign_attrs(result.attrs) for node in result.children.values()]
        label = str(result.attrs.get("by"))
        return {named(node[label].item()): node for node in nodes if node[label].size == 1}
    for label in grouping(result):
        if label in result.dims:
            return {named(k): result.sel({label: k}) for k in result[label].values}
    return {"": result}


def _places(parts: dict[str, xr.Dataset]) -> list[tuple[str, Any]]:
    """Stages and layers of a result: each is drawn by itself."""
    found: dict[tuple[str, int], None] = {}
    for part in parts.values():
        for stage, own in stages_of(part).items():
            for layer in np.atleast_1d(own["layer"].values):
                found[stage, int(layer)] = None
    stages = dict.fromkeys(s for s, _ in found)
    layers = sorted({n for _, n in found})
    return [(s, n) for n, s in product(layers, stages) if (s, n) in found]


def _at(part: xr.Dataset, stage: str, layer: int) -> xr.Dataset:
    own = stages_of(part)[stage]
    own = own if "layer" in own.dims else own.expand_dims("layer")
    return own.sel(layer=[layer])


# -- distributions ---------------------------------------------------------------------------------


def _counted(result: Result) -> xr.Dataset:
    """Means and histograms of pairs, as ``reduce="histogram"`` gives them, of matrices."""
    if isinstance(result, xr.Dataset) and any(f"counts_{n}" in result for n in _NAMES):
        return result
    parts = _parts(result)
    names = [n for n in _NAMES if any(n in part for part in parts.values())]
    places = _places(parts)
    if not names:
        holding(result if isinstance(result, xr.Dataset) else xr.Dataset(), *_NAMES)
    stages, layers = list(dict.fromkeys(s for s, _ in places)), sorted({n for _, n in places})
    shape = (len(stages), len(layers), len(parts))
    label = str(result.attrs.get("by", "group"))
    dims = ("stage", "layer", label)
    made = xr.Dataset(
        coords={"stage": np.array(stages, object), "layer": layers}, attrs=result.attrs
    )
    for name in names:
        attrs = next(iter(parts.values()))[name].attrs
        mean, counts, edges = np.full(shape, np.nan), {}, {}
        for (stage, layer), (k, part) in product(places, enumerate(parts.values())):
            if stage not in stages_of(part):
                continue
            values = _flat(_at(part, stage, layer), name)
            at = stages.index(stage), layers.index(layer), k
            if len(values):
                mean[at] = values.mean()
                bins = np.clip(len(np.histogram_bin_edges(values, "fd")), 40, 400)
                counts[at], edges[at] = np.histogram(values, bins)
        size = max((len(c) for c in counts.values()), default=1)
        tables = np.full((*shape, size), np.nan), np.full((*shape, size + 1), np.nan)
        for at in counts:
            tables[0][at][: len(counts[at])] = counts[at]
            tables[1][at][: len(edges[at])] = edges[at]
        long_name = {**attrs, "long_name": f"mean {attrs.get('long_name', name)}"}
        made[f"mean_{name}"] = dims, mean, long_name
        made[f"counts_{name}"] = (*dims, f"bin_{name}"), tables[0]
        made[f"edges_{name}"] = (*dims, f"edge_{name}"), tables[1], attrs
    if "" in parts:
        return made.isel({label: 0})
    return made.assign_coords({label: list(parts)})


def information_density(
    result: Result,
    variable: str = "mutual_information",
    ax: Axes | None = None,
    *,
    depth: Depth | None = None,
) -> Axes:
    """Draw how mutual information or covariance of pairs is distributed.

    A line for each layer, for each group, or for each stage, whichever there are several of.
    Where the means of layers differ by orders of magnitude, so that lines on one axis would be
    spikes or flat, it is logarithmic, with density by decade.

    Parameters
    ----------
    result : Dataset or DataTree
        From `actstore.mutual_information` or `actstore.pairwise_covariance`, whole or with
        ``reduce="histogram"``.
    variable : {"mutual_information", "covariance"}
        What to draw.
    ax : Axes, optional
        Where to draw; default a new figure.
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
    >>> result = actstore.mutual_information(data, layers=1)
    >>> ax = information_density(result, ax=Figure().subplots())
    >>> ax.get_xlabel()
    'mutual information (bit)'
    """
    result = holding(_counted(loaded(result)), "mutual_information", f"counts_{variable}")
    found = check_dims(result[f"mean_{variable}"], "stage", "layer", *grouping(result), most=1)
    along = found[0] if found else ""
    ax = new_axes(ax)
    spread_out = result[f"mean_{variable}"].where(~_same(result, variable))
    wide = along == "layer" and _wide(spread_out.values)
    heights: list[float] = []
    ends: list[tuple[float, float]] = []

    def line(part: xr.Dataset, colour: Any, label: str) -> None:
        edges, density = _density(part, variable)
        if _same(part, variable).all():  # no density
            ax.axvline(part[f"mean_{variable}"].item(), color=colour, label=label, linewidth=1.3)
            return
        if wide:
            above = edges[:-1] > 0
            edges = edges[np.append(above, above[-1:])]
            density = density[above] * (edges[1:] + edges[:-1]) / 2 * np.log(10)
        if len(density):
            ax.stairs(density, edges, color=colour, label=label, linewidth=1.3, baseline=None)
            heights.append(float(density.max()))
            ends.append(_bulk(edges, density / edges[1:] if wide else density))

    overlaid(line, result, along, ax, depth)
    high = cut(ax, heights) if heights else ""
    if ends:
        lone = [float(np.asarray(line.get_xdata())[0]) for line in ax.lines]
        alone = [x for x in lone if np.isfinite(x) and (x > 0 or not wide)]
        low, top = min([a for a, _ in ends] + alone), max([b for _, b in ends] + alone)
        margin = 0.05 * (top - low)
        ax.set_xlim(*((low, top) if wide else (low - margin, top + margin)))
    if wide:
        ax.set_xscale("log")
    else:
        ax.locator_params(axis="x", nbins=6)
    words = "probability density" + (" by decade" if wide else "")
    return tidy(ax, panel_heading(result), _words(result[f"edges_{variable}"]), words + high)


def _same(result: xr.Dataset, variable: str) -> xr.DataArray:
    """Where all pairs have one value: the same token at the same position, at the embeddings."""
    edges, counts = result[f"edges_{variable}"], result[f"counts_{variable}"]
    along = f"edge_{variable}"
    reach = abs(edges).max(along)
    near = edges.max(along) - edges.min(along) < 1e-9 * reach
    return near | ((counts > 0).sum(f"bin_{variable}") == 1)


def _wide(means: np.ndarray) -> bool:
    """Whether means are positive and differ by orders of magnitude."""
    means = means[np.isfinite(means)]
    return len(means) > 0 and 0 < _WIDE * means.min() < means.max()


def _density(part: xr.Dataset, variable: str) -> tuple[np.ndarray, np.ndarray]:
    """Edges and densities of a histogram, without padding."""
    edges = part[f"edges_{variable}"].values.ravel()
    counts = part[f"counts_{variable}"].values.ravel()
    edges, counts = edges[np.isfinite(edges)], counts[np.isfinite(counts)]
    if not counts.sum() or len(edges) != len(counts) + 1:
        return edges[:0], counts[:0]
    return edges, counts / counts.sum() / np.diff(edges)


def _bulk(edges: np.ndarray, density: np.ndarray) -> tuple[float, float]:
    """Where a line's pairs are, without 0.2 percent of them on either side."""
    share = np.cumsum(density * np.diff(edges))
    low, high = np.searchsorted(share, np.array([0.002, 0.998]) * share[-1])
    return float(edges[low]), float(edges[high + 1])


def information_depth(result: Result, figure: Figure | SubFigure | None = None) -> np.ndarray:
    """Draw distributions of pairs, layers from dark to light, and their means over layers.

    Parameters
    ----------
    result : Dataset or DataTree
        From `actstore.mutual_information` or `actstore.pairwise_covariance`, whole or with
        ``reduce="histogram"``.
    figure : Figure or SubFigure, optional
        Where to draw; default a new figure.

    Returns
    -------
    ndarray of Axes
        A row for each variable, and of each stage where there are several groups: a distribution
        for each group or stage, then the means.

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> result = actstore.mutual_information(data, reduce="histogram")
    >>> axes = information_depth(result, Figure())
    >>> axes.shape
    (2, 2)
    """
    result = _counted(loaded(result))
    names = [n for n in _NAMES if f"counts_{n}" in result]
    parts = stages_of(result)
    group = str(result.attrs.get("by"))
    several = result.sizes.get("layer", 1) > 1
    rows: list[tuple[str, xr.Dataset]]
    if len(parts) > 1 and result.sizes.get(group, 1) > 1:
        rows = [(name, part) for part in parts.values() for name in names]
    else:
        rows = [(name, result) for name in names]
    across = [_lines(part, several) for _, part in rows]
    axes = panels(figure, len(rows), len(across[0]) + 1, (3.4, 2.6))
    depth = Depth(*layers_of(parts)) if several else None
    for row, (name, part), cells in zip(axes, rows, across, strict=True):
        for ax, cell in zip(row, cells, strict=False):
            information_density(cell, name, ax, depth=depth)
        _means(part, f"mean_{name}", row[-1])
    if depth:
        colour_bar(depth, list(axes[:, :-1].flat))
    else:
        share_legend(axes)
    return axes


def _lines(result: xr.Dataset, several_layers: bool) -> list[xr.Dataset]:
    """Parts of which one panel each holds the distributions."""
    if not several_layers:
        return [result]
    group = str(result.attrs.get("by"))
    cells = []
    for part in stages_of(result).values():
        if part.sizes.get(group, 1) > 1:
            cells += [part.sel({group: [k]}) for k in part[group].values]
        else:
            cells.append(part)
    return cells


def _means(result: xr.Dataset, variable: str, ax: Axes) -> Axes:
    """Means over layers, or bars at one; logarithmic where they grow by orders of magnitude."""
    over_layers(result, variable, ax)
    if result.sizes.get("layer", 1) == 1:
        return tidy(ax, panel_heading(result) or " ", _words(result[variable]))
    thin_ticks(ax)
    values = result[variable].values
    low, high = np.nanmin(values, initial=np.inf), np.nanmax(values, initial=-np.inf)
    if _wide(values):
        ax.set_yscale("log")
        ax.set_ylim(0.7 * low, 1.4 * high)
    elif low >= 0:
        ax.set_ylim(0, 1.06 * high)
    return tidy(ax, panel_heading(result) or " ", "layer", _words(result[variable]))


# -- information against covariance ----------------------------------------------------------------


def information_scatter(
    result: Result, ax: Axes | None = None, *, key: bool = True, most: int = _MOST_POINTS
) -> Axes:
    """Draw mutual information against covariance, a point for each pair; groups by colour.

    Parameters
    ----------
    result : Dataset or DataTree
        From `actstore.mutual_information`, of one stage and layer.
    ax : Axes, optional
        Where to draw; default a new figure.
    key : bool
        With a legend of the groups.
    most : int
        Points drawn of each group, at even steps through its pairs.

    Returns
    -------
    Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> result = actstore.mutual_information(data, layers=1)
    >>> ax = information_scatter(result, Figure().subplots())
    >>> len(ax.collections[0].get_offsets())
    190
    """
    parts = _parts(loaded(result))
    ax = new_axes(ax)
    correlations = []
    for (name, part), colour, marker in zip(
        parts.items(), _colours(parts), MARKERS * len(parts), strict=False
    ):
        x, y = _both(part)
        step = max(1, -(-len(x) // most))
        ax.scatter(x[::step], y[::step], 5, color=colour, marker=marker, alpha=0.35, **POINTS)
        # In the legend as dark as it is where many points lie.
        ax.plot([], [], marker, color=colour, markersize=4, label=name)
        correlations.append(correlation(x, y))
    first = next(iter(parts.values()))
    if len(parts) == 1:
        group = heading(first, ["stage", "layer"]) if grouping(first) else ""
        between = ", " if len(group) < 22 else "\n"
        r = between.join(filter(None, (group, f"r = {correlations[0]:.2f}")))
        words = "\n".join(filter(None, (heading(first, grouping(first)), r)))
    else:
        words = heading(first, grouping(first))
        if key:
            legend(ax, str(first.attrs.get("by", "")), markerscale=1.3)
    ax.locator_params(nbins=5)
    return tidy(ax, words, _words(first["covariance"]), _words(first["mutual_information"]))


def _colours(parts: dict[str, xr.Dataset]) -> list[Any]:
    if len(parts) > 1:
        return group_colours(len(parts))
    stage = next(iter(stages_of(next(iter(parts.values())))))
    return [stage_colour(stage) if stage else INK]


def _both(part: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Covariance and information of the pairs of a group, those that have both."""
    part = _one(part, "mutual_information")
    first = _paired_dim(part)
    check_dims(part["mutual_information"], first, f"{first}_b")
    table = pairs(part[["covariance", "mutual_information"]])
    x, y = (table[name].values.ravel() for name in ("covariance", "mutual_information"))
    there = np.isfinite(x) & np.isfinite(y)
    return x[there], y[there]


def information_map(
    result: xr.Dataset, ax: Axes | None = None, *, colours: dict[str, Any] | None = None
) -> Axes:
    """Draw the joint histogram of information and covariance of all pairs.

    Parameters
    ----------
    result : Dataset
        From `actstore.mutual_information` with ``reduce="joint"``, of one stage, layer and group.
    ax : Axes, optional
        Where to draw; default a new figure.
    colours : dict, optional
        For `Axes.pcolormesh` (``norm``, ``cmap``), where several panels share a colour bar;
        default the map's own, with a bar.

    Returns
    -------
    Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 4)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> result = actstore.mutual_information(data, layers=1, reduce="joint")
    >>> ax = information_map(result, Figure().subplots())
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('covariance (activation^2)', 'mutual information (bit)')
    """
    from matplotlib.colors import LogNorm

    result = holding(result, "mutual_information", "counts")
    check_dims(result["counts"], "bin_covariance", "bin_mutual_information")
    ax = new_axes(ax)
    counts = result["counts"].transpose(..., "bin_mutual_information", "bin_covariance").values
    counts = counts.reshape(counts.shape[-2:])
    x, y = (result[f"edges_{name}"].values.ravel() for name in ("covariance", "mutual_information"))
    look = colours or {"norm": LogNorm(1, _most(counts))}
    if np.isfinite(x).all():
        drawn = np.ma.masked_less(counts, 0.5)
        image = ax.pcolormesh(x, y, drawn, **look, rasterized=True)
        if colours is None:
            scale_bar([image], [ax], "pairs")
    ax.locator_params(nbins=5)
    words = (_words(result[f"edges_{n}"]) for n in ("covariance", "mutual_information"))
    return tidy(ax, panel_heading(result), *words)


def _maps(result: xr.Dataset, figure: Figure | SubFigure | None) -> np.ndarray:
    from matplotlib.colors import LogNorm

    look = {"norm": LogNorm(1, _most(result["counts"].values))}
    axes = facets(partial(information_map, colours=look), result, figure, (2.7, 2.4))
    images = [c for ax in axes.flat for c in ax.collections]
    if images:
        scale_bar(images, list(axes.flat), "pairs")
    _label_outer(axes)
    return axes


def _most(counts: np.ndarray) -> float:
    """Pairs in the fullest cells; a layer of which all pairs are the same has no say."""
    some = counts[counts > 0]
    return max(2.0, float(np.quantile(some, 0.999))) if len(some) else 2.0


def _grid(result: Result, figure: Figure | SubFigure | None) -> np.ndarray:
    """Information against covariance in a panel for each stage and layer."""
    parts = _parts(result)
    cells = _places(parts)
    stages, layers = dict.fromkeys(s for s, _ in cells), sorted({n for _, n in cells})
    columns = None
    if len(stages) > 1 and len(layers) > 1:  # a stage that lacks a layer leaves a gap
        columns, cells = len(stages), [(s, n) for n, s in product(layers, stages)]
    drawn = [_cell(parts, stage, layer, result) for stage, layer in cells]
    most = int(np.clip(60_000 // len(cells), 200, _MOST_POINTS))
    draw: Any = partial(information_scatter, key=False, most=most)
    if columns is None and len(cells) > 12:
        columns = min(6, -(-len(cells) // 4))
    axes = spread(draw, drawn, figure, (2.3, 2.0), columns)
    if len(parts) > 1:
        share_legend(axes)
    _label_outer(axes)
    return axes


def _cell(parts: dict[str, xr.Dataset], stage: str, layer: int, result: Result) -> Any:
    """The groups of one stage and layer; None where it is not there."""
    found = {}
    for name, part in parts.items():
        own = stages_of(part).get(stage)
        if own is None or layer not in np.atleast_1d(own["layer"].values):
            return None
        found[name] = _at(part, stage, layer)
    if list(found) == [""]:
        return found[""]
    tree = {str(i): part for i, part in enumerate(found.values())}
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=result.attrs), **tree})


def _label_outer(axes: np.ndarray) -> None:
    """Axis labels at the left and below only: they are the same in all panels."""
    for (i, j), ax in np.ndenumerate(axes):
        if i + 1 < axes.shape[0] and axes[i + 1, j].axison:
            ax.set_xlabel("")
        if j:
            ax.set_ylabel("")


# -- whole results ---------------------------------------------------------------------------------


def information(result: Result, figure: Figure | SubFigure | None = None) -> np.ndarray:
    """Draw a result of pairs of any shape.

    Of one stage and layer: matrices, their distributions, and information against covariance. Of
    several: information against covariance in a panel each (covariance alone as
    `information_depth`). Reduced: joint histograms in a panel each; distributions and their means
    over layers; or the means.

    Parameters
    ----------
    result : Dataset or DataTree
        From `actstore.mutual_information` or `actstore.pairwise_covariance`.
    figure : Figure or SubFigure, optional
        Where to draw; default a new figure.

    Returns
    -------
    ndarray of Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = np.random.default_rng(0).normal(size=(3, 20, 40)).astype("float32")
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> information(actstore.mutual_information(data, layers=1), Figure()).shape
    (2, 3)
    >>> information(actstore.mutual_information(data), Figure()).shape
    (1, 3)
    """
    result = loaded(result)
    if isinstance(result, xr.Dataset):
        if "counts" in result:
            return _maps(result, figure)
        if any(f"counts_{n}" in result for n in _NAMES):
            return information_depth(result, figure)
        means = [f"mean_{n}" for n in _NAMES if f"mean_{n}" in result]
        if means:
            return panels_over_layers([partial(_means, variable=n) for n in means], result, figure)
    parts = _parts(result)
    if len(_places(parts)) == 1:
        return _of_one_place(parts, result, figure)
    if all("mutual_information" in part for part in parts.values()):
        return _grid(result, figure)
    return information_depth(result, figure)


def _of_one_place(
    parts: dict[str, xr.Dataset], result: Result, figure: Figure | SubFigure | None
) -> np.ndarray:
    names = [n for n in _NAMES if n in next(iter(parts.values()))]
    n, both = len(parts), len(names) > 1
    # Of one group information against covariance has a column, of several a row.
    shape = (len(names), 3) if both and n == 1 else (len(names) + both, n + 1)
    axes = panels(figure, *shape, (3.0, 2.7))
    counted = _counted(result)
    for row, name in zip(axes, names, strict=False):
        look = _look([_flat(part, name) for part in parts.values()])
        for ax, part in zip(row, parts.values(), strict=False):
            information_matrix(part, name, ax, colours=look)
        images = [image for ax in row for image in ax.images]
        scale_bar(images, list(row[:n]), _words(next(iter(parts.values()))[name]))
        information_density(counted, name, row[n])
        if name != names[0] and row[n].get_legend() is not None:  # the same as in the row above
            row[n].get_legend().remove()
    if both and n == 1:
        information_scatter(result, axes[0, 2])
        axes[1, 2].set_axis_off()
    elif both:
        for ax, part, colour in zip(axes[-1], parts.values(), _colours(parts), strict=False):
            information_scatter(part, ax)
            for dots in ax.collections:
                dots.set_color(colour)
        information_scatter(result, axes[-1, n])
    return axes
