"""The model's own predictions and how they come out: small arrays over the kept tokens.

A dump that is asked for them writes each block's rows as a part beside the block's journal
record, which knows their digests; at seal the parts become plain Zarr arrays. Rows are handled as
one array of int32 (token, column), in which floats stand as their bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import zarr
from crc32c import crc32c

from . import journal
from .places import zarr_at
from .plan import Plan
from .schema import TABLES, TokenTable
from .skeleton import table_chunk
from .sketch import Drain
from .storage import Storage

__all__ = ["RowsMissing", "TableRows", "digests", "join", "merge", "split"]


class RowsMissing(Exception):  # noqa: N818 - not an error of ours: another rank has to redo them
    """A block whose rows are neither in a sound part nor in the arrays."""


@dataclass(frozen=True)
class _Columns:
    """Where an array's values stand in a row."""

    key: str
    table: TokenTable
    place: slice


def _columns(plan: Plan) -> list[_Columns]:
    columns, first = [], 0
    for key in plan.tables:
        count = plan.predictions if TABLES[key].ranked else 1
        columns.append(_Columns(key, TABLES[key], slice(first, first + count)))
        first += count
    return columns


def split(plan: Plan, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Rows as values of each array, by key.

    Parameters
    ----------
    plan : Plan
    rows : ndarray of int32 (token, column)
    """
    return {
        c.key: rows[:, c.place].view(c.table.dtype).reshape(len(rows), *_rest(plan, c))
        for c in _columns(plan)
    }


def join(plan: Plan, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """The opposite of `split`, for values that were checked."""
    first = next(iter(values.values()))
    rows = np.empty((len(first), plan.table_columns), np.int32)
    for c in _columns(plan):
        own = np.ascontiguousarray(values[c.key], c.table.dtype).view(np.int32)
        rows[:, c.place] = own.reshape(len(rows), -1)
    return rows


def _rest(plan: Plan, columns: _Columns) -> tuple[int, ...]:
    return (plan.predictions,) if columns.table.ranked else ()


def digests(plan: Plan, rows: np.ndarray) -> dict[str, int]:
    """crc32c of a block's rows of each array, as little-endian bytes in C order."""
    return {
        c.key: crc32c(np.ascontiguousarray(rows[:, c.place], "<i4").tobytes())
        for c in _columns(plan)
    }


class TableRows:
    """A block's rows from wherever they are: its part, or the arrays of a store once sealed.

    Parameters
    ----------
    storage : Storage
    plan : Plan
    """

    def __init__(self, storage: Storage, plan: Plan) -> None:
        self._storage, self._plan = storage, plan
        self._chunk: tuple[int, np.ndarray | None] = (-1, None)

    def read(self, block: int, expected: Mapping[str, int]) -> np.ndarray | None:
        """Rows (token, column) that have the digests of the block's record; None if none do."""
        for find in (self._from_part, self._from_arrays):
            rows = find(block)
            if rows is not None and digests(self._plan, rows) == expected:
                return rows
        return None

    def _from_part(self, block: int) -> np.ndarray | None:
        part = self._storage.get(journal.table_key(block))
        shape = (self._plan.block_rows(block), self._plan.table_columns)
        if part is None or len(part) != 4 * shape[0] * shape[1]:
            return None
        return np.frombuffer(part, "<i4").reshape(shape)

    def _from_arrays(self, block: int) -> np.ndarray | None:
        plan = self._plan
        size = table_chunk(plan)
        chunk, inside = divmod(block * plan.block_tokens, size)
        if self._chunk[0] != chunk:
            tokens = slice(chunk * size, min((chunk + 1) * size, plan.n_tokens))
            place = zarr_at(str(self._storage.root))
            try:
                values = {
                    key: np.asarray(zarr.open_array(place, path=key, mode="r")[tokens])
                    for key in plan.tables
                }
            except Exception:  # a decoder fails in its own way on each kind of damage
                self._chunk = chunk, None
            else:
                self._chunk = chunk, join(plan, values)
        rows = self._chunk[1]
        return None if rows is None else rows[inside : inside + plan.block_rows(block)]


def merge(
    storage: Storage,
    plan: Plan,
    metadata: Mapping[str, bytes],
    records: Mapping[int, Mapping[str, int]],
) -> Iterator[tuple[str, bytes]]:
    """All blocks' rows as the objects of the arrays.

    Parameters
    ----------
    storage : Storage
    plan : Plan
    metadata : mapping
        The arrays' ``zarr.json`` by key.
    records : mapping
        For each block, the digests of its rows.

    Yields
    ------
    key, data
        Objects to store.

    Raises
    ------
    RowsMissing
        A block's rows are not to be had.
    """
    found, drain = TableRows(storage, plan), Drain(metadata)
    per_chunk = table_chunk(plan) // plan.block_tokens
    for first in range(0, plan.n_blocks, per_chunk):
        parts = []
        for block in range(first, min(first + per_chunk, plan.n_blocks)):
            rows = found.read(block, records[block])
            if rows is None:
                raise RowsMissing(block)
            parts.append(rows)
        values = split(plan, np.concatenate(parts))
        start = first * plan.block_tokens
        for key, own in values.items():
            drain.write(key, slice(start, start + len(own)), own)
        yield from drain.objects()
