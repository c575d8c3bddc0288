"""Answers on disk, each in a file of its own, the longest unused going first."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from crc32c import crc32c

__all__ = ["Cache", "Entry", "read_entry", "write_entry"]

log = logging.getLogger("actstore.server")

_MAGIC = b"actstore answer 1\n"
_CHUNK = 2**20
_IN_MEMORY = 2**25
_SMALL = 2**20
_STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Entry:
    """A stored answer.

    Attributes
    ----------
    meta : dict
        What was stored about it.
    size : int
        Bytes of the body.
    body : bytes or None
        The body, where it is small.
    path : Path
    start : int
        Where in the file the body begins.
    """

    meta: Mapping[str, Any]
    size: int
    body: bytes | None
    path: Path
    start: int

    def chunks(self) -> Iterator[bytes]:
        """The body piece by piece; to the end even if the file is removed meanwhile."""
        if self.body is not None:
            return iter([self.body])
        file = open(self.path, "rb")  # noqa: SIM115 - closed by who reads to the end
        file.seek(self.start)
        return _pieces(file)

    def read(self) -> bytes:
        return b"".join(self.chunks())


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while chunk := file.read(_CHUNK):
            yield chunk


class Cache:
    """Answers by key, up to a number of bytes.

    Parameters
    ----------
    folder : path
        Made if it is not there. Several servers may share one.
    limit : int
        Bytes; the newest answer stays even if it is larger.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        self.folder = Path(folder)
        self.limit = limit
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._small: OrderedDict[str, Entry] = OrderedDict()
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.folder.glob(".*.part"):  # of a server that was killed
            with suppress(OSError):
                if time.time() - part.stat().st_mtime > _STALE_SECONDS:
                    part.unlink()
        found = []
        for path in self.folder.glob("??/*"):
            try:
                status = path.stat()
            except OSError:
                continue
            found.append((status.st_mtime_ns, path.name, status.st_size))
        for _, key, size in sorted(found):
            self._sizes[key] = size

    def recall(self, key: str) -> Entry | None:
        """An answer that is still in memory."""
        with self._lock:
            entry = self._small.get(key)
            if entry is not None:
                self._small.move_to_end(key)
                self._used(key, entry)
        return entry

    def get(self, key: str) -> Entry | None:
        """An answer; None where there is none, or what there is is damaged."""
        path = self.path(key)
        entry = self.recall(key) or read_entry(path)
        with self._lock:
            if entry is None:
                self._sizes.pop(key, None)
                return None
            self._used(key, entry)
            self._remember(key, entry)
        return entry

    def put(self, key: str, body: bytes, meta: Mapping[str, Any]) -> Entry:
        """Store an answer; where the disk is full, it is given none the less."""
        part = self.part()
        try:
            start = write_entry(part, body, meta)
            self.adopt(key, part)
        except OSError as error:
            log.error("an answer could not be kept: %s", error)
            part.unlink(missing_ok=True)
            return Entry(meta, len(body), body, self.path(key), 0)
        small = body if len(body) <= _SMALL else None
        entry = Entry(meta, len(body), small, self.path(key), start)
        with self._lock:
            self._remember(key, entry)
        return entry

    def part(self) -> Path:
        """A new file's name, for `write_entry`, and then `adopt`."""
        return self.folder / f".{uuid4().hex}.part"

    def adopt(self, key: str, part: Path) -> None:
        """Store what lies in a file of `write_entry`, and make room."""
        path = self.path(key)
        path.parent.mkdir(exist_ok=True)
        size = part.stat().st_size
        os.replace(part, path)
        with self._lock:
            self._small.pop(key, None)
            self._sizes[key] = size
            self._sizes.move_to_end(key)
            total = sum(self._sizes.values())
            while total > self.limit and len(self._sizes) > 1:
                oldest, size = self._sizes.popitem(last=False)
                total -= size
                self._small.pop(oldest, None)
                self.path(oldest).unlink(missing_ok=True)

    def path(self, key: str) -> Path:
        """Where an answer lies, if there is one."""
        return self.folder / key[:2] / key

    def _used(self, key: str, entry: Entry) -> None:
        """Put an answer at the end of those that may go."""
        self._sizes[key] = entry.start + entry.size
        self._sizes.move_to_end(key)
        with suppress(OSError):  # another process may have removed it
            os.utime(entry.path)  # the order outlives this process

    def _remember(self, key: str, entry: Entry) -> None:
        """Keep a small answer in memory, too."""
        if entry.body is None:
            return
        self._small[key] = entry
        self._small.move_to_end(key)
        while sum(e.size for e in self._small.values()) > _IN_MEMORY:
            self._small.popitem(last=False)


def write_entry(path: Path, body: bytes, meta: Mapping[str, Any]) -> int:
    """Write an answer in the cache's format, to be adopted; gives where its body begins."""
    facts = {"meta": dict(meta), "size": len(body), "crc32c": crc32c(body)}
    head = _MAGIC + json.dumps(facts).encode() + b"\n"
    with open(path, "wb") as file:
        file.write(head)
        file.write(body)
    return len(head)


def read_entry(path: Path) -> Entry | None:
    """An answer out of a file; None where there is none, or it is damaged."""
    try:
        with open(path, "rb") as file:
            return _checked(path, file)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checked(path: Path, file: BinaryIO) -> Entry | None:
    if file.readline(100) != _MAGIC:
        return None
    head = json.loads(file.readline(100_000))
    start, size, checksum = file.tell(), 0, 0
    body: list[bytes] = []
    while chunk := file.read(_CHUNK):
        size, checksum = size + len(chunk), crc32c(chunk, checksum)
        body = [*body, chunk] if size <= _SMALL else []
    if size != head["size"] or checksum != head["crc32c"]:
        return None
    whole = b"".join(body) if size <= _SMALL else None
    return Entry(head["meta"], size, whole, path, start)
