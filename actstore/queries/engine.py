"""Streaming statistics over a selection, as dask tasks that open the data themselves.

The unit is a *lane*: one task folds a contiguous run of one layer's blocks, reading each block
once and holding one at a time. Lanes of a layer are combined in order, so results do not depend
on threads; a graph has a few tasks a layer, however many blocks there are. `share_reads` merges
the lanes of several queries that read the same blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from .selection import Selection, Source

__all__ = ["Output", "share_reads", "stream"]

LANES_PER_LAYER = 8


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
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any
    attrs: dict[str, str]


@dataclass(frozen=True)
class Lane:
    """A run of one layer's blocks, and which of their values count.

    Attributes
    ----------
    array : sliceable
        (layer, token, neuron).
    layer_index : int
    bounds : ndarray of int
        Token numbers at which the blocks begin and end.
    neurons : slice or ndarray of int
    mask : ndarray of bool or None
        Over the lane's tokens.
    codes : ndarray of int or None
        Group of each of the lane's tokens.
    n_groups : int
    """

    array: Any
    layer_index: int
    bounds: np.ndarray
    neurons: slice | np.ndarray
    mask: np.ndarray | None
    codes: np.ndarray | None
    n_groups: int

    def blocks(self):  # type: ignore[no-untyped-def]
        """Yield (group, values) of each block, (token, neuron), none of them empty."""
        start = self.bounds[0]
        columns = self.neurons if isinstance(self.neurons, slice) else _hull(self.neurons)
        for a, b in pairwise(self.bounds):
            here = slice(a - start, b - start)
            rows = np.arange(b - a) if self.mask is None else np.flatnonzero(self.mask[here])
            if not len(rows):
                continue
            first, last = a + rows[0], a + rows[-1] + 1
            values = self.array[self.layer_index, first:last, columns]
            if not isinstance(values, np.ndarray):
                values = values.compute(scheduler="synchronous")
            if not isinstance(self.neurons, slice):
                values = values[:, self.neurons - columns.start]
            if len(rows) < len(values):
                values = values[rows - rows[0]]
            if self.codes is None:
                yield 0, values
                continue
            codes = self.codes[here][rows]
            for group in np.unique(codes):
                yield int(group), values[codes == group]


def run_lane(lane: Lane, statistics: Sequence[Statistic]) -> list[list[State | None]]:
    """States of several statistics over a lane: [statistic][group], None where no token is."""
    states: list[list[State | None]] = [[None] * lane.n_groups for _ in statistics]
    for group, values in lane.blocks():
        for i, statistic in enumerate(statistics):
            new = statistic.chunk(values)
            old = states[i][group]
            states[i][group] = new if old is None else statistic.combine(old, new)
    return states


def _merge(
    statistic: Statistic, lanes: list[list[list[State | None]]], empty: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Combine a layer's lanes in order and finish: {name: (group, ...)}."""
    groups = []
    for states in zip(*(lane[0] for lane in lanes), strict=True):
        present = [s for s in states if s is not None]
        groups.append(statistic.finalize(reduce(statistic.combine, present)) if present else empty)
    return {
        name: np.stack([np.reshape(g[name], blank.shape) for g in groups])
        for name, blank in empty.items()
    }


def stream(
    selection: Selection,
    statistic: Callable[[Source, np.ndarray], Statistic],
    outputs: Callable[[Source, np.ndarray], Mapping[str, Output]],
) -> dict[str, xr.Dataset]:
    """Lay out a statistic over every stage and layer of a selection; nothing runs yet.

    Parameters
    ----------
    selection : Selection
    statistic : callable
        Makes the statistic of a stage from its source and neurons.
    outputs : callable
        The variables that the statistic's `finalize` gives.

    Returns
    -------
    dict of str to Dataset
        For each stage, dims (layer, [group,] ...).
    """
    results = {}
    for source in selection.sources:
        neurons = selection.neurons[source.stage]
        made = statistic(source, neurons)
        declared = outputs(source, neurons)
        layers = selection.layers[source.stage]
        arrays = _layer_arrays(selection, source, neurons, layers, made, declared)
        group = selection.groups
        variables = {}
        for name, output in declared.items():
            dims = ("layer", *([group.name] if group else []), *output.dims)
            data = arrays[name] if group else arrays[name][:, 0]
            variables[name] = (dims, data, output.attrs)
        coords: dict[str, Any] = {"layer": layers}
        if group:
            coords[group.name] = group.values
        if any("neuron" in o.dims for o in declared.values()):
            coords["neuron"] = neurons
        results[source.stage] = xr.Dataset(variables, coords)
    return results


