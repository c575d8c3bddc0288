"""Joint readings laid out as lazy arrays: one task for each unit (a layer, say) and group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import dask.array as da
import numpy as np
import xarray as xr
from dask._task_spec import Task, TaskRef
from dask.base import tokenize
from dask.utils import parse_bytes

from ..errors import UsageError
from .engine import Output, label_arrays, nothing, stack_groups
from .joint import Answers, Question, Rows, View, run_joint
from .selection import Selection, Source, check_free

__all__ = [
    "Unit",
    "labelled",
    "lay_out",
    "memory_nbytes",
    "place_of",
    "rows_of_groups",
    "sampled",
    "view_of",
]

LEAST_MEMORY = 2**24


class OfRows(Protocol):
    """A question that reads its rows itself, because they are few."""

    def of_rows(self, rows: Rows) -> Answers: ...


@dataclass(frozen=True)
class Unit:
    """What one row of a result is made of.

    Attributes
    ----------
    place : str
        Units of one place read the same values, and are read together.
    questions : sequence of sequence of (Rows, Question)
        For each group.
    finish : callable or None
        Makes the row's answers from those of its questions (to be sent to workers); default all
        of them together.
    """

    place: str
    questions: Sequence[Sequence[tuple[Rows, Question | OfRows]]]
    finish: Callable[..., Answers] | None = None


def lay_out(
    units: Sequence[Unit], outputs: Mapping[str, Output], memory: int
) -> dict[str, da.Array]:
    """Lazy arrays (unit, group, ...) of every output; nothing runs yet."""
    groups = len(units[0].questions)
    shapes = {name: output.shape for name, output in outputs.items()}
    label = f"joint-{tokenize(units, shapes, memory)}"
    blank = {name: nothing(output) for name, output in outputs.items()}
    graph: dict[Any, Any] = {}

    def task(*key: Any, call: Callable[..., Any], of: Sequence[Any]) -> TaskRef:
        graph[key] = Task(key, call, *of)
        return TaskRef(key)

    for row, unit in enumerate(units):
        done = []
        for group, asked in enumerate(unit.questions):
            parts = []
            for i, (rows, question) in enumerate(asked):
                # The rows have a key of their own: questions of the same rows are read together.
                own = task("rows", rows.token, call=_same, of=[rows])
                key = (f"ask-{label}", unit.place, row, group, i)
                if hasattr(question, "of_rows"):
                    parts.append(task(*key, call=_of_rows, of=[own, question]))
                else:
                    parts.append(task(*key, call=run_joint, of=[own, memory, question]))
            finish = task(
                f"finish-{label}", row, group, call=_finish, of=[unit.finish, blank, *parts]
            )
            done.append(finish)
        results = task(f"groups-{label}", row, call=_listed, of=done)
        task(f"all-{label}", row, call=stack_groups, of=[blank, results])
    return label_arrays(graph, label, len(units), groups, outputs)


def labelled(
    selection: Selection,
    units: Sequence[Unit],
    dim: str | None,
    labels: Sequence[Any] | np.ndarray,
    outputs: Mapping[str, Output],
    memory: int,
) -> xr.Dataset:
    """`lay_out` as a dataset.

    Parameters
    ----------
    dim : str or None
        What the units are along; None where there is but one.
    labels : sequence
        Of the units.
    """
    group = selection.groups
    check_free(group, outputs)
    arrays = lay_out(units, outputs, memory)
    variables: dict[str, Any] = {}
    for name, output in outputs.items():
        values = arrays[name] if group else arrays[name][:, 0]
        dims = (*([group.name] if group else []), *output.dims)
        one = dim is None
        variables[name] = (
            dims if one else (dim, *dims),
            values[0] if one else values,
            output.attrs,
        )
    coords: dict[str, Any] = {} if dim is None else {dim: labels}
    if group:
        coords[group.name] = group.values
    return xr.Dataset(variables, coords)


def _of_rows(rows: Rows, question: OfRows) -> list[Answers]:
    return [question.of_rows(rows)]


def _same(value: Any) -> Any:
    return value


def _listed(*values: Any) -> list[Any]:
    return list(values)


def _finish(
    finish: Callable[..., Answers] | None,
    blank: Mapping[str, np.ndarray],
    *parts: list[Answers],
) -> Answers | None:
    """One row's answers; None for a group without tokens."""
    if not parts:
        return None
    answers = [answer for (answer,) in parts]
    found = finish(*answers) if finish else {k: v for a in answers for k, v in a.items()}
    return {name: found[name] for name in blank}


def rows_of_groups(selection: Selection) -> list[Rows]:
    """The tokens of each group; all in one where there are none."""
    if selection.groups is None:
        return [Rows(selection.n_tokens, selection.mask)]
    rows = []
    for members in selection.members():
        mask = np.zeros(selection.n_tokens, bool)
        mask[members] = True
        rows.append(Rows(selection.n_tokens, mask))
    return rows


def sampled(rows: Rows, n: int, seed: int) -> Rows:
    """At most n of the tokens, drawn without replacement."""
    if len(rows.tokens) <= n:
        return rows
    chosen = np.random.default_rng(seed).choice(rows.tokens, n, replace=False)
    mask = np.zeros(rows.n_tokens, bool)
    mask[chosen] = True
    return Rows(rows.n_tokens, mask)


def view_of(source: Source, layer: int, neurons: np.ndarray) -> View:
    """A source at a layer."""
    index = source.layers.index(layer)
    return View(source.token, source.stage, layer, source.array, index, neurons)


def place_of(selection: Selection, what: str, which: Any) -> str:
    """A name for what is read together, the same in all queries of the same data."""
    data = selection.attrs.get("store_id") or selection.sources[0].token
    return f"{data} {what} {which}"


def memory_nbytes(memory: int | str) -> int:
    """A memory limit in bytes, as "2GiB" or a number."""
    try:
        nbytes = int(parse_bytes(memory))
    except (ValueError, OverflowError):
        nbytes = -1
    if nbytes < LEAST_MEMORY:
        raise UsageError(f"memory {memory!r}: write a size of at least 16 MiB, such as '2GiB'")
    return nbytes
