"""What places that can only be read have in common."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from .errors import CorruptStoreError, WriteError
from .storage import counters

__all__ = ["KEPT_NBYTES", "MemoryReader", "ReadOnly", "recent"]

KEPT_NBYTES = 2**28
"""Most bytes that `recent` keeps, but for one object that is larger."""


class ReadOnly:
    """Refuses to write.

    Attributes
    ----------
    root : path or str
    kind, instead : str
        What the place is, and what to do.
    """

    root: Any
    kind: str
    instead: str
    puts = 0
    at_once = 1

    def refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise WriteError(
            f"{self.root} cannot be written: it is {self.kind}, which is only read. {self.instead}"
        )

    put = put_durable = put_once = delete = refuse
    make_folder = sync_folder = sweep = lock = free_bytes = refuse


class MemoryReader:
    """Ranged reads of an object that had to be taken whole."""

    piece = 2**62  # it is in memory already

    def __init__(self, key: str, data: bytes) -> None:
        self.key, self.nbytes = key, len(data)
        self._data = data

    def read_into(self, *buffers: np.ndarray, offset: int) -> None:
        """Fill buffers (uint8), one after another, from `offset` on; a short one is an error."""
        if offset + sum(len(b) for b in buffers) > self.nbytes:
            raise CorruptStoreError(f"{self.key} is truncated at {self.nbytes} bytes")
        start = offset
        for buffer in buffers:
            buffer[:] = np.frombuffer(self._data, np.uint8, len(buffer), offset)
            offset += len(buffer)
        counters.add(offset - start)


class Recent:
    """Whole objects that were taken lately: reading part after part takes each once."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._kept: OrderedDict[Any, bytes] = OrderedDict()

    def get(self, name: Any, take: Callable[[], bytes]) -> bytes:
        """An object by a name that no other has, taken if it is not kept."""
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
        data = take()
        with self._lock:
            self._kept[name] = data
            nbytes = sum(map(len, self._kept.values()))
            while nbytes > self._limit and len(self._kept) > 1:
                nbytes -= len(self._kept.popitem(last=False)[1])
        return data


recent = Recent(KEPT_NBYTES)
