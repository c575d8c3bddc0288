"""Stores among other people's tools: xarray, dask, pandas, TransformerLens' names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from helpers import (
    STAGES,
    VOCABULARY,
    plan_of,
    random_values,
    small_corpus,
    stored,
    write_small,
    write_store,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2Model

import actstore
from actstore.aliases import ALIASES, only_stage, stage_of, stages_of
from actstore.errors import UnknownNameError, UsageError
from actstore.hookpoints import resolve
from actstore.plan import StageSpec
from actstore.schema import STAGES as MEANINGS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[actstore.Store, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("interop") / "run.zarr"
    _, values = write_small(path)
    kinds = {s.name: s.source_dtype for s in STAGES}
    return actstore.open(path), {n: stored(v, kinds[n]) for n, v in values.items()}


# -- xarray and dask -----------------------------------------------------------------------


def test_xarray_and_dask_code_of_ones_own(made) -> None:
    store, values = made
    acts, own = store["mlp_post"], values["mlp_post"]
    assert isinstance(acts.data, da.Array)
    first = (acts.position == 0).compute()
    np.testing.assert_allclose(
        acts[:, first.values].mean("token").values, own[:, first.values].mean(1), rtol=1e-5
    )
    # xarray groups by what is in memory: coordinates are lazy, too.
    loaded = acts.sel(layer=1).assign_coords(play=acts.play.compute())
    by_play = loaded.groupby("play").mean().compute()
    codes = store["mlp_post"].play.values
    for at, code in enumerate(by_play.play.values):
        np.testing.assert_allclose(by_play.values[at], own[1, codes == code].mean(0), rtol=1e-4)
    gram = da.einsum("ltn,ltm->lnm", acts.data, acts.data)
    np.testing.assert_allclose(gram.compute(), np.einsum("ltn,ltm->lnm", own, own), rtol=1e-3)
    windows = xr.apply_ufunc(np.abs, acts, dask="parallelized").max(("token", "neuron")).values
    np.testing.assert_array_equal(windows, np.abs(own).max((1, 2)))


def test_stock_xarray_in_a_process_without_actstore(made, tmp_path: Path) -> None:
    store, values = made
    np.save(tmp_path / "own.npy", values["mlp_post"])
    code = f"""
import sys, numpy as np, xarray as xr
acts = xr.open_zarr({store.path!r}, group="mlp_post")["activation"]
assert (acts.values == np.load({str(tmp_path / "own.npy")!r})).all()
frame = acts.sel(layer=1, neuron=[3, 5]).to_dataframe()
print(len(frame), sorted(frame.columns)[:2], "actstore" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    n = values["mlp_post"].shape[1]
    assert out.stdout.split()[0] == str(2 * n) and out.stdout.strip().endswith("False")


def test_tokens_as_a_data_frame(made) -> None:
    store, _ = made
    frame = store.tokens.to_dataframe()
    assert list(frame.columns[:5]) == ["input", "sequence", "position", "token_id", "token_text"]
    assert set(frame.columns[5:]) == set(store.labels)
    assert frame.index.name == "token" and len(frame) == store.n_tokens
    corpus = small_corpus()
    kept = np.flatnonzero(corpus.keep)
    np.testing.assert_array_equal(frame.input, kept)
    np.testing.assert_array_equal(frame.token_id, corpus.token_ids[kept])
    np.testing.assert_array_equal(frame.token_text, VOCABULARY[corpus.token_ids[kept]])
    assert frame.condition.isin(["internal", "terminal"]).all()
    assert pd.api.types.is_float_dtype(frame.offset)
    counts = frame.groupby("play").size()
    assert counts.sum() == len(frame)
    # Rows are the tokens of every stage.
    chosen = frame.index[(frame.position > 3) & (frame.condition == "terminal")]
    mask = store["mlp_post"].isel(token=chosen.to_numpy())
    assert (mask.position > 3).all()
    again = actstore.open(store.path).tokens.to_dataframe()
    pd.testing.assert_frame_equal(frame, again)


# -- sel_like ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_sel_like_is_what_indexing_gives(made, data) -> None:
    store, values = made
    n = store.n_tokens
    layers = data.draw(st.lists(st.sampled_from([0, 1]), min_size=1, max_size=2, unique=True))
    tokens = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=9))
    neurons = data.draw(st.lists(st.integers(0, 31), min_size=1, max_size=9, unique=True))
    other = store["attn_z"].sel(layer=layers, neuron=neurons).isel(token=tokens)
    if data.draw(st.booleans()):  # as somebody's own array would name them
        other = xr.DataArray(
            np.zeros(other.shape),
            dims=other.dims,
            coords={"layer": layers, "token": tokens, "neuron": neurons},
        )
    like = store.sel_like(other, "mlp_post")
    assert like.name == "mlp_post" and isinstance(like.data, da.Array)
    expected = values["mlp_post"][layers][:, tokens][:, :, neurons]
    np.testing.assert_array_equal(like.values, expected)


