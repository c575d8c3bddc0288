"""A bounded pool of shard images: memory never grows, a slow disk slows the model."""

from __future__ import annotations

import threading
from collections import defaultdict

import numpy as np

from .errors import WriteError
from .storage import aligned_buffer

__all__ = ["BufferPool"]


class BufferPool:
    """Aligned buffers, reused, never more than `capacity` bytes of them at once.

    Fresh memory costs page faults, several times what filling it does; so buffers are kept and
    handed out again, and given back to the system only when another size needs the room.

    Parameters
    ----------
    capacity : int
        Bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free: dict[int, list[np.ndarray]] = defaultdict(list)
        self._allocated = 0
        self._in_flight = 0
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    def acquire(self, nbytes: int) -> np.ndarray:
        """A buffer of `nbytes`; waits while everything is being written.

        Raises
        ------
        WriteError
            All buffers are held by shards that are still open, so that waiting would not help.
        """
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                if self._free[nbytes]:
                    return self._free[nbytes].pop()
                self._evict(nbytes)
                if self._allocated + nbytes <= self.capacity:
                    self._allocated += nbytes
                    return aligned_buffer(nbytes)
                if not self._in_flight:
                    raise WriteError(
                        f"{self._allocated / 2**20:,.0f} MiB of shards are open and none is "
                        "complete: write tokens in order, or plan with a larger buffer"
                    )
                self._changed.wait()

    def has(self, nbytes: int) -> bool:
        """Whether a buffer can be had without waiting."""
        with self._changed:
            if not self._free[nbytes]:
                self._evict(nbytes)
            return bool(self._free[nbytes]) or self._allocated + nbytes <= self.capacity

    def _evict(self, nbytes: int) -> None:
        for size, buffers in self._free.items():
            while buffers and self._allocated + nbytes > self.capacity:
                buffers.pop()
                self._allocated -= size

    def send(self) -> None:
        """Count a buffer as on its way to the disk: it will come back."""
        with self._changed:
            self._in_flight += 1

    def release(self, buffer: np.ndarray, nbytes: int) -> None:
        """Take back a buffer that was sent."""
        with self._changed:
            self._in_flight -= 1
            self._free[nbytes].append(buffer)
            self._changed.notify_all()

    def arrived(self) -> None:
        """Count what was sent, and has no buffer of the pool's, as written."""
        with self._changed:
            self._in_flight -= 1
            self._changed.notify_all()

    def drop_free(self) -> None:
        """Give unused buffers back to the system."""
        with self._changed:
            for size, buffers in self._free.items():
                self._allocated -= size * len(buffers)
                buffers.clear()

    def fail(self, error: BaseException) -> None:
        """Make every waiting and later `acquire` raise `error`."""
        with self._changed:
            self._in_flight -= 1
            self._error = self._error or error
            self._changed.notify_all()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def check(self) -> None:
        """Raise the error that a writer thread met, if one did."""
        if self._error is not None:
            raise self._error
