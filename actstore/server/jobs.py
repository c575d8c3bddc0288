"""Long questions as jobs: a bounded number at once, a bounded queue, each in a process to stop."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .failures import ServiceError
from .look import Estimate

__all__ = ["Job", "Jobs"]

log = logging.getLogger("actstore.server")

_KEPT = 200
"""Finished jobs that are remembered."""

_LINE = 2**20
_LIVE = ("queued", "running")


@dataclass(eq=False)
class Job:
    """A question that takes long.

    Attributes
    ----------
    query, store : str
    order : dict
        For a worker.
    estimate : Estimate
    adopt : callable
        Called with what the worker said at the end, to take over what it wrote.
    parts : list of Path
        Files that the worker writes, to be removed if it does not come to the end.
    light : bool
        Whether it needs but seconds, and goes beside those that are long.
    after : Job or None
        What it waits for.
    """

    query: str
    store: str
    order: Mapping[str, Any]
    estimate: Estimate
    adopt: Callable[[Mapping[str, Any]], None]
    parts: list[Path]
    light: bool
    after: Job | None = None
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: str = "queued"
    progress: float = 0.0
    error: dict[str, Any] | None = None
    began: float = field(default_factory=time.monotonic)
    elapsed: float | None = None
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    watchers: list[asyncio.Task[None]] = field(default_factory=list)

    def shape(self) -> dict[str, Any]:
        """What clients are told."""
        elapsed = time.monotonic() - self.began if self.elapsed is None else self.elapsed
        return {
            "id": self.id,
            "query": self.query,
            "store": self.store,
            "state": self.state,
            "estimate": {"nbytes": self.estimate.nbytes, "seconds": self.estimate.seconds},
            "progress": self.progress,
            "elapsed": round(elapsed, 3),
            "error": self.error,
        }

    def end(self, state: str, error: Mapping[str, Any] | None = None) -> None:
        """Note how it ended, once."""
        if self.state in _LIVE:
            self.state, self.elapsed = state, time.monotonic() - self.began
            self.error = None if error is None else dict(error["error"])
            self.progress = 1.0 if state == "done" else self.progress
            self.finished.set()


class Jobs:
    """Runs jobs.

    Parameters
    ----------
    at_once : int
        Long ones at once; a light one may run beside them.
    waiting : int
        Most that may wait.
    seconds : float
        Most that one may run.
    """

    def __init__(self, at_once: int, waiting: int, seconds: float) -> None:
        self._at_once, self._waiting, self._seconds = at_once, waiting, seconds
        self._jobs: dict[str, Job] = {}
        self._queues: dict[bool, asyncio.Queue[Job]] = {}
        self._runners: list[asyncio.Task[None]] = []
        self._workers: dict[Job, _Worker] = {}
        self._held: set[asyncio.Task[None]] = set()

    def submit(self, job: Job) -> None:
        """Have a job run when its turn comes.

        Raises
        ------
        ServiceError
            There are too many already.
        """
        alike = (j for j in self._jobs.values() if j.light == job.light)
        waiting = sum(j.state == "queued" for j in alike)
        if waiting >= self._waiting:
            raise ServiceError(
                503,
                "busy",
                f"{waiting} questions are waiting already: ask again in a while, or cancel some",
                headers={"retry-after": "5"},
            )
        over = [j.id for j in self._jobs.values() if j.state not in _LIVE]
        for old in over[: max(0, len(over) - _KEPT)]:
            del self._jobs[old]
        self._jobs[job.id] = job
        if job.after is None:
            self._queue(job)
            return
        task = asyncio.create_task(self._queue_after(job, job.after))
        self._held.add(task)
        task.add_done_callback(self._held.discard)

    def __getitem__(self, wanted: str) -> Job:
        if wanted not in self._jobs:
            raise ServiceError(
                404, "unknown_name", "there is no such job, or it is long over", wanted
            )
        return self._jobs[wanted]

    def __iter__(self) -> Any:
        return iter(list(self._jobs.values()))

    def cancel(self, job: Job) -> None:
        """Stop a job, at once."""
        job.end("cancelled")
        worker = self._workers.get(job)
        if worker is not None:
            worker.stop()

    def warm(self) -> None:
        """Start a worker before one is needed: it takes a second or two."""
        self._runners_of(light=True)

    async def close(self) -> None:
        """Stop everything."""
        for job in self:
            self.cancel(job)
        tasks = [*self._runners, *self._held]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._runners.clear()

    def _queue(self, job: Job) -> None:
        self._runners_of(light=job.light).put_nowait(job)

    def _runners_of(self, *, light: bool) -> asyncio.Queue[Job]:
        """The queue of those that run light jobs, or long ones; they begin with the first."""
        if light not in self._queues:
            queue = self._queues[light] = asyncio.Queue()
            for _ in range(1 if light else self._at_once):
                self._runners.append(asyncio.create_task(self._run(queue, warm=light)))
        return self._queues[light]

    async def _queue_after(self, job: Job, other: Job) -> None:
        await other.finished.wait()
        if job.state == "queued":
            self._queue(job)

    async def _run(self, queue: asyncio.Queue[Job], *, warm: bool) -> None:
        """Answer jobs one after another, with a process of its own."""
        worker = _Worker()
        try:
            if warm:
                await worker.start()
            while True:
                job = await queue.get()
                if job.state != "queued":
                    continue
                job.state = "running"
                self._workers[job] = worker
                try:
                    async with asyncio.timeout(self._seconds):
                        await worker.answer(job)
                except TimeoutError:
                    worker.stop()
                    message = f"this took over {self._seconds:,.0f} s: ask for less at a time"
                    job.end("failed", ServiceError(504, "timeout", message).shape())
                except Exception as error:
                    log.error("a worker failed", exc_info=error)
                    worker.stop()
                    message = "this failed; the server's own messages say why"
                    job.end("failed", ServiceError(500, "internal", message).shape())
                finally:
                    del self._workers[job]
                    for part in job.parts:
                        part.unlink(missing_ok=True)
        finally:
            await worker.close()


class _Worker:
    """A process of `worker`, started when it is first needed, and again after it was stopped."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._stopped = False

    async def start(self) -> asyncio.subprocess.Process:
        """The process, started if there is none."""
        if self._process is not None and self._stopped:
            await self._process.wait()
        if self._process is None or self._process.returncode is not None:
            self._stopped = False
            # -P: nothing that lies in the folder we happen to be in is imported.
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "actstore.server.worker"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_LINE,
            )
        return self._process

    async def answer(self, job: Job) -> None:
        """Have a job answered; ends the job."""
        process = await self.start()
        if job.state != "running":  # it was cancelled meanwhile
            return
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(job.order).encode() + b"\n")
        await process.stdin.drain()
        while line := await process.stdout.readline():
            reply = json.loads(line)
            if "progress" in reply:
                job.progress = reply["progress"]
            elif "failed" in reply:
                job.end("failed", reply["failed"])
                return
            else:
                job.adopt(reply["done"])
                job.end("done")
                return
        await process.wait()
        if job.state == "running":
            log.error("a worker ended with status %s", process.returncode)
            message = "the process that answers has ended: it took too much memory, perhaps"
            job.end("failed", ServiceError(500, "internal", message).shape())

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._stopped = True
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()

    async def close(self) -> None:
        """End the process, and see that it has."""
        self.stop()
        if self._process is not None:
            await self._process.communicate()
