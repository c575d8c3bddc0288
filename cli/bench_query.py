"""`actstore bench query`: scans against merely reading, sketches, and per-neuron histograms."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from .bench_information import information_rows
from .bench_similarity import peak_memory, profile, ratio_row
from .output import print_json, print_table, say, size

__all__ = ["query"]


def query(
    gigabytes: Annotated[float, typer.Option(help="Size of the store that is made.")] = 4.5,
    repeats: Annotated[int, typer.Option(help="Interleaved repeats of each measurement.")] = 5,
    folder: Annotated[
        Path | None, typer.Option(help="Where to write; default the temporary folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Queries over a float32 store of random values, 12 layers x 3,072 neurons.

    scan: moments and a 300-bin histogram of every layer in one pass, against reading the same
    shards (every checksum checked), and against reading their files alone. sketch: moments per
    neuron, extremes. neurons: a histogram of every neuron, against xhistogram on dask. profile:
    dimensionality and RSA of 12 layers x 4 stages at 500 tokens, against plain numpy. pairs:
    information and covariance of all pairs of 250 x 1,024, against the plain double loop.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "bench.zarr"
        _make(path, gigabytes * 1e9)
        rows = [*_scan(path, repeats), *_sketch(path, repeats), *_neurons(path, repeats)]
        took, plain = profile(Path(scratch), repeats)
        what = "dimensionality + rsa, 12 layers x 4 stages, 500 tokens"
        rows.append(ratio_row(what, took["ours"], plain, took["plain"]))
        rows += information_rows(repeats)
    peak = peak_memory()
    if as_json:
        print_json({"rows": rows, "peak_bytes": peak})
        return
    print_table(list(rows[0]), [list(r.values()) for r in rows])
    say(f"peak memory {size(peak)}")


def _make(path: Path, nbytes: float) -> None:
    """A store of normal values with outlying neurons, never zeros."""
    import numpy as np

    from actstore.corpus import build
    from actstore.plan import Plan, StageSpec
    from actstore.writer import Writer

    layers, width, length = 12, 3072, 1024
    sequences = max(2, round(nbytes / (layers * width * 4 * length)))
    rng = np.random.default_rng(0)
    corpus = build([rng.integers(0, 50_000, length).tolist() for _ in range(sequences)], None)
    plan = Plan.build(corpus, [StageSpec("mlp_post", tuple(range(layers)), width)])
    scale = rng.lognormal(size=width).astype(np.float32)
    with Writer(path, plan) as writer:
        for start in range(0, plan.n_tokens, length):
            for layer in range(layers):
                values = rng.standard_normal((length, width), dtype=np.float32) * scale
                writer.put("mlp_post", layer, start, values)


def _timed(work: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each piece of work, interleaved; the first round warms up and is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats + 1):
        for name, run in work.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: s[1:] for name, s in seconds.items()}


def _scan(path: Path, repeats: int) -> list[dict[str, Any]]:
    import numpy as np

    import actstore

    store = actstore.open(path)
    array = store.array("mlp_post")
    layers, tokens, _ = array.shape
    rows = store.attrs["capture"]["block_tokens"]
    places = [(i, a) for i in range(layers) for a in range(0, tokens, rows)]
    files = sorted(path.glob("mlp_post/activation/c.*"))
    threads = len(os.sched_getaffinity(0))

    most = np.arange(tokens) > 0  # sketches cannot answer for all tokens but one

    def scan() -> None:
        actstore.compute(
            actstore.moments(store, tokens=most, per="layer"),
            actstore.histogram(store, tokens=most, bins=300, range=(-8, 8)),
        )

    def read() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda p: len(np.asarray(array[p[0], p[1] : p[1] + rows])), places))

    def read_files() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda f: len(f.read_bytes()), files))

    took = _timed({"scan": scan, "read": read, "files": read_files}, repeats)
    return [
        ratio_row("moments + 300 bins, one pass", took["scan"], "reading shards", took["read"]),
        ratio_row("moments + 300 bins, one pass", took["scan"], "reading files", took["files"]),
    ]


def _sketch(path: Path, repeats: int) -> list[dict[str, Any]]:
    import actstore

    store = actstore.open(path)

    def moments() -> None:
        actstore.compute(actstore.moments(store, tokens="position > 0"))

    def top() -> None:
        actstore.compute(actstore.top_tokens(store, layers=3))

    asked = {"moments per neuron, position > 0": moments, "top 20 tokens of a layer": top}
    took = _timed(asked, repeats)
    return [ratio_row(f"sketch: {n}", s, "0.05 s", [0.05] * len(s)) for n, s in took.items()]


def _neurons(path: Path, repeats: int) -> list[dict[str, Any]]:
    import dask.array as da
    import numpy as np
    from xhistogram.core import histogram as xhistogram

    import actstore

    store = actstore.open(path)
    edges = np.linspace(-8, 8, 51)
    acts = store["mlp_post"].sel(layer=0).data[:8192]
    mask = np.arange(store.n_tokens) < 8192

    def ours() -> None:
        actstore.compute(
            actstore.histogram(store, layers=0, tokens=mask, bins=edges.tolist(), per="neuron")
        )

    def theirs() -> None:
        da.compute(xhistogram(acts, bins=[edges], axis=[0])[0])

    took = _timed({"ours": ours, "theirs": theirs}, repeats)
    return [
        ratio_row("50 bins of every neuron", took["ours"], "xhistogram on dask", took["theirs"])
    ]
