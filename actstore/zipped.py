"""A store in a zip archive, read in place.

Objects that are stored as they are (``zip -0 -r run.zarr.zip run.zarr``) are read in parts, as
files are; compressed ones are taken whole, which is slower.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import CorruptStoreError, NotAStoreError, StoreError
from .readonly import MemoryReader, ReadOnly, recent
from .storage import LocalReader, Reader, check_size

__all__ = ["ZipStorage"]

_LOCAL_NBYTES = 30
_MOST_NBYTES = 2**32
"""Of a compressed object."""


class _Entry(NamedTuple):
    """Where an object is in the archive."""

    offset: int
    packed: int
    nbytes: int
    crc32: int
    compressed: bool


class ZipStorage(ReadOnly):
    """A store's objects in a zip archive, at its top or in one folder.

    Parameters
    ----------
    root : path
        The archive.
    """

    kind = "a zip archive"
    instead = "Unzip it and write there, or choose another output"
    lists = True

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def __repr__(self) -> str:
        return f"ZipStorage({str(self.root)!r})"

    @property
    def _stamp(self) -> tuple[str, int, int]:
        status = self.root.stat()
        return str(self.root), status.st_mtime_ns, status.st_size

    @property
    def _entries(self) -> dict[str, _Entry]:
        try:
            return _directory(*self._stamp)
        except FileNotFoundError:
            return {}

    def exists(self, key: str) -> bool:
        return key in self._entries

    def size(self, key: str) -> int | None:
        entry = self._entries.get(key)
        return None if entry is None else entry.nbytes

    def get(self, key: str, limit: int | None = None) -> bytes | None:
        """A whole object, None where there is none; one of more bytes than `limit` is an error."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        check_size(key, entry.nbytes, limit)
        return self._whole(key, entry)

    def keys(self, prefix: str) -> list[str]:
        """Keys of the objects directly in a folder, sorted."""
        return sorted(k for k in self._entries if k.rpartition("/")[0] == prefix)

    def is_vacant(self) -> bool:
        return not self._entries

    @contextmanager
    def reader(self, key: str) -> Iterator[Reader]:
        """Ranged reads of one object; a missing object is an error that says so."""
        entry = self._entries.get(key)
        if entry is None:
            raise CorruptStoreError(
                f"{key} is missing from {self.root}: zip the store again, or ask for a sound copy"
            )
        if entry.compressed:
            data = recent.get((*self._stamp, key), lambda: self._whole(key, entry))
            yield MemoryReader(key, data)
            return
        fd = os.open(self.root, os.O_RDONLY)
        try:
            yield _StoredReader(fd, key, self._data_offset(fd, key, entry), entry.nbytes)
        finally:
            os.close(fd)

    def _data_offset(self, fd: int, key: str, entry: _Entry) -> int:
        """Where the data begins: behind a header that has lengths of its own."""
        header = os.pread(fd, _LOCAL_NBYTES, entry.offset)
        if len(header) < _LOCAL_NBYTES or header[:4] != b"PK\3\4":
            raise self._damaged(key)
        name, extra = struct.unpack_from("<HH", header, 26)
        start: int = entry.offset + _LOCAL_NBYTES + name + extra
        if start + entry.packed > os.fstat(fd).st_size:
            raise self._damaged(key)
        return start

    def _whole(self, key: str, entry: _Entry) -> bytes:
        if entry.compressed and entry.nbytes > _MOST_NBYTES:
            raise StoreError(
                f"{key} in {self.root} has {entry.nbytes:,} bytes, too many to decompress in "
                "place: unzip the store, or zip it without compression (zip -0)"
            )
        with self.root.open("rb") as file:
            file.seek(self._data_offset(file.fileno(), key, entry))
            data = file.read(entry.packed)
        if entry.compressed:
            unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                data = unpacker.decompress(data, entry.nbytes)
            except zlib.error:
                raise self._damaged(key) from None
        if len(data) != entry.nbytes or zlib.crc32(data) != entry.crc32:
            raise self._damaged(key)
        return data

    def _damaged(self, key: str) -> CorruptStoreError:
        return CorruptStoreError(
            f"{key} in the archive {self.root} is damaged. Run `actstore verify` to see what else "
            "is, and copy or zip the store again"
        )


class _StoredReader(LocalReader):
    """Ranged reads of an object that lies in the archive as it is."""

    def __init__(self, fd: int, key: str, start: int, nbytes: int) -> None:
        super().__init__(fd, key)
        self.nbytes, self._start = nbytes, start

    def read_into(self, *buffers: np.ndarray, offset: int) -> None:
        if offset + sum(len(b) for b in buffers) > self.nbytes:
            raise CorruptStoreError(f"{self.key} is truncated at {self.nbytes} bytes")
        super().read_into(*buffers, offset=self._start + offset)


@lru_cache(maxsize=8)
def _directory(path: str, mtime: int, size: int) -> dict[str, _Entry]:
    """An archive's objects by key, below the folder that the store is in."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        ValueError,
        OverflowError,
        struct.error,
    ) as error:
        raise NotAStoreError(
            f"{path} cannot be read as a zip archive ({error}): copy it again whole"
        ) from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"reading {path} failed: {error.strerror or error}") from None
    top = _top(path, [info.filename for info in infos])
    entries = {}
    for info in infos:
        if not info.filename.startswith(top):
            continue
        if info.flag_bits & 1 or info.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):
            raise StoreError(
                f"{info.filename} in {path} is encrypted, or compressed in a way that is not read "
                "in place: unzip the store, or zip it without compression (zip -0)"
            )
        compressed = info.compress_type != zipfile.ZIP_STORED
        entries[info.filename[len(top) :]] = _Entry(
            info.header_offset, info.compress_size, info.file_size, info.CRC, compressed
        )
    return entries


def _top(path: str, names: list[str]) -> str:
    """The folder of the archive that the store is in, with its "/"; "" for the top."""
    for mark in ("journal/plan.json", "zarr.json"):
        tops = {n.removesuffix(mark) for n in names if n == mark or n.endswith(f"/{mark}")}
        if tops:
            least = min(top.count("/") for top in tops)
            first = sorted(top for top in tops if top.count("/") == least)
            if len(first) > 1:
                raise NotAStoreError(
                    f"{path} holds several stores ({', '.join(first[:8])}): unzip it"
                )
            return first[0]
    return ""
