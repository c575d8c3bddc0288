"""Several stores as one, end to end along tokens, with a label that says which.

Nothing is copied: a read goes to the store that has the tokens, and sketches of all of them
together are merged from each one's. Whatever takes a store takes this one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any
from urllib.parse import parse_qsl, urlencode

import dask.array as da
import numpy as np
import xarray as xr

from .arrays import ShardedArray, full_key
from .errors import UnknownNameError, UsageError
from .schema import TOKEN_COORDS, Categorical
from .sketched import Sketches
from .stats.moments import merge_moments
from .stats.streaming import State
from .store import Store, open_store

__all__ = ["ConcatArray", "ConcatStore", "block_bounds", "concat", "open_any", "value_type"]

_SLICE_TOKENS = 1024
"""What is read at a time of arrays that are in no blocks of ours."""

_SCHEME = "concat:"
_SHIFTED = {"input": "inputs", "start": "inputs", "sequence": "sequences"}
"""Columns that count something of their own store."""


def concat(
    stores: Mapping[str, Store | str | os.PathLike[str]], *, label: str = "store"
) -> ConcatStore:
    """See several stores as one, end to end, with a label that tells their tokens apart.

    Nothing is read or copied. Every query takes the result as it takes a store: split with
    ``by="store"``, or ask for some with ``tokens="store == 'base'"``.

    Parameters
    ----------
    stores : mapping of str to Store or path
        What the label calls each.
    label : str
        Name of the label.

    Returns
    -------
    ConcatStore
        With the stages, layers and columns that all of them have. Numbers of inputs and sequences
        go on from store to store; positions, token ids and labels are as they were.

    Raises
    ------
    UsageError
        No store; no stage or layer that all have; a stage of different widths; other tokenizers;
        a column that has the label's name.

    Examples
    --------
    >>> import numpy as np, tempfile, actstore
    >>> folder = tempfile.TemporaryDirectory()
    >>> for name, value in (("base", 1), ("chat", 3)):
    ...     corpus = actstore.build_corpus([[1, 2, 3]])
    ...     plan = actstore.Plan.build(corpus, [actstore.StageSpec("mlp_post", (0,), 16)])
    ...     with actstore.Writer(f"{folder.name}/{name}.zarr", plan) as writer:
    ...         writer.put("mlp_post", 0, 0, np.full((3, 16), value, "float32"))
    >>> both = concat({name: f"{folder.name}/{name}.zarr" for name in ("base", "chat")})
    >>> both["mlp_post"].sizes["token"]
    6
    >>> actstore.moments(both, by="store", per="layer").compute()["mean"].values.tolist()
    [[1.0, 3.0]]
    >>> folder.cleanup()
    """
    if isinstance(stores, str | os.PathLike) or not isinstance(stores, Mapping):
        raise UsageError(
            f"stores is a {type(stores).__name__}: give a mapping of names to stores, as "
            '{"base": a, "chat": b}'
        )
    if not stores:
        raise UsageError('there are no stores: give at least one, as {"base": a, "chat": b}')
    opened = {
        str(name): store if isinstance(store, Store) else open_any(store)
        for name, store in stores.items()
    }
    return ConcatStore(opened, label)


def open_any(path: str | os.PathLike[str]) -> Store:
    """Open a store, or several by the path of a `ConcatStore`."""
    text = os.fspath(path)
    if not text.startswith(_SCHEME):
        return open_store(path)
    (_, label), *parts = parse_qsl(text.removeprefix(_SCHEME), keep_blank_values=True)
    return concat(dict(parts), label=label)


class ConcatArray:
    """Arrays (layer, token, neuron) end to end along tokens, sliceable as one.

    Holds what each part holds: paths, so it can be sent to workers.

    Parameters
    ----------
    parts : sequence of array
        Of equal width.
    layers : sequence of sequence of int
        Of each part, its layer indices that are the layers of the whole.

    Attributes
    ----------
    shape, dtype, ndim
        Of the whole.
    source_dtype : str
        What the values are, as in `Layout`; of parts that differ, the type that holds all.
    """

    ndim = 3

    def __init__(self, parts: Sequence[Any], layers: Sequence[Sequence[int]]) -> None:
        self.parts, self.layers = tuple(parts), tuple(map(tuple, layers))
        self.starts = np.cumsum([0, *(part.shape[1] for part in parts)])
        self.shape = (len(layers[0]), int(self.starts[-1]), int(parts[0].shape[2]))
        self.dtype = np.result_type(*(part.dtype for part in parts))
        kinds = {value_type(part) for part in parts}
        self.source_dtype = kinds.pop() if len(kinds) == 1 else str(self.dtype)

    def __getitem__(self, key: Any) -> np.ndarray:
        layer, token, neuron = full_key(key)
        if isinstance(layer, (int, np.integer)):
            return self._layer(range(self.shape[0])[int(layer)], token, neuron)
        chosen = [self._layer(int(i), token, neuron) for i in np.arange(self.shape[0])[layer]]
        if chosen:
            return np.stack(chosen)
        return self._layer(0, token, neuron)[np.newaxis][:0]

    def _layer(self, layer: int, token: Any, neuron: Any) -> np.ndarray:
        if isinstance(token, (int, np.integer)):
            at = range(self.shape[1])[int(token)]
            part = int(np.searchsorted(self.starts, at, "right")) - 1
            return self._read(part, layer, at - int(self.starts[part]), neuron)
        if isinstance(token, slice):
            rows = range(self.shape[1])[token]
            if rows.step < 0:
                return self._run(layer, rows[::-1], neuron)[::-1]
            return self._run(layer, rows, neuron)
        wanted = np.asarray(token)
        if wanted.dtype == bool:
            wanted = np.flatnonzero(wanted)
        wanted = np.where(wanted < 0, wanted + self.shape[1], wanted).astype(np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < self.shape[1]:
            raise IndexError(f"tokens are not all within {self.shape[1]}")
        owner = np.searchsorted(self.starts, wanted, "right") - 1
        shape = len(wanted), *self._read(0, layer, slice(0, 0), neuron).shape[1:]
        out = np.empty(shape, self.dtype)
        for part in np.unique(owner):
            mine = owner == part
            out[mine] = self._read(int(part), layer, wanted[mine] - self.starts[part], neuron)
        return out

    def _run(self, layer: int, rows: range, neuron: Any) -> np.ndarray:
        found = []
        for part, (start, stop) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            low, high = (max(0, -(-(int(t) - rows.start) // rows.step)) for t in (start, stop))
            own = rows[low:high]
            if own:
                inside = slice(own.start - int(start), own.stop - int(start), own.step)
                found.append(self._read(part, layer, inside, neuron))
        if len(found) == 1:
            return found[0]
        return np.concatenate(found or [self._read(0, layer, slice(0, 0), neuron)])

    def _read(self, part: int, layer: int, tokens: Any, neuron: Any) -> np.ndarray:
        at = self.layers[part][layer]
        values = np.asarray(self.parts[part][at, tokens, neuron])
        return values.astype(self.dtype, copy=False)


def value_type(array: Any) -> str:
    """What an array's values are: "bfloat16" where they are such, though stored as float32."""
    if isinstance(array, ConcatArray):
        return array.source_dtype
    return array.layout.source_dtype if isinstance(array, ShardedArray) else str(array.dtype)


