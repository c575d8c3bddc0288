"""Opening, selecting, decoding, verifying: what a reader of a store sees."""

from __future__ import annotations

import html
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
import zarr
from helpers import (
    PLAYS,
    STAGES,
    VOCABULARY,
    WORDS,
    bare_corpus,
    flip,
    plan_of,
    put_all,
    random_values,
    scratch,
    small_corpus,
    stored,
    tree_bytes,
    write_small,
    write_store,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore import journal, skeleton
from actstore.arrays import ShardedArray
from actstore.corpus import label_column
from actstore.errors import (
    CorruptStoreError,
    NewerFormatError,
    NotAStoreError,
    UnfinishedStoreError,
    UnknownNameError,
    UsageError,
)
from actstore.plan import StageSpec
from actstore.schema import Categorical
from actstore.storage import LocalStorage, counters
from actstore.verifying import object_count
from actstore.writer import Writer

WIDTHS = {s.name: s.width for s in STAGES}
LAYERS = {s.name: list(s.layers) for s in STAGES}


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory, since nothing here is about disks."""
    with scratch() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def small() -> Iterator[SimpleNamespace]:
    """The small store (path, plan, values, store), to be read only."""
    with scratch() as folder:
        path = Path(folder) / "run.zarr"
        plan, values = write_small(path)
        values = {s.name: stored(values[s.name], s.source_dtype) for s in STAGES}
        yield SimpleNamespace(
            path=path, plan=plan, corpus=plan.corpus, values=values, store=actstore.open(path)
        )


@pytest.fixture
def copy(small: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the small store, to be damaged."""
    return Path(shutil.copytree(small.path, tmp_path / "copy.zarr"))


def nothing_runs(*_: Any, **__: Any) -> Any:
    raise AssertionError("something was computed")


# -- opening -------------------------------------------------------------------------------


def test_nothing_at_the_path(small: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError, match=r"rnu\.zarr does not exist\. Beside it: run\.zarr\."):
        actstore.open(small.path.parent / "rnu.zarr")
    with pytest.raises(NotAStoreError, match=r"run\.zarr does not exist\.$"):
        actstore.open(tmp_path / "no" / "where" / "run.zarr")
    with pytest.raises(NotAStoreError, match=r"a journal\. In it: run\.zarr\.$"):
        actstore.open(small.path.parent)


def foreign_group(path: Path) -> None:
    xr.Dataset({"x": ("t", [1.0])}).to_zarr(path, zarr_format=3, consolidated=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.mkdir, "neither zarr.json nor a journal"),
        (lambda p: p.write_text("text"), "neither zarr.json nor a journal"),
        (foreign_group, r"no such attribute.*else open it with xarray.open_zarr"),
        (lambda p: (p.mkdir(), (p / "zarr.json").write_text("{")), "not a store"),
        (lambda p: (p.mkdir(), (p / "zarr.json").write_text("[1]")), "not a store"),
        (lambda p: (p.mkdir(), (p / "zarr.json").write_text("[" * 100_000)), "not a store"),
        (lambda p: (p.mkdir(), (p / "zarr.json").write_bytes(b"\xff\xfe")), "not a store"),
    ],
)
def test_something_else_at_the_path(
    tmp_path: Path, make: Callable[[Path], Any], message: str
) -> None:
    make(tmp_path / "x.zarr")
    with pytest.raises(NotAStoreError, match=message):
        actstore.open(tmp_path / "x.zarr")


def test_an_unfinished_store_says_how_far_it_is(tmp_path: Path) -> None:
    spec = StageSpec("mlp_post", (0, 1), 32)
    plan = plan_of(bare_corpus([40]), [spec], 16, passes=2, buffer=2 * 16 * 32 * 4)
    values = random_values(plan)
    path = tmp_path / "run.zarr"
    with Writer(path, plan) as writer:
        pass
    with pytest.raises(UnfinishedStoreError, match="not finished: 0 of 6 blocks are complete"):
        actstore.open(path)
    with Writer(path, plan) as writer:
        writer.put("mlp_post", 0, 0, values["mlp_post"][0])
        writer.put("mlp_post", 1, 16, values["mlp_post"][1, 16:32])
    with pytest.raises(UnfinishedStoreError, match=r"4 of 6 .* Run the same dump command again"):
        actstore.open(path)
    with pytest.raises(UnfinishedStoreError):
        list(actstore.verify(path))
    flip(path / "journal/plan.json", 100)
    with pytest.raises(CorruptStoreError, match=r"journal/plan.json .* is damaged"):
        actstore.open(path)


