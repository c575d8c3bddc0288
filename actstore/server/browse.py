"""What a store holds beside activations: its card, tokens, sequences and texts, page by page.

What is along sequences and inputs is read once and kept, texts when they are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from ..aliases import only_stage
from ..errors import UnknownNameError, UsageError
from ..schema import Categorical
from ..select import parse
from ..store import Store

__all__ = ["Browser"]

MAX_LABEL_VALUES = 64
PREVIEW = 80
"""Characters of a text that a list of sequences shows."""

_OWN = {"text", "start", "length"}


class Browser:
    """Pages of one store's tokens and texts, as plain values.

    Parameters
    ----------
    store : Store
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._matching = lru_cache(8)(self._match)
        self._text = lru_cache(64)(self._read_text)

    # -- the card --------------------------------------------------------------------------

    def summary(self, name: str) -> dict[str, Any]:
        """A line about the store, under the name that it is served by."""
        info = self.store.info()
        return {
            "name": name,
            "id": self.store.id,
            "model": info.get("model", {}).get("name", ""),
            "tokens": self.store.n_tokens,
            "nbytes": sum(row["nbytes"] for row in info["stages"].values()),
            "stages": list(info["stages"]),
            "layers": len({n for row in info["stages"].values() for n in row["layers"]}),
        }

    def card(self, name: str) -> dict[str, Any]:
        """All about the store, under the name that it is served by."""
        info = self.store.info()
        stages = []
        for stage, row in info["stages"].items():
            heads = self.store.heads(stage)
            stages.append(
                {
                    "name": stage,
                    **{k: row[k] for k in ("layers", "width", "dtype", "nbytes", "meaning")},
                    "heads": None if heads is None else len(np.unique(heads)),
                }
            )
        return {
            **self.summary(name),
            "format": info["format"],
            "model": info.get("model", {}),
            "tokenizer": info.get("tokenizer", {}),
            "versions": info.get("versions", {}),
            "sequences": info["sequences"],
            "inputs": info["inputs"],
            "stages": stages,
            "labels": [self._label(label) for label in self.store.labels],
            "sketch": self.store.attrs.get("sketch"),
            "predictions": info["predictions"] or None,
            "outcomes": bool(info["outcomes"]),
            "notes": info["notes"],
        }

    def _label(self, name: str) -> dict[str, Any]:
        column = self.store.column(name)
        if isinstance(column, Categorical):
            kind, values = "text", column.values
        else:
            kinds = {"b": "bool", "f": "float"}
            kind, values = kinds.get(column.dtype.kind, "int"), np.unique(column)
        few = len(values) <= MAX_LABEL_VALUES
        return {"name": name, "kind": kind, "values": plain(values) if few else None}

    # -- tokens ----------------------------------------------------------------------------

    def tokens(self, offset: int, limit: int, where: str, search: str) -> dict[str, Any]:
        """A page of the kept tokens that satisfy an expression and whose text holds a text."""
        chosen = self._matching(where.strip(), search)
        rows = chosen[offset : offset + limit]
        names = ["sequence", "position", "token_id"]
        columns = [plain(rows), *(plain(self._taken(name, rows)) for name in names)]
        if self.store.vocabulary is not None:
            names.append("token_text")
            columns.append(plain(self.texts(self._taken("token_id", rows))))
        for label in self.store.labels:
            names.append(label)
            columns.append(plain(self._taken(label, rows)))
        for name, values in self._outcomes.items():
            names.append(name)
            columns.append(_outcome(values[rows]))
        return _page(len(chosen), offset, limit, ["token", *names], columns)

    def _match(self, where: str, search: str) -> np.ndarray:
        mask = np.ones(self.store.n_tokens, bool)
        if where:
            expression = parse(where)
            mask &= expression.evaluate({n: self.store.column(n) for n in expression.columns})
        if search:
            if self.store.vocabulary is None:
                raise UsageError("the store has no texts of tokens: it was made of token ids")
            wanted = search.casefold()
            found = np.array([wanted in text for text in self._folded], bool)
            mask &= found[np.asarray(self.store.column("token_id"))]
        return np.flatnonzero(mask)

    @cached_property
    def _folded(self) -> list[str]:
        vocabulary = self.store.vocabulary
        return [str(text).casefold() for text in ([] if vocabulary is None else vocabulary)]

    def _taken(self, name: str, rows: np.ndarray) -> np.ndarray:
        column = self.store.column(name)[rows]
        return column.decode() if isinstance(column, Categorical) else column

    # -- sequences and texts ---------------------------------------------------------------

    def sequences(self, offset: int, limit: int) -> dict[str, Any]:
        """A page of the sequences."""
        total = self.store.attrs["corpus"]["sequences"]
        part = self.store.sequences.isel(sequence=slice(offset, offset + limit)).compute(
            scheduler="sync"
        )
        first, count = part["start"].values, part["length"].values
        if "text" in part:
            previews = [str(text)[:PREVIEW] for text in part["text"].values]
        else:
            previews = [
                self._joined(start, start + min(n, PREVIEW))[:PREVIEW]
                for start, n in zip(first, count, strict=True)
            ]
        labels = [str(name) for name in part.data_vars if name not in _OWN]
        columns = [
            list(range(offset, offset + len(first))),
            plain(count),
            *(plain(part[name].values) for name in labels),
            previews,
        ]
        return _page(total, offset, limit, ["sequence", "tokens", *labels, "preview"], columns)

    def sequence(self, number: int, offset: int, limit: int) -> dict[str, Any]:
        """A page of one sequence's input tokens, kept or not."""
        start, length = self._extent(number)
        rows = slice(start + min(offset, length), start + min(offset + limit, length))
        ids = self._inputs["token_id"][rows]
        columns = {
            "position": plain(self._inputs["position"][rows]),
            "id": plain(ids),
            "text": plain(self.texts(ids)),
        }
        if "special" in self._inputs:
            columns["special"] = plain(self._inputs["special"][rows])
        kept = self._kept(rows)
        columns["token"] = [None if k < 0 else k for k in kept.tolist()]
        for name, values in self._outcomes.items():
            there = values[np.maximum(kept, 0)]
            shown = zip(_outcome(there), kept.tolist(), strict=True)
            columns[name] = [None if k < 0 else v for v, k in shown]
        tokens = [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
        return {
            "sequence": number,
            "total": length,
            "offset": offset,
            "limit": limit,
            "tokens": tokens,
        }

    def values(
        self, number: int, stage: str, layer: int, neuron: int, offset: int, limit: int
    ) -> dict[str, Any]:
        """A neuron's value at each of a sequence's input tokens; None where one was not kept."""
        start, length = self._extent(number)
        rows = slice(start + min(offset, length), start + min(offset + limit, length))
        stage = only_stage(stage, self.store.stages)
        array = self.store.array(stage)
        layers = self.store.attrs["capture"]["stages"][stage]["layers"]
        if layer not in layers:
            raise UnknownNameError("layer", layer, layers)
        if not 0 <= neuron < array.shape[2]:
            raise UsageError(f"neuron {neuron} is not there: {stage} has {array.shape[2]:,}")
        kept = self._kept(rows)
        values: list[Any] = [None] * len(kept)
        there = np.flatnonzero(kept >= 0)
        if len(there):
            # Kept tokens lie end to end, so those of a sequence are one run.
            run = slice(int(kept[there[0]]), int(kept[there[-1]]) + 1)
            read = np.asarray(array[layers.index(layer), run, neuron])
            for at, value in zip(there.tolist(), plain(read), strict=True):
                values[at] = value
        return {"stage": stage, "layer": layer, "neuron": neuron, "values": values}

    def contexts(self, at: Sequence[int], before: int, after: int) -> dict[str, Any]:
        """The texts around some kept tokens, within their sequences."""
        inputs, found = self.store.column("input"), []
        for token in at:
            row = int(np.asarray(inputs)[self._checked(token)])
            number = int(self._inputs["sequence"][row])
            start, length = self._extent(number)
            low, high = max(start, row - before), min(start + length, row + after + 1)
            follows = self._span(number, row + 1, row + 2) if row + 1 < start + length else None
            found.append(
                {
                    "token": token,
                    "sequence": number,
                    "position": int(self._inputs["position"][row]),
                    "before": self._span(number, low, row, end=row),
                    "text": self._span(number, row, row + 1),
                    "after": self._span(number, row + 1, high, begin=row),
                    "next": follows,
                }
            )
        return {"contexts": found}

    def predictions(self, token: int) -> dict[str, Any]:
        """The model's own next tokens after a kept one, the likeliest first."""
        stored = self.store.predictions
        if stored is None:
            raise UsageError(
                "the store has no predictions: `actstore dump --predictions K` keeps them"
            )
        row = stored.isel(token=self._checked(token)).compute(scheduler="sync")
        ids, shares = row["token_id"].values, row["probability"].values
        context = self.contexts([token], 0, 0)["contexts"][0]
        found = zip(plain(ids), plain(self.texts(ids)), plain(shares), strict=True)
        return {
            "token": token,
            "text": context["text"],
            "next": context["next"],
            "predictions": [{"id": i, "text": t, "probability": p} for i, t, p in found],
        }

    def texts(self, ids: np.ndarray) -> np.ndarray:
        """Each token's own text; its id where the store has no texts."""
        vocabulary = self.store.vocabulary
        if vocabulary is None:
            return np.array([str(i) for i in ids.tolist()], object)
        return vocabulary[ids]

    @cached_property
    def _outcomes(self) -> dict[str, np.ndarray]:
        names = self.store.info()["outcomes"]
        return {name: np.asarray(self.store.column(name)) for name in names}

    @cached_property
    def _inputs(self) -> dict[str, np.ndarray]:
        names = ("token_id", "position", "sequence", "special", "char_start", "char_end")
        inputs = self.store.inputs
        return {n: inputs[n].values for n in names if n in inputs}

    @cached_property
    def _extents(self) -> tuple[np.ndarray, np.ndarray]:
        sequences = self.store.sequences
        return sequences["start"].values, sequences["length"].values

    def _extent(self, number: int) -> tuple[int, int]:
        starts, lengths = self._extents
        if not 0 <= number < len(starts):
            raise UsageError(f"sequence {number} is not there: the store has {len(starts):,}")
        return int(starts[number]), int(lengths[number])

    def _checked(self, token: int) -> int:
        if not 0 <= token < self.store.n_tokens:
            raise UsageError(f"token {token} is not there: the store has {self.store.n_tokens:,}")
        return token

    def _kept(self, rows: slice) -> np.ndarray:
        """Number of each input token among the kept ones, -1 where it was not kept."""
        inputs = np.asarray(self.store.column("input"))
        wanted = np.arange(rows.start, rows.stop)
        at = np.searchsorted(inputs, wanted)
        there = inputs[np.minimum(at, len(inputs) - 1)] == wanted
        return np.where(there, at, -1)

    def _span(
        self, number: int, low: int, high: int, begin: int | None = None, end: int | None = None
    ) -> str:
        """Text of a run of inputs, from the end of input `begin` to the start of input `end`."""
        if low >= high:
            return ""
        text = self._text(number)
        if not text or "char_start" not in self._inputs:
            return self._joined(low, high)
        starts, ends = self._inputs["char_start"], self._inputs["char_end"]
        spelt = np.flatnonzero(starts[low:high] < ends[low:high]) + low  # special ones have none
        if not len(spelt):
            return ""
        first, last = int(starts[spelt].min()), int(ends[spelt].max())
        if begin is not None and starts[begin] < ends[begin]:
            first = min(first, int(ends[begin]))
        if end is not None and starts[end] < ends[end]:
            last = max(first, int(starts[end]))
        return text[first:last]

    def _joined(self, low: int, high: int) -> str:
        ids = self._inputs["token_id"][low:high]
        texts: Iterable[str] = map(str, self.texts(ids))
        return ("" if self.store.vocabulary is not None else " ").join(texts)

    def _read_text(self, number: int) -> str:
        sequences = self.store.sequences
        return str(sequences["text"][number].values) if "text" in sequences else ""


def _page(
    total: int, offset: int, limit: int, names: list[str], columns: list[list[Any]]
) -> dict[str, Any]:
    rows = [list(row) for row in zip(*columns, strict=True)]
    return {"total": total, "offset": offset, "limit": limit, "columns": names, "rows": rows}


def _outcome(values: np.ndarray) -> list[Any]:
    """How predictions came out; None after the last token of a sequence (NaN, or rank -1)."""
    if values.dtype.kind == "i":
        return [None if v < 0 else v for v in values.tolist()]
    return plain(values)


def plain(values: np.ndarray) -> list[Any]:
    """A column as values of JSON; NaN and infinities as None."""
    if values.dtype.kind == "f":
        there: Callable[[Any], Any] = np.isfinite
        return [v if ok else None for v, ok in zip(values.tolist(), there(values), strict=True)]
    if values.dtype.kind in "OUT":
        return [v if isinstance(v, (bool, int, float)) else str(v) for v in values.tolist()]
    return values.tolist()
