"""Objects by key under one root: durable atomic writes, ranged reads, counted.

The rest of the package names objects by "/"-separated keys and never touches paths: what it needs
of a place is `Storage`. Folders are `LocalStorage`; for object stores see `remote`.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .errors import CorruptStoreError, StoreError, WriteError

__all__ = ["LocalStorage", "Reader", "Storage", "aligned_buffer", "check_key", "counters"]

_PAGE = 4096
_PARTIAL = ".partial"


class Counters:
    """Reads and bytes of shard data, for tests and for `bytes_read` in results."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reads = 0
        self.bytes = 0

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.reads += 1
            self.bytes += nbytes

    def reset(self) -> None:
        with self._lock:
            self.reads = self.bytes = 0


counters = Counters()


def aligned_buffer(nbytes: int) -> np.ndarray:
    """Zeroed bytes at a page boundary, padded to whole pages, as direct I/O wants them."""
    size = max(1, -(-nbytes // _PAGE)) * _PAGE
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Touching memory for the first time, page by page, takes longer than filling it.
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def check_key(key: str) -> None:
    """Refuse a key that would lead out of a store, or that no place can have.

    Examples
    --------
    >>> check_key("mlp_post/activation/c.0.0.0")
    >>> check_key("../../etc/passwd")
    Traceback (most recent call last):
        ...
    actstore.errors.CorruptStoreError: '../../etc/passwd' leads out of the store
    """
    if {"", ".", ".."} & set(key.split("/")):
        raise CorruptStoreError(f"{key[:200]!r} leads out of the store")
    if len(key) > 1024 or "\0" in key:
        raise CorruptStoreError(f"{key[:200]!r} is no name for an object")


def check_size(key: str, nbytes: int, limit: int | None) -> None:
    """Refuse to read more than is due."""
    if limit is not None and nbytes > limit:
        raise CorruptStoreError(
            f"{key} has {nbytes:,} bytes, and at most {limit:,} are due: it was changed since it "
            "was written. Run `actstore verify` to see what else was, and the same dump again"
        )


class Reader(Protocol):
    """Ranged reads of one object.

    Attributes
    ----------
    key : str
    nbytes : int
        Of the whole object.
    piece : int
        Bytes that are best read at a time where more are wanted.
    """

    key: str
    nbytes: int
    piece: int

    def read_into(self, *buffers: np.ndarray, offset: int) -> None:
        """Fill buffers (uint8), one after another, from `offset` on; a short one is an error."""


class Storage(Protocol):
    """What a place for a store can do; see `LocalStorage` for what each method means.

    Attributes
    ----------
    root : path or str
    puts : int
        Objects written so far.
    at_once : int
        Small objects that are best written at the same time.
    lists : bool
        Whether it can say which objects there are.
    """

    root: Any
    puts: int
    at_once: int
    lists: bool

    def exists(self, key: str) -> bool: ...
    def size(self, key: str) -> int | None: ...
    def get(self, key: str, limit: int | None = None) -> bytes | None: ...
    def keys(self, prefix: str) -> list[str]: ...
    def is_vacant(self) -> bool: ...
    def reader(self, key: str) -> AbstractContextManager[Reader]: ...
    def put(self, key: str, data: bytes | np.ndarray, nbytes: int | None = None) -> None: ...
    def put_durable(self, key: str, data: bytes) -> None: ...
    def put_once(self, key: str, data: bytes) -> None: ...
    def make_folder(self, prefix: str) -> None: ...
    def sync_folder(self, prefix: str) -> None: ...
    def sweep(self, prefix: str) -> None: ...
    def delete(self, key: str) -> None: ...
    def free_bytes(self) -> int: ...
    def lock(
        self, name: str, shared: bool = False, wait: bool = False
    ) -> AbstractContextManager[None]: ...


class LocalStorage:
    """A folder. Writes go to a temporary name, are synced, then renamed.

    Parameters
    ----------
    root : path
        The folder; it need not exist yet.
    tag : str
        Part of temporary names, so that processes that write the same object do not meet in them.
        A rerun with the same tag writes over what a killed run left.

    Attributes
    ----------
    puts : int
        Objects written so far.
    """

    lists = True

    def __init__(self, root: str | os.PathLike[str], tag: str = "0") -> None:
        self.root = Path(root)
        self.tag = tag
        self.puts = 0
        self.at_once = 1

    def __repr__(self) -> str:
        return f"LocalStorage({str(self.root)!r})"

    def path(self, key: str) -> Path:
        if key:
            check_key(key)
        return self.root / key

    # -- reading ---------------------------------------------------------------------------

    def exists(self, key: str) -> bool:
        return self.path(key).exists()

    def size(self, key: str) -> int | None:
        """Bytes of an object, None where there is none."""
        try:
            return self.path(key).stat().st_size
        except FileNotFoundError:
            return None

    def get(self, key: str, limit: int | None = None) -> bytes | None:
        """A whole object, None where there is none; one of more bytes than `limit` is an error."""
        try:
            fd = self._open(key)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        with os.fdopen(fd, "rb") as file:
            check_size(key, os.fstat(fd).st_size, limit)
            return file.read()

    def _open(self, key: str) -> int:
        """Open an object for reading: a file, and one that lies in the store."""
        path = self.path(key)
        try:
            real, root = os.path.realpath(path), os.path.realpath(self.root)
            if not real.startswith(f"{root.rstrip('/')}/"):
                raise StoreError(
                    f"{key} is a link to {real}, outside of {self.root}: copy what it points to "
                    "into its place"
                )
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for a writer
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise
        except OSError as error:
            raise StoreError(
                f"reading {key} of {self.root} failed: {error.strerror or error}"
            ) from None
        kind = os.fstat(fd).st_mode
        if not stat.S_ISREG(kind):
            os.close(fd)
            if stat.S_ISDIR(kind):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            raise StoreError(f"{key} of {self.root} is no file")
        return fd

    def keys(self, prefix: str) -> list[str]:
        """Keys of the objects directly in a folder, sorted; unfinished writes left out."""
        try:
            with os.scandir(self.path(prefix)) as entries:
                names = [e.name for e in entries if not e.name.endswith(_PARTIAL)]
        except FileNotFoundError:
            return []
        return [f"{prefix}/{name}" for name in sorted(names)]

    def is_vacant(self) -> bool:
        """Whether there is nothing yet but what a dump that was killed at once may leave."""
        return not self.root.exists() or not set(os.listdir(self.root)) - {"journal"}

    @contextmanager
    def reader(self, key: str) -> Iterator[LocalReader]:
        """Ranged reads of one object; a missing object is an error that says so."""
        try:
            fd = self._open(key)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise CorruptStoreError(
                f"{key} is missing from {self.root}: run `actstore verify` to see what else is, "
                "and the same dump again to redo just that"
            ) from None
        try:
            yield LocalReader(fd, key)
        finally:
            os.close(fd)

    # -- writing ---------------------------------------------------------------------------

    def put(self, key: str, data: bytes | np.ndarray, nbytes: int | None = None) -> None:
        """Write an object so that it is there whole or not at all; the folder is not synced.

        Parameters
        ----------
        key : str
            Where.
        data : bytes or ndarray of uint8
            What. An `aligned_buffer` is written past the page cache where the system allows.
        nbytes : int, optional
            Length of the object when `data` is a longer aligned buffer.
        """
        self.puts += 1
        path = self.path(key)
        partial = path.with_name(f"{path.name}.{self.tag}{_PARTIAL}")
        view = memoryview(data)
        nbytes = view.nbytes if nbytes is None else nbytes
        try:
            if not (view.nbytes % _PAGE == 0 and _write_direct(partial, view, nbytes)):
                _write_buffered(partial, view[:nbytes])
            os.rename(partial, path)
        except BaseException:
            # The partial file of a failed write would only take up the room that is short.
            partial.unlink(missing_ok=True)
            raise

    def make_folder(self, prefix: str) -> None:
        """Make a folder and those above it, durably."""
        path = self.path(prefix)
        new = [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for made in new:
            _sync(made.parent)

    def sweep(self, prefix: str) -> None:
        """Remove what killed writers left under temporary names in a folder."""
        for partial in self.path(prefix).glob(f"*{_PARTIAL}"):
            partial.unlink(missing_ok=True)

    def sync_folder(self, prefix: str) -> None:
        """Make the names in a folder durable."""
        _sync(self.path(prefix))

    def put_durable(self, key: str, data: bytes) -> None:
        """`put`, folders made as needed, and the name itself durable."""
        folder = key.rpartition("/")[0]
        self.make_folder(folder)
        self.put(key, data)
        self.sync_folder(folder)

    def put_once(self, key: str, data: bytes) -> None:
        """`put_durable` of what must not be there yet; here a lock keeps others away."""
        self.put_durable(key, data)

    def delete(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)

    def free_bytes(self) -> int:
        """Room left where the root is or will be."""
        place = self.root.absolute()
        while not place.exists():
            place = place.parent
        status = os.statvfs(place)
        return status.f_bavail * status.f_frsize

    @contextmanager
    def lock(self, name: str, shared: bool = False, wait: bool = False) -> Iterator[None]:
        """Hold an advisory lock on a folder or file for a while; it dies with the process."""
        path = self.path(name)
        fd = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDONLY | os.O_CREAT, 0o666)
        try:
            try:
                kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                fcntl.flock(fd, kind if wait else kind | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise WriteError(
                        f"{self.root} is being written by another process: wait for it to end, "
                        "or choose another output"
                    ) from None
                # A file system without locks: the writer works all the same, unguarded.
            yield
        finally:
            os.close(fd)


class LocalReader:
    """Ranged reads of one open file."""

    piece = 2**20  # stays in a core's own cache while it is checked and laid out

    def __init__(self, fd: int, key: str) -> None:
        self._fd = fd
        self.key = key
        self.nbytes = os.fstat(fd).st_size

    def read_into(self, *buffers: np.ndarray, offset: int) -> None:
        """Fill buffers (uint8), one after another, from `offset` on; a short file is an error."""
        left = list(buffers)
        done = 0
        while left:
            got = os.preadv(self._fd, left, offset + done)
            if got == 0 and len(left[0]):
                raise CorruptStoreError(f"{self.key} is truncated at {self.nbytes} bytes")
            done += got
            while left and got >= len(left[0]):
                got -= len(left.pop(0))
            if got:
                left[0] = left[0][got:]
        counters.add(done)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_buffered(path: Path, view: memoryview) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _write_all(fd, view)
        os.fdatasync(fd)
    finally:
        os.close(fd)


def _write_direct(path: Path, view: memoryview, nbytes: int) -> bool:
    """Write whole pages past the page cache, then cut to length; False where not supported."""
    direct = getattr(os, "O_DIRECT", 0)
    if not direct:
        return False
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | direct, 0o666)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    try:
        _write_all(fd, view[: -(-nbytes // _PAGE) * _PAGE])
        os.ftruncate(fd, nbytes)
        os.fdatasync(fd)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    finally:
        os.close(fd)
    return True


def _write_all(fd: int, view: memoryview) -> None:
    while view.nbytes:
        view = view[os.write(fd, view) :]