def _layer_arrays(
    selection: Selection,
    source: Source,
    neurons: np.ndarray,
    layers: Sequence[int],
    statistic: Statistic,
    outputs: Mapping[str, Output],
) -> dict[str, da.Array]:
    groups = len(selection.groups.values) if selection.groups else 1
    empty = {n: _nothing(o) for n, o in outputs.items()}
    place = tokenize(
        source.token, neurons, selection.mask, selection.groups and selection.groups.codes
    )
    label = f"{type(statistic).__name__.lower()}-{tokenize(place, statistic)}"
    graph: dict[Any, Any] = {}
    for row, layer in enumerate(layers):
        lanes = _lanes(selection, source, source.layers.index(layer), neurons, groups)
        for i, lane in enumerate(lanes):
            # The lane's own key says what is read; queries over the same blocks share it.
            spec = ("lane", place, layer, i)
            graph[spec] = Task(spec, _constant, lane)
            key = (f"fold-{label}", row, i)
            graph[key] = Task(key, run_lane, TaskRef(spec), (statistic,))
        whole = (f"merge-{label}", row)
        graph[whole] = Task(
            whole,
            _merge_all,
            statistic,
            empty,
            *(TaskRef((f"fold-{label}", row, i)) for i in range(len(lanes))),
        )
    arrays = {}
    for name, output in outputs.items():
        rest = (0,) * (1 + len(output.dims))
        own = f"{name}-{label}"
        takes: dict[Any, Task] = {
            (own, row, *rest): Task(
                (own, row, *rest), _take, TaskRef((f"merge-{label}", row)), name
            )
            for row in range(len(layers))
        }
        layered = HighLevelGraph({label: graph, own: takes}, {label: set(), own: {label}})
        chunks = ((1,) * len(layers), (groups,), *((n,) for n in output.shape))
        meta = np.empty((0,) * len(chunks), output.dtype)
        arrays[name] = da.Array(layered, own, chunks, meta=meta)
    return arrays


def _lanes(
    selection: Selection, source: Source, layer_index: int, neurons: np.ndarray, groups: int
) -> list[Lane]:
    """Cut a layer's blocks into runs; blocks without a chosen token are left to be skipped."""
    n_blocks = len(source.bounds) - 1
    cuts = np.unique(np.linspace(0, n_blocks, LANES_PER_LAYER + 1).astype(int))
    every = len(neurons) == source.width
    columns = slice(0, source.width) if every else neurons
    lanes = []
    for a, b in pairwise(cuts):
        bounds = source.bounds[a : b + 1]
        tokens = slice(bounds[0], bounds[-1])
        mask = None if selection.mask is None else selection.mask[tokens]
        if mask is not None and not mask.any():
            continue
        codes = None if selection.groups is None else selection.groups.codes[tokens]
        lanes.append(Lane(source.array, layer_index, bounds, columns, mask, codes, groups))
    return lanes


def _constant(value: Any) -> Any:
    return value


def _merge_all(
    statistic: Statistic, empty: Mapping[str, np.ndarray], *lanes: Any
) -> dict[str, np.ndarray]:
    return _merge(statistic, list(lanes), empty)


def _take(results: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    return results[name][np.newaxis]


def _nothing(output: Output) -> np.ndarray:
    """What a group without tokens gives: zero counts, NaN for the rest."""
    kind = np.dtype(output.dtype)
    return np.full(output.shape, np.nan if kind.kind == "f" else 0, kind)


def _hull(neurons: np.ndarray) -> slice:
    return slice(int(neurons.min()), int(neurons.max()) + 1)


def share_reads(graph: Mapping[Any, Any]) -> dict[Any, Any]:
    """Merge the lane tasks of a graph that read the same blocks, so that each is read once.

    Parameters
    ----------
    graph : mapping
        Low-level graph of one or more queries.

    Returns
    -------
    dict
        The same graph, with one `run_lane` task for each distinct lane.
    """
    merged = dict(graph)
    readers: dict[Any, list[Any]] = {}
    for key, task in graph.items():
        if isinstance(task, Task) and task.func is run_lane:
            readers.setdefault(task.args[0].key, []).append(key)
    for lane, keys in readers.items():
        if len(keys) == 1:
            continue
        statistics = tuple(graph[k].args[1][0] for k in keys)
        shared = ("shared", *lane)
        merged[shared] = Task(shared, run_lane, TaskRef(lane), statistics)
        for i, key in enumerate(keys):
            merged[key] = Task(key, _one_of, TaskRef(shared), i)
    return merged


def _one_of(states: list[Any], index: int) -> list[Any]:
    return [states[index]]
