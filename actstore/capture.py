"""Read values inside a model's forward pass (torch hooks), and feed it ragged batches.

Works on the model without its head: `base_model` finds it, and the paths of hook points are
relative to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import CaptureError, ModelError, UnknownNameError, UsageError
from .hookpoints import HookPoint

__all__ = ["Capture", "base_model", "batch_inputs", "capture", "module_at", "probe", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile` and data parallelism wrap round it."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(
        model, "_orig_mod"
    ):
        model = getattr(model, "_orig_mod", None) or model.module  # type: ignore[assignment]
    return model


def base_model(model: nn.Module) -> nn.Module:
    """The model without its head, which activations do not need; `head.Head` is for the rest.

    Parameters
    ----------
    model : Module
        A transformers model with or without a head (wrapped by `torch.compile` or data
        parallelism, too); any other module is returned as it is.

    Raises
    ------
    ModelError
        For an encoder-decoder.
    """
    model = unwrapped(model)
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        family = getattr(config, "model_type", type(model).__name__)
        raise ModelError(
            f"{family} is an encoder-decoder: encoder and decoder read different tokens, and a "
            "store has one token axis. Give one half as a model of its own, for example "
            "model.get_encoder() with is_encoder_decoder=False in its configuration."
        )
    prefix = getattr(model, "base_model_prefix", "")
    return getattr(model, prefix, model) if prefix else model


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path.

    Parameters
    ----------
    model : Module
        A model with or without its head.
    path : str
        Relative to the model without its head; also the path with the head's prefix is
        understood (``transformer.h.0`` and ``h.0`` are the same module of a GPT-2).

    Raises
    ------
    UnknownNameError
        With the names that exist where the path goes wrong.

    Examples
    --------
    >>> module_at(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), "1")
    ReLU()
    """
    module = base_model(model)
    names = path.split(".")
    if names[0] == getattr(module, "base_model_prefix", "") and names[0] not in module._modules:
        names = names[1:]
    for depth, name in enumerate(names):
        children = {key: child for key, child in module._modules.items() if child is not None}
        if name not in children:
            parent = ".".join(names[:depth])
            known = list(children) if len(children) <= 64 else [f"{min(children)} and so on"]
            raise UnknownNameError(
                f"module of {parent!r}" if parent else "module", name, known, f"In path {path!r}."
            )
        module = children[name]
    return module


class Capture:
    """Keeps count of what has fired in the present forward pass; `capture` yields one."""

    def __init__(self, points: Sequence[HookPoint]) -> None:
        self.points = points
        self.tokens: int | None = None  # in the present batch, where its input shows it
        self._fired: set[int] = set()

    def fire(self, index: int) -> None:
        """Note that a point was reached; twice in one forward pass is an error."""
        if index in self._fired:
            raise CaptureError(
                f"{_describe(self.points[index])} ran more than once in one forward pass (layers "
                "that share a module, a feed-forward computed in chunks, or `done()` not called "
                "after the pass before), so its values have no one place; hook a module that "
                "runs once"
            )
        self._fired.add(index)

    def done(self) -> None:
        """Call after each forward pass: every point must have been reached."""
        missing = [p for i, p in enumerate(self.points) if i not in self._fired]
        self._fired.clear()
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise CaptureError(
                f"{_describe(missing[0])} did not run in the forward pass{more}; hook a module "
                "that this configuration runs (print the model to see its names)"
            )


