"""Stage and layer to module path: names, layers, refusals. No torch here."""

from __future__ import annotations

import subprocess
import sys

import pytest

from actstore.errors import ModelError, UnknownNameError, UsageError
from actstore.hookpoints import HookPoint, families, head_count, layer_numbers, resolve
from actstore.schema import STAGES

GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_head": 12}
PARALLEL = [
    {"model_type": "gptj", "n_layer": 2},
    {"model_type": "phi", "num_hidden_layers": 2},
    {"model_type": "gpt_neox", "num_hidden_layers": 2, "use_parallel_residual": True},
    {"model_type": "falcon", "num_hidden_layers": 2, "parallel_attn": True},
    {
        "model_type": "falcon",
        "num_hidden_layers": 2,
        "parallel_attn": False,
        "new_decoder_architecture": True,
    },
]


def layers_of(points: list[HookPoint], stage: str) -> list[int]:
    return [point.layer for point in points if point.stage == stage]


def test_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, actstore.hookpoints; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_stage_of_gpt2() -> None:
    points = {point.stage: point for point in resolve(GPT2, list(STAGES), [3])}
    assert list(points) == list(STAGES)
    places = {stage: f"{point.path}:{point.side}" for stage, point in points.items()}
    assert places == {
        "hidden": "h.3:input",
        "resid_pre": "h.3:input",
        "resid_mid": "h.3.ln_2:input",
        "resid_post": "h.3:output",
        "attn_z": "h.3.attn.c_proj:input",
        "attn_out": "h.3.attn.c_proj:output",
        "mlp_in": "h.3.mlp.c_fc:input",
        "mlp_pre": "h.3.mlp.c_fc:output",
        "mlp_post": "h.3.mlp.c_proj:input",
        "mlp_out": "h.3.mlp.c_proj:output",
    }


def test_all_layers_by_default() -> None:
    points = resolve(GPT2, ["hidden", "mlp_in"])
    assert layers_of(points, "hidden") == list(range(13))
    assert layers_of(points, "mlp_in") == list(range(12))
    assert points[12] == HookPoint("hidden", 12, "ln_f", "output")


@pytest.mark.parametrize(
    ("layers", "hidden", "mlp_in"),
    [
        ("-1", [12], [11]),  # each stage's own last
        ("-13", [0], []),
        ("12", [12], []),
        ("10-12,0", [0, 10, 11, 12], [0, 10, 11]),
        (" 0 , 3-5 ", [0, 3, 4, 5], [0, 3, 4, 5]),
        ([-1, 0], [0, 12], [0, 11]),
        (5, [5], [5]),
        ((3, 3), [3], [3]),
    ],
)
def test_layers(layers: object, hidden: list[int], mlp_in: list[int]) -> None:
    points = resolve(GPT2, ["hidden", "mlp_in"], layers)  # type: ignore[arg-type]
    assert layers_of(points, "hidden") == hidden
    assert layers_of(points, "mlp_in") == mlp_in


@pytest.mark.parametrize("layers", ["13", "-14", "12-13", [99], "3,20"])
def test_layer_that_no_stage_has(layers: object) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown layer .* Known: 0, 1, 2, 3"):
        resolve(GPT2, ["hidden", "mlp_in"], layers)  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", ["", "a", "5-3", "1.5", "--1"])
def test_layers_that_cannot_be_read(layers: str) -> None:
    with pytest.raises(UsageError, match="write"):
        resolve(GPT2, ["mlp_in"], layers)


def test_no_layers_and_no_stages() -> None:
    with pytest.raises(UsageError, match="no layers"):
        resolve(GPT2, ["mlp_in"], [])
    with pytest.raises(UsageError, match=r"no stages.*mlp_post"):
        resolve(GPT2, [])


def test_a_comma_list_and_repeats() -> None:
    assert resolve(GPT2, "mlp_in,mlp_out,mlp_in", 0) == resolve(GPT2, ["mlp_in", "mlp_out"], "0")


def test_unknown_stage() -> None:
    with pytest.raises(UnknownNameError) as caught:
        resolve(GPT2, ["mlp_pots"])
    message = str(caught.value)
    assert "did you mean 'mlp_post'?" in message
    assert all(stage in message for stage in STAGES)
    assert "name=path.with.{layer}.in.it[:input|:output]" in message


