"""`actstore bench serve`: how long answers take: from sketches, cached, in parallel."""

from __future__ import annotations

import http.client
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from .output import print_json, print_table, say, size
from .speed.stores import make_store

__all__ = ["serve"]

ASKED = {
    "moments, every stage, per layer": "moments?per=layer",
    "moments, a layer, per neuron": "moments?stages={stage}&layers={layer}",
    "mean_activation, a layer": "mean_activation?stages={stage}&layers={layer}",
    "top_tokens, a neuron": "top_tokens?stages={stage}&layers={layer}&neurons=7",
}
"""Questions that sketches answer."""


def serve(
    gigabytes: Annotated[float, typer.Option(help="Size of the store that is made.")] = 5,
    repeats: Annotated[int, typer.Option(help="Different questions of each kind.")] = 30,
    requests: Annotated[int, typer.Option(help="Requests at the same time.")] = 200,
    folder: Annotated[
        Path | None, typer.Option(help="Where to write; default the temporary folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The real server over loopback: the demo's store, and a large one of random values.

    new: questions that were not asked before (each with another token expression), answered from
    sketches. cached: the same ones again. parallel: different questions, each on a connection of
    its own, all at the same time; seconds are of all together. Times are of the client, from
    sending to the last byte; server_ms is what the server says it computed.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        stores = Path(scratch) / "stores"
        stores.mkdir()
        _demo(stores / "demo.zarr")
        make_store(stores / "large.zarr", gigabytes * 1e9)
        with _served(stores, Path(scratch) / "cache") as (port, process):
            rows = [
                row
                for name in ("demo", "large")
                for row in _measure(_Client(port), name, repeats, requests)
            ]
            peak = _peak(process.pid)
    if as_json:
        print_json({"rows": rows, "peak_bytes": peak})
        return
    print_table(list(rows[0]), [list(r.values()) for r in rows])
    say(f"peak memory of the server {size(peak['server'])}, of its workers {size(peak['workers'])}")


def _demo(path: Path) -> None:
    import actstore
    from actstore.demo.corpus import demo_records
    from actstore.schema import MLP_STAGES

    model, tokenizer = actstore.load_model("demo")
    stages = ["hidden", *MLP_STAGES]
    actstore.dump(model, tokenizer, demo_records(), path, stages=stages, max_tokens=8192)


class _Client:
    """Asks over one connection; from other threads, over one each."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._own = threading.local()

    def get(self, address: str) -> tuple[float, Any, bytes]:
        """Seconds, headers and body."""
        if not hasattr(self._own, "connection"):
            self._own.connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        began = time.perf_counter()
        self._own.connection.request("GET", address)
        response = self._own.connection.getresponse()
        body = response.read()
        seconds = time.perf_counter() - began
        if response.status != 200:
            raise RuntimeError(f"{address}: {response.status} {body[:500]!r}")
        return seconds, response.headers, body


def _measure(client: _Client, name: str, repeats: int, requests: int) -> Iterator[dict[str, Any]]:
    card = json.loads(client.get(f"/api/stores/{name}")[2])
    stage = card["stages"][-1]
    place = {"stage": stage["name"], "layer": stage["layers"][len(stage["layers"]) // 2]}
    numbers = count(1)
    new = _different(f"/api/stores/{name}/", numbers)
    for what, question in ASKED.items():
        addresses = [new(question.format(**place)) for _ in range(repeats + 1)]
        client.get(addresses.pop())  # warms up
        answers = [client.get(a) for a in addresses]
        again = [client.get(a) for a in addresses for _ in range(3)]
        if any(h["x-actstore-cache"] != "miss" for _, h, _ in answers):
            raise RuntimeError(f"{what}: answered before it was asked")
        computed = [float(h["x-actstore-seconds"]) for _, h, _ in answers]
        sizes = [len(body) for _, _, body in answers]
        yield _row(name, f"new: {what}", [s for s, _, _ in answers], sizes, computed)
        yield _row(name, f"cached: {what}", [s for s, _, _ in again], sizes)
    questions = [q.format(**place) for q in ASKED.values()]
    addresses = [new(questions[i % len(questions)]) for i in range(requests)]
    for what in ("new", "cached"):
        together = threading.Barrier(requests)

        def ask(address: str, together: threading.Barrier = together) -> tuple[float, Any, bytes]:
            together.wait()
            return _Client(client._port).get(address)

        began = time.perf_counter()
        with ThreadPoolExecutor(requests) as pool:
            answers = list(pool.map(ask, addresses))
        seconds = time.perf_counter() - began
        sizes = [len(body) for _, _, body in answers]
        yield _row(
            name,
            f"parallel, {what}: {requests} requests in {seconds:.2f} s",
            [s for s, _, _ in answers],
            sizes,
        )


def _different(root: str, numbers: Iterator[int]) -> Callable[[str], str]:
    """Addresses that ask the same of all tokens, in words that were not used before."""

    def new(question: str) -> str:
        return f"{root}{question}&tokens={quote(f'position > -{next(numbers)}')}"

    return new


def _row(
    store: str,
    what: str,
    seconds: list[float],
    sizes: list[int],
    computed: list[float] | None = None,
) -> dict[str, Any]:
    ordered = sorted(seconds)
    return {
        "store": store,
        "what": what,
        "median_ms": statistics.median(ordered) * 1e3,
        "p95_ms": ordered[int(0.95 * (len(ordered) - 1))] * 1e3,
        "server_ms": None if computed is None else statistics.median(computed) * 1e3,
        "kB": statistics.median(sizes) / 1e3,
    }


@contextmanager
def _served(stores: Path, cache: Path) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """`actstore serve` in a process of its own."""
    command = [sys.executable, "-m", "actstore_cli", "serve", str(stores), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--cache-dir", str(cache)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if match := re.search(r"http://127\.0\.0\.1:(\d+)/", line):
                break
        else:
            raise RuntimeError("the server did not start")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield int(match[1]), process
    finally:
        process.terminate()
        process.wait(30)


def _peak(pid: int) -> dict[str, int]:
    """Most bytes that the server has held, and those of its workers together."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {"server": _held(str(pid)), "workers": sum(map(_held, children))}


def _held(pid: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+)", status)
    return int(match[1]) * 1024 if match else 0
