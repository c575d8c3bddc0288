"""Stage and layer to module path, by model family. Strings only: neither torch nor transformers.

A family is one `Block`: the names of the few modules from which every stage follows. What a
configuration flag changes (`use_parallel_residual`, `do_layer_norm_before`, ...) is a function of
the configuration in the same table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from .aliases import stage_of, stages_of
from .errors import ModelError, UnknownNameError, UsageError
from .schema import STAGES, pick

__all__ = ["FAMILIES", "Block", "HookPoint", "families", "head_count", "layer_numbers", "resolve"]

Config = Mapping[str, Any]

PATH_FORM = "name=path.with.{layer}.in.it[:input|:output]"

RESERVED = frozenset(
    {"inputs", "sequences", "vocabulary", "sketch", "predictions", "outcomes", "journal"}
)
"""Names of the store's other groups, which no stage may take."""


@dataclass(frozen=True)
class HookPoint:
    """One place where a value is read in the forward pass.

    Attributes
    ----------
    stage : str
        Group name in the store.
    layer : int
        Layer coordinate.
    path : str
        Dotted module path, relative to the model without its head (``h.3.mlp.c_proj``).
    side : str
        "input" or "output" of that module.
    columns : tuple of int, optional
        Slice of the last dimension, where a module computes several things at once.
    """

    stage: str
    layer: int
    path: str
    side: str
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class Block:
    """Where a family keeps what the stages need; module paths within a block, unless said.

    Attributes
    ----------
    blocks : str
        The list of blocks, a path in the model.
    final : str, optional
        What computes the last hidden state, a path in the model (None: the last block itself).
    mid : str, optional
        ``path:side`` of the residual stream between attention and MLP (None: a parallel block).
    attn, up, down : str
        Output projection of attention; the MLP's first projection (gated: the gate) and its last.
    attn_norm, mlp_norm : str, optional
        Norms through which a projection's output passes before it is added to the stream.
    fused_gate : bool
        `up` computes gate and up side by side; the gate is the first half.
    """

    blocks: str
    final: str | None
    mid: str | None
    attn: str
    up: str
    down: str
    attn_norm: str | None = None
    mlp_norm: str | None = None
    fused_gate: bool = False


