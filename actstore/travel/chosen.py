"""What leaves a store: some stages, layers and tokens, as they will be written, and how exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numcodecs
import numpy as np

from ..errors import HalfOverflowError, UnknownNameError, UsageError
from ..plan import DTYPES
from ..queries.selection import Selection, Source, select
from ..queries.units import view_of
from ..schema import Categorical
from ..store import Store
from ..writer import to_bfloat16

__all__ = ["Chosen", "ChosenStage", "Fidelity", "choose"]

READ_NBYTES = 2**25
"""What is read of a layer at a time."""

MANTISSA = {"float32": 23, "float16": 10, "bfloat16": 7}
"""Bits of an element's mantissa that are kept in memory; a leading 1 stands before them."""

_NOT_LABELS = {"input", "kept", "start", "length", "text", "char_start", "char_end"}


@dataclass
class Fidelity:
    """How far the values written are from those in the store.

    Attributes
    ----------
    largest, largest_relative : float
        Greatest difference, and greatest difference by the value's own size.
    """

    largest: float = 0.0
    largest_relative: float = 0.0
    squares: float = 0.0
    count: int = 0

    @property
    def rms(self) -> float:
        """Root mean square of the differences."""
        return float(np.sqrt(self.squares / self.count)) if self.count else 0.0

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        """Take in some values; NaN and inf, which stay as they are, make no difference."""
        there = np.isfinite(before)
        old = before[there].astype(np.float64)
        difference = np.abs(after[there].astype(np.float64) - old)
        self.count += difference.size
        if difference.any():
            self.squares += float(np.square(difference).sum())
            self.largest = max(self.largest, float(difference.max()))
            off = difference > 0  # what is 0 stays 0
            relative = float((difference[off] / np.abs(old[off])).max())
            self.largest_relative = max(self.largest_relative, relative)


