"""Dimensionality: spectra, participation ratio, effective and intrinsic dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xarray as xr

from ..errors import UsageError
from ..stats import dimensionality as stats
from .engine import Output
from .joint import Answers, Grams, Rows, Streamed, View, passes_over
from .registry import query
from .result import Result, provenance
from .rows import COMPAT, Compat, check, check_seed
from .selection import Data, Names, Numbers, Selection, Tokens, select
from .units import Unit, labelled, memory_nbytes, place_of, rows_of_groups, sampled, view_of

__all__ = ["dimensionality", "intrinsic_dimension", "spectrum"]

MAX_NEIGHBOURS = 50_000


@dataclass(frozen=True)
class _Spectral:
    """Asks for the eigenvalues of views, each a stage of the result; None where it is missing."""

    stages: tuple[View | None, ...]

    spectral = True
    gram_only = False
    space = ("linear", False)

    @property
    def views(self) -> list[View]:
        return [v for v in self.stages if v is not None]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return [(i, i) for i in range(len(self.views))]

    def by_grams(self, grams: Grams) -> Answers:
        return self._each([(g.centred, len(grams.tokens), g.width) for g in grams.grams])

    def by_products(self, streamed: Streamed) -> Answers:
        views = range(len(self.views))
        return self._each([(streamed.scatter(i), streamed.n, self.views[i].width) for i in views])

    def _each(self, found: list[tuple[np.ndarray, int, int]]) -> Answers:
        """Answers of every stage, stacked."""
        own = iter(found)
        rows = [self.answer(*next(own)) if view is not None else None for view in self.stages]
        first = next(row for row in rows if row is not None)
        return {
            name: np.stack([np.full_like(blank, np.nan) if r is None else r[name] for r in rows])
            for name, blank in first.items()
        }

    def answer(self, scatter: np.ndarray, n: int, width: int) -> dict[str, np.ndarray]:
        raise NotImplementedError


@dataclass(frozen=True)
class _Dimensions(_Spectral):
    threshold: float
    null: bool
    notebook: bool

    def answer(self, scatter: np.ndarray, n: int, width: int) -> dict[str, np.ndarray]:
        needed = (n, min(n, width), self.threshold, self.notebook)
        found = {
            "participation_ratio": stats.participation_ratio(scatter) if n > 1 else np.nan,
            "effective_dimension": stats.components_needed(scatter, *needed),
        }
        if self.null:
            found["null_participation_ratio"] = stats.null_participation_ratio(n, width)
        return {name: np.array(value) for name, value in found.items()}


@dataclass(frozen=True)
class _Spectrum(_Spectral):
    k: int

    def answer(self, scatter: np.ndarray, n: int, width: int) -> dict[str, np.ndarray]:
        values = stats.variances(scatter, n, min(n, width))
        with np.errstate(invalid="ignore", divide="ignore"):
            explained = values / values.sum()
        found = {"variance": values, "explained": explained, "cumulative": np.cumsum(explained)}
        padded = {name: np.full(self.k, np.nan) for name in found}
        for name, own in found.items():
            padded[name][: len(own)] = own[: self.k]
        return padded


@dataclass(frozen=True)
class _Neighbours:
    """Asks for the intrinsic dimension of each stage."""

    stages: tuple[View | None, ...]

    def of_rows(self, rows: Rows) -> Answers:
        found = [None if v is None else stats.twonn(v.read(rows.tokens)) for v in self.stages]
        return {
            "dimension": np.array([f.dimension if f else np.nan for f in found]),
            "stderr": np.array([f.stderr if f else np.nan for f in found]),
            "duplicates": np.array([f.duplicates if f else 0 for f in found]),
        }


@query('--tokens "position > 0"')
def dimensionality(
    data: Data,
    *,
    stages: Names = None,
    layers: Numbers = None,
    tokens: Tokens = None,
    neurons: Numbers = None,
    by: str | None = None,
    exclude_sinks: str | None = None,
    threshold: float = 0.95,
    null: bool = True,
    compat: Compat = "textbook",
    memory: int | str = "2GiB",
) -> Result:
    """Participation ratio and effective dimension: how many directions activations spread over.

    Parameters
    ----------
    threshold : float
        Fraction of the variance that the effective dimension has to explain.
    null : bool
        Also give the participation ratio that as many tokens of isotropic normal data would have:
        with few tokens it is far below the width.
    compat : {"textbook", "notebook"}
        The effective dimension is the number of components needed to reach the threshold;
        "notebook" gives the zero-based index of the first that exceeds it.
    memory : int or str
        What the query may take, as "2GiB"; where products do not fit, the data are read in
        several passes.

    Returns
    -------
    Dataset
        participation_ratio, effective_dimension, null_participation_ratio (stage, layer), of the
        covariance about the mean. NaN where there is no variance.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> acts = xr.DataArray(np.eye(4, dtype="float32"), dims=("token", "neuron"))
    >>> result = dimensionality(acts).compute()
    >>> result["participation_ratio"].values.round(3), result["effective_dimension"].values
    (array([3.]), array([3.]))
    """
    selection = select(data, stages, layers, tokens, neurons, by, exclude_sinks)
    check("compat", compat, COMPAT)
    if not 0 < threshold <= 1:
        hint = f"; {threshold:g}% is {threshold / 100:g}" if 1 < threshold <= 100 else ""
        raise UsageError(f"threshold is {threshold:g}: it goes from 0 to 1{hint}")
    described = {
        "participation_ratio": "participation ratio",
        "effective_dimension": f"components for {threshold:.4g} of the variance",
        **({"null_participation_ratio": "participation ratio of normal data"} if null else {}),
    }
    n = len(selection.sources)
    outputs = {
        name: Output(("stage",), (n,), np.float64, {"long_name": text, "units": "1"})
        for name, text in described.items()
    }

    def question(views: tuple[View | None, ...], rows: Rows) -> _Spectral:
        return _Dimensions(views, threshold, null, compat == "notebook")

    parameters = {"threshold": threshold, "null": null, "compat": compat}
    return by_layer("dimensionality", selection, question, outputs, parameters, memory)


@query("--stages mlp_out --layers -1 --k 20")
def spectrum(
    data: Data,
    *,
    stages: Names = None,
    layers: Numbers = None,
    tokens: Tokens = None,
    neurons: Numbers = None,
    by: str | None = None,
    exclude_sinks: str | None = None,
    k: int | None = None,
    memory: int | str = "2GiB",
) -> Result:
    """Variance along each principal component.

    Parameters
    ----------
    k : int, optional
        Components, the largest first; default all: as many as tokens or neurons, whichever are
        fewer.
    memory : int or str
        What the query may take, as "2GiB"; where products do not fit, the data are read in
        several passes.

    Returns
    -------
    Dataset
        variance (ddof 1), explained (its fraction of the whole) and cumulative (stage, layer,
        component), NaN where a stage has fewer components.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> acts = np.float32([[1, 0], [-1, 0], [0, 2], [0, -2]])
    >>> result = spectrum(xr.DataArray(acts, dims=("token", "neuron"))).compute()
    >>> result["variance"].values.round(3).tolist(), result["cumulative"].values.tolist()
    ([[2.667, 0.667]], [[0.8, 1.0]])
    """
    selection = select(data, stages, layers, tokens, neurons, by, exclude_sinks)
    if k is not None and k < 1:
        raise UsageError(f"k is {k}: ask for at least one component")
    most = max(len(r.tokens) for r in rows_of_groups(selection))
    most = min(most, max(len(n) for n in selection.neurons.values()))
    size = most if k is None else min(k, most)
    shape = (len(selection.sources), size)
    outputs = {
        name: Output(("stage", "component"), shape, np.float64, {"long_name": text, "units": unit})
        for name, text, unit in (
            ("variance", "variance of the component (ddof 1)", "activation^2"),
            ("explained", "fraction of the variance", "1"),
            ("cumulative", "fraction of the variance up to the component", "1"),
        )
    }

    def question(views: tuple[View | None, ...], rows: Rows) -> _Spectral:
        return _Spectrum(views, size)

    made = by_layer("spectrum", selection, question, outputs, {"k": k}, memory)
    return made.assign_coords(component=np.arange(1, size + 1))


@query("--stages hidden,mlp_out --n 1000")
def intrinsic_dimension(
    data: Data,
    *,
    stages: Names = None,
    layers: Numbers = None,
    tokens: Tokens = None,
    neurons: Numbers = None,
    by: str | None = None,
    exclude_sinks: str | None = None,
    method: Literal["twonn"] = "twonn",
    n: int = 2000,
    seed: int = 0,
) -> Result:
    """Dimension of the manifold that activations lie on, from distances to nearest neighbours.

    Parameters
    ----------
    method : {"twonn"}
        Facco et al. (2017): from the ratio of the distances to the second and the first
        neighbour, the largest tenth of the ratios left out.
    n : int
        Tokens, drawn by `seed`; with `by`, of each group. It falls with fewer, since the scale
        at which neighbours are found grows.
    seed : int
        The same seed draws the same tokens.

    Returns
    -------
    Dataset
        dimension and stderr (stage, layer), the error by a jackknife over 20 groups of tokens;
        duplicates, tokens with the same values as another, which are left out.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> plane = np.random.default_rng(0).normal(size=(800, 2)) @ np.eye(2, 10)
    >>> acts = xr.DataArray(plane.astype("float32"), dims=("token", "neuron"))
    >>> intrinsic_dimension(acts).compute()["dimension"].values.round().tolist()
    [2.0]
    """
    selection = select(data, stages, layers, tokens, neurons, by, exclude_sinks)
    check_seed(seed)
    check("method", method, ("twonn",))
    if not 5 <= n <= MAX_NEIGHBOURS:
        raise UsageError(f"n is {n:,}: it must be from 5 to {MAX_NEIGHBOURS:,} tokens")
    count = len(selection.sources)
    outputs = {
        "dimension": Output(("stage",), (count,), np.float64, _named("intrinsic dimension")),
        "stderr": Output(("stage",), (count,), np.float64, _named("standard error")),
        "duplicates": Output(("stage",), (count,), np.int64, _named("tokens left out")),
    }

    def question(views: tuple[View | None, ...], rows: Rows) -> _Neighbours:
        return _Neighbours(views)

    rows_of = [sampled(rows, n, seed) for rows in rows_of_groups(selection)]
    parameters = {"method": method, "n": n, "seed": seed}
    made = by_layer(
        "intrinsic_dimension", selection, question, outputs, parameters, rows_of=rows_of
    )
    made.attrs["tokens_drawn"] = max(len(rows.tokens) for rows in rows_of)
    return made


def _named(long_name: str) -> dict[str, str]:
    return {"long_name": long_name, "units": "1"}


def by_layer(
    name: str,
    selection: Selection,
    question: Any,
    outputs: dict[str, Output],
    parameters: dict[str, Any],
    memory: int | str = "2GiB",
    rows_of: Sequence[Rows] | None = None,
) -> xr.Dataset:
    """A question of all stages at each layer, laid out as (stage, layer, [group,] ...)."""
    limit, sparse = memory_nbytes(memory), rows_of is not None
    rows_of = rows_of_groups(selection) if rows_of is None else rows_of
    layers = sorted({n for own in selection.layers.values() for n in own})
    units, passes = [], 1
    for layer in layers:
        views = tuple(
            view_of(source, layer, selection.neurons[source.stage])
            if layer in selection.layers[source.stage]
            else None
            for source in selection.sources
        )
        asked = [[(r, question(views, r))] if len(r.tokens) else [] for r in rows_of]
        units.append(Unit(place_of(selection, "layer", layer), asked))
        for rows, own in (pair for pairs in asked for pair in pairs if not sparse):
            passes = max(passes, passes_over(own.views, len(rows.tokens), limit, [own]))
    made = labelled(selection, units, "layer", layers, outputs, limit)
    stages = np.array([s.stage for s in selection.sources], object)
    made = made.assign_coords(stage=stages).transpose("stage", "layer", ...)
    made = made.isel(stage=0) if len(selection.sources) == 1 else made
    return made.assign_attrs(provenance(name, selection, parameters, passes))
