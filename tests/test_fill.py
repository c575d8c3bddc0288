"""Dumps against plain hooks: the values, where they lie, and what is refused."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, N_LAYERS, Facts, build, config_of
from helpers import assert_same_tree, tree_digests
from torch import Tensor, nn

import actstore
from actstore.errors import (
    HalfOverflowError,
    ModelError,
    NonFiniteError,
    PlanError,
    UnknownNameError,
)
from actstore.fill import Progress, fill, model_corpus, plan_model
from actstore.schema import STAGES
from actstore.writer import Writer

# Ragged: lengths from 1 to 43, so that batches of 96 tokens hold padding; token ids that some
# families pad with are among them.
LENGTHS = [7, 3, 1, 10, 43, 22, 21, 20, 5, 5, 38, 2, 17, 16, 9, 30, 29, 28, 6, 41]
SEQUENCES = [
    np.random.default_rng(n).integers(0, 64, length).tolist() for n, length in enumerate(LENGTHS)
]
RAGGED: dict[str, Any] = {"batch_tokens": 96, "buffer": "896KiB", "sketch": False}

CASES = [
    "gpt2",
    "gpt_neo",
    "gptj",  # parallel block
    "opt",  # flattens batch and sequence
    "opt-350m",  # the last hidden state is narrower
    "bloom",  # its modules add the residual themselves
    "falcon-7b",  # changes the MLP's output in place
    "falcon-40b",
    "phi3",  # gate and up in one projection
    "gemma2",  # norms before and after, heads wider than the stream
    "bert",
    "roberta",  # positions counted from the padding token
    "mpnet",
    "distilbert",
    "qwen3",
]


def stages_of(name: str) -> list[str]:
    without = {"resid_mid"} if FAMILIES[name].parallel else set()
    without |= {"hidden"} if name == "opt-350m" else set()
    return [s for s in STAGES if s not in without]


# -- plain hooks: what anybody would write, by the facts of the architecture ------------------


def places(facts: Facts) -> dict[str, tuple[str, str]]:
    """Module of a block and side, for each stage."""
    if facts.after:
        mid = (facts.after[0], "output")
    else:
        mid = (facts.norm or facts.up, "input")
    return {
        "resid_pre": ("", "input"),
        "resid_mid": mid,
        "resid_post": ("", "output"),
        "attn_z": (facts.out, "input"),
        "attn_out": (facts.post[0] if facts.post else facts.out, "output"),
        "mlp_in": (facts.up, "input"),
        "mlp_pre": (facts.up, "output"),
        "mlp_post": (facts.down, "input"),
        "mlp_out": (facts.post[1] if facts.post else facts.down, "output"),
    }


def up_path(name: str) -> Facts:
    facts = FAMILIES[name]
    if name == "phi3":
        return Facts(**{**vars(facts), "up": "mlp.gate_up_proj"})
    if facts.linear:
        return Facts(**{**vars(facts), "up": "mlp.gate_proj"})
    return facts


@contextmanager
def plain_hooks(model: nn.Module, name: str) -> Iterator[dict[tuple[str, int], Tensor]]:
    """Copies of what passes each stage's module, by stage and layer."""
    found: dict[tuple[str, int], Tensor] = {}
    facts = up_path(name)

    def hook(key: tuple[str, int], value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        if name == "phi3" and key[0] == "mlp_pre":
            value = value.chunk(2, dim=-1)[0]
        found[key] = value.clone()

    handles = []
    for layer in range(N_LAYERS):
        block = model.get_submodule(f"{facts.blocks}.{layer}")
        for stage, (path, side) in places(facts).items():
            module = block.get_submodule(path)
            key = (stage, layer)
            if side == "output":
                handles.append(
                    module.register_forward_hook(lambda m, a, out, key=key: hook(key, out))
                )
            else:
                handles.append(
                    module.register_forward_pre_hook(
                        lambda m, a, kw, key=key: hook(key, a[0] if a else kw["hidden_states"]),
                        with_kwargs=True,
                    )
                )
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, name: str, inputs: dict[str, Any]) -> dict[tuple[str, int], Tensor]:
    """Every stage and layer of one batch, (batch, sequence, width)."""
    with torch.inference_mode(), plain_hooks(model, name) as found:
        states = model(**inputs, output_hidden_states=True).hidden_states
    found.update({("hidden", i): state for i, state in enumerate(states)})
    shape = inputs["input_ids"].shape
    return {key: value.reshape(*shape, -1) for key, value in found.items()}


