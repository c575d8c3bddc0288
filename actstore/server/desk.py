"""Where questions are answered: out of the cache, at once from sketches, or by a job."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any

from crc32c import crc32c

from .. import __version__
from .answers import FORMATS, datasets, encode
from .cache import Cache, Entry
from .failures import ServiceError
from .jobs import Job, Jobs
from .look import Estimate, Look, evaluate, look
from .parameters import Asked
from .shelf import Served, Shelf

__all__ = ["Answer", "Desk", "key_of"]

LONG = 2.0
"""Seconds of an estimate from which a question is a job at once."""

_THREADS = 2
_MOST_WAITING = 2000
_QUICK_NBYTES = 4_000_000
"""Larger answers are written out by a worker: this process would hold up all others meanwhile."""


@dataclass(frozen=True)
class Answer:
    """An answer, and whether it came out of the cache: "hit", "miss" or "shared"."""

    entry: Entry
    source: str


class Desk:
    """Answers questions.

    Parameters
    ----------
    shelf : Shelf
    cache : Cache
    jobs : Jobs
    """

    def __init__(self, shelf: Shelf, cache: Cache, jobs: Jobs) -> None:
        self.shelf, self.cache, self.jobs = shelf, cache, jobs
        # Short work in Python: more threads would but wait for one another.
        self._threads = ThreadPoolExecutor(_THREADS, "actstore-answer")
        self._begun: dict[str, asyncio.Task[Entry | Job]] = {}
        self._computing: dict[str, Job] = {}
        self._pace: dict[str, float] = {}

    async def ask(
        self, served: Served, asked: Asked, wanted: str, wait: float | None
    ) -> Answer | Job:
        """Get an answer, or the job that makes it.

        Parameters
        ----------
        served : Served
        asked : Asked
        wanted : str
            Format.
        wait : float or None
            Seconds to wait for a job; None for the usual time, and not at all for one that will
            take longer.
        """
        key = key_of(self.shelf, served, asked, wanted)
        entry = self.cache.recall(key) or await asyncio.to_thread(self.cache.get, key)
        if entry is not None:
            return Answer(entry, "hit")
        began, source = self._begun.get(key), "shared"
        if began is None:
            if len(self._begun) >= _MOST_WAITING:
                raise ServiceError(
                    503, "busy", "too many questions at once", headers={"retry-after": "1"}
                )
            source = "miss"
            began = asyncio.create_task(self._begin(key, served, asked, wanted))
            self._begun[key] = began
            began.add_done_callback(lambda task: self._settle(key, task))
        found = await asyncio.shield(began)
        if isinstance(found, Entry):
            return Answer(found, source)
        if wait is None:
            wait = 0 if found.estimate.seconds > LONG else LONG
        try:
            await asyncio.wait_for(found.finished.wait(), wait)
        except TimeoutError:
            return found
        if found.error is not None:
            raise _again(found.error)
        entry = await asyncio.to_thread(self.cache.get, key)
        return found if entry is None else Answer(entry, source)

    async def estimate(self, served: Served, asked: Asked) -> Estimate:
        """What an answer would take, without computing it."""
        found: Look = await self.in_thread(
            look, served.store, asked.query, asked.arguments(self.shelf.second), "json"
        )
        return self._paced(asked.query, found.estimate)

    async def in_thread(self, function: Any, *arguments: Any) -> Any:
        """Run short work beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def close(self) -> None:
        await self.jobs.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _begin(self, key: str, served: Served, asked: Asked, wanted: str) -> Entry | Job:
        quick = await self.in_thread(self._quick, key, served, asked, wanted)
        return quick if isinstance(quick, Entry) else self._job(key, served, asked, wanted, quick)

    def _quick(self, key: str, served: Served, asked: Asked, wanted: str) -> Entry | Look:
        began = time.perf_counter()
        arguments = asked.arguments(self.shelf.second)
        found = look(served.store, asked.query, arguments, wanted)
        nbytes = sum(d.nbytes for d in datasets(found.result))
        if not found.quick or wanted not in ("json", "csv") or nbytes > _QUICK_NBYTES:
            return found
        body = encode(evaluate(found.result), wanted)
        seconds = time.perf_counter() - began
        return self.cache.put(key, body, {"seconds": seconds, "type": FORMATS[wanted]})

    def _job(self, key: str, served: Served, asked: Asked, wanted: str, found: Look) -> Job:
        """A job for a worker, which also keeps the result to be had in other formats."""
        whole = key_of(self.shelf, served, asked, "whole")
        kept = not found.quick and self.cache.path(whole).exists()
        other = None if found.quick or kept else self._computing.get(whole)
        light = found.quick or kept or other is not None
        out, keep = self.cache.part(), None if light else self.cache.part()
        stores = {name: self.shelf.second(name) for name in asked.stores()}
        order = {
            "query": asked.query,
            "text": dict(asked.text),
            "format": wanted,
            "store": [served.store.path, served.store.id],
            "stores": {name: [s.path, s.id] for name, s in stores.items()},
            "nbytes": found.estimate.nbytes,
            "kept": None if found.quick or keep is not None else str(self.cache.path(whole)),
            "keep": None if keep is None else str(keep),
            "out": str(out),
            "names": self.shelf.path_names(),
        }
        own, query = found.estimate, asked.query  # and not the graph with them
        estimate = Estimate(0, 1.0, own.source) if light else self._paced(query, own)

        def adopt(done: Mapping[str, Any]) -> None:
            self.cache.adopt(key, out)
            if keep is not None and done["kept"]:
                self.cache.adopt(whole, keep)
                self._learn(query, own, done["seconds"])

        parts = [out] if keep is None else [out, keep]
        job = Job(asked.query, served.name, order, estimate, adopt, parts, light, other)
        self.jobs.submit(job)
        if keep is not None:
            self._computing[whole] = job
        return job

    def _settle(self, key: str, task: asyncio.Task[Entry | Job]) -> None:
        """Forget a question when it is answered."""
        if task.cancelled() or task.exception() is not None or isinstance(task.result(), Entry):
            self._begun.pop(key, None)
            return
        job = task.result()
        assert isinstance(job, Job)

        async def forget() -> None:
            await job.finished.wait()
            self._begun.pop(key, None)
            for whole in [w for w, j in self._computing.items() if j is job]:
                del self._computing[whole]

        forgetting = asyncio.create_task(forget())
        job.watchers.append(forgetting)

    # -- how long things take ----------------------------------------------------------------

    def _paced(self, query: str, own: Estimate) -> Estimate:
        """An estimate, corrected by how long the same query took before."""
        return Estimate(own.nbytes, own.seconds * self._pace.get(query, 1.0), own.source)

    def _learn(self, query: str, estimate: Estimate, seconds: float) -> None:
        ratio = min(max(seconds / max(estimate.seconds, 0.1), 0.05), 20.0)
        self._pace[query] = ratio if query not in self._pace else (self._pace[query] + ratio) / 2


def key_of(shelf: Shelf, served: Served, asked: Asked, wanted: str) -> str:
    """What identifies an answer: the data by content, the question by meaning, and our version."""
    stores = [served.store, *map(shelf.second, asked.stores())]
    parts = [_version(), [[s.name, s.id] for s in stores], asked.canonical, wanted]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


@once
def _version() -> str:
    """The package's version; of one that is being worked on, what it is at the moment."""
    root = Path(__file__).parents[1]
    checksum = 0
    for path in sorted(root.rglob("*.py")):
        checksum = crc32c(path.read_bytes(), checksum)
    return f"{__version__}+{checksum:08x}"


def _again(error: Mapping[str, Any]) -> ServiceError:
    """A worker's failure as our own."""
    fields = ("status", "code", "message", "value", "allowed", "nearest")
    return ServiceError(*(error[name] for name in fields))
