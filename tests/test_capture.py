"""Hooks against what the architectures define, for tiny random models of every family."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, N_LAYERS, build, config_of
from torch import Tensor, nn

from actstore.capture import base_model, batch_inputs, capture, module_at, probe
from actstore.errors import CaptureError, ModelError, UnknownNameError, UsageError
from actstore.hookpoints import HookPoint, families, resolve
from actstore.models import load_model
from actstore.schema import STAGES

# Longer than the attention windows; among the tokens are those that some families pad with.
SEQUENCES = [
    np.array([5, 0, 1, 9, 33, 2, 7]),
    np.array([1, 17, 60]),
    np.array([4]),
    np.array([0, 11, 12, 1, 8, 50, 21, 30, 2, 41]),
]

every_family = pytest.mark.parametrize("name", FAMILIES)


def points_of(name: str) -> list[HookPoint]:
    """Every stage and layer that a case has."""
    config = config_of(name).to_dict()
    stages = [s for s in STAGES if s != "resid_mid" or not FAMILIES[name].parallel]
    return resolve(config, stages)


def read(model: nn.Module, points: list[HookPoint], inputs: dict[str, Any]) -> list[Tensor]:
    """A copy of the value at each point in one forward pass."""
    found: dict[int, Tensor] = {}

    def receive(i: int, value: Tensor) -> None:
        found[i] = value.reshape(*inputs["input_ids"].shape, -1).clone()

    with torch.inference_mode(), capture(model, points, receive) as state:
        base_model(model)(**inputs)
        state.done()
    return [found[i] for i in range(len(points))]


@cache
def stages_of(name: str) -> dict[tuple[str, int], Tensor]:
    """Every stage and layer of a case, for one sequence."""
    points = points_of(name)
    values = read(build(name), points, batch_inputs(build(name), SEQUENCES[-1:]))
    return {(p.stage, p.layer): v for p, v in zip(points, values, strict=True)}


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Parts:
    """The modules of one block, found by the facts and not by the hook points."""

    def __init__(self, name: str, layer: int) -> None:
        self.facts = FAMILIES[name]
        self.block = build(name).get_submodule(f"{self.facts.blocks}.{layer}")

    def __call__(self, path: str | None) -> Callable[[Tensor], Tensor]:
        return self.block.get_submodule(path) if path else lambda x: x


def test_all_families_have_a_case() -> None:
    assert {config_of(name).model_type for name in FAMILIES} == set(families())


@every_family
def test_hidden_is_transformers_output_hidden_states(name: str) -> None:
    model = build(name)
    inputs = batch_inputs(model, SEQUENCES[-1:])
    with torch.inference_mode():
        expected = model(**inputs, output_hidden_states=True).hidden_states
    values = stages_of(name)
    assert len(expected) == N_LAYERS + 1
    for layer, state in enumerate(expected):
        assert torch.equal(values["hidden", layer], state)
    assert not torch.equal(expected[0], expected[1])


@every_family
def test_residual_stream_is_the_sum_that_the_architecture_defines(name: str) -> None:
    values, facts = stages_of(name), FAMILIES[name]
    for layer in range(N_LAYERS):
        part = Parts(name, layer)
        norms = [part(path) for path in facts.after or (None, None)]
        streams = [part(path) for path in facts.stream or (None, None)]
        pre, post = values["resid_pre", layer], values["resid_post", layer]
        attention, mlp = values["attn_out", layer], values["mlp_out", layer]
        assert torch.equal(pre, values["hidden", layer])
        if facts.parallel:
            same(pre + attention + mlp, post)
        else:
            mid = values["resid_mid", layer]
            same(norms[0](streams[0](pre) + attention), mid)
            same(norms[1](streams[1](mid) + mlp), post)
        if layer + 1 < N_LAYERS:
            assert torch.equal(post, values["hidden", layer + 1])


@every_family
def test_attention_heads_through_the_output_projection(name: str) -> None:
    values = stages_of(name)
    for layer in range(N_LAYERS):
        part = Parts(name, layer)
        norm = part(part.facts.post[0] if part.facts.post else None)
        projected = part(part.facts.out)(values["attn_z", layer])
        same(norm(projected), values["attn_out", layer])


@every_family
def test_mlp_from_its_input_to_its_output(name: str) -> None:
    values, facts = stages_of(name), FAMILIES[name]
    for layer in range(N_LAYERS):
        part = Parts(name, layer)
        stream = values["resid_pre" if facts.parallel else "resid_mid", layer]
        entry, pre, post = (values[stage, layer] for stage in ("mlp_in", "mlp_pre", "mlp_post"))
        same(part(facts.norm)(stream), entry)
        if name == "phi3":  # gate and up side by side
            gate, up = part("mlp.gate_up_proj")(entry).chunk(2, dim=-1)
        else:
            gate = part(facts.up)(entry)
            up = part(facts.linear)(entry) if facts.linear else torch.ones(())
        same(gate, pre)
        same(part(facts.act)(pre) * up, post)
        norm = part(facts.post[1] if facts.post else None)
        same(norm(part(facts.down)(post)), values["mlp_out", layer])


@every_family
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_padding_changes_no_real_token(name: str, padding_side: str) -> None:
    model, points = build(name), points_of(name)
    inputs = batch_inputs(model, SEQUENCES, padding_side)
    together = read(model, points, inputs)
    for row, tokens in enumerate(SEQUENCES):
        alone = read(model, points, {"input_ids": torch.from_numpy(tokens)[None]})
        length = len(tokens)
        own = slice(None, length) if padding_side == "right" else slice(-length, None)
        assert torch.equal(inputs["input_ids"][row, own], torch.from_numpy(tokens))
        for point, a, b in zip(points, together, alone, strict=True):
            error = (a[row, own] - b[0]).abs().max().item()
            bound = 1e-5 * max(1.0, b.abs().max().item())
            assert error <= bound, (point, error, bound)


@every_family
def test_probe_needs_no_weights(name: str) -> None:
    points = [p for p in points_of(name) if name != "opt-350m" or p.stage != "hidden"]
    real = probe(build(name), points)
    assert probe(build(name, "meta"), points) == real
    values = stages_of(name)
    for point, (width, dtype) in zip(points, real, strict=True):
        value = values[point.stage, point.layer]
        assert (width, dtype) == (value.shape[-1], value.dtype)


def test_probe_reports_the_element_type() -> None:
    model = transformers.AutoModel.from_config(config_of("llama"), dtype=torch.bfloat16)
    assert probe(model, points_of("llama"))[0] == (32, torch.bfloat16)


def test_probe_of_layers_of_unequal_width() -> None:
    # opt-350m projects its last hidden state down to the width of its embeddings.
    points = resolve(config_of("opt-350m").to_dict(), ["hidden"])
    with pytest.raises(ModelError, match=r"'hidden' is 32 wide at layer 0 and 24 at layer 3"):
        probe(build("opt-350m"), points)


def test_batches_pass_on_no_more_than_they_must() -> None:
    equal = [SEQUENCES[0], SEQUENCES[0] + 1]
    assert set(batch_inputs(build("gpt2"), equal)) == {"input_ids", "use_cache"}
    assert batch_inputs(build("gpt2"), equal)["use_cache"] is False
    assert set(batch_inputs(build("mpnet"), equal)) == {"input_ids"}
    right = {"input_ids", "attention_mask", "use_cache"}
    assert set(batch_inputs(build("gpt2"), SEQUENCES)) == right
    assert set(batch_inputs(build("gpt2"), SEQUENCES, "left")) == right | {"position_ids"}
    assert set(batch_inputs(build("roberta"), SEQUENCES, "left")) == right
    mask = batch_inputs(build("gpt2"), SEQUENCES, "left")["attention_mask"]
    assert mask.sum(1).tolist() == [7, 3, 1, 10]


def test_batches_that_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown padding side 'middle'"):
        batch_inputs(build("gpt2"), SEQUENCES, "middle")
    for empty in ([], [np.array([1]), np.array([], np.int64)]):
        with pytest.raises(UsageError, match="at least one sequence, and each sequence a token"):
            batch_inputs(build("gpt2"), empty)
    with pytest.raises(ModelError, match=r"Linear.forward takes no input_ids but \(input\)"):
        batch_inputs(nn.Linear(2, 2), SEQUENCES)


def test_path_form_with_and_without_the_prefix_of_the_head() -> None:
    headed = transformers.GPT2LMHeadModel(config_of("gpt2")).eval()
    config = headed.config.to_dict()
    paths = ["a=transformer.h.{layer}.mlp:input", "b=h.{layer}.mlp.c_fc:input", "emb=wte"]
    points = resolve(config, [*paths, "mlp_in"])
    values = read(headed, points, batch_inputs(headed, SEQUENCES[:1]))
    for i in range(N_LAYERS):
        assert torch.equal(values[i], values[i + N_LAYERS])
        assert torch.equal(values[i], values[i + 2 * N_LAYERS + 1])
    assert probe(headed, points)[2 * N_LAYERS][0] == 32


def test_module_at() -> None:
    headed = transformers.GPT2LMHeadModel(config_of("gpt2"))
    block = headed.transformer.h[1]
    for model in (headed, headed.transformer, nn.DataParallel(headed)):
        assert module_at(model, "h.1") is module_at(model, "transformer.h.1") is block
    # distilbert's own parts are called transformer, too
    encoder = build("distilbert")
    assert module_at(encoder, "distilbert.transformer.layer.0") is encoder.transformer.layer[0]
    with pytest.raises(UnknownNameError) as caught:
        module_at(headed, "transformer.h.1.mpl.c_fc")
    assert str(caught.value) == (
        "unknown module of 'h.1' 'mpl': did you mean 'mlp'? Known: ln_1, attn, ln_2, mlp. "
        "In path 'transformer.h.1.mpl.c_fc'."
    )
    with pytest.raises(UnknownNameError, match=r"of 'h' '3'.* Known: 0, 1, 2\."):
        module_at(headed, "h.3")
    with pytest.raises(UnknownNameError, match=r"unknown module 'lm_head'.* Known: wte"):
        module_at(headed, "lm_head")


def test_base_model() -> None:
    headed = transformers.GPT2LMHeadModel(config_of("gpt2"))
    assert base_model(headed) is base_model(headed.transformer) is headed.transformer
    assert base_model(torch.compile(headed)) is headed.transformer
    plain = nn.Linear(2, 2)
    assert base_model(plain) is plain
    shape = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4}
    t5 = transformers.T5Config(vocab_size=64, **shape)
    with torch.device("meta"), pytest.raises(ModelError, match="t5 is an encoder-decoder"):
        base_model(transformers.T5ForConditionalGeneration(t5))


class Twice(nn.Module):
    """Runs one layer twice and never the other."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.used(self.used(torch.zeros(*input_ids.shape, 4)))


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_module_that_runs_twice() -> None:
    model = Twice()
    points = [HookPoint("own", 2, "used", "output")]
    with pytest.raises(CaptureError, match=r"'own', layer 2: module 'used' ran more than once"):
        read(model, points, {"input_ids": torch.zeros(1, 2)})
    assert hooks_of(model) == 0


