"""Which stores are served, and by which names; they are opened once and kept."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..errors import NotAStoreError, StoreError
from ..places import absolute, is_url, is_zip, last_name
from ..store import Store, open_store
from .browse import Browser
from .failures import ServiceError

__all__ = ["Served", "Shelf"]

log = logging.getLogger("actstore.server")

_DEPTH = 3
"""Folders within one another in which stores are looked for."""


@dataclass(frozen=True)
class Served:
    """A store that is served.

    Attributes
    ----------
    name : str
        In addresses.
    store : Store
    browser : Browser
        Its tokens and texts.
    stamp : tuple
        Of the file that is written when a store is sealed.
    """

    name: str
    store: Store
    browser: Browser
    stamp: tuple[int, ...]


class Shelf:
    """The served stores.

    Parameters
    ----------
    paths : iterable of path
        Stores, and folders of stores, in which new ones are seen when the list is asked for.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        self._paths = [os.fspath(p) for p in paths]
        self._lock = threading.Lock()
        self._served: dict[str, Served] = {}
        self._places: dict[str, str] = {}
        self._refused: set[str] = set()
        self.scan(strict=True)
        if not self._places:
            raise NotAStoreError(
                f"there is no sealed store in {', '.join(self._paths)}: name a store, or a folder "
                "with stores in it"
            )

    def scan(self, *, strict: bool = False) -> list[str]:
        """Look for stores anew; names of all, sorted.

        Parameters
        ----------
        strict : bool
            Raise where a path that was named is no store; stores in folders are passed over.
        """
        found: dict[str, str] = {}
        for path in self._paths:
            inside = _stores_in(path)
            for place in map(absolute, [path] if inside is None else inside):
                if place in found.values():
                    continue
                name = _free_name(place, found)
                try:
                    self._open(name, place)
                except StoreError as error:
                    if strict and inside is None:
                        raise
                    if place not in self._refused:
                        log.warning("not served: %s", error)
                    self._refused.add(place)
                else:
                    found[name] = place
        with self._lock:
            self._places = found
        return sorted(found)

    def __getitem__(self, name: str) -> Served:
        """A served store, opened anew if it was written anew.

        Raises
        ------
        ServiceError
            There is none of that name.
        """
        return self._named(name, 404)

    def second(self, name: str) -> Store:
        """A store that a parameter names."""
        return self._named(name, 400).store

    def _named(self, name: str, status: int) -> Served:
        place = self._places.get(name)
        if place is None:
            raise ServiceError.unknown(status, "store", name, sorted(self._places))
        return self._open(name, place)

    def path_names(self) -> dict[str, str]:
        """What messages call each path."""
        names: dict[str, str] = {}
        for name, place in self._places.items():
            for path in (place, os.path.realpath(place)):
                names[path] = name
                names.setdefault(str(Path(path).parent), "…")
        return {path: name for path, name in names.items() if len(Path(path).parts) > 1}

    def _open(self, name: str, place: str) -> Served:
        with self._lock:
            known = self._served.get(place)
            stamp = _stamp(place)
            if known is None or known.stamp != stamp:
                store = open_store(place)
                # Columns are read for every question; a sealed store's do not change.
                store.column = lru_cache(maxsize=64)(store.column)  # type: ignore[method-assign]
                known = Served(name, store, Browser(store), stamp)
            elif known.name != name:
                known = Served(name, known.store, known.browser, stamp)
            self._served[place] = known
            return known


def _stores_in(path: str) -> list[str] | None:
    """Stores in a folder; None where the path is itself a store, or is not there."""
    if is_url(path) or not os.path.isdir(path) or _is_store(path):
        return None
    return list(_below(path, _DEPTH))


def _below(folder: str, depth: int) -> Iterator[str]:
    """Stores some folders down; what lies in a store is not looked at, there may be very much."""
    with os.scandir(folder) as entries:
        seen = sorted((e.path, e.is_dir()) for e in entries if not e.name.startswith("."))
    for path, is_folder in seen:
        if path.endswith(".zarr.zip") if not is_folder else _is_store(path):
            yield path
        elif is_folder and depth > 1:
            yield from _below(path, depth - 1)


def _is_store(path: str) -> bool:
    """Whether a folder is one, be it not finished."""
    return any(os.path.exists(os.path.join(path, part)) for part in ("zarr.json", "journal"))


def _free_name(place: str, taken: Iterable[str]) -> str:
    stem = last_name(place).removesuffix(".zip").removesuffix(".zarr")
    names = [stem, *(f"{stem}-{i}" for i in range(2, len(list(taken)) + 3))]
    return next(name for name in names if name not in taken)


def _stamp(place: str) -> tuple[int, ...]:
    """What differs when a store was written anew, even if its times were put back."""
    try:
        status = os.stat(place if is_zip(place) else os.path.join(place, "zarr.json"))
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino
