"""Streaming statistics over a selection, as dask tasks that open the data themselves.

The unit is a *lane*: one task folds a contiguous run of one layer's blocks, reading each block
once and holding one at a time. Lanes of a layer are combined in order, so results do not depend
on threads; a graph has a few tasks a layer, however many blocks there are. A query may take
several passes, each made from the results of the one before: the edges of a histogram from the
extremes, say. `share_reads` merges the lanes of several queries that read the same blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from dask._task_spec import Task, TaskRef
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from ..stats.streaming import State, Statistic
from .joint import fits, goes_by_grams, run_joint
from .lanes import Lane, run_lane
from .selection import Selection, Source, check_free
from .shortcut import SketchedLayer, from_sketch

__all__ = [
    "Output",
    "Pass",
    "label_arrays",
    "nothing",
    "one_core_each",
    "share_reads",
    "stack_groups",
    "stream",
]

LANES_PER_LAYER = 8

Results = dict[str, Any]


@dataclass(frozen=True)
class Output:
    """One variable of a result.

    Attributes
    ----------
    dims : tuple of str
        After ``layer`` (and the group, if any).
    shape : tuple of int
    dtype : type
    attrs : dict
        long_name and units.
    blank : object, optional
        Value where a group has no tokens; default NaN, or 0 for whole numbers.
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any
    attrs: Mapping[str, Any]
    blank: Any = None


@dataclass(frozen=True)
class Pass:
    """One reading of the data.

    Attributes
    ----------
    statistic : Statistic or callable
        What is made of it; from the second pass on, a function (to be sent to workers, so no
        lambda) that makes the statistic from the results of the pass before.
    whole : bool
        Over all of the layer's neurons, whichever were asked. Of the first pass only.
    sketch : bool
        Whether the statistic can be had from sketches (it has `from_sketch`), exactly.
    """

    statistic: Statistic | Callable[[Results], Statistic]
    whole: bool = False
    sketch: bool = False


def _finish(
    statistics: Sequence[Statistic | None], *lanes: list[list[State | None]]
) -> list[Results | None]:
    """Combine a layer's lanes in order, group by group; None where a group has no token."""
    results: list[Results | None] = []
    for group, statistic in enumerate(statistics):
        present = [own for (states,) in lanes if (own := states[group]) is not None]
        if statistic is None or not present:
            results.append(None)
        else:
            results.append(statistic.finalize(reduce(statistic.combine, present)))
    return results


def _first(statistic: Statistic, groups: int) -> list[Statistic]:
    """The same statistic for every group."""
    return [statistic] * groups


def _next(
    make: Callable[[Results], Statistic], results: Sequence[Results | None]
) -> list[Statistic | None]:
    """The statistics of the next pass, one for each group."""
    return [None if r is None else make(r) for r in results]


def stream(
    selection: Selection,
    passes: Callable[[Source, np.ndarray], Sequence[Pass]],
    outputs: Callable[[Source, np.ndarray], Mapping[str, Output]],
) -> dict[str, xr.Dataset]:
    """Lay out a statistic over every stage and layer of a selection; nothing runs yet.

    Parameters
    ----------
    selection : Selection
    passes : callable
        Makes the passes over a stage from its source and neurons.
    outputs : callable
        The variables that the last statistic's `finalize` gives.

    Returns
    -------
    dict of str to Dataset
        For each stage, dims (layer, [group,] ...); the attribute ``passes`` says how often its
        data are read.
    """
    results = {}
    for source in selection.sources:
        neurons = selection.neurons[source.stage]
        declared = outputs(source, neurons)
        check_free(selection.groups, declared)
        layers = selection.layers[source.stage]
        made = passes(source, neurons)
        arrays = _layer_arrays(selection, source, neurons, layers, made, declared)
        group = selection.groups
        variables = {}
        for name, output in declared.items():
            dims = ("layer", *([group.name] if group else []), *output.dims)
            variables[name] = (dims, arrays[name], output.attrs)
        coords: dict[str, Any] = {"layer": layers}
        if group:
            coords[group.name] = group.values
        if any("neuron" in o.dims for o in declared.values()):
            coords["neuron"] = neurons
        if source.heads is not None and any("head" in o.dims for o in declared.values()):
            coords["head"] = np.unique(source.heads[neurons])
        known = source.sketched is not None and selection.strata is not None
        scans = sum(not (known and step.sketch) for step in made)
        results[source.stage] = xr.Dataset(variables, coords, {"passes": scans})
    return results


