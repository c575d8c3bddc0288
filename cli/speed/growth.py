"""How time and memory grow with tokens: dump, scan and similarity of 1, 2, 4 and 8 times as many.

Each in a process of its own, since the most that one has held says nothing of what comes after.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .rounds import Row, Work, seconds
from .setting import Setting, fresh

__all__ = ["growth"]

TIMES = (1, 2, 4, 8)
LAYERS, WIDTH, LENGTH = 2, 128, 512
BUFFER = 2**26
LINEAR = 0.8
"""The least that tokens a second at 8 times as many are to be of those at the fewest."""


def growth(setting: Setting) -> Iterator[Row]:
    """A GPT-2 of 2 layers x 128 wide, dumped with sketches by a buffer of 64 MiB."""
    folder = fresh(setting.scratch / "growth")
    rounds = min(setting.rounds, 3)
    first: dict[str, float] = {}
    for times in TIMES:
        tokens = max(LENGTH, times * setting.growth // LENGTH * LENGTH)
        for kind in WORK:
            found = _alone(kind, folder / f"{times}.zarr", tokens, rounds)
            spent = statistics.median(found["seconds"])
            first.setdefault(kind, spent)
            ratios = [times * first[kind] / s for s in found["seconds"]]
            yield Row(
                "growth",
                f"{kind}, {tokens:,} tokens",
                f"{times} x its seconds for the fewest",
                spent,
                times * first[kind],
                statistics.median(ratios),
                min(ratios),
                max(ratios),
                LINEAR if times == TIMES[-1] else None,
                rounds,
                tokens,
                "tokens",
                f"peak {found['peak_bytes'] / 1e9:.2f} GB",
                peak_bytes=found["peak_bytes"],
            )


def _alone(kind: str, path: Path, tokens: int, rounds: int) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, kind, str(path), str(tokens), str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# -- in the process of its own -------------------------------------------------------------


def _dump(path: Path, tokens: int) -> Work:
    import shutil

    import actstore

    from .passes import gpt2

    model, _ = gpt2("float32", "cpu", LAYERS, WIDTH)
    rows = [[(7919 * i + r) % 50_000 for i in range(LENGTH)] for r in range(tokens // LENGTH)]

    def work() -> float:
        shutil.rmtree(path, ignore_errors=True)
        return seconds(lambda: actstore.dump(model, None, rows, path, buffer=BUFFER))()

    return work


def _scan(path: Path, tokens: int) -> Work:
    import numpy as np

    import actstore

    store = actstore.open(path)
    most = np.arange(store.n_tokens) > 0

    def work() -> None:
        actstore.compute(
            actstore.moments(store, tokens=most, per="layer"),
            actstore.histogram(store, tokens=most, bins=300, range=(-8, 8)),
        )

    return seconds(work)


def _similarity(path: Path, tokens: int) -> Work:
    import actstore

    store = actstore.open(path)

    def work() -> None:
        actstore.compute(actstore.dimensionality(store, layers=0), actstore.rsa(store, layers=0))

    return seconds(work)


WORK = {"dump": _dump, "scan": _scan, "dimensionality + RSA": _similarity}


def _main(kind: str, path: str, tokens: str, rounds: str) -> None:
    from ..bench_similarity import peak_memory

    run = WORK[kind](Path(path), int(tokens))
    took = [run() for _ in range(int(rounds) + 1)][1:]
    print(json.dumps({"seconds": took, "peak_bytes": peak_memory()}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
