"""Object stores (S3 and what else obstore knows) with the methods of `LocalStorage`.

An object is there whole or not at all, and there once its put is answered: so there is nothing to
sync and nothing to rename. There are no locks; commit records are put on condition that there is
none yet, and whoever writes the same store at the same time writes the same bytes.

Credentials, region and endpoint come from the environment (``AWS_ACCESS_KEY_ID``,
``AWS_ENDPOINT_URL`` ...). Requests that fail are tried again, after longer and longer pauses.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache, partial, wraps
from typing import Any, TypeVar

import numpy as np
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError
from obstore.store import HTTPStore, from_url

from .errors import CorruptStoreError, StoreError, UsageError, WriteError
from .readonly import MemoryReader, ReadOnly, recent
from .storage import Reader, check_size, counters

__all__ = ["HttpStorage", "RemoteStorage", "object_store", "remote_storage"]

_RETRIES: Any = {
    "max_retries": 8,
    "retry_timeout": timedelta(minutes=2),
    "backoff": {
        "init_backoff": timedelta(milliseconds=200),
        "max_backoff": timedelta(seconds=15),
        "base": 2,
    },
}
_CLIENT: Any = {"timeout": timedelta(minutes=2), "connect_timeout": timedelta(seconds=10)}
_TAIL_NBYTES = 2**16
"""Read at once from the end of an object, where the index of a shard is."""

Method = TypeVar("Method", bound=Callable[..., Any])


@lru_cache(maxsize=64)
def object_store(url: str) -> Any:
    """obstore's store at a URL; one for every place, since it keeps connections open."""
    plain = url.startswith("http://") or _is_http()
    options: Any = {**_CLIENT, "allow_http": True} if plain else _CLIENT
    try:
        return from_url(url, client_options=options, retry_config=_RETRIES)
    except (BaseError, ValueError) as error:
        raise UsageError(f"{url}: {_first_line(error)}") from None


def _is_http() -> bool:
    """Whether the endpoint that the environment names speaks plain HTTP, as local ones do."""
    return os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _gone(error: BaseException) -> bool:
    return "NoSuchBucket" in str(error)


def _reading(method: Method) -> Method:
    """Turn what obstore raises into errors of ours; a missing object stays FileNotFoundError."""

    @wraps(method)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        try:
            return method(self, *args, **options)
        except FileNotFoundError as error:
            if _gone(error):
                raise StoreError(
                    f"{self.root}: there is no such bucket; look at the URL, and at --endpoint or "
                    "AWS_ENDPOINT_URL where it is not Amazon's"
                ) from None
            raise
        except NotSupportedError:
            raise
        except BaseError as error:
            raise StoreError(
                f"reading from {self.root} failed: {_first_line(error)}. Look at the network, the "
                "endpoint and the credentials in the environment, then ask again"
            ) from None

    return call  # type: ignore[return-value]


class RemoteStorage:
    """A folder of an object store.

    Parameters
    ----------
    root : str
        A URL, as ``s3://bucket/run.zarr``.

    Attributes
    ----------
    puts : int
        Objects written so far.
    """

    lists = True

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self.puts = 0
        self.at_once = 16
        self._store = object_store(self.root)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root!r})"

    # -- reading ---------------------------------------------------------------------------

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    @_reading
    def size(self, key: str) -> int | None:
        """Bytes of an object, None where there is none."""
        try:
            return obstore.head(self._store, key)["size"]
        except FileNotFoundError as error:
            if _gone(error):
                raise
            return None

    @_reading
    def get(self, key: str, limit: int | None = None) -> bytes | None:
        """A whole object, None where there is none; one of more bytes than `limit` is an error."""
        try:
            answer = obstore.get(self._store, key)
            check_size(key, answer.meta["size"], limit)
            data = bytes(answer.bytes())
        except FileNotFoundError as error:
            if _gone(error):
                raise
            return None
        counters.add(len(data))
        return data

    @_reading
    def keys(self, prefix: str) -> list[str]:
        """Keys of the objects directly in a folder, sorted."""
        found = obstore.list_with_delimiter(self._store, prefix or None)
        return sorted(entry["path"] for entry in found["objects"])

    @_reading
    def is_vacant(self) -> bool:
        """Whether there is nothing yet but a journal."""
        found = obstore.list_with_delimiter(self._store)
        folders = {prefix.rstrip("/") for prefix in found["common_prefixes"]}
        return not found["objects"] and folders <= {"journal"}

    @contextmanager
    def reader(self, key: str) -> Iterator[Reader]:
        """Ranged reads of one object; a missing object is an error that says so."""
        try:
            made = self._reader(key)
        except FileNotFoundError:
            raise CorruptStoreError(
                f"{key} is missing from {self.root}: run `actstore verify` to see what else is, "
                "and the same dump again to redo just that"
            ) from None
        yield made

    def _reader(self, key: str) -> Reader:
        return RemoteReader(self, key)

    @_reading
    def _read(self, key: str, start: int, end: int) -> memoryview:
        data = memoryview(obstore.get_range(self._store, key, start=start, end=end))
        counters.add(len(data))
        return data

    @_reading
    def _read_tail(self, key: str, nbytes: int) -> tuple[bytes, int]:
        """The last bytes of an object, and how many there are in all."""
        answer = obstore.get(self._store, key, options={"range": {"suffix": nbytes}})
        data = bytes(answer.bytes())
        counters.add(len(data))
        return data, answer.meta["size"]

    # -- writing ---------------------------------------------------------------------------

    def put(self, key: str, data: bytes | np.ndarray, nbytes: int | None = None) -> None:
        """Write an object; see `LocalStorage.put`."""
        self._put(key, data, nbytes, "overwrite")

    def put_durable(self, key: str, data: bytes) -> None:
        """`put`; an object store has nothing else to wait for."""
        self.put(key, data)

    def put_once(self, key: str, data: bytes) -> None:
        """Write an object that must not be there, unless it is the same."""
        try:
            self._put(key, data, None, "create")
        except AlreadyExistsError:
            if self.get(key) != data:
                raise WriteError(
                    f"{self.root}/{key} is there already, and differs: another process writes "
                    "there with other values. Choose another output"
                ) from None

    def _put(self, key: str, data: bytes | np.ndarray, nbytes: int | None, mode: Any) -> None:
        self.puts += 1
        view = memoryview(data)
        try:
            obstore.put(self._store, key, view if nbytes is None else view[:nbytes], mode=mode)
        except FileNotFoundError as error:
            raise WriteError(f"writing {key} failed: {_missing(self.root, error)}") from None
        except AlreadyExistsError:
            raise
        except BaseError as error:
            raise WriteError(
                f"writing {key} to {self.root} failed: {_first_line(error)}. What is committed is "
                "safe: run the same dump again to go on"
            ) from None

    def delete(self, key: str) -> None:
        try:
            obstore.delete(self._store, key)
        except FileNotFoundError:
            pass
        except BaseError as error:
            raise WriteError(f"deleting {key} failed: {_first_line(error)}") from None

    def make_folder(self, prefix: str) -> None:
        """Nothing: keys need no folders."""

    def sync_folder(self, prefix: str) -> None:
        """Nothing: an object is durable once its put is answered."""

    def sweep(self, prefix: str) -> None:
        """Nothing: a put that is cut short leaves no object."""

    def free_bytes(self) -> int:
        """As good as no limit."""
        return sys.maxsize

    @contextmanager
    def lock(self, name: str, shared: bool = False, wait: bool = False) -> Iterator[None]:
        """Nothing: object stores have no locks."""
        yield


