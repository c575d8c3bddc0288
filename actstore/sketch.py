"""Sketches: mergeable statistics made of each shard while it is in memory anyway.

Kept apart by *stratum*, a class of tokens that queries commonly leave out: the first position of
a sequence, special tokens elsewhere, the rest (and each of these by a label, if asked). A part is
made of every shard as it is written and lies beside the block's journal record; at seal the parts
are merged in block order, so that the result depends on no thread, rank or interruption.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from crc32c import crc32c
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from .corpus import Corpus
from .errors import UnknownNameError, UsageError
from .plan import Plan, StagePlan
from .schema import GRANULE_TOKENS, KEYS, MOMENTS, RANKS, Categorical
from .shard import Layout, ShardSummary, chunk_values
from .sketched import strata_codes
from .stats.moments import add_moments
from .stats.sketching import compact_lists, insert_extremes, merge_limits, sketch_chunk

__all__ = ["ShardSketch", "Sketcher", "Strata", "merge", "pack", "plan_strata"]


@dataclass(frozen=True)
class Strata:
    """The class of each kept token.

    Attributes
    ----------
    names : tuple of str
        "first", "special", "rest", or with a label "first:VALUE" ...
    codes : ndarray of uint16 (token,)
    """

    names: tuple[str, ...]
    codes: np.ndarray


def plan_strata(plan: Plan, by: str | None) -> Strata:
    """Strata of a plan's kept tokens, and of each value of a label."""
    corpus, kept = plan.corpus, plan.kept
    label = None
    if by is not None:
        label = _label(corpus, by)[corpus.sequence[kept] if by in corpus.sequence_labels else kept]
    return Strata(*strata_codes(corpus.position[kept], corpus.special[kept], label))


def _label(corpus: Corpus, name: str) -> Categorical:
    columns = {**corpus.sequence_labels, **corpus.token_labels}
    if name not in columns:
        raise UnknownNameError("label to sketch by", name, columns)
    column = columns[name]
    if not isinstance(column, Categorical) or len(column.values) > 64:
        raise UsageError(f"--sketch-by {name}: it takes a text label of at most 64 values")
    return column


# -- making --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardSketch:
    """What is kept of one shard, for each stratum.

    Attributes
    ----------
    moments : ndarray of float64 (stratum, 9, neuron)
        In the order of `schema.MOMENTS`.
    counts : ndarray of uint64 (stratum, KEYS)
    norms : ndarray of float32 (token,)
    extremes : ndarray of uint64 (stratum, 2, neuron, RANKS)
        Largest and smallest, as `stats.sketching.extreme_key`; what earlier blocks already beat
        is left out.
    first : int
        Token number of its first row.
    """

    moments: np.ndarray
    counts: np.ndarray
    norms: np.ndarray
    extremes: np.ndarray
    first: int

    def summary(self) -> ShardSummary | None:
        """As `shard.summarise`; None where not all values are finite."""
        there = self.moments[self.moments[:, 0].any(axis=1)]
        if not np.isfinite(there[:, 1]).all():
            return None
        return ShardSummary(there[:, 5].min() + 0.0, there[:, 6].max() + 0.0, 0)

    def tensors(self, prefix: str) -> dict[str, np.ndarray]:
        """Compact arrays for a part file: strata, tables and lists without what is empty."""
        strata = np.flatnonzero(self.moments[:, 0].any(axis=1))
        keys = [np.flatnonzero(self.counts[s]) + s * KEYS for s in strata]
        places = np.concatenate([*keys, np.empty(0, np.int64)])
        lengths, values, rows = compact_lists(self.extremes, strata)
        small = len(self.norms) <= 2**16
        return {
            f"{prefix}/strata": strata,
            f"{prefix}/moments": self.moments[strata],
            f"{prefix}/keys": places.astype(np.uint32),
            f"{prefix}/counts": self.counts.reshape(-1)[places].astype(np.uint32),
            f"{prefix}/norms": self.norms,
            f"{prefix}/lengths": lengths,
            f"{prefix}/values": values,
            f"{prefix}/rows": rows.astype(np.uint16) if small else rows,
            f"{prefix}/first": np.array([self.first]),
        }