def test_path_forms() -> None:
    stages = ["gate=h.{layer}.mlp.act:input", "mlp_in", "emb=wte", "deep=a.{layer}.b.{layer}"]
    points = resolve(GPT2, stages, "-2,0")
    assert [(p.stage, p.layer, p.path, p.side) for p in points] == [
        ("gate", 0, "h.0.mlp.act", "input"),
        ("gate", 10, "h.10.mlp.act", "input"),
        ("mlp_in", 0, "h.0.mlp.c_fc", "input"),
        ("mlp_in", 10, "h.10.mlp.c_fc", "input"),
        ("emb", 0, "wte", "output"),  # not in a layer, so not subject to the choice
        ("deep", 0, "a.0.b.0", "output"),
        ("deep", 10, "a.10.b.10", "output"),
    ]
    assert layer_numbers(GPT2, "emb=wte") == range(1)
    assert layer_numbers(GPT2, stages[0]) == range(12)
    assert [p.layer for p in resolve(GPT2, ["emb=wte"], "7")] == [0]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("mlp_in=h.{layer}", "already that of a stage"),
        ("sketch=h.{layer}", "already that of a group of the store"),
        ("0x=h.{layer}", "is not a name"),
        ("a b=h.{layer}", "is not a name"),
        ("_a=h.{layer}", "is not a name"),
        ("=h.{layer}", "is not a name"),
        ("a=", "is not a module path"),
        ("a=:input", "is not a module path"),
        ("a=h.{l}.mlp", "is not a module path"),
        ("a=h..mlp", "is not a module path"),
        ("a=../x", "is not a module path"),
        ("a=h.{layer}:in", "unknown side 'in': did you mean 'input'"),
        ("a=h.{layer}:", "unknown side ''"),
    ],
)
def test_path_forms_that_are_refused(entry: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(GPT2, [entry])


def test_two_paths_of_one_name() -> None:
    with pytest.raises(UsageError, match="already that of the stage 'a=wte'"):
        resolve(GPT2, ["a=wte", "a=wpe"])


@pytest.mark.parametrize("config", PARALLEL, ids=lambda config: config["model_type"])
def test_parallel_blocks_have_no_middle(config: dict) -> None:
    others = [stage for stage in STAGES if stage != "resid_mid"]
    assert len(resolve(config, others)) == 2 * len(others) + 1
    with pytest.raises(ModelError, match="no stage 'resid_mid': in its parallel blocks"):
        resolve(config, ["resid_mid"])


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("mixtral", {"num_local_experts": 8}),
        ("qwen2_moe", {"num_experts": 60}),
        ("olmoe", {"num_experts": 64}),
        ("gpt_oss", {"num_local_experts": 32}),
        ("deepseek_v3", {"n_routed_experts": 256}),
        ("phimoe", {}),
        ("llama4", {"text_config": {"num_local_experts": 16, "num_hidden_layers": 2}}),
    ],
)
def test_mixture_of_experts(family: str, keys: dict) -> None:
    config = {"model_type": family, "num_hidden_layers": 2} | keys
    with pytest.raises(ModelError, match=rf"{family} is a mixture of experts.*layers.{{layer}}"):
        resolve(config, ["mlp_post"])
    points = resolve(config, ["experts=layers.{layer}.mlp"])
    assert [point.path for point in points] == ["layers.0.mlp", "layers.1.mlp"]


def test_unknown_family() -> None:
    with pytest.raises(ModelError) as caught:
        resolve({"model_type": "gpt2x"}, ["mlp_post"])
    message = str(caught.value)
    assert "unknown model family 'gpt2x': the nearest known is 'gpt2'" in message
    assert all(family in message for family in families())
    assert "block=layers.{layer}:output" in message
    with pytest.raises(ModelError, match="unknown model family None"):
        resolve({}, ["hidden"])


def test_unknown_number_of_layers() -> None:
    with pytest.raises(ModelError, match="does not say how many layers"):
        resolve({"model_type": "own"}, ["a=blocks.{layer}"])
    assert len(resolve({"model_type": "own"}, ["a=blocks.3"])) == 1


def test_layers_and_heads_under_every_name() -> None:
    for layers, heads in [
        ("num_hidden_layers", "num_attention_heads"),
        ("n_layer", "n_head"),
        ("n_layers", "n_heads"),
        ("num_layers", "num_heads"),
    ]:
        assert layer_numbers({layers: 5}, "mlp_in") == range(5)
        assert head_count({heads: 4}) == 4
    nested = {"text_config": {"num_hidden_layers": 7, "num_attention_heads": 2}}
    assert layer_numbers(nested, "hidden") == range(8)
    assert head_count(nested) == 2
    assert head_count({}) is None


def test_phi3_gate_is_the_first_half() -> None:
    config = {"model_type": "phi3", "num_hidden_layers": 1, "intermediate_size": 40}
    assert resolve(config, ["mlp_pre"])[0].columns == (0, 40)
    assert resolve(config, ["mlp_post"])[0].columns is None