def _layer_arrays(
    selection: Selection,
    source: Source,
    neurons: np.ndarray,
    layers: Sequence[int],
    passes: Sequence[Pass],
    outputs: Mapping[str, Output],
) -> dict[str, da.Array]:
    groups = len(selection.groups.values) if selection.groups else 1
    blank = {n: nothing(o) for n, o in outputs.items()}
    shapes = {name: output.shape for name, output in outputs.items()}
    place = _place(selection, source, neurons)
    label = f"query-{tokenize(place, passes, list(layers), shapes)}"
    graph: dict[Any, Any] = {}

    def task(*key: Any, call: Callable[..., Any], of: Sequence[Any]) -> TaskRef:
        graph[key] = Task(key, call, *of)
        return TaskRef(key)

    for row, layer in enumerate(layers):
        done: TaskRef | None = None
        for number, step in enumerate(passes):
            read = np.arange(source.width) if step.whole else neurons
            place = _place(selection, source, read)
            of: list[Any] = [step.statistic, groups if done is None else done]
            call: Callable[..., Any] = _first if done is None else _next
            statistics = task(f"statistic-{label}", number, row, call=call, of=of)
            if step.sketch and source.sketched is not None and selection.strata is not None:
                index = source.layers.index(layer)
                known = [
                    SketchedLayer(source.sketched, index, strata, read, source.dtype)
                    for strata in selection.strata
                ]
                fold = task(
                    f"sketch-{label}", number, row, call=from_sketch, of=[known, statistics]
                )
                done = task(f"finish-{label}", number, row, call=_finish, of=[statistics, fold])
                continue
            folds = []
            for i, lane in _lanes(selection, source, layer, read, groups):
                # The lane's own key says what is read; queries over the same blocks share it, and
                # all layers the tokens that count.
                counted = task("counted", place, i, call=_same, of=[(lane.mask, lane.codes)])
                bare = replace(lane, mask=None, codes=None)
                own = task("lane", place, layer, i, call=_with_tokens, of=[bare, counted])
                key = (f"fold-{label}", number, row, i)
                folds.append(task(*key, call=run_lane, of=[own, statistics]))
            done = task(f"finish-{label}", number, row, call=_finish, of=[statistics, *folds])
        task(f"all-{label}", row, call=stack_groups, of=[blank, done])
    return label_arrays(graph, label, len(layers), groups if selection.groups else None, outputs)


def label_arrays(
    graph: dict[Any, Any], label: str, rows: int, groups: int | None, outputs: Mapping[str, Output]
) -> dict[str, da.Array]:
    """Arrays (row, group, ...) out of a graph whose tasks ``all-label`` give them row by row.

    Without groups (None) the tasks give one, and the arrays have no such dimension.
    """
    arrays = {}
    lead, take = ((), _take_only) if groups is None else ((groups,), _take)
    for name, output in outputs.items():
        own = f"{name}-{label}"
        takes: dict[Any, Any] = {}
        for row in range(rows):
            key = (own, row, *(0,) * (len(lead) + len(output.dims)))
            takes[key] = Task(key, take, TaskRef((f"all-{label}", row)), name)
        layered = HighLevelGraph({label: graph, own: takes}, {label: set(), own: {label}})
        chunks = ((1,) * rows, *((n,) for n in (*lead, *output.shape)))
        meta = np.empty((0,) * len(chunks), output.dtype)
        arrays[name] = da.Array(layered, own, chunks, meta=meta)
    return arrays


def _place(selection: Selection, source: Source, neurons: np.ndarray) -> str:
    """What identifies the values that are read."""
    groups = selection.groups and (selection.groups.codes, len(selection.groups.values))
    return tokenize(source.token, neurons, selection.mask, groups)


