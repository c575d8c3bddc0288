"""The writer with arrays from anywhere: any order, any interruption, the same bytes."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    STAGES,
    VOCABULARY,
    assert_same_tree,
    bare_corpus,
    plan_of,
    put_all,
    random_values,
    scratch,
    small_corpus,
    stored,
    tree_bytes,
    write_store,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore.errors import (
    HalfOverflowError,
    NonFiniteError,
    PlanError,
    UnknownNameError,
    UsageError,
    WriteError,
)
from actstore.plan import Plan, StageSpec
from actstore.storage import LocalStorage, aligned_buffer
from actstore.writer import Writer, to_bfloat16

THREE = (
    StageSpec("attn_z", (0, 1), 32, "float16", heads=4),
    StageSpec("mlp_post", (0, 1, 2), 48),
    StageSpec("mlp_out", (1,), 32, "bfloat16"),
)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory, since nothing here is about disks."""
    with scratch() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Three blocks of 16 tokens, the last of 8; nothing of 40 tokens of text but ids."""
    return plan_of(bare_corpus([7, 13, 1, 19]), THREE, 16)


@pytest.fixture(scope="module")
def values(plan: Plan) -> dict[str, np.ndarray]:
    return random_values(plan)


@pytest.fixture(scope="module")
def tree(plan: Plan, values: dict[str, np.ndarray]) -> Iterator[dict[str, bytes]]:
    """Every file of the store that `plan` and `values` make."""
    with scratch() as folder:
        assert write_store(Path(folder, "run.zarr"), plan, values).sealed
        yield tree_bytes(Path(folder, "run.zarr"))


@pytest.fixture(scope="module")
def bare_tree(plan: Plan, values: dict[str, np.ndarray]) -> Iterator[dict[str, bytes]]:
    """The same without sketches."""
    with scratch() as folder:
        write_store(Path(folder, "run.zarr"), replace(plan, sketch=False), values)
        yield tree_bytes(Path(folder, "run.zarr"))


Piece = tuple[str, int, int, int, int]  # stage, layer, its index, tokens from, to


def pieces(plan: Plan, cuts: list[list[int]]) -> list[Piece]:
    """Every stage and layer, cut along tokens."""
    found, i = [], 0
    for stage in plan.stages:
        for index, layer in enumerate(stage.layers):
            bounds = sorted({0, *(c for c in cuts[i % len(cuts)]), plan.n_tokens})
            found += [(stage.name, layer, index, a, b) for a, b in pairwise(bounds)]
            i += 1
    return found


def put_pieces(writer: Writer, values: dict[str, np.ndarray], order: list[Piece]) -> None:
    for stage, layer, index, a, b in order:
        writer.put(stage, layer, a, values[stage][index, a:b])


# -- the same bytes ------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_order_gives_the_same_bytes(
    plan: Plan, values: dict[str, np.ndarray], bare_tree: dict[str, bytes], data: st.DataObject
) -> None:
    """Without sketches, whose own tests are about order too."""
    cuts = data.draw(st.lists(st.lists(st.integers(1, 39), max_size=5), min_size=1, max_size=6))
    order = data.draw(st.permutations(pieces(plan, cuts)))
    threads = data.draw(st.sampled_from([1, 3]))
    roomy = replace(plan, sketch=False, buffer=2**24)  # all shards may be open at once
    with scratch() as folder:
        with Writer(Path(folder, "run.zarr"), roomy, threads=threads) as writer:
            put_pieces(writer, values, order)
        assert writer.sealed
        assert tree_bytes(Path(folder, "run.zarr")) == bare_tree


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_going_on_gives_the_same_bytes(
    plan: Plan, values: dict[str, np.ndarray], tree: dict[str, bytes], data: st.DataObject
) -> None:
    """A run that ends anywhere, by an error or without one, then another, then a whole one."""
    with scratch() as folder:
        path = Path(folder, "run.zarr")
        for _ in range(2):
            order = pieces(plan, [data.draw(st.lists(st.integers(1, 39), max_size=3))])
            order = order[: data.draw(st.integers(0, len(order)))]
            try:
                with Writer(path, replace(plan, buffer=2**24)) as writer:
                    put_pieces(writer, values, order)
                    if data.draw(st.booleans()):
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                pass
        with Writer(path, plan) as writer:
            put_all(writer, values)
        assert writer.sealed
        assert tree_bytes(path) == tree


def test_a_rerun_writes_only_what_is_missing(
    plan: Plan, values: dict[str, np.ndarray], tree: dict[str, bytes], tmp_path: Path
) -> None:
    with Writer(tmp_path / "run.zarr", plan) as writer:
        for stage in plan.stages:
            for i, layer in enumerate(stage.layers):
                writer.put(stage.name, layer, 16, values[stage.name][i, 16:])
    assert not writer.sealed
    first = {p: p.stat().st_ino for p in tmp_path.glob("run.zarr/*/activation/c.*")}
    assert len(first) == 6 * 2
    with Writer(tmp_path / "run.zarr", plan) as writer:
        assert [m.tolist() for m in writer.missing] == [[True, False, False]]
        assert writer.wants(np.array([0, 1]))
        assert not writer.wants(np.array([1, 2]))
        put_all(writer, values)
    assert writer.sealed
    assert {p: p.stat().st_ino for p in first} == first
    assert tree_bytes(tmp_path / "run.zarr") == tree
    with Writer(tmp_path / "run.zarr", plan) as writer:
        assert writer.sealed
        put_all(writer, values)
    assert (writer.sealed, writer.bytes_written, writer.repaired) == (True, 0, [])
    assert tree_bytes(tmp_path / "run.zarr") == tree


def test_a_record_is_believed_and_a_shard_file_is_not(
    plan: Plan, values: dict[str, np.ndarray], tree: dict[str, bytes], tmp_path: Path
) -> None:
    """Files that a killed writer left: a shard half written, one of the right size, a partial."""
    root = tmp_path / "run.zarr"
    with Writer(root, plan):
        pass
    key = "mlp_post/activation/c.0.1.0"
    (root / key).parent.mkdir(parents=True, exist_ok=True)
    (root / key).write_bytes(tree[key][:100])
    (root / "mlp_post/activation/c.1.1.0").write_bytes(bytes(len(tree[key])))
    (root / "mlp_post/activation/c.2.1.0.0.partial").write_bytes(b"half")
    (root / "journal/p0.b00000001.json").write_bytes(tree["journal/p0.b00000001.json"][:-30])
    with Writer(root, plan) as writer:
        assert writer.missing[0].all()
        put_all(writer, values)
    assert tree_bytes(root) == tree


def test_a_recorded_shard_that_lost_bytes_is_written_again(
    plan: Plan, values: dict[str, np.ndarray], tree: dict[str, bytes], tmp_path: Path
) -> None:
    root = tmp_path / "run.zarr"
    with Writer(root, plan) as writer:
        put_all(writer, {name: own[:, :32] for name, own in values.items()})
    shard = root / "mlp_post/activation/c.0.1.0"
    shard.write_bytes(shard.read_bytes()[:-1])
    (root / "attn_z/activation/c.1.0.0").unlink()
    with Writer(root, plan) as writer:
        assert writer.missing[0].tolist() == [True, True, True]
        put_all(writer, values)
    assert tree_bytes(root) == tree


def test_values_come_back(plan: Plan, values: dict[str, np.ndarray], tmp_path: Path) -> None:
    write_store(tmp_path / "run.zarr", plan, values)
    store = actstore.open(tmp_path / "run.zarr")
    for stage in THREE:
        found = store[stage.name].values
        expected = stored(values[stage.name], stage.source_dtype)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)


def test_kinds_of_values_that_may_be_put(tmp_path: Path) -> None:
    """float64 and float16 are cast; bits of bfloat16 go as they are; rows may be strided."""
    plan = plan_of(bare_corpus([16]), THREE[:1] + THREE[2:], 16)
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(2, 32, 16))
    bits = torch.from_numpy(rng.normal(size=(16, 32))).to(torch.bfloat16)
    with Writer(tmp_path / "run.zarr", plan) as writer:
        writer.put("attn_z", 0, 0, wide[0].T)
        writer.put("attn_z", 1, 0, wide[1].T.astype(np.float16))
        writer.put("mlp_out", 1, 0, bits.view(torch.uint16).numpy())
    store = actstore.open(tmp_path / "run.zarr")
    assert np.array_equal(store["attn_z"].values, wide.transpose(0, 2, 1).astype(np.float16))
    assert np.array_equal(store["mlp_out"].values[0], bits.float().numpy())


def test_several_passes(tmp_path: Path) -> None:
    """Layers in two groups, each with its own records; put in the order of the passes."""
    corpus = bare_corpus([7, 13, 1, 19])
    plan = plan_of(corpus, THREE, 32, passes=2, buffer=2 * 32 * 512)
    values = random_values(plan)
    path = tmp_path / "run.zarr"
    with Writer(path, plan) as writer:
        for index, group in enumerate(plan.passes):
            for stage in plan.stages:
                for i in group[stage.name]:
                    assert writer.wants(np.array([0, 1]), index)
                    writer.put(stage.name, stage.layers[i], 0, values[stage.name][i])
    assert writer.sealed
    records = [k for k in tree_bytes(path) if k.startswith("journal/p") and "b0" in k]
    assert records == [f"journal/p{p}.b0000000{b}.json" for p in (0, 1) for b in (0, 1)]
    for stage in THREE:
        found = actstore.open(path)[stage.name].values
        assert np.array_equal(found, stored(values[stage.name], stage.source_dtype))


def test_two_ranks(
    plan: Plan, values: dict[str, np.ndarray], tree: dict[str, bytes], tmp_path: Path
) -> None:
    """Each puts everything and writes its own run of blocks; the last to end seals."""
    path = tmp_path / "run.zarr"
    first = write_store(path, plan, values, rank=0, world_size=2)
    assert not first.sealed
    assert list(first.mine()) == [0]
    assert not (path / "zarr.json").exists()
    second = write_store(path, plan, values, rank=1, world_size=2)
    assert list(second.mine()) == [1, 2]
    assert second.sealed
    assert tree_bytes(path) == tree


@pytest.mark.filterwarnings("ignore:Consolidated metadata")  # filters are not for threads
def test_many_ranks_at_once(
    plan: Plan, values: dict[str, np.ndarray], tree: dict[str, bytes], tmp_path: Path
) -> None:
    """More of them than blocks, all at the same time."""
    path, failed = tmp_path / "run.zarr", []

    def run(rank: int) -> None:
        try:
            write_store(path, plan, values, rank=rank, world_size=5)
        except BaseException as error:
            failed.append(error)

    ranks = [threading.Thread(target=run, args=(r,)) for r in range(5)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert not failed
    assert tree_bytes(path) == tree
    for world_size in (1, 3, 5):
        blocks = [
            b
            for rank in range(world_size)
            for b in Writer(path, plan, rank=rank, world_size=world_size).mine()
        ]
        assert blocks == [0, 1, 2]


# -- rounding ------------------------------------------------------------------------------


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_bfloat16_rounds_as_torch_does(numbers: list[float]) -> None:
    values = np.array(numbers, np.float32)
    assert_rounds_as_torch(values)


def test_bfloat16_rounds_every_pattern_as_torch_does() -> None:
    """Each upper half with the lower halves where rounding turns, NaN payloads among them."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    for lower in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        assert_rounds_as_torch((upper | lower).view(np.float32))


