"""What all pictures share: colours, tidy axes, figures that grow with their panels, headings."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product, zip_longest
from typing import TYPE_CHECKING, Any, TypeAlias
from zlib import crc32

import numpy as np
import xarray as xr

from ..errors import UsageError
from ..queries.result import compute
from ..schema import layer_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = [
    "BLANK",
    "INK",
    "MARKERS",
    "MOST_IN_LEGEND",
    "MOST_PANELS",
    "POINTS",
    "STAGE_STYLE",
    "Depth",
    "Result",
    "bar_rows",
    "cells_of",
    "check_dims",
    "colour_bar",
    "cut",
    "described",
    "facets",
    "group_colours",
    "grouping",
    "heading",
    "holding",
    "layers_of",
    "legend",
    "literally",
    "loaded",
    "named",
    "new_axes",
    "overlaid",
    "panel_heading",
    "panels",
    "scale_bar",
    "shades",
    "share_legend",
    "spread",
    "stage_colour",
    "stage_marker",
    "stages_of",
    "thin_ticks",
    "tick_layers",
    "tick_whole",
    "tidy",
    "varying",
]

Result: TypeAlias = xr.Dataset | xr.DataTree

INK = "#2b2f36"
"""Text, and whatever stands alone."""

MOST_PANELS = 48
"""Panels of one figure: 4 stages by 12 layers."""

POINTS: dict[str, Any] = {"linewidths": 0, "rasterized": True}
"""Scatters have many points: as an image, vector files stay small."""

_MOST_NBYTES = 2 * 2**30

_MOST_LETTERS = 30
"""Of the names of layers under an axis."""

_GREY = "#b8bec9"

BLANK = "#e3e6eb"
"""Behind matrices, where they have no value."""

# Colours that stay apart under every kind of colour blindness: Petroff's ten (2021), but for one
# too light for lines. Markers say the same again.
STAGE_STYLE = {
    "hidden": ("#717581", "o"),
    "resid_pre": ("#b9ac70", "v"),
    "resid_mid": ("#1a1a40", "^"),
    "resid_post": ("#94a4a2", "<"),
    "attn_z": ("#a96b59", ">"),
    "attn_out": ("#e76300", "P"),
    "mlp_in": ("#3f90da", "o"),
    "mlp_pre": ("#ffa90e", "s"),
    "mlp_post": ("#bd1f01", "D"),
    "mlp_out": ("#832db6", "^"),
}
"""Colour and marker of every stage of the schema."""

# Okabe and Ito's colours, a brown in place of the yellow that cannot be seen on white.
_GROUPS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#593109")

MARKERS = "osD^vP*X"
"""Of groups, and of pairs of stages."""

MOST_IN_LEGEND = len(_GROUPS)
"""Groups that are told apart by colours of their own; more run from dark to light, as layers."""


def stage_colour(stage: str) -> str:
    """The colour of a stage, the same in every picture.

    Parameters
    ----------
    stage : str
        Any name; those that are not actstore's own get a grey.

    Returns
    -------
    str
        As Matplotlib names colours.

    Examples
    --------
    >>> stage_colour("mlp_in") == stage_colour("mlp_post")
    False
    """
    return _style(stage)[0]


def stage_marker(stage: str) -> str:
    """The marker of a stage, the same in every picture.

    Parameters
    ----------
    stage : str
        Any name.

    Returns
    -------
    str
        As Matplotlib names markers.

    Examples
    --------
    >>> stage_marker("mlp_in") == stage_marker("mlp_post")
    False
    """
    return _style(stage)[1]


def _style(stage: str) -> tuple[str, str]:
    styles = list(STAGE_STYLE.values())
    return STAGE_STYLE.get(stage) or styles[crc32(stage.encode()) % len(styles)]


def group_colours(n: int) -> list[Any]:
    """Colours for the values of a label, or for heads."""
    return list(_GROUPS[:n]) if n <= MOST_IN_LEGEND else list(Depth(range(n)).colours)


class Depth:
    """Colours that run with depth, the same for a layer in all panels of a picture.

    Parameters
    ----------
    layers : iterable of int
    names : iterable of str, optional
        Default the numbers.
    """

    def __init__(self, layers: Iterable[int], names: Iterable[str] | None = None) -> None:
        import matplotlib as mpl

        self.layers = [int(n) for n in layers]
        self.names = [str(n) for n in (self.layers if names is None else names)]
        # The light end of the map cannot be seen on white.
        self.colours = mpl.colormaps["plasma"](np.linspace(0, 0.88, len(self.layers)))

    def __getitem__(self, layer: int) -> Any:
        return self.colours[self.layers.index(int(layer))]


def colour_bar(depth: Depth, axes: Sequence[Axes], label: str = "layer") -> None:
    """A bar beside some panels, with one step of colour for each layer."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    n = len(depth.layers)
    scale = ScalarMappable(BoundaryNorm(np.arange(n + 1) - 0.5, n), ListedColormap(depth.colours))
    chosen = np.arange(n)[:: _stride(n)]
    bar = axes[0].figure.colorbar(
        scale, ax=list(axes), ticks=chosen, aspect=35, pad=0.02, fraction=0.04
    )
    bar.ax.set_yticklabels([depth.names[i] for i in chosen])
    _tidy_bar(bar, label)