def edit_root(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    root = json.loads((path / "zarr.json").read_text())
    change(root)
    (path / "zarr.json").write_text(json.dumps(root))


def test_a_newer_format(copy: Path) -> None:
    edit_root(copy, lambda root: root["attributes"]["actstore"].update(format=2))
    with pytest.raises(NewerFormatError, match="has format 2 and this version reads up to 1: pip"):
        actstore.open(copy)


def test_damaged_roots_and_manifests(copy: Path) -> None:
    whole = tree_bytes(copy)
    manifest = "journal/manifest.json"

    def broken(key: str, data: bytes | None, message: str) -> None:
        (copy / key).unlink() if data is None else (copy / key).write_bytes(data)
        with pytest.raises(CorruptStoreError, match=message):
            actstore.open(copy)
        (copy / key).write_bytes(whole[key])

    broken(manifest, None, "manifest.json is missing .* run the same dump again to seal it")
    broken(manifest, whole[manifest][:-40], "manifest.json")
    broken(manifest, b"[]", "manifest.json")
    broken(manifest, whole[manifest].replace(b'"id":"', b'"id":"0'), "checksum does not match")
    other = journal.sealed_json({**journal.opened_json(whole[manifest]), "id": "other"})
    broken(manifest, other, "put together from two stores: .* its manifest other")
    root = json.loads(whole["zarr.json"])
    attributes = {"attributes": root["attributes"]}
    broken("zarr.json", json.dumps(attributes).encode(), "lacks the metadata of the arrays")
    nodes = root["consolidated_metadata"]["metadata"]
    nodes["../../elsewhere/activation"] = nodes["mlp_post/activation"]
    broken("zarr.json", json.dumps(root).encode(), "names '../../elsewhere/activation', outside")
    actstore.open(copy)


def test_paths_of_every_kind(small: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small.path.parent)
    for path in ("run.zarr", "./run.zarr/", Path("run.zarr"), str(small.path)):
        store = actstore.open(path)
        assert store.name == "run.zarr"
    monkeypatch.chdir("/")
    assert store["mlp_post"][0, 0].values.shape == (48,)


# -- activations ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage", WIDTHS)
def test_a_stage_is_labelled_and_right(small: SimpleNamespace, stage: str) -> None:
    array = small.store[stage]
    assert array.dims == ("layer", "token", "neuron")
    assert np.array_equal(array.values, small.values[stage])
    assert array.dtype == small.values[stage].dtype
    assert array["layer"].values.tolist() == LAYERS[stage]
    assert array["neuron"].values.tolist() == list(range(WIDTHS[stage]))
    corpus, kept = small.corpus, np.flatnonzero(small.corpus.keep)
    inside = corpus.sequence[kept]
    expected = {
        "input": kept,
        "sequence": inside,
        "position": kept - corpus.starts[inside],
        "token_id": corpus.token_ids[kept],
        "document": inside,
        "year": corpus.sequence_labels["year"][inside],
        "score": corpus.sequence_labels["score"][inside],
        "good": corpus.sequence_labels["good"][inside],
        "offset": corpus.token_labels["offset"][kept],
        "play": [i % 4 for i in inside],
        "condition": corpus.token_labels["condition"].codes[kept],
    }
    along = {name for name, c in array.coords.items() if c.dims == ("token",)}
    assert along == set(expected)
    for name, values in expected.items():
        assert np.array_equal(array[name], values, equal_nan=name in ("score", "offset")), name
    assert array["play"].attrs["label_values"] == PLAYS
    assert array["play"].attrs["flag_values"] == [0, 1, 2, 3]
    assert array["play"].attrs["flag_meanings"].split() == [
        "As_You_Like_It",
        "Lear",
        "_",
        "<b>Hamlet</b>_&_co",
    ]
    assert ("head" in array.coords) == (stage == "attn_z")
    assert ("layer_name" in array.coords) == (stage == "hidden")


def test_what_is_done_to_a_stage_stays_with_it(small: SimpleNamespace) -> None:
    """Asked for again, a stage is as it was, though it is opened just once."""
    store = actstore.open(small.path)
    stage = store.stages[0]
    due, first = store[stage].load(), store[stage]
    first[:] = 7.0
    first["position"][:] = -1
    first["layer"] = first["layer"] + 5
    first.attrs["units"] = first["position"].attrs["long_name"] = "mine"
    again = store[stage]
    assert dask.is_dask_collection(again.data)
    xr.testing.assert_identical(again, due)


def test_coordinates_of_single_stages(small: SimpleNamespace) -> None:
    assert small.store["hidden"]["layer_name"].values.tolist() == ["emb", "h.0", "h.1"]
    assert small.store["attn_z"]["head"].values.tolist() == [n // 8 for n in range(32)]
    assert small.store.heads("attn_z").tolist() == [n // 8 for n in range(32)]
    assert small.store.heads("mlp_post") is None
    assert {s: small.store[s].attrs["source_dtype"] for s in WIDTHS} == {
        s.name: s.source_dtype for s in STAGES
    }


def test_stages(small: SimpleNamespace) -> None:
    assert small.store.stages == list(small.store) == ["hidden", "attn_z", "mlp_post", "mlp_out"]
    assert "mlp_post" in small.store
    assert "mlp_pre" not in small.store
    with pytest.raises(UnknownNameError, match=r"did you mean 'mlp_post'.*what run\.zarr holds"):
        small.store["mlp_pots"]


def test_nothing_is_read_before_it_is_asked_for(small: SimpleNamespace) -> None:
    counters.reset()
    with dask.config.set(scheduler=nothing_runs):
        array = actstore.open(small.path)["mlp_post"]
        lazy = (array.sel(layer=1).isel(neuron=slice(3, 9)) - 1).mean("token")
        assert array.chunks == ((1, 1), (64, 64, 19), (48,))  # whole shards
    assert (counters.reads, counters.bytes) == (0, 0)
    assert lazy.shape == (6,)


def chunk_nbytes(width: int, item: int) -> int:
    return 16 * width * item + 4


def test_a_slice_reads_only_the_chunks_that_it_needs(small: SimpleNamespace) -> None:
    """Shards of 64 × 48 in chunks of 16 × 24: an index of 8 entries, then the chunks met."""
    array = small.store.array("mlp_post")
    assert (array.layout.chunk_rows, array.layout.chunk_width) == (16, 24)
    index, chunk = 16 * 8 + 4, chunk_nbytes(24, 4)
    for key, shards, chunks in [
        ((0, 0, 0), 1, 1),
        ((0, slice(0, 16), slice(0, 24)), 1, 1),
        ((1, slice(15, 17), slice(23, 25)), 1, 4),
        ((slice(0, 2), slice(63, 65), slice(0, 1)), 4, 4),
        ((0, slice(None), slice(30, 31)), 3, 4 + 4 + 2),
        ((0, 146, slice(None)), 1, 2),
        ((slice(None), slice(None), slice(None)), 6, 2 * (8 + 8 + 4)),
    ]:
        counters.reset()
        assert np.array_equal(array[key], small.values["mlp_post"][key])
        assert counters.bytes == shards * index + chunks * chunk, key


def test_one_neuron_reads_little(tmp_path: Path) -> None:
    plan = plan_of(bare_corpus([512] * 4), [StageSpec("mlp_post", (0, 1), 768)], 512)
    values = random_values(plan)
    write_store(tmp_path / "run.zarr", plan, values)
    array = actstore.open(tmp_path / "run.zarr")["mlp_post"]
    whole = sum(p.stat().st_size for p in tmp_path.glob("run.zarr/*/activation/c.*"))
    counters.reset()
    one = actstore.open(tmp_path / "run.zarr").array("mlp_post")[:, :, 100]
    assert np.array_equal(one, values["mlp_post"][:, :, 100])
    assert whole / 50 < counters.bytes < whole / 12
    counters.reset()
    assert np.array_equal(array[:, :, 100], one)
    assert counters.bytes < whole / 12  # dask hands the slice on


@given(st.sampled_from(["mlp_post", "attn_z", "mlp_out"]), st.data())
@settings(max_examples=150, deadline=None)
def test_any_slice_equals_numpys(small: SimpleNamespace, stage: str, data: st.DataObject) -> None:
    array, expected = small.store.array(stage), small.values[stage]
    key = tuple(
        data.draw(st.slices(n) | st.integers(-n, n - 1))
        for n in expected.shape[: data.draw(st.integers(0, 3))]
    )
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(key)))
        key = (
            *key[:at],
            ...,
            *(data.draw(st.slices(n)) for n in expected.shape[3 - (len(key) - at) :]),
        )
    found = array[key]
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected[key])
    assert found.shape == expected[key].shape


