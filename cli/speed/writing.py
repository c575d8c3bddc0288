"""The writer alone, its values ready in memory, against plain files of the same bytes."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from .rounds import Reference, Row, Work, compare
from .setting import Setting, fresh

__all__ = ["writing"]

LENGTH = 1024
LEAST = 0.85
WITHOUT, WITH = "writer alone, no sketches", "writer alone, with sketches"
PLAIN, DIRECT = "plain files, synced", "plain files past the page cache, synced"


def writing(setting: Setting) -> list[Row]:
    """Batches of 1,024 tokens of four MLP stages, all layers, into shards; the drain included."""
    values = _values(setting)
    plans = {WITHOUT: _plan(setting, False), WITH: _plan(setting, True)}
    plan = plans[WITHOUT]
    references = [Reference(PLAIN, _plain(setting, plan, 0))]
    if hasattr(os, "O_DIRECT"):
        references.append(Reference(DIRECT, _plain(setting, plan, os.O_DIRECT)))
    ours = {
        name: (
            _ours(setting, own, values),
            {PLAIN: LEAST if name == WITHOUT else None, DIRECT: None},
        )
        for name, own in plans.items()
    }
    return compare("writer", ours, references, setting.rounds, plan.nbytes / 1e9, "GB")


def _stages(setting: Setting) -> dict[str, int]:
    d = setting.width
    return {"mlp_in": d, "mlp_pre": 4 * d, "mlp_post": 4 * d, "mlp_out": d}


def _plan(setting: Setting, sketch: bool) -> Any:
    from actstore.corpus import build
    from actstore.plan import Plan, StageSpec

    stages = _stages(setting)
    per_token = 4 * setting.layers * sum(stages.values())
    sequences = max(1, round(setting.gigabytes * 1e9 / per_token / LENGTH))
    corpus = build([[i % 50_000 for i in range(LENGTH)] for _ in range(sequences)], None)
    specs = [StageSpec(name, tuple(range(setting.layers)), w) for name, w in stages.items()]
    return Plan.build(corpus, specs, sketch=sketch)


def _values(setting: Setting) -> dict[str, Any]:
    """A batch of each stage, which is written again and again."""
    import numpy as np

    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal((LENGTH, width), dtype=np.float32)
        for name, width in _stages(setting).items()
    }


def _ours(setting: Setting, plan: Any, values: dict[str, Any]) -> Work:
    from actstore.writer import Writer

    def work() -> float:
        path = fresh(setting.scratch / "written") / "run.zarr"
        began = time.perf_counter()
        with Writer(path, plan) as writer:
            writer.hold = True  # as on a dump on the CPU
            for token in range(0, plan.n_tokens, LENGTH):
                for name, own in values.items():
                    for layer in range(setting.layers):
                        writer.put(name, layer, token, own)
                writer.catch_up()
        took = time.perf_counter() - began
        shutil.rmtree(path)
        return took

    return work


def _plain(setting: Setting, plan: Any, flags: int) -> Work:
    """As many files, of the same sizes, one after another."""
    import numpy as np

    from actstore.storage import aligned_buffer

    sizes = [
        plan.block_rows(block) * stage.layout.width * 4
        for block in range(plan.n_blocks)
        for stage in plan.stages
        for _ in stage.layers
    ]
    data = aligned_buffer(max(sizes))
    data.view(np.float32)[:] = np.random.default_rng(0).standard_normal(
        data.nbytes // 4, dtype=np.float32
    )

    def work() -> float:
        folder = fresh(setting.scratch / "plain")
        began = time.perf_counter()
        for number, size in enumerate(sizes):
            _write(folder / f"{number}.bin", data[:size], flags)
        took = time.perf_counter() - began
        shutil.rmtree(folder)
        return took

    return work


def _write(file: Path, data: Any, flags: int) -> None:
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | flags, 0o666)
    try:
        left = memoryview(data)
        while left.nbytes:
            left = left[os.write(fd, left) :]
        os.fdatasync(fd)
    finally:
        os.close(fd)