class Sketcher:
    """Makes the sketches of shards, and remembers what later ones need not list.

    Safe to call from several writer threads.

    Parameters
    ----------
    strata : Strata
        Of all tokens.
    """

    def __init__(self, strata: Strata) -> None:
        self._strata = strata
        self._running: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def sketch(
        self, stage: str, layer_index: int, layout: Layout, image: np.ndarray, first: int, rows: int
    ) -> ShardSketch:
        """Sketch one shard.

        Parameters
        ----------
        stage, layer_index
            Whose running extremes to use.
        layout : Layout
        image : ndarray (token chunk, neuron chunk, token, neuron)
            The shard in memory, in `layout.memory_dtype`.
        first : int
            Token number of its first row.
        rows : int
            Tokens in it.
        """
        key, n_strata = (stage, layer_index), len(self._strata.names)
        with self._lock:
            if key not in self._running:
                lists = empty_lists(n_strata, layout.width)
                self._running[key] = lists, no_limits(n_strata, layout.width)
            limits = self._running[key][1].copy()
        codes = self._strata.codes[first : first + rows]
        made = sketch_image(layout, image, codes, n_strata, first, limits)
        with self._lock:
            lists, limits = self._running[key]
            for s, new in enumerate(made.extremes):
                merge_limits(lists[s], limits[s], new)
        return made