def padded(plan: actstore.Plan, rows: list[list[int]], model: nn.Module) -> dict[str, Any]:
    """The batch that the documentation promises, made by hand."""
    width = max(map(len, rows))
    counted = getattr(getattr(model, "embeddings", None), "padding_idx", None)
    pad = counted if counted is not None else getattr(model.config, "pad_token_id", None) or 0
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    positions = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        start = 0 if plan.padding_side == "right" else width - len(row)
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
        positions[i, start : start + len(row)] = torch.arange(len(row))
    inputs: dict[str, Any] = {"input_ids": ids}
    takes = inspect.signature(model.forward).parameters
    if "use_cache" in takes:
        inputs["use_cache"] = False
    if not mask.all():
        inputs["attention_mask"] = mask
        if plan.padding_side == "left" and "position_ids" in takes and counted is None:
            inputs["position_ids"] = positions
    return inputs


def expected(
    model: nn.Module, name: str, plan: actstore.Plan, sequences: list[list[int]]
) -> dict[tuple[str, int], Tensor]:
    """Values of all tokens by stage and layer, from plain hooks on the same batches."""
    parts: dict[tuple[str, int], list[Tensor]] = {}
    order = []
    for batch in plan.batches:
        rows = [sequences[s] for s in batch.sequences]
        values = run(model, name, padded(plan, rows, model))
        for i, s in enumerate(batch.sequences):
            n = len(sequences[s])
            own = slice(0, n) if plan.padding_side == "right" else slice(batch.length - n, None)
            order.append(s)
            for key, value in values.items():
                parts.setdefault(key, []).append(value[i, own])
    back = np.argsort(order)
    return {key: torch.cat([rows[j] for j in back]) for key, rows in parts.items()}


def alone(model: nn.Module, name: str, sequences: list[list[int]]) -> dict[tuple[str, int], Tensor]:
    """Values of all tokens from one sequence at a time, with nothing but its ids."""
    parts: dict[tuple[str, int], list[Tensor]] = {}
    for row in sequences:
        for key, value in run(model, name, {"input_ids": torch.tensor([row])}).items():
            parts.setdefault(key, []).append(value[0])
    return {key: torch.cat(rows) for key, rows in parts.items()}


def planned(model: nn.Module, **options: Any) -> actstore.Plan:
    """The plan of a dump of `SEQUENCES` with these options."""
    return plan_model(model, None, model_corpus(model, None, SEQUENCES), **options)[0]