@contextmanager
def capture(
    model: nn.Module, points: Sequence[HookPoint], receive: Callable[[int, Tensor], None]
) -> Iterator[Capture]:
    """Hand over the value at each point, while the model runs.

    Parameters
    ----------
    model : Module
        A model with or without its head.
    points : sequence of HookPoint
        Where to read.
    receive : callable
        ``receive(i, tensor)`` is called from inside the forward pass with the value at
        ``points[i]``, as it is and where it is: (batch, sequence, width), or flattened to
        (batch x sequence, width). It must copy what it keeps before it returns, because some
        families go on to change the tensor in place.

    Yields
    ------
    Capture
        Call its ``done()`` after each forward pass.

    Raises
    ------
    CaptureError
        A module that runs twice in one pass, or gives no floating-point value for each token.

    Notes
    -----
    The hooks are removed on exit, whatever happened. Gradients are the caller's affair: use
    ``torch.inference_mode()``.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> point = HookPoint("pre", 0, "0", "output")
    >>> with torch.inference_mode(), capture(model, [point], lambda i, x: print(x.shape)) as c:
    ...     _ = model(torch.zeros(2, 4))
    ...     c.done()
    torch.Size([2, 3])
    """
    state = Capture(points)
    sites: dict[tuple[nn.Module, str], list[int]] = {}
    for i, point in enumerate(points):
        sites.setdefault((module_at(model, point.path), point.side), []).append(i)

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids: Any = kwargs.get("input_ids", args[0] if args else None)
        countable = isinstance(ids, Tensor) and not ids.is_floating_point()
        state.tokens = ids.numel() if countable else None

    def deliver(members: list[int], value: object) -> None:
        for i in members:
            state.fire(i)
            receive(i, _tensor(points[i], value, state.tokens))

    def before(members: list[int]) -> Callable[..., None]:
        return lambda module, args, kwargs: deliver(members, _first_input(args, kwargs))

    def after(members: list[int]) -> Callable[..., None]:
        return lambda module, args, output: deliver(members, output)

    handles = [base_model(model).register_forward_pre_hook(begin, with_kwargs=True)]
    try:
        for (module, side), members in sites.items():
            if side == "input":
                hook = module.register_forward_pre_hook(before(members), with_kwargs=True)
            else:
                hook = module.register_forward_hook(after(members))
            handles.append(hook)
        yield state
    finally:
        for handle in handles:
            handle.remove()


def probe(model: nn.Module, points: Sequence[HookPoint]) -> list[tuple[int, torch.dtype]]:
    """Width and element type at each point, from a forward pass of one token.

    Parameters
    ----------
    model : Module
        Wherever it lives; on the ``meta`` device nothing is computed and no weights are needed.
    points : sequence of HookPoint
        Where to look.

    Returns
    -------
    list of (int, torch.dtype)

    Raises
    ------
    ModelError
        A stage that is not equally wide in all its layers: a store holds one width a stage.
    """
    base = base_model(model)
    found: dict[int, tuple[int, torch.dtype]] = {}
    # On the meta device there are no values, and transformers looks at some: at positions (for
    # packed sequences) unless there is a cache, at masks of several tokens, at padding tokens.
    meta = any(parameter.is_meta for parameter in base.parameters())
    inputs = batch_inputs(base, [np.array([1 if _padding_token(base) == 0 else 0])])
    embeddings = getattr(base, "get_input_embeddings", None)
    inputs |= {"use_cache": True} if "use_cache" in inputs else {}

    def receive(i: int, value: Tensor) -> None:
        found[i] = (value.shape[-1], value.dtype)

    with torch.inference_mode(), capture(base, points, receive) as state:
        try:
            if meta and embeddings is not None:
                inputs["inputs_embeds"] = embeddings()(inputs.pop("input_ids"))
            base(**inputs)
        except RuntimeError as error:
            if not meta:
                raise
            raise ModelError(
                f"the sizes in {type(base).__name__} depend on its weights "
                f"({str(error).splitlines()[0]}); load the model with its weights to plan"
            ) from error
        state.done()
    first: dict[str, tuple[int, int]] = {}
    for i, point in enumerate(points):
        width = found[i][0]
        layer, expected = first.setdefault(point.stage, (point.layer, width))
        if width != expected:
            raise ModelError(
                f"stage {point.stage!r} is {expected} wide at layer {layer} and {width} at "
                f"layer {point.layer}, and a store holds one width a stage: ask for layers of "
                "equal width, or make two stores"
            )
    return [found[i] for i in range(len(points))]


