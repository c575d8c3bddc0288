"""Pictures of results: a result and optional Axes in, the Axes out.

    actstore.plot.draw(result)                     # any result, in panels
    actstore.plot.histogram(result, ax)            # one Axes of your own
    actstore.plot.save(result, "picture.svg")

Functions for one Axes take a part of a result that one Axes can hold, and say what to select where
it is more. Functions for several panels take a whole result and a `Figure` or `SubFigure`. Given
neither, they make a pyplot figure, which notebooks show; otherwise no global state is touched.
Stages have the same colour in all pictures, layers run from dark to light with depth.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnknownNameError, UsageError
from .cosines import baseline_densities, baselines, cosine_densities, cosine_density
from .dimensions import (
    dimension_bars,
    dimension_profile,
    dimension_scatter,
    dimension_violins,
    dimensions,
    intrinsic_dimensions,
    spectra,
    spectrum,
)
from .distributions import (
    histogram,
    histograms,
    neuron_panels,
    neuron_peaks,
    peak_positions,
    profile,
    profiles,
    quantile_panels,
    quantiles,
)
from .information import (
    information,
    information_density,
    information_depth,
    information_map,
    information_matrix,
    information_scatter,
)
from .labels import label_bars, label_profile, label_ranks, labels
from .layers import layer_covariance_matrix, layer_covariances
from .samples import (
    condition_scatter,
    conditions,
    means,
    pair_plot,
    samples,
    scatter,
    top_tokens,
    top_tokens_panels,
)
from .similarity import (
    comparisons,
    layer_matrix,
    pair_bars,
    pair_map,
    pair_profile,
    token_matrices,
    token_matrix,
)
from .style import INK, Result, facets, literally, loaded, stage_colour, stage_marker

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure, SubFigure

__all__ = [
    "ENDINGS",
    "PLOTS",
    "baseline_densities",
    "baselines",
    "comparisons",
    "condition_scatter",
    "conditions",
    "cosine_densities",
    "cosine_density",
    "dimension_bars",
    "dimension_profile",
    "dimension_scatter",
    "dimension_violins",
    "dimensions",
    "draw",
    "histogram",
    "histograms",
    "information",
    "information_density",
    "information_depth",
    "information_map",
    "information_matrix",
    "information_scatter",
    "intrinsic_dimensions",
    "label_bars",
    "label_profile",
    "label_ranks",
    "labels",
    "layer_covariance_matrix",
    "layer_covariances",
    "layer_matrix",
    "means",
    "neuron_panels",
    "neuron_peaks",
    "pair_bars",
    "pair_map",
    "pair_plot",
    "pair_profile",
    "peak_positions",
    "profile",
    "profiles",
    "quantile_panels",
    "quantiles",
    "samples",
    "save",
    "scatter",
    "spectra",
    "spectrum",
    "stage_colour",
    "stage_marker",
    "token_matrices",
    "token_matrix",
    "top_tokens",
    "top_tokens_panels",
]

PLOTS: dict[str, Callable[..., np.ndarray]] = {
    "histogram": histograms,
    "quantiles": quantile_panels,
    "moments": partial(
        profiles,
        variables=("mean", "std", "skewness", "kurtosis", "zero_fraction", "positive_fraction"),
    ),
    "zeroness": partial(profiles, variables=("zeroed", "score")),
    "peaks": partial(facets, peak_positions, size=(4.6, 2.8), within=("layer",)),
    "normality": partial(profiles, variables=("distance", "skewness", "kurtosis")),
    "mean_activation": means,
    "sample": samples,
    "top_tokens": top_tokens_panels,
    "dimensionality": dimensions,
    "spectrum": spectra,
    "intrinsic_dimension": intrinsic_dimensions,
    "cosine_matrix": token_matrices,
    "rsa": comparisons,
    "cka": comparisons,
    "cosine_pairs": cosine_densities,
    "gaussian_baseline": baselines,
    "mutual_information": information,
    "pairwise_covariance": information,
    "layer_covariance": layer_covariances,
    "label_information": labels,
}
"""What draws the result of each query, whatever its shape."""

ENDINGS = (".png", ".svg", ".pdf")
"""Kinds of picture files."""


def draw(
    result: Result,
    figure: Figure | SubFigure | None = None,
    *,
    title: str | None = None,
    **options: Any,
) -> np.ndarray:
    """Draw the result of any query that has a picture, in as many panels as it needs.

    Parameters
    ----------
    result : Dataset or DataTree
        From a query that `PLOTS` names; computed first if it is lazy.
    figure : Figure or SubFigure, optional
        Where to draw; default a new figure.
    title : str, optional
        Default what was asked of which store, over how many tokens; "" for none.
    **options : object
        Such as ``log=True``, of the picture's own function in `PLOTS`.

    Returns
    -------
    ndarray of Axes

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> from matplotlib.figure import Figure
    >>> acts = xr.DataArray(np.eye(4, dtype="float32"), dims=("token", "neuron"))
    >>> axes = draw(actstore.histogram(acts, bins=[0, 1, 2]), Figure())
    >>> axes.shape, axes[0, 0].get_xlabel()
    ((1, 1), 'activation')
    """
    query = result.attrs.get("query")
    if query not in PLOTS:
        raise UsageError(
            f"there is no picture of {query or 'a result without the attribute query'}; there "
            f"are pictures of {', '.join(PLOTS)}"
        )
    result = loaded(result)
    axes = PLOTS[query](result, figure, **options)
    title = _about(result) if title is None else title
    if title:
        text = axes.flat[0].figure.suptitle(title, x=0.01, ha="left", fontsize=9, color=INK)
        literally(text)
    return axes


def save(
    result: Result,
    path: str | PathLike[str],
    *,
    title: str | None = None,
    size: tuple[float, float] | None = None,
    dpi: float = 150,
    **options: Any,
) -> Path:
    """Draw a result into a picture file; the same result gives the same bytes.

    Parameters
    ----------
    result : Dataset or DataTree
        As of `draw`.
    path : str or PathLike
        Ends in .png, .svg or .pdf.
    title : str, optional
        As of `draw`.
    size : tuple of float, optional
        Width and height in inches; default what the panels need.
    dpi : float
        Dots per inch.
    **options : object
        As of `draw`.

    Returns
    -------
    Path
        The file.

    Examples
    --------
    >>> import actstore, numpy as np, tempfile, xarray as xr
    >>> acts = xr.DataArray(np.eye(4, dtype="float32"), dims=("token", "neuron"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(actstore.histogram(acts, bins=[0, 1, 2]), f"{folder}/ones.png").suffix
    '.png'
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix not in ENDINGS:
        raise UnknownNameError("ending of a picture", path.suffix, ENDINGS)
    figure = Figure(layout="constrained")
    figure.fit_panels = True  # type: ignore[attr-defined]
    draw(result, figure, title=title, **options)
    if size is not None:
        figure.set_size_inches(*size)
    date = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with rc_context({"svg.hashsalt": "actstore"}):
        figure.savefig(path, dpi=dpi, metadata=date.get(path.suffix))
    return path


def _about(result: Result) -> str:
    """What was asked of which store, over how many tokens."""
    attrs = result.attrs
    tokens = f"{attrs['tokens_used']:,} tokens" if "tokens_used" in attrs else ""
    chosen = attrs.get("tokens", "all")
    return ", ".join(
        filter(
            None,
            (
                attrs["query"].replace("_", " "),
                attrs.get("store", ""),
                tokens + (f" ({chosen})" if tokens and chosen != "all" else ""),
            ),
        )
    )