def _missing(root: str, error: BaseException) -> str:
    if _gone(error):
        return f"there is no bucket for {root}. What is committed stays where the bucket is"
    return _first_line(error)


class RemoteReader:
    """Ranged reads of one object."""

    piece = 2**62  # a request costs more than any memory traffic

    def __init__(self, storage: RemoteStorage, key: str) -> None:
        self._storage = storage
        self.key = key
        self._tail, self.nbytes = storage._read_tail(key, _TAIL_NBYTES)

    def read_into(self, *buffers: np.ndarray, offset: int) -> None:
        """Fill buffers (uint8), one after another, from `offset` on; a short one is an error."""
        end = offset + sum(len(b) for b in buffers)
        if end > self.nbytes:
            raise CorruptStoreError(f"{self.key} is truncated at {self.nbytes} bytes")
        begin = self.nbytes - len(self._tail)
        if offset >= begin:
            data = memoryview(self._tail)[offset - begin : end - begin]
        else:
            data = self._storage._read(self.key, offset, end)
        done = 0
        for buffer in buffers:
            buffer[:] = np.frombuffer(data[done : done + len(buffer)], np.uint8)
            done += len(buffer)


class HttpStorage(ReadOnly, RemoteStorage):
    """A folder on a web server, which hands out files and cannot list them.

    Parts of a file are asked for; of servers that know only whole ones (``python -m http.server``)
    each is taken whole, and kept for a while.

    Parameters
    ----------
    root : str
        A URL, as ``http://localhost:8000/run.zarr``.
    """

    kind = "on a web server"
    instead = "Write to a folder or an object store"
    lists = False

    def keys(self, prefix: str) -> list[str]:
        """Nothing: web servers do not list."""
        return []

    def is_vacant(self) -> bool:
        return not (self.exists("zarr.json") or self.exists("journal/plan.json"))

    def _reader(self, key: str) -> Reader:
        if self.root not in _whole_only:
            try:
                return super()._reader(key)
            except NotSupportedError:
                _whole_only.add(self.root)
        name = (self.root, key, *self._version(key))
        return MemoryReader(key, recent.get(name, partial(self._whole, key)))

    @_reading
    def _version(self, key: str) -> tuple[str, str, int]:
        """Tells a file from what lay there before."""
        facts = obstore.head(self._store, key)
        return str(facts["e_tag"]), str(facts["last_modified"]), facts["size"]

    def _whole(self, key: str) -> bytes:
        data = self.get(key)
        if data is None:
            raise FileNotFoundError(key)
        return data


_whole_only: set[str] = set()
"""Places whose server gives no parts of a file."""


def remote_storage(url: str) -> RemoteStorage:
    """What is at a URL: an object store's folder, or a web server's."""
    is_web = isinstance(object_store(url.rstrip("/")), HTTPStore)
    return HttpStorage(url) if is_web else RemoteStorage(url)