def batch_inputs(
    model: nn.Module, sequences: Sequence[np.ndarray], padding_side: str = "right"
) -> dict[str, Any]:
    """Keyword arguments that run sequences of unequal length together.

    At real tokens the model computes what it does for each sequence alone (up to rounding).

    Parameters
    ----------
    model : Module
        A model with or without its head.
    sequences : sequence of integer arrays
        The token ids of each.
    padding_side : {"right", "left"}
        Where the shorter ones are filled up.

    Returns
    -------
    dict
        ``input_ids``; ``attention_mask`` only where there is padding; ``position_ids`` only
        where the model's own would be wrong; ``use_cache=False`` where the model knows it.

    Examples
    --------
    >>> class Model(nn.Module):
    ...     def forward(self, input_ids, attention_mask=None): ...
    >>> batch_inputs(Model(), [np.array([5, 6, 7]), np.array([8])])["input_ids"].tolist()
    [[5, 6, 7], [8, 0, 0]]
    """
    if padding_side not in ("right", "left"):
        raise UnknownNameError("padding side", padding_side, ("right", "left"))
    base = base_model(model)
    parameters = inspect.signature(base.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "input_ids" not in parameters and not takes_any:
        raise ModelError(
            f"{type(base).__name__}.forward takes no input_ids but ({', '.join(parameters)}); "
            "wrap the model in a module whose forward takes input_ids"
        )
    lengths = np.array([len(s) for s in sequences])
    if lengths.size == 0 or lengths.min() == 0:
        raise UsageError("a batch needs at least one sequence, and each sequence a token")
    places = np.arange(lengths.max())[None, :]
    if padding_side == "left":
        places = places - (lengths.max() - lengths)[:, None]  # index in its own sequence
    real = (places >= 0) & (places < lengths[:, None])
    # roberta and mpnet count positions by the tokens that are not their padding token, which
    # must therefore be the one we pad with. To everybody else the mask says it all.
    counted = getattr(getattr(base, "embeddings", None), "padding_idx", None)
    ids = np.full(real.shape, _padding_token(base) if counted is None else counted, np.int64)
    ids[real] = np.concatenate([np.asarray(s) for s in sequences])
    arrays = {"input_ids": ids}
    if not real.all():
        arrays["attention_mask"] = real.astype(np.int64)
        if padding_side == "left" and counted is None and "position_ids" in parameters:
            arrays["position_ids"] = np.maximum(places, 0)
    device = next((p.device for p in base.parameters()), torch.device("cpu"))
    inputs: dict[str, Any] = {k: torch.from_numpy(v).to(device) for k, v in arrays.items()}
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    return inputs


def _padding_token(model: nn.Module) -> int:
    """Any token will do, since it is masked; the model's own where it has one."""
    config = getattr(model, "config", None)
    token, size = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", 0)
    return token if isinstance(token, int) and 0 <= token < size else 0


def _first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
    """What a module transforms: its first argument, also where that is given by name."""
    if args:
        return args[0]
    return kwargs.get("hidden_states", next(iter(kwargs.values()), None))


def _tensor(point: HookPoint, value: object, tokens: int | None) -> Tensor:
    """The tensor in a module's input or output (outputs may be tuples: (hidden, weights))."""
    if isinstance(value, Mapping):
        value = next(iter(value.values()), None)
    elif isinstance(value, (tuple, list)):
        value = value[0] if value else None
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
        kind = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise CaptureError(
            f"{_describe(point)}: its {point.side} is {kind}, not activations of shape "
            "(batch, sequence, width); choose another module or side"
        )
    if tokens is not None and value.shape[:-1].numel() != tokens:
        raise CaptureError(
            f"{_describe(point)}: its {point.side} of shape {tuple(value.shape)} has no row for "
            f"each of the {tokens} tokens of the batch (experts and chunk_size_feed_forward > 0 "
            "see a part of them at a time); hook a module that sees them all"
        )
    return value if point.columns is None else value[..., slice(*point.columns)]


def _describe(point: HookPoint) -> str:
    return f"stage {point.stage!r}, layer {point.layer}: module {point.path!r}"