def assert_rounds_as_torch(values: np.ndarray) -> None:
    ours = to_bfloat16(values)
    theirs = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    nan = np.isnan(values)
    assert np.array_equal(ours[~nan], theirs[~nan])
    assert np.isnan((ours[nan].astype(np.uint32) << 16).view(np.float32)).all()


# -- wrong values --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (("mlp_pots", 0, 0, (1, 48)), UnknownNameError, "unknown stage 'mlp_pots'.*'mlp_post'"),
        (("mlp_post", 3, 0, (1, 48)), UnknownNameError, "layer of mlp_post 3.*0, 1, 2"),
        (("mlp_out", 0, 0, (1, 32)), UnknownNameError, "layer of mlp_out 0.* Known: 1"),
        (("mlp_post", 0, 0, (1, 47)), UsageError, r"\(1, 47\): \(tokens, 48\)"),
        (("mlp_post", 0, 0, (48,)), UsageError, r"\(48,\): \(tokens, 48\)"),
        (("mlp_post", 0, 0, (1, 1, 48)), UsageError, r"\(1, 1, 48\)"),
        (("mlp_post", 0, 40, (1, 48)), UsageError, "tokens 40 to 41.*40"),
        (("mlp_post", 0, 30, (11, 48)), UsageError, "tokens 30 to 41"),
        (("mlp_post", 0, -1, (1, 48)), UsageError, "tokens -1 to 0"),
    ],
)
def test_wrong_arguments(
    plan: Plan, tmp_path: Path, call: tuple[Any, ...], kind: type[Exception], message: str
) -> None:
    *place, shape = call
    with Writer(tmp_path / "run.zarr", plan) as writer, pytest.raises(kind, match=message):
        writer.put(*place, np.zeros(shape, np.float32))


