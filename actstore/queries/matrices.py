"""Similarity of every token with every other: lazily by blocks, or reduced on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, Protocol

import dask.array as da
import numpy as np
import xarray as xr
from dask._task_spec import Task, TaskRef
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from ..aliases import only_stage
from ..errors import UnknownNameError, UsageError
from ..stats.products import in_space
from .cosines import bin_edges
from .dimensions import by_layer
from .engine import Output
from .joint import Answers, Rows, View
from .pairing import select_second
from .registry import query
from .result import Result, provenance
from .rows import COMPAT, Compat, check
from .selection import Data, Names, Numbers, Selection, Source, Tokens, select
from .units import rows_of_groups, view_of

__all__ = ["cosine_matrix", "lay_blocks", "matrices_of"]

Metric = Literal["cosine", "correlation", "euclidean"]
METRICS = ("cosine", "correlation", "euclidean")
Reduce = Literal["mean", "histogram"]
REDUCE = ("mean", "histogram")

MAX_TOKENS = 50_000
BLOCK = 1024


@dataclass(frozen=True)
class _Compared:
    """Two views whose tokens are compared, each with each.

    Attributes
    ----------
    a, b : View
    metric : str
    zeros : float
        Similarity of a row without a direction.
    """

    a: View
    b: View
    metric: str
    zeros: float

    @property
    def own(self) -> bool:
        """Whether a view is compared with itself."""
        return self.a.key == self.b.key

    def block(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Similarities of some tokens with others."""
        x, y = self.a.read(first), self.b.read(second)
        if self.metric != "euclidean":
            (u, there), (v, too) = in_space(x, self.metric), in_space(y, self.metric)
            u[~there] = v[~too] = self.zeros
            return np.clip(u @ v.T, -1, 1)
        shift = x.mean(0, dtype=np.float64)
        u, v = x - shift, y - shift
        squares = (u * u).sum(1)[:, None] + (v * v).sum(1) - 2 * (u @ v.T)
        if self.own:
            squares[first[:, None] == second] = 0
        return np.sqrt(np.maximum(squares, 0))

    def blocks(self, first: np.ndarray, second: np.ndarray) -> dict[str, np.ndarray]:
        return {"similarity": self.block(first, second)}

    def pairs(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """Similarities block by block: of a view with itself, of pairs of different tokens."""
        for i in range(0, len(tokens), BLOCK):
            for j in range(i if self.own else 0, len(tokens), BLOCK):
                block = self.block(tokens[i : i + BLOCK], tokens[j : j + BLOCK])
                if self.own and i == j:
                    yield block[np.triu_indices(len(block), 1)]
                else:
                    yield block.ravel()


@query("--stages mlp_in --stage-b mlp_out --layers 3 --tokens 'sequence == 0'")
def cosine_matrix(
    data: Data,
    *,
    stages: Names = None,
    layers: Numbers = None,
    tokens: Tokens = None,
    neurons: Numbers = None,
    by: str | None = None,
    exclude_sinks: str | None = None,
    stage_b: str | None = None,
    data_b: Data | None = None,
    metric: Metric = "cosine",
    reduce: Reduce | None = None,
    reduce_bins: int | Sequence[float] = 200,
    compat: Compat = "textbook",
) -> Result:
    """Similarity of every token with every other, within a stage or between two.

    Parameters
    ----------
    stage_b : str, optional
        Compare each stage's tokens with those of this one, at the same layer.
    data_b : Store, path or DataArray, optional
        Take the second tokens from another store over the same tokens.
    metric : {"cosine", "correlation", "euclidean"}
        The last is a distance.
    reduce : {"mean", "histogram"}, optional
        Give the mean or a histogram of the entries instead of the matrix, which is then never
        held: of a stage with itself, of those above the diagonal.
    reduce_bins : int or sequence of float
        Number of bins from -1 to 1, or their edges, which distances need.
    compat : {"textbook", "notebook"}
        A token whose values are all 0 has no cosine: NaN. "notebook" gives 0, as scikit-learn.

    Returns
    -------
    Dataset or DataTree
        similarity (stage, layer, token, token_b), computed by blocks as they are needed; with
        `by` a DataTree with a group for each value. Reduced: mean, or counts, density, below,
        above (stage, layer[, group][, bin]) and edges.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> acts = xr.DataArray(np.float32([[1, 0], [0, 2], [3, 4]]), dims=("token", "neuron"))
    >>> cosine_matrix(acts).compute()["similarity"].values.round(1).tolist()
    [[[1.0, 0.0, 0.6], [0.0, 1.0, 0.8], [0.6, 0.8, 1.0]]]
    """
    selection = select(data, stages, layers, tokens, neurons, by, exclude_sinks)
    check("metric", metric, METRICS)
    check("reduce", reduce, (*REDUCE, None))
    check("compat", compat, COMPAT)
    second = None if data_b is None else select_second(data_b, selection, None, neurons)
    if stage_b is not None:
        known = (second or selection).all_sources()
        stage_b = only_stage(stage_b, known, kind="value of stage_b")
    compared = _comparisons(selection, second, stage_b, metric, compat)
    parameters = {
        "stage_b": stage_b,
        "metric": metric,
        "reduce": reduce,
        "reduce_bins": reduce_bins,
        "compat": compat,
    }
    made: Result
    if reduce is not None:
        made = _reduced(selection, compared, reduce, reduce_bins, metric, parameters)
    else:
        made = _whole(selection, compared, parameters)
    attrs: dict[str, Any] = {"metric": metric}
    if stage_b is not None:
        attrs["stage_b"] = stage_b
    if second is not None:
        attrs["store_b"] = second.attrs.get("store", "")
    made.attrs.update(attrs)
    return made


Comparisons = dict[tuple[str, int], _Compared]
"""By stage and layer."""


def _comparisons(
    selection: Selection, second: Selection | None, stage_b: str | None, metric: str, compat: str
) -> Comparisons:
    zeros = 0.0 if compat == "notebook" else np.nan
    found: Comparisons = {}
    for source in selection.sources:
        other = _other(selection, second, source, stage_b)
        neurons = selection.neurons[source.stage]
        chosen = neurons if other.width == source.width else np.arange(other.width)
        if len(chosen) != len(neurons):
            raise UsageError(
                f"stages {source.stage} and {other.stage} have {len(neurons)} and {len(chosen)} "
                f"neurons: {metric} needs as many of both; rsa and cka compare any two"
            )
        for layer in selection.layers[source.stage]:
            if layer in other.layers:
                a, b = view_of(source, layer, neurons), view_of(other, layer, chosen)
                found[source.stage, layer] = _Compared(a, b, metric, zeros)
    if not found:
        raise UsageError(f"no layer asked is there at {stage_b}, too")
    return found


def _other(
    selection: Selection, second: Selection | None, source: Source, stage_b: str | None
) -> Source:
    name = stage_b or source.stage
    if second is None and stage_b is None:
        return source
    known = (second or selection).all_sources()
    if name not in known:
        raise UnknownNameError("value of stage_b", name, known)
    return known[name]


def _whole(
    selection: Selection, compared: Comparisons, parameters: dict[str, Any]
) -> xr.Dataset | xr.DataTree:
    attrs = provenance("cosine_matrix", selection, parameters, 1)
    return matrices_of(selection, lambda tokens: _matrix(selection, compared, tokens), attrs)


def matrices_of(
    selection: Selection, make: Callable[[np.ndarray], xr.Dataset], attrs: dict[str, Any]
) -> xr.Dataset | xr.DataTree:
    """A dataset of the tokens asked, or with groups a tree of one each, since sizes differ."""
    if selection.groups is None:
        return make(selection.members()[0]).assign_attrs(attrs)
    label = selection.groups.name
    own = {}
    for value, tokens in zip(selection.groups.values, selection.members(), strict=True):
        if len(tokens):
            name = str(value).replace("/", "_") or "_"
            name = "_" * len(name) if name in (".", "..") else name  # steps of a path
            while name in own:
                name += "_"
            own[name] = make(tokens).assign_attrs(attrs).assign_coords({label: value})
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **own})


