"""One stage's activations as an array that is read when it is indexed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .places import storage_at
from .shard import Layout, read_pieces, read_shard

__all__ = ["ShardedArray", "full_key"]

_AT_ONCE = 4
"""Shards that one selection reads side by side, where it meets so many."""


class ShardedArray:
    """One stage's activations, read shard by shard with every checksum checked.

    Behaves as an array to dask: ``array[layer, tokens, neurons]`` reads just the inner chunks that
    slices meet, or that lie between the least and the greatest of a list of indices (one list at a
    time). Holds a path, never an open handle, so it can be sent to workers.

    Attributes
    ----------
    shape, dtype, ndim
        Of the whole array (layer, token, neuron).
    """

    ndim = 3

    def __init__(self, root: str, folder: str, shape: tuple[int, int, int], layout: Layout) -> None:
        self.root, self.folder, self.shape, self.layout = root, folder, shape, layout
        self.dtype = np.dtype(layout.dtype)

    def __getitem__(self, key: Any) -> np.ndarray:
        wanted: list[range | np.ndarray] = []
        squeeze = []
        for axis, (part, size) in enumerate(zip(full_key(key), self.shape, strict=True)):
            if isinstance(part, (int, np.integer)):
                at = range(size)[int(part)]
                wanted.append(range(at, at + 1))
                squeeze.append(axis)
            elif isinstance(part, slice):
                wanted.append(range(size)[part])
            else:
                wanted.append(np.arange(size)[part])
        if sum(isinstance(w, np.ndarray) for w in wanted) > 1:
            raise IndexError("one list of indices at a time")
        if not all(len(w) for w in wanted):
            return np.empty([len(w) for i, w in enumerate(wanted) if i not in squeeze], self.dtype)
        layers, tokens, neurons = hulls = [_hull(w) for w in wanted]
        out = np.empty([_length(s) for s in hulls], self.dtype)
        for i, layer in enumerate(range(layers.start, layers.stop)):
            self._read(layer, tokens, neurons, out[i])
        inside = tuple(
            slice(None, None, w.step) if isinstance(w, range) else w - hull.start
            for w, hull in zip(wanted, hulls, strict=True)
        )
        return np.squeeze(out[inside], tuple(squeeze))

    def _read(self, layer: int, tokens: slice, neurons: slice, out: np.ndarray) -> None:
        storage, rows = storage_at(self.root), self.layout.rows

        def read(block: int) -> None:
            top = block * rows
            a, b = max(tokens.start, top), min(tokens.stop, top + rows)
            with storage.reader(f"{self.folder}/c.{layer}.{block}.0") as reader:
                target = out[a - tokens.start : b - tokens.start]
                read_shard(self.layout, reader, slice(a - top, b - top), neurons, target)

        blocks = range(tokens.start // rows, -(-tokens.stop // rows))
        if len(blocks) < _AT_ONCE:  # dask's own threads read a block each
            for block in blocks:
                read(block)
            return
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in pool.map(read, blocks):  # the first error ends it
                pass

    def pieces(
        self, layer_index: int, block: int, chunk_rows: Iterable[int], nbytes: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Decode rows of inner chunks of one shard, about `nbytes` at a time: `read_pieces`."""
        key = f"{self.folder}/c.{layer_index}.{block}.0"
        with storage_at(self.root).reader(key) as reader:
            yield from read_pieces(self.layout, reader, chunk_rows, nbytes)


def full_key(key: Any) -> tuple[Any, Any, Any]:
    """An index of an array of three dimensions, with all that is left out of it."""
    key = key if isinstance(key, tuple) else (key,)
    for at in [i for i, part in enumerate(key) if part is Ellipsis][:1]:
        key = key[:at] + (slice(None),) * (4 - len(key)) + key[at + 1 :]
    if len(key) > 3:
        raise IndexError(f"{len(key)} indices for an array of 3 dimensions")
    return (*key, *(slice(None),) * (3 - len(key)))


def _hull(values: range | np.ndarray) -> slice:
    """The smallest slice of step 1 that covers some indices."""
    ends = (values[0], values[-1]) if isinstance(values, range) else (values.min(), values.max())
    return slice(int(min(ends)), int(max(ends)) + 1)


def _length(s: slice) -> int:
    return s.stop - s.start
