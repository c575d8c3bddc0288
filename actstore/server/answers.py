"""Results as the bytes of an answer, in each format; and how large one would be."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from .. import wire
from ..errors import UnknownNameError, UsageError
from ..plot import PLOTS
from ..plot import save as save_plot
from ..queries.result import Result
from .failures import ServiceError

__all__ = ["FORMATS", "check_format", "check_nbytes", "check_size", "encode", "freeze", "thaw"]

FORMATS = {
    "json": "application/json",
    "csv": "text/csv; charset=utf-8",
    "nc": "application/x-netcdf",
    "png": "image/png",
    "svg": "image/svg+xml",
}
"""Formats of an answer, and their media types."""

DRAWN = ("png", "svg")

MAX_NBYTES = 64_000_000
"""Most bytes of a result's values; as text they are two or three times as many."""


def check_format(query: str, wanted: str) -> None:
    """Refuse a format that there is not, or not of this query."""
    if wanted not in FORMATS:
        raise UnknownNameError("value of format", wanted, FORMATS)
    if wanted in DRAWN and query not in PLOTS:
        raise UsageError(f"there is no picture of {query}: ask for json, csv or nc")


def datasets(result: Result) -> Iterator[xr.Dataset]:
    """The parts of a result, lazy or not."""
    if isinstance(result, xr.DataTree):
        for node in result.subtree:
            yield node.to_dataset()
    else:
        yield result


def check_size(result: Result, wanted: str) -> None:
    """Refuse a result that is too large to send, before it is computed."""
    check_nbytes(sum(_nbytes(d, wanted) for d in datasets(result)))


def check_nbytes(nbytes: float) -> None:
    """Refuse a result of so many bytes."""
    if nbytes > MAX_NBYTES:
        raise ServiceError(
            413,
            "too_large",
            f"the answer would hold {nbytes / 1e6:,.0f} MB, and {MAX_NBYTES / 1e6:,.0f} MB is the "
            "most: choose fewer stages, layers, tokens, bins or neurons=, or ask for less with "
            "reduce= or per=layer, where the query has them",
            nbytes,
        )


def _nbytes(dataset: xr.Dataset, wanted: str) -> int:
    values = sum(v.size * v.dtype.itemsize for v in dataset.variables.values())
    if wanted != "csv" or not dataset.data_vars:
        return values
    # A table repeats every coordinate in each of its rows.
    rows = max(v.size for v in dataset.data_vars.values())
    return max(values, 8 * rows * len(dataset.variables))


def encode(result: Result, wanted: str) -> bytes:
    """A computed result in one of `FORMATS`."""
    return _ENCODERS[wanted](result)


def _json(result: Result) -> bytes:
    return json.dumps(wire.to_json(result), allow_nan=False, ensure_ascii=False).encode()


def _csv(result: Result) -> bytes:
    return wire.to_csv(result).encode()


def _by_file(save: Callable[[Result, Path], Any], ending: str) -> Callable[[Result], bytes]:
    def made(result: Result) -> bytes:
        with tempfile.TemporaryDirectory(prefix="actstore-") as scratch:
            path = Path(scratch) / f"answer.{ending}"
            save(result, path)
            return path.read_bytes()

    return made


_ENCODERS: dict[str, Callable[[Result], bytes]] = {
    "json": _json,
    "csv": _csv,
    "nc": _by_file(wire.save, "nc"),
    **{ending: _by_file(save_plot, ending) for ending in DRAWN},
}


# -- kept whole, to be given in another format -----------------------------------------------


def freeze(result: Result) -> bytes:
    """A computed result, every value and type of it, as bytes of which nothing is executable."""
    if isinstance(result, xr.DataTree):
        nodes = {node.path: node.to_dataset() for node in result.subtree}
    else:
        nodes = {"": result}
    arrays: dict[str, np.ndarray] = {}
    described = []
    for path, dataset in nodes.items():
        variables = []
        for name, variable in dataset.variables.items():
            values = variable.values
            texts = values.dtype.kind in "OT"
            if texts:  # of texts, and of nothing else
                values = np.array([json.dumps(v) for v in values.ravel().tolist()], dtype=str)
            arrays[f"a{len(arrays)}"] = values
            variables.append(
                {
                    "name": str(name),
                    "dims": [str(d) for d in variable.dims],
                    "attrs": dict(variable.attrs),
                    "coord": name in dataset.coords,
                    "objects": list(variable.shape) if texts else None,
                }
            )
        described.append({"path": path, "attrs": dict(dataset.attrs), "variables": variables})
    head = json.dumps(described, default=_listed).encode()
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, head=np.frombuffer(head, np.uint8), **arrays)
    return file.getvalue()


def thaw(data: bytes) -> Result:
    """What `freeze` was given."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        described = json.loads(arrays["head"].tobytes())
        count, nodes = 0, {}
        for node in described:
            dataset = xr.Dataset(attrs=node["attrs"])
            variables: dict[str, xr.Variable] = {}
            for variable in node["variables"]:
                values = arrays[f"a{count}"]
                count += 1
                if variable["objects"] is not None:
                    found = np.empty(len(values), dtype=object)
                    found[:] = [json.loads(text) for text in values.tolist()]
                    values = found.reshape(variable["objects"])
                variables[variable["name"]] = xr.Variable(
                    variable["dims"], values, variable["attrs"]
                )
            coords = {v["name"] for v in node["variables"] if v["coord"]}
            dataset = xr.Dataset(
                {n: v for n, v in variables.items() if n not in coords},
                {n: v for n, v in variables.items() if n in coords},
                node["attrs"],
            )
            nodes[node["path"]] = dataset
    if "" in nodes:
        return nodes[""]
    return xr.DataTree.from_dict(nodes)


def _listed(value: Any) -> Any:
    """An attribute that JSON does not know."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return str(value)