BOUND = st.none() | st.integers(0, 10)
PARTS = (  # dask's own slices go wrong where both start and step are negative
    st.lists(st.integers(0, 10), max_size=5).map(np.array)
    | st.builds(slice, BOUND, BOUND, st.sampled_from([None, 1, 2, 3]))
    | st.just(slice(None, None, -1))
    | st.integers(0, 10)
)


@given(st.lists(st.tuples(st.sampled_from(["layer", "token", "neuron"]), PARTS), max_size=3))
@settings(max_examples=60, deadline=None)
def test_any_selection_with_xarray_equals_numpys(
    small: SimpleNamespace, steps: list[tuple[str, Any]]
) -> None:
    """One after another, so that dask may hand several on as one."""
    lazy = small.store["hidden"][:, 60:71, :11]
    whole = lazy.copy(data=small.values["hidden"][:, 60:71, :11])
    for dim, part in steps:
        if dim in whole.dims:
            part = part.astype(int) if isinstance(part, np.ndarray) else part
            if not isinstance(part, slice):
                part = part % max(1, whole.sizes[dim])
                if not whole.sizes[dim]:
                    continue
            lazy, whole = lazy.isel({dim: part}), whole.isel({dim: part})
    assert lazy.compute().equals(whole)


def test_a_list_of_indices(small: SimpleNamespace) -> None:
    array, expected = small.store.array("mlp_post"), small.values["mlp_post"]
    mask = np.arange(147) % 40 == 3
    assert np.array_equal(array[:, [5, 3, -1, 3]], expected[:, [5, 3, -1, 3]])
    assert np.array_equal(array[:, mask, 2:5], expected[:, mask, 2:5])
    assert np.array_equal(array[1, 2:9, [7, 4]], expected[1, 2:9][:, [7, 4]])
    assert array[:, []].shape == (2, 0, 48)
    counters.reset()
    array[0, :16, np.array([25, 40])]
    assert counters.bytes == 16 * 8 + 4 + chunk_nbytes(24, 4)
    with pytest.raises(IndexError, match="one list of indices at a time"):
        array[:, [1], [2]]


