"""The plan: places, batches, blocks and sizes, against simulations written out plainly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from helpers import STAGES, bare_corpus, plan_of, small_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.corpus import Corpus
from actstore.errors import PlanError, UnknownNameError
from actstore.plan import PADDING, Batch, Plan, StageSpec, parse_bytes, peak_buffer
from actstore.writer import Writer

ONE = (StageSpec("mlp_post", (0,), 32),)
SEVERAL = (
    StageSpec("hidden", (0, 1, 2, 3), 32),
    StageSpec("mlp_post", (0, 1, 2), 64, "float16"),
    StageSpec("mlp_out", (1,), 32),
)


@st.composite
def corpora(draw: st.DrawFn) -> Corpus:
    """Ragged sequences, of which all, some or just a few tokens are kept."""
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=40))
    corpus = bare_corpus(lengths)
    share = draw(st.sampled_from([1.0, 1.0, 0.5, 0.05]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    keep = rng.random(sum(lengths)) < share
    keep[rng.integers(sum(lengths))] = True
    return replace(corpus, keep=keep)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans with blocks from 16 tokens on."""
    corpus = draw(corpora())
    stages = draw(st.sampled_from([ONE, SEVERAL]))
    passes = draw(st.sampled_from([1, 2] if stages is SEVERAL else [1]))
    return Plan.build(
        corpus,
        stages,
        buffer=draw(st.sampled_from([32 * 1408, 64 * 1408, 300 * 1408])),
        passes=passes,
        batch_tokens=draw(st.integers(1, 300)),
        padding_side=draw(st.sampled_from(["right", "left"])),
    )


# -- tokens and batches --------------------------------------------------------------------


