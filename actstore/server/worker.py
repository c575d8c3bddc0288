"""A process that answers long questions, one at a time: `python -m actstore.server.worker`.

A process, because it can be stopped at any point, gives its memory back, and leaves the server to
answer the others meanwhile. An order is a line of JSON on stdin; answers are lines of JSON on
stdout: how far it is, and at last what became of it. The answer itself goes to a file. It ends
with its stdin.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

from ..queries import QUERIES, compute
from ..queries.result import Result
from ..storage import counters
from ..store import Store, open_store
from . import answers
from .cache import read_entry, write_entry
from .failures import describe
from .parameters import Asked

_EVERY = 0.2
"""Seconds between two words on how far it is."""


def main() -> None:
    """Answer orders until stdin ends."""
    _bound_memory()
    # Whatever prints goes to stderr: stdout is for answers alone.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    orders = _orders()
    while (order := orders.get()) is not None:
        try:
            reply: dict[str, Any] = {"done": _answer(order, replies)}
        except Exception as error:
            reply = {"failed": describe(error, order["names"]).shape()}
        _tell(replies, reply)


def _bound_memory() -> None:
    """A question that takes half of the machine's memory fails, and nothing else does."""
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _orders() -> SimpleQueue[dict[str, Any] | None]:
    """Orders as they come; the process ends when there can be no more, whatever it is doing."""
    queue: SimpleQueue[dict[str, Any] | None] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            queue.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return queue


def _answer(order: dict[str, Any], replies: TextIO) -> dict[str, Any]:
    began = time.perf_counter()
    kept = None if order["kept"] is None else read_entry(Path(order["kept"]))
    if kept is not None:
        result, seconds = answers.thaw(kept.read()), kept.meta["seconds"]
    else:
        result = _computed(order, replies)
        seconds = time.perf_counter() - began
        if order["keep"] is not None:
            write_entry(Path(order["keep"]), answers.freeze(result), {"seconds": seconds})
    began = time.perf_counter()
    body = answers.encode(result, order["format"])
    seconds += time.perf_counter() - began
    meta = {"seconds": seconds, "type": answers.FORMATS[order["format"]]}
    write_entry(Path(order["out"]), body, meta)
    return {"seconds": seconds, "kept": kept is None and order["keep"] is not None}


def _computed(order: dict[str, Any], replies: TextIO) -> Result:
    asked = Asked(order["query"], order["text"])
    arguments = asked.arguments(lambda name: _open(*order["stores"][name]))
    lazy = QUERIES[order["query"]].function(_open(*order["store"]), **arguments)
    answers.check_size(lazy, order["format"])
    with _Progress(order["nbytes"], replies) as told:
        return compute(lazy, progress=told.tasks)


@lru_cache(maxsize=8)
def _open(path: str, identity: str) -> Store:
    return open_store(path)


class _Progress:
    """Tells how far a computation is: by the bytes that it has read, and by its tasks."""

    def __init__(self, nbytes: int, replies: TextIO) -> None:
        self._nbytes, self._replies = nbytes, replies
        self._done = 0.0
        self._before = counters.bytes
        self._over = threading.Event()

    def tasks(self, done: int, total: int) -> None:
        self._done = done / total

    def __enter__(self) -> _Progress:
        threading.Thread(target=self._tell, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._over.set()

    def _tell(self) -> None:
        last = 0.0
        while not self._over.wait(_EVERY):
            tasks = self._done
            read = (counters.bytes - self._before) / self._nbytes if self._nbytes else tasks
            now = round(min((tasks + min(read, 1.0)) / 2, 0.99), 3)
            if now > last:
                _tell(self._replies, {"progress": now})
                last = now


_telling = threading.Lock()


def _tell(replies: TextIO, reply: dict[str, Any]) -> None:
    with _telling:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
