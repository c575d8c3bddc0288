"""Several stores as one, against one store that holds what they hold together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from helpers import (
    STAGES,
    VOCABULARY,
    plan_of,
    put_all,
    random_tables,
    random_values,
    scratch,
    small_corpus,
    write_store,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore.concatenation import ConcatArray, ConcatStore, open_any
from actstore.corpus import Corpus, label_column
from actstore.errors import UnknownNameError, UsageError
from actstore.queries.registry import QUERIES
from actstore.schema import Categorical
from actstore.storage import counters
from actstore.writer import Writer

CUT = 10
"""Sequences of the first store; the second has the others."""


def part(corpus: Corpus, first: int, last: int) -> Corpus:
    """Some sequences of a corpus."""
    own = slice(corpus.starts[first], corpus.starts[last])
    assert corpus.texts is not None
    assert corpus.char_start is not None
    assert corpus.char_end is not None
    return replace(
        corpus,
        token_ids=corpus.token_ids[own],
        starts=corpus.starts[first : last + 1] - corpus.starts[first],
        special=corpus.special[own],
        keep=corpus.keep[own],
        texts=corpus.texts[first:last],
        char_start=corpus.char_start[own],
        char_end=corpus.char_end[own],
        sequence_labels={k: v[slice(first, last)] for k, v in corpus.sequence_labels.items()},
        token_labels={k: v[own] for k, v in corpus.token_labels.items()},
    )


def write(path: Path, corpus: Corpus, block: int, first: int = 0, **options: Any) -> None:
    """The small store's values from a token on."""
    whole = plan_of(small_corpus(), STAGES, 64, predictions=2, outcomes=True)
    values, tables = random_values(whole), random_tables(whole)
    plan = plan_of(corpus, STAGES, block, predictions=2, outcomes=True, **options)
    own = slice(first, first + plan.n_tokens)
    with Writer(path, plan, vocabulary=VOCABULARY) as writer:
        put_all(writer, {k: v[:, own] for k, v in values.items()})
        writer.put_tables(0, {k: v[own] for k, v in tables.items()})
    assert writer.sealed


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with scratch() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def stores() -> Iterator[tuple[actstore.Store, ConcatStore]]:
    """One store, and two of its sequences in blocks of other sizes, put together."""
    with scratch() as folder:
        yield made_in(Path(folder))


def made_in(folder: Path) -> tuple[actstore.Store, ConcatStore]:
    corpus = small_corpus()
    tokens = int(np.count_nonzero(corpus.keep[: corpus.starts[CUT]]))
    which = label_column(["base"] * CUT + ["chat"] * (corpus.n_sequences - CUT))
    labels = {**corpus.sequence_labels, "store": which}
    write(folder / "whole.zarr", replace(corpus, sequence_labels=labels), 64)
    write(folder / "base.zarr", part(corpus, 0, CUT), 16)
    write(folder / "chat.zarr", part(corpus, CUT, corpus.n_sequences), 32, tokens)
    both = actstore.concat({name: folder / f"{name}.zarr" for name in ("base", "chat")})
    return actstore.open(folder / "whole.zarr"), both


def same(found: Any, expected: Any) -> None:
    """Equal values and labels; attributes that name the store aside."""
    if isinstance(expected, xr.DataTree):
        assert list(found.children) == list(expected.children)
        for name in expected.children:
            same(found[name].to_dataset(), expected[name].to_dataset())
        return
    assert found.attrs["tokens_used"] == expected.attrs["tokens_used"]
    xr.testing.assert_allclose(
        found.drop_attrs(deep=True), expected.drop_attrs(deep=True), rtol=1e-5, atol=1e-6
    )


