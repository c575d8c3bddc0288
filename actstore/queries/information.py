"""Mutual information and covariance of pairs: of tokens over neurons, of neurons over tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from math import isqrt
from typing import Any, Literal

import dask.array as da
import numpy as np
import xarray as xr
from dask._task_spec import Task, TaskRef
from dask.base import tokenize

from ..errors import UnknownNameError, UsageError
from ..schema import Categorical
from ..stats import information as stats
from .engine import Output, label_arrays, nothing, stack_groups
from .joint import Answers, View
from .matrices import MAX_TOKENS, lay_blocks, matrices_of
from .registry import query
from .result import Result, provenance
from .rows import COMPAT, Compat, check, check_seed
from .selection import Data, Names, Numbers, Selection, Tokens, check_free, select
from .units import view_of

__all__ = ["mutual_information", "pairwise_covariance"]

Axis = Literal["token", "neuron"]
AXES = ("token", "neuron")
Correction = Literal["miller-madow"]
Estimator = Literal["histogram", "gaussian-copula"]
ESTIMATORS = ("histogram", "gaussian-copula")
Reduce = Literal["mean", "histogram", "joint"]
REDUCE = ("mean", "histogram", "joint")

BLOCK = 128
_READY_ITEMSIZE = 18  # bytes an entry of a vector takes, ready to be paired
_MOST_READY = 2**26
MAX_BINS = 255
MAX_JOINT = 1_000

_TASK_STEPS = 2**29
"""Steps of the innermost loops that a task takes: half a second, after which it can be stopped."""


@dataclass(frozen=True)
class _Ready:
    """Vectors made ready for pairing; the scores of their ranks where those are compared."""

    binned: stats.Binned
    scores: np.ndarray | None


@dataclass(frozen=True)
class _Measured:
    """How two vectors are compared."""

    bins: int
    threshold: float
    correction: str | None
    null: int
    seed: int
    estimator: str

    def ready(self, x: np.ndarray) -> _Ready:
        """Vectors, one a row, before they are paired."""
        ranked = self.estimator == "gaussian-copula"
        binned = stats.prepare(x, self.bins, self.threshold)
        return _Ready(binned, stats.copula_ranks(x) if ranked else None)

    def of(self, x: _Ready, y: _Ready, own: bool) -> dict[str, np.ndarray]:
        """Every row of x with every row of y; `own`: they are the same rows."""
        found = {"covariance": stats.covariances(x.binned, y.binned)}
        orders = self._orders(x.binned.values.shape[1])
        if x.scores is not None and y.scores is not None:
            found["mutual_information"] = stats.copula_information(x.scores, y.scores)
            null = [stats.copula_information(x.scores, y.scores[:, order]) for order in orders]
        else:
            found["mutual_information"] = self._plug_in(x.binned, y.binned, own)
            null = [self._plug_in(x.binned, y.binned.permuted(o), False) for o in orders]
        if null:
            found["null_mean"] = np.mean(null, axis=0)
            found["null_std"] = np.std(null, axis=0, ddof=1)
            with np.errstate(invalid="ignore", divide="ignore"):
                above = found["mutual_information"] - found["null_mean"]
                found["z"] = above / found["null_std"]
        if own:
            for matrix in found.values():
                # One half is computed, so that both halves are the same to the bit.
                lower = np.tril_indices(len(matrix), -1)
                matrix[lower] = matrix.T[lower]
                np.fill_diagonal(matrix, np.nan)
        return found

    def _plug_in(self, a: stats.Binned, b: stats.Binned, own: bool) -> np.ndarray:
        information, samples, occupied = stats.pair_information(a, b, own)
        if self.correction == "miller-madow":
            with np.errstate(divide="ignore", invalid="ignore"):
                information += (occupied - 1) / (2 * samples * np.log(2))
        return information

    def _orders(self, n: int) -> Iterator[np.ndarray]:
        random = np.random.default_rng(self.seed)
        return (random.permutation(n) for _ in range(self.null))


@dataclass(frozen=True)
class _Pairs:
    """Pairs of tokens, or of neurons, of one view."""

    view: View
    measured: _Measured
    axis: str
    tokens: np.ndarray  # over which neurons are compared

    def read(self, chosen: np.ndarray) -> np.ndarray:
        """The vectors of some tokens or neurons."""
        if self.axis == "neuron":
            return replace(self.view, neurons=chosen).read(self.tokens).T
        return self.view.read(chosen)

    def blocks(self, first: np.ndarray, second: np.ndarray) -> dict[str, np.ndarray]:
        own = np.array_equal(first, second)
        x = self.vectors(first)
        return self.compare(x, x if own else self.vectors(second), own)

    def vectors(self, chosen: np.ndarray) -> _Ready:
        return self.measured.ready(self.read(chosen))

    def compare(self, x: _Ready, y: _Ready, own: bool) -> dict[str, np.ndarray]:
        return self.measured.of(x, y, own)

    @property
    def samples(self) -> int:
        """Over how many entries two vectors are compared."""
        return len(self.tokens) if self.axis == "neuron" else self.view.width


@query("--stages hidden --layers 3 --tokens 'token_text == \" the\"'")
def mutual_information(
    data: Data,
    *,
    stages: Names = None,
    layers: Numbers = None,
    tokens: Tokens = None,
    neurons: Numbers = None,
    by: str | None = None,
    exclude_sinks: str | None = None,
    bins: int = 15,
    outlier_threshold: float = 5.0,
    correction: Correction | None = None,
    null: int = 0,
    seed: int = 0,
    estimator: Estimator = "histogram",
    tokens_b: Tokens = None,
    axis: Axis = "token",
    reduce: Reduce | None = None,
    reduce_bins: int = 100,
    compat: Compat = "textbook",
) -> Result:
    """Mutual information and covariance of every two tokens, over their neurons.

    A neuron is left out of a pair where it is an outlier of either token, and the bins are those
    of the pair: what is left of both, in equal bins between their own ends.

    Parameters
    ----------
    bins : int
        Bins of each of the two, at most 255.
    outlier_threshold : float
        Standard deviations from a token's mean beyond which a neuron is an outlier; 0 for none.
    correction : {"miller-madow"}, optional
        Of the bias of the plug-in estimate, which is well above 0 for unrelated vectors.
    null : int
        Permutations of the neurons (the same for all pairs) whose mean and standard deviation
        are given beside, and how many of the latter the pair is above the former.
    seed : int
        Of the permutations.
    estimator : {"histogram", "gaussian-copula"}
        The second ranks each vector and takes the ranks for normal: bins and outliers do not
        matter, all pairs take one matrix product, and the bias is corrected (Ince et al. 2017).
    tokens_b : str or ndarray of bool, optional
        Other tokens, with which those of `tokens` are compared; default the same.
    axis : {"token", "neuron"}
        "neuron" compares neurons, over the tokens; the values of all tokens at 256 of the neurons
        are held at a time.
    reduce : {"mean", "histogram", "joint"}, optional
        Give means, histograms, or a joint histogram of information and covariance over the pairs
        instead of the matrices, which are then never held.
    reduce_bins : int
        Bins of those histograms, between the least and the greatest value.
    compat : {"textbook", "notebook"}
        Matrices are symmetric, their diagonal NaN; "notebook" leaves the lower half and the
        diagonal 0.

    Returns
    -------
    Dataset or DataTree
        mutual_information in bits and covariance (stage, layer, token, token_b), with `null`
        null_mean, null_std and z; with `by` a DataTree with a group for each value.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> acts = np.float32([[0, 0, 1, 1], [5, 5, 9, 9], [1, 2, 1, 2]])
    >>> result = mutual_information(xr.DataArray(acts, dims=("token", "neuron"))).compute()
    >>> result["mutual_information"].values[0, 0].round(6).tolist()
    [nan, 1.0, 0.0]
    """
    check("correction", correction, ("miller-madow", None))
    check("estimator", estimator, ESTIMATORS)
    check_seed(seed)
    if not 1 <= bins <= MAX_BINS:
        raise UsageError(f"bins is {bins}: it must be from 1 to {MAX_BINS}")
    if null < 0 or null == 1:
        raise UsageError(f"null is {null}: give 0, or at least 2 permutations")
    if null and reduce:
        raise UsageError("null is given for each pair: leave out reduce, or null")
    if correction and estimator != "histogram":
        raise UsageError(f"correction={correction!r} is of the histogram; {estimator} has its own")
    measured = _Measured(bins, outlier_threshold, correction, null, seed, estimator)
    names = ("mutual_information", "covariance", *(("null_mean", "null_std", "z") if null else ()))
    parameters = {
        "bins": bins,
        "outlier_threshold": outlier_threshold,
        "correction": correction,
        "null": null,
        "seed": seed,
        "estimator": estimator,
        "tokens_b": tokens_b if isinstance(tokens_b, str) else tokens_b is not None,
        "axis": axis,
        "reduce": reduce,
        "reduce_bins": reduce_bins,
        "compat": compat,
    }
    selection = select(data, stages, layers, tokens, neurons, by, exclude_sinks)
    second = None if tokens_b is None else select(data, stages, layers, tokens_b, neurons, None)
    return _paired("mutual_information", selection, second, measured, names, parameters)


@query("--stages hidden --layers 3 --tokens 'sequence == 0' --reduce mean")
def pairwise_covariance(
    data: Data,
    *,
    stages: Names = None,
    layers: Numbers = None,
    tokens: Tokens = None,
    neurons: Numbers = None,
    by: str | None = None,
    exclude_sinks: str | None = None,
    outlier_threshold: float = 5.0,
    tokens_b: Tokens = None,
    axis: Axis = "token",
    reduce: Literal["mean", "histogram"] | None = None,
    reduce_bins: int = 100,
    compat: Compat = "textbook",
) -> Result:
    """Covariance of every two tokens, over the neurons that are an outlier of neither.

    Parameters
    ----------
    outlier_threshold : float
        Standard deviations from a token's mean beyond which a neuron is an outlier; 0 for none.
    tokens_b : str or ndarray of bool, optional
        Other tokens, with which those of `tokens` are compared; default the same.
    axis : {"token", "neuron"}
        "neuron" compares neurons, over the tokens; the values of all tokens at 256 of the neurons
        are held at a time.
    reduce : {"mean", "histogram"}, optional
        Give the mean or a histogram over the pairs instead of the matrices.
    reduce_bins : int
        Bins of that histogram, between the least and the greatest value.
    compat : {"textbook", "notebook"}
        Matrices are symmetric, their diagonal NaN; "notebook" leaves the lower half and the
        diagonal 0.

    Returns
    -------
    Dataset or DataTree
        covariance (ddof 1) (stage, layer, token, token_b).

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> acts = np.float32([[0, 0, 1, 1], [5, 5, 9, 9]])
    >>> result = pairwise_covariance(xr.DataArray(acts, dims=("token", "neuron"))).compute()
    >>> float(result["covariance"][0, 0, 1].round(3))
    1.333
    """
    check("reduce", reduce, ("mean", "histogram", None))
    measured = _Covaried(1, outlier_threshold, None, 0, 0, "covariance")
    parameters = {
        "outlier_threshold": outlier_threshold,
        "tokens_b": tokens_b if isinstance(tokens_b, str) else tokens_b is not None,
        "axis": axis,
        "reduce": reduce,
        "reduce_bins": reduce_bins,
        "compat": compat,
    }
    selection = select(data, stages, layers, tokens, neurons, by, exclude_sinks)
    second = None if tokens_b is None else select(data, stages, layers, tokens_b, neurons, None)
    names = ("covariance",)
    return _paired("pairwise_covariance", selection, second, measured, names, parameters)


class _Covaried(_Measured):
    """Of two vectors only the covariance."""

    def of(self, x: _Ready, y: _Ready, own: bool) -> dict[str, np.ndarray]:
        found = stats.covariances(x.binned, y.binned)
        if own:
            np.fill_diagonal(found, np.nan)
        return {"covariance": found}


_DESCRIBED = {
    "mutual_information": ("mutual information", "bit"),
    "covariance": ("covariance (ddof 1)", "activation^2"),
    "null_mean": ("mean information of shuffled pairs", "bit"),
    "null_std": ("standard deviation of the information of shuffled pairs", "bit"),
    "z": ("standard deviations above the mean of shuffled pairs", "1"),
}


def _paired(
    name: str,
    selection: Selection,
    second: Selection | None,
    measured: _Measured,
    names: Sequence[str],
    parameters: dict[str, Any],
) -> Result:
    axis, reduce = parameters["axis"], parameters["reduce"]
    check("axis", axis, AXES)
    check("reduce", reduce, (*REDUCE, None))
    check("compat", parameters["compat"], COMPAT)
    if axis == "neuron" and second is not None:
        raise UsageError("tokens_b is for pairs of tokens: with axis='neuron' leave it out")
    if second is not None and selection.groups is not None:
        raise UsageError("by splits tokens into groups, and tokens_b gives another set: use one")
    if reduce is not None:
        return _reduced(name, selection, second, measured, names, parameters)

    def make(tokens: np.ndarray) -> xr.Dataset:
        return _matrices(selection, second, measured, names, tokens, parameters)

    return matrices_of(selection, make, provenance(name, selection, parameters, 1))


def _matrices(
    selection: Selection,
    second: Selection | None,
    measured: _Measured,
    names: Sequence[str],
    tokens: np.ndarray,
    parameters: dict[str, Any],
) -> xr.Dataset:
    axis = parameters["axis"]
    stages = [s.stage for s in selection.sources]
    layers = sorted({n for own in selection.layers.values() for n in own})
    rows = columns = tokens
    if second is not None:
        columns = second.members()[0]
    if axis == "neuron":
        rows = columns = _same_neurons(selection)
    if max(len(rows), len(columns)) > MAX_TOKENS:
        raise UsageError(
            f"all pairs of {len(rows):,} {axis}s would take "
            f"{8 * len(rows) * len(columns) / 1e9:,.0f} GB a layer: ask for at most "
            f"{MAX_TOKENS:,}, or for reduce='histogram'"
        )
    asked = {
        (source.stage, layer): _Pairs(
            view_of(source, layer, selection.neurons[source.stage]), measured, axis, tokens
        )
        for source in selection.sources
        for layer in selection.layers[source.stage]
    }
    own = np.array_equal(rows, columns)
    # With a null blocks are smaller, so that none takes long: after each it can be stopped.
    size = min(BLOCK, max(16, isqrt(_TASK_STEPS // 1500 // (measured.null + 1))))
    held = len(rows) * max(pairs.samples for pairs in asked.values()) * _READY_ITEMSIZE
    prepared = held <= _MOST_READY
    arrays = lay_blocks(asked, stages, layers, rows, columns, names, size, own, prepared)
    dims = ("stage", "layer", axis, f"{axis}_b")
    variables = {}
    for name in names:
        long_name, units = _DESCRIBED[name]
        values = arrays[name]
        if own and parameters["compat"] == "notebook":
            values = _upper(values)
        variables[name] = (dims, values, {"long_name": long_name, "units": units})
    coords = {"stage": np.array(stages, object), "layer": layers, axis: rows, f"{axis}_b": columns}
    if axis == "token":
        coords |= _labels(selection, rows, "token", "")
        if second is not None and not own:
            coords |= _labels(second, columns, "token_b", "_b")
    made = xr.Dataset(variables, coords)
    return made.isel(stage=0) if len(stages) == 1 else made


def _upper(values: Any) -> Any:
    """Only what is above the diagonal, 0 elsewhere."""
    rows = da.arange(values.shape[2], chunks=(values.chunks[2],))
    columns = da.arange(values.shape[3], chunks=(values.chunks[3],))
    return da.where(rows[:, None] < columns[None], values, 0.0)


def _labels(selection: Selection, tokens: np.ndarray, dim: str, ending: str) -> dict[str, Any]:
    """What tells tokens apart for people, as coordinates; what groups are split by is theirs."""
    found = {}
    for name in ("sequence", "position", "token_text"):
        if selection.groups is not None and name == selection.groups.name:
            continue
        try:
            own = selection.column(name)[tokens]
        except UnknownNameError:  # an array of the user's own need not have it
            continue
        found[name + ending] = dim, own.decode() if isinstance(own, Categorical) else own
    return found


def _same_neurons(selection: Selection) -> np.ndarray:
    every = list(selection.neurons.values())
    if not all(np.array_equal(every[0], other) for other in every[1:]):
        raise UsageError("stages differ in their neurons: with axis='neuron' ask for one of them")
    return every[0]


# -- reduced -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Some:
    """Some of the pairs of a view, block by block, in one task.

    Attributes
    ----------
    pairs : _Pairs
    first, second : ndarray of int
        What is compared with what: tokens or neurons.
    own : bool
        Both are the same, and each pair comes once.
    blocks : range
        Which of the blocks, counted row after row.
    """

    pairs: _Pairs
    first: np.ndarray
    second: np.ndarray
    own: bool
    blocks: range

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Flat values of the pairs of one block after another."""
        measured, at, x = self.pairs.measured, -1, None
        places = _places(len(self.first), len(self.second), self.own)
        for i, j in islice(places, self.blocks.start, self.blocks.stop):
            if i != at or x is None:  # blocks of a row share its vectors
                at, x = i, measured.ready(self.pairs.read(self.first[i : i + BLOCK]))
            same = self.own and i == j
            y = x if same else measured.ready(self.pairs.read(self.second[j : j + BLOCK]))
            found = measured.of(x, y, same)
            chosen = np.ones(found["covariance"].shape, bool)
            chosen = np.triu(chosen, 1) if same else chosen
            yield {name: matrix[chosen] for name, matrix in found.items()}


