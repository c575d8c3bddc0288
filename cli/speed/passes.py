"""A GPT-2 of random weights: the model alone over a plan's batches, and its dump."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actstore.plan import Plan

__all__ = ["bare_pass", "gpt2", "timed_dump"]


def gpt2(dtype: str, device: str, layers: int, width: int) -> tuple[Any, str]:
    """A GPT-2 of random weights, without a head, and what it runs on, in words."""
    import torch
    from transformers import GPT2Config, GPT2Model

    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64)
    model = GPT2Model(config).eval().to(kind, getattr(torch, dtype))
    if kind.startswith("cuda"):
        return model, torch.cuda.get_device_name(kind)
    return model, f"CPU, {torch.get_num_threads()} threads"


def bare_pass(model: Any, made: Plan) -> float:
    """Seconds that the model takes for a plan's batches, nothing captured."""
    import torch

    from actstore.fill import batch_kwargs

    began = time.perf_counter()
    with torch.inference_mode():
        for batch in made.batches:
            model(**batch_kwargs(made, batch, model))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def timed_dump(model: Any, made: Plan, points: Any, scratch: Path) -> float:
    """Seconds from opening the writer to the sealed store."""
    from actstore.fill import fill
    from actstore.writer import Writer

    path = scratch / "run.zarr"
    began = time.perf_counter()
    with Writer(path, made) as writer:
        fill(model, points, writer)
    seconds = time.perf_counter() - began
    shutil.rmtree(path)
    return seconds
