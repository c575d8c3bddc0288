"""What a query is asked over: stages, layers, tokens, neurons, groups; resolved, nothing read.

`data` may be a store, a path, or a labelled `xarray.DataArray` (layer, token, neuron) of the
user's own; from here on they are all `Source`s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr

from ..aliases import only_stage, stages_of
from ..concatenation import block_bounds, open_any, value_type
from ..errors import UnknownNameError, UsageError
from ..schema import DIMS, Categorical, pick
from ..select import parse
from ..sketched import Sketches
from ..store import Store
from .shortcut import strata_of_groups

__all__ = [
    "RESULT_NAMES",
    "Data",
    "Groups",
    "Names",
    "Numbers",
    "Selection",
    "Source",
    "Tokens",
    "check_free",
    "select",
]

Data = Store | xr.DataArray | str | os.PathLike[str]
Names = str | Sequence[str] | None
Numbers = str | int | Sequence[int] | None
Tokens = str | np.ndarray | None

RESULT_NAMES = frozenset(
    """
    bin bin_covariance bin_mutual_information component dimension edge edge_covariance
    edge_mutual_information edges head layer layer_a layer_b neuron neuron_a neuron_b pair peak q
    quantile rank sample stage stage_a stage_b token token_a token_b
    """.split()  # noqa: SIM905 - a list of words reads better as words
)
"""Names of the dimensions of results, and of what lies along them: no label to split by has one."""

SINK_RATIO = 10


@dataclass(frozen=True)
class Source:
    """One stage's values, wherever they come from.

    Attributes
    ----------
    stage : str
    array : ShardedArray or array
        (layer, token, neuron), sliceable.
    layers : list of int
        Coordinate of the array's first axis.
    bounds : ndarray of int
        Token numbers at which blocks begin and end.
    token : str
        What identifies the values, for sharing reads between queries.
    dtype : str
        Type of the values; "bfloat16" where they are such, though stored as float32.
    heads : ndarray of int or None
        Attention head of each neuron, where the stage is made of heads.
    sketched : Sketches or None
        The stage's sketches.
    """

    stage: str
    array: Any
    layers: list[int]
    bounds: np.ndarray
    token: str
    dtype: str
    heads: np.ndarray | None = None
    sketched: Sketches | None = None

    @property
    def width(self) -> int:
        return int(self.array.shape[2])

    def norms(self, layer: int) -> np.ndarray:
        """Euclidean norm of every token at one layer, as sketches keep it, or read in pieces."""
        index = self.layers.index(layer)
        if self.sketched is not None:
            norms = self.sketched.norms(index).astype(np.float64)
            if np.isfinite(norms).all():  # else float32 cannot hold one, or values are NaN or inf
                return norms
        norms = np.empty(self.array.shape[1])
        for a, b in pairwise(self.bounds):
            values = np.asarray(self.array[index, a:b], np.float64)
            norms[a:b] = np.sqrt(np.einsum("tn,tn->t", values, values))
        return norms


@dataclass(frozen=True)
class Groups:
    """Tokens split by a label column."""

    name: str
    codes: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Selection:
    """A resolved question.

    Attributes
    ----------
    sources : tuple of Source
        One for each stage.
    layers : dict of str to list of int
        Layers asked, for each stage.
    neurons : dict of str to ndarray of int
        Neurons asked, for each stage.
    mask : ndarray of bool or None
        Tokens asked; None for all.
    groups : Groups or None
    attrs : dict
        Provenance of the result.
    n_tokens : int
        Tokens of the data, asked or not.
    strata : list of tuple of int, or None
        The sketches' strata that make up each group (all tokens asked, where there are no
        groups); None where sketches cannot answer.
    column : callable
        Gives a column over all tokens by name.
    path : str
        Of the store, where texts are read; "" for an array of the user's own.
    all_sources : callable
        Gives every source of the data by stage, whether asked or not.
    """

    sources: tuple[Source, ...]
    layers: Mapping[str, list[int]]
    neurons: Mapping[str, np.ndarray]
    mask: np.ndarray | None
    groups: Groups | None
    attrs: dict[str, Any]
    n_tokens: int
    strata: list[tuple[int, ...]] | None
    column: Callable[[str], np.ndarray | Categorical]
    path: str
    all_sources: Callable[[], dict[str, Source]]

    def members(self) -> list[np.ndarray]:
        """Numbers of the tokens asked, for each group; all in one where there are no groups."""
        chosen = np.arange(self.n_tokens) if self.mask is None else np.flatnonzero(self.mask)
        if self.groups is None:
            return [chosen]
        codes = self.groups.codes[chosen]
        return [chosen[codes == i] for i in range(len(self.groups.values))]


def select(
    data: Data,
    stages: Names,
    layers: Numbers,
    tokens: Tokens,
    neurons: Numbers,
    by: str | None,
    exclude_sinks: str | None = None,
) -> Selection:
    """Resolve the common parameters of a query.

    Raises
    ------
    UnknownNameError
        A stage, layer, neuron or column that is not there.
    UsageError
        A selection with no tokens, or data of the wrong kind.
    """
    if isinstance(data, (str, os.PathLike)):
        data = open_any(data)
    frame = _StoreFrame(data) if isinstance(data, Store) else _ArrayFrame(data)
    names = [s.strip() for s in stages.split(",")] if isinstance(stages, str) else stages
    named = stages_of(names or frame.stages, layers, frame.stages, frame.config)
    sources = tuple(frame.source(name) for name in named)
    groups = _groups(frame, by)
    mask = _mask(frame, tokens)
    asked = frame.n_tokens if mask is None else int(np.count_nonzero(mask))
    if not asked:
        raise UsageError(f"no token satisfies {tokens!r}: loosen the selection")
    if exclude_sinks is not None:
        exclude_sinks = only_stage(exclude_sinks, frame.stages, frame.config)
        normal = ~_sinks(frame.source(exclude_sinks))
        mask = normal if mask is None else mask & normal
    used = asked if mask is None else int(np.count_nonzero(mask))
    if not used:
        raise UsageError(f"every token asked is a sink at {exclude_sinks}: loosen the selection")
    attrs = {
        **frame.attrs,
        "tokens": tokens if isinstance(tokens, str) else ("all" if tokens is None else "a mask"),
        "tokens_used": used,
        "tokens_excluded": frame.n_tokens - used,
        "excluded_by_tokens": frame.n_tokens - asked,
        "excluded_by_sinks": asked - used,
        **({"exclude_sinks": exclude_sinks} if exclude_sinks else {}),
        **({"by": by} if by else {}),
    }
    return Selection(
        sources,
        {
            **_layers(sources, layers),
            **{s.stage: pick(own, s.layers, "layer") for s in sources if (own := named[s.stage])},
        },
        {s.stage: np.array(pick(neurons, range(s.width), "neuron")) for s in sources},
        mask,
        groups,
        attrs,
        frame.n_tokens,
        frame.strata(mask, groups),
        frame.column,
        frame.path,
        lambda: {name: frame.source(name) for name in frame.stages},
    )


def _sinks(source: Source) -> np.ndarray:
    """Tokens whose norm is far out at the stage's middle layer."""
    norms = source.norms(source.layers[len(source.layers) // 2])
    return norms > SINK_RATIO * np.median(norms)


def _layers(
    sources: Sequence[Source], layers: str | int | Sequence[int] | None
) -> dict[str, list[int]]:
    """Layers for each stage: a layer that some stages lack is taken from those that have it."""
    chosen: dict[str, list[int]] = {}
    failure: UnknownNameError | None = None
    for source in sources:
        try:
            chosen[source.stage] = pick(layers, source.layers, "layer")
        except UnknownNameError as error:
            failure = error
    if failure is not None:
        known = sorted({layer for source in sources for layer in source.layers})
        wanted = pick(layers, known, "layer")  # raises where no stage has the layer
        for source in sources:
            chosen[source.stage] = [n for n in wanted if n in source.layers]
            if not chosen[source.stage]:
                raise failure
    return chosen


def _mask(frame: _StoreFrame | _ArrayFrame, tokens: Any) -> np.ndarray | None:
    if tokens is None or (isinstance(tokens, str) and not tokens.strip()):
        return None
    if isinstance(tokens, str):
        expression = parse(tokens)
        return expression.evaluate({name: frame.column(name) for name in expression.columns})
    mask = np.asarray(tokens)
    if mask.dtype != bool or mask.shape != (frame.n_tokens,):
        raise UsageError(
            f"tokens is an array of {mask.dtype} with shape {mask.shape}: give a boolean mask of "
            f"shape ({frame.n_tokens},), or an expression such as 'position > 0'"
        )
    return mask


def _groups(frame: _StoreFrame | _ArrayFrame, by: str | None) -> Groups | None:
    if by is None:
        return None
    column = frame.column(by)
    if by in RESULT_NAMES:
        raise _taken(by, "results have a dimension or coordinate", RESULT_NAMES)
    if not isinstance(column, Categorical):
        values, codes = np.unique(column, return_inverse=True)
        column = Categorical(codes.astype(np.int32), values)
    if len(column.values) > 1000:
        raise UsageError(
            f"by={by!r} has {len(column.values):,} values: split by a column of at most 1,000"
        )
    return Groups(by, column.codes, column.values)


def check_free(groups: Groups | None, variables: Iterable[str]) -> None:
    """Refuse to split by a label that is named like a variable of the result."""
    if groups is not None and groups.name in variables:
        raise _taken(groups.name, "the result has a variable", variables)


def _taken(by: str, what: str, names: Iterable[str]) -> UsageError:
    return UsageError(
        f"by={by!r}: {what} of that name (taken: {', '.join(sorted(names))}). Ask an array in "
        f"which the label has another: store[STAGE].rename({{{by!r}: 'my_{by}'}}), by='my_{by}'"
    )


class _StoreFrame:
    """A store as data."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.path = str(store.path)
        self.stages = store.stages
        self.config = store.attrs.get("model", {}).get("config")
        self.n_tokens = store.n_tokens
        self.attrs = {
            "store": store.name,
            "store_id": store.id,
            "model": store.attrs.get("model", {}).get("name", ""),
            "config_hash": store.attrs["config_hash"],
        }

    def column(self, name: str) -> np.ndarray | Categorical:
        return self._store.column(name)

    def source(self, stage: str) -> Source:
        array = self._store.array(stage)
        layers = self._store.attrs["capture"]["stages"][stage]["layers"]
        # Inner chunks, not whole shards: what stays in the cache is worked on twice as fast.
        bounds = block_bounds(array)
        heads = self._store.heads(stage)
        token, sketched = f"{self._store.id}/{stage}", self._store.sketched(stage)
        return Source(stage, array, layers, bounds, token, value_type(array), heads, sketched)

    def strata(
        self, mask: np.ndarray | None, groups: Groups | None
    ) -> list[tuple[int, ...]] | None:
        if groups is None:
            return strata_of_groups(self._store, mask, None, 1)
        return strata_of_groups(self._store, mask, groups.codes, len(groups.values))


class _ArrayFrame:
    """A labelled array of the user's own as data."""

    def __init__(self, array: xr.DataArray) -> None:
        if not isinstance(array, xr.DataArray):
            raise UsageError(
                f"data is a {type(array).__name__}: give a Store, a path, or an xarray.DataArray "
                f"with dimensions {DIMS}"
            )
        missing = [d for d in ("token", "neuron") if d not in array.dims]
        extra = [d for d in array.dims if d not in DIMS]
        if missing or extra:
            raise UsageError(
                f"data has dimensions {array.dims}: it needs {DIMS} ('layer' may be left out)"
            )
        if "layer" not in array.dims:
            array = array.expand_dims("layer")
        self._array = array.transpose(*DIMS)
        self.n_tokens = self._array.sizes["token"]
        self.stages = [str(self._array.name or "activation")]
        self.config = None
        self.attrs: dict[str, Any] = {}
        self.path = ""

    def column(self, name: str) -> np.ndarray | Categorical:
        own = [str(c) for c, v in self._array.coords.items() if v.dims == ("token",)]
        if name not in own:
            raise UnknownNameError("column", name, own)
        # Labels are read when a query is built, as a store's are; never activations.
        coord = self._array.coords[name].compute(scheduler="synchronous")
        values, texts = coord.values, coord.attrs.get("label_values")
        if texts is not None and values.dtype.kind in "iu":  # a store's array: codes of texts
            return Categorical(values, np.array(texts, dtype=object))
        if values.dtype.kind in "OUT":
            return Categorical.of([str(v) for v in values])
        return values

    def source(self, stage: str) -> Source:
        array = self._array
        chunks = dict(zip(array.dims, array.chunks, strict=True)) if array.chunks else {}
        lengths = chunks.get("token")
        bounds = np.concatenate([[0], np.cumsum(lengths)]) if lengths else block_bounds(array)
        layers = (
            [int(n) for n in array.coords["layer"].values]
            if "layer" in array.coords
            else list(range(array.sizes["layer"]))
        )
        heads = array.coords["head"].values if "head" in array.coords else None
        data = array.data  # once: of an array that is still in its file, it is read here
        token = f"array-{id(data):x}"
        return Source(stage, data, layers, bounds, token, str(array.dtype), heads)

    def strata(self, mask: np.ndarray | None, groups: Groups | None) -> None:
        """An array of the user's own has no sketches."""
