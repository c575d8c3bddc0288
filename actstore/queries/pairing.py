"""Which views are compared with which: stages within a layer, layers within a stage, any two."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np

from ..errors import UnknownNameError, UsageError
from ..schema import Categorical
from .joint import View
from .selection import Data, Names, Numbers, Selection, Source, select
from .units import place_of, view_of

__all__ = ["Compared", "Pairs", "Row", "pair_up", "select_second"]

Pairs = str | Sequence[str | tuple[str, str]] | None

_ONE = re.compile(r"\s*([^\s:@]+)(?:@(-?\d+))?\s*")


@dataclass(frozen=True)
class Row:
    """Pairs of views that are read together.

    Attributes
    ----------
    place : str
    views : tuple of View
    pairs : tuple of (int, int) or None
        Places among the views, for each pair of the result; None where a view is not there.
    """

    place: str
    views: tuple[View, ...]
    pairs: tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True)
class Compared:
    """All the comparisons of a query.

    Attributes
    ----------
    dim : str or None
        What the rows are along: "layer" or "stage"; None where there is but one.
    labels : sequence
        Of the rows.
    rows : list of Row
    coords : dict
        Of the dimension ``pair``.
    """

    dim: str | None
    labels: Any
    rows: list[Row]
    coords: Mapping[str, tuple[str, Any]]


def select_second(data_b: Data, selection: Selection, stages: Names, neurons: Numbers) -> Selection:
    """The second data of a comparison: another store over the same tokens.

    Raises
    ------
    UsageError
        The tokens are not the same.
    """
    second = select(data_b, stages, None, None, neurons, None)
    if second.n_tokens != selection.n_tokens:
        raise UsageError(
            f"data_b has {second.n_tokens:,} tokens and data {selection.n_tokens:,}: only data "
            "over the same tokens can be compared"
        )
    for name in ("token_id", "sequence", "position"):
        try:
            a, b = selection.column(name), second.column(name)
        except UnknownNameError:  # an array of the user's own need not have it
            continue
        if not np.array_equal(np.asarray(a), np.asarray(b)):
            at = int(np.flatnonzero(np.asarray(a) != np.asarray(b))[0])
            raise UsageError(
                f"data_b has other tokens than data: {name} differs from token {at} on. Only data "
                "over the same tokens can be compared"
            )
    _check_texts(selection, second)
    return second


def _check_texts(selection: Selection, second: Selection) -> None:
    """Refuse equal token ids of different tokenizers."""
    try:
        a, b = selection.column("token_text"), second.column("token_text")
    except UnknownNameError:
        return
    if isinstance(a, Categorical) and isinstance(b, Categorical):
        used = np.unique(a.codes)
        differ = used[a.values[used] != b.values[used]]
        if len(differ):
            raise UsageError(
                f"data_b has other tokens than data: the text of token {differ[0]} is "
                f"{b.values[differ[0]]!r} there and {a.values[differ[0]]!r} here"
            )


def pair_up(selection: Selection, second: Selection | None, pairs: Pairs) -> Compared:
    """Resolve the parameter ``pairs``.

    Parameters
    ----------
    selection : Selection
    second : Selection or None
        Of ``data_b``, from which the second view of every pair is taken then.
    pairs : str, sequence or None
        None: all pairs of stages within each layer, but for ``hidden``, which is the input of a
        block and not within it; with a second data, every stage with itself. "layers": all pairs
        of layers within each stage. Else "a:b" each, with stages, or with stages at layers as
        "hidden@3:mlp_out@2".
    """
    other = second or selection
    if pairs == "layers":
        return _layer_pairs(selection, other, second is not None)
    if pairs is None:
        asked = _default(selection, second)
        return _stage_pairs(selection, other, asked)
    ends = [_ends(entry) for entry in _entries(pairs)]
    at_layers = [layer is not None for pair in ends for _, layer in pair]
    if all(at_layers):
        return _single(selection, other, ends)
    if any(at_layers):
        raise UsageError(f"pairs {pairs!r}: give layers for all stages, as a@3:b@4, or for none")
    return _stage_pairs(selection, other, [(a[0], b[0]) for a, b in ends])


def _entries(pairs: str | Sequence[Any]) -> list[Any]:
    entries = pairs.split(",") if isinstance(pairs, str) else list(pairs)
    if not entries:
        raise UsageError("pairs is empty: leave it out for all pairs of stages")
    return entries


def _ends(entry: Any) -> list[tuple[str, int | None]]:
    parts = entry.split(":") if isinstance(entry, str) else list(entry)
    matches = [_ONE.fullmatch(str(p)) for p in parts]
    if len(matches) != 2 or not all(matches):
        raise UsageError(
            f"pair {entry!r} is not understood: write mlp_in:mlp_out, or with layers "
            "hidden@3:mlp_out@2, or 'layers' for all pairs of layers within each stage"
        )
    return [(m[1], int(m[2]) if m[2] else None) for m in matches if m]


def _default(selection: Selection, second: Selection | None) -> list[tuple[str, str]]:
    names = [s.stage for s in selection.sources]
    if second is not None:
        both = [(n, n) for n in names if n in {s.stage for s in second.sources}]
        if not both:
            others = [s.stage for s in second.sources]
            raise UsageError(f"data has stages {names} and data_b {others}: name pairs, as a:b")
        return both
    found = list(combinations([n for n in names if n != "hidden"], 2))
    if not found:
        raise UsageError(
            f"stages {names} make no pair within a layer: ask for more stages, for pairs='layers', "
            "or name pairs, as a:b"
        )
    return found


def _source(selection: Selection, stage: str) -> Source:
    for source in selection.sources:
        if source.stage == stage:
            return source
    raise UnknownNameError("stage of a pair", stage, [s.stage for s in selection.sources])


def _stage_pairs(selection: Selection, other: Selection, asked: list[tuple[str, str]]) -> Compared:
    first = [_source(selection, a) for a, _ in asked]
    second = [_source(other, b) for _, b in asked]
    layers = sorted({n for s in first for n in selection.layers[s.stage]})
    rows = []
    for layer in layers:
        made = _Collected()
        for a, b in zip(first, second, strict=True):
            there = layer in selection.layers[a.stage] and layer in b.layers
            made.add(selection, a, layer, other, b, layer, there)
        if any(p is not None for p in made.pairs):
            rows.append((layer, made.done(place_of(selection, "layer", layer))))
    if not rows:
        raise UsageError(f"no layer of {layers} is there for both stages of a pair")
    ends: dict[str, list[Any]] = {
        "stage_a": [x for x, _ in asked],
        "stage_b": [y for _, y in asked],
    }
    coords = _pair_coords([f"{x}:{y}" for x, y in asked], **ends)
    return Compared("layer", [n for n, _ in rows], [r for _, r in rows], coords)


def _layer_pairs(selection: Selection, other: Selection, across: bool) -> Compared:
    names = [s.stage for s in selection.sources]
    if across:
        names = [n for n in names if n in {s.stage for s in other.sources}]
    own = {n: selection.layers[n] for n in names}
    others = {n: other.layers[n] if across else own[n] for n in names}
    cross = sorted(
        {
            pair
            for n in names
            for pair in (product(own[n], others[n]) if across else combinations(own[n], 2))
        }
    )
    if not cross:
        raise UsageError("there is but one layer of each stage: pairs of layers need two")
    rows = []
    for name in names:
        made, a, b = _Collected(), _source(selection, name), _source(other, name)
        for i, j in cross:
            made.add(selection, a, i, other, b, j, i in own[name] and j in others[name])
        rows.append(made.done(place_of(selection, "stage", name)))
    coords = _pair_coords(
        [f"{i}:{j}" for i, j in cross], layer_a=[i for i, _ in cross], layer_b=[j for _, j in cross]
    )
    return Compared("stage", np.array(names, object), rows, coords)


def _single(selection: Selection, other: Selection, ends: list[Any]) -> Compared:
    made = _Collected()
    for (stage_a, layer_a), (stage_b, layer_b) in ends:
        a, b = _source(selection, stage_a), _source(other, stage_b)
        for source, layer in ((a, layer_a), (b, layer_b)):
            if layer not in source.layers:
                raise UnknownNameError(f"layer of {source.stage}", layer, source.layers)
        made.add(selection, a, layer_a, other, b, layer_b, True)
    columns: dict[str, list[Any]] = {
        "stage_a": [a for (a, _), _ in ends],
        "layer_a": [n for (_, n), _ in ends],
        "stage_b": [b for _, (b, _) in ends],
        "layer_b": [n for _, (_, n) in ends],
    }
    names = [f"{a}@{i}:{b}@{j}" for (a, i), (b, j) in ends]
    return Compared(
        None, [0], [made.done(place_of(selection, "pairs", ""))], _pair_coords(names, **columns)
    )


def _pair_coords(names: list[str], **columns: list[Any]) -> dict[str, tuple[str, Any]]:
    def array(values: list[Any]) -> np.ndarray:
        return np.array(values, object if isinstance(values[0], str) else np.int64)

    return {k: ("pair", array(v)) for k, v in {"pair": names, **columns}.items()}


class _Collected:
    """Collects the views of a row, each once."""

    def __init__(self) -> None:
        self._views: dict[Any, View] = {}
        self.pairs: list[tuple[int, int] | None] = []

    def add(
        self,
        selection: Selection,
        a: Source,
        layer_a: int,
        other: Selection,
        b: Source,
        layer_b: int,
        there: bool,
    ) -> None:
        if not there:
            self.pairs.append(None)
            return
        places = []
        for own, source, layer in ((selection, a, layer_a), (other, b, layer_b)):
            view = view_of(source, layer, own.neurons[source.stage])
            self._views.setdefault(view.key, view)
            places.append(list(self._views).index(view.key))
        self.pairs.append((places[0], places[1]))

    def done(self, place: str) -> Row:
        return Row(place, tuple(self._views.values()), tuple(self.pairs))