def test_module_that_sees_a_part_of_the_tokens() -> None:
    config = config_of("bert")
    config.chunk_size_feed_forward = 1
    model = transformers.AutoModel.from_config(config).eval()
    inputs = batch_inputs(model, SEQUENCES[:1])
    message = r"intermediate.dense': its input of shape \(1, 1, 32\) has no row for each of the 7"
    with pytest.raises(CaptureError, match=message):
        read(model, points_of("bert"), inputs)
    only_one = batch_inputs(model, [np.array([3])])
    assert len(read(model, points_of("bert"), only_one)) == len(points_of("bert"))


def test_module_that_does_not_run() -> None:
    model = Twice()
    points = [
        HookPoint("own", layer, "spare", side) for layer, side in ((1, "input"), (2, "output"))
    ]
    with pytest.raises(
        CaptureError, match=r"layer 1: module 'spare' did not run .* \(and 1 more\)"
    ):
        read(model, points, {"input_ids": torch.zeros(1, 2)})
    assert hooks_of(model) == 0


def test_projection_that_is_computed_without_its_module() -> None:
    config = config_of("bloom")
    config.pretraining_tp, config.slow_but_exact = 2, True
    model = transformers.AutoModel.from_config(config).eval()
    with pytest.raises(CaptureError, match=r"'h.0.self_attention.dense' did not run"):
        read(model, points_of("bloom"), batch_inputs(model, SEQUENCES[:1]))