def _tidy_bar(bar: Any, label: str) -> None:
    bar.ax.minorticks_off()
    bar.ax.tick_params(length=0, labelsize=8, labelcolor=INK)
    bar.outline.set_visible(False)
    bar.set_label(label, size=9, color=INK)


def shades(matrices: Iterable[np.ndarray]) -> dict[str, Any]:
    """Colours that matrices share: limits and map, which is white at 0 where both signs occur."""
    import matplotlib as mpl
    from matplotlib.colors import ListedColormap

    finite = (values[np.isfinite(values)] for values in matrices)
    ends = [end for values in finite if values.size for end in (values.min(), values.max())]
    low, high = (float(min(ends)), float(max(ends))) if ends else (0.0, 1.0)
    limits = {"vmin": low, "vmax": high}
    if not low < 0 < high:
        return {**limits, "cmap": "viridis"}
    # Equal steps of colour either side of 0, of which only those that occur are kept.
    first, last = (0.5 + end / (2 * max(-low, high)) for end in (low, high))
    kept = mpl.colormaps["RdBu_r"](np.linspace(first, last, 256))
    return {**limits, "cmap": ListedColormap(kept)}


def scale_bar(images: Sequence[Any], axes: Sequence[Axes], label: str) -> None:
    """A bar beside some panels for the values of their images; arrows where values go beyond."""
    norm, values = images[0].norm, [image.get_array() for image in images]
    below = any((v < norm.vmin).any() for v in values)
    above = any((v > norm.vmax).any() for v in values)
    extend = ("both" if above else "min") if below else ("max" if above else "neither")
    bar = axes[0].figure.colorbar(
        images[0], ax=list(axes), aspect=30, pad=0.02, fraction=0.04, extend=extend
    )
    _tidy_bar(bar, label)


def tick_layers(ax: Axes, layers: Sequence[int], names: Sequence[str]) -> None:
    """Ticks at whole layers, few enough to be read."""
    every = _stride(len(layers))
    ax.set_xticks(layers[::every], names[::every])


def tick_whole(ax: Axes) -> None:
    """Horizontal ticks at whole numbers only: there is no neuron 2.5."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))


def thin_ticks(ax: Axes) -> None:
    """Every second layer's name where all would touch in a narrow panel."""
    names = [t.get_text() for t in ax.get_xticklabels()]
    if sum(map(len, names)) > _MOST_LETTERS:
        ax.set_xticks(ax.get_xticks()[::2], names[::2])


