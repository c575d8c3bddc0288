"""The arithmetic of SCALING.md against real dumps: every object and every request."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from helpers import bare_corpus, plan_of, random_values, write_store

import actstore
from actstore import StageSpec, journal, scaling, skeleton
from actstore.corpus import Corpus, label_column
from actstore.errors import CorpusError, PlanError
from actstore.plan import Plan
from actstore.schema import BLOCKS, METADATA_NBYTES
from actstore.storage import LocalStorage

PLANS: dict[str, dict[str, Any]] = {
    "one stage": {"stages": [StageSpec("mlp_post", (1, 2), 48)], "tokens": 300},
    "two stages": {
        "stages": [StageSpec("hidden", (1, 2, 3), 24), StageSpec("mlp_out", (1, 2), 16)],
        "tokens": 700,
    },
    "bfloat16, two passes": {
        "stages": [StageSpec("hidden", (1, 2), 32, "bfloat16"), StageSpec("mlp_in", (1, 2), 16)],
        "tokens": 500,
        "passes": 2,
    },
    "no sketches": {"stages": [StageSpec("mlp_post", (1, 2), 48)], "tokens": 300, "sketch": False},
    "heads": {"stages": [StageSpec("attn_z", (1,), 32, heads=4)], "tokens": 90},
}


class CountingStorage(LocalStorage):
    """A folder that counts requests as an object store would get them."""

    requests: ClassVar[Counter[str]] = Counter()

    def get(self, key: str, limit: int | None = None) -> bytes | None:
        self.requests["GET"] += 1
        return super().get(key, limit)

    def exists(self, key: str) -> bool:
        self.requests["HEAD"] += 1
        return super().exists(key)

    def size(self, key: str) -> int | None:
        self.requests["HEAD"] += 1
        return super().size(key)

    def keys(self, prefix: str) -> list[str]:
        self.requests["LIST"] += 1
        return super().keys(prefix)

    def is_vacant(self) -> bool:
        self.requests["LIST"] += 1
        return super().is_vacant()

    def put(self, *args: Any, **options: Any) -> None:
        self.requests["PUT"] += 1
        super().put(*args, **options)

    def delete(self, key: str) -> None:
        self.requests["DELETE"] += 1
        super().delete(key)

    @contextmanager
    def reader(self, key: str) -> Iterator[Any]:
        self.requests["GET"] += 1
        with super().reader(key) as made:
            yield made


def small_plan(stages: list[StageSpec], tokens: int, **options: Any) -> Plan:
    """Blocks of 64 tokens; a special token in every chunk of labels."""
    lengths = [9] * (tokens // 9) + [tokens % 9] * bool(tokens % 9)
    bare = bare_corpus(lengths)
    special = np.arange(len(bare.token_ids)) % 10 == 0
    corpus = replace(bare, special=special, sequence_labels={}, token_labels={})
    sketch = options.pop("sketch", True)
    if "passes" in options:  # half the layers at a time
        plan = Plan.build(corpus, stages, buffer=2 * 64 * 96, **options)
    else:
        plan = plan_of(corpus, stages, 64, **options)
    return replace(plan, sketch=sketch)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("chunk", [128, 2**20])
def test_objects_and_requests_are_those_of_a_real_dump(
    name: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skeleton, "LABEL_CHUNK", chunk)
    monkeypatch.setattr(scaling, "LABEL_CHUNK", chunk)
    monkeypatch.setattr(CountingStorage, "requests", Counter())
    monkeypatch.setattr("actstore.writer.storage_at", CountingStorage)
    plan = small_plan(**PLANS[name])
    assert plan.n_blocks > 1
    path = tmp_path / "run.zarr"
    assert write_store(path, plan, random_values(plan)).sealed
    counted = CountingStorage.requests.copy()
    listed = list(scaling.keys(plan))
    found = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    # Chunks of zeros are not stored: here those that lie in the first sequence, or hold layer 0.
    assert not found - {key for _, key in listed}
    assert len(listed) == len({key for _, key in listed})
    absent = {key for _, key in listed} - found
    assert all("/c/" in key for key in absent) and len(absent) <= 2
    objects = Counter(kind for kind, key in listed if key in found)
    assert set(objects) <= set(scaling.KINDS) and objects["shards"] == plan.shards
    assert dict(counted) == {k: n for k, n in scaling.requests(plan, objects).items() if n}


@pytest.mark.parametrize("name", PLANS)
def test_sizes_of_records_and_manifest(name: str, tmp_path: Path) -> None:
    plan = small_plan(**PLANS[name])
    path = tmp_path / "run.zarr"
    write_store(path, plan, random_values(plan))
    if len(plan.passes) == 1:
        records = [p.stat().st_size for p in (path / "journal").glob("p0.*.json")]
        assert scaling.record_nbytes(plan) == pytest.approx(np.mean(records), rel=0.2)
    manifest = (path / journal.MANIFEST).stat().st_size
    assert scaling.manifest_nbytes(plan) == pytest.approx(manifest, rel=0.2)


def test_opening_is_two_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan(**PLANS["two stages"])
    write_store(tmp_path / "run.zarr", plan, random_values(plan))
    monkeypatch.setattr(CountingStorage, "requests", Counter())
    monkeypatch.setattr("actstore.store.storage_at", CountingStorage)
    actstore.open(tmp_path / "run.zarr").info()
    assert CountingStorage.requests == {"GET": 2}


# -- plans of lengths alone ----------------------------------------------------------------


def test_a_corpus_of_lengths_plans_as_the_corpus_itself() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 200)
    real = bare_corpus(lengths)
    bare = Corpus.of_lengths(lengths)
    stages = [StageSpec("mlp_post", (0, 1), 48)]
    a, b = (Plan.build(c, stages, buffer="64KiB") for c in (real, bare))
    assert (a.stages, a.block_tokens, a.buffer, a.notes) == (
        b.stages,
        b.block_tokens,
        b.buffer,
        b.notes,
    )
    assert [x.sequences.tolist() for x in a.batches] == [x.sequences.tolist() for x in b.batches]
    assert a.config["capture"] == b.config["capture"]
    assert a.first_token.tolist() == b.first_token.tolist()
    assert all(
        np.array_equal(x, y)
        for batch in a.batches[:20]
        for x, y in zip(a.batch_places(batch), b.batch_places(batch), strict=True)
    )
    digests = {Corpus.of_lengths(own).digest() for own in (lengths, lengths[::-1], lengths[1:])}
    assert len(digests) == 3


@pytest.mark.parametrize("lengths", [[], [0], [3, -1], [[1, 2]]])
def test_lengths_that_are_none(lengths: Any) -> None:
    with pytest.raises(CorpusError, match="at least 1"):
        Corpus.of_lengths(lengths)


def test_tokens_kept_by_sequence_are_those_of_the_mask() -> None:
    rng = np.random.default_rng(1)
    bare = bare_corpus(rng.integers(1, 9, 50))
    corpus = replace(bare, keep=rng.random(len(bare.token_ids)) < 0.4)
    ends = np.searchsorted(np.flatnonzero(corpus.keep), corpus.starts)
    plan = Plan.build(corpus, [StageSpec("mlp_post", (0,), 16)])
    assert plan.first_token.tolist() == ends.tolist()
    assert corpus.kept_lengths.sum() == plan.n_tokens == len(plan.kept)


def test_a_plan_of_a_billion_tokens_takes_memory_by_the_sequence() -> None:
    """A rank's share of 64 of 10 billion tokens, and more; by the token it would take gigabytes."""
    tracemalloc.start()
    plan = Plan.build(
        Corpus.of_lengths(np.full(2**16, 2**14)),
        [StageSpec("hidden", tuple(range(81)), 8192, "bfloat16")],
        buffer="16GiB",
        batch_tokens=2**16,
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert plan.n_tokens == 2**30 and plan.n_blocks <= BLOCKS
    assert plan.config["corpus"]["tokens"] == 2**30
    assert scaling.manifest_nbytes(plan) < METADATA_NBYTES
    assert peak < 2**28


# -- what one store can hold -----------------------------------------------------------------


def test_a_plan_too_large_for_one_store_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    stages = [StageSpec("hidden", tuple(range(81)), 8192, "bfloat16")]
    lengths = np.full(2**19, 4096)
    plan = Plan.build(Corpus.of_lengths(lengths), stages, buffer="3GiB", batch_tokens=2**16)
    assert plan.n_blocks > BLOCKS
    with pytest.raises(PlanError, match=r"too many for one store: dump at least 2 parts .*concat"):
        actstore.Writer(tmp_path / "run.zarr", plan)
    assert not (tmp_path / "run.zarr").exists()
    half = Plan.build(Corpus.of_lengths(lengths[::2]), stages, buffer="3GiB", batch_tokens=2**16)
    scaling.check_one_store(half)


def test_sketches_in_too_many_classes_are_refused() -> None:
    corpus = bare_corpus([200] * 64)
    plan = Plan.build(corpus, [StageSpec("mlp_post", tuple(range(80)), 28_672)], buffer="64GiB")
    skeleton.build(plan, None, {}, ["first", "special", "rest"])
    with pytest.raises(PlanError, match="in 192 classes of tokens take a table of 31"):
        skeleton.build(plan, None, {}, [str(i) for i in range(192)])


def test_labels_of_too_much_text_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skeleton, "METADATA_NBYTES", 2**22)
    corpus = bare_corpus([1] * 1000)
    label = label_column([f"{i}" * 1000 for i in range(1000)])
    plan = Plan.build(
        replace(corpus, sequence_labels={"long": label}), [StageSpec("mlp_post", (0,), 16)]
    )
    with pytest.raises(PlanError, match=r"metadata of \d+ MiB, where 2 are most"):
        skeleton.build(plan, None, {}, None)


def test_long_texts_are_stored_in_smaller_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skeleton, "TEXT_CHUNK_NBYTES", 1000)
    corpus = bare_corpus([2] * 40)
    corpus = replace(corpus, texts=[f"{i:04}" * 50 for i in range(40)])
    monkeypatch.setattr(skeleton, "LABEL_CHUNK", 64)
    plan = Plan.build(corpus, [StageSpec("mlp_post", (0,), 16)])
    write_store(tmp_path / "run.zarr", plan, random_values(plan))
    chunks = list((tmp_path / "run.zarr/sequences/text/c").iterdir())
    assert len(chunks) == 8  # 8,000 characters in chunks of about 1,000
    assert actstore.open(tmp_path / "run.zarr").sequences["text"].values.tolist() == corpus.texts