def test_bits_for_a_stage_that_is_not_bfloat16(plan: Plan, tmp_path: Path) -> None:
    """As numbers they would be nonsense."""
    with Writer(tmp_path / "run.zarr", plan) as writer:
        for stage, width in [("mlp_post", 48), ("attn_z", 32)]:
            with pytest.raises(UsageError, match="uint16"):
                writer.put(stage, 0, 0, np.zeros((3, width), np.uint16))
        with pytest.raises(UsageError, match="complex128"):
            writer.put("mlp_post", 0, 0, np.zeros((3, 48), complex))


def test_nothing_is_written_twice(
    plan: Plan, values: dict[str, np.ndarray], tree: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "run.zarr"
    acts = values["mlp_post"][0]
    with Writer(path, replace(plan, buffer=2**24)) as writer:
        writer.put("mlp_post", 0, 0, acts[:5])
        for a, b in [(0, 5), (4, 6), (0, 1)]:
            with pytest.raises(
                UsageError, match="block 0 of mlp_post, layer 0, were written twice"
            ):
                writer.put("mlp_post", 0, a, acts[a:b])
        writer.put("mlp_post", 0, 5, acts[5:16])  # the shard is complete, its block is not
        with pytest.raises(UsageError, match="written twice"):
            writer.put("mlp_post", 0, 15, acts[15:20])
        writer.put("mlp_post", 0, 16, acts[16:])
        for stage in plan.stages:
            for i, layer in enumerate(stage.layers):
                if (stage.name, layer) != ("mlp_post", 0):
                    writer.put(stage.name, layer, 0, values[stage.name][i])
    assert writer.sealed
    assert tree_bytes(path) == tree


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_values(
    plan: Plan, values: dict[str, np.ndarray], tmp_path: Path, bad: float
) -> None:
    path = tmp_path / "run.zarr"
    broken = {name: own.copy() for name, own in values.items()}
    broken["mlp_post"][2, 20:23, 7] = bad
    with pytest.raises(NonFiniteError) as caught:
        write_store(path, plan, broken)
    message = str(caught.value)
    assert "3 of 768 values are NaN or inf in stage mlp_post, layer 2, tokens 16 to 31" in message
    assert "--allow-nonfinite" in message
    assert not (path / "journal/p0.b00000001.json").exists()
    assert write_store(path, plan, broken, allow_nonfinite=True).sealed
    assert np.array_equal(actstore.open(path)["mlp_post"], broken["mlp_post"], equal_nan=True)
    assert [problem for _, problem in actstore.verify(path) if problem] == []


@pytest.mark.parametrize("stage", ["attn_z", "mlp_out"])
def test_nonfinite_values_of_smaller_types(
    plan: Plan, values: dict[str, np.ndarray], tmp_path: Path, stage: str
) -> None:
    broken = {name: own.copy() for name, own in values.items()}
    broken[stage][0, 0, 0] = np.inf
    with pytest.raises(NonFiniteError, match=f"1 of 512 .* stage {stage}"):
        write_store(tmp_path / "run.zarr", plan, broken)


def test_float16_overflow(
    plan: Plan, values: dict[str, np.ndarray], tree: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "run.zarr"
    for limit in (65519.99, -65519.99):
        fitting = {**values, "attn_z": values["attn_z"].copy()}
        fitting["attn_z"][1, 3, 4] = limit
        with Writer(tmp_path / f"fits{limit}.zarr", plan) as writer:
            put_all(writer, fitting)
        found = actstore.open(tmp_path / f"fits{limit}.zarr")["attn_z"].values[1, 3, 4]
        assert found == np.sign(limit) * 65504
    for limit in (65520.0, -65520.0, 1e30):
        large = {**values, "attn_z": values["attn_z"].copy()}
        large["attn_z"][1, 3, 4:6] = limit
        with pytest.raises(HalfOverflowError) as caught:
            write_store(path, plan, large)
        message = str(caught.value)
        assert "2 values of stage attn_z, layer 1" in message
        assert f"{np.float32(limit):g}" in message
        assert "--dtype bfloat16 or float32" in message
    assert write_store(path, plan, values).sealed
    assert tree_bytes(path) == tree


# -- outputs that cannot be used -----------------------------------------------------------


def test_changed_arguments_are_named(
    plan: Plan, values: dict[str, np.ndarray], tree: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "run.zarr"
    with Writer(path, plan):
        pass
    before = tree_bytes(path)
    corpus = plan.corpus
    keep = corpus.keep.copy()
    keep[0] = False
    facts = {"model": {"sha256": "ab", "name": "tiny"}, "machine": {"threads": 2}}
    for other, named in [
        (plan_of(corpus, THREE, 32), "capture.block_tokens: 16 there, 32 here"),
        (plan_of(corpus, THREE[:2], 16), "mlp_out.dtype: bfloat16 there, absent here"),
        (
            plan_of(corpus, (*THREE[:2], replace(THREE[2], layers=(2,))), 16),
            r"capture.stages.mlp_out.layers: \[1\] there, \[2\] here",
        ),
        (plan_of(corpus, THREE, 16, batch_tokens=8), "capture.batches.count|the batches"),
        (plan_of(corpus, THREE, 16, padding_side="left"), "padding_side: right there, left here"),
        (plan_of(corpus, THREE, 16, provenance=facts), "machine.threads: absent there, 2 here"),
        (plan_of(corpus, THREE, 16, provenance=facts), "the model's weights"),
        (plan_of(replace(corpus, keep=keep), THREE, 16), "the input text, its labels or its"),
    ]:
        with pytest.raises(PlanError, match=named) as caught, Writer(path, other):
            pass
        assert "begun with other arguments" in str(caught.value)
        assert tree_bytes(path) == before
    assert write_store(path, plan, values).sealed
    assert tree_bytes(path) == tree


def test_outputs_that_are_something_else(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for path, message in [
        (file, "is a file: choose another output"),
        (folder, "is not a store of actstore's: choose another output"),
        (file / "run.zarr", "cannot write to"),
    ]:
        with pytest.raises((PlanError, WriteError), match=message), Writer(path, plan):
            pass
    assert file.read_text() == "mine"
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    with Writer(tmp_path / "empty", plan):
        pass
    with pytest.raises(UsageError, match="rank 2 is not below the world size 2"):
        Writer(tmp_path / "x", plan, rank=2, world_size=2)


def test_a_second_writer_at_once_is_refused(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    with Writer(path, plan):
        with (
            pytest.raises(WriteError, match="being written by another process"),
            Writer(path, plan),
        ):
            pass
        script = (
            "import sys\n"
            "from actstore.storage import LocalStorage\n"
            "with LocalStorage(sys.argv[1]).lock('journal', shared=True): pass\n"
        )
        other = subprocess.run(
            [sys.executable, "-c", script, path], capture_output=True, text=True, check=False
        )
        assert "being written by another process" in other.stderr
    with Writer(path, plan, rank=0, world_size=2), Writer(path, plan, rank=1, world_size=2):
        for options in [{}, {"rank": 0, "world_size": 2}]:
            with pytest.raises(WriteError, match="another process"), Writer(path, plan, **options):
                pass
    with Writer(path, plan):
        pass


def test_a_disk_that_is_too_small(
    plan: Plan,
    values: dict[str, np.ndarray],
    tree: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "run.zarr"
    monkeypatch.setattr(LocalStorage, "free_bytes", lambda self: plan.nbytes - 1)
    with pytest.raises(WriteError, match=r"needs 0\.00 GB more .* keep fewer stages"):
        Writer(path, plan).__enter__()
    assert not path.exists()
    monkeypatch.undo()
    with Writer(path, plan) as writer:  # two thirds of it
        for stage in plan.stages:
            for i, layer in enumerate(stage.layers):
                writer.put(stage.name, layer, 0, values[stage.name][i, :32])
    monkeypatch.setattr(LocalStorage, "free_bytes", lambda self: plan.nbytes // 3)
    assert write_store(path, plan, values).sealed
    assert tree_bytes(path) == tree


def test_a_disk_that_fills_up(
    plan: Plan,
    values: dict[str, np.ndarray],
    tree: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever write it is that fails, the error says so and the same run goes on from there."""
    put = LocalStorage.put
    for nth in (3, 9, 15):
        path, count = tmp_path / f"{nth}.zarr", [0]

        def failing(self: Any, key: str, *rest: Any, count: list[int] = count, nth: int = nth):
            if "/c." in key:
                count[0] += 1
                if count[0] == nth:
                    raise OSError(28, "No space left on device")
            return put(self, key, *rest)

        monkeypatch.setattr(LocalStorage, "put", failing)
        with pytest.raises(WriteError, match=r"writing \w+/activation/c\S+ failed: No space left"):
            write_store(path, plan, values)
        monkeypatch.setattr(LocalStorage, "put", put)
        assert write_store(path, plan, values).sealed
        assert_same_tree(path, write_reference(tmp_path, plan, values))
        assert tree_bytes(path) == tree


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("swallow", [False, True])
def test_what_fails_in_other_threads_is_told_and_what_was_done_is_kept(
    plan: Plan,
    values: dict[str, np.ndarray],
    tree: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hold: bool,
    swallow: bool,
) -> None:
    """Even of a caller who goes on after an error; and no thread writes on once it is told."""
    encode, count = actstore.writer.encode, [0]

    def failing(*given: Any) -> Any:
        count[0] += 1
        if count[0] == 5:
            raise MemoryError("no room")
        return encode(*given)

    monkeypatch.setattr(actstore.writer, "encode", failing)
    path = tmp_path / "run.zarr"
    with (
        pytest.raises((MemoryError, WriteError), match=r"no room|an earlier shard"),
        Writer(path, plan) as writer,
    ):
        writer.hold = hold
        for stage in plan.stages:
            for i, layer in enumerate(stage.layers):
                try:
                    writer.put(stage.name, layer, 0, values[stage.name][i])
                except MemoryError:
                    if not swallow:
                        raise
            writer.catch_up()
    assert not writer.sealed
    assert not [t for t in threading.enumerate() if t.name.startswith("actstore_")]
    left = tree_bytes(path)
    monkeypatch.undo()
    assert any("/c." in key for key in left)
    assert write_store(path, plan, values).sealed
    assert tree_bytes(path) == tree


def write_reference(folder: Path, plan: Plan, values: dict[str, np.ndarray]) -> Path:
    path = folder / "reference.zarr"
    if not path.exists():
        write_store(path, plan, values)
    return path


# -- memory --------------------------------------------------------------------------------


def test_a_buffer_that_is_too_small_is_an_error_not_a_wait(tmp_path: Path) -> None:
    """One token of every block: all blocks are open and none will ever be complete."""
    plan = plan_of(bare_corpus([64] * 10), [StageSpec("mlp_post", (0,), 64)], 64)
    assert plan.n_blocks == 10
    row = np.zeros((1, 64), np.float32)
    with (
        pytest.raises(WriteError, match="none is complete: write tokens in order, or plan with a"),
        Writer(tmp_path / "run.zarr", plan) as writer,
    ):
        for block in range(10):
            writer.put("mlp_post", 0, 64 * block, row)
    assert len(writer._open) == 0
    with Writer(tmp_path / "run.zarr", plan) as writer:
        writer.put("mlp_post", 0, 0, np.zeros((640, 64), np.float32))
    assert writer.sealed


def test_memory_stays_within_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the disk, no more buffers are made than there is room for."""
    plan = plan_of(small_corpus(), STAGES, 16)
    values = random_values(plan)
    put, made = LocalStorage.put, []
    writer = Writer(tmp_path / "run.zarr", plan, vocabulary=VOCABULARY)

    def slow(self: LocalStorage, *arguments: Any) -> None:
        threading.Event().wait(0.001)
        put(self, *arguments)

    def count(nbytes: int) -> np.ndarray:
        made.append(nbytes)
        assert writer._pool._allocated <= writer._pool.capacity
        return aligned_buffer(nbytes)

    monkeypatch.setattr(LocalStorage, "put", slow)
    monkeypatch.setattr("actstore.pool.aligned_buffer", count)
    with writer:
        for batch in plan.batches:
            tokens = plan.batch_places(batch)[1]
            for layer in (0, 1, 2):
                for stage in plan.stages:
                    if layer in stage.layers:
                        acts = values[stage.name][stage.layers.index(layer)]
                        for token in tokens.tolist():
                            writer.put(stage.name, layer, token, acts[token : token + 1])
    assert writer.sealed
    assert 0 < len(made) < plan.shards  # buffers are used again
    assert writer._pool.capacity < 1.1 * plan.buffer
    assert plan.nbytes > 2 * plan.buffer
