"""A look at a question before it is answered: how large the answer, how long it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from dask._task_spec import GraphNode, convert_legacy_graph
from dask.base import is_dask_collection

from ..queries import QUERIES
from ..queries.result import Result
from ..queries.selection import Selection, Source, select
from ..queries.shortcut import from_sketch
from ..queries.units import memory_nbytes
from ..schema import pick
from ..store import Store
from .answers import check_nbytes, check_size, datasets
from .failures import ServiceError

__all__ = ["Estimate", "Look", "evaluate", "look"]

MAX_MEMORY = 2**31
"""What a question may ask for with its parameter ``memory``."""

_COMMON = ("stages", "layers", "tokens", "neurons", "by")
_READ_RATE = 4e8
_FLOPS = 2e10
_PAIR_COST = {"mutual_information": 4e-9}
"""Seconds for each pair of tokens and neuron, where it is those that take long."""


@dataclass(frozen=True)
class Estimate:
    """What an answer takes.

    Attributes
    ----------
    nbytes : int
        Of activations that are read.
    seconds : float
    source : {"sketch", "scan"}
    """

    nbytes: int
    seconds: float
    source: str


@dataclass(frozen=True)
class Look:
    """A question, laid out.

    Attributes
    ----------
    result : Dataset or DataTree
        Lazy.
    estimate : Estimate
    quick : bool
        Whether sketches answer, within milliseconds.
    """

    result: Result
    estimate: Estimate
    quick: bool


def look(store: Store, query: str, arguments: dict[str, Any], wanted: str) -> Look:
    """Lay a question out.

    Parameters
    ----------
    store : Store
    query : str
    arguments : dict
    wanted : str
        Format of the answer.

    Raises
    ------
    UsageError
        The question is wrong.
    ServiceError
        The answer would be too large.
    """
    if "memory" in arguments and memory_nbytes(arguments["memory"]) > MAX_MEMORY:
        raise ServiceError(
            413,
            "too_large",
            f"memory is at most {MAX_MEMORY / 2**30:g}GiB here",
            arguments["memory"],
        )
    _check_counts(store, arguments)
    sinks = arguments.get("exclude_sinks")
    # Without sketches, building the question reads a layer: not before it is asked in earnest.
    reads = sinks is not None and sinks in store and store.sketched(sinks) is None
    asked = {k: v for k, v in arguments.items() if not (reads and k == "exclude_sinks")}
    result = QUERIES[query].function(store, **asked)
    check_size(result, wanted)
    passes = int(result.attrs["passes"])
    if passes == 0 and not reads and _is_sketched(result):
        return Look(result, Estimate(0, 0.02, "sketch"), True)
    chosen = select(store, *(arguments.get(name) for name in _COMMON))
    nbytes, flops, cells = _work(chosen, arguments, max(passes, int(reads)))
    seconds = nbytes / _READ_RATE + flops / _FLOPS + cells * _PAIR_COST.get(query, 0)
    source = "scan" if passes or reads else "sketch"
    return Look(result, Estimate(nbytes, 0.05 + seconds, source), False)


def _check_counts(store: Store, arguments: dict[str, Any]) -> None:
    """Refuse what would be large as soon as it is laid out: bins, and those of every neuron."""
    counts = {name: arguments.get(name) for name in ("bins", "reduce_bins", "k")}
    for name, value in counts.items():
        if not isinstance(value, (int, float, list)):
            continue
        count = len(value) if isinstance(value, list) else value
        if name == "reduce_bins" and arguments.get("reduce") == "joint":
            count *= count
        if arguments.get("per") in ("neuron", "head"):
            widths = [row["width"] for row in store.info()["stages"].values()]
            count *= len(pick(arguments.get("neurons"), range(max(widths)), "neuron"))
        check_nbytes(8 * count)


def _work(chosen: Selection, arguments: dict[str, Any], passes: int) -> tuple[int, float, float]:
    """Bytes to read; flops of products; pairs of tokens times neurons."""
    sources = list(chosen.sources)
    every = chosen.all_sources()
    tokens = sum(len(rows) for rows in chosen.members())
    drawn = arguments.get("n")
    used = min(tokens, drawn) if isinstance(drawn, int) and drawn > 0 else tokens
    null = arguments.get("null", 0)
    permuted = 0 if isinstance(null, bool) else null
    nbytes, flops, cells = 0.0, 0.0, 0.0
    second = arguments.get("stage_b")
    for source in [*sources, *([every[second]] if second in every else [])]:
        layers = len(chosen.layers.get(source.stage, source.layers))
        width = len(chosen.neurons.get(source.stage, range(source.width)))
        nbytes += layers * _rows_read(source, chosen.mask, used) * _row_nbytes(source, chosen)
        flops += layers * 2.0 * used * min(used, width) * width
        flops += layers * permuted * 2.0 * used * used
        cells += layers * (1 + permuted) * used * used / 2 * width
    twice = 2 if arguments.get("data_b") is not None else 1
    return int(nbytes * passes * twice), flops * twice * (passes > 0), cells


def _rows_read(source: Source, mask: np.ndarray | None, used: int) -> int:
    """Tokens in the pieces that are read."""
    lengths = np.diff(source.bounds)
    if mask is not None:
        lengths = lengths * (np.add.reduceat(mask, source.bounds[:-1]) > 0)
    return int(min(lengths.sum(), used * lengths.max(initial=0)))


def _row_nbytes(source: Source, chosen: Selection) -> int:
    neurons = chosen.neurons.get(source.stage, np.arange(source.width))
    hull = int(neurons.max() - neurons.min()) + 1 if len(neurons) else 0
    return hull * (2 if source.dtype in ("bfloat16", "float16") else source.array.dtype.itemsize)


def _graph(result: Result) -> dict[Any, Any]:
    graph: dict[Any, Any] = {}
    for layer in _layers(result):
        graph.update(layer)  # one by one: a layered graph as a whole looks up every key in turn
    if all(isinstance(task, GraphNode) for task in graph.values()):
        return graph
    return convert_legacy_graph(graph)


def _layers(result: Result) -> Iterator[Mapping[Any, Any]]:
    for dataset in datasets(result):
        if is_dask_collection(dataset):
            yield from dataset.__dask_graph__().layers.values()


def _is_sketched(result: Result) -> bool:
    """Whether anything comes from sketches: what needs no pass may be long for other reasons."""
    return any(
        getattr(task, "func", None) is from_sketch
        for layer in _layers(result)
        for task in layer.values()
    )


def evaluate(result: Result) -> Result:
    """Compute a quick answer in this thread: a scheduler's own time would be most of it."""
    graph = _graph(result)
    done: dict[Any, Any] = {}

    def value(key: Any) -> Any:
        if key not in done:
            node = graph[key]
            done[key] = node({other: value(other) for other in node.dependencies})
        return done[key]

    def values(keys: Any) -> Any:
        return [values(k) for k in keys] if isinstance(keys, list) else value(keys)

    def computed(dataset: xr.Dataset) -> xr.Dataset:
        if not is_dask_collection(dataset):
            return dataset
        finish, rest = dataset.__dask_postcompute__()
        return finish(values(list(dataset.__dask_keys__())), *rest)

    if isinstance(result, xr.DataTree):
        return xr.DataTree.from_dict({n.path: computed(n.to_dataset()) for n in result.subtree})
    return computed(result)
