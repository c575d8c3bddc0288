"""Cosines of pairs of tokens: their distribution, and what normal data give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask.delayed import delayed

from ..concatenation import open_any
from ..errors import UsageError
from ..stats.cosines import Blocks, cosines, normal_rows
from ..stats.products import in_space
from .dimensions import by_layer
from .engine import Output
from .joint import Answers, Rows, View
from .registry import query
from .result import Result
from .rows import check_seed, fractions_of
from .selection import Data, Names, Numbers, Tokens, select
from .units import rows_of_groups, sampled

__all__ = ["bin_edges", "cosine_pairs", "gaussian_baseline"]

CONTEXT = 9
"""Tokens of context shown before a token."""

MAX_BINS = 100_000
_HELD_NBYTES = 2**29


@dataclass(frozen=True)
class _Pairs:
    """Asks for the cosines of all pairs of tokens at each stage.

    Attributes
    ----------
    store : tuple of str, or None
        Path and identity of the store that contexts are read from.
    order : int
        Seed of the order in which tokens make two halves.
    """

    stages: tuple[View | None, ...]
    edges: np.ndarray
    quantiles: tuple[float, ...]
    center: bool
    split: bool
    order: int
    store: tuple[str, str] | None

    def of_rows(self, rows: Rows) -> Answers:
        tokens = rows.tokens
        if self.split:
            tokens = np.random.default_rng(self.order).permutation(tokens)
        found = [None if view is None else self._of(view, tokens) for view in self.stages]
        blank = next(f for f in found if f is not None)
        return {
            name: np.stack([_missing(value) if f is None else f[name] for f in found])
            for name, value in blank.items()
        }

    def _of(self, view: View, tokens: np.ndarray) -> Answers:
        rows = _UnitRows(view, tokens, self.center)
        found = cosines(Blocks(len(tokens), rows.read, self.split), self.edges, self.quantiles)
        with np.errstate(invalid="ignore", divide="ignore"):
            matching = np.float64(1) / found.mean_square
        there = found.first >= 0
        token_a = np.where(there, tokens[found.first], -1)
        token_b = np.where(there, tokens[found.second], -1)
        answers: Answers = {
            "counts": found.counts,
            "density": _density(found.counts, self.edges),
            "below": np.array(found.below),
            "above": np.array(found.above),
            "mean": np.array(found.mean),
            "matching_dimension": np.array(matching),
            "cosine": found.values,
            "token_a": token_a,
            "token_b": token_b,
        }
        if self.store:
            for side, own in (("a", token_a), ("b", token_b)):
                texts = [_context(self.store, int(t)) if t >= 0 else ("", "") for t in own]
                answers[f"context_{side}"] = np.array([t for t, _ in texts], object)
                answers[f"next_{side}"] = np.array([t for _, t in texts], object)
        return answers


def _missing(like: np.ndarray) -> np.ndarray:
    """What stands for a layer that a stage does not have."""
    blank: Any = {"f": np.nan, "i": -1, "O": ""}[like.dtype.kind]
    return np.full_like(like, blank)


def _context(store: tuple[str, str], token: int) -> tuple[str, str]:
    """The text up to a token, and what comes next in the corpus."""
    opened = _opened(*store)
    return opened.decode(token, before=CONTEXT), opened.decode(token, before=-1, after=1)


@lru_cache(maxsize=4)
def _opened(path: str, identity: str) -> Any:
    """By its identity, too: another store may lie at the path later."""
    return open_any(path)


class _UnitRows:
    """Rows of unit length of some tokens in any order, held in memory where they are few."""

    def __init__(self, view: View, tokens: np.ndarray, center: bool) -> None:
        self._view, self._tokens = view, tokens
        self._mean: np.ndarray | float = 0.0
        self._held: np.ndarray | None = None
        few = 8 * len(tokens) * view.width <= _HELD_NBYTES
        if few or center:
            step = max(1, _HELD_NBYTES // (16 * view.width))
            parts, total, count = [], np.zeros(view.width), 0
            for top in range(0, len(tokens), step):
                values = self._values(tokens[top : top + step])
                finite = np.isfinite(values).all(1)
                total += values.sum(0, where=finite[:, np.newaxis])
                count += int(finite.sum())
                if few:
                    parts.append(values)
            if center:
                self._mean = total / max(count, 1)
            if few and parts:
                self._held = self._unit(np.concatenate(parts))

    def read(self, start: int, stop: int) -> np.ndarray:
        if self._held is not None:
            return self._held[start:stop]
        return self._unit(self._values(self._tokens[start:stop]))

    def _unit(self, values: np.ndarray) -> np.ndarray:
        """Directions; 0 where there is none, as of NaN and inf."""
        with np.errstate(invalid="ignore"):
            rows = in_space(values - self._mean, "cosine")[0]
        rows[~np.isfinite(rows).all(1)] = 0
        return rows

    def _values(self, tokens: np.ndarray) -> np.ndarray:
        order = np.argsort(tokens)
        values = np.empty((len(tokens), self._view.width))
        values[order] = self._view.read(tokens[order])
        return values


@query("--stages hidden --layers 3 --quantiles 0.01,0.5,0.99")
def cosine_pairs(
    data: Data,
    *,
    stages: Names = None,
    layers: Numbers = None,
    tokens: Tokens = None,
    neurons: Numbers = None,
    by: str | None = None,
    exclude_sinks: str | None = None,
    n: int = 2000,
    bins: int | Sequence[float] = 200,
    range: Sequence[float] = (-1, 1),
    quantiles: float | Sequence[float] = (0.01, 0.5, 0.99),
    center: bool = False,
    split: bool = False,
    seed: int = 0,
) -> Result:
    """Cosines over pairs of tokens: their distribution, and the pairs at quantiles, with contexts.

    Parameters
    ----------
    n : int
        Tokens, drawn by `seed`, of which all pairs are taken; with `by`, of each group. 0 takes
        all tokens asked: block by block, in time that grows with their square.
    bins : int or sequence of float
        Number of bins, or their edges.
    range : sequence of float
        Ends of the bins where `bins` is a number.
    quantiles : float or sequence of float
        Fractions of the pairs in the order of their cosine: the pair at q is number
        floor(q (pairs - 1)).
    center : bool
        Take the mean over the tokens from every token first.
    split : bool
        Only pairs between two random halves of the tokens.
    seed : int
        Of the tokens drawn, and of the halves.

    Returns
    -------
    Dataset
        counts and density (stage, layer, bin), edges, below and above the range, the mean; and of
        each quantile (stage, layer, quantile) the cosine, token_a and token_b, from a store also
        the text up to each (context_a, context_b) and the corpus's next token (next_a, next_b).
        matching_dimension (stage, layer) is that of the isotropic normal whose cosines are as
        wide, 1 / mean(cos^2). Tokens whose values are all 0, or not all finite, make no pairs.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> acts = xr.DataArray(np.float32([[1, 0], [0, 1], [3, 4]]), dims=("token", "neuron"))
    >>> result = cosine_pairs(acts, quantiles=1, bins=4).compute()
    >>> result["counts"].values.tolist(), result["cosine"].values.round(3).tolist()
    ([[0, 0, 1, 2]], [[0.8]])
    """
    selection = select(data, stages, layers, tokens, neurons, by, exclude_sinks)
    check_seed(seed)
    edges, fractions = bin_edges(bins, range), fractions_of("quantiles", quantiles)
    if n < 0 or n == 1:
        raise UsageError(f"n is {n}: give at least 2 tokens, or 0 for all")
    store = (selection.path, selection.attrs["store_id"]) if selection.path else None
    count, q = len(selection.sources), len(fractions)
    outputs = _histogram_outputs(count, len(edges) - 1)
    each = {"cosine": "cosine of the pair", "token_a": "its token", "token_b": "its other token"}
    for name, text in each.items():
        kind = np.float64 if name == "cosine" else np.int64
        blank = None if name == "cosine" else -1
        attrs = {"long_name": text, "units": "1"}
        outputs[name] = Output(("stage", "quantile"), (count, q), kind, attrs, blank)
    if store:
        for side in ("a", "b"):
            for name, text in ((f"context_{side}", "text up to"), (f"next_{side}", "text after")):
                attrs = {"long_name": f"{text} token_{side}"}
                outputs[name] = Output(("stage", "quantile"), (count, q), object, attrs, "")

    def question(views: tuple[View | None, ...], rows: Rows) -> _Pairs:
        return _Pairs(views, edges, fractions, center, split, seed, store)

    rows_of = [sampled(rows, n, seed) if n else rows for rows in rows_of_groups(selection)]
    parameters = {
        "n": n,
        "bins": bins,
        "range": range,
        "quantiles": quantiles,
        "center": center,
        "split": split,
        "seed": seed,
    }
    made = by_layer("cosine_pairs", selection, question, outputs, parameters, rows_of=rows_of)
    made.attrs["tokens_drawn"] = max(len(rows.tokens) for rows in rows_of)
    labels = {"quantile": ("quantile", np.array(fractions), {"long_name": "fraction of pairs"})}
    return _with_edges(made, edges).assign_coords(labels)


@dataclass(frozen=True)
class _Baseline(_Pairs):
    """Asks for cosines of normal data of the dimension that matches each stage."""

    draws: int = 0

    def _of(self, view: View, tokens: np.ndarray) -> Answers:
        own = super()._of(view, tokens)
        matching = float(own["matching_dimension"])
        found = {"matching_dimension": np.array(matching)}
        counts = np.zeros(len(self.edges) - 1, np.int64)
        if np.isfinite(matching):
            counts = _normal_counts(self.draws, round(matching), self.order, self.edges)
        return {**found, "matching_density": _density(counts, self.edges)}


@query("--stages hidden --layers 3 --dimensions 10,100")
def gaussian_baseline(
    data: Data,
    *,
    stages: Names = None,
    layers: Numbers = None,
    tokens: Tokens = None,
    neurons: Numbers = None,
    by: str | None = None,
    exclude_sinks: str | None = None,
    dimensions: float | Sequence[float] | None = None,
    n: int = 2000,
    bins: int | Sequence[float] = 200,
    range: Sequence[float] = (-1, 1),
    center: bool = False,
    seed: int = 0,
    match: bool = True,
) -> Result:
    """Cosines of pairs of isotropic normal draws, beside which `cosine_pairs` can be read.

    Parameters
    ----------
    dimensions : int or sequence of int, optional
        Of the normal data; default the widths of the stages.
    n : int
        Draws, of which all pairs are taken; and tokens, to find the dimension that matches.
    bins : int or sequence of float
        Number of bins, or their edges.
    range : sequence of float
        Ends of the bins where `bins` is a number.
    center : bool
        Take the mean over the tokens from every token first.
    seed : int
        Of the draws, and of the tokens.
    match : bool
        Also draw from the dimension that matches each stage and layer, which reads the data.

    Returns
    -------
    Dataset
        density (dimension, bin) and edges; matching_dimension (stage, layer), 1 / mean(cos^2) of
        the data, and matching_density (stage, layer, bin), of that dimension rounded.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> acts = np.random.default_rng(1).normal(size=(1000, 20)).astype("float32")
    >>> result = gaussian_baseline(xr.DataArray(acts, dims=("token", "neuron")), dimensions=5)
    >>> result["matching_dimension"].values.round().tolist(), result["density"].dims
    ([20.0], ('dimension', 'bin'))
    """
    selection = select(data, stages, layers, tokens, neurons, by, exclude_sinks)
    check_seed(seed)
    edges = bin_edges(bins, range)
    asked = [s.width for s in selection.sources] if dimensions is None else dimensions
    chosen = list(dict.fromkeys(np.atleast_1d(np.asarray(asked, np.float64)).tolist()))
    bad = [d for d in chosen if not (1 <= d <= 10**6 and d == int(d))]
    if bad or not 2 <= n <= 20_000:
        raise UsageError(
            f"dimensions {dimensions!r} and n {n}: give whole numbers of dimensions from 1, and "
            "2 to 20,000 draws"
        )
    count = len(selection.sources)
    every = _histogram_outputs(count, len(edges) - 1)
    outputs = {"matching_dimension": every["matching_dimension"]}
    outputs["matching_density"] = every["density"]

    def question(views: tuple[View | None, ...], rows: Rows) -> _Baseline:
        return _Baseline(views, edges, (), center, False, seed, None, n)

    parameters = {
        "dimensions": [int(d) for d in chosen],
        "n": n,
        "bins": bins,
        "range": range,
        "center": center,
        "seed": seed,
        "match": match,
    }
    rows_of = [sampled(rows, n, seed) for rows in rows_of_groups(selection)]
    made = by_layer("gaussian_baseline", selection, question, outputs, parameters, rows_of=rows_of)
    if not match:
        made = made.drop_vars(list(outputs))
    bins_of = [delayed(_normal_density)(n, int(d), seed, edges) for d in chosen]
    drawn = da.stack([da.from_delayed(one, (len(edges) - 1,), np.float64) for one in bins_of])
    attrs = {"long_name": "probability density of normal data", "units": "1"}
    density = xr.Variable(("dimension", "bin"), drawn, attrs)
    made = made.assign(density=density).assign_coords(dimension=[int(d) for d in chosen])
    return _with_edges(made, edges)


def _normal_counts(n: int, dimensions: int, seed: int, edges: np.ndarray) -> np.ndarray:
    rows = normal_rows(n, dimensions, seed)
    return cosines(Blocks(n, lambda a, b: rows[a:b]), edges, ()).counts


def _normal_density(n: int, dimensions: int, seed: int, edges: np.ndarray) -> np.ndarray:
    return _density(_normal_counts(n, dimensions, seed, edges), edges)


def _density(counts: np.ndarray, edges: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts / (counts.sum(-1, keepdims=True) * np.diff(edges))


def _histogram_outputs(stages: int, bins: int) -> dict[str, Output]:
    def one(kind: Any, text: str, units: str = "1", *, wide: bool = False) -> Output:
        dims, shape = (("stage", "bin"), (stages, bins)) if wide else (("stage",), (stages,))
        return Output(dims, shape, kind, {"long_name": text, "units": units})

    return {
        "counts": one(np.int64, "pairs in the bin", wide=True),
        "density": one(np.float64, "probability density", wide=True),
        "below": one(np.int64, "pairs below the range"),
        "above": one(np.int64, "pairs above the range"),
        "mean": one(np.float64, "mean cosine"),
        "matching_dimension": one(np.float64, "dimension of normal data with cosines as wide"),
    }


def _with_edges(made: xr.Dataset, edges: np.ndarray) -> xr.Dataset:
    described = {"long_name": "bin edge", "units": "cosine"}
    centres = {"long_name": "bin centre", "units": "cosine"}
    return made.assign(edges=("edge", edges, described)).assign_coords(
        bin=("bin", (edges[1:] + edges[:-1]) / 2, centres)
    )


def bin_edges(bins: int | Sequence[float], limits: Sequence[float]) -> np.ndarray:
    ends = np.asarray(limits, np.float64)
    if ends.shape != (2,) or not ends[0] < ends[1]:
        raise UsageError(f"range {limits!r}: give two numbers, the smaller first, such as (-1, 1)")
    if isinstance(bins, int) and not 1 <= bins <= MAX_BINS:
        raise UsageError(f"bins is {bins}: it must be from 1 to {MAX_BINS:,}")
    edges = (
        np.linspace(ends[0], ends[1], bins + 1)
        if isinstance(bins, int)
        else np.asarray(bins, np.float64)
    )
    if edges.ndim != 1 or len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise UsageError("bins, given as edges, must be two or more numbers in ascending order")
    return edges