def _places(n: int, m: int, own: bool) -> Iterator[tuple[int, int]]:
    """Where the blocks of n x m pairs begin; of a set with itself without those below."""
    for i in range(0, n, BLOCK):
        for j in range(i if own else 0, m, BLOCK):
            yield i, j


def _split(pairs: _Pairs, first: np.ndarray, second: np.ndarray) -> list[_Some]:
    """All pairs, cut into tasks that do not take long."""
    own = np.array_equal(first, second)
    count = sum(1 for _ in _places(len(first), len(second), own))
    steps = BLOCK * BLOCK * (pairs.samples + 2 * pairs.measured.bins**2)
    step = max(1, _TASK_STEPS // steps)
    cuts = range(0, count, step)
    return [_Some(pairs, first, second, own, range(i, min(i + step, count))) for i in cuts]


def _extents(some: _Some, names: Sequence[str]) -> dict[str, tuple[float, int, float, float]]:
    """Sum, count, least and greatest of the values of some pairs."""
    found = dict.fromkeys(names, (0.0, 0, np.inf, -np.inf))
    for part in some:
        for name, (total, count, low, high) in found.items():
            there = part[name][np.isfinite(part[name])]
            found[name] = (
                total + float(there.sum()),
                count + len(there),
                min(low, float(there.min(initial=np.inf))),
                max(high, float(there.max(initial=-np.inf))),
            )
    return found


_extents.small_products = True  # type: ignore[attr-defined]


def _means_and_edges(bins: int, *parts: dict[str, tuple[float, int, float, float]]) -> Answers:
    found: Answers = {}
    for name in parts[0]:
        totals, counts, lows, highs = zip(*(part[name] for part in parts), strict=True)
        low, high = min(lows), max(highs)
        low, high = (low, high) if low < high else (low - 0.5, low + 0.5)
        low, high = (low, high) if np.isfinite(low) else (0.0, 1.0)
        count = sum(counts)
        found[f"mean_{name}"] = np.array(sum(totals) / count if count else np.nan)
        found[f"edges_{name}"] = np.linspace(low, high, bins + 1)
    return found


def _counts(some: _Some, edges: Answers, names: Sequence[str], joint: bool) -> Answers:
    """Histograms of the values of some pairs."""
    limits = {name: edges[f"edges_{name}"] for name in names}
    bins = len(limits["covariance"]) - 1
    counts = {f"counts_{name}": np.zeros(bins) for name in names}
    both = ("covariance", "mutual_information")
    square = np.zeros((bins, bins))
    for part in some:
        if joint:
            x, y = (part[n] for n in both)
            square += np.histogram2d(x, y, [limits[n] for n in both])[0]
            continue
        for name in names:
            counts[f"counts_{name}"] += np.histogram(part[name], limits[name])[0]
    return {"counts": square} if joint else counts


_counts.small_products = True  # type: ignore[attr-defined]


def _together(edges: Answers, *parts: Answers) -> Answers:
    """Edges and means beside the counts of all pairs."""
    return {**edges, **{name: sum(part[name] for part in parts) for name in parts[0]}}


def _stages(blank: Mapping[str, np.ndarray], *found: Answers | None) -> Answers | None:
    """Answers of the stages of a layer, stacked; None for a group without tokens."""
    if all(own is None for own in found):
        return None
    return {
        name: np.stack([values[i] if own is None else own[name] for i, own in enumerate(found)])
        for name, values in blank.items()
    }


def _listed(*values: Any) -> list[Any]:
    return list(values)


def _reduced(
    name: str,
    selection: Selection,
    second: Selection | None,
    measured: _Measured,
    names: Sequence[str],
    parameters: dict[str, Any],
) -> xr.Dataset:
    """Means or histograms over the pairs.

    The pairs are gone through in tasks that do not take long: once for the ends of the
    histograms, once more for the counts.
    """
    reduce, bins, axis = (parameters[k] for k in ("reduce", "reduce_bins", "axis"))
    if not 1 <= bins <= 10_000:
        raise UsageError(f"reduce_bins is {bins}: it must be from 1 to 10,000")
    if reduce == "joint" and bins > MAX_JOINT:
        raise UsageError(f"reduce_bins is {bins}: of a joint histogram at most {MAX_JOINT:,}")
    outputs = _reduced_outputs(len(selection.sources), names, reduce, bins)
    check_free(selection.groups, outputs)
    columns = None if second is None else second.members()[0]
    groups = selection.members()
    layers = sorted({n for own in selection.layers.values() for n in own})
    blank = {k: nothing(output) for k, output in outputs.items()}
    graph: dict[Any, Any] = {}
    places = list(product(enumerate(layers), enumerate(groups)))
    asked = {
        (layer, source.stage): view_of(source, layer, selection.neurons[source.stage])
        for layer, source in product(layers, selection.sources)
        if layer in selection.layers[source.stage]
    }
    given = (measured, type(measured), columns, groups, axis, reduce, bins)
    label = f"{name}-{tokenize(asked, layers, given)}"

    def task(*key: Any, call: Any, of: Sequence[Any]) -> TaskRef:
        graph[key] = Task(key, call, *of)
        return TaskRef(key)

    for (row, layer), (group, tokens) in places:
        found: list[Any] = []
        for s, source in enumerate(selection.sources):
            view = asked.get((layer, source.stage))
            if view is None or not len(tokens):
                found.append(None)
                continue
            rows = view.neurons if axis == "neuron" else tokens
            other = rows if columns is None else columns
            some = _split(_Pairs(view, measured, axis, tokens), rows, other)
            at = (row, group, s)
            ends = [
                task(f"ends-{label}", *at, i, call=_extents, of=[own, tuple(names)])
                for i, own in enumerate(some)
            ]
            edges = task(f"edges-{label}", *at, call=_means_and_edges, of=[bins, *ends])
            if reduce != "mean":
                of = [edges, tuple(names), reduce == "joint"]
                counts = [
                    task(f"counts-{label}", *at, i, call=_counts, of=[own, *of])
                    for i, own in enumerate(some)
                ]
                edges = task(f"pairs-{label}", *at, call=_together, of=[edges, *counts])
            found.append(edges)
        task(f"stages-{label}", row, group, call=_stages, of=[blank, *found])
    for row in range(len(layers)):
        own = [TaskRef((f"stages-{label}", row, group)) for group in range(len(groups))]
        whole = task(f"groups-{label}", row, call=_listed, of=own)
        task(f"all-{label}", row, call=stack_groups, of=[blank, whole])
    arrays = label_arrays(graph, label, len(layers), len(groups), outputs)
    split = [] if selection.groups is None else [selection.groups.name]
    made = xr.Dataset(
        {
            k: (("layer", *split, *output.dims), v if split else v[:, 0], output.attrs)
            for (k, output), v in zip(outputs.items(), arrays.values(), strict=True)
        },
        {"layer": layers, "stage": np.array([s.stage for s in selection.sources], object)},
    )
    if selection.groups is not None:
        made = made.assign_coords({selection.groups.name: selection.groups.values})
    made = made.transpose("stage", "layer", ...)
    made = made.isel(stage=0) if len(selection.sources) == 1 else made
    passes = 1 if reduce == "mean" else 2
    return made.assign_attrs(provenance(name, selection, parameters, passes))


def _reduced_outputs(n: int, names: Sequence[str], reduce: str, bins: int) -> dict[str, Output]:
    outputs = {}
    for own in names:
        text, units = _DESCRIBED[own]
        attrs = {"long_name": f"mean {text}", "units": units}
        outputs[f"mean_{own}"] = Output(("stage",), (n,), np.float64, attrs)
        if reduce == "mean":
            continue
        attrs = {"long_name": text, "units": units}
        dims = ("stage", f"edge_{own}")
        outputs[f"edges_{own}"] = Output(dims, (n, bins + 1), np.float64, attrs)
        if reduce == "histogram":
            counted = {"long_name": f"pairs by {text}", "units": "1"}
            dims = ("stage", f"bin_{own}")
            outputs[f"counts_{own}"] = Output(dims, (n, bins), np.float64, counted)
    if reduce == "joint":
        square = ("stage", "bin_covariance", "bin_mutual_information")
        counted = {"long_name": "pairs", "units": "1"}
        outputs["counts"] = Output(square, (n, bins, bins), np.float64, counted)
    return outputs
