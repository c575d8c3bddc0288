"""Stores of random values, to measure on."""

from __future__ import annotations

from pathlib import Path

__all__ = ["make_store"]


def make_store(path: Path, nbytes: float, layers: int = 12, width: int = 3072) -> None:
    """A float32 store of one stage: normal values with outlying neurons, never zeros."""
    import numpy as np

    from actstore.corpus import build
    from actstore.plan import Plan, StageSpec
    from actstore.writer import Writer

    length = 1024
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