@given(plans())
@settings(max_examples=100, deadline=None)
def test_every_kept_token_has_one_place(plan: Plan) -> None:
    """Put every batch's input tokens, padded, through its places: the kept ones come out."""
    corpus = plan.corpus
    found = np.full(plan.n_tokens, -1)
    for batch in plan.batches:
        padded = np.full((len(batch.sequences), batch.length), -7)
        for row, s in enumerate(batch.sequences):
            inputs = np.arange(corpus.starts[s], corpus.starts[s + 1])
            if plan.padding_side == "right":
                padded[row, : len(inputs)] = inputs
            else:
                padded[row, batch.length - len(inputs) :] = inputs
        source, token = plan.batch_places(batch)
        assert (found[token] == -1).all()
        assert (np.diff(token) > 0).all()
        found[token] = padded.ravel()[source]
        assert plan.batch_blocks(batch).tolist() == sorted(set(token // plan.block_tokens))
    expected = [i for i in range(len(corpus.token_ids)) if corpus.keep[i]]
    assert found.tolist() == plan.kept.tolist() == expected


@given(plans())
@settings(max_examples=100, deadline=None)
def test_batches_hold_the_sequences_that_have_kept_tokens(plan: Plan) -> None:
    corpus = plan.corpus
    run = sorted(s for b in plan.batches for s in b.sequences.tolist())
    assert run == [
        s
        for s in range(corpus.n_sequences)
        if corpus.keep[corpus.starts[s] : corpus.starts[s + 1]].any()
    ]
    for batch in plan.batches:
        assert batch.length == corpus.lengths[batch.sequences].max()


@given(corpora(), st.integers(1, 300))
@settings(max_examples=100, deadline=None)
def test_little_padding_is_computed(corpus: Corpus, batch_tokens: int) -> None:
    plan = Plan.build(corpus, ONE, batch_tokens=batch_tokens)
    real = 0
    for batch in plan.batches:
        own = int(corpus.lengths[batch.sequences].sum())
        computed = batch.length * len(batch.sequences)
        assert computed <= PADDING * own
        assert computed <= batch_tokens or len(batch.sequences) == 1
        real += own
    assert plan.computed_tokens <= 1.10 * real


def test_equal_lengths_fill_their_batches() -> None:
    plan = Plan.build(bare_corpus([100] * 95), ONE, batch_tokens=1000)
    assert [len(b.sequences) for b in plan.batches] == [10] * 9 + [5]
    assert [b.sequences[0] for b in plan.batches] == list(range(0, 95, 10))


@given(plans())
@settings(max_examples=50, deadline=None)
def test_blocks_hold_every_token(plan: Plan) -> None:
    rows = [plan.block_rows(b) for b in range(plan.n_blocks)]
    assert sum(rows) == plan.n_tokens
    assert all(r == plan.block_tokens for r in rows[:-1])
    assert 1 <= rows[-1] <= plan.block_tokens
    assert plan.block_tokens >= 16
    assert plan.block_tokens & (plan.block_tokens - 1) == 0
    assert plan.first_token.tolist() == [
        int(plan.corpus.keep[:start].sum()) for start in plan.corpus.starts
    ]


def test_the_same_arguments_give_the_same_plan() -> None:
    first, second = (plan_of(small_corpus(), STAGES, 64) for _ in range(2))
    assert first.config_hash == second.config_hash
    assert len(first.batches) == len(second.batches)
    for a, b in zip(first.batches, second.batches, strict=True):
        assert (a.sequences.tolist(), a.length) == (b.sequences.tolist(), b.length)


def test_all_that_changes_the_bits_changes_the_hash() -> None:
    corpus = small_corpus()
    base = plan_of(corpus, STAGES, 64)
    labels = {**corpus.sequence_labels, "year": corpus.sequence_labels["year"] + 1}
    keep = corpus.keep.copy()
    keep[3] = not keep[3]
    others = {
        "blocks": plan_of(corpus, STAGES, 32),
        "batches": plan_of(corpus, STAGES, 64, batch_tokens=50),
        "padding": plan_of(corpus, STAGES, 64, padding_side="left"),
        "passes": plan_of(corpus, STAGES, 64, passes=2, buffer="70kB"),
        "element type": Plan.build(corpus, STAGES, dtype="float32", buffer=2 * 64 * 1248),
        "stages": plan_of(corpus, STAGES[1:], 64),
        "provenance": plan_of(corpus, STAGES, 64, provenance={"model": {"sha256": "0"}}),
        "labels": plan_of(replace(corpus, sequence_labels=labels), STAGES, 64),
        "selection": plan_of(replace(corpus, keep=keep), STAGES, 64),
    }
    assert {p.block_tokens for n, p in others.items() if n != "blocks"} == {64}
    hashes = {name: plan.config_hash for name, plan in others.items()}
    assert len({base.config_hash, *hashes.values()}) == len(others) + 1
    assert json.loads(json.dumps(base.config)) == base.config


# -- memory --------------------------------------------------------------------------------


def touched(plan: Plan, batch: Batch) -> set[int]:
    """Blocks of every kept token of a batch, and those between them within a sequence."""
    corpus, blocks = plan.corpus, set()
    for s in batch.sequences:
        before = int(corpus.keep[: corpus.starts[s]].sum())
        count = int(corpus.keep[corpus.starts[s] : corpus.starts[s + 1]].sum())
        blocks |= {t // plan.block_tokens for t in range(before, before + count)}
    return blocks


@given(plans())
@settings(max_examples=100, deadline=None)
def test_peak_buffer_is_what_a_simulation_finds(plan: Plan) -> None:
    """Three layers of 7 bytes a token: each is passed while the others stand before or behind."""
    sets = [touched(plan, b) for b in plan.batches]
    peak = 0
    for i, own in enumerate(sets):
        past, coming = set().union(*sets[:i]), set().union(*sets[i + 1 :])
        before = past & (own | coming)
        after = (past | own) & coming
        for layer in range(3):
            held = layer * len(after) + len(before | own) + (2 - layer) * len(before)
            peak = max(peak, held)
    found = peak_buffer(plan.corpus, plan.batches, plan.block_tokens, 3 * 7, 7)
    assert found == peak * 7 * plan.block_tokens


def shards_in_order(plan: Plan) -> Iterator[tuple[str, int, int, int, np.ndarray]]:
    """(pass, stage, layer, block, tokens) as a model that runs the batches would fill them."""
    for index, group in enumerate(plan.passes):
        layers = sorted({s.layers[i] for s in plan.stages for i in group[s.name]})
        for batch in plan.batches:
            _, tokens = plan.batch_places(batch)
            for layer in layers:
                for stage in plan.stages:
                    if layer in stage.layers:
                        for block in plan.batch_blocks(batch):
                            own = tokens[tokens // plan.block_tokens == block]
                            yield index, stage, layer, block, own


@given(plans())
@settings(max_examples=60, deadline=None)
def test_the_buffer_holds_all_shards_that_are_open_at_once(plan: Plan) -> None:
    """With the room that checksums take in a shard's image, as the writer's pool counts it."""
    left: dict[tuple[str, int, int], int] = {}
    held = peak = 0
    for _, stage, layer, block, own in shards_in_order(plan):
        key = (stage.name, layer, int(block))
        if key not in left:
            left[key] = plan.block_rows(block)
            held += stage.layout.image_nbytes
            peak = max(peak, held)
        left[key] -= len(own)
        if not left[key]:
            held -= stage.layout.image_nbytes
    assert held == 0
    assert set(left.values()) == {0}
    assert peak <= Writer("nowhere", plan)._pool.capacity


def test_widely_mixed_lengths_fit_the_buffer_by_a_narrower_window() -> None:
    """Sorting by length over everything would open every block at once."""
    rng = np.random.default_rng(0)
    corpus = bare_corpus(rng.integers(1, 64, 2000).tolist())
    for stages, per_token in [(ONE, 128), ((replace(ONE[0], layers=(0, 1, 2)),), 384)]:
        for blocks in (2, 3, 8):
            buffer = blocks * 512 * per_token
            plan = Plan.build(corpus, stages, buffer=buffer)
            assert plan.n_blocks > 30
            assert peak_buffer(corpus, plan.batches, plan.block_tokens, per_token, 128) <= buffer
            assert plan.buffer == buffer
            assert plan.computed_tokens <= 1.10 * plan.n_tokens
            assert len(plan.batches) < 2000 / 2  # sequences still run together


# -- blocks and passes ---------------------------------------------------------------------


def large_model(dtype: str = "bfloat16") -> list[StageSpec]:
    """61,440 values a token in each of 32 layers, as an 8B model with every stage has."""
    narrow = [
        "resid_pre",
        "resid_mid",
        "resid_post",
        "attn_z",
        "attn_out",
        "mlp_in",
        "mlp_out",
        "path",
    ]
    layers = tuple(range(32))
    return [
        *(StageSpec(name, layers, 4096, dtype) for name in narrow),
        *(StageSpec(name, layers, 14336, dtype) for name in ("mlp_pre", "mlp_post")),
    ]


def test_a_large_model_in_the_default_buffer() -> None:
    corpus = bare_corpus([500] * 10)
    stages = large_model()
    assert sum(s.width for s in stages) == 61_440
    plan = Plan.build(corpus, stages)
    assert plan.block_tokens == 128
    (note,) = [n for n in plan.notes if "--buffer" in n]
    assert "blocks hold only 128 tokens" in note
    assert "3,932,160 bytes a token" in note
    assert "`--buffer 8GiB` or `--passes 8`" in note
    for better in (
        Plan.build(corpus, stages, buffer="8GiB"),
        Plan.build(corpus, stages, passes=8),
    ):
        assert better.block_tokens == 1024
        assert not any("--buffer" in n for n in better.notes)


def test_wide_stages_have_blocks_of_1024_where_the_buffer_allows() -> None:
    plan = Plan.build(bare_corpus([500] * 10), [StageSpec("mlp_post", (0,), 28672)])
    assert plan.block_tokens == 1024
    assert plan.notes == ()


def test_small_shards_are_warned_of() -> None:
    plan = Plan.build(bare_corpus([100] * 400), ONE, buffer="512kB")
    assert plan.block_tokens == 1024
    (note,) = plan.notes
    assert "the smallest shards hold 0.12 MiB" in note
    assert Plan.build(bare_corpus([100] * 400), ONE).notes == ()


def test_little_text_has_little_blocks() -> None:
    for tokens, block in [(1, 16), (16, 16), (17, 32), (1000, 1024), (1024, 1024), (1025, 2048)]:
        assert Plan.build(bare_corpus([tokens]), ONE).block_tokens == block


@given(plans())
@settings(max_examples=50, deadline=None)
def test_passes_share_out_every_layer_once(plan: Plan) -> None:
    for stage in plan.stages:
        seen = [i for group in plan.passes for i in group[stage.name]]
        assert seen == list(range(len(stage.layers)))


def test_passes_are_runs_of_the_models_layers() -> None:
    plan = Plan.build(bare_corpus([20]), SEVERAL, passes=2)
    assert plan.passes == (
        {"hidden": (0, 1), "mlp_post": (0, 1), "mlp_out": (0,)},
        {"hidden": (2, 3), "mlp_post": (2,), "mlp_out": ()},
    )


def test_sizes() -> None:
    plan = plan_of(small_corpus(), STAGES, 64)
    values = {"hidden": 3 * 24, "attn_z": 2 * 32, "mlp_post": 2 * 48, "mlp_out": 2 * 32}
    item = {"hidden": 4, "attn_z": 2, "mlp_post": 4, "mlp_out": 2}
    for stage in plan.stages:
        name = stage.name
        assert plan.stage_nbytes(stage) == values[name] * item[name] * plan.n_tokens
    assert plan.nbytes == sum(map(plan.stage_nbytes, plan.stages))
    assert plan.shards == 3 * (3 + 2 + 2 + 2)


@given(
    st.integers(1, 20_000),
    st.integers(1, 20_000),
    st.sampled_from(["float32", "float16", "bfloat16"]),
)
@settings(max_examples=100, deadline=None)
def test_chunks_are_sized_for_reading(width: int, tokens: int, dtype: str) -> None:
    corpus = bare_corpus([tokens])
    (stage,) = Plan.build(corpus, [StageSpec("x", (0,), width, dtype)], buffer="8GiB").stages
    layout = stage.layout
    assert layout.rows % layout.chunk_rows == 0
    assert width % layout.chunk_width == 0
    assert layout.chunk_nbytes <= 2**20 or layout.chunk_width == width
    assert layout.dtype == ("float16" if dtype == "float16" else "float32")
    assert layout.source_dtype == dtype
    if width % 512 == 0:
        assert width / 32 <= layout.chunk_width <= max(32, width / 16)


# -- errors --------------------------------------------------------------------------------


def test_errors() -> None:
    corpus = bare_corpus([20])
    for options, kind, message in [
        ({"dtype": "float8"}, UnknownNameError, "did you mean 'float16'|float32, float16"),
        ({"padding_side": "rihgt"}, UnknownNameError, "did you mean 'right'"),
        ({"batch_tokens": 0}, PlanError, "batch_tokens is 0"),
        ({"passes": 0}, PlanError, "passes is 0: it must be from 1 to 1"),
        ({"passes": 2}, PlanError, "from 1 to 1"),
        ({"buffer": "4 kB"}, PlanError, "raise --buffer, use --passes"),
        ({"buffer": "much"}, PlanError, "'much' is not understood"),
        ({"buffer": 0}, PlanError, "must be more than nothing"),
        ({"buffer": -5}, PlanError, "must be more than nothing"),
    ]:
        with pytest.raises(kind, match=message):
            Plan.build(corpus, ONE, **options)
    with pytest.raises(PlanError, match="no stages"):
        Plan.build(corpus, [])
    with pytest.raises(PlanError, match="no token is kept"):
        Plan.build(replace(corpus, keep=np.zeros(20, bool)), ONE)


def test_sizes_as_text() -> None:
    sizes = {"1GiB": 2**30, "512MiB": 2**29, "2GB": 2 * 10**9, "1.5kB": 1500, "7": 7, 42: 42}
    assert {text: parse_bytes(text) for text in sizes} == sizes