def test_each_forward_pass_is_counted_for_itself() -> None:
    model, points = build("gpt2"), points_of("gpt2")
    seen: list[int] = []
    inputs = batch_inputs(model, SEQUENCES)
    with torch.inference_mode():
        with capture(model, points, lambda i, value: seen.append(i)) as state:
            for _ in range(3):
                model(**inputs)
                state.done()
            with pytest.raises(CaptureError, match="did not run"):
                state.done()
            model(**inputs)
            with pytest.raises(CaptureError, match="more than once"):
                model(**inputs)
        assert sorted(seen[: len(points)]) == list(range(len(points)))
        count = len(seen)
        model(**inputs)
    assert len(seen) == count


def test_hooks_are_removed_after_an_exception() -> None:
    model, points = build("opt"), points_of("opt")
    before = hooks_of(model)

    def receive(i: int, value: Tensor) -> None:
        raise KeyError("full")

    with pytest.raises(KeyError, match="full"), capture(model, points, receive):
        assert hooks_of(model) > before
        model(**batch_inputs(model, SEQUENCES))
    assert hooks_of(model) == before
    wrong = [*points, HookPoint("own", 0, "nowhere", "output")]
    with pytest.raises(UnknownNameError), capture(model, wrong, receive):
        pass
    assert hooks_of(model) == before


