"""A sealed store as zarr and xarray see it: read only, in bounds, every object checked.

Labels, sketches and tables are plain Zarr arrays, which zarr reads through this. It hands out what
the manifest vouches for, or an error that says what is damaged: a chunk that was changed, lost or
cut is never taken for values, and none decodes to more than its array's metadata say.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import zarr
from crc32c import crc32c
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from .codecs import bounded
from .errors import ActstoreError, CorruptStoreError
from .places import storage_at
from .root import AGAIN, read_manifest, read_root
from .schema import CHUNK_NBYTES, METADATA_NBYTES
from .storage import Storage

__all__ = ["Guard", "guard_at", "stamp_of"]


def stamp_of(root: bytes) -> str:
    """Tells a root from every other: sketches that are made later change it, and not the id.

    Examples
    --------
    >>> stamp_of(b"{}")
    '297bd0aa'
    """
    return f"{crc32c(root):08x}"


@lru_cache(maxsize=16)
def guard_at(path: str, stamp: str) -> Guard:
    """The guard of a store by what can be sent to other processes; one for each in a process.

    Raises
    ------
    CorruptStoreError
        The store is not the one that was opened.
    """
    storage = storage_at(path)
    data = storage.get("zarr.json", METADATA_NBYTES)
    if data is None or stamp_of(data) != stamp:
        raise CorruptStoreError(f"{path} has changed since it was opened: open it again")
    root = read_root(storage, data, path)
    nodes = root["consolidated_metadata"]["metadata"]
    return Guard(storage, (path, stamp), nodes, read_manifest(storage)["objects"])


class Guard(Store):
    """Zarr's view of a sealed store.

    Parameters
    ----------
    storage : Storage
    place : tuple of str
        Path and stamp, by which another process finds it: see `guard_at`.
    nodes : mapping
        Metadata of arrays and groups by key, from the root, checked.
    objects : mapping
        Size and crc32c of objects by key, from the manifest.
    """

    def __init__(
        self,
        storage: Storage,
        place: tuple[str, str],
        nodes: Mapping[str, Any],
        objects: Mapping[str, list[int]],
    ) -> None:
        super().__init__(read_only=True)
        self._storage, self.place = storage, place
        self._nodes, self._objects = nodes, objects
        self._arrays: dict[str, tuple[dict[str, Any], bool]] = {}

    def __reduce__(self) -> Any:
        return guard_at, self.place

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Guard) and self.place == other.place

    def __hash__(self) -> int:
        return hash(self.place)

    def __repr__(self) -> str:
        return f"Guard({self.place[0]!r})"

    # -- what is there -----------------------------------------------------------------------

    def node(self, key: str) -> dict[str, Any]:
        """Metadata of an array or a group, of which its own object and the root say the same.

        Raises
        ------
        CorruptStoreError
            They do not.
        """
        return self._node(key)[0]

    def array(self, key: str) -> zarr.Array:
        """An array, opened.

        Raises
        ------
        CorruptStoreError
            Its metadata are damaged, or zarr cannot make anything of them.
        """
        try:
            return zarr.open_array(self, path=key, mode="r", zarr_format=3)
        except ActstoreError:
            raise
        except Exception as error:  # zarr fails in its own way on each kind of nonsense
            what = str(error).partition("\n")[0][:200]
            raise self._damaged(f"{key}/zarr.json", f"describes no array ({what})") from None

    def _node(self, key: str) -> tuple[dict[str, Any], bool]:
        """Metadata, and whether it is as it was sealed (else another tool rewrote the array)."""
        if key not in self._arrays:
            own_key, node = f"{key}/zarr.json", self._nodes[key]
            data = self._storage.get(own_key, METADATA_NBYTES)
            try:
                own = json.loads(data or b"null")
            except (ValueError, RecursionError):
                own = None
            own, said = ({**(n or {}), "consolidated_metadata": None} for n in (own, node))
            if data is None or own != said:
                raise self._damaged(own_key, "is missing" if data is None else "is not the root's")
            sealed = self._objects.get(own_key) == [len(data), crc32c(data)]
            self._arrays[key] = node, sealed
        return self._arrays[key]

    def _damaged(self, key: str, what: str) -> CorruptStoreError:
        return CorruptStoreError(f"{key} {what} in {self.place[0]}. {AGAIN}")

    # -- reading -----------------------------------------------------------------------------

    def _read(self, key: str, byte_range: ByteRequest | None) -> bytes | np.ndarray | None:
        folder, _, name = key.rpartition("/")
        if name == "zarr.json":
            return self._metadata(folder)
        array = self._array_of(key)
        if array is None:
            return None
        if byte_range is not None:
            return self._range(key, byte_range)
        digest = self._objects.get(key) if self._node(array)[1] else None
        if digest is None:
            return self._storage.get(key, 4 * CHUNK_NBYTES)
        data = self._storage.get(key, digest[0])
        if data is None:
            raise self._damaged(key, "is missing")
        if [len(data), crc32c(data)] != digest:
            raise self._damaged(key, "is damaged: its checksum does not match")
        return data

    def _metadata(self, key: str) -> bytes | None:
        if key not in self._nodes:
            return None
        node = self.node(key)
        if node["node_type"] == "group":
            node = {k: v for k, v in node.items() if k != "consolidated_metadata"}
        else:
            node = {**node, "codecs": bounded(node["codecs"])}
        return json.dumps(node).encode()

    def _array_of(self, key: str) -> str | None:
        """The array that a chunk is of."""
        parts = key.split("/")
        for end in range(len(parts) - 1, 0, -1):
            folder = "/".join(parts[:end])
            if folder in self._nodes:
                return folder if self._nodes[folder]["node_type"] == "array" else None
        return None

    def _range(self, key: str, wanted: ByteRequest) -> np.ndarray | None:
        """Part of a shard of another layout than ours."""
        if not self._storage.exists(key):
            return None
        with self._storage.reader(key) as reader:
            if isinstance(wanted, RangeByteRequest):
                start, stop = wanted.start, wanted.end
            elif isinstance(wanted, OffsetByteRequest):
                start, stop = wanted.offset, reader.nbytes
            else:
                assert isinstance(wanted, SuffixByteRequest)
                start, stop = max(0, reader.nbytes - wanted.suffix), reader.nbytes
            if not 0 <= start <= stop <= reader.nbytes:
                raise self._damaged(key, "is damaged: its index points outside of it")
            out = np.empty(stop - start, np.uint8)
            reader.read_into(out, offset=start)
        return out

    # -- as zarr asks ------------------------------------------------------------------------

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        data = await asyncio.to_thread(self._read, key, byte_range)
        made = (prototype or default_buffer_prototype()).buffer
        if data is None:
            return None
        return made.from_array_like(data) if isinstance(data, np.ndarray) else made.from_bytes(data)

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, wanted) for key, wanted in key_ranges]

    async def exists(self, key: str) -> bool:
        return await self.get(key) is not None

    @property
    def supports_writes(self) -> bool:
        return False

    async def set(self, key: str, value: Buffer) -> None:
        raise NotImplementedError

    @property
    def supports_deletes(self) -> bool:
        return False

    async def delete(self, key: str) -> None:
        raise NotImplementedError

    @property
    def supports_listing(self) -> bool:
        return True

    async def list(self) -> AsyncIterator[str]:
        for key in self._nodes:
            yield f"{key}/zarr.json"

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        top = f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""
        for name in dict.fromkeys(
            key[len(top) :].partition("/")[0] for key in self._nodes if key.startswith(top)
        ):
            yield name