def test_indices_outside(small: SimpleNamespace) -> None:
    array = small.store.array("mlp_post")
    for key in [2, -3, (0, 147), (0, 0, 48), (0, 0, 0, 0), (0, [147]), (0, 0, [-49])]:
        with pytest.raises(IndexError):
            array[key]


def test_arrays_can_be_sent_to_other_processes(small: SimpleNamespace) -> None:
    array = small.store.array("mlp_post")
    sent = pickle.dumps(array)
    assert len(sent) < 2000
    again = pickle.loads(sent)
    assert isinstance(again, ShardedArray)
    assert np.array_equal(again[:, 3:70], small.values["mlp_post"][:, 3:70])
    lazy = pickle.loads(pickle.dumps(small.store["mlp_post"]))
    assert np.array_equal(lazy[1], small.values["mlp_post"][1])
    assert np.array_equal(pickle.loads(pickle.dumps(small.store))["mlp_post"][1], lazy[1])


def test_a_missing_shard_is_an_error_and_not_fill_values(copy: Path) -> None:
    (copy / "mlp_post/activation/c.1.1.0").unlink()
    store = actstore.open(copy)
    assert not np.isnan(store["mlp_post"][0].values).any()
    with pytest.raises(CorruptStoreError, match=r"c\.1\.1\.0 is missing .* `actstore verify`"):
        store["mlp_post"][1].values  # noqa: B018


# -- tokens --------------------------------------------------------------------------------


def test_tables(small: SimpleNamespace) -> None:
    store, corpus = small.store, small.corpus
    kept = np.flatnonzero(corpus.keep)
    assert dict(store.tokens.sizes) == {"token": 147}
    assert dict(store.inputs.sizes) == {"input": 180}
    assert dict(store.sequences.sizes) == {"sequence": 24}
    assert set(store.tokens.data_vars) == {
        *("input", "sequence", "position", "token_id", "token_text"),
        *("document", "play", "year", "score", "good", "offset", "condition"),
    }
    assert np.array_equal(store.tokens["input"], kept)
    plays = [PLAYS[i % 4] for i in range(24)]
    assert store.sequences["play"].values.tolist() == plays
    assert store.tokens["play"].values.tolist() == [plays[i] for i in corpus.sequence[kept]]
    assert store.sequences["text"].values.tolist() == corpus.texts
    assert np.array_equal(store.sequences["start"], corpus.starts[:-1])
    assert np.array_equal(store.sequences["length"], np.diff(corpus.starts))
    assert np.array_equal(store.inputs["token_id"], corpus.token_ids)
    assert np.array_equal(store.inputs["kept"], corpus.keep)
    assert np.array_equal(store.inputs["special"], corpus.token_ids == 0)
    conditions = corpus.token_labels["condition"].decode()
    assert store.inputs["condition"].values.tolist() == conditions.tolist()
    assert store.vocabulary.tolist() == VOCABULARY.tolist()
    labels = ["condition", "document", "good", "offset", "play", "score", "year"]
    assert sorted(store.labels) == labels


def test_columns(small: SimpleNamespace) -> None:
    corpus, kept = small.corpus, np.flatnonzero(small.corpus.keep)
    columns = {
        "position": corpus.position[kept],
        "special": corpus.token_ids[kept] == 0,
        "length": corpus.lengths[corpus.sequence[kept]],
        "year": np.array([1599 + i % 5 for i in range(24)])[corpus.sequence[kept]],
        "good": np.array([i % 3 == 0 for i in range(24)])[corpus.sequence[kept]],
    }
    for name, expected in columns.items():
        found = small.store.column(name)
        assert np.array_equal(found, expected), name
        assert (found.dtype == bool) == (expected.dtype == bool)
    words = [VOCABULARY[i] for i in corpus.token_ids[kept]]
    plays = [PLAYS[i % 4] for i in corpus.sequence[kept]]
    texts = [corpus.texts[i] for i in corpus.sequence[kept]]
    for name, strings in {"token_text": words, "play": plays, "text": texts}.items():
        column = small.store.column(name)
        assert isinstance(column, Categorical)
        assert column.decode().tolist() == strings
    with pytest.raises(UnknownNameError, match=r"did you mean 'position'.*token_text"):
        small.store.column("positon")


