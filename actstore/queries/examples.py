"""Single tokens and values: the largest of each neuron, and samples."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import dask.array as da
import numpy as np
import xarray as xr

from ..errors import UnknownNameError, UsageError
from ..schema import RANKS, Categorical
from ..stats.sampling import Rows, Values
from ..stats.top import Top
from .engine import Output, Pass, stream
from .registry import query
from .result import Result, assemble
from .rows import COMPAT, Compat, check, check_seed, element
from .selection import Data, Names, Numbers, Selection, Source, Tokens, select

__all__ = ["sample", "top_tokens"]

MAX_K = 10_000
MAX_SAMPLE = 1_000_000

_LABELS = {
    "sequence": "sequence of the token",
    "position": "index of the token in its sequence",
    "token_text": "text of the token",
}


@query("--stages mlp_post --layers 3 --neurons 17 --k 5")
def top_tokens(
    data: Data,
    *,
    stages: Names = None,
    layers: Numbers = None,
    tokens: Tokens = None,
    neurons: Numbers = None,
    by: str | None = None,
    exclude_sinks: str | None = None,
    k: int = 20,
    largest: bool = True,
) -> Result:
    """The tokens at which each neuron is largest, or smallest.

    Parameters
    ----------
    k : int
        Tokens for each neuron.
    largest : bool
        The largest values; else the smallest.

    Returns
    -------
    Dataset
        value and token (layer, neuron, rank), best first and ties to the earlier token, with
        coordinates sequence, position and token_text of the same dimensions. Where there are
        fewer than k tokens, value is NaN and token -1.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> acts = xr.DataArray(np.float32([[1], [5], [3]]), dims=("token", "neuron"))
    >>> result = top_tokens(acts, k=2).compute()
    >>> result["value"].values.tolist(), result["token"].values.tolist()
    ([[[5.0, 3.0]]], [[[1, 2]]])
    """
    selection = select(data, stages, layers, tokens, neurons, by, exclude_sinks)
    if not 1 <= k <= MAX_K:
        raise UsageError(f"k is {k}: it must be from 1 to {MAX_K:,}")

    def passes(source: Source, chosen: np.ndarray) -> list[Pass]:
        return [Pass(Top(k, largest), sketch=k <= RANKS)]

    def outputs(source: Source, chosen: np.ndarray) -> dict[str, Output]:
        dims, shape = ("neuron", "rank"), (len(chosen), k)
        value = {"long_name": "activation", "units": "activation"}
        token = {"long_name": "index of the token", "units": "1"}
        return {
            "value": Output(dims, shape, np.float64, value),
            "token": Output(dims, shape, np.int64, token, blank=-1),
        }

    results = {
        stage: d.assign_coords(_labels(selection, d["token"])).assign_coords(rank=np.arange(k))
        for stage, d in stream(selection, passes, outputs).items()
    }
    return assemble("top_tokens", selection, results, {"k": k, "largest": largest})


@query("--stages mlp_post --layers 0-3 --unit value --n 1000 --csv")
def sample(
    data: Data,
    *,
    stages: Names = None,
    layers: Numbers = None,
    tokens: Tokens = None,
    neurons: Numbers = None,
    by: str | None = None,
    exclude_sinks: str | None = None,
    n: int = 1000,
    seed: int = 0,
    unit: Literal["token", "value"] = "token",
    compat: Compat = "textbook",
) -> Result:
    """A random sample of tokens or of single values, the same in every layer.

    Parameters
    ----------
    n : int
        Tokens or values; with `by`, of each group. Where there are fewer, all of them.
    seed : int
        Of the random numbers: the same seed gives the same sample.
    unit : {"token", "value"}
        "token" draws tokens and gives all their neurons; "value" draws single values of the
        flattened layer.
    compat : {"textbook", "notebook"}
        "notebook" takes the first n instead of drawing.

    Returns
    -------
    Dataset
        activation (layer, sample[, neuron]), in the order of the data, with coordinates token,
        sequence, position and token_text of each sample, and for single values neuron. With
        `by`, (layer, group, sample[, neuron]), NaN and token -1 where a group has fewer.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> acts = xr.DataArray(np.float32([[1, 2], [3, 4], [5, 6]]), dims=("token", "neuron"))
    >>> sample(acts, n=3, unit="value", compat="notebook").compute()["activation"].values.tolist()
    [[1.0, 2.0, 3.0]]
    """
    selection = select(data, stages, layers, tokens, neurons, by, exclude_sinks)
    check_seed(seed)
    check("unit", unit, ("token", "value"))
    check("compat", compat, COMPAT)
    if not 1 <= n <= MAX_SAMPLE:
        raise UsageError(f"n is {n}: it must be from 1 to {MAX_SAMPLE:,}")
    members = selection.members()
    drawn = {
        stage: _draw(members, len(chosen) if unit == "value" else 1, n, seed, compat)
        for stage, chosen in selection.neurons.items()
    }
    size = max(len(tokens_s) for picks in drawn.values() for tokens_s, _ in picks)
    mask = np.zeros(selection.n_tokens, bool)
    for picks in drawn.values():
        for tokens_s, _ in picks:
            mask[tokens_s] = True

    def passes(source: Source, chosen: np.ndarray) -> list[Pass]:
        if unit == "token":
            return [Pass(Rows(size))]
        tokens_s, columns_s = (np.concatenate(p) for p in zip(*drawn[source.stage], strict=True))
        order = np.argsort(tokens_s, kind="stable")
        return [Pass(Values(size, tokens_s[order], columns_s[order]))]

    def outputs(source: Source, chosen: np.ndarray) -> dict[str, Output]:
        whole = unit == "token"
        dims = ("sample", "neuron") if whole else ("sample",)
        shape = (size, len(chosen)) if whole else (size,)
        attrs = {"long_name": "activation", "units": "activation"}
        return {"activation": Output(dims, shape, element(source), attrs)}

    results = {}
    for stage, made in stream(replace(selection, mask=mask), passes, outputs).items():
        picks = drawn[stage]
        token = np.stack([_padded(tokens_s, size) for tokens_s, _ in picks])
        neuron = np.stack([_padded(columns_s, size) for _, columns_s in picks])
        coords = {"token": token}
        if unit == "value":
            coords["neuron"] = np.where(neuron < 0, -1, selection.neurons[stage][neuron])
        dims: tuple[str, ...] = ("sample",)
        if selection.groups is None:
            coords = {name: values[0] for name, values in coords.items()}
        else:
            dims = (selection.groups.name, "sample")
        arrays = {name: xr.DataArray(values, dims=dims) for name, values in coords.items()}
        results[stage] = made.assign_coords({**arrays, **_labels(selection, arrays["token"])})
    parameters = {"n": n, "seed": seed, "unit": unit, "compat": compat}
    return assemble("sample", selection, results, parameters)


def _draw(
    members: list[np.ndarray], width: int, n: int, seed: int, compat: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and columns of up to n cells of each group's table, in the order of the data."""
    random = np.random.default_rng(seed)
    drawn = []
    for tokens_t in members:
        cells = len(tokens_t) * width
        taken = np.arange(min(n, cells))
        if compat == "textbook":
            taken = np.sort(random.choice(cells, len(taken), replace=False, shuffle=False))
        drawn.append((tokens_t[taken // width], taken % width))
    return drawn


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    return np.pad(values, (0, size - len(values)), constant_values=-1)


def _labels(selection: Selection, token: xr.DataArray) -> dict[str, xr.DataArray]:
    """Labels of tokens by their numbers, as lazy as the numbers are."""
    labels = {}
    for name, text in _LABELS.items():
        if selection.groups is not None and name == selection.groups.name:
            continue  # each group is of one value, which its own coordinate says
        try:
            column = selection.column(name)
        except UnknownNameError:
            continue  # an array of the user's own need not have it
        look_up = partial(_look_up, column=column)
        lazy = isinstance(token.data, da.Array)
        kind = object if isinstance(column, Categorical) else column.dtype
        data = token.data.map_blocks(look_up, dtype=kind) if lazy else look_up(token.data)
        labels[name] = xr.DataArray(data, dims=token.dims, attrs={"long_name": text})
    return labels


def _look_up(tokens: np.ndarray, column: np.ndarray | Categorical) -> np.ndarray:
    """A column's values at tokens; where there is no token (-1), an empty value."""
    if isinstance(column, Categorical):
        return np.where(tokens < 0, "", column.values[column.codes[tokens]])
    empty = np.nan if column.dtype.kind == "f" else -1
    return np.where(tokens < 0, empty, column[tokens]).astype(column.dtype)