def test_sel_like_at_one_place_and_across_stores(made, tmp_path: Path) -> None:
    store, values = made
    one = store["mlp_post"].sel(layer=1, neuron=7).isel(token=slice(4, 9))
    np.testing.assert_array_equal(store.sel_like(one).values, values["mlp_post"][1, 4:9, 7])
    point = store["mlp_post"].sel(layer=1, neuron=7).isel(token=4)
    assert store.sel_like(point).shape == () and store.sel_like(point) == point
    dataset = xr.Dataset(coords={"layer": [0]})
    np.testing.assert_array_equal(store.sel_like(dataset, "mlp_out"), values["mlp_out"][:1])
    # Another store over the same texts that kept other tokens: found by input.
    corpus = small_corpus()
    fewer = np.flatnonzero(corpus.keep)[3::2]
    corpus.keep[:] = False
    corpus.keep[fewer] = True
    plan = plan_of(corpus, [StageSpec("mlp_post", (0, 1), 48)], 64)
    write_store(tmp_path / "b.zarr", plan, random_values(plan, 1), vocabulary=VOCABULARY)
    b = actstore.open(tmp_path / "b.zarr")
    like = store.sel_like(b["mlp_post"])
    np.testing.assert_array_equal(like.input, fewer)
    np.testing.assert_array_equal(like.values, values["mlp_post"][:, 3::2])
    with pytest.raises(UsageError, match=r"input token .* which this store did not keep"):
        b.sel_like(store["mlp_post"])


def test_sel_like_refuses_what_is_not_there(made) -> None:
    store, _ = made
    acts = store["mlp_post"]
    with pytest.raises(UnknownNameError, match="unknown layer 2"):
        store.sel_like(store["hidden"], "mlp_post")
    with pytest.raises(UnknownNameError, match="unknown neuron 24"):
        store.sel_like(acts, "hidden")
    with pytest.raises(UsageError, match="tokens are not this store's: at its token 0, token_id"):
        store.sel_like(acts.assign_coords(token_id=acts.token_id + 1))
    with pytest.raises(UsageError, match="token 9999 is not within"):
        store.sel_like(xr.DataArray([0.0], dims="token", coords={"token": [9999]}), "mlp_post")
    with pytest.raises(UsageError, match="no coordinate token or input that says which"):
        store.sel_like(xr.DataArray(np.zeros(5), dims="token"), "mlp_post")
    with pytest.raises(UsageError, match="say which stage"):
        store.sel_like(xr.DataArray(np.zeros(2), dims="layer"))
    with pytest.raises(UsageError, match="nothing to be like"):
        store.sel_like(xr.DataArray(np.zeros(2), dims="time"), "mlp_post")
    with pytest.raises(UsageError, match="other is a ndarray"):
        store.sel_like(np.zeros(3), "mlp_post")  # type: ignore[arg-type]


# -- TransformerLens' names ----------------------------------------------------------------


def test_every_alias_is_a_stage_with_and_without_its_layer() -> None:
    assert set(ALIASES.values()) == set(MEANINGS) - {"hidden"}
    for name, stage in ALIASES.items():
        assert stage_of(name) == (stage, None) and only_stage(name) == stage
        assert stage_of(f"blocks.7.{name}") == (stage, 7)
    with pytest.raises(UsageError, match="names a layer, and only a stage"):
        only_stage("blocks.7.hook_mlp_out")


def _transformer_lens(model: GPT2Model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """GPT-2 as TransformerLens writes it down, its values by its own names.

    After `TransformerBlock.forward`, `AbstractAttention.forward` and `MLP.forward` there, without
    any processing of weights; a head's values side by side.
    """
    seen = {}
    x = model.wte(ids) + model.wpe(torch.arange(ids.shape[1]))
    heads, mask = model.config.n_head, torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    for i, block in enumerate(model.h):
        seen[f"blocks.{i}.hook_resid_pre"] = x
        q, k, v = block.attn.c_attn(block.ln_1(x)).split(x.shape[-1], -1)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
        z = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        seen[f"blocks.{i}.attn.hook_z"] = z
        seen[f"blocks.{i}.hook_attn_out"] = attn_out = block.attn.c_proj(z)
        seen[f"blocks.{i}.hook_resid_mid"] = x = x + attn_out
        seen[f"blocks.{i}.mlp.hook_in"] = normed = block.ln_2(x)
        seen[f"blocks.{i}.mlp.hook_pre"] = pre = block.mlp.c_fc(normed)
        seen[f"blocks.{i}.mlp.hook_post"] = post = block.mlp.act(pre)
        seen[f"blocks.{i}.hook_mlp_out"] = mlp_out = block.mlp.c_proj(post)
        seen[f"blocks.{i}.hook_resid_post"] = x = x + mlp_out
    return seen


def test_aliases_are_the_places_that_transformer_lens_means(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=50, n_positions=16))
    model = model.eval()
    ids = torch.randint(0, 50, (1, 12))
    with torch.no_grad():
        expected = _transformer_lens(model, ids)
    path = tmp_path / "run.zarr"
    wanted = [*(n for n in expected if n.startswith("blocks.1.")), "blocks.0.mlp.hook_post"]
    store = actstore.dump(model, None, [{"input_ids": ids[0].tolist()}], path, stages=wanted)
    assert store["mlp_post"].layer.values.tolist() == [0, 1]
    assert store["mlp_out"].layer.values.tolist() == [1]
    for name in wanted:
        assert name in store
        found = store[name]
        assert found.dims == ("token", "neuron") and found.layer == int(name.split(".")[1])
        np.testing.assert_allclose(found.values, expected[name][0], atol=2e-5, err_msg=name)
    assert store["mlp.hook_post"].dims == ("layer", "token", "neuron")