def test_labels_of_many_values_stay_with_the_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skeleton, "MAX_FLAGS", 8)
    corpus = bare_corpus([3] * 12)
    titles = [f"title {i % 9}" for i in range(12)]
    few = [f"part {i % 8}" for i in range(12)]
    corpus = replace(
        corpus, sequence_labels={"title": label_column(titles), "part": label_column(few)}
    )
    plan = plan_of(corpus, [StageSpec("mlp_post", (0,), 16)], 16)
    write_store(tmp_path / "run.zarr", plan, random_values(plan))
    store = actstore.open(tmp_path / "run.zarr")
    assert store.labels == ["part"]
    assert store.sequences["title"].values.tolist() == titles
    assert store.column("title").decode().tolist() == [titles[i // 3] for i in range(36)]
    assert store.column("part").decode().tolist() == [few[i // 3] for i in range(36)]


def context(corpus: Any, token: int, before: int, after: int) -> list[int]:
    """Inputs round a kept token, by counting."""
    at = int(np.flatnonzero(corpus.keep)[token])
    s = next(s for s in range(corpus.n_sequences) if corpus.starts[s] <= at < corpus.starts[s + 1])
    low, high = int(corpus.starts[s]), int(corpus.starts[s + 1])
    return [
        int(corpus.token_ids[i]) for i in range(max(low, at - before), min(high, at + after + 1))
    ]


@pytest.mark.parametrize("token", [0, 1, 17, 80, 146, -1, -147])
def test_decode_from_the_text(small: SimpleNamespace, token: int) -> None:
    for before, after in [(10, 0), (0, 0), (2, 3), (0, 50)]:
        ids = context(small.corpus, token, before, after)
        expected = "".join(VOCABULARY[i] for i in ids if i != 0)
        assert small.store.decode(token, before, after) == expected
    assert small.store.decode(token) == small.store.decode(token, 10, 0)


def test_decode_with_less(tmp_path: Path) -> None:
    """Without text, from the vocabulary; without that, ids; a sequence without text in between."""
    corpus = small_corpus()
    some = [t if i % 2 else "" for i, t in enumerate(corpus.texts or [])]
    bare = {"texts": None, "char_start": None, "char_end": None}
    for name, changed, vocabulary in [
        ("words", bare, VOCABULARY),
        ("ids", bare, None),
        ("some", {"texts": some}, VOCABULARY),
    ]:
        plan = plan_of(replace(corpus, **changed), STAGES[2:3], 64)
        path = tmp_path / f"{name}.zarr"
        write_store(path, plan, random_values(plan), vocabulary=vocabulary)
        store = actstore.open(path)
        assert (store.vocabulary is None) == (vocabulary is None)
        for token in (0, 40, 41, 100, 146):
            ids = context(corpus, token, 3, 2)
            text = name == "some" and int(store.tokens["sequence"][token]) % 2
            words = [VOCABULARY[i] for i in ids if not (text and i == 0)]
            expected = " ".join(map(str, ids)) if name == "ids" else "".join(words)
            assert store.decode(token, 3, 2) == expected
    for token in (147, -148):
        with pytest.raises(UsageError, match=f"token {token} is not within the store's 147"):
            store.decode(token)


# -- descriptions --------------------------------------------------------------------------


def test_info(small: SimpleNamespace) -> None:
    info = small.store.info()
    assert json.loads(json.dumps(info)) == info
    assert {k: info[k] for k in ("name", "format", "tokens", "sequences", "inputs")} == {
        "name": "run.zarr",
        "format": 1,
        "tokens": 147,
        "sequences": 24,
        "inputs": 180,
    }
    assert info["block_tokens"] == 64
    assert info["id"] == small.store.id == small.store.attrs["id"]
    assert info["model"] == {"name": "tiny <model>"}
    assert list(info["stages"]) == list(WIDTHS)
    item = {"float32": 4, "float16": 2, "bfloat16": 2}
    for spec in STAGES:
        row = info["stages"][spec.name]
        assert row["layers"] == list(spec.layers)
        assert (row["width"], row["dtype"]) == (spec.width, spec.source_dtype)
        assert row["nbytes"] == len(spec.layers) * 147 * spec.width * item[spec.source_dtype]
    assert info["labels"] == small.store.labels


def test_text_for_people(small: SimpleNamespace) -> None:
    text = repr(small.store)
    assert text.startswith("<actstore.Store run.zarr: tiny <model>>\n147 tokens of 24 sequences")
    assert re.search(r"mlp_post +2 layers × +48 neurons +float32 +0\.1 MB", text)
    assert len(text.splitlines()) == 2 + len(STAGES)


def test_html_is_escaped(copy: Path) -> None:
    """Nothing that a store says of itself becomes markup."""
    evil = "<script>alert(1)</script>"

    store = actstore.open(copy.rename(copy.with_name("<i>copy.zarr")))
    store.attrs["model"]["name"] = evil
    store.attrs["capture"]["stages"]["mlp_post"]["dtype"] = evil
    store._nodes["mlp_post/activation"]["attributes"]["description"] = evil
    markup = store._repr_html_()
    assert markup.count(html.escape(evil)) == 3
    assert "<script" not in markup
    assert "<i>" not in markup
    tags = set(re.findall(r"</?(\w+)", markup))
    assert tags <= {"div", "b", "table", "tr", "th", "td"}


def test_tree(small: SimpleNamespace) -> None:
    tree = small.store.tree
    assert {"inputs", "sequences", "vocabulary", *WIDTHS} <= set(tree.children)
    assert np.array_equal(tree["mlp_out/activation"], small.values["mlp_out"])
    assert tree["vocabulary/token_text"].values.tolist() == VOCABULARY.tolist()
    with dask.config.set(scheduler=nothing_runs):
        assert small.store.tree["mlp_post/activation"].sizes["token"] == 147


# -- other tools ---------------------------------------------------------------------------

STOCK = """
import json, sys, warnings
import numpy as np
import xarray as xr

warnings.simplefilter("error")
path = sys.argv[1]
tree = xr.open_datatree(path, engine="zarr")
assert "actstore" not in sys.modules
lazy = xr.open_datatree(path, engine="zarr", chunks={})
group = xr.open_zarr(path, group="mlp_post")
whole = xr.open_zarr(path)
plain = xr.open_dataset(path, group="mlp_post", engine="zarr")
acts = group["activation"]
assert acts.dims == ("layer", "token", "neuron")
coords = {"layer", "neuron", "input", "sequence", "position", "token_id", "play", "condition"}
assert coords <= set(acts.coords), set(acts.coords)
assert coords <= set(tree["mlp_post/activation"].coords)
assert coords <= set(plain["activation"].coords)
flags = acts["play"].attrs
assert len(flags["flag_values"]) == len(flags["flag_meanings"].split()) == 4
play = acts["play"].compute()
lear = acts.where(play == flags["label_values"].index("Lear"), drop=True)
expected = np.load(sys.argv[2])
stages = [name for name in expected.files]
for name in stages:
    for source in (tree, lazy):
        assert np.array_equal(source[name]["activation"].values, expected[name])
means = expected["mlp_post"][1].astype(float).mean(0)
assert np.allclose(acts.sel(layer=1).mean("token"), means, rtol=0, atol=1e-6)
print(json.dumps({
    "actstore": "actstore" in sys.modules,
    "children": sorted(tree.children),
    "attribute": tree.attrs["actstore"]["id"],
    "lear": lear.sizes["token"],
    "words": tree["vocabulary/token_text"].values[tree["inputs/token_id"].values[:9]].tolist(),
    "texts": tree["sequences/text"].values.tolist(),
    "heads": tree["attn_z"]["head"].values.tolist(),
    "layers": tree["hidden"]["layer_name"].values.tolist(),
}))
"""


def test_stock_xarray_opens_it_without_us(small: SimpleNamespace, tmp_path: Path) -> None:
    np.savez(tmp_path / "expected.npz", **small.values)
    result = subprocess.run(
        [sys.executable, "-c", STOCK, small.path, tmp_path / "expected.npz"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["actstore"] is False
    assert {"inputs", "sequences", "vocabulary", *WIDTHS} <= set(said["children"])
    assert said["attribute"] == small.store.id
    kept = small.corpus.sequence[small.corpus.keep]
    assert said["lear"] == sum(i % 4 == 1 for i in kept)
    ids = small.corpus.token_ids[:9]
    assert said["words"] == [("" if i == 0 else " ") + WORDS[i] for i in ids]
    assert said["texts"] == small.corpus.texts
    assert said["heads"] == [n // 8 for n in range(32)]
    assert said["layers"] == ["emb", "h.0", "h.1"]


def test_an_unfinished_store_does_not_open_in_stock_xarray(tmp_path: Path) -> None:
    plan = plan_of(small_corpus(), STAGES, 64)
    with Writer(tmp_path / "run.zarr", plan) as writer:
        put_all(writer, {k: v[:, :64] for k, v in random_values(plan).items()})
    for group in (None, "mlp_post"):
        with pytest.raises((FileNotFoundError, zarr.errors.GroupNotFoundError)):
            xr.open_zarr(tmp_path / "run.zarr", group=group)
    with pytest.raises((FileNotFoundError, zarr.errors.GroupNotFoundError)):
        xr.open_datatree(tmp_path / "run.zarr", engine="zarr")


def test_a_store_says_nothing_of_where_it_was_made(small: SimpleNamespace) -> None:
    places = [str(small.path.parent), os.path.expanduser("~"), os.getcwd(), "/tmp", "/dev/shm"]
    for key, data in tree_bytes(small.path).items():
        if key.endswith(".json"):
            assert not [p for p in places if len(p) > 1 and json.dumps(p)[1:-1] in data.decode()]


def test_other_layouts_open_through_zarr(copy: Path, small: SimpleNamespace) -> None:
    """A stage rechunked by stock zarr, without shards."""
    root = zarr.open_group(copy, mode="r+", use_consolidated=False)
    old = root["mlp_post/activation"]
    attributes = dict(old.attrs)
    del root["mlp_post/activation"]
    new = root.create_array(
        "mlp_post/activation",
        shape=(2, 147, 48),
        chunks=(2, 50, 48),
        dtype="float32",
        dimension_names=("layer", "token", "neuron"),
        attributes=attributes,
    )
    new[:] = small.values["mlp_post"]
    with warnings.catch_warnings():  # of what is not Zarr's, such as the journal
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(copy)
    store = actstore.open(copy)
    assert isinstance(store.array("mlp_post"), zarr.Array)
    assert isinstance(store.array("mlp_out"), ShardedArray)
    assert np.array_equal(store["mlp_post"], small.values["mlp_post"])
    assert store["mlp_post"]["play"].attrs["label_values"] == PLAYS
    result = actstore.moments(store, stages="mlp_post").compute()
    expected = small.values["mlp_post"].astype(float).mean(1)
    assert np.allclose(result["mean"], expected, rtol=0, atol=1e-6)


# -- damage --------------------------------------------------------------------------------


def swap(a: Path, b: Path) -> None:
    a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_bytes)
    b.write_bytes(a_bytes)


def cut(path: Path, nbytes: int) -> None:
    path.write_bytes(path.read_bytes()[:nbytes])


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


SHARD = "mlp_post/activation/c.1.1.0"
RECORD = "journal/p0.b00000001.json"

DAMAGE: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "a flipped byte": (lambda p: flip(p / SHARD, 4000), {SHARD}),
    "a flipped byte in an index": (lambda p: flip(p / SHARD, -30), {SHARD}),
    "a flipped byte of a compressed shard": (
        lambda p: flip(p / "mlp_out/activation/c.0.0.0", 500),
        {"mlp_out/activation/c.0.0.0"},
    ),
    "a truncated shard": (lambda p: cut(p / SHARD, 5000), {SHARD}),
    "an empty shard": (lambda p: cut(p / SHARD, 0), {SHARD}),
    "a shard that grew": (lambda p: (p / SHARD).open("ab").write(b"x"), {SHARD}),
    "a deleted shard": (lambda p: (p / SHARD).unlink(), {SHARD}),
    "two swapped shards": (
        lambda p: swap(p / SHARD, p / "mlp_post/activation/c.0.1.0"),
        {SHARD, "mlp_post/activation/c.0.1.0"},
    ),
    "two swapped blocks": (
        lambda p: swap(p / SHARD, p / "mlp_post/activation/c.1.0.0"),
        {SHARD, "mlp_post/activation/c.1.0.0"},
    ),
    "a damaged record": (lambda p: flip(p / RECORD, 60), {RECORD, journal.MANIFEST}),
    "a deleted record": (lambda p: (p / RECORD).unlink(), {RECORD, journal.MANIFEST}),
    "two swapped records": (
        lambda p: swap(p / RECORD, p / "journal/p0.b00000000.json"),
        {RECORD, "journal/p0.b00000000.json", journal.MANIFEST},
    ),
    "a damaged label": (lambda p: flip(p / "mlp_out/play/c/0", 20), {"mlp_out/play/c/0"}),
    "a deleted label": (lambda p: (p / "sequences/year/c/0").unlink(), {"sequences/year/c/0"}),
    "an array's metadata": (
        lambda p: edit(p / "mlp_out/play/zarr.json", "Lear", "Bear"),
        {"mlp_out/play/zarr.json", "zarr.json"},
    ),
    "a group's metadata": (
        lambda p: edit(p / "mlp_post/zarr.json", "Lear", "Bear"),
        {"mlp_post/zarr.json"},
    ),
    "the root's metadata": (lambda p: edit(p / "zarr.json", "Lear", "Bear"), {"zarr.json"}),
    "the root's facts": (lambda p: edit(p / "zarr.json", "tiny", "huge"), {"zarr.json"}),
    "several at once": (
        lambda p: (flip(p / SHARD, 9), (p / "inputs/kept/c/0").unlink(), flip(p / RECORD, 9)),
        {"inputs/kept/c/0", RECORD, journal.MANIFEST},
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_repaired_by_the_same_dump(
    small: SimpleNamespace, copy: Path, name: str
) -> None:
    damage, keys = DAMAGE[name]
    whole = tree_bytes(copy)
    damage(copy)
    assert tree_bytes(copy) != whole
    found = [problem for _, problem in actstore.verify(copy) if problem is not None]
    assert {p.key for p in found} == keys
    assert all(str(p) == f"{p.key}: {p.what}" for p in found)
    values = random_values(small.plan)
    writer = write_store(copy, small.plan, values, vocabulary=VOCABULARY)
    assert writer.sealed
    assert all("of pass 0" in what for what in writer.repaired)
    again = tree_bytes(copy)
    assert [k for k in whole.keys() | again.keys() if whole.get(k) != again.get(k)] == []


def test_a_sound_store_verifies(small: SimpleNamespace) -> None:
    checked = list(actstore.verify(small.path))
    assert [problem for _, problem in checked if problem is not None] == []
    keys = [key for key, _ in checked]
    assert len(keys) == len(set(keys)) == object_count(small.path)
    on_disk = set(tree_bytes(small.path))
    assert on_disk - set(keys) == {journal.MANIFEST, journal.PLAN}


def test_values_that_are_not_those_that_were_summed_up(copy: Path) -> None:
    """A shard that was replaced together with its record's digest, but not its extremes."""
    record = journal.Record.decode((copy / RECORD).read_bytes())
    shards = [
        replace(s, summary=replace(s.summary, maximum=9.0)) if s.key == SHARD else s
        for s in record.shards
    ]
    (copy / RECORD).write_bytes(replace(record, shards=tuple(shards)).encode())
    found = {p.key: p.what for _, p in actstore.verify(copy) if p is not None}
    assert found.keys() == {SHARD, journal.MANIFEST}
    assert "its values are not those that were summed up" in found[SHARD]


def test_a_repair_that_is_cut_short_goes_on(small: SimpleNamespace, copy: Path) -> None:
    """Blocks 0 and 1 damaged in ways that keep sizes; the first repair redoes only block 0."""
    whole = tree_bytes(copy)
    flip(copy / "mlp_post/activation/c.0.0.0", 100)
    flip(copy / SHARD, 100)
    values = random_values(small.plan)
    with Writer(copy, small.plan, vocabulary=VOCABULARY) as writer:
        assert writer.repaired == ["block 0 of pass 0", "block 1 of pass 0"]
        put_all(writer, {k: v[:, :64] for k, v in values.items()})
    assert not writer.sealed
    with pytest.raises(UnfinishedStoreError, match="2 of 3 blocks"):
        actstore.open(copy)
    assert write_store(copy, small.plan, values, vocabulary=VOCABULARY).sealed
    assert tree_bytes(copy) == whole


def test_a_repair_killed_before_it_begins_forgets_nothing(
    small: SimpleNamespace, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever deletion is the last that happens, the next run finds the damage again."""
    whole = tree_bytes(copy)
    delete = LocalStorage.delete
    values = random_values(small.plan)
    for survive in range(3):
        flip(copy / "mlp_post/activation/c.0.0.0", 100)
        flip(copy / SHARD, 100)
        left = [survive]

        def dying(self: LocalStorage, key: str, left: list[int] = left) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            delete(self, key)

        monkeypatch.setattr(LocalStorage, "delete", dying)
        with pytest.raises(KeyboardInterrupt):
            Writer(copy, small.plan, vocabulary=VOCABULARY).__enter__()
        monkeypatch.undo()
        assert write_store(copy, small.plan, values, vocabulary=VOCABULARY).sealed
        assert tree_bytes(copy) == whole


def test_two_ranks_repair_each_its_share(small: SimpleNamespace, copy: Path) -> None:
    """At the same time: the second begins when the first has taken the root away."""
    whole = tree_bytes(copy)
    flip(copy / "mlp_post/activation/c.0.0.0", 100)
    flip(copy / "mlp_post/activation/c.0.2.0", 100)
    values = random_values(small.plan)
    with (
        Writer(copy, small.plan, vocabulary=VOCABULARY, rank=0, world_size=2) as first,
        Writer(copy, small.plan, vocabulary=VOCABULARY, rank=1, world_size=2) as second,
    ):
        assert first.missing[0].tolist() == [True, False, False]
        assert second.missing[0].tolist() == [False, False, True]
        put_all(second, values)
        put_all(first, values)
    assert first.sealed
    assert tree_bytes(copy) == whole


def test_all_files_were_listed(small: SimpleNamespace) -> None:
    """The damage above names files that are there."""
    for _, keys in DAMAGE.values():
        assert keys <= set(tree_bytes(small.path))