CHOICES: list[dict[str, Any]] = [
    {"by": "store"},
    {"tokens": "position > 1 and (play != '' or store == 'chat')"},
]


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("name", QUERIES)
def test_every_query(
    name: str, choice: dict[str, Any], stores: tuple[actstore.Store, ConcatStore]
) -> None:
    own: dict[str, Any] = {"stages": "mlp_post"}
    more = {"label_information": {"label": "condition"}}
    more |= {"rsa": {"pairs": "layers"}, "cka": {"pairs": "layers"}}
    own |= more.get(name, {})
    one, both = (QUERIES[name].function(s, **own, **choice) for s in stores)
    same(actstore.compute(both), actstore.compute(one))
    # Each store's sketches are its own, so those of one store answer what cuts through a stratum.
    assert both.attrs["source"] == "sketch" or one.attrs["source"] == "scan"


def test_sketches_answer_without_reading(stores: tuple[actstore.Store, ConcatStore]) -> None:
    one, both = stores
    for choice in ({}, {"by": "store"}, {"tokens": "store == 'chat' and position > 0"}):
        counters.reset()
        asked = actstore.moments(both, **choice)
        found = actstore.compute(asked, actstore.top_tokens(both, stages="hidden", k=3, **choice))
        assert counters.reads == 0
        assert found[0]["mlp_post"].attrs["source"] == "sketch"
        same(found[0], actstore.compute(actstore.moments(one, **choice)))
        same(found[1], actstore.compute(actstore.top_tokens(one, stages="hidden", k=3, **choice)))


@pytest.mark.slow
def test_processes_open_the_parts(stores: tuple[actstore.Store, ConcatStore]) -> None:
    one, both = stores
    cut = np.arange(one.n_tokens) != 5
    asked = [
        [
            actstore.moments(s, stages="hidden", tokens=cut),
            actstore.cosine_pairs(s, stages="hidden", layers=1, quantiles=[0.5, 0.9], n=0),
        ]
        for s in (one, both)
    ]
    counters.reset()
    found = actstore.compute(*asked[1], scheduler="processes")
    assert counters.reads == 0
    expected = actstore.compute(*asked[0])
    for a, b in zip(found, expected, strict=True):
        same(a, b)
    assert found[1]["context_a"].values.tolist() == expected[1]["context_a"].values.tolist()
    assert any(text for text in found[1]["context_a"].values.ravel())


def test_what_it_holds(stores: tuple[actstore.Store, ConcatStore]) -> None:
    one, both = stores
    assert isinstance(both, actstore.Store)
    assert both.n_tokens == one.n_tokens
    assert both.stages == one.stages
    assert both.labels == ["store", *(n for n in one.labels if n != "store")]
    for stage in one.stages:
        xr.testing.assert_equal(
            both[stage].drop_vars([*one.labels]), one[stage].drop_vars([*one.labels])
        )
    for name in one.columns:
        a, b = both.column(name), one.column(name)
        assert isinstance(a, Categorical) == isinstance(b, Categorical)
        plain = [c.decode() if isinstance(c, Categorical) else c for c in (a, b)]
        np.testing.assert_array_equal(*plain)
    for table in ("tokens", "inputs", "sequences", "predictions", "outcomes"):
        found, expected = getattr(both, table).compute(), getattr(one, table).compute()
        for name in expected.data_vars:
            np.testing.assert_array_equal(found[name].values, expected[name].values, table)
    for token in (0, 5, -1, one.n_tokens - 1, both.parts["base"].n_tokens):
        assert both.decode(token, before=3, after=2) == one.decode(token, before=3, after=2)
    facts, expected_facts = both.info(), one.info()
    for key in ("tokens", "sequences", "inputs", "stages", "predictions", "outcomes"):
        assert facts[key] == expected_facts[key]
    assert facts["stores"] == {n: p.id for n, p in both.parts.items()}
    assert "base + chat" in repr(both)
    assert "base + chat" in both._repr_html_()
    assert set(both.tree.children) >= {*one.stages, "inputs", "sequences", "outcomes"}
    again = open_any(both.path)
    assert (again.id, again.name, again.n_tokens) == (both.id, both.name, both.n_tokens)


