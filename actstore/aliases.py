"""TransformerLens' names of places, as other names of stages: ``blocks.3.mlp.hook_post``.

They name the same places of the same pass; TransformerLens gives the same numbers where it runs a
model as it is (``from_pretrained_no_processing``): by default it folds norms into weights and
centres what is written to the residual stream. It keeps the heads of ``attn.hook_z`` apart, which
here lie side by side.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import UnknownNameError, UsageError
from .schema import STAGES

__all__ = ["ALIASES", "only_stage", "stage_of", "stages_of"]

ALIASES: dict[str, str] = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "attn.hook_z": "attn_z",
    "hook_attn_out": "attn_out",
    "mlp.hook_in": "mlp_in",
    "mlp.hook_pre": "mlp_pre",
    "mlp.hook_post": "mlp_post",
    "hook_mlp_out": "mlp_out",
}
"""Names within a block, and the stages that they are."""

_NORM_AFTER = frozenset({"bert", "camembert", "electra", "roberta", "xlm-roberta"})
_PREFIX = re.compile(r"blocks\.(\d{1,6})\.(.+)", re.ASCII)


def stage_of(
    name: str,
    known: Iterable[str] = STAGES,
    config: Mapping[str, Any] | None = None,
    *,
    hint: str = "",
    kind: str = "stage",
) -> tuple[str, int | None]:
    """The stage, and the layer if there is one, that a name means.

    Parameters
    ----------
    name : str
        A stage, or a name out of `ALIASES` by itself (every layer) or behind ``blocks.3.``.
    known : iterable of str
        The stages that there are.
    config : mapping, optional
        The model's configuration, for names that mean another place in some families.
    hint, kind : str
        What a message about an unknown name says besides, and calls it.

    Returns
    -------
    stage : str
    layer : int or None
        None for every layer.

    Raises
    ------
    UnknownNameError
        A name that means none of the stages; with the nearest that does.
    UsageError
        A name that TransformerLens itself uses for different places.

    Examples
    --------
    >>> stage_of("blocks.3.mlp.hook_post"), stage_of("hook_resid_pre"), stage_of("mlp_in")
    (('mlp_post', 3), ('resid_pre', None), ('mlp_in', None))
    """
    known = list(known)
    if name in known:
        return name, None
    found = _PREFIX.fullmatch(name) if isinstance(name, str) else None
    layer, inner = (int(found[1]), found[2]) if found else (None, name)
    if inner == "hook_mlp_in":
        raise UsageError(
            f"{name!r}: TransformerLens uses hook_mlp_in for two places, the stream before the "
            "MLP's norm (in a HookedTransformer) and what enters the MLP after it (in a "
            "TransformerBridge). Ask for 'resid_mid' (in parallel blocks 'resid_pre') or 'mlp_in'"
        )
    stage = ALIASES.get(inner)
    if stage is not None:
        _check_place(stage, name, config)
        if stage not in known:
            raise UnknownNameError(kind, stage, known, f"{name!r} is that stage. {hint}".strip())
        return stage, layer
    if "hook_" not in str(name):
        raise UnknownNameError(kind, name, known, hint)
    understood = [_behind(layer, n) for n, s in ALIASES.items() if s in known]
    raise UnknownNameError(kind, name, [*known, *understood], hint)


def only_stage(
    name: str,
    known: Iterable[str] = STAGES,
    config: Mapping[str, Any] | None = None,
    *,
    kind: str = "stage",
) -> str:
    """`stage_of` where layers are said elsewhere.

    Examples
    --------
    >>> only_stage("hook_mlp_out")
    'mlp_out'
    """
    stage, layer = stage_of(name, known, config, kind=kind)
    if layer is not None:
        raise UsageError(f"{name!r} names a layer, and only a stage is asked here: say {stage!r}")
    return stage


def stages_of(
    names: Iterable[str],
    layers: Any,
    known: Iterable[str] = STAGES,
    config: Mapping[str, Any] | None = None,
    *,
    hint: str = "",
) -> dict[str, list[int] | None]:
    """The stages that several names mean, each with the layers that the names say.

    Parameters
    ----------
    names : iterable of str
        As for `stage_of`.
    layers : object
        What is asked of layers besides: None, unless no name has a layer.

    Returns
    -------
    dict of str to list of int or None
        None where every layer is meant.

    Examples
    --------
    >>> stages_of(["blocks.3.hook_mlp_out", "mlp_in", "blocks.5.hook_mlp_out"], None)
    {'mlp_out': [3, 5], 'mlp_in': None}
    """
    known = list(known)
    found: dict[str, list[int] | None] = {}
    for name in names:
        stage, layer = stage_of(name, known, config, hint=hint)
        if layer is not None and layers is not None:
            raise UsageError(f"{name!r} names its layer: leave layers={layers!r} out")
        before = found.get(stage, [])
        found[stage] = None if layer is None or before is None else sorted({*before, layer})
    return found


def _behind(layer: int | None, name: str) -> str:
    return name if layer is None else f"blocks.{layer}.{name}"


def _check_place(stage: str, name: str, config: Mapping[str, Any] | None) -> None:
    """Refuse names of the stream in families that normalise it after the sum."""
    family = (config or {}).get("model_type")
    if family in _NORM_AFTER and stage in ("resid_mid", "resid_post"):
        raise UsageError(
            f"{name!r}: in {family}, TransformerLens reads the stream there before its norm, and "
            f"the stage {stage!r} is after it. Ask for {stage!r} if that is what you want"
        )