def _stride(n: int) -> int:
    return max(1, -(-n // 13))


def tidy(ax: Axes, title: str = "", x: str = "", y: str = "") -> Axes:
    """Title, labels and spines in the style of all pictures."""
    if title:
        literally(ax.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK))
    for axis, label, width in ((ax.xaxis, x, 42), (ax.yaxis, y, 28)):
        if label:
            label = "\n".join(_wrapped(line, width) for line in label.split("\n"))
            literally(axis.set_label_text(label, fontsize=9, color=INK))
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(_GREY)
    ax.tick_params(which="both", labelsize=8, color=_GREY, labelcolor=INK)
    return ax


def _wrapped(line: str, width: int) -> str:
    """As few lines as fit the width, as even as they can be."""
    lines = len(textwrap.wrap(line, width))
    while width > 1 and len(textwrap.wrap(line, width - 1)) <= lines:
        width -= 1
    return textwrap.fill(line, width)


def legend(ax: Axes, title: str = "", *, above: bool = False, **options: Any) -> None:
    """A legend in the style of all pictures; above the Axes where it would cover points."""
    if above:
        options |= {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2}
        options |= {"ncols": 3, "handletextpad": 0, "columnspacing": 1}
    made = ax.legend(
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        title=title or None,
        title_fontproperties={"size": 8},
        **options,
    )
    for text in made.get_texts():
        literally(text)


def named(value: Any) -> str:
    """A label's value for people: short, and never empty or hidden, as matplotlib makes `_x`."""
    text = str(value)
    if not text or text.startswith("_"):
        text = repr(text)
    return text if len(text) <= 28 else f"{text[:27]}…"


def literally(text: Any) -> Any:
    """Text as it is: labels and tokens may hold dollar signs, which would mean mathematics."""
    text.set_parse_math(False)
    return text


def cut(ax: Axes, heights: Sequence[float]) -> str:
    """Start the axis at zero and cut it where a few spikes would flatten all other lines."""
    usual, top = 4 * float(np.median(heights)), max(heights)
    if not 0 < usual < top:
        ax.set_ylim(bottom=0)
        return ""
    ax.set_ylim(0, 1.05 * max(h for h in heights if h <= usual))
    return f"\n(goes to {top:,.0f})" if top >= 100 else f"\n(goes to {top:.3g})"


def overlaid(
    draw: Callable[[xr.Dataset, Any, str], Any],
    result: xr.Dataset,
    along: str,
    ax: Axes,
    depth: Depth | None = None,
) -> None:
    """Draw parts of a result over one another, and say which is which.

    Parameters
    ----------
    draw : callable
        Draws a part in a colour, with a label.
    result : Dataset
    along : str
        Dimension of which every value is a part; "" for none.
    ax : Axes
    depth : Depth, optional
        Colours of layers, where several panels share a colour bar; default the result's own layers,
        with a bar.
    """
    own = next(iter(stages_of(result)))
    keys: list[Any] = list(result[along].values) if along else [own]
    bar = depth is None and (along == "layer" or (along != "stage" and len(keys) > MOST_IN_LEGEND))
    if along == "layer":
        depth = depth or Depth(*layers_of({own: result}))
        colours = [depth[k] for k in keys]
    elif along in ("", "stage"):
        colours = [stage_colour(str(k)) if k else INK for k in keys]
    else:
        colours = group_colours(len(keys))
    for i, (key, colour) in enumerate(zip(keys, colours, strict=True)):
        draw(result.isel({along: [i]}) if along else result, colour, named(key))
    if bar:
        colour_bar(depth or Depth(range(len(keys)), map(named, keys)), [ax], along)
    elif along and along != "layer":
        legend(ax, "" if along == "stage" else along, ncols=1 if len(keys) <= 4 else 2)


def bar_rows(
    ax: Axes,
    names: Sequence[str],
    values: np.ndarray,
    colours: Sequence[Any],
    labels: Sequence[str],
    reach: np.ndarray | None = None,
) -> np.ndarray:
    """Draw horizontal bars, a row for each name, first on top; several bars may share a row.

    Parameters
    ----------
    ax : Axes
    names : sequence of str
        Of the rows.
    values : ndarray (bar, row)
    colours : sequence
        Of the bars of a row; or of the rows, where each has one bar.
    labels : sequence of str
        Of the bars of a row.
    reach : ndarray (2, bar, row), optional
        How far down and up the error bars go.

    Returns
    -------
    ndarray (bar, row)
        Where the middles of the bars are.
    """
    n, rows = values.shape
    height = 0.76 / n
    at = np.arange(rows) + (np.arange(n)[:, None] - (n - 1) / 2) * height
    errors = {"linewidth": 0.9, "capsize": 2, "ecolor": INK}
    for i in range(n):
        ax.barh(
            at[i],
            values[i],
            height,
            color=colours[i] if n > 1 else colours,
            label=labels[i],
            xerr=None if reach is None else reach[:, i],
            error_kw=errors,
        )
    ax.set_yticks(np.arange(rows), names)
    for text in ax.get_yticklabels():
        literally(text)
    ax.set_ylim(rows - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.locator_params(axis="x", nbins=6)
    return at


def new_axes(ax: Axes | None) -> Axes:
    """The Axes given, or those of a new pyplot figure, which notebooks show by themselves."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.figure(figsize=(6, 4), layout="constrained").subplots()


def panels(
    figure: Figure | SubFigure | None,
    rows: int,
    columns: int,
    size: tuple[float, float] = (3.6, 2.7),
    most: int = MOST_PANELS,
    **options: Any,
) -> np.ndarray:
    """A grid of Axes in a figure, or in a new one that is as large as they need.

    Parameters
    ----------
    figure : Figure or SubFigure or None
        Default a new pyplot figure. One with a true ``fit_panels`` is given the size.
    rows, columns : int
    size : tuple of float
        Of one panel, in inches.
    most : int
        Panels that can be read.
    **options : object
        For `Figure.subplots`.

    Returns
    -------
    ndarray of Axes (rows, columns)
    """
    if rows * columns > most:
        raise UsageError(
            f"{rows * columns} panels do not fit a picture: ask for at most {most}, with "
            "stages= and layers= (--stages mlp_post --layers 0,3-5), or fewer groups"
        )
    inches = columns * size[0] + 0.6, rows * size[1] + 0.4  # colour bar and heading
    if figure is None:
        import matplotlib.pyplot as plt

        figure = plt.figure(figsize=inches, layout="constrained")
    elif getattr(figure, "fit_panels", False):
        figure.set_size_inches(*inches)  # type: ignore[union-attr]
    return figure.subplots(rows, columns, squeeze=False, **options)


def facets(
    draw: Callable[[xr.Dataset, Axes], Any],
    result: Result,
    figure: Figure | SubFigure | None,
    size: tuple[float, float],
    within: Iterable[str] = (),
) -> np.ndarray:
    """Draw a panel for each stage, layer and group of a result.

    Stages are the columns and everything else the rows; what varies alone fills rows in turn.

    Parameters
    ----------
    draw : callable
        Draws a part of the result in Axes.
    result : Dataset or DataTree
    figure : Figure or SubFigure or None
    size : tuple of float
        Of one panel, in inches.
    within : iterable of str
        Dimensions that a panel shows whole.

    Returns
    -------
    ndarray of Axes (row, column)
    """
    result = loaded(result)
    parts = stages_of(result)
    dims = [
        d
        for d in ("layer", str(result.attrs.get("by")))
        if d not in within and any(part.sizes.get(d, 1) > 1 for part in parts.values())
    ]
    keys = dict.fromkeys(
        key for part in parts.values() for key in product(*(part[d].values for d in dims))
    )
    cells = [_cell(part, dims, key) for key in keys for part in parts.values()]
    both = len(parts) > 1 and len(keys) > 1
    return spread(draw, cells, figure, size, len(parts) if both else None)


def spread(
    draw: Callable[[xr.Dataset, Axes], Any],
    cells: Sequence[xr.Dataset | None],
    figure: Figure | SubFigure | None,
    size: tuple[float, float],
    columns: int | None = None,
) -> np.ndarray:
    """Draw parts of a result in panels, row by row.

    Parameters
    ----------
    draw : callable
        Draws a part in Axes.
    cells : sequence of Dataset or None
        None leaves a gap.
    figure : Figure or SubFigure or None
    size : tuple of float
        Of one panel, in inches.
    columns : int, optional
        Default as many as fill the rows best.

    Returns
    -------
    ndarray of Axes (row, column)
    """
    n = len(cells)
    fitting = 2 if n == 4 else min(n, 3 if n in (3, 5, 6, 9) else 4)
    columns = columns or fitting
    axes = panels(figure, -(-n // columns), columns, size)
    for ax, cell in zip_longest(axes.flat, cells):
        if cell is None:
            ax.set_axis_off()
        else:
            draw(cell, ax)
    return axes


def _cell(part: xr.Dataset, dims: Sequence[str], key: Sequence[Any]) -> xr.Dataset | None:
    if any(k not in part[d].values for d, k in zip(dims, key, strict=True)):
        return None
    return part.sel({d: [k] for d, k in zip(dims, key, strict=True)})


def share_legend(axes: np.ndarray) -> None:
    """One legend beside the panels in place of the same one in each."""
    handles, labels = axes.flat[0].get_legend_handles_labels()
    for ax in axes.flat:
        if ax.get_legend() is not None:
            ax.get_legend().remove()
    if len(labels) > 1:
        made = axes.flat[0].figure.legend(
            handles,
            labels,
            loc="outside right upper",
            frameon=False,
            fontsize=8,
            labelcolor=INK,
        )
        for text in made.get_texts():
            literally(text)


def stages_of(result: Result) -> dict[str, xr.Dataset]:
    """Each stage's part of a result, layers that it lacks left out."""
    if isinstance(result, xr.DataTree):
        return {name: node.to_dataset() for name, node in result.children.items()}
    if "stage" not in result.coords:
        return {"": result}
    if result["stage"].ndim == 0:
        return {str(result["stage"].item()): result}
    return {str(s): _present(result.isel(stage=i)) for i, s in enumerate(result["stage"].values)}


def _present(part: xr.Dataset) -> xr.Dataset:
    """Without the layers of which nothing is there: another stage of the result had them."""
    there = xr.zeros_like(part["layer"], bool) if "layer" in part.dims else None
    if there is None:
        return part
    for variable in part.data_vars.values():
        if variable.dtype.kind == "f" and "layer" in variable.dims:
            there = there | variable.notnull().any([d for d in variable.dims if d != "layer"])
    return part.isel(layer=there.values) if there.any() else part


def layers_of(parts: dict[str, xr.Dataset]) -> tuple[list[int], list[str]]:
    """Layers of some stages, and their names; `hidden` alone has layers by name."""
    layers = sorted({int(n) for d in parts.values() for n in np.atleast_1d(d["layer"].values)})
    stage = next(iter(parts)) if len(parts) == 1 else ""
    return layers, [layer_name(stage, n) for n in layers]


def loaded(result: Result) -> Result:
    """A result with its values; drawing a lazy one would read the data again and again."""
    if not isinstance(result, xr.Dataset | xr.DataTree):
        return result
    _check_size(result)
    return compute(result)


def _check_size(result: Result) -> None:
    """Refuse what no picture can show before it is computed."""
    if result.nbytes > _MOST_NBYTES:
        raise UsageError(
            f"a result of {result.nbytes / 1e9:,.1f} GB is more than a picture can show: ask over "
            "fewer tokens, layers or stages, or for reduce='histogram' where there is it"
        )


def holding(result: Any, query: str, *names: str) -> xr.Dataset:
    """A result with its values, checked to be one dataset that holds one of some variables."""
    if isinstance(result, xr.DataTree):
        stages = list(result.children) or ["mlp_post"]
        raise UsageError(
            f"the stages of this result ({', '.join(stages)}) differ in width and cannot share "
            f"Axes: choose one, as result[{stages[0]!r}].to_dataset(), or draw all with "
            "actstore.plot.draw(result)"
        )
    held = list(map(str, getattr(result, "data_vars", ())))
    if not set(names) & set(held):
        raise UsageError(
            f"this {type(result).__name__} holds {', '.join(held) or 'no variables'}: the picture "
            f"needs {' or '.join(names)}, as actstore.{query} gives"
        )
    _check_size(result)
    return compute(result)


def grouping(result: Result) -> list[str]:
    """The dimension of groups, where the result was split by a label."""
    return [str(result.attrs["by"])] if "by" in result.attrs else []


def cells_of(part: xr.Dataset) -> Iterator[xr.Dataset]:
    """A part for each group, as far as it is split by a label."""
    for label in grouping(part):
        if label in part.dims:
            yield from (part.sel({label: k}) for k in part[label].values)
            return
    yield part


def check_dims(variable: xr.DataArray, *allowed: str, most: int = 9) -> list[str]:
    """Dimensions longer than one; raises unless they are among those that can be drawn.

    Parameters
    ----------
    variable : DataArray
    *allowed : str
        Dimensions that may be longer than one.
    most : int
        How many of them may be, all at once.
    """
    found = varying(variable)
    wrong = [d for d in found if d not in allowed]
    wrong += [d for d in found if d not in wrong][: max(0, len(found) - len(wrong) - most)]
    if wrong:
        sizes = ", ".join(f"{d}: {n}" for d, n in variable.sizes.items())
        picks = ", ".join(f"{d}={_one(variable, d)!r}" for d in wrong)
        one_of = "one of " if most < len(allowed) else ""
        raise UsageError(
            f"{variable.name} has dimensions ({sizes}); these Axes can hold {one_of}"
            f"{', '.join(allowed) or 'none'}: select, as result.sel({picks}), or draw panels with "
            "actstore.plot.draw(result)"
        )
    return found


def _one(variable: xr.DataArray, dim: str) -> Any:
    value = variable[dim].values[0]
    return value.item() if isinstance(value, np.generic) else value


def varying(variable: xr.DataArray) -> list[str]:
    """Dimensions longer than one."""
    return [str(d) for d, n in variable.sizes.items() if n > 1]


def heading(part: xr.Dataset, but: Iterable[str] = ()) -> str:
    """What a part of a result is about: "mlp_post, layer 3, condition terminal"."""
    words = []
    for name in ("stage", "layer", "head", "neuron", str(part.attrs.get("by"))):
        if name in but or name not in part.coords or part[name].size != 1:
            continue
        value = part[name].values.ravel()[0]
        if name == "stage":
            words.append(str(value))
        elif name == "layer":
            shown = layer_name(words[0] if words else "", int(value))
            words.append(shown if shown != str(value) else f"layer {value}")
        else:
            words.append(f"{name} {named(value)}")
    return ", ".join(words)


def panel_heading(result: xr.Dataset) -> str:
    """What a panel is about; the group in a line of its own."""
    lines = heading(result, grouping(result)), heading(result, ["stage", "layer"])
    return "\n".join(filter(None, lines))


def described(variable: xr.DataArray) -> str:
    """An axis label: long name and units."""
    name = str(variable.attrs.get("long_name", variable.name))
    units = variable.attrs.get("units", "1")
    return name if units in ("1", name) else f"{name} ({units})"
