"""From streamed stages to one labelled result, with its provenance; and computing several."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import dask
import dask.array as da
import numpy as np
import xarray as xr
from dask._task_spec import Task, TaskRef
from dask.base import get_scheduler, is_dask_collection, named_schedulers, tokenize
from dask.callbacks import Callback
from dask.highlevelgraph import HighLevelGraph
from threadpoolctl import threadpool_limits

from ..errors import UnknownNameError, UsageError
from .engine import one_core_each, share_reads
from .selection import Selection

__all__ = ["Result", "assemble", "compute", "provenance"]

Result = xr.Dataset | xr.DataTree

SCHEDULERS = ("threads", "sync", "processes", "tcp://HOST:PORT")
_CONNECT_SECONDS = 10


def assemble(
    name: str,
    selection: Selection,
    stages: Mapping[str, xr.Dataset],
    parameters: Mapping[str, Any],
) -> Result:
    """Join the stages of a result.

    One stage gives its dataset; several a ``stage`` dim, layers that a stage lacks being NaN; and
    where stages differ in width and results are per neuron, a DataTree with a group for each.
    """
    passes = max(d.attrs["passes"] for d in stages.values())
    attrs = provenance(name, selection, parameters, passes)
    if len(stages) == 1:
        ((stage, only),) = stages.items()
        return only.assign_coords(stage=stage).assign_attrs(attrs)
    if len({d.sizes.get("neuron", 0) for d in stages.values()}) > 1:
        tree = {s: d.assign_coords(stage=s).assign_attrs(attrs) for s, d in stages.items()}
        return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **tree})
    first = next(iter(stages.values()))
    stacked = _stacked(stages)
    if stacked is not None:
        return stacked.assign_attrs(attrs)
    joined = xr.concat(
        list(stages.values()),
        dim=xr.Variable("stage", np.array(list(stages), dtype=object)),
        join="outer",
        coords=_varying(list(stages.values())),
        compat="override",
        combine_attrs="override",
        # A layer that a stage lacks must not turn truth values into objects.
        fill_value={n: False if v.dtype == bool else np.nan for n, v in first.variables.items()},
    )
    for own, variable in first.variables.items():
        joined[own].attrs.update(variable.attrs)
    return joined.assign_attrs(attrs)


def provenance(
    name: str, selection: Selection, parameters: Mapping[str, Any], passes: int
) -> dict[str, Any]:
    """Attributes of a result: what was asked of what, and how often the data are read for it."""
    return {
        "query": name,
        "parameters": json.dumps(_plain(parameters), sort_keys=True),
        "compat": parameters.get("compat", "textbook"),
        **selection.attrs,
        "source": "scan" if passes else "sketch",
        "passes": passes,
    }


def _stacked(stages: Mapping[str, xr.Dataset]) -> xr.Dataset | None:
    """Datasets that have a row for each layer, under one another; None where they have not.

    What `xarray.concat` gives, without the tens of milliseconds that it takes to lay out.
    """
    parts = list(stages.values())
    first = parts[0]
    # Lazy coordinates are not compared, so _by_rows comes first.
    if not all(_by_rows(d) and _alike(d, first) for d in parts):
        return None
    layers = sorted({int(n) for d in parts for n in d["layer"].values})
    rows = [d.get_index("layer").get_indexer(layers).tolist() for d in parts]
    variables = {
        name: (("stage", *v.dims), _stacked_array([d[name].data for d in parts], rows), v.attrs)
        for name, v in first.data_vars.items()
    }
    coords: dict[Any, Any] = {n: (c.dims, c.values, c.attrs) for n, c in first.coords.items()}
    coords["layer"] = ("layer", layers, first["layer"].attrs)
    coords["stage"] = np.array(list(stages), dtype=object)
    return xr.Dataset(variables, coords, first.attrs)


def _alike(a: xr.Dataset, b: xr.Dataset) -> bool:
    """Whether datasets differ in nothing but layers and values."""
    return (
        a.data_vars.keys() == b.data_vars.keys()
        and a.coords.keys() == b.coords.keys()
        and all(n == b.sizes.get(d) for d, n in a.sizes.items() if d != "layer")
        and all(np.array_equal(a[c].values, b[c].values) for c in a.coords if c != "layer")
    )


def _by_rows(dataset: xr.Dataset) -> bool:
    """Whether all that is lazy has one chunk for each layer."""
    if "layer" not in dataset.indexes:
        return False
    return not any(is_dask_collection(c.data) for c in dataset.coords.values()) and all(
        v.dims[:1] == ("layer",)
        and isinstance(v.data, da.Array)
        and set(v.data.chunks[0]) == {1}
        and v.data.npartitions == v.shape[0]
        for v in dataset.data_vars.values()
    )


def _stacked_array(arrays: Sequence[da.Array], rows: Sequence[Sequence[int]]) -> da.Array:
    """Arrays with a chunk a row, under one another; a row of number -1 is not there."""
    missing = any(row < 0 for own in rows for row in own)
    dtype = np.result_type(*(a.dtype for a in arrays))
    if missing and dtype.kind in "iu":
        dtype = np.dtype(np.float64)
    rest = arrays[0].shape[1:]
    name = f"stacked-{tokenize([a.name for a in arrays], rows)}"
    tail = (0,) * len(rest)
    graph: dict[Any, Any] = {}
    for i, (array, own) in enumerate(zip(arrays, rows, strict=True)):
        for j, row in enumerate(own):
            key = (name, i, j, *tail)
            if row < 0:
                graph[key] = Task(key, _absent, rest, dtype)
            else:
                graph[key] = Task(key, _placed, TaskRef((array.name, row, *tail)), dtype)
    below: list[Any] = list(arrays)
    layered = HighLevelGraph.from_collections(name, graph, dependencies=below)
    chunks = ((1,) * len(arrays), (1,) * len(rows[0]), *((n,) for n in rest))
    return da.Array(layered, name, chunks, meta=np.empty((0,) * len(chunks), dtype))


def _placed(row: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    return np.asarray(row)[np.newaxis].astype(dtype, copy=False)


def _absent(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """A row that a stage lacks: not a number, but no truth value turns into one."""
    return np.full((1, 1, *shape), False if dtype.kind == "b" else np.nan, dtype)


def _varying(stages: Sequence[xr.Dataset]) -> list[str]:
    """Coordinates that are not the same for every stage: lazy ones, and those that differ."""
    first = stages[0]
    return [
        str(name)
        for name, coord in first.coords.items()
        if name not in first.indexes
        and (
            is_dask_collection(coord.data)
            or not all(np.array_equal(coord.values, s[name].values) for s in stages[1:])
        )
    ]


def compute(
    *queries: Result, scheduler: Any = None, progress: Callable[[int, int], None] | None = None
) -> Any:
    """Evaluate several queries in one pass: each shard that they share is read once.

    Parameters
    ----------
    *queries : Dataset or DataTree
        Lazy results.
    scheduler : str, callable or Client, optional
        "threads", "sync" (one after another in this thread), "processes", the address of a
        dask.distributed scheduler as "tcp://host:8786", whose workers must see the store at the
        same path, or whatever else `dask.compute` takes. Default: an active Client of
        dask.distributed, else threads. All give the same values, matrix products to rounding.
    progress : callable, optional
        Called now and then as ``progress(done, total)``, in tasks.

    Returns
    -------
    tuple of Dataset or DataTree
        In the order given; one query gives just its result.

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> acts = xr.DataArray(np.eye(4, dtype="float32"), dims=("token", "neuron"))
    >>> m, h = actstore.compute(actstore.moments(acts), actstore.histogram(acts, bins=[0, 1, 2]))
    >>> float(m["mean"][0, 0]), h["counts"].values.tolist()
    (0.25, [[12, 4]])
    """
    flat = [d for q in queries for d in _datasets(q)]
    lazy = [d for d in flat if is_dask_collection(d)]
    graph: dict[Any, Any] = {}
    for dataset in lazy:
        graph |= dict(dataset.__dask_graph__())
    keys = [list(d.__dask_keys__()) if is_dask_collection(d) else [] for d in flat]
    shared = share_reads(graph)
    with _running(scheduler, lazy) as get, _told(get, progress) as get:
        side_by_side = get is dask.threaded.get and one_core_each(shared)
        with threadpool_limits(1, "blas") if side_by_side else nullcontext():
            values = get(shared, keys) if graph else keys
    done = iter(
        _rebuild(d, v) if is_dask_collection(d) else d for d, v in zip(flat, values, strict=True)
    )
    results = tuple(_collect(q, done) for q in queries)
    return results[0] if len(results) == 1 else results


@contextmanager
def _running(scheduler: Any, lazy: Sequence[xr.Dataset]) -> Iterator[Callable[..., Any]]:
    """What computes keys of a graph; of an address, a Client as long as it is needed."""
    if isinstance(scheduler, str):
        if scheduler.startswith("tcp://"):
            with _client(scheduler) as client:
                yield client.get
            return
        # "distributed" is dask's name for the active Client.
        if scheduler.lower() not in {*named_schedulers, "distributed", "dask.distributed"}:
            raise UnknownNameError("scheduler", scheduler, SCHEDULERS)
    get = get_scheduler(scheduler=scheduler, collections=lazy) or dask.threaded.get
    if get is dask.multiprocessing.get:
        get = partial(get, chunksize=1)  # tasks are few and large: not several to a process
    yield get


@contextmanager
def _told(
    get: Callable[..., Any], progress: Callable[[int, int], None] | None
) -> Iterator[Callable[..., Any]]:
    """What computes keys of a graph, and says how far it is."""
    client = getattr(get, "__self__", None)
    if progress is None:
        yield get
    elif type(client).__module__.startswith("distributed."):
        yield partial(_get_from_cluster, client, progress)
    else:
        done = total = 0

        def start(graph: Any, _: Any) -> None:
            nonlocal total
            total = len(graph)

        def step(*_: Any) -> None:
            nonlocal done
            done += 1
            progress(done, total)

        with Callback(start_state=start, posttask=step):
            yield get


def _get_from_cluster(
    client: Any, progress: Callable[[int, int], None], graph: Any, keys: Any
) -> Any:
    """`Client.get` that says how far it is: the workers' tasks are seen by the scheduler alone."""
    from distributed.client import futures_of
    from distributed.diagnostics.progressbar import ProgressBar

    class Told(ProgressBar):
        def _draw_bar(self, **counts: Any) -> None:
            progress(counts["all"] - counts["remaining"], counts["all"])

    futures = client.get(graph, keys, sync=False)
    client.sync(Told(futures_of(futures), client.scheduler.address).listen)
    return client.gather(futures)


def _client(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError:
        raise UsageError(
            f"scheduler {address!r} needs dask.distributed: pip install 'actstore[distributed]'"
        ) from None
    try:
        return Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        why = str(error)
    gc.collect()  # the failed client would lock up if it were found while another one starts
    raise UsageError(
        f"no scheduler of dask.distributed answers at {address!r} ({why}). Start one with "
        f"`dask scheduler` and its workers with `dask worker {address}`, or choose from "
        f"{', '.join(SCHEDULERS[:-1])}"
    )


def _rebuild(dataset: xr.Dataset, values: Any) -> xr.Dataset:
    finish, arguments = dataset.__dask_postcompute__()
    return finish(values, *arguments)


def _datasets(result: Result) -> list[xr.Dataset]:
    if isinstance(result, xr.DataTree):
        return [node.to_dataset() for node in result.subtree]
    return [result]


def _collect(query: Result, done: Any) -> Result:
    if isinstance(query, xr.DataTree):
        return xr.DataTree.from_dict({node.path: next(done) for node in query.subtree})
    return next(done)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