def _matrix(selection: Selection, compared: Comparisons, tokens: np.ndarray) -> xr.Dataset:
    n = len(tokens)
    if n > MAX_TOKENS:
        raise UsageError(
            f"the similarities of {n:,} tokens would take {8 * n * n / 1e9:,.0f} GB a layer: ask "
            f"for at most {MAX_TOKENS:,} tokens, or for reduce='histogram', or sample pairs with "
            "cosine_pairs"
        )
    layers = sorted({layer for _, layer in compared})
    stages = [s.stage for s in selection.sources]
    own = all(c.own for c in compared.values())
    values = lay_blocks(compared, stages, layers, tokens, tokens, ("similarity",), BLOCK, own)
    described = {"long_name": "similarity of two tokens", "units": "1"}
    made = xr.Dataset(
        {"similarity": (("stage", "layer", "token", "token_b"), values["similarity"], described)},
        {"stage": np.array(stages, object), "layer": layers, "token": tokens, "token_b": tokens},
    )
    return made.isel(stage=0) if len(stages) == 1 else made


class Blockwise(Protocol):
    """Gives the named values of some tokens with others, (token, token_b) each."""

    def blocks(self, first: np.ndarray, second: np.ndarray) -> dict[str, np.ndarray]: ...


class Prepared(Blockwise, Protocol):
    """Gives them in two steps."""

    def vectors(self, tokens: np.ndarray) -> Any: ...
    def compare(self, x: Any, y: Any, own: bool) -> dict[str, np.ndarray]: ...


