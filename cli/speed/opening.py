"""Opening stores of ever more shards."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .rounds import Reference, Row, Work, compare, seconds
from .setting import Setting, fresh

__all__ = ["make_shardless", "opening"]

LAYERS, WIDTH, BLOCK = 100, 256, 64
LIMIT = 0.5
CONSTANT = 0.5
"""The least that opening the largest is to be of the speed of opening the smallest."""


def opening(setting: Setting) -> list[Row]:
    """Stores whose metadata and journal are whole, as a dump leaves them, and their shards absent.

    No shard is touched when a store is opened: `actstore verify` is what reads them.
    """
    import actstore

    folder = fresh(setting.scratch / "opening")
    stores = {}
    for shards in sorted({max(LAYERS, setting.shards // n) for n in (100, 10, 1)}):
        path = folder / f"{shards}.zarr"
        stores[make_shardless(path, shards)] = path
    fewest, most = min(stores), max(stores)
    limit = Reference(f"{LIMIT:g} s", lambda: LIMIT)
    small = Reference(
        f"a store of {fewest:,} shards", seconds(partial(actstore.open, stores[fewest]))
    )
    ours: dict[str, tuple[Work, dict[str, float | None]]] = {}
    for shards, path in stores.items():
        opened, labelled = partial(actstore.open, path), partial(_labelled, path)
        constant: dict[str, float | None] = {small.name: CONSTANT} if shards == most else {}
        name = f"a store of {shards:,} shards"
        ours[f"open {name}"] = seconds(opened), {limit.name: 1, **constant}
        ours[f"open {name}, label a stage"] = seconds(labelled), {limit.name: 1}
    return compare("open", ours, [limit, small], setting.rounds)


def _labelled(path: Path) -> None:
    import actstore

    actstore.open(path)["hidden"]


def make_shardless(path: Path, shards: int) -> int:
    """A sealed store with its labels and commit records, but no shard; gives their number."""
    import numpy as np

    from actstore import journal
    from actstore.corpus import build
    from actstore.journal import Record, ShardRecord
    from actstore.plan import Plan, StageSpec
    from actstore.seal import seal
    from actstore.shard import ShardSummary
    from actstore.writer import Writer

    blocks = max(1, shards // LAYERS)
    corpus = build(np.zeros((blocks, BLOCK), int).tolist(), None)
    stage = StageSpec("hidden", tuple(range(LAYERS)), WIDTH)
    plan = Plan.build(corpus, [stage], buffer=2 * BLOCK * LAYERS * WIDTH * 4, sketch=False)
    (own,) = plan.stages
    summary = ShardSummary(-4.0, 4.0, 0)
    records = []
    with Writer(path, plan) as writer:
        for block in range(plan.n_blocks):
            kept = tuple(
                ShardRecord(own.key(i, block), own.layout.image_nbytes, i * block, summary)
                for i in range(LAYERS)
            )
            records.append(Record(0, block, kept).encode())
            (path / journal.record_key(0, block)).write_bytes(records[-1])
        seal(writer.storage, plan, writer._skeleton, records, {}, {})
    return plan.shards