def test_points_of_one_module_share_a_hook() -> None:
    model = build("gpt2")
    before = hooks_of(model)
    points = resolve(model.config.to_dict(), ["hidden", "resid_pre"], 1)
    with capture(model, points, lambda i, value: None):
        assert hooks_of(model) == before + 2  # one more counts the batch's tokens


def test_values_that_are_no_activations() -> None:
    inputs = batch_inputs(build("llama"), [SEQUENCES[0], SEQUENCES[0] + 1])
    for path, side, what in [
        ("embed_tokens", "input", "is a tensor of torch.int64, not activations"),
        # cosines of the positions, the same for each sequence of the batch
        ("rotary_emb", "output", "of shape (1, 7, 8) has no row for each of the 14 tokens"),
    ]:
        point = HookPoint("own", 0, path, side)
        with pytest.raises(CaptureError, match=re.escape(f"'{path}': its {side} {what}")):
            read(build("llama"), [point], inputs)


def test_input_that_is_given_by_name() -> None:
    model = build("llama")
    inputs = batch_inputs(model, SEQUENCES[:1])
    points = [
        HookPoint("attention", 0, "layers.0.self_attn", "input"),
        HookPoint("norm", 0, "layers.0.input_layernorm", "output"),
    ]
    by_name, positional = read(model, points, inputs)
    assert torch.equal(by_name, positional)