@dataclass
class ChosenStage:
    """One stage of what is chosen.

    Attributes
    ----------
    name : str
    source : Source
    layers : list of int
    tokens : ndarray of int (token,)
        In the store.
    dtype : {"float32", "float16", "bfloat16"}
        What the values become.
    keep_bits : int or None
        Bits of the mantissa that are kept.
    fidelity : Fidelity
        Of what has been read so far.
    """

    name: str
    source: Source
    layers: list[int]
    tokens: np.ndarray
    dtype: str
    keep_bits: int | None
    fidelity: Fidelity = field(default_factory=Fidelity)

    @property
    def width(self) -> int:
        return self.source.width

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def nbytes(self) -> int:
        return len(self.layers) * len(self.tokens) * self.width * self.itemsize

    @property
    def exact(self) -> bool:
        """Whether the values stay as they are."""
        kinds = {"float16": ("float16", "float32"), "bfloat16": ("bfloat16", "float32")}
        return self.keep_bits is None and self.dtype in kinds.get(self.source.dtype, ("float32",))

    @property
    def step(self) -> int:
        """Tokens that are read at a time."""
        return max(1, READ_NBYTES // (4 * self.width))

    def read(self, layer: int, start: int, stop: int) -> np.ndarray:
        """Values (token, neuron) of some of the tokens chosen, as they are to be written.

        float32, also where the type is bfloat16; or float16.
        """
        view = view_of(self.source, layer, np.arange(self.width))
        before = view.read(self.tokens[start:stop])
        after = self._typed(layer, before if self.keep_bits is None else self._rounded(before))
        if not self.exact:
            self.fidelity.add(before, after)
        return after

    def _rounded(self, values: np.ndarray) -> np.ndarray:
        own = MANTISSA["float16" if values.dtype == np.float16 else "float32"]
        if self.keep_bits is None or self.keep_bits >= own:
            return values
        codec = numcodecs.BitRound(self.keep_bits)
        rounded = np.asarray(codec.encode(np.ascontiguousarray(values))).view(values.dtype)
        # The codec may make an infinity of a finite value, or something else of a NaN.
        sound = np.isfinite(values) & np.isfinite(rounded.reshape(values.shape))
        return np.where(sound, rounded.reshape(values.shape), values)

    def _typed(self, layer: int, values: np.ndarray) -> np.ndarray:
        if self.dtype == "bfloat16":
            return (to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)
        if self.dtype == "float32" or values.dtype == np.float16:
            return values.astype(self.dtype, copy=False)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        lost = np.isinf(half) & np.isfinite(values)
        if lost.any():
            raise HalfOverflowError(
                f"{np.count_nonzero(lost):,} values of stage {self.name}, layer {layer}, do not "
                f"fit float16 (one is {values[lost][0]:g}, the largest it holds is 65,504): use "
                "bfloat16 or float32"
            )
        return half


@dataclass(frozen=True)
class Chosen:
    """Some stages, layers and tokens of a store.

    Attributes
    ----------
    store : Store
    stages : tuple of ChosenStage
    tokens : ndarray of int (token,)
    asked : dict
        What was asked of which store, JSON only.
    """

    store: Store
    stages: tuple[ChosenStage, ...]
    tokens: np.ndarray
    asked: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the values and about those of the columns, before any compression."""
        return sum(s.nbytes for s in self.stages) + len(self.tokens) * 8 * len(self.names)

    @property
    def names(self) -> list[str]:
        """Columns that go with the tokens: their places, ids and texts, labels, outcomes."""
        first = ["sequence", "position", "token_id", "token_text", "special"]
        known = [n for n in self.store.columns if n not in _NOT_LABELS]
        return [*(n for n in first if n in known), *(n for n in known if n not in first)]

    def column(self, name: str) -> np.ndarray | Categorical:
        """A column of the tokens chosen; of texts those values alone that come up."""
        column = self.store.column(name)[self.tokens]
        if not isinstance(column, Categorical):
            return column
        used, codes = np.unique(column.codes, return_inverse=True)
        return Categorical(codes.astype(np.int32), column.values[used])

    def facts(self) -> dict[str, Any]:
        """Where the values come from, JSON only: what was asked, and the model."""
        carried = ("model", "head", "tokenizer", "machine", "versions")
        own = self.store.attrs
        return {"origin": self.asked, **{k: own[k] for k in carried if k in own}}


def choose(
    store: Store,
    stages: Any,
    layers: Any,
    tokens: Any,
    dtype: str | None,
    keep_bits: int | None,
) -> Chosen:
    """Resolve what is to be exported; nothing is read but labels.

    Raises
    ------
    UnknownNameError
        A stage, layer, column or type that is not there.
    UsageError
        No token is left, or bits that no type has.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    if keep_bits is not None and not 1 <= keep_bits <= MANTISSA["float32"]:
        raise UsageError(
            f"keep_bits is {keep_bits}: the mantissa of a float32 has 23 bits, so keep 1 to 23"
        )
    selection = select(store, stages, layers, tokens, None, None)
    (members,) = selection.members()
    chosen = tuple(
        ChosenStage(
            s.stage, s, selection.layers[s.stage], members, dtype or _kind(s.dtype), keep_bits
        )
        for s in selection.sources
    )
    return Chosen(store, chosen, members, _asked(store, selection, dtype, keep_bits))


def _kind(dtype: str) -> str:
    return dtype if dtype in DTYPES else "float32"


def _asked(
    store: Store, selection: Selection, dtype: str | None, keep_bits: int | None
) -> dict[str, Any]:
    tokens = selection.attrs["tokens"]
    if tokens == "a mask" and selection.mask is not None:
        tokens = f"a mask with sha256 {hashlib.sha256(selection.mask.tobytes()).hexdigest()}"
    asked: Mapping[str, Any] = {
        "what": "export",
        "store": store.name,
        "id": store.id,
        "stages": {s.stage: selection.layers[s.stage] for s in selection.sources},
        "tokens": tokens,
        "dtype": dtype,
        "keep_bits": keep_bits,
    }
    return {k: v for k, v in asked.items() if v is not None}
