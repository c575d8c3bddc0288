"""The pairs of a matrix of all with all, as a flat table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import dask
import dask.array as da
import numpy as np
import xarray as xr

from ..errors import UsageError
from .result import Result

__all__ = ["pairs"]


def pairs(result: Result) -> xr.Dataset:
    """Flatten a pairwise result: one row for each pair, with labels of both its members.

    Of a set compared with itself these are the pairs above the diagonal, row by row, as
    `numpy.triu_indices` has them; of two sets, or two stages, all pairs.

    Parameters
    ----------
    result : Dataset or DataTree
        From `mutual_information`, `pairwise_covariance`, `cosine_matrix` (none of them reduced) or
        `layer_covariance`. Where it is lazy, so is the table, in chunks of some rows of the
        matrix: it can be written to Zarr without being held.

    Returns
    -------
    Dataset
        The variables of the result with dimension ``pair`` in place of the matrix's two, and the
        coordinates ``token_a`` and ``token_b`` (``neuron_a``, ``layer_a``, ...), beside them
        whatever tells tokens apart, as ``token_text_a``. The groups of a DataTree follow one
        another, and a coordinate says which is which. ``to_dataframe()`` makes it a table.

    Examples
    --------
    >>> import actstore, numpy as np, xarray as xr
    >>> acts = xr.DataArray(np.float32([[1, 0], [0, 2], [3, 4]]), dims=("token", "neuron"))
    >>> table = pairs(actstore.cosine_matrix(acts, layers=0).isel(layer=0)).compute()
    >>> table["token_a"].values.tolist(), table["token_b"].values.tolist()
    ([0, 0, 1], [1, 2, 2])
    >>> table["similarity"].values.round(1).tolist()
    [0.0, 0.6, 0.8]
    """
    if isinstance(result, xr.Dataset):
        return _flat(result)
    groups = [_named(_flat(node.to_dataset()), result) for node in result.children.values()]
    made = xr.concat(groups, "pair", coords="minimal", compat="override")
    return made.assign_attrs({**groups[0].attrs, **result.attrs})


def _named(group: xr.Dataset, result: xr.DataTree) -> xr.Dataset:
    """With what the group is called beside each pair."""
    label = str(result.attrs.get("by"))
    if label not in group.coords:
        return group
    value, n = group[label].item(), group.sizes["pair"]
    kind = object if isinstance(value, str) else None
    chunks = group.chunks.get("pair")
    values = da.full(n, value, chunks=chunks, dtype=kind) if chunks else np.full(n, value, kind)
    return group.assign_coords({label: ("pair", values)})


@dataclass(frozen=True)
class _Run:
    """Some rows of a matrix, and the columns of their pairs: above the diagonal, or all."""

    top: int
    rows: int
    left: int
    columns: int
    own: bool

    @property
    def count(self) -> int:
        below = self.rows * (self.rows + 1) // 2 if self.own else 0
        return self.rows * self.columns - below

    def places(self) -> tuple[np.ndarray, ...]:
        """Row and column of each pair, from the top left corner."""
        if self.own:
            return np.triu_indices(self.rows, 1, self.columns)
        return tuple(np.indices((self.rows, self.columns)).reshape(2, -1))

    def flatten(self, matrix: Any) -> Any:
        """The values of its pairs, out of the whole matrix (..., row, column)."""
        part = matrix[..., self.top : self.top + self.rows, self.left :]
        if isinstance(part, np.ndarray):
            return _at(part, self)
        last = part.ndim - 1
        whole = part.rechunk({last - 1: -1, last: -1})
        chunks = (*whole.chunks[:-2], (self.count,))
        return whole.map_blocks(_at, self, drop_axis=last, chunks=chunks, dtype=part.dtype)

    def label(self, values: Any, side: int, lazy: bool) -> Any:
        """What its pairs' first or second members are called."""
        if not lazy:
            return _called(values, self, side)
        made = dask.delayed(_called)(dask.delayed(values), self, side)
        return da.from_delayed(made, (self.count,), values.dtype)


def _at(part: np.ndarray, run: _Run) -> np.ndarray:
    rows, columns = run.places()
    return part[..., rows, columns]


def _called(values: np.ndarray, run: _Run, side: int) -> np.ndarray:
    return values[run.places()[side] + (run.left if side else run.top)]


def _flat(result: xr.Dataset) -> xr.Dataset:
    first = next((str(d) for d in result.dims if f"{d}_b" in result.dims), "")
    second = f"{first}_b"
    if not first:
        dims = ", ".join(f"{d}: {n}" for d, n in result.sizes.items())
        raise UsageError(
            f"this result has dimensions ({dims}), and none beside its pair, as token beside "
            "token_b: give one of mutual_information, pairwise_covariance or cosine_matrix, asked "
            "without reduce"
        )
    # Tokens at one stage and at another are two sets, though they are the same tokens.
    own = not {"stage_b", "store_b"} & result.attrs.keys()
    own = own and np.array_equal(result[first].values, result[second].values)
    columns = result.sizes[second]
    matrices = {k: v for k, v in result.data_vars.items() if {first, second} <= set(v.dims)}
    chunked = next((v.chunksizes[first] for v in matrices.values() if v.chunks), None)
    runs, top = [], 0
    for rows in chunked or (result.sizes[first],):
        left = top if own else 0
        runs.append(_Run(top, rows, left, columns - left, own))
        top += rows

    def joined(parts: list[Any]) -> Any:
        return parts[0] if len(parts) == 1 else da.concatenate(parts, axis=-1)

    variables = {}
    for name, matrix in matrices.items():
        ordered = matrix.transpose(..., first, second)
        values = joined([run.flatten(ordered.data) for run in runs])
        variables[name] = ((*ordered.dims[:-2], "pair"), values, matrix.attrs)
    coords: dict[Any, Any] = {
        name: ("pair", joined([run.label(values, side, chunked is not None) for run in runs]))
        for name, (side, values) in _labels(result, first, second, own).items()
    }
    kept = {k: v for k, v in result.coords.items() if not {first, second} & set(v.dims)}
    return xr.Dataset(variables, {**kept, **coords}, result.attrs)


def _labels(
    result: xr.Dataset, first: str, second: str, own: bool
) -> dict[str, tuple[int, np.ndarray]]:
    """Labels of the members of pairs: by name the side that they are of, and its values."""
    found = {f"{first}_a": (0, result[first].values), second: (1, result[second].values)}
    for name, coord in result.coords.items():
        if coord.dims == (first,) and name != first:
            found[f"{name}_a"] = 0, coord.values
            if own:  # what tells one set apart tells the other apart
                found[f"{name}_b"] = 1, coord.values
        elif coord.dims == (second,) and name != second:
            found[f"{str(name).removesuffix('_b')}_b"] = 1, coord.values
    return found