def test_mixture_of_experts_by_path() -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 64}
    config = transformers.MixtralConfig(
        **shape, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4
    )
    model = transformers.AutoModel.from_config(config).eval()
    with pytest.raises(ModelError, match="mixture of experts"):
        resolve(config.to_dict(), ["mlp_post"])
    points = resolve(config.to_dict(), ["experts=model.layers.{layer}.mlp", "block=layers.{layer}"])
    assert {width for width, _ in probe(model, points)} == {16}
    assert len(read(model, points, batch_inputs(model, SEQUENCES))) == 4


# Loading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny model, with its head and without a tokenizer."""
    path = tmp_path / "models" / "tiny-gpt2"
    transformers.GPT2LMHeadModel(config_of("gpt2")).save_pretrained(path)
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_load(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load_model(str(folder))
    assert type(model).__name__ == "GPT2Model"
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32
    assert tokenizer is None
    for dtype in ("bfloat16", "float16"):
        model, _ = load_model(str(folder), dtype=dtype, device="cpu")
        assert next(model.parameters()).dtype == getattr(torch, dtype)
    assert capfd.readouterr() == ("", "")


def test_load_the_packaged_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actstore.demo.MODEL_DIR", folder)
    assert type(load_model("demo")[0]).__name__ == "GPT2Model"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_load_without_weights(folder: Path, dtype: str) -> None:
    transformers.GPT2LMHeadModel(config_of("gpt2")).to(getattr(torch, dtype)).save_pretrained(
        folder
    )
    real, _ = load_model(str(folder))
    meta, _ = load_model(str(folder), meta=True)
    assert all(parameter.is_meta for parameter in meta.parameters())
    points = resolve(real.config.to_dict(), list(STAGES))
    assert probe(meta, points) == probe(real, points)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace(f'"{dtype}"', "null"))
    assert next(load_model(str(folder), meta=True)[0].parameters()).dtype == getattr(torch, dtype)


def test_load_with_a_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    _, tokenizer = load_model(str(folder))
    assert tokenizer("b")["input_ids"] == [1]


def test_model_that_is_not_there(folder: Path, offline: None) -> None:
    near = str(folder.parent / "tiny-gpt")
    with pytest.raises(ModelError, match=rf"no folder '{near}'; did you mean '{folder}'"):
        load_model(near)
    with pytest.raises(ModelError, match=r"nor '.*nowhere'\..*Give a folder with config.json"):
        load_model(str(folder.parent / "nowhere" / "tiny"))
    with pytest.raises(ModelError, match=r"no folder 'gtp2'.* On the Hugging Face hub: ") as caught:
        load_model("gtp2")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"the folder has no config.json \(tiny-gpt2\)"):
        load_model(str(folder.parent))
    with pytest.raises(ModelError, match="is a file; give the folder"):
        load_model(str(folder / "config.json"))


def test_model_that_cannot_be_loaded(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.rename(folder / "elsewhere")
    with pytest.raises(ModelError, match=r"cannot load model .* no file named model.safetensors"):
        load_model(str(folder))
    torch.save({}, folder / "pytorch_model.bin")  # a pickle
    with pytest.raises(ModelError, match="cannot load model"):
        load_model(str(folder))
    weights.write_bytes(b"\0" * 100)
    with pytest.raises(ModelError, match="cannot load model"):
        load_model(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config"):
        load_model(str(folder))


def test_weights_that_lack_a_part(folder: Path) -> None:
    # transformers would fill it with random numbers and go on
    config = config_of("gpt2")
    config.n_layer = N_LAYERS + 1
    config.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"its weights lack 12 .* such as 'h\.3\."):
        load_model(str(folder))


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\(t5\) is an encoder-decoder"):
        load_model(str(tmp_path))


def test_unknown_dtype_and_device(folder: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown dtype 'float61': did you mean 'float16'"):
        load_model(str(folder), dtype="float61")
    with pytest.raises(UnknownNameError, match="unknown device 'cudo': did you mean 'cuda'"):
        load_model(str(folder), device="cudo")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="sees no GPU on this machine; use 'auto' or 'cpu'"):
            load_model(str(folder), device="cuda")
