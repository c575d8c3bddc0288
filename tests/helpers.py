"""A small store with everything in it, made without a model, and what should be in it."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import actstore
from actstore.corpus import Corpus, build, label_column
from actstore.demo.corpus import documents
from actstore.plan import Plan, StageSpec
from actstore.schema import TABLES
from actstore.seal import seal
from actstore.writer import Writer

WORDS = ["<s>", "The", "sea", "ship", "was", "slow", "and", "wide", ".", "cold", "<b>&", "5"]
VOCABULARY = np.array([WORDS[0], *(" " + w for w in WORDS[1:])], dtype=object)
PLAYS = ["As You Like It", "Lear", "", "<b>Hamlet</b> & co"]

STAGES = (
    StageSpec("hidden", (0, 1, 2), 24),
    StageSpec("attn_z", (0, 1), 32, "float16", heads=4),
    StageSpec("mlp_post", (0, 1), 48),
    StageSpec("mlp_out", (0, 1), 32, "bfloat16"),
)


def small_corpus() -> Corpus:
    """24 texts of 1 to 12 words behind a special token; labels of every kind; gaps in `keep`."""
    rng = np.random.default_rng(7)
    texts, ids, spans = [], [], []
    for i in range(24):
        words = rng.integers(1, len(WORDS), 1 + i % 12).tolist()
        text, own = "", [(0, 0)]
        for w in words:
            own.append((len(text), len(text) + len(VOCABULARY[w])))
            text += VOCABULARY[w]
        texts.append(text)
        ids.append([0, *words])
        spans += own
    bare = build(ids)
    starts, n = bare.starts, len(bare.token_ids)
    keep = rng.random(n) < 0.85
    keep[starts[5] : starts[6]] = False  # a sequence of which nothing is kept
    offset = rng.integers(-3, 4, n).astype(np.float32)
    offset[bare.token_ids == 0] = np.nan
    return replace(
        bare,
        special=bare.token_ids == 0,
        keep=keep,
        texts=texts,
        char_start=np.array([a for a, _ in spans], np.int32),
        char_end=np.array([b for _, b in spans], np.int32),
        sequence_labels={
            **bare.sequence_labels,
            "play": label_column([PLAYS[i % 4] for i in range(24)]),
            "year": label_column([1599 + i % 5 for i in range(24)]),
            "score": label_column([None if i % 6 == 0 else i / 3 for i in range(24)]),
            "good": label_column([i % 3 == 0 for i in range(24)]),
        },
        token_labels={
            "offset": offset,
            "condition": label_column(rng.choice(["internal", "terminal"], n).tolist()),
        },
    )


def plan_of(corpus: Corpus, stages: Sequence[StageSpec], block: int, **options: Any) -> Plan:
    """A plan whose blocks hold `block` tokens."""
    per_token = sum(len(s.layers) * s.width * (2 if _half(s) else 4) for s in stages)
    plan = Plan.build(corpus, stages, **{"buffer": 2 * block * per_token, **options})
    assert plan.block_tokens == block
    return plan


def _half(stage: StageSpec) -> bool:
    return stage.source_dtype != "float32"


def bare_corpus(lengths: Iterable[int]) -> Corpus:
    """Sequences of the given lengths, every token kept."""
    return build([[i % 50 for i in range(n)] for n in lengths])


def random_values(plan: Plan, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 values (layer, token, neuron) of every stage, a fifth of them exact zeros."""
    rng = np.random.default_rng(seed)
    values = {}
    for stage in plan.stages:
        shape = (len(stage.layers), plan.n_tokens, stage.layout.width)
        own = rng.normal(size=shape).astype(np.float32)
        own[rng.random(shape) < 0.2] = 0
        values[stage.name] = own
    return values


def random_tables(plan: Plan, seed: int = 0) -> dict[str, np.ndarray]:
    """Predictions and outcomes that a plan asks for; nothing is to be found in them."""
    rng = np.random.default_rng(seed)
    values = {}
    for key in plan.tables:
        shape = (plan.n_tokens, plan.predictions) if TABLES[key].ranked else (plan.n_tokens,)
        if TABLES[key].dtype == "int32":
            values[key] = rng.integers(0, 50, shape).astype(np.int32)
        else:
            values[key] = rng.random(shape, np.float32)
    return values


def stored(values: np.ndarray, source_dtype: str) -> np.ndarray:
    """What float32 values are after a round through a store."""
    if source_dtype == "float16":
        return values.astype(np.float16)
    if source_dtype == "bfloat16":
        return torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    return values


def put_all(writer: Writer, values: Mapping[str, np.ndarray]) -> None:
    """Put every value, stage by stage and layer by layer."""
    for stage in writer.plan.stages:
        for i, layer in enumerate(stage.layers):
            writer.put(stage.name, layer, 0, values[stage.name][i])


def write_store(path: Path, plan: Plan, values: Mapping[str, np.ndarray], **options: Any) -> Writer:
    """Write a store, sealed unless another rank still has blocks to write."""
    with Writer(path, plan, **options) as writer:
        put_all(writer, values)
    return writer


def unwritten_store(path: Path, plan: Plan) -> actstore.Store:
    """A store that is sealed though none of its shards is there: for questions of size alone."""
    with Writer(path, plan) as writer:
        seal(writer.storage, plan, writer._skeleton, [], {}, {})
    return actstore.open(path)


def write_small(path: Path) -> tuple[Plan, dict[str, np.ndarray]]:
    """The small store: three blocks of 64 tokens, the last one short."""
    plan = plan_of(small_corpus(), STAGES, 64, provenance={"model": {"name": "tiny <model>"}})
    values = random_values(plan)
    assert write_store(path, plan, values, vocabulary=VOCABULARY).sealed
    return plan, values


def tree_bytes(root: Path) -> dict[str, bytes]:
    """Every file of a folder by its key."""
    return {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
    }


def flip(path: Path, at: int) -> None:
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


def tree_digests(root: Path) -> dict[str, str]:
    """Digest of every file of a folder by its key, and of every folder that is empty."""
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else ""
        for p in sorted(root.rglob("*"))
        if p.is_file() or not any(p.iterdir())
    }


def assert_same_tree(found: Path | dict[str, str], expected: Path | dict[str, str]) -> None:
    """Same files with the same bytes, and nothing beside them; says which differ."""
    a = found if isinstance(found, dict) else tree_digests(found)
    b = expected if isinstance(expected, dict) else tree_digests(expected)
    different = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
    assert not different, f"{len(different)} of {len(b)} differ, such as {different[:5]}"


@cache
def prose(characters: int) -> str:
    """Text of the demo corpus, which the demo model was not trained on; at most 220,000."""
    text = "\n\n".join(d.text for d in documents(held_out=True))
    assert len(text) >= characters
    return text[:characters]


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder in memory where there is one: syncing hundreds of small files takes a while."""
    memory = "/dev/shm"
    return tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)