def sketch_image(
    layout: Layout,
    image: np.ndarray,
    codes: np.ndarray,
    n_strata: int,
    first: int,
    limits: np.ndarray,
) -> ShardSketch:
    """Sketch one shard image; `limits` only prune what is listed."""
    width, rows = layout.width, len(codes)
    moments, extremes = empty_moments(n_strata, width), empty_lists(n_strata, width)
    counts = np.zeros((n_strata, KEYS), np.uint64)
    squares = np.zeros(rows)
    for top in range(0, rows, layout.chunk_rows):
        here = codes[top : top + layout.chunk_rows]
        members = [(s, np.flatnonzero(here == s)) for s in np.unique(here)]
        for j in range(layout.grid[1]):
            chunk = image[top // layout.chunk_rows, j, : len(here)]
            x = chunk_values(layout, chunk)
            keys = chunk if chunk.dtype.itemsize == 2 else chunk.view(np.uint16)[:, 1::2]
            for s, chosen in members:
                sketch_chunk(
                    x,
                    keys.view(np.uint16),
                    chosen,
                    top,
                    j * layout.chunk_width,
                    moments[s],
                    counts[s],
                    squares[top : top + len(here)],
                    limits[s],
                    extremes[s],
                )
    return ShardSketch(moments, counts, np.sqrt(squares).astype(np.float32), extremes, first)


def empty_moments(n_strata: int, width: int) -> np.ndarray:
    """Moments (stratum, 9, neuron) of nothing."""
    moments = np.zeros((n_strata, len(MOMENTS), width))
    moments[:, 5:7] = np.nan
    return moments


def empty_lists(n_strata: int, width: int) -> np.ndarray:
    """Lists of extremes with nothing in them."""
    return np.zeros((n_strata, 2, width, RANKS), np.uint64)


def no_limits(n_strata: int, width: int) -> np.ndarray:
    """Limits (stratum, 2, neuron) that every value passes."""
    limits = np.full((n_strata, 2, width), -np.inf, np.float32)
    limits[:, 1] = np.inf
    return limits


_CHECKSUM = "crc32c.2"
"""Counts the layouts of parts: one of an older version is taken for damaged, and made again."""


def pack(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The tensors of a block's sketches as one binary object: safetensors, with a crc32c.

    The commit record does not know of it: what earlier blocks let it leave out of the lists
    depends on the order of writing, and records do not.
    """
    return save_tensors({**tensors, _CHECKSUM: _checksum(tensors)})


def _checksum(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Over names and bytes of all tensors, as a tensor itself."""
    checksum = 0
    for name, tensor in sorted(tensors.items()):
        checksum = crc32c(
            np.ascontiguousarray(tensor).view(np.uint8), crc32c(name.encode(), checksum)
        )
    return np.array([checksum], np.uint32)


# -- merging -------------------------------------------------------------------------------

Part = Mapping[str, np.ndarray]
Load = Callable[[StagePlan, int], Part]
"""Gives the packed sketches of a stage and block."""


def unpack(data: bytes) -> dict[str, np.ndarray] | None:
    """The tensors of a packed part; None if it is damaged."""
    try:
        tensors = load_tensors(data)
        sound = np.array_equal(tensors.pop(_CHECKSUM), _checksum(tensors))
    except (SafetensorError, KeyError):
        return None
    return tensors if sound else None


class Drain:
    """Zarr arrays in memory, whose finished objects are taken out as they are written."""

    def __init__(self, metadata: Mapping[str, bytes]) -> None:
        self._memory = MemoryStore()
        make = default_buffer_prototype().buffer.from_bytes
        self._memory._store_dict.update({key: make(data) for key, data in metadata.items()})
        self._metadata = set(metadata)

    def write(self, key: str, region: Any, values: np.ndarray) -> None:
        zarr.open_array(self._memory, path=key, mode="r+")[region] = values

    def objects(self) -> Iterator[tuple[str, bytes]]:
        store = self._memory._store_dict
        for key in sorted(set(store) - self._metadata):
            yield key, store.pop(key).to_bytes()


def merge(
    stages: Sequence[StagePlan],
    n_tokens: int,
    n_strata: int,
    metadata: Mapping[str, bytes],
    load: Load,
) -> Iterator[tuple[str, bytes]]:
    """Merge all parts into the objects of ``sketch/``.

    Parameters
    ----------
    stages : sequence of StagePlan
    n_tokens : int
    n_strata : int
    metadata : mapping
        The sketch arrays' ``zarr.json`` by key.
    load : callable
        ``load(stage, block)`` gives the tensors of a block's part.

    Yields
    ------
    key, data
        Objects to store.
    """
    for stage in stages:
        drain = Drain(metadata)
        total = _Total(len(stage.layers), n_strata, stage.layout.width)
        rows = stage.layout.rows
        n_blocks = -(-n_tokens // rows)
        step = max(1, GRANULE_TOKENS // rows)
        for granule, begin in enumerate(range(0, n_blocks, step)):
            blocks = range(begin, min(begin + step, n_blocks))
            zone, norms = total.granule((load(stage, block) for block in blocks), stage.name)
            folder = f"sketch/{stage.name}"
            drain.write(f"{folder}/zones", granule, zone)
            at = begin * rows
            drain.write(f"{folder}/norm", np.s_[:, at : at + norms.shape[1]], norms)
            yield from drain.objects()
        for key, values in total.results():
            drain.write(f"sketch/{stage.name}/{key}", Ellipsis, values)
        yield from drain.objects()


def merge_nbytes(stage: StagePlan, n_strata: int) -> int:
    """About what merging a stage's sketches takes: its totals, and as much again in passing."""
    cells = len(stage.layers) * n_strata * stage.layout.width
    lists = 2 * RANKS * (np.dtype(np.float32).itemsize + np.dtype(np.int64).itemsize)
    return cells * 3 * (lists + 8 * len(MOMENTS))


class _Total:
    """Running totals of one stage over blocks in order."""

    def __init__(self, layers: int, n_strata: int, width: int) -> None:
        self._shape = (n_strata, layers, width)
        self._moments = self._empty()
        self._counts = np.zeros((layers, n_strata, KEYS), np.uint64)
        lists = (layers, n_strata, 2, width, RANKS)
        self._values, self._tokens = np.full(lists, np.nan, np.float32), np.full(lists, -1)

    def _empty(self) -> np.ndarray:
        """Moments (9, stratum, layer, neuron) of nothing."""
        moments = np.zeros((len(MOMENTS), *self._shape))
        moments[5:7] = np.nan
        return moments

    def granule(self, parts: Iterable[Part], stage: str) -> tuple[np.ndarray, np.ndarray]:
        """Add consecutive blocks; gives the granule's own moments and norms."""
        zone, norms = self._empty(), []
        for part in parts:
            layers = range(self._shape[1])
            mine = [{n: part[f"{stage}/{i}/{n}"] for n in _TENSORS} for i in layers]
            norms.append(np.stack([m["norms"] for m in mine]))
            for i, one in enumerate(mine):
                for s, moments in zip(one["strata"], one["moments"], strict=True):
                    add_moments(zone[:, s, i], moments)
                self._counts[i].reshape(-1)[one["keys"]] += one["counts"]
                insert_extremes(
                    self._values[i],
                    self._tokens[i],
                    one["strata"],
                    one["lengths"],
                    one["values"],
                    one["rows"],
                    one["first"][0],
                )
        add_moments(self._moments.reshape(len(MOMENTS), -1), zone.reshape(len(MOMENTS), -1))
        return zone, np.concatenate(norms, axis=1)

    def results(self) -> Iterator[tuple[str, np.ndarray]]:
        yield "moments", self._moments
        yield "counts", self._counts.swapaxes(0, 1)
        for side, name in enumerate(("largest", "smallest")):
            yield f"{name}_value", self._values[:, :, side].swapaxes(0, 1)
            yield f"{name}_token", self._tokens[:, :, side].swapaxes(0, 1)


_TENSORS = (
    *("strata", "moments", "keys", "counts", "norms"),
    *("lengths", "values", "rows", "first"),
)
