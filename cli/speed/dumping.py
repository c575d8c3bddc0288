"""A dump against the model alone, and against the ways in which people keep activations."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .passes import bare_pass, gpt2, timed_dump
from .rounds import Reference, Row, Work, compare, peer, seconds
from .setting import Setting, fresh

if TYPE_CHECKING:
    import numpy as np

    from actstore.plan import Plan

__all__ = ["WAYS", "dumping", "keep_all", "other_ways", "plan_of"]

TARGETS = {("float32", True): 0.72, ("float32", False): 0.80, ("bfloat16", True): 0.45}
ON_GPU = 0.95
BARE = "bare forward pass"
CONTEXT = 1024


def dumping(setting: Setting) -> Iterator[Row]:
    """Four MLP stages, all layers, opening the writer to the sealed store, without a head."""
    for dtype in ("float32", "bfloat16"):
        model, where = gpt2(dtype, setting.device, setting.layers, setting.width)
        ours = {}
        for sketch in (False, True):
            plan, points = plan_of(model, setting.tokens, sketch)
            target = TARGETS.get((dtype, sketch)) if where.startswith("CPU") else ON_GPU
            what = f"dump, {dtype}, {'with' if sketch else 'without'} sketches"
            ours[what] = _ours(setting, model, plan, points), {BARE: target}
        bare = Reference(BARE, partial(bare_pass, model, plan))
        yield from compare("dump", ours, [bare], setting.rounds, plan.n_tokens, "tokens", where)


def other_ways(setting: Setting) -> list[Row]:
    """The same values of the same batches, kept from plain hooks; every file synced, as ours are.

    What is kept beside the values (token ids, labels, checksums) ours alone has; sketches are left
    out, which the others do not make.
    """
    model, where = gpt2("float32", setting.device, setting.layers, setting.width)
    plan, points = plan_of(model, max(1, setting.tokens // 2), sketch=False)
    ways = [
        peer(module, module, name, _kept(setting, model, plan, way))
        for name, (module, way) in WAYS.items()
    ]
    what = "dump, float32, without sketches"
    ours = {what: (_ours(setting, model, plan, points), {way.name: 1 for way in ways})}
    return compare("ways", ours, ways, setting.rounds, plan.n_tokens, "tokens", where)


def plan_of(model: Any, tokens: int, sketch: bool) -> tuple[Plan, Any]:
    """A plan of sequences of 1,024 tokens, or of one that is shorter, and its hook points."""
    from actstore.corpus import build
    from actstore.fill import plan_model

    length = min(CONTEXT, tokens)
    rows = [[(7919 * i + r) % 50_000 for i in range(length)] for r in range(tokens // length)]
    return plan_model(model, None, build(rows, None), sketch=sketch)


def _ours(setting: Setting, model: Any, plan: Plan, points: Any) -> Work:
    return lambda: timed_dump(model, plan, points, fresh(setting.scratch / "dump"))


# -- other ways ----------------------------------------------------------------------------


class _TorchSave:
    """One file a batch, of a mapping from names to tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keep(self, number: int, values: Mapping[str, Any]) -> None:
        import torch

        with open(self.folder / f"{number}.pt", "wb") as file:
            torch.save(dict(values), file)
            _sync(file)

    def close(self) -> None:
        pass


class _Safetensors(_TorchSave):
    def keep(self, number: int, values: Mapping[str, Any]) -> None:
        from safetensors.torch import save_file

        path = self.folder / f"{number}.safetensors"
        save_file({name: own.contiguous() for name, own in values.items()}, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())


class _NumpySave(_TorchSave):
    def keep(self, number: int, values: Mapping[str, Any]) -> None:
        import numpy as np

        for name, own in values.items():
            with open(self.folder / f"{name}.{number}.npy", "wb") as file:
                np.save(file, own.numpy())
                _sync(file)


class _Arrow(_TorchSave):
    """One Arrow file, a row a token, a column each of stages and layers; values are not copied."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.writer: Any = None

    def keep(self, number: int, values: Mapping[str, Any]) -> None:
        import pyarrow as pa
        from datasets import Features, List, Value
        from datasets.arrow_writer import ArrowWriter

        arrays = {name: own.numpy() for name, own in values.items()}
        if self.writer is None:
            features = {n: List(Value("float32"), length=a.shape[1]) for n, a in arrays.items()}
            path = str(self.folder / "data.arrow")
            self.writer = ArrowWriter(features=Features(features), path=path)
        columns = {n: _rows(a) for n, a in arrays.items()}
        self.writer.write_table(pa.table(columns))

    def close(self) -> None:
        self.writer.finalize()
        with open(self.folder / "data.arrow", "rb") as file:
            os.fsync(file.fileno())


def _rows(values: np.ndarray) -> Any:
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


WAYS = {
    "torch.save of each batch": ("torch", _TorchSave),
    "safetensors of each batch": ("safetensors", _Safetensors),
    "np.save of each array": ("numpy", _NumpySave),
    "HF datasets, ArrowWriter": ("datasets", _Arrow),
}
"""The package that each needs, and how it keeps a batch."""


def _kept(setting: Setting, model: Any, plan: Plan, way: type[_TorchSave]) -> Work:
    def work() -> float:
        folder = fresh(setting.scratch / "ways")
        took = seconds(lambda: keep_all(model, plan, way(folder)))()
        shutil.rmtree(folder)
        return took

    return work


def keep_all(model: Any, plan: Plan, kept: _TorchSave) -> None:
    """Run a plan's batches with plain hooks, and keep what they see by one of the ways."""
    import torch

    from actstore.fill import batch_kwargs

    with torch.inference_mode(), _hooks(model) as seen:
        for number, batch in enumerate(plan.batches):
            model(**batch_kwargs(plan, batch, model))
            kept.keep(number, seen)
            seen.clear()
    kept.close()


@contextmanager
def _hooks(model: Any) -> Iterator[dict[str, Any]]:
    """What a pass computes at the four MLP stages of every layer of a GPT-2, row by row."""
    seen: dict[str, Any] = {}

    def note(name: str, place: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            values = inputs[0] if place == "input" else output
            # A copy, since what comes next may work in place.
            seen[name] = values.reshape(-1, values.shape[-1]).to("cpu", copy=True)

        return hook

    handles = []
    for layer, block in enumerate(model.h):
        mlp = block.mlp
        for stage, module, place in (
            ("mlp_in", mlp, "input"),
            ("mlp_pre", mlp.c_fc, "output"),
            ("mlp_post", mlp.c_proj, "input"),
            ("mlp_out", mlp.c_proj, "output"),
        ):
            handles.append(module.register_forward_hook(note(f"{stage}.{layer}", place)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