def block_bounds(array: Any, rows: str = "chunk_rows") -> np.ndarray:
    """Token numbers at which inner chunks begin and end, or whole shards ("rows")."""
    if isinstance(array, ConcatArray):
        parts = zip(array.starts, array.parts, strict=False)
        inner = [start + block_bounds(part, rows)[:-1] for start, part in parts]
        return np.concatenate([*inner, array.starts[-1:]])
    tokens = array.shape[1]
    step = getattr(array.layout, rows) if isinstance(array, ShardedArray) else _SLICE_TOKENS
    return np.append(np.arange(0, tokens, step), tokens)


@dataclass(frozen=True)
class ConcatSketched:
    """Sketches of several stores as one. The strata of each follow those of the one before.

    Attributes
    ----------
    parts : tuple of Sketches
    layers : tuple of tuple of int
        As in `ConcatArray`.
    strata : tuple of int
        Number of strata of each part.
    starts : tuple of int
        First token of each part.
    """

    parts: tuple[Sketches, ...]
    layers: tuple[tuple[int, ...], ...]
    strata: tuple[int, ...]
    starts: tuple[int, ...]

    def moments(self, strata: Sequence[int], layer_index: int) -> State:
        """Moments of a union of strata, each (neuron,)."""
        own = [self.parts[i].moments(s, layer) for i, s, layer in self._split(strata, layer_index)]
        return reduce(merge_moments, own)

    def counts(self, strata: Sequence[int], layer_index: int) -> np.ndarray:
        """Values by their upper 16 bits, (65536,)."""
        own = [self.parts[i].counts(s, layer) for i, s, layer in self._split(strata, layer_index)]
        return np.sum(own, axis=0)

    def extremes(
        self, strata: Sequence[int], layer_index: int, largest: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """The largest or smallest values and their tokens, (neuron, rank), best first."""
        values, tokens = [], []
        for i, own, layer in self._split(strata, layer_index):
            value, token = self.parts[i].extremes(own, layer, largest)
            values.append(value)
            tokens.append(np.where(token < 0, -1, token + self.starts[i]))
        ranks = values[0].shape[1]
        value, token = np.concatenate(values, axis=1), np.concatenate(tokens, axis=1)
        # As in one store: empty places last, then by value, then the earlier token.
        order = np.lexsort((token, -value if largest else value, token < 0), axis=1)[:, :ranks]
        return np.take_along_axis(value, order, 1), np.take_along_axis(token, order, 1)

    def norms(self, layer_index: int) -> np.ndarray:
        """Euclidean norm of each token, (token,)."""
        own = zip(self.parts, self.layers, strict=True)
        return np.concatenate([part.norms(layers[layer_index]) for part, layers in own])

    def _split(
        self, strata: Sequence[int], layer_index: int
    ) -> Iterator[tuple[int, list[int], int]]:
        """Each part that has some of the strata: its number, its strata and its layer index."""
        first = 0
        for i, count in enumerate(self.strata):
            own = [s - first for s in strata if first <= s < first + count]
            if own:
                yield i, own, self.layers[i][layer_index]
            first += count


class ConcatStore(Store):
    """Several stores as one, read only. Made by `actstore.concat`.

    Attributes
    ----------
    parts : dict of str to Store
        By name, in order.
    label : str
        The column that says which store a token is of.
    path : str
        What other processes open it by, with `open_any`.
    """

    def __init__(self, parts: Mapping[str, Store], label: str = "store") -> None:
        self.parts, self.label = dict(parts), label
        self._all = tuple(self.parts.values())
        named = {name: part.path for name, part in self.parts.items()}
        self.path = _SCHEME + urlencode({"": label, **named})
        for part in self._all:
            if label in part.columns:
                raise UsageError(
                    f"{part.name} has a column {label!r} already: give the label another name, as "
                    'concat(..., label="run")'
                )
        self.attrs = self._joined_attrs()
        self.vocabulary = _common_vocabulary(self.parts)
        self._starts = np.cumsum([0, *(part.n_tokens for part in self._all)])

    def _joined_attrs(self) -> dict[str, Any]:
        every = [part.attrs for part in self._all]
        models = [a.get("model", {}) for a in every]
        names = list(dict.fromkeys(str(model.get("name", "")) for model in models))
        same = all(model == models[0] for model in models)
        ids = [self.label, [[name, part.id] for name, part in self.parts.items()]]
        hashes = [a["config_hash"] for a in every]
        return {
            "format": max(a["format"] for a in every),
            "id": _digest(ids)[:32],
            "config_hash": hashes[0] if len(set(hashes)) == 1 else _digest(hashes),
            "capture": {
                "stages": _common_stages(self._all),
                "block_tokens": max(a["capture"]["block_tokens"] for a in every),
            },
            "corpus": {
                count: sum(a["corpus"][count] for a in every)
                for count in ("sequences", "inputs", "tokens")
            },
            **({"model": models[0] if same else {"name": " + ".join(names)}} if any(names) else {}),
            "nonfinite": sum(a.get("nonfinite", 0) for a in every),
        }

    # -- what there is -----------------------------------------------------------------------

    @cached_property
    def stages(self) -> list[str]:
        """Stages that all stores have, in the order in which a block computes them."""
        return list(self.attrs["capture"]["stages"])

    @property
    def name(self) -> str:
        return " + ".join(self.parts)

    @property
    def labels(self) -> list[str]:
        """Names of the label columns that tokens of all stores carry, the stores' names first."""
        every = [part.labels for part in self._all]
        return [self.label, *(n for n in every[0] if all(n in own for own in every))]

    def info(self) -> dict[str, Any]:
        """What the stores hold together, JSON only; as `Store.info`."""
        own = [part.info() for part in self._all]
        stages = {}
        for stage, facts in self.attrs["capture"]["stages"].items():
            nbytes = [i["stages"][stage] for i in own]
            stages[stage] = {
                **facts,
                "nbytes": sum(
                    s["nbytes"] // len(s["layers"]) * len(facts["layers"]) for s in nbytes
                ),
                "meaning": nbytes[0]["meaning"],
            }
        outcomes = self.outcomes
        return {
            "name": self.name,
            "id": self.id,
            "format": self.attrs["format"],
            **self.attrs["corpus"],
            "block_tokens": self.attrs["capture"]["block_tokens"],
            "stages": stages,
            "labels": self.labels,
            "predictions": 0 if self.predictions is None else self.predictions.sizes["rank"],
            "outcomes": [] if outcomes is None else [str(n) for n in outcomes.data_vars],
            **({"model": self.attrs["model"]} if "model" in self.attrs else {}),
            "notes": {},
            "stores": {name: part.id for name, part in self.parts.items()},
        }

    # -- data --------------------------------------------------------------------------------

    def array(self, stage: str) -> ConcatArray:  # type: ignore[override]
        """A stage's activations as a sliceable array, every checksum checked, without labels."""
        return ConcatArray([part.array(stage) for part in self._all], self._layers(stage))

    def _layers(self, stage: str) -> list[list[int]]:
        """Of each store, the indices of the layers that all have."""
        wanted = self.attrs["capture"]["stages"][stage]["layers"]
        every = [part.attrs["capture"]["stages"][stage]["layers"] for part in self._all]
        return [[own.index(n) for n in wanted] for own in every]

    def heads(self, stage: str) -> np.ndarray | None:
        """Attention head of each neuron, where all stores say the same."""
        first, *others = (part.heads(stage) for part in self._all)
        if first is None or not all(h is not None and np.array_equal(h, first) for h in others):
            return None
        return first

    @property
    def columns(self) -> list[str]:
        """Every name that `column` knows."""
        known = [self.label, *_common(part.columns for part in self._all)]
        if self.vocabulary is None and "token_text" in known:
            known.remove("token_text")
        return known

    def column(self, name: str) -> np.ndarray | Categorical:
        """A column over the tokens of all stores, in memory; as `Store.column`."""
        if name == self.label:
            codes = np.repeat(np.arange(len(self._all), dtype=np.int32), np.diff(self._starts))
            return Categorical(codes, np.array(list(self.parts), dtype=object))
        if name not in self.columns:
            raise UnknownNameError("column", name, self.columns, "All stores must have it.")
        columns = [part.column(name) for part in self._all]
        if name in _SHIFTED:
            shifts = self._shifts(_SHIFTED[name])
            columns = [np.asarray(c) + s for c, s in zip(columns, shifts, strict=True)]
        return _joined(columns)

    def _shifts(self, count: str) -> np.ndarray:
        """Inputs or sequences in the stores before each."""
        return np.cumsum([0, *(part.attrs["corpus"][count] for part in self._all)])[:-1]

    def sketched(self, stage: str) -> ConcatSketched | None:
        """A stage's sketches; None unless all stores have them, of values of the same type."""
        parts = [part.sketched(stage) for part in self._all]
        kinds = {part.attrs["capture"]["stages"][stage]["dtype"] for part in self._all}
        every = [part.strata for part in self._all]
        if len(kinds) > 1 or any(p is None for p in parts) or any(s is None for s in every):
            return None
        return ConcatSketched(
            tuple(p for p in parts if p is not None),
            tuple(map(tuple, self._layers(stage))),
            tuple(len(s[0]) for s in every if s is not None),
            tuple(self._starts[:-1].tolist()),
        )

    @cached_property
    def strata(self) -> tuple[tuple[str, ...], np.ndarray] | None:
        """Classes of tokens that the sketches keep apart, each store's its own."""
        names: list[str] = []
        codes = []
        for name, part in self.parts.items():
            own = part.strata
            if own is None:
                return None
            codes.append(own[1].astype(np.int32) + len(names))
            names += [f"{name}:{stratum}" for stratum in own[0]]
        return tuple(names), np.concatenate(codes)

    def _dataset(self, stage: str) -> xr.Dataset:
        array = self.array(stage)
        blocks = block_bounds(array, "rows")
        lazy = da.from_array(
            array,
            chunks=((1,) * array.shape[0], tuple(np.diff(blocks).tolist()), (array.shape[2],)),
            asarray=False,
            name=f"{stage}-{self.id}",
            meta=np.empty((0, 0, 0), array.dtype),
        )
        first = self._all[0]._dataset(stage)
        coords: dict[str, Any] = {
            str(k): (v.dims, v.values[self._layers(stage)[0]] if v.dims == ("layer",) else v.values)
            for k, v in first.coords.items()
            if "token" not in v.dims
        }
        for name in [*TOKEN_COORDS, *self.labels]:
            coords[name] = ("token", *_as_codes(self.column(name)))
        values = xr.DataArray(lazy, coords, ("layer", "token", "neuron"))
        return values.assign_attrs(first["activation"].attrs).to_dataset(name="activation")

    @property
    def tree(self) -> xr.DataTree:
        """Everything as one `xarray.DataTree`, lazily."""
        groups = {stage: self._dataset(stage) for stage in self.stages}
        groups |= {"inputs": self.inputs, "sequences": self.sequences}
        for name, table in (("predictions", self.predictions), ("outcomes", self.outcomes)):
            if table is not None:
                groups[name] = table
        return xr.DataTree.from_dict(groups)

    @cached_property
    def tokens(self) -> xr.Dataset:
        """Columns of the tokens of all stores (token,); as `Store.tokens`, in memory."""
        texts = [] if self.vocabulary is None else ["token_text"]
        names = [*TOKEN_COORDS, *texts, *self.labels]
        dataset = xr.Dataset({name: ("token", _decoded(self.column(name))) for name in names})
        return dataset if self.outcomes is None else dataset.assign(self.outcomes.data_vars)

    def _tables(self, group: str) -> xr.Dataset | None:
        every = [getattr(part, group) for part in self._all]
        if any(table is None for table in every):
            return None
        if len({table.sizes.get("rank") for table in every}) > 1:  # some keep more than others
            return None
        return _end_to_end(every, "token")

    @cached_property
    def inputs(self) -> xr.Dataset:
        """Every input token of all stores (input,), kept or not."""
        shifts = self._shifts("sequences")
        parts = [
            part.inputs.assign(sequence=part.inputs["sequence"] + shift)
            for part, shift in zip(self._all, shifts, strict=True)
        ]
        return self._with_names(_end_to_end(parts, "input"), parts, "input")

    @cached_property
    def sequences(self) -> xr.Dataset:
        """One row a sequence of all stores (sequence,): text, start, length, labels."""
        shifts = self._shifts("inputs")
        parts = [
            part.sequences.assign(start=part.sequences["start"] + shift)
            for part, shift in zip(self._all, shifts, strict=True)
        ]
        return self._with_names(_end_to_end(parts, "sequence"), parts, "sequence")

    def _with_names(self, whole: xr.Dataset, parts: Sequence[xr.Dataset], dim: str) -> xr.Dataset:
        names = np.repeat(np.array(list(self.parts), object), [p.sizes[dim] for p in parts])
        return whole.assign({self.label: (dim, names)})

    def decode(self, token: int, before: int = 10, after: int = 0) -> str:
        """Text around a token, from its own store; as `Store.decode`."""
        if not -self.n_tokens <= token < self.n_tokens:
            raise UsageError(f"token {token} is not within the stores' {self.n_tokens:,}")
        at = token % self.n_tokens
        part = int(np.searchsorted(self._starts, at, "right")) - 1
        return self._all[part].decode(at - int(self._starts[part]), before, after)


def _common_vocabulary(parts: Mapping[str, Store]) -> np.ndarray | None:
    """Text of each token id, where all stores have them; one may have some more than another."""
    known = {n: part.vocabulary for n, part in parts.items() if part.vocabulary is not None}
    if len(known) < len(parts):
        return None
    longest = max(known.values(), key=len)
    for name, own in known.items():
        differ = np.flatnonzero(own != longest[: len(own)])
        if len(differ):
            raise UsageError(
                f"the stores have different tokenizers: token {differ[0]} is "
                f"{own[differ[0]]!r} in {name} and {longest[differ[0]]!r} in another. Ask each on "
                "its own"
            )
    return longest


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _common(lists: Iterable[list[Any]]) -> list[Any]:
    """What all lists have, in the order of the first."""
    first, *others = lists
    return [entry for entry in first if all(entry in own for own in others)]


def _common_stages(parts: Sequence[Store]) -> dict[str, dict[str, Any]]:
    """Stages and layers that all stores have, with their width and the type that holds all."""
    stages = {}
    for stage in _common(part.stages for part in parts):
        own = [part.attrs["capture"]["stages"][stage] for part in parts]
        widths = [s["width"] for s in own]
        if len(set(widths)) > 1:
            raise UsageError(
                f"stage {stage} has {' and '.join(map(str, dict.fromkeys(widths)))} neurons: "
                "stores are concatenated where their stages are as wide. Export the stages that "
                "are, or ask each store on its own"
            )
        layers = _common(s["layers"] for s in own)
        kinds = list(dict.fromkeys(s["dtype"] for s in own))
        if layers:
            dtype = kinds[0] if len(kinds) == 1 else "float32"
            stages[stage] = {"layers": layers, "width": widths[0], "dtype": dtype}
    if not stages:
        have = "; ".join(f"{part.name} has {', '.join(part.stages)}" for part in parts)
        raise UsageError(f"there is no stage with a layer that all stores have: {have}")
    return stages


def _joined(columns: Sequence[np.ndarray | Categorical]) -> np.ndarray | Categorical:
    """Columns end to end; of numbers and texts together, texts."""
    if not any(isinstance(c, Categorical) for c in columns):
        return np.concatenate([np.asarray(c) for c in columns])
    index: dict[str, int] = {}
    codes = []
    for column in columns:
        if not isinstance(column, Categorical):
            column = Categorical.of([str(v) for v in column.tolist()])
        table = [index.setdefault(str(v), len(index)) for v in column.values]
        codes.append(np.array(table, np.int32)[column.codes])
    return Categorical(np.concatenate(codes), np.array(list(index), dtype=object))


def _as_codes(column: np.ndarray | Categorical) -> tuple[np.ndarray, dict[str, Any]]:
    """Values and attributes, texts as codes, as stores have them."""
    if isinstance(column, Categorical):
        return column.codes, {"label_values": [str(v) for v in column.values]}
    return column, {}


def _decoded(column: np.ndarray | Categorical) -> np.ndarray:
    return column.decode() if isinstance(column, Categorical) else column


def _end_to_end(tables: Sequence[xr.Dataset], dim: str) -> xr.Dataset:
    """Tables under one another, with the variables that all have."""
    names = _common(list(t.data_vars) for t in tables)
    return xr.concat([t[names] for t in tables], dim=dim, combine_attrs="override")
