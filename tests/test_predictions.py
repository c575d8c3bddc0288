"""Predictions and outcomes against transformers' own logits; interrupted, damaged, refused."""

from __future__ import annotations

import json
import signal
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import xarray as xr
from families import FAMILIES, config_of
from helpers import (
    STAGES,
    assert_same_tree,
    bare_corpus,
    flip,
    plan_of,
    prose,
    put_all,
    random_tables,
    random_values,
    small_corpus,
    tree_digests,
    write_store,
)
from test_faults import Warm
from torch import Tensor, nn

import actstore
from actstore import head as head_module
from actstore.errors import (
    ModelError,
    NonFiniteError,
    PlanError,
    UnknownNameError,
    UsageError,
)
from actstore.fill import fill, model_corpus, plan_model
from actstore.head import Head
from actstore.journal import Record
from actstore.plan import MAX_PREDICTIONS
from actstore.schema import TABLES
from actstore.storage import LocalStorage
from actstore.writer import Writer

LENGTHS = [7, 3, 1, 10, 43, 22, 21, 20, 5, 5, 38, 2, 17, 16, 9, 30, 29, 28, 6, 41]
SEQUENCES = [
    np.random.default_rng(n).integers(0, 64, length).tolist() for n, length in enumerate(LENGTHS)
]
# The first layer's stage, behind which a dump without predictions would leave the model.
RAGGED: dict[str, Any] = {
    "stages": ["mlp_post"],
    "layers": "0",
    "batch_tokens": 96,
    "buffer": "16KiB",
    "sketch": False,
}
ASKED: dict[str, Any] = {"predictions": 5, "outcomes": True, **RAGGED}

CASES = {
    "gpt2": {},
    "gpt_neox": {},
    "gptj": {},  # a biased head
    "opt": {},  # its head calls its base's decoder
    "opt-350m": {},
    "bloom": {},
    "falcon-7b": {},
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3": {},
    "phi": {},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.3},
}


@cache
def headed(name: str) -> nn.Module:
    """A causal model with its head, whose every parameter is random."""
    config = config_of(name if name in FAMILIES else "llama")
    if name not in FAMILIES:
        settings = {
            k: v for k, v in config.to_dict().items() if k not in ("model_type", "rope_parameters")
        }
        config = transformers.AutoConfig.for_model(name, **settings)
    for key, value in CASES.get(name, {}).items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.3 if parameter.ndim < 2 else 0.2))
    return model


def logits_alone(model: nn.Module, rows: list[list[int]]) -> list[Tensor]:
    """transformers' own logits (token, vocab) of each sequence by itself."""
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([row])).logits[0].double() for row in rows]


def assert_tables(
    store: actstore.Store, logits: list[Tensor], rows: list[list[int]], close: float
) -> None:
    """What is stored of every kept token is what follows from a sequence's logits."""
    assert store.predictions is not None and store.outcomes is not None
    columns = (store.tokens[k].values.tolist() for k in ("sequence", "position"))
    places = list(zip(*columns, strict=True))
    own = torch.stack([logits[s][t] for s, t in places])
    ids = store.predictions["token_id"].values
    listed = torch.from_numpy(ids).long()
    loss, entropy, rank = (store.outcomes[k].values for k in ("loss", "entropy", "rank"))
    log_p = own.log_softmax(-1)
    best = own.sort(descending=True).values[:, : ids.shape[1]]
    assert np.allclose(own.gather(1, listed), best, rtol=0, atol=close)
    assert (np.diff(np.sort(ids, 1)) > 0).all()
    probability = store.predictions["probability"].values
    assert np.allclose(probability, log_p.gather(1, listed).exp(), rtol=0, atol=close)
    assert np.allclose(entropy, -(log_p.exp() * log_p).sum(-1), rtol=0, atol=10 * close)
    following = np.array([rows[s][t + 1] if t + 1 < len(rows[s]) else -1 for s, t in places])
    last = following < 0
    assert np.isnan(loss[last]).all() and (rank[last] == -1).all()
    true = torch.from_numpy(following.clip(0))[:, None]
    expected = -log_p.gather(1, true)[:, 0].numpy()
    assert np.allclose(loss[~last], expected[~last], rtol=0, atol=10 * close)
    mine = own.gather(1, true)
    fewest, most = ((own > mine + by).sum(-1).numpy() for by in (close, -close))
    assert ((fewest <= rank) & (rank <= most))[~last].all()
    # The list and the rank agree on which of two equal tokens comes first.
    at = np.where(ids == following[:, None], np.arange(ids.shape[1]), ids.shape[1]).min(1)
    assert (at == rank.clip(max=ids.shape[1]))[~last].all()


