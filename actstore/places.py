"""Where stores are: folders and zip archives, by their path; object stores and web, by URL."""

from __future__ import annotations

import os
from typing import Any

from .errors import UsageError
from .readonly import ReadOnly
from .storage import LocalStorage, Storage
from .zipped import ZipStorage

__all__ = ["absolute", "check_writable", "is_url", "is_zip", "last_name", "storage_at", "zarr_at"]

_FILE = "file://"


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether a place is in an object store, or on a web server.

    Examples
    --------
    >>> is_url("s3://bucket/run.zarr"), is_url("run.zarr"), is_url("file:///data/run.zarr")
    (True, False, False)
    """
    text = os.fspath(place)
    return "://" in text and not text.startswith(_FILE)


def is_zip(place: str | os.PathLike[str]) -> bool:
    """Whether a place is a zip archive, or would be.

    Examples
    --------
    >>> is_zip("run.zarr.zip"), is_zip("run.zarr"), is_zip("s3://bucket/run.zarr.zip")
    (True, False, False)
    """
    path = os.fspath(place).removeprefix(_FILE)
    return path.endswith(".zip") and not is_url(path) and not os.path.isdir(path)


def absolute(place: str | os.PathLike[str]) -> str:
    """A path from the root, a URL as it is: what other processes can find the place by."""
    text = os.fspath(place)
    return text.rstrip("/") if is_url(text) else os.path.abspath(text.removeprefix(_FILE))


def last_name(place: str | os.PathLike[str]) -> str:
    """The last part of a path or URL."""
    return absolute(place).rpartition("/")[2]


def storage_at(place: str | os.PathLike[str], tag: str = "0") -> Storage:
    """Objects under a path or URL; `tag` as for `LocalStorage`, which alone has a use for it."""
    if is_url(place):
        return _remote().remote_storage(os.fspath(place))
    path = os.fspath(place).removeprefix(_FILE)
    return ZipStorage(path) if is_zip(path) else LocalStorage(path, tag)


def check_writable(place: str | os.PathLike[str]) -> None:
    """Refuse a place that can only be read, before anything takes long.

    Raises
    ------
    WriteError

    Examples
    --------
    >>> check_writable("run.zarr")
    """
    storage = storage_at(place)
    if isinstance(storage, ReadOnly):
        storage.refuse()


def zarr_at(place: str) -> Any:
    """What zarr and xarray open, for reading."""
    if not is_url(place):
        return place.removeprefix(_FILE)
    from zarr.storage import ObjectStore

    return ObjectStore(_remote().object_store(place), read_only=True)


def _remote() -> Any:
    try:
        from . import remote
    except ImportError:
        raise UsageError(
            "stores at URLs need obstore: pip install 'actstore[remote]', or give a path"
        ) from None
    return remote
