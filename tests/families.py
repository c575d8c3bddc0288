"""Tiny random models of every family, with the facts of their architecture.

The facts are written down from transformers' modelling code, apart from actstore/hookpoints.py,
and say which modules a block's values pass through; the tests recompute the stages from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn

N_LAYERS, VOCAB, D_MODEL, D_MLP, HEADS = 3, 64, 32, 40, 4


@dataclass(frozen=True)
class Facts:
    """How a block computes; paths are relative to the block."""

    config: str  # transformers' configuration class
    blocks: str  # where the blocks are
    out: str  # output projection of attention
    up: str
    down: str
    act: str
    norm: str | None = None  # what the MLP's input passes through first
    linear: str | None = None  # gated MLPs: the branch without a nonlinearity
    post: tuple[str, str] | None = None  # norms of what attention and MLP add
    after: tuple[str, str] | None = None  # norms after the sums (post-norm blocks)
    parallel: bool = False
    stream: tuple[str, str] | None = None  # norms that the stream itself passes through
    kwargs: dict[str, Any] = field(default_factory=dict)


def _change(facts: Facts, **changes: Any) -> Facts:
    kwargs = facts.kwargs | changes.pop("kwargs", {})
    return replace(facts, kwargs=kwargs, **changes)


_SHAPE = {
    "num_hidden_layers": N_LAYERS,
    "hidden_size": D_MODEL,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
_STANDARD = _SHAPE | {"intermediate_size": D_MLP}
_OLD = {
    "n_layer": N_LAYERS,
    "n_embd": D_MODEL,
    "n_head": HEADS,
    "n_positions": 64,
    "n_inner": D_MLP,
}

_gpt2 = Facts("GPT2Config", "h", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "mlp.act", "ln_2")
_gpt2 = _change(_gpt2, kwargs=_OLD)
_neox = Facts(
    "GPTNeoXConfig",
    "layers",
    "attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
    "mlp.act",
    "post_attention_layernorm",
    parallel=True,
    kwargs=_STANDARD | {"use_parallel_residual": True},
)
_opt = Facts(
    "OPTConfig",
    "decoder.layers",
    "self_attn.out_proj",
    "fc1",
    "fc2",
    "activation_fn",
    "final_layer_norm",
    kwargs=_SHAPE | {"ffn_dim": D_MLP, "word_embed_proj_dim": D_MODEL},
)
_bloom = Facts(
    "BloomConfig",
    "h",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
    "mlp.gelu_impl",
    "post_attention_layernorm",
    kwargs={"n_layer": N_LAYERS, "hidden_size": D_MODEL, "n_head": HEADS},
)
_falcon = Facts(
    "FalconConfig",
    "h",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
    "mlp.act",
    "input_layernorm",
    parallel=True,
    kwargs={
        "num_hidden_layers": N_LAYERS,
        "hidden_size": D_MODEL,
        "num_attention_heads": HEADS,
        "ffn_hidden_size": D_MLP,
    },
)
_llama = Facts(
    "LlamaConfig",
    "layers",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.act_fn",
    "post_attention_layernorm",
    linear="mlp.up_proj",
    kwargs=_STANDARD | {"num_key_value_heads": 2, "pad_token_id": None},
)
_gemma2 = _change(
    _llama,
    config="Gemma2Config",
    norm="pre_feedforward_layernorm",
    post=("post_attention_layernorm", "post_feedforward_layernorm"),
    kwargs={"head_dim": 12, "sliding_window": 4},  # heads wider than the stream
)
_gemma3 = _change(
    _gemma2,
    config="Gemma3TextConfig",
    kwargs={
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
)
_bert = Facts(
    "BertConfig",
    "encoder.layer",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
    "intermediate.intermediate_act_fn",
    after=("attention.output.LayerNorm", "output.LayerNorm"),
    kwargs=_STANDARD,
)
_roberta = _change(_bert, config="RobertaConfig", kwargs={"pad_token_id": 1})

FAMILIES: dict[str, Facts] = {
    "gpt2": _gpt2,
    "gpt2-padded": _change(_gpt2, kwargs={"pad_token_id": 0}),
    "gpt_bigcode": _change(_gpt2, config="GPTBigCodeConfig"),
    "gpt_neo": _change(
        _gpt2,
        config="GPTNeoConfig",
        out="attn.attention.out_proj",
        kwargs={
            "num_layers": N_LAYERS,
            "hidden_size": D_MODEL,
            "num_heads": HEADS,
            "intermediate_size": D_MLP,
            "max_position_embeddings": 64,
            "window_size": 4,
            "attention_types": [[["global", "local", "global"], 1]],
        },
    ),
    "gpt_neox": _neox,
    "gpt_neox-sequential": _change(_neox, parallel=False, kwargs={"use_parallel_residual": False}),
    "gptj": _change(
        _gpt2,
        config="GPTJConfig",
        out="attn.out_proj",
        up="mlp.fc_in",
        down="mlp.fc_out",
        norm="ln_1",
        parallel=True,
        kwargs={"rotary_dim": 4},
    ),
    "opt": _opt,
    "opt-removed-final-norm": _change(_opt, kwargs={"_remove_final_layer_norm": True}),
    "opt-350m": _change(
        _opt,
        norm=None,
        after=("self_attn_layer_norm", "final_layer_norm"),
        kwargs={"do_layer_norm_before": False, "word_embed_proj_dim": 24},
    ),
    "bloom": _bloom,
    "bloom-residual-after-norm": _change(
        _bloom,
        stream=("input_layernorm", "post_attention_layernorm"),
        kwargs={"apply_residual_connection_post_layernorm": True},
    ),
    "falcon-7b": _falcon,
    "falcon-40b": _change(
        _falcon, norm="ln_mlp", kwargs={"new_decoder_architecture": True, "num_kv_heads": 2}
    ),
    "falcon-11b": _change(
        _falcon,
        kwargs={"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-rw": _change(
        _falcon,
        norm="post_attention_layernorm",
        parallel=False,
        kwargs={"parallel_attn": False, "alibi": True, "multi_query": False, "bias": True},
    ),
    "llama": _llama,
    "llama-biased": _change(_llama, kwargs={"mlp_bias": True, "attention_bias": True}),
    "mistral": _change(_llama, config="MistralConfig", kwargs={"sliding_window": 4}),
    "qwen2": _change(_llama, config="Qwen2Config"),
    "qwen3": _change(_llama, config="Qwen3Config", kwargs={"head_dim": 12}),
    "smollm3": _change(_llama, config="SmolLM3Config"),
    "starcoder2": _change(
        _llama,
        config="Starcoder2Config",
        up="mlp.c_fc",
        down="mlp.c_proj",
        act="mlp.act",
        linear=None,
    ),
    "olmo": _change(_llama, config="OlmoConfig"),
    "olmo2": _change(
        _llama,
        config="Olmo2Config",
        norm=None,
        post=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "gemma": _change(_llama, config="GemmaConfig", kwargs={"head_dim": 12, "pad_token_id": 0}),
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gemma3_text-bidirectional": _change(_gemma3, kwargs={"use_bidirectional_attention": True}),
    "gemma3": _change(_gemma3, config="Gemma3Config", blocks="language_model.layers"),
    "phi": _change(
        _llama,
        config="PhiConfig",
        out="self_attn.dense",
        up="mlp.fc1",
        down="mlp.fc2",
        act="mlp.activation_fn",
        norm="input_layernorm",
        linear=None,
        parallel=True,
    ),
    "phi3": _change(
        _llama,
        config="Phi3Config",
        act="mlp.activation_fn",
        kwargs={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    ),
    "bert": _bert,
    "bert-decoder": _change(_bert, kwargs={"is_decoder": True}),
    "electra": _change(_bert, config="ElectraConfig", kwargs={"embedding_size": 24}),
    "roberta": _roberta,
    "camembert": _change(_roberta, config="CamembertConfig"),
    "xlm-roberta": _change(_roberta, config="XLMRobertaConfig"),
    "mpnet": _change(
        _bert,
        config="MPNetConfig",
        out="attention.attn.o",
        after=("attention.LayerNorm", "output.LayerNorm"),
        kwargs={"pad_token_id": 1},
    ),
    "distilbert": Facts(
        "DistilBertConfig",
        "transformer.layer",
        "attention.out_lin",
        "ffn.lin1",
        "ffn.lin2",
        "ffn.activation",
        after=("sa_layer_norm", "output_layer_norm"),
        kwargs={
            "n_layers": N_LAYERS,
            "dim": D_MODEL,
            "hidden_dim": D_MLP,
            "n_heads": HEADS,
            "max_position_embeddings": 64,
        },
    ),
}


def config_of(name: str) -> transformers.PreTrainedConfig:
    """The tiny configuration of a case."""
    facts = FAMILIES[name]
    kwargs = {"vocab_size": VOCAB, "bos_token_id": 2, "eos_token_id": 2} | facts.kwargs
    if facts.config == "Gemma3Config":
        vision = {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 8,
            "patch_size": 4,
        }
        return transformers.Gemma3Config(
            text_config=transformers.Gemma3TextConfig(**kwargs),
            vision_config=vision,
            mm_tokens_per_image=4,
        )
    return getattr(transformers, facts.config)(**kwargs)


@cache
def build(name: str, device: str = "cpu") -> nn.Module:
    """A model whose every parameter is random: no norm, bias or embedding is an identity."""
    config = config_of(name)
    with torch.device(device):
        model = transformers.AutoModel.from_config(config).eval().requires_grad_(False)
    if device != "meta":
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * (0.3 if parameter.ndim < 2 else 0.2))
    return model