# -- the values -------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_models_own_logits(
    name: str, padding_side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actstore.plan.PADDING", 3.0)  # more of it than anybody would want
    first = f"first={FAMILIES[name if name in FAMILIES else 'llama'].blocks}.0:input"
    options = {**ASKED, "padding_side": padding_side, "stages": [first]}
    store = actstore.dump(headed(name), None, SEQUENCES, tmp_path / "run.zarr", **options)
    assert store is not None
    assert_tables(store, logits_alone(headed(name), SEQUENCES), SEQUENCES, 1e-4)


def test_half_precision(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(config_of("llama")).eval().to(torch.bfloat16)
    store = actstore.dump(model, None, SEQUENCES, tmp_path / "run.zarr", **ASKED)
    assert store is not None and store.attrs["model"]["dtype"] == "bfloat16"
    assert_tables(store, logits_alone(model, SEQUENCES), SEQUENCES, 0.05)


def test_equal_logits_are_in_order_of_their_ids() -> None:
    rng = np.random.default_rng(3)
    logits = rng.integers(0, 9, (200, 50)).astype(np.float32)
    logits[:20, 7:] = -np.inf
    order = np.argsort(-logits, axis=1, kind="stable")
    for ranks in (1, 4, 13, 50):
        found = head_module._likeliest(torch.from_numpy(logits), ranks).numpy()
        assert (found == order[:, :ranks]).all()
    true = torch.from_numpy(rng.integers(0, 50, (200, 1)))
    x = torch.from_numpy(logits)
    loss, entropy, rank = (
        c.numpy()[:, 0] for c in head_module._outcomes(x, x.log_softmax(1), true)
    )
    assert (order[np.arange(200), rank] == true.numpy()[:, 0]).all()
    assert np.isfinite(entropy).all()
    assert (np.isinf(loss) == np.isinf(logits[np.arange(200), true.numpy()[:, 0]])).all()


def test_logits_are_of_kept_tokens_only_and_of_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = headed("llama")
    corpus = model_corpus(model, None, SEQUENCES, keep="position != 3 and position < 20")
    plan, points = plan_model(model, None, corpus, **ASKED)
    sizes: dict[str, list[int]] = {}
    monkeypatch.setattr(head_module, "_LOGITS_ROWS", {"cpu": 24})
    for name, passes in (("one", 1), ("piece", 1), ("passes", 2)):
        if name == "piece":
            monkeypatch.setattr(head_module, "_LOGITS_ROWS", {"cpu": 10_000})
        if name == "passes":
            options = {**ASKED, "layers": "0,2", "passes": passes}
            plan, points = plan_model(model, None, corpus, **options)
        own = sizes.setdefault(name, [])
        seen = model.lm_head.register_forward_hook(
            lambda m, args, out, own=own: own.append(out.shape[:-1].numel())
        )
        with Writer(tmp_path / name, plan) as writer:
            fill(model, points, writer)
        seen.remove()
        assert sum(own) == plan.n_tokens < len(corpus.token_ids)  # once, in one pass
        store = actstore.open(tmp_path / name)
        assert_tables(store, logits_alone(model, SEQUENCES), SEQUENCES, 1e-4)
    assert max(sizes["one"]) == 24 < max(sizes["piece"])


def test_windows_and_a_token_that_is_not_kept(tmp_path: Path) -> None:
    model, tokenizer = actstore.load_model("demo", device="cpu", head=True)
    text = prose(4_000)
    store = actstore.dump(
        model,
        tokenizer,
        [text],
        tmp_path / "marks.zarr",
        windows=["internal=,"],
        before=6,
        after=3,
        keep="offset == 0",
        **{**ASKED, "buffer": "1GiB"},
    )
    assert store is not None and store.n_tokens >= 10
    assert set(store.tokens["offset"].values.tolist()) == {0}
    ids, starts = store.inputs["token_id"].values, store.sequences["start"].values
    rows = [part.tolist() for part in np.split(ids, starts[1:])]
    assert len(rows[0]) == 10 > 1
    assert_tables(store, logits_alone(model, rows), rows, 1e-4)
    assert (store.outcomes["rank"] >= 0).all()  # what follows is an input that is not kept
    assert np.isfinite(store.outcomes["loss"]).all()


@pytest.mark.parametrize("asked", [{"predictions": 64}, {"outcomes": True}])
def test_one_without_the_other(asked: dict[str, Any], tmp_path: Path) -> None:
    model, both = headed("gpt2"), {"predictions": 64, "outcomes": True}
    a = actstore.dump(model, None, SEQUENCES, tmp_path / "a.zarr", **RAGGED, **both)
    b = actstore.dump(model, None, SEQUENCES, tmp_path / "b.zarr", **RAGGED, **asked)
    assert a is not None and b is not None and a.id != b.id
    assert (b.predictions is None) == ("predictions" not in asked)
    assert (b.outcomes is None) == ("outcomes" not in asked)
    for group in ("predictions", "outcomes"):
        if getattr(b, group) is not None:
            xr.testing.assert_identical(getattr(a, group).compute(), getattr(b, group).compute())
    if b.predictions is not None:
        total = b.predictions["probability"].sum("rank").values
        assert np.allclose(total, 1, atol=1e-5)  # all 64 tokens


def test_activations_are_the_same_with_and_without(tmp_path: Path) -> None:
    model = headed("opt")
    bare = {**RAGGED, "stages": ["hidden", "mlp_post"], "layers": None, "buffer": "64KiB"}
    plain = actstore.dump(model, None, SEQUENCES, tmp_path / "a.zarr", **bare)
    with_them = actstore.dump(
        model, None, SEQUENCES, tmp_path / "b.zarr", **bare, predictions=2, outcomes=True
    )
    a, b = tree_digests(tmp_path / "a.zarr"), tree_digests(tmp_path / "b.zarr")
    assert {k for k in a if a[k] != b.get(k)} == {
        *("zarr.json", "journal/plan.json", "journal/manifest.json"),
        *(k for k in a if k.startswith("journal/p0.")),
    }
    assert {k.partition("/")[0] for k in b.keys() - a.keys()} == {"predictions", "outcomes"}
    # A store that has none looks as if nobody had ever thought of them.
    assert plain is not None and with_them is not None
    assert not {"predictions", "outcomes"} & plain.attrs["capture"].keys()
    assert "head" not in plain.attrs and with_them.attrs["head"]["class"] == "OPTForCausalLM"
    record = json.loads((tmp_path / "a.zarr/journal/p0.b00000000.json").read_text())
    assert set(record) == {"block", "pass", "shards", "crc32c"}


def test_training_mode_makes_no_difference(tmp_path: Path) -> None:
    model = transformers.GPT2LMHeadModel(config_of("gpt2")).eval()
    calm = actstore.dump(model, None, SEQUENCES, tmp_path / "calm.zarr", **ASKED)
    model.train()
    model.lm_head.eval()
    modes = [m.training for m in model.modules()]
    wild = actstore.dump(model, None, SEQUENCES, tmp_path / "wild.zarr", **ASKED)
    assert [m.training for m in model.modules()] == modes
    assert type(model.transformer).__name__ == "GPT2Model"  # it is put back
    assert calm is not None and wild is not None and wild.id == calm.id


# -- asking -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> actstore.Store:
    path = tmp_path_factory.mktemp("predictions") / "run.zarr"
    options = {**ASKED, "sketch": True, "keep": "position != 3"}
    made = actstore.dump(headed("gpt2"), None, SEQUENCES, path, **options)
    assert made is not None
    return made


def test_datasets(store: actstore.Store) -> None:
    predictions, outcomes = store.predictions, store.outcomes
    assert predictions is not None and outcomes is not None
    assert dict(predictions.sizes) == {"token": store.n_tokens, "rank": 5}
    assert list(predictions) == ["token_id", "probability"]
    assert dict(outcomes.sizes) == {"token": store.n_tokens}
    assert list(outcomes) == ["loss", "entropy", "rank"]
    for key, table in TABLES.items():
        group, _, name = key.partition("/")
        array = getattr(store, group)[name]
        assert array.dims == table.dims and array.dtype == table.dtype
        assert array.attrs == {"long_name": table.meaning, "units": table.units}
    assert (np.diff(predictions["probability"].values) <= 0).all()


def test_outcomes_are_columns(store: actstore.Store) -> None:
    loss, rank = (store.outcomes[k].values for k in ("loss", "rank"))
    assert np.array_equal(store.column("loss"), loss, equal_nan=True)
    assert (store.tokens["rank"] == rank).all()
    acts = store["mlp_post"]
    assert np.array_equal(acts["loss"], loss, equal_nan=True)
    middle = float(np.nanmedian(loss))
    for text, mask in (
        (f"loss > {middle}", loss > middle),
        ("rank == 0 or entropy < 2", (rank == 0) | (store.outcomes["entropy"].values < 2)),
        (f"not loss > {middle} and position > 0", ~(loss > middle) & (acts["position"] > 0).values),
    ):
        assert 0 < mask.sum() < store.n_tokens
        for data in (store, acts):
            asked = actstore.moments(data, tokens=text).compute()
            assert asked.attrs["tokens_used"] == mask.sum()
            xr.testing.assert_equal(asked, actstore.moments(data, tokens=mask).compute())
    mean = actstore.moments(store, tokens=f"loss > {middle}")["mean"].values
    assert np.allclose(mean, acts.values[:, loss > middle].mean(1), atol=1e-5)
    assert "loss" not in store.labels


def test_without_them(tmp_path: Path) -> None:
    plan = plan_of(small_corpus(), STAGES, 64)
    write_store(tmp_path / "run.zarr", plan, random_values(plan))
    bare = actstore.open(tmp_path / "run.zarr")
    assert bare.predictions is None and bare.outcomes is None
    assert (bare.info()["predictions"], bare.info()["outcomes"]) == (0, [])
    with pytest.raises(UnknownNameError, match="unknown column 'loss'"):
        actstore.moments(bare, tokens="loss > 5")
    with pytest.raises(UsageError, match="plan asks for none"), Writer(tmp_path / "b", plan) as w:
        w.put_tables(0, {"outcomes/loss": np.zeros(3, np.float32)})


def test_info_and_stock_xarray(store: actstore.Store) -> None:
    facts = store.info()
    assert (facts["predictions"], facts["outcomes"]) == (5, ["loss", "entropy", "rank"])
    assert "predictions: the 5 likeliest next tokens" in repr(store)
    assert "outcomes: loss, entropy, rank" in store._repr_html_()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Object at journal")
        tree = xr.open_datatree(store.path, engine="zarr")
        warnings.simplefilter("error")
        alone = xr.open_zarr(store.path, group="outcomes")
    xr.testing.assert_identical(tree["outcomes"].to_dataset()[list(store.outcomes)], store.outcomes)
    assert np.array_equal(alone["loss"], store.outcomes["loss"], equal_nan=True)


# -- the same bytes by every way ----------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("reference") / "run.zarr"
    actstore.dump(headed("gpt2"), None, SEQUENCES, path, **ASKED)
    return tree_digests(path)


def stopped_after(path: Path, tokens: int) -> None:
    """A dump that was interrupted."""

    def stop(now: Any) -> None:
        if now.tokens >= tokens:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        actstore.dump(headed("gpt2"), None, SEQUENCES, path, progress=stop, **ASKED)
    assert not (path / "zarr.json").exists()


def finished(path: Path) -> Path:
    assert actstore.dump(headed("gpt2"), None, SEQUENCES, path, **ASKED) is not None
    return path


def test_staging_buffers(tmp_path: Path, reference: dict[str, str]) -> None:
    model = headed("gpt2")
    plan, points = plan_model(model, None, model_corpus(model, None, SEQUENCES), **ASKED)
    assert plan.n_blocks >= 4
    with Writer(tmp_path / "run.zarr", plan) as writer:
        fill(model, points, writer, staged=True)
    assert writer.sealed
    assert_same_tree(tmp_path / "run.zarr", reference)


def test_ranks(tmp_path: Path, reference: dict[str, str]) -> None:
    for rank in (1, 0):
        path, world = tmp_path / "run.zarr", {"rank": rank, "world_size": 2}
        made = actstore.dump(headed("gpt2"), None, SEQUENCES, path, **world, **ASKED)
        assert (made is None) == (rank == 1)
    assert_same_tree(path, reference)


def test_interrupted(tmp_path: Path, reference: dict[str, str]) -> None:
    path = tmp_path / "run.zarr"
    for tokens in (60, 200):
        stopped_after(path, tokens)
    assert list(path.glob("journal/*.tables"))
    assert_same_tree(finished(path), reference)


def test_a_damaged_part_is_made_again(tmp_path: Path, reference: dict[str, str]) -> None:
    path = tmp_path / "run.zarr"
    stopped_after(path, 250)
    parts = sorted(path.glob("journal/*.tables"))
    assert len(parts) >= 4
    flip(parts[0], 40)
    parts[1].write_bytes(parts[1].read_bytes()[:-4])
    parts[2].unlink()
    # The record says what is asked of it, too.
    record = path / "journal/p0.b00000003.json"
    read = Record.read(LocalStorage(path), 0, 3)
    assert read is not None and len(read.tables) == 5
    record.write_bytes(replace(read, tables={}).encode())
    assert_same_tree(finished(path), reference)


@pytest.mark.parametrize("table", TABLES)
def test_damage_is_found_and_repaired(
    table: str, tmp_path: Path, reference: dict[str, str]
) -> None:
    path = finished(tmp_path / "run.zarr")
    target = path / table / ("c/0/0" if TABLES[table].ranked else "c/0")
    flip(target, target.stat().st_size // 2)
    problems = [p for _, p in actstore.verify(path) if p is not None]
    assert [p.key for p in problems] == [str(target.relative_to(path))]
    assert_same_tree(finished(path), reference)
    target.unlink()
    assert [str(p) for _, p in actstore.verify(path) if p] == [f"{problems[0].key}: missing"]
    assert_same_tree(finished(path), reference)
    (path / table / "zarr.json").write_text("{}")
    assert_same_tree(finished(path), reference)
    assert not [p for _, p in actstore.verify(path) if p is not None]


def test_only_damaged_blocks_are_redone(tmp_path: Path) -> None:
    """Rows of blocks that the damage spares are taken from the arrays, of several chunks."""
    plan = plan_of(bare_corpus([700]), STAGES[2:3], 16, predictions=3, outcomes=True)
    values, tables = random_values(plan), random_tables(plan)
    path = tmp_path / "run.zarr"

    def write(first: int = 0) -> Writer:
        with Writer(path, plan) as writer:
            put_all(writer, values)
            writer.put_tables(first, {k: v[first:] for k, v in tables.items()})
        return writer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actstore.skeleton.LABEL_CHUNK", 2**7 * 3)
        assert write().sealed
        whole = tree_digests(path)
        chunks = sorted((path / "predictions/token_id/c").glob("*/0"))
        assert len(chunks) == 6
        chunks[2].unlink()  # 128 tokens, 8 blocks
        with Writer(path, plan) as writer:
            assert writer.repaired == [f"block {b} of pass 0" for b in range(16, 24)]
            put_all(writer, values)
        assert not writer.sealed  # their rows have not come
        assert write(256).sealed
        assert_same_tree(path, whole)
        # Another rank's blocks cannot be redone by this one, which leaves them to it.
        chunks[1].unlink()
        with Writer(path, plan, rank=1, world_size=2) as writer:
            assert not writer.repaired
        assert not writer.sealed
        with Writer(path, plan, rank=0, world_size=2) as writer:
            assert len(writer.repaired) == 8
            put_all(writer, values)
            writer.put_tables(0, tables)
        with Writer(path, plan, rank=1, world_size=2) as writer:
            assert not writer.repaired
        assert writer.sealed
    assert_same_tree(path, whole)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    process = Warm(tmp_path_factory.mktemp("warm"))
    yield process
    process.close()


def test_killed_anywhere(warm: Warm, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text(prose(5_000))
    job = [*("--stages", "mlp_post", "--layers", "1", "--max-tokens", "1000", "--no-sketch")]
    job += [*("--buffer", "1MiB", "--predictions", "3", "--outcomes", "--device", "cpu")]
    run = warm.start("dump", "demo", text, tmp_path / "whole.zarr", *job)
    assert run.wait() == 0, run.stderr
    whole, operations = tree_digests(tmp_path / "whole.zarr"), run.operations
    blocks = len([k for k in whole if k.startswith("journal/p0.")])
    assert blocks >= 2 and len(whole) > 10
    first, last = operations.index("S"), operations.rindex("R")
    rng = np.random.default_rng(5)
    moments = [
        *rng.integers(2 * first, 2 * last, 3).tolist(),
        *rng.integers(2 * last, 2 * len(operations), 4).tolist(),
    ]
    for moment in moments:
        path = tmp_path / f"{moment}.zarr"
        assert warm.start("dump", "demo", text, path, *job, die_at=moment).wait() == -signal.SIGKILL
        run = warm.start("dump", "demo", text, path, *job)
        assert run.wait() == 0, run.stderr
        assert_same_tree(path, whole)


# -- the command line -----------------------------------------------------------------------------


def test_commands(warm: Warm, tmp_path: Path) -> None:
    text, path = tmp_path / "book.txt", tmp_path / "book.zarr"
    text.write_text(prose(1_000))
    job = ["demo", text, path, "--stages", "mlp_out", "--layers", "0", "--device", "cpu"]
    asked = ["--predictions", "4", "--outcomes"]

    def answer(*argv: object, status: int = 0) -> Any:
        run = warm.start(*argv)
        assert run.wait() == status, run.stderr
        return run

    plan = json.loads(answer("plan", *job, *asked, "--json").stdout)
    assert (plan["predictions"], plan["outcomes"]) == (4, True)
    assert plan["nbytes"] == plan["stages"]["mlp_out"]["nbytes"] + plan["tokens"] * 4 * 11
    assert plan["seconds"] > 0
    assert "predictions, outcomes" in answer("plan", *job, *asked, "--no-weights").stdout
    answer("dump", *job, *asked)
    facts = json.loads(answer("info", path, "--json").stdout)
    assert (facts["predictions"], facts["outcomes"]) == (4, ["loss", "entropy", "rank"])
    assert "predictions: the 4 likeliest next tokens" in answer("info", path).stderr
    answer("verify", path)
    found = actstore.open(path)
    used = int((found.column("loss") > 3).sum())
    query = ("query", "moments", path, "--tokens", "loss > 3", "--json")
    assert f'"tokens_used": {used}' in answer(*query).stdout
    other = answer("dump", *job, "--predictions", "3", "--outcomes", status=2).stderr
    assert "was begun with other arguments" in other
    assert "capture.predictions: 4 there, 3 here" in other
    assert "capture.outcomes: True there, absent here" in (
        answer("dump", *job, "--predictions", "4", status=2).stderr
    )
    again = answer("dump", *job, *asked).stderr
    assert "is complete and every byte of it is right: nothing to do" in again
    helped = answer("dump", "--help").stdout
    assert "--predictions" in helped and "--outcomes" in helped


# -- refused ---------------------------------------------------------------------------------------


def refused(model: nn.Module, tmp_path: Path, match: str, **options: Any) -> None:
    with pytest.raises((ModelError, PlanError), match=match):
        actstore.dump(
            model,
            None,
            [[1, 2, 3]],
            tmp_path / "run.zarr",
            **{**RAGGED, "outcomes": True, **options},
        )
    assert not (tmp_path / "run.zarr").exists()


def test_models_without_a_head(tmp_path: Path) -> None:
    way = r"load it by actstore.load_model\(NAME, head=True\)"
    refused(headed("gpt2").transformer, tmp_path, f"GPT2Model has none: {way}")
    refused(
        transformers.GPT2ForSequenceClassification(config_of("gpt2")),
        tmp_path,
        f"GPT2ForSequenceClassification has none: {way}",
    )
    refused(headed("gpt2").transformer, tmp_path, "has none", predictions=3, outcomes=False)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertLMHeadModel"])
def test_encoders(kind: str, tmp_path: Path) -> None:
    model = getattr(transformers, kind)(config_of("bert"))
    refused(model, tmp_path, f"{kind} reads the tokens behind a position, too")


def test_a_decoder_of_an_encoders_family(tmp_path: Path) -> None:
    model = transformers.BertLMHeadModel(config_of("bert-decoder")).eval()
    store = actstore.dump(model, None, SEQUENCES, tmp_path / "run.zarr", **ASKED)
    assert store is not None
    assert_tables(store, logits_alone(model, SEQUENCES), SEQUENCES, 1e-4)


class Twisted(transformers.GPT2LMHeadModel):
    """Its logits depend on more than the last hidden state."""

    def forward(self, input_ids: Tensor, **rest: Any) -> Any:
        output = super().forward(input_ids, **rest)
        output.logits = (
            output.logits
            + self.transformer.wte(input_ids).sum(-1, keepdim=True)
            + (torch.arange(64) * input_ids[..., None])
        )
        return output


def test_a_head_that_is_not_understood(tmp_path: Path) -> None:
    refused(Twisted(config_of("gpt2")), tmp_path, "logits come out .* from the model's own")


def test_numbers_and_names(tmp_path: Path) -> None:
    model = headed("gpt2")
    refused(model, tmp_path, "predictions is 65, more than the 64 tokens", predictions=65)
    refused(model, tmp_path, "predictions is -1: it must be from 1 to", predictions=-1)
    with pytest.raises(PlanError, match=f"must be from 1 to {MAX_PREDICTIONS:,}"):
        plan_of(small_corpus(), STAGES, 64, predictions=MAX_PREDICTIONS + 1)
    records = [{"input_ids": [1, 2], "loss": 3.5}]
    with pytest.raises(PlanError, match="label column 'loss' has the name of an outcome"):
        actstore.dump(model, None, records, tmp_path / "run.zarr", **{**RAGGED, "outcomes": True})
    assert actstore.dump(model, None, records, tmp_path / "run.zarr", **RAGGED) is not None


def test_other_weights_of_the_head(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(config_of("llama")).eval()
    actstore.dump(model, None, SEQUENCES, tmp_path / "run.zarr", **ASKED)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(PlanError, match=r"weights of the model's head \(its digest differs\)"):
        actstore.dump(model, None, SEQUENCES, tmp_path / "run.zarr", **ASKED)


def test_loading(tmp_path: Path) -> None:
    assert type(actstore.load_model("demo", head=True)[0]).__name__ == "GPT2LMHeadModel"
    meta, _ = actstore.load_model("demo", head=True, meta=True)
    assert Head(meta).vocab_size == meta.config.vocab_size
    plan, _ = plan_model(meta, None, bare_corpus([5]), stages=["mlp_in"], predictions=2)
    assert plan.tables == ["predictions/token_id", "predictions/probability"]
    transformers.DistilBertModel(config_of("distilbert")).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ModelError, match=r"\(distilbert\) has no head that predicts the next"):
        actstore.load_model(str(tmp_path / "encoder"), head=True)
    actstore.load_model(str(tmp_path / "encoder"))
    transformers.LlamaModel(config_of("llama")).save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="its weights have no head"):
        actstore.load_model(str(tmp_path / "bare"), head=True)
    actstore.load_model(str(tmp_path / "bare"))


def test_put_tables(tmp_path: Path) -> None:
    plan = plan_of(small_corpus(), STAGES[:1], 64, predictions=3, outcomes=True)
    values, tables = random_values(plan), random_tables(plan)

    def part(first: int, stop: int, **changed: np.ndarray) -> dict[str, np.ndarray]:
        own = {k: v[first:stop] for k, v in tables.items()}
        return own | {k.replace("__", "/"): v for k, v in changed.items()}

    with Writer(tmp_path / "run.zarr", plan) as writer:
        with pytest.raises(UsageError, match="tables outcomes/loss are given, and the plan asks"):
            writer.put_tables(0, {"outcomes/loss": tables["outcomes/loss"]})
        with pytest.raises(UsageError, match=r"predictions/token_id is int32 of shape \(5, 2\)"):
            writer.put_tables(0, part(0, 5, predictions__token_id=np.zeros((5, 2), np.int32)))
        with pytest.raises(UsageError, match=r"outcomes/loss is int64"):
            writer.put_tables(0, part(0, 5, outcomes__loss=np.zeros(5, np.int64)))
        with pytest.raises(UsageError, match="tokens 145 to 150 are not within the plan's 147"):
            writer.put_tables(145, part(0, 5))
        broken = np.array([1, np.nan, 2, np.inf, 0], np.float32)
        with pytest.raises(NonFiniteError, match=r"NaN or inf for 2 tokens, .* token 11"):
            writer.put_tables(10, part(0, 5, outcomes__entropy=broken))
        writer.put_tables(60, part(60, 147))
        with pytest.raises(UsageError, match="predictions of tokens of block 0 were written twice"):
            writer.put_tables(50, part(50, 61))
        put_all(writer, values)
        with pytest.raises(UsageError, match="block 0 were written twice"):
            writer.put_tables(55, part(55, 61))
        writer.put_tables(0, part(0, 55))
        writer.put_tables(55, part(55, 60))
    assert writer.sealed
    found = actstore.open(tmp_path / "run.zarr")
    for key, expected in tables.items():
        group, _, name = key.partition("/")
        assert (getattr(found, group)[name].values == expected).all()
