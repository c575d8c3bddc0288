"""A smaller store out of a store: its own plan, blocks, sketches and journal."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from ..corpus import Column, Corpus
from ..plan import Plan, StageSpec
from ..schema import TABLES, Categorical
from ..writer import Writer
from .chosen import MANTISSA, Chosen, ChosenStage

__all__ = ["corpus_of", "write_store"]

_INPUTS = {"token_id", "sequence", "position", "special", "kept", "char_start", "char_end"}
_SEQUENCES = {"start", "length", "text"}
NUMBERED = "source_sequence"
"""Label that says which sequence it was, where sequences were numbered anew."""


def write_store(
    chosen: Chosen,
    out: str | os.PathLike[str],
    buffer: int | str,
    step: Callable[[int], None],
) -> None:
    """Write a selection to a store, or go on with one that was cut short.

    Raises
    ------
    PlanError
        The path holds something else, or another export.
    WriteError
        The disk is too small, or fails.
    """
    store = chosen.store
    for stage in chosen.stages:
        if stage.dtype == "float32" and (stage.keep_bits or 23) <= MANTISSA["bfloat16"]:
            stage.dtype = "bfloat16"  # holds them as exactly, and is compressed
    predictions, outcomes = store.predictions, store.outcomes
    labels = (store.attrs.get("sketch") or {}).get("by")
    plan = Plan.build(
        corpus_of(chosen),
        [_spec(stage) for stage in chosen.stages],
        buffer=buffer,
        provenance=chosen.facts(),
        sketch_by=labels,
        predictions=0 if predictions is None else predictions.sizes["rank"],
        outcomes=outcomes is not None and _whole(outcomes),
    )
    whole = {"predictions": predictions, "outcomes": outcomes}
    tables = {key: whole[key.partition("/")[0]] for key in plan.tables}
    with Writer(
        out,
        plan,
        vocabulary=store.vocabulary,
        allow_nonfinite=bool(store.attrs.get("nonfinite")),
    ) as writer:
        for start in range(0, plan.n_tokens, plan.block_tokens):
            stop = min(plan.n_tokens, start + plan.block_tokens)
            wanted = writer.wants(np.array([start // plan.block_tokens]))
            for stage in chosen.stages:
                if wanted or not stage.exact:  # what is there is read for its errors
                    _put_stage(writer, stage, start, stop, step)
            if tables and wanted:
                rows = chosen.tokens[start:stop]
                values = {
                    key: np.asarray(table[key.partition("/")[2]][rows])  # type: ignore[index]
                    for key, table in tables.items()
                }
                writer.put_tables(start, values)


def _spec(stage: ChosenStage) -> StageSpec:
    heads = stage.source.heads
    number = None if heads is None else int(heads.max()) + 1
    return StageSpec(stage.name, tuple(stage.layers), stage.width, stage.dtype, number)


def _whole(outcomes: Any) -> bool:
    return {key.partition("/")[2] for key in TABLES if key.startswith("outcomes/")} <= set(outcomes)


def _put_stage(
    writer: Writer, stage: ChosenStage, start: int, stop: int, step: Callable[[int], None]
) -> None:
    for layer in stage.layers:
        for top in range(start, stop, stage.step):
            end = min(stop, top + stage.step)
            values = stage.read(layer, top, end)
            writer.put(stage.name, layer, top, values)
            step(len(values) * stage.width * stage.itemsize)


def corpus_of(chosen: Chosen) -> Corpus:
    """The sequences that have a chosen token, whole, with their labels and texts.

    They are numbered anew; where that changes the numbers, a label keeps the old ones.
    """
    inputs, sequences = chosen.store.inputs, chosen.store.sequences
    keep = np.zeros(inputs.sizes["input"], bool)
    keep[np.asarray(chosen.store.column("input"))[chosen.tokens]] = True
    start, length = (np.asarray(sequences[n].values, np.int64) for n in ("start", "length"))
    owner = np.repeat(np.arange(len(start)), length)
    used = np.unique(owner[keep])
    inside = np.isin(owner, used)

    def of_inputs(name: str) -> np.ndarray:
        return inputs[name].values[inside]

    # In the order of the store's columns: groups come in any order, and the same must be the same.
    known = chosen.store.columns
    labels = {
        n: _column(sequences[n].values[used])
        for n in known
        if n in sequences and n not in _SEQUENCES
    }
    if len(used) < len(start) and NUMBERED not in labels:
        labels[NUMBERED] = used.astype(np.int64)
    spans = "char_start" in inputs and "text" in sequences
    return Corpus(
        token_ids=of_inputs("token_id").astype(np.int32),
        starts=np.concatenate([[0], np.cumsum(length[used])]).astype(np.int64),
        special=of_inputs("special").astype(bool),
        keep=keep[inside],
        texts=[str(t) for t in sequences["text"].values[used]] if "text" in sequences else None,
        char_start=of_inputs("char_start") if spans else None,
        char_end=of_inputs("char_end") if spans else None,
        sequence_labels=labels,
        token_labels={
            n: _column(of_inputs(n))
            for n in known
            if n in inputs and n not in _INPUTS and n not in labels
        },
        notes=dict(chosen.store.attrs.get("notes", {})),
    )


def _column(values: np.ndarray) -> Column:
    return values if values.dtype.kind in "bifu" else Categorical.of([str(v) for v in values])
