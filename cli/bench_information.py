"""`actstore bench query`: information and covariance of all pairs against the plain double loop."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench_similarity import ratio_row

if TYPE_CHECKING:
    import numpy as np

__all__ = ["information_rows"]

TOKENS, WIDTH, LAYERS = 250, 1024, 25
EVERY = 10
"""The loop goes over every tenth pair, and is compared by pair."""


def information_rows(repeats: int) -> list[dict[str, Any]]:
    """Rows of a table: all pairs of 250 tokens x 1,024 neurons, and 25 layers x 2 conditions.

    Parameters
    ----------
    repeats : int
        Interleaved repeats of each measurement; the first round warms up and is dropped.
    """
    import actstore

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "pairs.zarr"
        _make(path)
        store = actstore.open(path)
        one = store["hidden"].sel(layer=3)[:TOKENS].values.astype("float64")
        pairs, some = TOKENS * (TOKENS - 1) // 2, _some_pairs()
        ours, loop, every = [], [], []
        for _ in range(repeats + 1):
            first = {"layers": 3, "tokens": "condition == 'internal'"}
            ours.append(_seconds(lambda first=first: _ask(store, **first)) / pairs)
            loop.append(_seconds(lambda: [_plain(one[i], one[j]) for i, j in some]) / len(some))
            every.append(_seconds(lambda: _ask(store, by="condition")))
    what = f"MI + covariance, {TOKENS} x {WIDTH:,}, all {pairs:,} pairs, per pair"
    against = f"double loop over {len(some):,} of them, per pair"
    deep = f"MI + covariance, {LAYERS} layers x 2 x {TOKENS} x {WIDTH:,}, from disk"
    return [
        ratio_row(what, ours[1:], against, loop[1:]),
        ratio_row(deep, every[1:], "a minute", [60.0] * repeats),
    ]


def _make(path: Path) -> None:
    """A store like that of two kinds of events: windows of which one token is kept."""
    from dataclasses import replace

    import numpy as np

    from actstore.corpus import build, label_column
    from actstore.plan import Plan, StageSpec
    from actstore.writer import Writer

    rng = np.random.default_rng(0)
    bare = build([rng.integers(0, 50_000, TOKENS).tolist() for _ in range(2)], None)
    condition = label_column(["internal"] * TOKENS + ["terminal"] * TOKENS)
    corpus = replace(bare, token_labels={"condition": condition})
    plan = Plan.build(corpus, [StageSpec("hidden", tuple(range(LAYERS)), WIDTH)], sketch=False)
    with Writer(path, plan) as writer:
        for layer in range(LAYERS):
            x = rng.standard_normal((2 * TOKENS, WIDTH), dtype=np.float32)
            x += rng.standard_normal(WIDTH, dtype=np.float32)
            x[:, 7] *= 300  # a massive dimension: an outlier of every token
            writer.put("hidden", layer, 0, x)


def _some_pairs() -> list[tuple[int, int]]:
    every = [(i, j) for i in range(TOKENS) for j in range(i + 1, TOKENS)]
    return every[::EVERY]


def _ask(store: Any, **asked: Any) -> None:
    import actstore

    actstore.compute(actstore.mutual_information(store, **asked))


def _plain(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Information and covariance of two vectors, outliers left out, straightforwardly."""
    import numpy as np

    kept = [np.abs((v - v.mean()) / v.std(ddof=1)) <= 5 for v in (x, y)]
    x, y = (v[kept[0] & kept[1]] for v in (x, y))
    joint = np.histogram2d(x, y, bins=15)[0] / len(x)
    first, second, both = (
        -(p * np.log2(p + 1e-12)).sum() for p in (joint.sum(1), joint.sum(0), joint)
    )
    covariance = ((x - x.mean()) * (y - y.mean())).sum() / (len(x) - 1)
    return float(first + second - both), float(covariance)


def _seconds(run: Any) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