def lay_blocks(
    asked: Mapping[tuple[str, int], Blockwise],
    stages: Sequence[str],
    layers: Sequence[int],
    tokens: np.ndarray,
    tokens_b: np.ndarray,
    names: Sequence[str],
    size: int,
    symmetric: bool,
    prepared: bool = False,
) -> dict[str, da.Array]:
    """Lazy matrices (stage, layer, token, token_b) by blocks; nothing is computed yet.

    Parameters
    ----------
    asked : mapping of (stage, layer) to Blockwise
        NaN where there is none.
    stages, layers : sequence
    tokens, tokens_b : ndarray of int
        Numbers of the tokens of rows and columns.
    names : sequence of str
        Of the matrices.
    size : int
        Tokens of a block.
    symmetric : bool
        Blocks below the diagonal are those above, transposed.
    prepared : bool
        `asked` are `Prepared`, and all vectors of a symmetric matrix can be held: they are prepared
        once for all blocks.
    """
    rows, columns = _bounds(len(tokens), size), _bounds(len(tokens_b), size)
    label = f"blocks-{tokenize(asked, tokens, tokens_b, names)}"
    graph: dict[Any, Any] = {}
    takes: dict[str, dict[Any, Any]] = {name: {} for name in names}
    places = product(enumerate(stages), enumerate(layers), enumerate(rows), enumerate(columns))
    for (s, stage), (k, layer), (i, (a, b)), (j, (c, d)) in places:
        own, turned = asked.get((stage, layer)), symmetric and i > j
        key = (label, s, k, *((j, i) if turned else (i, j)))
        if own is not None and prepared and symmetric:
            x, y = ((f"vectors-{label}", s, k, n) for n in (i, j))
            graph[x] = Task(x, _vectors, own, tokens[a:b])
            if not turned:
                graph[key] = Task(key, _compare, own, TaskRef(x), TaskRef(y), i == j)
        elif not turned:
            graph[key] = Task(key, _blocks, own, tokens[a:b], tokens_b[c:d], tuple(names))
        for name in names:
            mine = (f"{name}-{label}", s, k, i, j)
            takes[name][mine] = Task(mine, _take, TaskRef(key), name, turned)
    sizes = (tuple(b - a for a, b in bounds) for bounds in (rows, columns))
    chunks = ((1,) * len(stages), (1,) * len(layers), *sizes)
    arrays = {}
    for name in names:
        own_label = f"{name}-{label}"
        layered = HighLevelGraph(
            {label: graph, own_label: takes[name]}, {label: set(), own_label: {label}}
        )
        arrays[name] = da.Array(layered, own_label, chunks, meta=np.empty((0, 0, 0, 0)))
    return arrays


