"""Which arrays of a source are which stages and layers, and what their dimensions are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..aliases import stage_of
from ..errors import UnknownNameError, UsageError
from ..hookpoints import RESERVED
from ..schema import STAGES, pick
from .sources import Array, Piece, Pieces

__all__ = ["Wanted", "shown", "want"]

AXES = ("layer", "sequence", "position", "token", "head", "neuron")
_BY_NDIM = {2: ("token", "neuron"), 3: ("sequence", "position", "neuron")}


@dataclass(frozen=True)
class Wanted:
    """An array of the source, and what it is.

    Attributes
    ----------
    name : str
        In the source.
    stage : str
    layers : tuple of int
        One, or as many as the array's axis of layers has.
    axes : tuple of str
        What its dimensions are.
    """

    name: str
    stage: str
    layers: tuple[int, ...]
    axes: tuple[str, ...]

    def sizes(self, array: Array) -> dict[str, int]:
        if len(array.shape) != len(self.axes):
            raise UsageError(
                f"{shown(self.name)} has {len(array.shape)} dimensions, of shape {array.shape}: "
                f"say what they are, as axes='layer token neuron' ({', '.join(AXES)})"
            )
        sizes = dict(zip(self.axes, array.shape, strict=True))
        if len(self.layers) != sizes.get("layer", 1):
            raise UsageError(
                f"{shown(self.name)} has {sizes.get('layer', 1)} layers and "
                f"{len(self.layers)} are named"
            )
        return sizes

    def width(self, array: Array) -> int:
        sizes = self.sizes(array)
        return sizes["neuron"] * sizes.get("head", 1)

    def lengths(self, array: Array) -> np.ndarray | None:
        """Tokens of each sequence, where the array says."""
        sizes = self.sizes(array)
        if "sequence" in sizes:
            return np.full(sizes["sequence"], sizes["position"])
        return array.lengths

    def tokens(self, array: Array) -> int:
        sizes = self.sizes(array)
        return sizes["token"] if "token" in sizes else sizes["sequence"] * sizes["position"]

    def read(self, array: Array, start: int, stop: int) -> np.ndarray:
        """Values (layer, token, neuron) of some tokens."""
        sizes, first = self.sizes(array), start
        where = {axis: slice(None) for axis in self.axes}
        if "token" in sizes:
            where["token"] = slice(start, stop)
        else:
            whole = slice(start // sizes["position"], -(-stop // sizes["position"]))
            where["sequence"], first = whole, start - whole.start * sizes["position"]
        values = array.read(*where.values())
        order = [self.axes.index(axis) for axis in AXES if axis in self.axes]
        values = values.transpose(order)
        values = values.reshape(len(self.layers), -1, self.width(array))
        return values if "token" in sizes else values[:, first : first + stop - start]


def want(
    pieces: Pieces, stages: str | Sequence[str] | None, layers: Any, axes: str | None
) -> list[Wanted]:
    """Resolve what is asked of a source; of files without names it may make one piece of all.

    Raises
    ------
    UnknownNameError
        An array, layer or axis that is not there.
    UsageError
        An array of which it is not said what it is.
    """
    entries = stages.split(",") if isinstance(stages, str) else list(stages or [])
    if pieces.bare and any("=" in entry for entry in entries):
        pieces.openers = [_by_file(pieces)]
    return _wanted(pieces, [e.strip() for e in entries], layers, _axes(axes))


def _by_file(pieces: Pieces) -> Callable[[], Piece]:
    """Arrays without names, each called as its file."""
    every = list(zip(pieces.files, pieces.openers, strict=True))

    def opened() -> Piece:
        return {path.stem: opener()[""] for path, opener in every}

    return opened


def _axes(axes: str | None) -> tuple[str, ...] | None:
    if axes is None:
        return None
    names = tuple(axes.replace(",", " ").split())
    for name in names:
        if name not in AXES:
            raise UnknownNameError("axis", name, AXES)
    tokens = {"token"} & set(names) or {"sequence", "position"} <= set(names)
    both = "token" in names and {"sequence", "position"} & set(names)
    if len(set(names)) < len(names) or "neuron" not in names or not tokens or both:
        raise UsageError(
            f"axes {axes!r}: name each dimension once, with neuron, and either token or sequence "
            "and position; as 'layer token neuron'"
        )
    return names


def _wanted(
    pieces: Pieces, entries: Sequence[str], layers: Any, axes: tuple[str, ...] | None
) -> list[Wanted]:
    piece = pieces.openers[0]()
    found: list[tuple[str, str, int | None]] = []
    if not entries:
        found = list(_recognised(pieces, piece))
        if not found:
            raise UsageError(
                f"no name says what the arrays are: {_listed(piece)}. Say it, as stages="
                "'mlp_post=blocks.{layer}.mlp.hook_post', or of a single array stages='mlp_post' "
                "and layers=3"
            )
    for entry in entries:
        found += _of_entry(entry, pieces, piece)
    named = sorted({layer for *_, layer in found if layer is not None})
    taken = set(pick(layers, named, "layer")) if named and layers is not None else set(named)
    wanted = []
    for name, stage, layer in found:
        own = axes or _BY_NDIM.get(len(piece[name].shape), ())
        if layer is not None:
            if layer in taken:
                wanted.append(Wanted(name, stage, (layer,), own))
            continue
        size = dict(zip(own, piece[name].shape, strict=False)).get("layer")
        numbers = pick(layers, range(10_000), "layer") if layers is not None else None
        if numbers is None and size is None:
            raise UsageError(f"say which layer {shown(name)} is of, as layers=3")
        wanted.append(Wanted(name, stage, tuple(numbers or range(size or 0)), own))
    places = [(w.stage, layer) for w in wanted for layer in w.layers]
    twice = next((p for p in places if places.count(p) > 1), None)
    if twice:
        raise UsageError(f"two arrays are stage {twice[0]} at layer {twice[1]}: name one")
    for one in wanted:
        one.sizes(piece[one.name])
    return wanted


def _of_entry(entry: str, pieces: Pieces, piece: Piece) -> Iterator[tuple[str, str, int | None]]:
    """Arrays that an entry ``STAGE`` or ``STAGE=NAME`` names."""
    stage, equals, name = (part.strip() for part in entry.partition("="))
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", stage) or stage in RESERVED:
        raise UsageError(
            f"stage {stage!r} is not a name for a stage: use letters, digits and _, beginning with "
            f"a letter, and none of {', '.join(sorted(RESERVED))}"
        )
    if not equals:
        known = [f for f in _recognised(pieces, piece) if f[1] == stage]
        alone = [n for n, a in piece.items() if _is_activation(a)]
        if not known and len(alone) != 1:
            raise UsageError(
                f"which array is {stage}? Write '{stage}=NAME', with {{layer}} for the layer's "
                f"number, of {_listed(piece)}"
            )
        yield from known or [(alone[0], stage, None)]
        return
    pattern = re.escape(name).replace(r"\{layer\}", r"(\d{1,6})")
    matches = [(n, m) for n in piece if (m := re.fullmatch(pattern, n, re.ASCII))]
    if not matches:
        raise UnknownNameError("array", name, piece)
    for found, match in matches:
        yield found, stage, int(match[1]) if match.groups() else None


def _recognised(pieces: Pieces, piece: Piece) -> Iterator[tuple[str, str, int | None]]:
    """Arrays whose names say what they are: ours and TransformerLens's."""
    origin = pieces.facts.get("origin")
    own = origin.get("stages") if isinstance(origin, dict) else None
    known = {*STAGES, *(own if isinstance(own, dict) else ())} - RESERVED
    for name, array in piece.items():
        match = re.fullmatch(r"([A-Za-z][A-Za-z0-9_]*)\.(\d{1,6})", name, re.ASCII)
        if not _is_activation(array):
            continue
        if match and match[1] in known:
            yield name, match[1], int(match[2])
        elif "hook_" in name:
            yield name, *stage_of(name)


def _is_activation(array: Array) -> bool:
    return len(array.shape) >= 2 and "float" in array.dtype


def _listed(piece: Piece) -> str:
    names = [f"{shown(n)} {a.dtype} {tuple(a.shape)}" for n, a in piece.items()]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def shown(name: str) -> str:
    return repr(name) if name else "the array"