def bits(values: np.ndarray) -> np.ndarray:
    """Values as integers, so that NaN and the sign of zero count."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


# -- the values -------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("name", CASES)
def test_values_equal_plain_hooks(
    name: str, padding_side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actstore.plan.PADDING", 3.0)  # more of it than anybody would want
    model = build(name)
    options = {"stages": stages_of(name), "padding_side": padding_side, **RAGGED}
    plan = planned(model, **options)
    store = actstore.dump(model, None, SEQUENCES, tmp_path / "run.zarr", **options)
    assert plan.n_blocks >= 4
    assert plan.computed_tokens > 1.2 * plan.n_tokens == 1.2 * sum(LENGTHS)
    same = expected(model, name, plan, SEQUENCES)
    single = alone(model, name, SEQUENCES)
    for stage in options["stages"]:
        data = store[stage]
        assert data.dtype == np.float32
        assert data["layer"].values.tolist() == list(range(N_LAYERS + (stage == "hidden")))
        for layer, values in zip(data["layer"].values.tolist(), data.values, strict=True):
            assert (bits(values) == bits(same[stage, layer].numpy())).all(), (stage, layer)
            one = single[stage, layer].numpy()
            error, bound = np.abs(values - one).max(), 1e-5 * max(1.0, np.abs(one).max())
            assert error <= bound, (stage, layer, error, bound)


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "falcon-7b"])
def test_bfloat16_model_bit_for_bit(name: str, padding_side: str, tmp_path: Path) -> None:
    model = copy.deepcopy(build(name)).to(torch.bfloat16)
    options = {"stages": stages_of(name), "padding_side": padding_side, **RAGGED}
    store = actstore.dump(model, None, SEQUENCES, tmp_path / "run.zarr", **options)
    same = expected(model, name, planned(model, **options), SEQUENCES)
    for stage in options["stages"]:
        data = store[stage]
        assert data.attrs["source_dtype"] == "bfloat16" and data.dtype == np.float32
        for layer, values in zip(data["layer"].values.tolist(), data.values, strict=True):
            assert not (bits(values) & 0xFFFF).any()
            value = same[stage, layer]
            assert value.dtype == torch.bfloat16
            assert (bits(values) == bits(value.float().numpy())).all(), (stage, layer)


@pytest.mark.parametrize("model_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stored_type_is_the_exact_cast(model_dtype: str, dtype: str, tmp_path: Path) -> None:
    model = copy.deepcopy(build("llama")).to(getattr(torch, model_dtype))
    options = {"stages": ["hidden", "attn_z", "mlp_pre"], "dtype": dtype, **RAGGED}
    store = actstore.dump(model, None, SEQUENCES, tmp_path / "run.zarr", **options)
    same = expected(model, "llama", planned(model, **options), SEQUENCES)
    for stage in options["stages"]:
        data = store[stage]
        assert data.attrs["source_dtype"] == dtype == store.info()["stages"][stage]["dtype"]
        assert data.dtype == ("float16" if dtype == "float16" else "float32")
        for layer, values in zip(data["layer"].values.tolist(), data.values, strict=True):
            cast = same[stage, layer].to(getattr(torch, dtype))
            if dtype == "bfloat16":
                cast = cast.float()
            assert (bits(values) == bits(cast.numpy())).all(), (stage, layer)


def test_training_mode_makes_no_difference(tmp_path: Path) -> None:
    # A model fresh from its class drops values at random; a dump must not.
    model = copy.deepcopy(build("gpt2"))
    calm = actstore.dump(model, None, SEQUENCES, tmp_path / "eval.zarr", **RAGGED)
    model.train()
    model.h[1].eval()
    modes = [m.training for m in model.modules()]
    wild = actstore.dump(model, None, SEQUENCES, tmp_path / "train.zarr", **RAGGED)
    assert [m.training for m in model.modules()] == modes
    assert wild.id == calm.id
    assert_same_tree(tmp_path / "train.zarr", tmp_path / "eval.zarr")


def test_headed_model_is_its_base(tmp_path: Path) -> None:
    headed = transformers.GPT2LMHeadModel(config_of("gpt2")).eval()
    a = actstore.dump(headed, None, SEQUENCES, tmp_path / "headed.zarr", **RAGGED)
    b = actstore.dump(headed.transformer, None, SEQUENCES, tmp_path / "bare.zarr", **RAGGED)
    assert a.id == b.id


def test_path_form_stages(tmp_path: Path) -> None:
    model = build("gpt2")
    stages = ["mlp_out", "norm=h.{layer}.ln_2", "again=transformer.h.{layer}.mlp", "emb=wte:output"]
    options = {"stages": stages, **RAGGED}
    store = actstore.dump(model, None, SEQUENCES, tmp_path / "run.zarr", **options)
    assert store.stages == ["mlp_out", "again", "emb", "norm"]
    same = expected(model, "gpt2", planned(model, **options), SEQUENCES)
    for layer in range(N_LAYERS):
        assert (store["norm"].sel(layer=layer).values == same["mlp_in", layer].numpy()).all()
    assert (store["again"].values == store["mlp_out"].values).all()
    ids = store.tokens["token_id"].values
    assert store["emb"].sizes["layer"] == 1
    assert (store["emb"].values[0] == model.wte.weight.numpy()[ids]).all()


def test_layers(tmp_path: Path) -> None:
    model = build("gpt2")
    options = {"stages": ["hidden", "mlp_post"], "layers": "0,-1", **RAGGED}
    store = actstore.dump(model, None, SEQUENCES, tmp_path / "run.zarr", **options)
    assert store["hidden"]["layer"].values.tolist() == [0, 3]
    assert store["hidden"]["layer_name"].values.tolist() == ["emb", "h.2"]
    assert store["mlp_post"]["layer"].values.tolist() == [0, 2]
    same = expected(model, "gpt2", planned(model, **options), SEQUENCES)
    for stage, layers in (("hidden", (0, 3)), ("mlp_post", (0, 2))):
        for layer in layers:
            assert (store[stage].sel(layer=layer).values == same[stage, layer].numpy()).all()


def test_layers_and_stages_named_twice(tmp_path: Path) -> None:
    model = build("gpt2")
    stages = ["mlp_post", "hidden", "mlp_post"]
    twice = actstore.dump(
        model, None, SEQUENCES, tmp_path / "a.zarr", stages=stages, layers=[1, 1, 0], **RAGGED
    )
    once = actstore.dump(
        model, None, SEQUENCES, tmp_path / "b.zarr", stages=stages[:2], layers="0-1", **RAGGED
    )
    assert twice["mlp_post"]["layer"].values.tolist() == [0, 1]
    assert twice.id == once.id


def test_heads_of_attn_z(tmp_path: Path) -> None:
    model = build("gemma2")  # four heads of 12, wider than the stream of 32
    stages = ["attn_z", "attn_out"]
    store = actstore.dump(model, None, SEQUENCES, tmp_path / "run.zarr", stages=stages, **RAGGED)
    assert store["attn_z"]["head"].values.tolist() == np.repeat(range(4), 12).tolist()
    assert "head" not in store["attn_out"].coords


# -- the same bytes by every way ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_staging_buffers_give_the_same_bytes(dtype: str | None, tmp_path: Path) -> None:
    model = build("falcon-7b")
    corpus = model_corpus(model, None, SEQUENCES, keep="position != 3")
    stages = ["hidden", "attn_z", "mlp_out"]
    plan, points = plan_model(model, None, corpus, stages=stages, dtype=dtype, buffer="256KiB")
    for name, staged in (("direct", False), ("staged", True)):
        with Writer(tmp_path / name, plan) as writer:
            fill(model, points, writer, staged=staged)
        assert writer.sealed
    assert_same_tree(tmp_path / "staged", tmp_path / "direct")


class Unwilling(Writer):
    """Refuses the values of one stage."""

    def put(self, stage: str, layer: int, token: int, values: np.ndarray) -> None:
        if stage == "mlp_post" and layer == 1:
            raise RuntimeError("the sky is falling")
        super().put(stage, layer, token, values)


@pytest.mark.parametrize("staged", [False, True])
def test_an_error_while_writing_stops_the_model(staged: bool, tmp_path: Path) -> None:
    model = build("gpt2")
    plan, points = plan_model(model, None, model_corpus(model, None, SEQUENCES), **RAGGED)
    batches = []
    handle = model.register_forward_pre_hook(lambda *_: batches.append(1))
    try:
        with (
            pytest.raises(RuntimeError, match="the sky is falling"),
            Unwilling(tmp_path / "run.zarr", plan) as writer,
        ):
            fill(model, points, writer, staged=staged)
    finally:
        handle.remove()
    assert not writer.sealed
    assert len(batches) <= 2 < len(plan.batches)
    assert not [t for t in threading.enumerate() if t.name.startswith("actstore")]
    store = actstore.dump(model, None, SEQUENCES, tmp_path / "run.zarr", **RAGGED)
    assert store.n_tokens == plan.n_tokens


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("staged", [False, True])
def test_an_interrupted_model_leaves_no_thread(staged: bool, tmp_path: Path) -> None:
    model = build("gpt2")
    plan, points = plan_model(model, None, model_corpus(model, None, SEQUENCES), **RAGGED)
    hooks = hooks_of(model)

    def interrupt(now: Progress) -> None:
        if now.tokens > 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "run.zarr", plan) as writer:
        fill(model, points, writer, interrupt, staged=staged)
    assert not [t for t in threading.enumerate() if t.name.startswith("actstore")]
    assert hooks_of(model) == hooks


def test_ranks_write_what_one_process_does(tmp_path: Path) -> None:
    model = build("gpt2")
    options = {"stages": ["hidden", "mlp_pre"], "passes": 2, "buffer": "64KiB"}
    options["layers"] = "1-3"
    actstore.dump(model, None, SEQUENCES, tmp_path / "one.zarr", **options)
    blocks = planned(model, **options).n_blocks
    assert blocks >= 5
    for world in (2, 3, blocks + 2):  # the last with ranks that have nothing to do
        path = tmp_path / f"{world}.zarr"
        stores = [
            actstore.dump(model, None, SEQUENCES, path, rank=rank, world_size=world, **options)
            for rank in reversed(range(world))
        ]
        assert stores[0] is None and stores[-1].n_tokens == sum(LENGTHS)
        assert_same_tree(path, tmp_path / "one.zarr")


def test_a_store_begun_by_ranks_is_finished_by_one(tmp_path: Path) -> None:
    model = build("gpt2")
    options = {"stages": ["mlp_post"], **RAGGED, "sketch": True, "buffer": "128KiB"}
    actstore.dump(model, None, SEQUENCES, tmp_path / "one.zarr", **options)
    path = tmp_path / "run.zarr"
    actstore.dump(model, None, SEQUENCES, path, rank=1, world_size=3, **options)
    actstore.dump(model, None, SEQUENCES, path, **options)
    assert_same_tree(path, tmp_path / "one.zarr")


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_passes_give_the_same_values(passes: int, tmp_path: Path) -> None:
    model = build("gpt2")
    options = {"stages": ["hidden", "mlp_in", "attn_z"], **RAGGED, "batch_tokens": 1}
    forward = []
    handle = model.register_forward_pre_hook(lambda *_: forward.append(1))
    try:
        many = actstore.dump(
            model, None, SEQUENCES, tmp_path / "many.zarr", passes=passes, **options
        )
    finally:
        handle.remove()
    assert len(forward) == passes * len(SEQUENCES) + 1  # and one token to see widths
    same = alone(model, "gpt2", SEQUENCES)
    for stage in options["stages"]:
        for layer, values in zip(many[stage]["layer"].values, many[stage].values, strict=True):
            assert (bits(values) == bits(same[stage, int(layer)].numpy())).all()


def test_the_buffer_changes_blocks_and_not_values(tmp_path: Path) -> None:
    model = build("gpt2")
    stores = [
        actstore.dump(
            model,
            None,
            SEQUENCES,
            tmp_path / f"{b}.zarr",
            buffer=b,
            batch_tokens=1,
            sketch=False,
        )
        for b in ("256KiB", "1MiB", "1GiB")
    ]
    sizes = [s.info()["block_tokens"] for s in stores]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    for stage in stores[0]:
        for store in stores[1:]:
            assert (store[stage].values == stores[0][stage].values).all()
    # With batches of several sequences the buffer may change which go together.
    ragged = actstore.dump(model, None, SEQUENCES, tmp_path / "ragged.zarr", **RAGGED)
    for stage in ragged:
        values, other = ragged[stage].values, stores[0][stage].values
        assert np.abs(values - other).max() <= 1e-5 * max(1, np.abs(other).max())


def test_each_sequence_runs_once(tmp_path: Path) -> None:
    model = build("gpt2")
    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(
        lambda m, a, kw: seen.append(kw["input_ids"]), with_kwargs=True
    )
    try:
        actstore.dump(model, None, SEQUENCES, tmp_path / "run.zarr", **RAGGED)
        computed = sum(ids.numel() for ids in seen[1:])
        rows = sum(len(ids) for ids in seen[1:])
        again = len(seen)
        actstore.dump(model, None, SEQUENCES, tmp_path / "run.zarr", **RAGGED)
    finally:
        handle.remove()
    assert rows == len(SEQUENCES)
    assert computed == planned(model, **RAGGED).computed_tokens <= 1.1 * sum(LENGTHS)
    assert len(seen) == again + 1  # a whole store is checked, not run


# -- which tokens, and their labels ---------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> tuple[nn.Module, Any]:
    return actstore.load_model("demo", device="cpu")


TEXT = (
    "The value 3.14 is a float, and 42 is an int. A list, a tuple, and a dict hold other "
    "objects. If the key is absent, a KeyError is raised. Use get, which returns None. "
) * 4


def rows_of(store: actstore.Store) -> dict[str, np.ndarray]:
    return {str(k): v.values for k, v in store.tokens.data_vars.items()}


def test_windows_and_the_event_alone(demo: tuple[nn.Module, Any], tmp_path: Path) -> None:
    model, tokenizer = demo
    cut: dict[str, Any] = {
        "windows": {"internal": ",", "terminal": "."},
        "before": 6,
        "after": 3,
        "not_beside_digits": "terminal",
        "plain": "one=40",
    }
    options: dict[str, Any] = {"stages": ["hidden", "mlp_post"], "layers": "0,-1"}
    options |= {"batch_tokens": 1, "sketch": False}
    whole = actstore.dump(model, tokenizer, [TEXT], tmp_path / "all.zarr", **cut, **options)
    events = actstore.dump(
        model, tokenizer, [TEXT], tmp_path / "events.zarr", keep="offset == 0", **cut, **options
    )
    ids = tokenizer(TEXT)["input_ids"]
    texts = [tokenizer.decode([i]) for i in ids]
    found = {}
    for label, mark in (("internal", ","), ("terminal", ".")):
        at = [i for i, t in enumerate(texts) if t.strip() == mark and i >= 6 and i + 3 < len(ids)]
        if label == "terminal":
            at = [i for i in at if not (texts[i - 1][-1:].isdigit() or texts[i + 1][:1].isdigit())]
        found[label] = at
    centres = found["internal"] + found["terminal"]
    labels = ["internal"] * len(found["internal"]) + ["terminal"] * len(found["terminal"])
    rows = rows_of(whole)
    n = len(centres)
    assert n > 20 and whole.n_tokens == 10 * n + 40
    assert rows["condition"].tolist() == [x for x in labels for _ in range(10)] + ["one"] * 40
    assert rows["offset"][: 10 * n].tolist() == list(range(-6, 4)) * n
    assert np.isnan(rows["offset"][10 * n :]).all()
    assert rows["position"].tolist() == list(range(10)) * n + list(range(40))
    assert rows["sequence"].tolist() == [i for i in range(n) for _ in range(10)] + [n] * 40
    cuts = [ids[c - 6 : c + 4] for c in centres]
    assert rows["token_id"].tolist() == [i for cut in cuts for i in cut] + ids[:40]
    assert rows["input"].tolist() == list(range(whole.n_tokens))

    assert events.n_tokens == n and len(events.inputs["token_id"]) == whole.n_tokens
    rows = rows_of(events)
    assert rows["offset"].tolist() == [0] * n and rows["position"].tolist() == [6] * n
    assert rows["input"].tolist() == [10 * i + 6 for i in range(n)]
    assert rows["condition"].tolist() == labels
    assert events.inputs["kept"].values.sum() == n
    for stage in whole:
        assert (events[stage].values == whole[stage].values[:, rows["input"]]).all()
    # The plain sequence is not run where nothing of it is kept, but its text can be read.
    assert events.sequences.sizes["sequence"] == n + 1
    assert events.decode(0, before=6, after=3) == "".join(texts[centres[0] - 6 : centres[0] + 4])
    with torch.inference_mode():
        states = model(torch.tensor([cuts[5]]), output_hidden_states=True).hidden_states
    assert (events["hidden"].values[0, 5] == states[0][0, 6].numpy()).all()
    assert (events["hidden"].values[1, 5] == states[-1][0, 6].numpy()).all()


def test_skipping_tokens(demo: tuple[nn.Module, Any], tmp_path: Path) -> None:
    model, tokenizer = demo
    texts = [TEXT[:40], TEXT[30:170], TEXT[90:100]]
    options: dict[str, Any] = {"stages": ["mlp_out"], "layers": "2", "bos": "always"}
    options |= {"batch_tokens": 1, "sketch": False}
    every = actstore.dump(model, tokenizer, texts, tmp_path / "all.zarr", **options)
    rows = rows_of(every)
    starts = every.sequences["start"].values
    assert (rows["token_id"][starts] == tokenizer.bos_token_id).all()
    special = every.inputs["special"].values
    assert np.flatnonzero(special).tolist() == starts.tolist()
    position = rows["position"]
    cases: dict[str, tuple[dict[str, Any], np.ndarray]] = {
        "special": ({"skip_special": True}, ~special),
        "first": ({"skip_first": 4}, position >= 4),
        "both": ({"skip_first": 1, "keep": "position < 9 or length > 30"}, position >= 1),
        "most": ({"max_tokens": 21}, np.arange(len(position)) < 21),
    }
    lengths = every.sequences["length"].values[rows["sequence"]]
    cases["both"][1][:] &= (position < 9) | (lengths > 30)
    for name, (choice, mask) in cases.items():
        path = tmp_path / f"{name}.zarr"
        some = actstore.dump(model, tokenizer, texts, path, **choice, **options)
        assert some.tokens["input"].values.tolist() == np.flatnonzero(mask).tolist(), name
        assert (some["mlp_out"].values == every["mlp_out"].values[:, mask]).all(), name
        assert (some["mlp_out"]["token_id"].values == rows["token_id"][mask]).all()


def test_texts_ids_and_labels(demo: tuple[nn.Module, Any], tmp_path: Path) -> None:
    model, tokenizer = demo
    texts = ["Return the absolute value.", "x" * 3, "Return the absolute value."]
    ids = [tokenizer(t)["input_ids"] for t in texts]
    options: dict[str, Any] = {"stages": ["mlp_post"], "layers": "-1"}
    options |= {"batch_tokens": 1, "sketch": False}
    a = actstore.dump(model, tokenizer, texts, tmp_path / "texts.zarr", **options)
    b = actstore.dump(model, None, ids, tmp_path / "ids.zarr", **options)
    c = actstore.dump(
        model,
        tokenizer,
        [
            {"text": texts[0], "kind": "doc", "year": 1999},
            {"input_ids": ids[1], "kind": "x", "loud": [True] * len(ids[1])},
            {"text": texts[2], "kind": "doc"},
        ],
        tmp_path / "labels.zarr",
        **options,
    )
    assert (a["mlp_post"].values == b["mlp_post"].values).all()
    assert (a["mlp_post"].values == c["mlp_post"].values).all()
    n = [len(i) for i in ids]
    # The same text twice is two sequences with the same values.
    assert a.sequences["length"].values.tolist() == n
    assert (a["mlp_post"].values[:, : n[0]] == a["mlp_post"].values[:, n[0] + n[1] :]).all()
    assert a.sequences["text"].values.tolist() == texts
    assert "text" not in b.sequences and b.vocabulary is None
    assert b.decode(1) == f"{ids[0][0]} {ids[0][1]}"
    assert rows_of(c)["kind"].tolist() == ["doc"] * n[0] + ["x"] * n[1] + ["doc"] * n[2]
    year = rows_of(c)["year"]
    assert (year[: n[0]] == 1999).all() and np.isnan(year[n[0] :]).all()
    assert set(c.labels) == {"document", "kind", "year", "loud"}
    assert rows_of(c)["document"].tolist() == [0] * n[0] + [1] * n[1] + [2] * n[2]


def test_long_text_is_cut_at_the_context(demo: tuple[nn.Module, Any], tmp_path: Path) -> None:
    model, tokenizer = demo
    options = {"stages": ["hidden"], "layers": "0"}
    store = actstore.dump(model, tokenizer, [TEXT], tmp_path / "a.zarr", context=50, **options)
    total = len(tokenizer(TEXT)["input_ids"])
    assert store.sequences["length"].values.tolist() == [50] * (total // 50) + [total % 50]
    assert "".join(store.sequences["text"].values.tolist()) == TEXT
    with pytest.raises(PlanError, match="context 300 is more than the model's 256 positions"):
        actstore.dump(model, tokenizer, [TEXT], tmp_path / "b.zarr", context=300, **options)
    corpus = actstore.build_corpus([[1, 2, 3]])
    with pytest.raises(PlanError, match="context, bos: give these when you build the corpus"):
        actstore.dump(model, None, corpus, tmp_path / "b.zarr", context=3, bos="never")
    assert not (tmp_path / "b.zarr").exists()


# -- progress ---------------------------------------------------------------------------------


def test_progress_is_monotone_and_ends_at_the_total(tmp_path: Path) -> None:
    model = build("gpt2")
    seen: list[Progress] = []
    options = {"passes": 3, **RAGGED}

    def stop(now: Progress) -> None:
        seen.append(now)
        if len(seen) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        actstore.dump(model, None, SEQUENCES, tmp_path / "run.zarr", progress=stop, **options)
    store = actstore.dump(
        model, None, SEQUENCES, tmp_path / "run.zarr", progress=seen.append, **options
    )
    first, second = seen[:9], seen[9:]
    for run_ in (first, second):
        tokens = [p.tokens for p in run_]
        written = [p.nbytes for p in run_]
        assert all(a < b for a, b in pairwise(tokens))
        assert written == sorted(written)
    assert {p.tokens_total for p in seen} == {3 * store.n_tokens}
    assert second[-1].tokens == second[-1].tokens_total
    assert len(second) == 3 * len(planned(model, **options).batches)


# -- what cannot be stored ------------------------------------------------------------------------


def broken(change: Callable[[nn.Module], None]) -> nn.Module:
    model = copy.deepcopy(build("gpt2"))
    with torch.no_grad():
        change(model)
    return model


def test_nan_is_named_and_can_be_allowed(tmp_path: Path) -> None:
    def change(model: nn.Module) -> None:
        model.wte.weight[63, 5] = torch.nan  # only where this token is, and what sees it

    model, path = broken(change), tmp_path / "run.zarr"
    sequences = [[1, 2, 3, 4] * 10] * 5 + [[1, 63, 3, 4]] + [[5, 6, 7, 8] * 10] * 5
    options = {"stages": ["hidden", "mlp_pre"], "layers": "1-2", "batch_tokens": 1}
    options["buffer"] = "256KiB"
    with pytest.raises(NonFiniteError) as caught:
        actstore.dump(model, None, sequences, path, **options)
    message = str(caught.value)
    assert "NaN or inf in stage" in message and "--allow-nonfinite" in message
    assert "stage hidden, layer 1" in message or "stage mlp_pre, layer 1" in message
    plan = plan_model(model, None, model_corpus(model, None, sequences), **options)[0]
    block = 201 // plan.block_tokens
    first, last = block * plan.block_tokens, (block + 1) * plan.block_tokens - 1
    assert f"tokens {first} to {last}" in message
    before = {p: p.stat().st_mtime_ns for p in path.glob("journal/p0.*.json")}
    assert 0 < len(before) < plan.n_blocks
    store = actstore.dump(model, None, sequences, path, allow_nonfinite=True, **options)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    for stage in store:
        bad = np.isnan(store[stage].values).any(axis=(0, 2))
        assert np.flatnonzero(bad).tolist() == [200, 201, 202, 203]
    assert [problem for _, problem in actstore.verify(path) if problem] == []
    with pytest.raises(NonFiniteError, match=r"of [0-9,]+ values are NaN or inf"):
        actstore.dump(model, None, sequences, tmp_path / "other.zarr", **options)


def test_infinity_in_a_float16_model_is_nonfinite(tmp_path: Path) -> None:
    def change(model: nn.Module) -> None:
        model.h[1].mlp.c_fc.weight.mul_(1e5)

    model = broken(change).to(torch.float16)
    with pytest.raises(NonFiniteError, match="stage mlp_pre, layer 1"):
        actstore.dump(model, None, SEQUENCES, tmp_path / "run.zarr", stages=["mlp_pre"], **RAGGED)


def test_a_value_that_float16_cannot_hold(tmp_path: Path) -> None:
    def change(model: nn.Module) -> None:
        model.h[2].mlp.c_fc.weight.mul_(1e6)

    model, path = broken(change), tmp_path / "run.zarr"
    options = {"stages": ["mlp_in", "mlp_pre"], **RAGGED}
    message = (
        r"values of stage mlp_pre, layer 2, do not fit float16 \(one is -?[0-9.e+]+, .*"
        "--dtype bfloat16 or float32"
    )
    for allow in (False, True):  # an overflow is nobody's wish
        with pytest.raises(HalfOverflowError, match=message):
            actstore.dump(
                model, None, SEQUENCES, path, dtype="float16", allow_nonfinite=allow, **options
            )
    with pytest.raises(PlanError, match=r"capture.stages.mlp_in.dtype: float16 there, float32 her"):
        actstore.dump(model, None, SEQUENCES, path, **options)
    store = actstore.dump(model, None, SEQUENCES, tmp_path / "b.zarr", dtype="bfloat16", **options)
    assert store["mlp_pre"].max() > 65504


# -- what is refused before anything is written ---------------------------------------------------


def test_models_and_names_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    with pytest.raises(
        UnknownNameError, match=r"unknown stage 'mlp_pots'.*did you mean 'mlp_post'"
    ):
        actstore.dump(build("gpt2"), None, SEQUENCES, path, stages=["mlp_pots"])
    with pytest.raises(UnknownNameError, match=r"unknown layer 7. Known: 0, 1, 2\."):
        actstore.dump(build("gpt2"), None, SEQUENCES, path, layers="0,7")
    with pytest.raises(UnknownNameError, match="unknown dtype 'float8'"):
        actstore.dump(build("gpt2"), None, SEQUENCES, path, dtype="float8")
    with pytest.raises(ModelError, match="Linear has no transformers configuration"):
        actstore.dump(nn.Linear(2, 2), None, SEQUENCES, path)
    with pytest.raises(ModelError, match="falcon has no stage 'resid_mid'"):
        actstore.dump(build("falcon-7b"), None, SEQUENCES, path, stages=["resid_mid"])
    with pytest.raises(ModelError, match="'hidden' is 32 wide at layer 0 and 24 at layer 3"):
        actstore.dump(build("opt-350m"), None, SEQUENCES, path, stages=["hidden"])
    with pytest.raises(ModelError, match="no weights"):
        actstore.dump(build("gpt2", "meta"), None, SEQUENCES, path)
    assert not path.exists()


def test_other_weights_are_refused(tmp_path: Path) -> None:
    model, path = copy.deepcopy(build("gpt2")), tmp_path / "run.zarr"
    actstore.dump(model, None, SEQUENCES, path, **RAGGED)
    before = tree_digests(path)
    with torch.no_grad():
        model.h[0].mlp.c_fc.bias[3] += 1
    with pytest.raises(PlanError, match=r"the model's weights \(its digest differs\)"):
        actstore.dump(model, None, SEQUENCES, path, **RAGGED)
    with pytest.raises(PlanError, match="the input text, its labels or its selection"):
        actstore.dump(build("gpt2"), None, SEQUENCES[:-1], path, **RAGGED)
    assert_same_tree(path, before)