def test_aliases_in_questions(made) -> None:
    store, _ = made
    a = actstore.moments(store, stages="blocks.1.mlp.hook_post, hook_mlp_out", per="layer")
    b = actstore.moments(store, stages="mlp_post,mlp_out", per="layer")
    a, b = actstore.compute(a, b)
    assert a.stage.values.tolist() == ["mlp_post", "mlp_out"]
    np.testing.assert_array_equal(a["mean"].sel(stage="mlp_out"), b["mean"].sel(stage="mlp_out"))
    assert np.isnan(a["mean"].sel(stage="mlp_post", layer=0))
    assert a["mean"].sel(stage="mlp_post", layer=1) == b["mean"].sel(stage="mlp_post", layer=1)
    two = actstore.moments(store, stages="blocks.0.attn.hook_z,blocks.1.attn.hook_z", per="layer")
    assert two.layer.values.tolist() == [0, 1]
    with pytest.raises(UsageError, match="names its layer: leave layers='0' out"):
        actstore.moments(store, stages="blocks.1.mlp.hook_post", layers="0")
    with pytest.raises(UnknownNameError, match="unknown layer 2"):
        actstore.moments(store, stages="blocks.2.mlp.hook_post")
    across = actstore.cosine_matrix(store, stages="mlp_post", stage_b="mlp.hook_post", layers="0")
    assert across.attrs["stage_b"] == "mlp_post"
    run = [sys.executable, "-m", "actstore_cli", "query", "moments", store.path, "--per", "layer"]
    out = subprocess.run(
        [*run, "--stages", "blocks.1.mlp.hook_post"], capture_output=True, text=True, check=True
    )
    assert len(out.stdout.splitlines()) == 2


def test_aliases_where_a_model_is_hooked() -> None:
    gpt2 = {"model_type": "gpt2", "n_layer": 12}
    points = resolve(gpt2, ["blocks.3.mlp.hook_post", "x=h.{layer}.ln_1", "blocks.5.mlp.hook_post"])
    assert [(p.stage, p.layer) for p in points[:2]] == [("mlp_post", 3), ("mlp_post", 5)]
    assert len(points) == 14
    assert resolve(gpt2, ["mlp.hook_pre"]) == resolve(gpt2, ["mlp_pre"])
    assert resolve(gpt2, ["mlp_pre", "blocks.3.mlp.hook_pre"]) == resolve(gpt2, ["mlp_pre"])
    with pytest.raises(UnknownNameError, match="unknown layer 12"):
        resolve(gpt2, ["blocks.12.mlp.hook_post"])
    with pytest.raises(UsageError, match="names its layer"):
        resolve(gpt2, ["blocks.2.mlp.hook_post"], "2")
    # BERT normalises after the sum, and TransformerLens reads the stream before that.
    bert = {"model_type": "bert", "num_hidden_layers": 2}
    for name in ("hook_resid_mid", "blocks.1.hook_resid_post"):
        with pytest.raises(UsageError, match=r"in bert, TransformerLens reads .* before its norm"):
            resolve(bert, [name])
    assert resolve(bert, ["blocks.1.hook_mlp_out"]) == resolve(bert, ["mlp_out"], "1")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.1.mlp.hook_pots", "did you mean 'blocks.1.mlp.hook_post'"),
        ("mlp_pots", "did you mean 'mlp_post'"),
        ("blocks.1.hook_resid_pre", "unknown stage 'resid_pre'.*is that stage"),
        ("blocks.1.hook_mlp_in", "two places.*'resid_mid'.*or 'mlp_in'"),
        ("hook_mlp_in", "two places"),
        ("blocks.9.mlp.hook_post", "unknown layer 9"),
        ("blocks..mlp.hook_post", "unknown stage"),
        ("blocks.-1.mlp.hook_post", "unknown stage"),
    ],
)
def test_wrong_names_say_what_there_is(made, name: str, message: str) -> None:
    store, _ = made
    with pytest.raises(UsageError, match=f"(?s){message}"):
        store[name]


@given(name=st.text(max_size=30), layers=st.sampled_from([None, 3]))
def test_any_text_is_a_stage_or_an_error_of_ours(name: str, layers: int | None) -> None:
    try:
        found = stages_of([name], layers)
    except UsageError:
        return
    assert set(found) <= set(MEANINGS)