def _lanes(
    selection: Selection, source: Source, layer: int, neurons: np.ndarray, groups: int
) -> Iterator[tuple[int, Lane]]:
    """Cut a layer's blocks into numbered runs; those without a chosen token are left out."""
    cuts = np.unique(np.linspace(0, len(source.bounds) - 1, LANES_PER_LAYER + 1).astype(int))
    every = len(neurons) == source.width
    columns = slice(0, source.width) if every else neurons
    for i, (a, b) in enumerate(pairwise(cuts)):
        bounds = source.bounds[a : b + 1]
        tokens = slice(bounds[0], bounds[-1])
        mask = None if selection.mask is None else selection.mask[tokens]
        if mask is not None and not mask.any():
            continue
        codes = None if selection.groups is None else selection.groups.codes[tokens]
        index = source.layers.index(layer)
        yield i, Lane(source.array, index, bounds, columns, mask, codes, groups)


def _with_tokens(lane: Lane, counted: tuple[np.ndarray | None, np.ndarray | None]) -> Lane:
    mask, codes = counted
    return replace(lane, mask=mask, codes=codes)


def _same(value: Any) -> Any:
    return value


def stack_groups(blank: Mapping[str, np.ndarray], results: Sequence[Results | None]) -> Results:
    """{name: (group, ...)}."""
    return {
        name: np.stack([np.reshape((r or blank)[name], empty.shape) for r in results])
        for name, empty in blank.items()
    }


def _take(results: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    return results[name][np.newaxis]


def _take_only(results: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    return results[name][:1]


def nothing(output: Output) -> np.ndarray:
    """What a group without tokens gives."""
    blank = output.blank
    if blank is None:
        blank = np.nan if np.dtype(output.dtype).kind == "f" else 0
    return np.broadcast_to(np.array(blank, output.dtype), output.shape)  # takes no memory


def share_reads(graph: Mapping[Any, Any]) -> dict[Any, Any]:
    """Merge the tasks of a graph that read the same blocks, so that each is read once.

    Parameters
    ----------
    graph : mapping
        Low-level graph of one or more queries.

    Returns
    -------
    dict
        The same graph, with one `run_lane` task for each distinct lane and number of pass (a
        later pass may need what an earlier one over the same blocks gives), and one `run_joint`
        task for each place and its tokens.
    """
    merged = dict(graph)
    readers: dict[Any, list[Any]] = {}
    joint: dict[Any, list[Any]] = {}
    for key, task in graph.items():
        if isinstance(task, Task) and task.func is run_lane:
            readers.setdefault((key[1], task.args[0].key), []).append(key)
        elif isinstance(task, Task) and task.func is run_joint:
            joint.setdefault((key[1], task.args[0].key), []).append(key)
    for (number, lane), keys in readers.items():
        if len(keys) > 1:
            shared = ("shared", number, *lane)
            asked = [graph[k].args[1] for k in keys]
            merged[shared] = Task(shared, run_lane, TaskRef(lane), *asked)
            merged |= {k: Task(k, _one_of, TaskRef(shared), i) for i, k in enumerate(keys)}
    for (place, rows), keys in joint.items():
        memory = max(graph[k].args[1] for k in keys)
        questions = [graph[k].args[2] for k in keys]
        if len(keys) > 1 and fits(graph[rows].args[0], memory, *questions):
            shared = ("shared-joint", place, *rows)
            merged[shared] = Task(shared, run_joint, TaskRef(rows), memory, *questions)
            merged |= {k: Task(k, _one_of, TaskRef(shared), i) for i, k in enumerate(keys)}
    return merged


def one_core_each(graph: Mapping[Any, Any]) -> bool:
    """Whether a graph has several tasks of small matrix products, which run best side by side.

    Large ones take memory, too, and run one after another by all cores.
    """
    small = 0
    for task in graph.values():
        if isinstance(task, Task) and task.func is run_joint:
            rows, *rest = task.args
            small += goes_by_grams(graph[rows.key].args[0], *rest)
        elif isinstance(task, Task):
            small += getattr(task.func, "small_products", False)
        if small > 1:
            return True
    return False


def _one_of(answers: list[Any], index: int) -> list[Any]:
    return [answers[index]]
