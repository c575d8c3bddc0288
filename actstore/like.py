"""The part of a stage that another array's coordinates name."""

from __future__ import annotations

import numpy as np
import xarray as xr

from .errors import UnknownNameError, UsageError
from .schema import DIMS

__all__ = ["select_like"]

_SAME = ("sequence", "position", "token_id")
"""Columns by which tokens are known to be the same."""


def select_like(values: xr.DataArray, other: xr.DataArray | xr.Dataset) -> xr.DataArray:
    """Layers, tokens and neurons of `values` that `other` has, in its order; see `Store.sel_like`.

    Parameters
    ----------
    values : DataArray (layer, token, neuron)
        A stage of a store.
    other : DataArray or Dataset

    Returns
    -------
    DataArray
        Lazy. Without the dims at which `other` stands at one place.
    """
    if not isinstance(other, (xr.DataArray, xr.Dataset)):
        raise UsageError(f"other is a {type(other).__name__}: give an xarray.DataArray or Dataset")
    if not set(DIMS) & {*other.dims, *other.coords}:
        raise UsageError(f"other has none of {', '.join(DIMS)}: there is nothing to be like")
    for dim in ("layer", "neuron"):
        if dim in other.coords:
            wanted = other.coords[dim].values
            missing = np.setdiff1d(wanted, values[dim].values)
            if len(missing):
                raise UnknownNameError(dim, missing[0].item(), _shown(values[dim].values))
            values = values.sel({dim: wanted})
        elif dim in other.dims:
            _check_whole(values, other, dim, dim)
    if "token" not in (*other.dims, *other.coords) and "input" not in other.coords:
        return values
    numbers = _numbers(values, other)
    chosen = values if numbers is None else values.isel(token=numbers)
    for name in _SAME:
        if name in other.coords and name in chosen.coords:
            a, b = np.broadcast_arrays(chosen.coords[name].values, other.coords[name].values)
            differ = np.flatnonzero(a != b)
            if len(differ):
                at = differ[0]
                raise UsageError(
                    f"other's tokens are not this store's: at its token {at}, {name} is "
                    f"{b.flat[at]} there and {a.flat[at]} here"
                )
    return chosen


def _numbers(values: xr.DataArray, other: xr.DataArray | xr.Dataset) -> np.ndarray | None:
    """Where the other's tokens are; None for all of them, as they stand."""
    if "token" in other.coords:
        numbers = other.coords["token"].values
        outside = np.flatnonzero((numbers < 0) | (numbers >= values.sizes["token"]))
        if len(outside):
            number = numbers.flat[outside[0]]
            raise UsageError(f"token {number} is not within the store's {values.sizes['token']:,}")
        return numbers
    if "input" not in other.coords:
        _check_whole(values, other, "token", "token or input")
        return None
    kept, wanted = values.coords["input"].values, other.coords["input"].values
    numbers = np.minimum(np.searchsorted(kept, wanted), len(kept) - 1)
    missing = np.flatnonzero(kept[numbers] != wanted)
    if len(missing):
        raise UsageError(
            f"other has the input token {wanted.flat[missing[0]]}, which this store did not keep: "
            "leave it out of other"
        )
    return numbers


def _check_whole(
    values: xr.DataArray, other: xr.DataArray | xr.Dataset, dim: str, coordinate: str
) -> None:
    """Without a coordinate, a dim can only be meant whole."""
    if other.sizes[dim] != values.sizes[dim]:
        raise UsageError(
            f"other has {other.sizes[dim]:,} along {dim}, of the store's {values.sizes[dim]:,}, "
            f"and no coordinate {coordinate} that says which: keep it when you select"
        )


def _shown(known: np.ndarray) -> list[str]:
    return [str(n) for n in known] if len(known) <= 64 else [f"{known[0]} to {known[-1]}"]