def _bounds(n: int, size: int) -> list[tuple[int, int]]:
    return [(a, min(a + size, n)) for a in range(0, n, size)]


def _blocks(
    asked: Blockwise | None, first: np.ndarray, second: np.ndarray, names: tuple[str, ...]
) -> dict[str, np.ndarray]:
    if asked is None:
        return {name: np.full((len(first), len(second)), np.nan) for name in names}
    return asked.blocks(first, second)


def _vectors(asked: Prepared, tokens: np.ndarray) -> Any:
    return asked.vectors(tokens)


def _compare(asked: Prepared, x: Any, y: Any, own: bool) -> dict[str, np.ndarray]:
    return asked.compare(x, y, own)


_blocks.small_products = _compare.small_products = True  # type: ignore[attr-defined]


def _take(found: dict[str, np.ndarray], name: str, turned: bool) -> np.ndarray:
    return (found[name].T if turned else found[name])[np.newaxis, np.newaxis]


# -- reduced -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reduction:
    """Asks for the mean or a histogram of each stage's similarities."""

    compared: tuple[_Compared | None, ...]
    edges: np.ndarray | None

    def of_rows(self, rows: Rows) -> Answers:
        found = [self._of(c, rows.tokens) for c in self.compared]
        return {name: np.stack([f[name] for f in found]) for name in found[0]}

    def _of(self, compared: _Compared | None, tokens: np.ndarray) -> dict[str, Any]:
        total, count = 0.0, 0
        edges = np.array([-1.0, 1.0]) if self.edges is None else self.edges
        counts, below, above = np.zeros(len(edges) - 1, np.int64), 0, 0
        for values in compared.pairs(tokens) if compared else ():
            values = values[~np.isnan(values)]
            total += float(values.sum())
            count += len(values)
            if self.edges is not None:
                counts += np.histogram(values, edges)[0]
                below += int(np.count_nonzero(values < edges[0]))
                above += int(np.count_nonzero(values > edges[-1]))
        with np.errstate(invalid="ignore", divide="ignore"):
            density = counts / (counts.sum() * np.diff(edges))
        mean = total / count if count else np.nan
        found = {"counts": counts, "density": density, "below": below, "above": above}
        return {"mean": np.array(mean), **found} if self.edges is not None else {"mean": mean}


def _reduced(
    selection: Selection,
    compared: Comparisons,
    reduce: str,
    bins: int | Sequence[float],
    metric: str,
    parameters: dict[str, Any],
) -> xr.Dataset:
    edges = _edges(bins, metric) if reduce == "histogram" else None
    n = len(selection.sources)
    mean = {"long_name": "mean similarity", "units": "1"}
    outputs = {"mean": Output(("stage",), (n,), np.float64, mean)}
    if edges is not None:
        for name, kind, text in (
            ("counts", np.int64, "pairs in the bin"),
            ("density", np.float64, "probability density"),
            ("below", np.int64, "pairs below the range"),
            ("above", np.int64, "pairs above the range"),
        ):
            wide = name in ("counts", "density")
            dims = ("stage", "bin") if wide else ("stage",)
            shape = (n, len(edges) - 1) if wide else (n,)
            outputs[name] = Output(dims, shape, kind, {"long_name": text, "units": "1"})

    def question(views: tuple[View | None, ...], rows: Rows) -> _Reduction:
        own = [None if v is None else compared.get((v.stage, v.layer)) for v in views]
        return _Reduction(tuple(own), edges)

    rows_of = rows_of_groups(selection)
    made = by_layer("cosine_matrix", selection, question, outputs, parameters, rows_of=rows_of)
    if edges is None:
        return made
    centres = ("bin", (edges[1:] + edges[:-1]) / 2, {"long_name": "bin centre"})
    return made.assign(edges=("edge", edges, {"long_name": "bin edge"})).assign_coords(bin=centres)


def _edges(bins: int | Sequence[float], metric: str) -> np.ndarray:
    if isinstance(bins, int) and metric == "euclidean":
        raise UsageError("reduce_bins: give edges for distances, such as 0:50:101")
    return bin_edges(bins, (-1, 1))
