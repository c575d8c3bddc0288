"""From streamed stages to one labelled result, with its provenance; and computing several."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import dask
import numpy as np
import xarray as xr
from dask.base import get_scheduler, is_dask_collection, named_schedulers
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


def compute(*queries: Result, scheduler: Any = None) -> Any:
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
    with _running(scheduler, lazy) as get:
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
        raise UsageError(
            f"no scheduler of dask.distributed answers at {address!r} ({error}). Start one with "
            f"`dask scheduler` and its workers with `dask worker {address}`, or choose from "
            f"{', '.join(SCHEDULERS[:-1])}"
        ) from error


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
