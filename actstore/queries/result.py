"""From streamed stages to one labelled result, with its provenance; and computing several."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import dask
import numpy as np
import xarray as xr
from dask.base import get_scheduler, is_dask_collection

from .engine import share_reads
from .selection import Selection

__all__ = ["Result", "assemble", "compute"]

Result = xr.Dataset | xr.DataTree


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
    attrs = {
        "query": name,
        "parameters": json.dumps(_plain(parameters), sort_keys=True),
        "compat": parameters.get("compat", "textbook"),
        **selection.attrs,
        "source": "scan" if passes else "sketch",
        "passes": passes,
    }
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
    scheduler : str or callable, optional
        As in `dask.compute`.

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
    graph: dict[Any, Any] = {}
    for dataset in flat:
        if is_dask_collection(dataset):
            graph |= dict(dataset.__dask_graph__())
    get = get_scheduler(scheduler=scheduler, collections=[d for d in flat if is_dask_collection(d)])
    if get is None:
        get = dask.threaded.get
    shared = share_reads(graph)
    keys = [list(d.__dask_keys__()) if is_dask_collection(d) else [] for d in flat]
    values = get(shared, keys) if graph else keys
    done = iter(
        _rebuild(d, v) if is_dask_collection(d) else d for d, v in zip(flat, values, strict=True)
    )
    results = tuple(_collect(q, done) for q in queries)
    return results[0] if len(results) == 1 else results


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