def test_reading_stays_lazy_and_graphs_small(stores: tuple[actstore.Store, ConcatStore]) -> None:
    _, both = stores
    counters.reset()
    acts = both["mlp_post"]
    assert counters.reads == 0
    blocks = [part["mlp_post"].chunks[1] for part in both.parts.values()]
    assert acts.chunks[1] == sum(blocks, ())
    assert len(acts.__dask_graph__()) < 3 * acts.data.npartitions


def test_batches_for_training(stores: tuple[actstore.Store, ConcatStore]) -> None:
    one, both = stores
    batches = [list(s.loader("mlp_post", 1, 16, shuffle=False)) for s in (one, both)]
    assert len(batches[0]) == len(batches[1]) > 5
    for a, b in zip(*batches, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_many_stores_make_a_modest_graph(tmp_path: Path) -> None:
    """Tasks do not grow with stores: a lane of a layer goes on from one to the next."""
    corpus = actstore.build_corpus([[1, 2, 3] * 20])
    plan = plan_of(corpus, [actstore.StageSpec("mlp_post", (0, 1), 16)], 16)
    write_store(tmp_path / "a.zarr", plan, random_values(plan))
    few, many = (actstore.concat({str(i): tmp_path / "a.zarr" for i in range(n)}) for n in (2, 50))
    sizes = [
        len(actstore.zeroness(s, tokens="position != 7").__dask_graph__()) for s in (few, many)
    ]
    assert sizes[1] <= sizes[0] * 1.5


class Plain:
    """A part that is not a store's."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def __getitem__(self, key: Any) -> np.ndarray:
        return self.values[key]


def indices(size: int) -> st.SearchStrategy[Any]:
    ends = st.none() | st.integers(-size - 2, size + 2)
    steps = st.sampled_from([None, 1, 2, 3, -1, -2])
    return st.integers(-size, size - 1) | st.builds(slice, ends, ends, steps)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_slices_as_numpy_has_them(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    n, rng = sum(lengths), np.random.default_rng(0)
    whole = rng.normal(size=(3, n, 4)).astype(np.float32)
    cuts = np.cumsum([0, *lengths])
    parts = [Plain(whole[:, a:b]) for a, b in pairwise(cuts)]
    array = ConcatArray(parts, [[0, 1, 2]] * len(parts))
    key: tuple[Any, ...] = tuple(data.draw(indices(size)) for size in (3, n, 4))
    np.testing.assert_array_equal(array[key], whole[key])
    np.testing.assert_array_equal(array[..., key[2]], whole[..., key[2]])
    wanted = data.draw(st.lists(st.integers(-n, n - 1), max_size=6))
    rows = np.array(wanted, int)
    np.testing.assert_array_equal(array[key[0], rows], whole[key[0]][..., rows, :])
    mask = rng.random(n) < 0.5
    np.testing.assert_array_equal(array[0, mask], whole[0, mask])


def test_stages_layers_and_types_that_differ(tmp_path: Path) -> None:
    """What all have; a type that holds all; no sketches of types that are counted differently."""
    corpus = actstore.build_corpus([[1, 2, 3, 4], [5, 6]])
    spec = actstore.StageSpec
    stages = {
        "a": [spec("mlp_post", (0, 2, 3), 16), spec("hidden", (0,), 16)],
        "b": [spec("mlp_post", (2, 1, 0)[::-1], 16, "float16"), spec("mlp_in", (0,), 16)],
    }
    values: dict[str, Any] = {}
    for name, own in stages.items():
        plan = plan_of(corpus, own, 16)
        values[name] = random_values(plan, seed=len(values))
        write_store(tmp_path / f"{name}.zarr", plan, values[name])
    both = actstore.concat({name: tmp_path / f"{name}.zarr" for name in stages}, label="run")
    assert both.stages == ["mlp_post"]
    acts = both["mlp_post"]
    assert acts["layer"].values.tolist() == [0, 2]
    assert acts.dtype == np.float32
    a, b = values["a"]["mlp_post"][[0, 1]], values["b"]["mlp_post"][[0, 2]]
    expected = np.concatenate([a, b.astype(np.float16).astype(np.float32)], axis=1)
    np.testing.assert_array_equal(acts.values, expected)
    found = actstore.compute(actstore.moments(both, by="run"))
    assert found.attrs["source"] == "scan"
    for i, own in enumerate(np.split(expected.astype(np.float64), 2, axis=1)):
        np.testing.assert_allclose(found["mean"].values[:, i], own.mean(1), rtol=1e-5, atol=1e-7)


def stores_at(folder: Path, **stages: Sequence[actstore.StageSpec]) -> dict[str, Path]:
    for name, own in stages.items():
        plan = plan_of(actstore.build_corpus([[1, 2, 3]]), own, 16)
        write_store(folder / name, plan, random_values(plan))
    return {name: folder / name for name in stages}


def test_what_cannot_be_one(tmp_path: Path, stores: tuple[actstore.Store, ConcatStore]) -> None:
    spec = actstore.StageSpec
    wide = stores_at(tmp_path, a=[spec("hidden", (0,), 16)], b=[spec("hidden", (0,), 32)])
    with pytest.raises(UsageError, match="hidden has 16 and 32 neurons"):
        actstore.concat(wide)
    apart = stores_at(tmp_path, c=[spec("hidden", (0,), 16)], d=[spec("hidden", (1,), 16)])
    with pytest.raises(UsageError, match="no stage with a layer that all stores have"):
        actstore.concat(apart)
    one, both = stores
    with pytest.raises(UsageError, match="has a column 'store' already"):
        actstore.concat({"x": one})
    with pytest.raises(UsageError, match="give a mapping"):
        actstore.concat(["a", "b"])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="there are no stores"):
        actstore.concat({})
    with pytest.raises(UnknownNameError, match="All stores must have it"):
        both.column("colour")
    with pytest.raises(UsageError, match="not within"):
        both.decode(both.n_tokens)


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    corpus = actstore.build_corpus([[1, 2, 0]])
    plan = plan_of(corpus, [actstore.StageSpec("hidden", (0,), 16)], 16)
    words = {"a": ["x", "y", "z"], "b": ["x", "y", "z", "<chat>"], "c": ["x", "Y", "z"]}
    for name, own in words.items():
        vocabulary = np.array(own, object)
        write_store(tmp_path / name, plan, random_values(plan), vocabulary=vocabulary)
    longer = actstore.concat({n: tmp_path / n for n in "ab"})
    assert longer.vocabulary is not None
    assert longer.vocabulary.tolist() == words["b"]
    with pytest.raises(UsageError, match="token 1 is 'Y' in c and 'y' in another"):
        actstore.concat({n: tmp_path / n for n in "abc"})
    with pytest.raises(UsageError, match="data_b has other tokens than data: the text of token 1"):
        actstore.rsa(tmp_path / "a", data_b=tmp_path / "c")
    assert actstore.rsa(tmp_path / "a", data_b=tmp_path / "b").attrs["store_b"] == "b"


def test_comparing_needs_the_same_tokens(tmp_path: Path) -> None:
    stage = [actstore.StageSpec("hidden", (0,), 16)]
    inputs = {"a": [[1, 2, 3]], "fewer": [[1, 2]], "ids": [[1, 2, 4]], "cut": [[1, 2], [3]]}
    for name, ids in inputs.items():
        plan = plan_of(actstore.build_corpus(ids), stage, 16)
        write_store(tmp_path / name, plan, random_values(plan))
    asked = (actstore.rsa, actstore.cka, actstore.cosine_matrix)
    for query in asked:
        query(tmp_path / "a", data_b=tmp_path / "a")
        for other, what in (
            ("fewer", "data_b has 2 tokens and data 3"),
            ("ids", "token_id differs from token 2 on"),
            ("cut", "sequence differs from token 2 on"),
        ):
            with pytest.raises(UsageError, match=what):
                query(tmp_path / "a", data_b=tmp_path / other)
