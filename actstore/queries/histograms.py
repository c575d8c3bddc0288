"""Histograms: given edges, the data's own range, or bins chosen by a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import xarray as xr

from ..errors import UnknownNameError, UsageError
from ..stats.edges import RULES, snapped_edges
from .binning import QUARTILES, Course
from .engine import Output, Pass, stream
from .registry import query
from .result import Result, assemble
from .rows import COMPAT, PER, Compat, Per, check, element, groups_of, row_dims
from .selection import Data, Names, Numbers, Selection, Source, Tokens, select
from .summaries import quantile_search

__all__ = ["histogram"]

MAX_BINS = 100_000
MAX_CELLS = 2**27
FD_BINS = {"layer": 10_000, "head": 10_000, "neuron": 1_000}
"""Most bins that ``bins="fd"`` gives; results are padded to it, as they are lazy."""

TRANSFORMS = (None, "center", "scale", "peak")


@query("--layers -1 --bins=-5:5:101 --json")
def histogram(
    data: Data,
    *,
    stages: Names = None,
    layers: Numbers = None,
    tokens: Tokens = None,
    neurons: Numbers = None,
    by: str | None = None,
    exclude_sinks: str | None = None,
    bins: int | Sequence[float] | Literal["fd"] = 100,
    range: Sequence[float] | None = None,
    density: bool = False,
    per: Per = "layer",
    transform: Literal["center", "scale", "peak"] | None = None,
    approximate: bool = False,
    compat: Compat = "textbook",
) -> Result:
    """Histogram of activation values, per layer, head or neuron.

    Parameters
    ----------
    bins : int, sequence of float or "fd"
        Number of bins of equal width; or their edges, ascending ("start:stop:count" on the
        command line); or "fd", the rule of Freedman and Diaconis, of at most 10,000 bins (1,000
        per neuron), padded to that number. Where half of the values are the same the rule has no
        answer, and Sturges' rule is used instead; the result's `rule` says where.
    range : sequence of float, optional
        Ends of the bins where `bins` is not edges; default the smallest and largest finite value
        of each row of the result, for which the data are read once more.
    density : bool
        Divide by the count inside the range and the bin's width.
    per : {"layer", "head", "neuron"}
        What each histogram is about.
    transform : {"center", "scale", "peak"}, optional
        What is counted instead of a value x: "center", x - mean of its neuron; "scale",
        (x - mean) * layer std / neuron std, where layer std is the mean of the stds of all the
        layer's neurons; "peak", (x - peak) * layer std / neuron std, with the peak that `peaks`
        finds in 50 bins, of a height of 2% of the tokens, which some bin always has (notebook:
        200 tokens). Values of neurons without spread, or peak, are counted as nonfinite.
    approximate : bool
        Allow an answer from sketches, whose counts of whole layers are exact at edges of their
        own: each edge is moved to the nearest of those (by 0.4% at most, the outer ones
        outwards, and of those that meet one is left). The result's `edges` say where they are.
        Without sketches the data are read, and no edge is moved.
    compat : {"textbook", "notebook"}
        "notebook" does as numpy on the data's own type: edges and transforms in float32 for
        float32, one bin where "fd" has no answer.

    Returns
    -------
    Dataset
        counts or density (layer, [neuron or head,] bin); edges (layer, edge), or where each row
        has its own, (layer, [neuron or head,] edge), NaN past a row's last; below, above and
        nonfinite: values outside the range and NaN, which are never dropped in silence. With
        "fd" also n_bins and rule. Bins are closed on the left, the last one on both sides. With
        `by` and no `range`, each group has its own edges, as if it had been asked alone.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> acts = xr.DataArray(np.float32([[0.5, 1.5], [1.0, 9.0]]), dims=("token", "neuron"))
    >>> result = histogram(acts, bins=2, range=(0, 2)).compute()
    >>> result["counts"].values.tolist(), result["above"].values.tolist()
    ([[1, 2]], [1])
    >>> histogram(acts, bins=2).compute()["edges"].values.tolist()
    [[0.5, 4.75, 9.0]]
    """
    selection = select(data, stages, layers, tokens, neurons, by, exclude_sinks)
    check("per", per, PER)
    check("transform", transform, TRANSFORMS)
    check("compat", compat, COMPAT)
    limits = _limits(range)
    edges = _given_edges(bins, limits)
    snap = approximate and transform is None and not isinstance(bins, str)
    snap = snap and all(_snaps(selection, s, per) for s in selection.sources)
    if snap and edges is not None:
        edges = snapped_edges(edges)
    size = FD_BINS[per] if isinstance(bins, str) else _size(bins if edges is None else edges)

    def passes(source: Source, chosen: np.ndarray) -> list[Pass]:
        native = element(source) if transform is None else np.dtype(np.float32)
        kind = native if compat == "notebook" else np.dtype(np.float64)
        groups = groups_of(source, chosen, per)
        search = quantile_search(source, groups, QUARTILES, selection.attrs["tokens_used"])
        if transform is not None:
            search = replace(search, dtype=kind, significant=8 * kind.itemsize)
        largest = float(np.finfo(search.dtype).max)
        return Course(
            size=None if isinstance(bins, str) else size,
            # numpy computes the edges of a given range in float64, and then casts them.
            edges=edges if edges is None or limits is None else edges.astype(kind),
            limits=limits,
            density=density,
            transform=transform,
            notebook=compat == "notebook",
            chosen=chosen,
            groups=groups,
            kind=kind,
            cap=FD_BINS[per],
            search=replace(search, limits=limits or (-largest, largest)),
            whole=per == "layer" and len(chosen) == source.width,
            exact=source.dtype in ("float16", "bfloat16"),
            snap=snap,
        ).passes()

    def outputs(source: Source, chosen: np.ndarray) -> dict[str, Output]:
        dims, shape = row_dims(source, chosen, per)
        if np.prod(shape, dtype=np.int64) * size > MAX_CELLS:
            raise UsageError(
                f"{size:,} bins for each of {np.prod(shape):,} {per}s are over "
                f"{MAX_CELLS:,} counts a layer: ask for fewer bins or neurons"
            )
        return _outputs(dims, shape, size, density, isinstance(bins, str), edges is None)

    results = stream(selection, passes, outputs)
    if edges is not None:
        results = {stage: _with_edges(d, edges) for stage, d in results.items()}
    parameters = {
        "bins": bins,
        "range": range,
        "density": density,
        "per": per,
        "transform": transform,
        "approximate": approximate,
        "compat": compat,
    }
    return assemble("histogram", selection, results, parameters)


def _snaps(selection: Selection, source: Source, per: Per) -> bool:
    """Whether sketches can count the values, at edges of their own."""
    known = source.sketched is not None and selection.strata is not None
    return known and per == "layer" and len(selection.neurons[source.stage]) == source.width


def _outputs(
    dims: tuple[str, ...],
    shape: tuple[int, ...],
    size: int,
    density: bool,
    by_rule: bool,
    own_edges: bool,
) -> dict[str, Output]:
    def counted(text: str, *more: int) -> Output:
        own = (*dims, "bin") if more else dims
        return Output(own, (*shape, *more), np.int64, {"long_name": text, "units": "1"})

    found = {"counts": counted("values in the bin", size)}
    if density:
        attrs = {"long_name": "probability density", "units": "1/activation"}
        found = {"density": Output((*dims, "bin"), (*shape, size), np.float64, attrs)}
    found["below"] = counted("values below the range")
    found["above"] = counted("values above the range")
    found["nonfinite"] = counted("values that are NaN")
    if own_edges:
        attrs = {"long_name": "bin edge", "units": "activation"}
        found["edges"] = Output((*dims, "edge"), (*shape, size + 1), np.float64, attrs)
    if by_rule:
        found["n_bins"] = counted("bins in use")
        flags = {"flag_values": np.arange(len(RULES), dtype=np.int8)}
        attrs = {"long_name": "rule that gave the bins", "flag_meanings": " ".join(RULES)}
        found["rule"] = Output(dims, shape, np.int8, {**attrs, **flags})
    return found


def _with_edges(dataset: xr.Dataset, edges: np.ndarray) -> xr.Dataset:
    rows = np.tile(edges, (dataset.sizes["layer"], 1))
    described = {"long_name": "bin edge", "units": "activation"}
    centres = {"long_name": "bin centre", "units": "activation"}
    return dataset.assign(edges=(("layer", "edge"), rows, described)).assign_coords(
        bin=("bin", (edges[1:] + edges[:-1]) / 2, centres)
    )


def _limits(limits: Sequence[float] | None) -> tuple[float, float] | None:
    if limits is None:
        return None
    ends = np.asarray(limits, np.float64)
    if not (ends.shape == (2,) and np.isfinite(ends).all() and ends[0] < ends[1]):
        raise UsageError(
            f"range {limits!r}: give two numbers, the smaller first, such as (-5, 5) (on the "
            "command line --range=-5,5)"
        )
    return float(ends[0]), float(ends[1])


def _size(bins: Any) -> int:
    return int(bins) if isinstance(bins, (int, np.integer)) else len(bins) - 1


def _given_edges(bins: Any, limits: tuple[float, float] | None) -> np.ndarray | None:
    """Edges that are known before the data are read."""
    if isinstance(bins, str):
        if bins != "fd":
            raise UnknownNameError("rule for bins", bins, ["fd"], "Or give a number, or edges.")
        return None
    if isinstance(bins, (int, np.integer)):
        if not 1 <= bins <= MAX_BINS:
            raise UsageError(f"bins is {bins}: it must be from 1 to {MAX_BINS:,}")
        return None if limits is None else np.linspace(*limits, int(bins) + 1)
    edges = np.asarray(bins, dtype=np.float64)
    good = edges.ndim == 1 and 2 <= len(edges) <= MAX_BINS + 1 and np.isfinite(edges).all()
    if not (good and (np.diff(edges) > 0).all()):
        raise UsageError(f"bins {bins!r}: give a number of bins, edges that ascend, or 'fd'")
    if limits is not None:
        raise UsageError(f"range {limits} beside edges: the edges say it all; leave range out")
    return edges
