"""Results as JSON, CSV and files, the same for the command line and the server."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import warnings
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import xarray as xr

from .errors import UnknownNameError, UsageError
from .queries.result import compute

__all__ = ["ENDINGS", "dumps", "save", "to_csv", "to_json", "to_records"]

ENDINGS = (".nc", ".zarr")
"""Kinds of files that hold a result."""


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

    Where variables have dimensions that others lack, such as a histogram beside quantiles, the
    table is of those that most variables fit into.

    Returns
    -------
    header : list of str
        Dimension names, then variables.
    rows : list of list
    """
    if isinstance(result, xr.DataTree):
        parts = [to_records(node.to_dataset()) for node in result.children.values()]
        return parts[0][0] if parts else [], [row for _, rows in parts for row in rows]
    result = _with_bin_ends(result)
    widest = _widest(result)
    shape = tuple(result.sizes[d] for d in widest)
    scalars = [k for k, v in result.coords.items() if v.dims == ()]
    labels = [k for k, v in result.coords.items() if v.dims and k not in result.dims]
    beside = [k for k in (*labels, *result.data_vars) if set(result[k].dims) <= set(widest)]

    def column(variable: xr.DataArray) -> np.ndarray:
        missing = [axis for axis, d in enumerate(widest) if d not in variable.dims]
        ordered = variable.transpose(*(d for d in widest if d in variable.dims))
        return np.broadcast_to(np.expand_dims(ordered.values, missing), shape).ravel()

    names = [*scalars, *widest, *beside]
    columns = [column(result[name]) for name in names]
    if "bin_low" in names:  # histograms of fewer bins than others are padded
        there = np.isfinite(columns[names.index("bin_high")])
        columns = [c[there] for c in columns]
    return [str(n) for n in names], [[_plain(v) for v in r] for r in zip(*columns, strict=True)]


def _widest(result: xr.Dataset) -> tuple[Any, ...]:
    """Dimensions of a variable into which most others fit."""
    every = [v.dims for v in result.data_vars.values()]

    def fitting(dims: tuple[Any, ...]) -> tuple[int, int]:
        return sum(set(own) <= set(dims) for own in every), len(dims)

    return max(every, key=fitting, default=())


def _with_bin_ends(result: xr.Dataset) -> xr.Dataset:
    """The edges of a histogram as the two ends of each bin, so that they fit its rows."""
    if not {"bin", "edge"} <= set(result.dims) or "edges" not in result:
        return result
    edges = result["edges"].drop_vars("edge", errors="ignore")
    low, high = edges.isel(edge=slice(None, -1)), edges.isel(edge=slice(1, None))
    ends = {"bin_low": low.rename(edge="bin"), "bin_high": high.rename(edge="bin")}
    return result.drop_vars("edges").assign_coords(ends)


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


def save(result: xr.Dataset | xr.DataTree, path: str | os.PathLike[str]) -> Path:
    """Write a result to disk, to be opened by stock xarray.

    A DataTree's stages become groups. Attributes that the formats cannot hold are written as the
    nearest that they can: truth values as 0 and 1, NaN and nested values as text; None is left
    out.

    Parameters
    ----------
    result : Dataset or DataTree
        Computed first if it is lazy.
    path : str or PathLike
        Ends in .nc (netCDF 4; a file that exists is replaced) or .zarr (must not exist).

    Returns
    -------
    Path
        What was written.

    Examples
    --------
    >>> import actstore, tempfile, xarray as xr
    >>> acts = xr.DataArray(np.eye(4, dtype="float32"), dims=("token", "neuron"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = save(actstore.moments(acts), f"{folder}/moments.nc")
    ...     xr.load_dataset(written)["mean"].values.tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise UnknownNameError("ending of a result's file", path.suffix, ENDINGS)
    if path.is_dir():
        raise UsageError(f"{path} exists: remove it, or choose another name")
    result = compute(result)
    if isinstance(result, xr.DataTree):
        nodes = {node.path: _writable(node.to_dataset()) for node in result.subtree}
        result = xr.DataTree.from_dict(nodes)
    else:
        result = _writable(result)
    # Under another name until it is whole.
    part = path.with_name(f".{path.stem}.{uuid4().hex}{path.suffix}")
    try:
        if path.suffix == ".nc":
            result.to_netcdf(part, engine="h5netcdf")
        else:
            with warnings.catch_warnings():
                # Consolidated metadata are not in Zarr's specification, but xarray asks for them.
                warnings.simplefilter("ignore")
                result.to_zarr(part, consolidated=True)
        os.replace(part, path)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)
    return path


def _writable(result: xr.Dataset) -> xr.Dataset:
    """With values and attributes that netCDF and Zarr both hold."""
    made = result.copy()
    for name, variable in result.variables.items():
        values = variable.values
        if values.dtype.kind in "OUT":
            texts = np.array([str(v) for v in values.ravel()], dtype=object)
            values = texts.reshape(values.shape)
        elif values.dtype == np.float16:
            values = values.astype(np.float32)
        made[name] = (variable.dims, values, _writable_attrs(variable.attrs))
    made.attrs = _writable_attrs(result.attrs)
    return made


def _writable_attrs(attrs: dict[Any, Any]) -> dict[str, Any]:
    return {str(k): _writable_attr(v) for k, v in attrs.items() if v is not None}


def _writable_attr(value: Any) -> Any:
    """The value, if both formats hold it; else the nearest that they hold."""
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iuf":
        return value if value.size and np.isfinite(value).all() else str(value.tolist())
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (list, tuple)) and value:
        if all(isinstance(v, str) for v in value):
            return list(value)
        if all(type(v) in (int, float) for v in value):
            return _writable_attr(np.array(value))
    return dumps(value)


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
            return value.tolist()
        # Numbers are plain already, and there may be many.
        return value.tolist() if value.dtype.kind in "biuf" else _plain(value.tolist())
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
