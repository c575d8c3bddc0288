"""`actstore bench`: shuffled batches for training against random rows of a memory-mapped array."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench_similarity import ratio_row

if TYPE_CHECKING:
    from actstore.store import Store

__all__ = ["loader_rows"]

WIDTH = 768
BATCH = 4096
SHARE = 16
"""Of the epoch's batches, one in so many is timed where rows come from the disk one by one."""


def loader_rows(repeats: int, scratch: Path, tokens: int = 2**19) -> list[dict[str, Any]]:
    """Time an epoch of shuffled batches, and the same batches by random rows of `np.memmap`.

    Both give float32 tensors (4096, 768) of the same values, every token once an epoch, in random
    order; ours reads 12 MB at a time, checks every checksum and shuffles within 170,000 tokens.

    Parameters
    ----------
    repeats : int
        Timed rounds, after one that warms up; what is compared takes turns in each.
    scratch : Path
        A folder on the disk to be measured; 2 x 1.6 GB are written for the default `tokens`.
    tokens : int

    Returns
    -------
    list of dict
        Rows in the form of `ratio_row`: seconds of an epoch. Beyond memory: every page is dropped
        from the cache before it could be met again, as if the data were far larger than memory
        (pages round a row are not read ahead, with which it is slower still); from disk: nothing
        is cached at the start; cached: everything is.
    """
    import actstore

    data = _make(scratch, tokens)
    store = actstore.open(scratch / "loader.zarr")
    files = [data, *(p for p in (scratch / "loader.zarr").rglob("c.*") if p.is_file())]
    gigabytes = tokens * WIDTH * 4 / 1e9
    name = f"shuffled batches of {BATCH:,} tokens x {WIDTH}, {gigabytes:.1f} GB"
    cases: dict[str, tuple[Callable[[], None], Callable[[], float]]] = {
        "beyond memory": (lambda: _forget(files), lambda: _rows_from_disk(data, tokens)),
        "from disk": (lambda: _forget(files), lambda: _epoch(_rows(data, tokens))),
        "cached": (lambda: _remember(files), lambda: _epoch(_rows(data, tokens))),
    }
    rows = []
    for case, (prepare, theirs) in cases.items():
        ours: list[float] = []
        reference: list[float] = []
        for _ in range(repeats + 1):
            prepare()
            ours.append(_epoch(_batches(store)))
            prepare()
            reference.append(theirs())
        against = "np.memmap, random rows"
        if case == "beyond memory":
            against += f", timed over a {SHARE}th of them"
        rows.append(ratio_row(f"{name}, {case}", ours[1:], against, reference[1:]))
    return rows


def _make(scratch: Path, tokens: int) -> Path:
    """The same values as a store and as a flat file."""
    import numpy as np

    from actstore.corpus import build
    from actstore.plan import Plan, StageSpec
    from actstore.writer import Writer

    rng = np.random.default_rng(0)
    corpus = build([np.zeros(min(1024, tokens - a), int).tolist() for a in range(0, tokens, 1024)])
    plan = Plan.build(corpus, [StageSpec("mlp_out", (0,), WIDTH)], sketch=False)
    data = scratch / "rows.f4"
    step = plan.block_tokens
    with Writer(scratch / "loader.zarr", plan) as writer, data.open("wb") as flat:
        for first in range(0, tokens, step):
            values = rng.standard_normal((min(step, tokens - first), WIDTH), dtype=np.float32)
            writer.put("mlp_out", 0, first, values)
            values.tofile(flat)
        flat.flush()
        os.fsync(flat.fileno())
    return data


def _batches(store: Store) -> Iterator[Any]:
    yield from store.loader("mlp_out", 0, BATCH)


def _rows(data: Path, tokens: int) -> Iterator[Any]:
    import numpy as np
    import torch

    rows = np.memmap(data, "float32", "r", shape=(tokens, WIDTH))
    order = np.random.default_rng(0).permutation(tokens)
    for first in range(0, tokens, BATCH):
        yield torch.from_numpy(rows[order[first : first + BATCH]])


def _rows_from_disk(data: Path, tokens: int) -> float:
    """Seconds of an epoch of random rows none of which is cached, from some of its batches."""
    import numpy as np
    import torch

    order = np.random.default_rng(0).permutation(tokens)
    seconds = 0.0
    count = max(1, tokens // BATCH // SHARE)
    for first in range(0, count * BATCH, BATCH):
        _forget([data])
        rows = np.memmap(data, "float32", "r", shape=(tokens, WIDTH))
        mapped: Any = rows._mmap  # type: ignore[attr-defined]
        mapped.madvise(mmap.MADV_RANDOM)
        began = time.perf_counter()
        torch.from_numpy(rows[order[first : first + BATCH]])
        seconds += time.perf_counter() - began
        del rows, mapped
    return seconds * tokens / (count * BATCH)


def _epoch(batches: Iterator[Any]) -> float:
    began = time.perf_counter()
    for batch in batches:
        assert batch.shape[1] == WIDTH
    return time.perf_counter() - began


def _forget(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _remember(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            while file.read(2**24):
                pass
