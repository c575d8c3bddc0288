"""Results as JSON and CSV, the same for the command line and the server."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

import numpy as np
import xarray as xr

__all__ = ["to_csv", "to_json", "to_records"]


def to_json(result: xr.Dataset | xr.DataTree) -> dict[str, Any]:
    """A computed result as plain JSON values; NaN and infinities as null.

    Parameters
    ----------
    result : Dataset or DataTree
        Computed, or small enough to be.

    Returns
    -------
    dict
        attrs, dims, coords and variables (each with dims, attrs and nested lists of data); of a
        DataTree, attrs and such a dict for each stage.

    Examples
    --------
    >>> to_json(xr.Dataset({"mean": ("layer", [1.0, float("nan")])}))["variables"]["mean"]["data"]
    [1.0, None]
    """
    if isinstance(result, xr.DataTree):
        stages = {name: to_json(node.to_dataset()) for name, node in result.children.items()}
        return {"attrs": _plain(result.attrs), "stages": stages}
    return {
        "attrs": _plain(result.attrs),
        "dims": {str(k): int(v) for k, v in result.sizes.items()},
        "coords": {str(k): _variable(v) for k, v in result.coords.items()},
        "variables": {str(k): _variable(v) for k, v in result.data_vars.items()},
    }


def to_records(result: xr.Dataset | xr.DataTree) -> tuple[list[str], list[list[Any]]]:
    """A result as one flat table: a row for each cell of its widest variables.

    Returns
    -------
    header : list of str
        Dimension names, then variables.
    rows : list of list
    """
    if isinstance(result, xr.DataTree):
        header: list[str] = []
        rows: list[list[Any]] = []
        for node in result.children.values():
            header, part = to_records(node.to_dataset())
            rows += part
        return header, rows
    widest = max((v.dims for v in result.data_vars.values()), key=len, default=())
    names = [str(k) for k, v in result.data_vars.items() if set(v.dims) <= set(widest)]
    scalars = [str(k) for k, v in result.coords.items() if v.dims == ()]
    shape = tuple(result.sizes[d] for d in widest)
    columns = [np.full(shape, result.coords[s].values, object).ravel() for s in scalars]
    for axis, dim in enumerate(widest):
        labels = result[dim].values if dim in result.coords else np.arange(shape[axis])
        spread = np.expand_dims(labels, [a for a in range(len(widest)) if a != axis])
        columns.append(np.broadcast_to(spread, shape).ravel())
    for name in names:
        variable = result[name]
        missing = [a for a, d in enumerate(widest) if d not in variable.dims]
        ordered = variable.transpose(*(d for d in widest if d in variable.dims))
        columns.append(np.broadcast_to(np.expand_dims(ordered.values, missing), shape).ravel())
    header = [*scalars, *map(str, widest), *names]
    return header, [[_plain(v) for v in row] for row in zip(*columns, strict=True)]


def to_csv(result: xr.Dataset | xr.DataTree) -> str:
    """`to_records` as CSV with a header; undefined values are empty."""
    header, rows = to_records(result)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def dumps(value: Any) -> str:
    """Strict JSON text."""
    return json.dumps(_plain(value), allow_nan=False, ensure_ascii=False)


def _variable(variable: xr.DataArray) -> dict[str, Any]:
    return {
        "dims": [str(d) for d in variable.dims],
        "attrs": _plain(variable.attrs),
        "data": _plain(variable.values),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            finite = np.isfinite(value)
            value = value.astype(object)
            value[~finite] = None
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
