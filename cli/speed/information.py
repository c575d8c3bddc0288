"""Information and covariance of all pairs, against the plain double loop and frites."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .rounds import Reference, Row, Work, compare, peer, seconds
from .setting import CORES, Setting, fresh

if TYPE_CHECKING:
    import numpy as np

__all__ = ["information"]

TOKENS, WIDTH, LAYERS, BINS = 250, 1024, 25, 15
EVERY = 10
"""The loop goes over every tenth pair, and its time is taken so many times."""

LOOP = f"double loop (timed over every {EVERY}th pair)"
FRITES = "frites and numpy.cov, no outlier removal"


def information(setting: Setting) -> list[Row]:
    """All pairs of 250 tokens x 1,024 neurons; 25 layers x 2 conditions of them from disk."""
    import actstore

    path = fresh(setting.scratch / "pairs") / "pairs.zarr"
    _make(path)
    store = actstore.open(path)
    one = store["hidden"].sel(layer=3)[:TOKENS].values.astype("float64")
    first = {"layers": 3, "tokens": "condition == 'internal'"}
    pairs = TOKENS * (TOKENS - 1) // 2
    what = f"MI + covariance, {TOKENS} x {WIDTH:,}, all {pairs:,} pairs"
    bare = f"{what}, no outlier removal"
    deep = f"MI + covariance, {LAYERS} layers x 2 x {TOKENS} x {WIDTH:,}, from disk"
    ours = {
        what: (_ask(store, **first), {LOOP: 100}),
        bare: (_ask(store, **first, outlier_threshold=0), {FRITES: 3}),
    }
    references = [
        Reference(LOOP, _loop(one)),
        peer("frites", "frites", FRITES, _frites(one)),
    ]
    rows = compare("information", ours, references, setting.rounds, pairs, "pairs")
    minute = Reference("a minute", lambda: 60.0)
    ours = {deep: (_ask(store, by="condition"), {minute.name: 1})}
    return rows + compare("information", ours, [minute], setting.rounds)


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


def _ask(store: Any, **asked: Any) -> Work:
    import actstore

    return seconds(lambda: actstore.compute(actstore.mutual_information(store, **asked)))


def _loop(x: np.ndarray) -> Work:
    some = [(i, j) for i in range(TOKENS) for j in range(i + 1, TOKENS)]
    chosen = some[::EVERY]

    def work() -> float:
        began = time.perf_counter()
        for i, j in chosen:
            _plain(x[i], x[j])
        return (time.perf_counter() - began) * len(some) / len(chosen)

    return work


def _plain(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Information and covariance of two vectors, outliers left out, straightforwardly."""
    import numpy as np

    kept = [np.abs((v - v.mean()) / v.std(ddof=1)) <= 5 for v in (x, y)]
    x, y = (v[kept[0] & kept[1]] for v in (x, y))
    joint = np.histogram2d(x, y, bins=BINS)[0] / len(x)
    first, second, both = (
        -(p * np.log2(p + 1e-12)).sum() for p in (joint.sum(1), joint.sum(0), joint)
    )
    covariance = ((x - x.mean()) * (y - y.mean())).sum() / (len(x) - 1)
    return float(first + second - both), float(covariance)


def _frites(x: np.ndarray) -> Work:
    """Its compiled estimator, a row against all that follow, by as many processes as cores."""

    def run() -> None:
        import numpy as np
        from joblib import Parallel, delayed

        values = x.astype(np.float32)
        Parallel(CORES)(delayed(_rows)(values, start) for start in range(CORES))
        np.cov(values)

    return seconds(run)


def _rows(x: np.ndarray, start: int) -> list[np.ndarray]:
    from frites.estimator import BinMIEstimator

    estimate = BinMIEstimator("cc", n_bins=BINS, verbose=False).get_function()
    return [estimate(x[i + 1 :, None], x[i]) for i in range(start, len(x) - 1, CORES)]