_GPT2 = Block("h", "ln_f", "ln_2:input", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_LLAMA = Block(
    "layers",
    "norm",
    "post_attention_layernorm:input",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
)
# Both projections pass through a norm on their way to the stream; gemma2 has norms before, too.
_OLMO2 = replace(
    _LLAMA,
    mid="mlp:input",
    attn_norm="post_attention_layernorm",
    mlp_norm="post_feedforward_layernorm",
)
_GEMMA2 = replace(_OLMO2, mid="pre_feedforward_layernorm:input")
# Encoders normalise after the sum: the stream is what the next part reads, after that norm.
_BERT = Block(
    "encoder.layer",
    None,
    "attention.output:output",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
# bloom's attention and MLP modules add the residual themselves, hence the projections within.
_BLOOM = Block(
    "h",
    "ln_f",
    "post_attention_layernorm:input",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)
_NEOX = replace(_BLOOM, blocks="layers", final="final_layer_norm", attn="attention.dense")


def _gpt_neox(config: Config) -> Block:
    return replace(_NEOX, mid=None) if config.get("use_parallel_residual", True) else _NEOX


def _falcon(config: Config) -> Block:
    parallel = config.get("parallel_attn", True) or config.get("new_decoder_architecture", False)
    return replace(_BLOOM, mid=None) if parallel else _BLOOM


def _opt(config: Config) -> Block:
    pre = config.get("do_layer_norm_before", True)
    width = config.get("hidden_size")
    final: str | None = None
    if config.get("word_embed_proj_dim", width) != width:
        final = "decoder.project_out"
    elif pre and not config.get("_remove_final_layer_norm", False):
        final = "decoder.final_layer_norm"
    mid = "final_layer_norm:input" if pre else "self_attn_layer_norm:output"
    return Block("decoder.layers", final, mid, "self_attn.out_proj", "fc1", "fc2")


FAMILIES: dict[str, Block | Callable[[Config], Block]] = {
    **dict.fromkeys(("gemma", "llama", "mistral", "olmo", "qwen2", "qwen3", "smollm3"), _LLAMA),
    **dict.fromkeys(("bert", "camembert", "electra", "roberta", "xlm-roberta"), _BERT),
    "bloom": _BLOOM,
    "distilbert": Block(
        "transformer.layer",
        None,
        "sa_layer_norm:output",
        "attention.out_lin",
        "ffn.lin1",
        "ffn.lin2",
    ),
    "falcon": _falcon,
    "gemma2": _GEMMA2,
    "gemma3": replace(_GEMMA2, blocks="language_model.layers", final="language_model.norm"),
    "gemma3_text": _GEMMA2,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": replace(_GPT2, attn="attn.attention.out_proj"),
    "gpt_neox": _gpt_neox,
    "gptj": Block("h", "ln_f", None, "attn.out_proj", "mlp.fc_in", "mlp.fc_out"),
    "mpnet": replace(_BERT, mid="attention.LayerNorm:output", attn="attention.attn.o"),
    "olmo2": _OLMO2,
    "opt": _opt,
    "phi": Block("layers", "final_layernorm", None, "self_attn.dense", "mlp.fc1", "mlp.fc2"),
    "phi3": replace(_LLAMA, up="mlp.gate_up_proj", fused_gate=True),
    "starcoder2": replace(_LLAMA, up="mlp.c_fc", down="mlp.c_proj"),
}
"""Model type to its `Block`, or to a function of the configuration that gives it."""


def families() -> list[str]:
    """Names of the model families (transformers' `model_type`) whose stages are known.

    Examples
    --------
    >>> "gpt2" in families()
    True
    """
    return sorted(FAMILIES)


def head_count(config: Config) -> int | None:
    """Number of (query) heads: `attn_z` is that many runs of equal width. None if unknown.

    Examples
    --------
    >>> head_count({"n_head": 12})
    12
    """
    return _number(config, ("num_attention_heads", "n_head", "n_heads", "num_heads"))


def layer_numbers(config: Config, stage: str) -> range:
    """The layers at which a stage exists.

    Parameters
    ----------
    config : mapping
        The model's configuration (``model.config.to_dict()``).
    stage : str
        A stage name or a path form.

    Returns
    -------
    range
        0 to n_layers - 1; `hidden` has one more; a path without ``{layer}`` has only layer 0.

    Examples
    --------
    >>> layer_numbers({"n_layer": 12}, "mlp_in"), layer_numbers({"n_layer": 12}, "hidden")
    (range(0, 12), range(0, 13))
    """
    if _has_one_place(stage):
        return range(1)
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    count = _number(config, names)
    if count is None:
        raise ModelError(
            f"the model's configuration does not say how many layers it has (none of "
            f"{', '.join(names)} is there); give paths without {{layer}}, as in "
            "'last=layers.11.mlp:output'"
        )
    return range(count + (stage == "hidden"))


def resolve(
    config: Config, stages: Sequence[str], layers: str | int | Sequence[int] | None = None
) -> list[HookPoint]:
    """The places at which stages are read, in the order asked for, layers ascending.

    Parameters
    ----------
    config : mapping
        The model's configuration (``model.config.to_dict()``).
    stages : sequence of str
        Names out of `schema.STAGES`, path forms
        ``name=path.with.{layer}.in.it[:input|:output]`` (the output unless said), with paths
        relative to the model with or without its head, or names of TransformerLens, as
        ``blocks.3.mlp.hook_post`` (that layer) or ``mlp.hook_post``.
    layers : str, int, sequence of int or None
        Such as ``"0,3-5"`` or ``"-1"``; counted from the end, a number means each stage's own
        (the last `hidden` is one past the last block). A stage that lacks one of the layers is
        taken where it exists. Paths without ``{layer}`` are always taken.

    Returns
    -------
    list of HookPoint

    Raises
    ------
    UnknownNameError
        A stage or a layer that is not there.
    UsageError
        A path form that cannot be read, or a name that is taken.
    ModelError
        An unknown family, a mixture of experts, or a stage the family does not have.

    Examples
    --------
    >>> config = {"model_type": "gpt2", "n_layer": 12}
    >>> for point in resolve(config, ["mlp_post", "ln=h.{layer}.ln_1"], "-1"):
    ...     print(point.stage, point.layer, point.path, point.side)
    mlp_post 11 h.11.mlp.c_proj input
    ln 11 h.11.ln_1 output
    """
    entries = list(dict.fromkeys(stages.split(",") if isinstance(stages, str) else stages))
    if not entries:
        raise UsageError(f"no stages were asked for; known stages: {', '.join(STAGES)}")
    paths = _parse_paths([entry for entry in entries if "=" in entry])
    hint = f"Any other module is reached by path: {PATH_FORM}."
    own = stages_of((e for e in entries if e not in paths), layers, STAGES, config, hint=hint)
    if own:
        _block(config)  # an unknown family is the first thing to say
    asked = (e if e in paths else stage_of(e, STAGES, config)[0] for e in entries)
    points = []
    for entry, chosen in _choose(config, list(dict.fromkeys(asked)), layers).items():
        named = own.get(entry)
        for layer in chosen if named is None else pick(named, chosen, "layer"):
            if entry in paths:
                name, path, side = paths[entry]
                points.append(HookPoint(name, layer, path.replace("{layer}", str(layer)), side))
            else:
                points.append(_point(config, entry, layer))
    return points


def _point(config: Config, stage: str, layer: int) -> HookPoint:
    """One stage of one layer, from its family's `Block`."""
    block = _block(config)
    here = f"{block.blocks}.{layer}"
    if stage == "hidden":
        if layer < len(layer_numbers(config, "hidden")) - 1:
            return HookPoint(stage, layer, here, "input")
        last = block.final or f"{block.blocks}.{layer - 1}"
        return HookPoint(stage, layer, last, "output")
    if stage == "resid_mid" and block.mid is None:
        raise ModelError(
            f"{config['model_type']} has no stage 'resid_mid': in its parallel blocks attention "
            "and MLP read the same input, so nothing lies between them. Take 'resid_pre', "
            "'attn_out', 'mlp_out' or 'resid_post' instead."
        )
    places = {
        "resid_pre": ":input",
        "resid_mid": block.mid or "",
        "resid_post": ":output",
        "attn_z": f"{block.attn}:input",
        "attn_out": f"{block.attn_norm or block.attn}:output",
        "mlp_in": f"{block.up}:input",
        "mlp_pre": f"{block.up}:output",
        "mlp_post": f"{block.down}:input",
        "mlp_out": f"{block.mlp_norm or block.down}:output",
    }
    path, side = places[stage].split(":")
    columns = None
    if stage == "mlp_pre" and block.fused_gate:
        columns = (0, int(config["intermediate_size"]))
    return HookPoint(stage, layer, f"{here}.{path}" if path else here, side, columns)


def _block(config: Config) -> Block:
    """The `Block` of a configuration's family, or why there is none."""
    family = config.get("model_type")
    entry = FAMILIES.get(str(family))
    if entry is not None:
        return entry(config) if callable(entry) else entry
    way = (
        f"Any module is reached by path, {PATH_FORM}, for example "
        "'block=layers.{layer}:output' or 'experts=layers.{layer}.mlp:output' (print the model "
        "to see its names)."
    )
    if _has_experts(config):
        raise ModelError(
            f"{family} is a mixture of experts: it has no one dense MLP, so the stage names do "
            f"not apply. {way}"
        )
    near = get_close_matches(str(family), FAMILIES, n=1)
    raise ModelError(
        f"unknown model family {family!r}"
        + (f": the nearest known is {near[0]!r}" if near else "")
        + f". Known: {', '.join(families())}. {way}"
    )


def _has_experts(config: Config) -> bool:
    text = _text(config)
    keys = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")
    named = "moe" in str(config.get("model_type")).lower()
    return named or any(text.get(key) for key in keys)


def _text(config: Config) -> Config:
    """The text part of a multimodal configuration, otherwise the configuration itself."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _number(config: Config, names: Iterable[str]) -> int | None:
    text = _text(config)
    return next((int(text[name]) for name in names if text.get(name) is not None), None)


def _parse_paths(entries: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Path forms to (name, path, side)."""
    used = dict.fromkeys(STAGES, "a stage") | dict.fromkeys(RESERVED, "a group of the store")
    parsed = {}
    for entry in entries:
        name, _, place = entry.partition("=")
        path, colon, side = place.partition(":")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            raise UsageError(
                f"stage {entry!r}: {name!r} is not a name; use letters, digits and _, beginning "
                f"with a letter, as in {PATH_FORM}"
            )
        if name in used:
            raise UsageError(
                f"stage {entry!r}: the name {name!r} is already that of {used[name]}; choose "
                f"another, for example '{name}_2'"
            )
        if not re.fullmatch(r"\w+(\.\w+)*", path.replace("{layer}", "0")):
            raise UsageError(
                f"stage {entry!r}: {path!r} is not a module path; write it as in "
                "'up=h.{layer}.mlp.c_fc:output'"
            )
        if colon and side not in ("input", "output"):
            raise UnknownNameError("side", side, ("input", "output"), f"Write {PATH_FORM}.")
        used[name] = f"the stage {entry!r}"
        parsed[entry] = (name, path, side or "output")
    return parsed


def _choose(
    config: Config, entries: Sequence[str], layers: str | int | Sequence[int] | None
) -> dict[str, list[int]]:
    """The layers of each stage that `layers` names; a number that no stage has is an error."""
    own = {entry: layer_numbers(config, entry) for entry in entries}
    layered = [entry for entry in entries if not _has_one_place(entry)]
    if layers is None or not layered:
        return {entry: list(numbers) for entry, numbers in own.items()}
    if isinstance(layers, str):
        parts: list[Any] = [part.strip() for part in layers.split(",")]
    else:
        parts = list(layers) if isinstance(layers, Iterable) else [layers]
    if not parts:
        raise UsageError("no layers were asked for; leave layers out to take all of them")
    longest = max((own[entry] for entry in layered), key=len)  # all begin at 0, so it has them all
    chosen: dict[str, set[int]] = {entry: set() for entry in layered}
    for part in parts:
        named = pick(part, longest, "layer")
        from_end = str(part).startswith("-")  # counted from the end of each stage's own layers
        for entry in layered:
            shift = len(longest) - len(own[entry]) if from_end else 0
            chosen[entry].update(n - shift for n in named if n - shift in own[entry])
    return {entry: sorted(chosen.get(entry, own[entry])) for entry in entries}


def _has_one_place(entry: str) -> bool:
    """A path form that names one module, not one in each layer."""
    return "=" in entry and "{layer}" not in entry
