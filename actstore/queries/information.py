"""Mutual information and covariance of pairs: of tokens over neurons, of neurons over tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import xarray as xr

from ..errors import UsageError
from ..stats import information as stats
from .dimensions import by_layer
from .engine import Output
from .joint import Answers, Rows, View
from .matrices import MAX_TOKENS, lay_blocks, matrices_of
from .registry import query
from .result import Result, provenance
from .rows import COMPAT, Compat, check
from .selection import Data, Names, Numbers, Selection, Tokens, select
from .units import rows_of_groups, view_of

__all__ = ["mutual_information", "pairwise_covariance"]

Axis = Literal["token", "neuron"]
AXES = ("token", "neuron")
Correction = Literal["miller-madow"]
Estimator = Literal["histogram", "gaussian-copula"]
ESTIMATORS = ("histogram", "gaussian-copula")
Reduce = Literal["mean", "histogram", "joint"]
REDUCE = ("mean", "histogram", "joint")

BLOCK = 128
MAX_BINS = 255


@dataclass(frozen=True)
class _Measured:
    """How two vectors are compared."""

    bins: int
    threshold: float
    correction: str | None
    null: int
    seed: int
    estimator: str

    def of(self, x: np.ndarray, y: np.ndarray, own: bool) -> dict[str, np.ndarray]:
        """Every row of x with every row of y; `own`: they are the same rows."""
        a, b = (stats.prepare(v, self.bins, self.threshold) for v in (x, y))
        found = {"covariance": stats.covariances(a, b)}
        if self.estimator == "gaussian-copula":
            scores = [stats.copula_ranks(v) for v in (x, y)]
            found["mutual_information"] = stats.copula_information(*scores)
            null = [stats.copula_information(scores[0], s) for s in self._shuffled(scores[1])]
        else:
            found["mutual_information"] = self._plug_in(a, b, own)
            orders = self._orders(x.shape[1])
            null = [self._plug_in(a, b.permuted(order), False) for order in orders]
        if null:
            found["null_mean"] = np.mean(null, axis=0)
            found["null_std"] = np.std(null, axis=0, ddof=1)
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

    def _shuffled(self, scores: np.ndarray) -> Iterator[np.ndarray]:
        return (scores[:, order] for order in self._orders(scores.shape[1]))


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
        x = self.read(first)
        return self.measured.of(x, x if own else self.read(second), own)

    def pairs(self, rows: np.ndarray, columns: np.ndarray, own: bool) -> Iterator[Any]:
        """Flat results of all pairs, block by block, each pair once."""
        for i in range(0, len(rows), BLOCK):
            for j in range(i if own else 0, len(columns), BLOCK):
                found = self.blocks(rows[i : i + BLOCK], columns[j : j + BLOCK])
                chosen = np.ones(found["covariance"].shape, bool)
                if own and i == j:
                    chosen = np.triu(chosen, 1)
                yield {name: matrix[chosen] for name, matrix in found.items()}


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
        are given beside.
    seed : int
        Of the permutations.
    estimator : {"histogram", "gaussian-copula"}
        The second ranks each vector and takes the ranks for normal: bins and outliers do not
        matter, all pairs take one matrix product, and the bias is corrected (Ince et al. 2017).
    tokens_b : str or ndarray of bool, optional
        Other tokens, with which those of `tokens` are compared; default the same.
    axis : {"token", "neuron"}
        "neuron" compares neurons, over the tokens.
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
        null_mean and null_std; with `by` a DataTree with a group for each value.

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
    if not 1 <= bins <= MAX_BINS:
        raise UsageError(f"bins is {bins}: it must be from 1 to {MAX_BINS}")
    if null < 0 or null == 1:
        raise UsageError(f"null is {null}: give 0, or at least 2 permutations")
    if null and reduce:
        raise UsageError("null is given for each pair: leave out reduce, or null")
    if correction and estimator != "histogram":
        raise UsageError(f"correction={correction!r} is of the histogram; {estimator} has its own")
    measured = _Measured(bins, outlier_threshold, correction, null, seed, estimator)
    names = ("mutual_information", "covariance", *(("null_mean", "null_std") if null else ()))
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
        "neuron" compares neurons, over the tokens.
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

    def of(self, x: np.ndarray, y: np.ndarray, own: bool) -> dict[str, np.ndarray]:
        a, b = (stats.prepare(v, self.bins, self.threshold) for v in (x, y))
        found = stats.covariances(a, b)
        if own:
            np.fill_diagonal(found, np.nan)
        return {"covariance": found}


_DESCRIBED = {
    "mutual_information": ("mutual information", "bit"),
    "covariance": ("covariance (ddof 1)", "activation^2"),
    "null_mean": ("mean information of shuffled pairs", "bit"),
    "null_std": ("standard deviation of the information of shuffled pairs", "bit"),
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
    arrays = lay_blocks(asked, stages, layers, rows, columns, names, BLOCK, own)
    dims = ("stage", "layer", axis, f"{axis}_b")
    variables = {}
    for name in names:
        long_name, units = _DESCRIBED[name]
        values = arrays[name]
        if own and parameters["compat"] == "notebook":
            values = _upper(values)
        variables[name] = (dims, values, {"long_name": long_name, "units": units})
    coords = {"stage": np.array(stages, object), "layer": layers, axis: rows, f"{axis}_b": columns}
    made = xr.Dataset(variables, coords)
    return made.isel(stage=0) if len(stages) == 1 else made


def _upper(values: Any) -> Any:
    """Only what is above the diagonal, 0 elsewhere."""
    import dask.array as da

    rows = da.arange(values.shape[2], chunks=(values.chunks[2],))
    columns = da.arange(values.shape[3], chunks=(values.chunks[3],))
    return da.where(rows[:, None] < columns[None], values, 0.0)


def _same_neurons(selection: Selection) -> np.ndarray:
    every = list(selection.neurons.values())
    if not all(np.array_equal(every[0], other) for other in every[1:]):
        raise UsageError("stages differ in their neurons: with axis='neuron' ask for one of them")
    return every[0]


# -- reduced -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reduction:
    """Asks for means or histograms over the pairs of each stage."""

    stages: tuple[_Pairs | None, ...]
    columns: np.ndarray | None
    names: tuple[str, ...]
    reduce: str
    bins: int

    def of_rows(self, rows: Rows) -> Answers:
        found = [self._of(p, rows) for p in self.stages]
        blank = next(f for f in found if f is not None)
        return {
            name: np.stack(
                [np.full_like(v, np.nan, float) if f is None else f[name] for f in found]
            )
            for name, v in blank.items()
        }

    def _of(self, pairs: _Pairs | None, rows: Rows) -> dict[str, np.ndarray] | None:
        if pairs is None:
            return None
        if pairs.axis == "neuron":
            pairs = replace(pairs, tokens=rows.tokens)
            first = second = pairs.view.neurons
        else:
            first = rows.tokens
            second = first if self.columns is None else self.columns
        own = np.array_equal(first, second)
        ends = {name: [np.inf, -np.inf] for name in self.names}
        sums, counts = dict.fromkeys(self.names, 0.0), dict.fromkeys(self.names, 0)
        for part in pairs.pairs(first, second, own):
            for name in self.names:
                there = part[name][np.isfinite(part[name])]
                sums[name] += float(there.sum())
                counts[name] += len(there)
                ends[name][0] = min(ends[name][0], there.min(initial=np.inf))
                ends[name][1] = max(ends[name][1], there.max(initial=-np.inf))
        means = {
            f"mean_{n}": np.array(sums[n] / counts[n] if counts[n] else np.nan) for n in self.names
        }
        if self.reduce == "mean":
            return means
        return {**means, **self._histograms(pairs, first, second, own, ends)}

    def _histograms(
        self,
        pairs: _Pairs,
        first: np.ndarray,
        second: np.ndarray,
        own: bool,
        ends: dict[str, list[float]],
    ) -> dict[str, np.ndarray]:
        edges = {}
        for name, (low, high) in ends.items():
            low, high = (low, high) if low < high else (low - 0.5, low + 0.5)
            low, high = (low, high) if np.isfinite(low) else (0.0, 1.0)
            edges[name] = np.linspace(low, high, self.bins + 1)
        if self.reduce == "joint":
            both = ("covariance", "mutual_information")
            joint = np.zeros((self.bins, self.bins))
            for part in pairs.pairs(first, second, own):
                x, y = (part[n] for n in both)
                joint += np.histogram2d(x, y, [edges[n] for n in both])[0]
            return {"counts": joint, **{f"edges_{n}": edges[n] for n in both}}
        counts = {name: np.zeros(self.bins) for name in self.names}
        for part in pairs.pairs(first, second, own):
            for name in self.names:
                counts[name] += np.histogram(part[name], edges[name])[0]
        return {
            **{f"counts_{n}": counts[n] for n in self.names},
            **{f"edges_{n}": edges[n] for n in self.names},
        }


def _reduced(
    name: str,
    selection: Selection,
    second: Selection | None,
    measured: _Measured,
    names: Sequence[str],
    parameters: dict[str, Any],
) -> xr.Dataset:
    reduce, bins, axis = (parameters[k] for k in ("reduce", "reduce_bins", "axis"))
    if not 1 <= bins <= 10_000:
        raise UsageError(f"reduce_bins is {bins}: it must be from 1 to 10,000")
    n, kept = len(selection.sources), tuple(names)
    outputs = {}
    for own in kept:
        text, units = _DESCRIBED[own]
        attrs = {"long_name": f"mean {text}", "units": units}
        outputs[f"mean_{own}"] = Output(("stage",), (n,), np.float64, attrs)
    if reduce != "mean":
        for own in kept:
            text, units = _DESCRIBED[own]
            dims, attrs = ("stage", f"edge_{own}"), {"long_name": text, "units": units}
            outputs[f"edges_{own}"] = Output(dims, (n, bins + 1), np.float64, attrs)
            if reduce == "histogram":
                counted = {"long_name": f"pairs by {text}", "units": "1"}
                dims = ("stage", f"bin_{own}")
                outputs[f"counts_{own}"] = Output(dims, (n, bins), np.float64, counted)
    if reduce == "joint":
        square = ("stage", "bin_covariance", "bin_mutual_information")
        counted = {"long_name": "pairs", "units": "1"}
        outputs["counts"] = Output(square, (n, bins, bins), np.float64, counted)
    columns = None if second is None else second.members()[0]

    def question(views: tuple[View | None, ...], rows: Rows) -> _Reduction:
        empty = np.empty(0, np.int64)
        pairs = [None if v is None else _Pairs(v, measured, axis, empty) for v in views]
        return _Reduction(tuple(pairs), columns, kept, reduce, bins)

    return by_layer(
        name, selection, question, outputs, parameters, rows_of=rows_of_groups(selection)
    )
