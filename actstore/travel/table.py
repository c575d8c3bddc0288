"""Columns along tokens, as other tools give them, to a corpus: sequences, ids, texts, labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..corpus import Column, Corpus
from ..errors import CorpusError
from ..records import check_name
from ..schema import Categorical

__all__ = ["ALIASES", "corpus_of_columns"]

ALIASES = {"input_ids": "token_id", "token_ids": "token_id", "tokens": "token_id"}
"""What else the column of token ids is called."""

UNKNOWN_TEXT = "…"
"""Text of tokens that were read by the model and are not in the source."""

_MOST_IDS = 10_000_000
_OWN = ("sequence", "position", "token_id", "token_text", "special")


def corpus_of_columns(
    columns: Mapping[str, np.ndarray], lengths: np.ndarray | None, n: int
) -> tuple[Corpus, np.ndarray | None]:
    """Lay tokens out as sequences, with labels; every token is kept.

    Parameters
    ----------
    columns : mapping of str to ndarray (token,)
        Texts as objects. ``sequence``, ``position``, ``token_id``, ``token_text`` and ``special``
        say what a store has of every token; all others are labels.
    lengths : ndarray of int, optional
        Tokens of each sequence, where no column ``sequence`` says them.
    n : int
        Tokens.

    Returns
    -------
    corpus : Corpus
        Where positions leave gaps, inputs stand that are not kept, of a token that is not known.
    vocabulary : ndarray of str, or None
        Text of each token id, where the texts are there.
    """
    left_out: dict[str, str] = {}
    labels: dict[str, np.ndarray] = {}
    for name, values in columns.items():
        if name in _OWN:
            continue
        try:
            if name != "document":  # which a corpus makes itself, and here is the source's
                check_name(name, "the source")
            labels[name] = values
        except CorpusError as error:
            left_out[name] = str(error)
    run, position = _places(columns, lengths, n, labels)
    first = np.flatnonzero(np.diff(run, prepend=-1))
    last = np.append(first[1:], n) - 1
    starts = np.concatenate([[0], np.cumsum(position[last] + 1)]).astype(np.int64)
    place = starts[run] + position
    total = int(starts[-1])
    ids, vocabulary = _ids(columns, n, total > n, left_out)
    token_ids = np.full(total, -1 if vocabulary is None else len(vocabulary) - 1, np.int32)
    token_ids[place] = ids
    special = np.zeros(total, bool)
    if "special" in columns:
        special[place] = columns["special"].astype(bool)
    keep = np.zeros(total, bool)
    keep[place] = True
    of_sequences: dict[str, Column] = {}
    of_tokens: dict[str, Column] = {}
    labels.setdefault("document", run)
    for name, values in labels.items():
        if _constant(values, first, run):
            of_sequences[name] = _column(values[first])
        else:
            of_tokens[name] = _spread(values, place, total)
    notes: dict[str, Any] = {"left_out": left_out} if left_out else {}
    if total > n:
        notes["inputs_not_known"] = total - n
    corpus = Corpus(
        token_ids, starts, special, keep, None, None, None, of_sequences, of_tokens, notes
    )
    return corpus, vocabulary


def _places(
    columns: Mapping[str, np.ndarray],
    lengths: np.ndarray | None,
    n: int,
    labels: dict[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Each token's sequence, from 0, and its position there; numbers that do not serve are labels.

    Sequences are runs of equal numbers; else what the shape of the source says; else positions
    begin anew; else all is one.
    """
    sequence, position = (_whole(columns.get(name)) for name in ("sequence", "position"))
    change = None
    if sequence is not None:
        change = np.diff(sequence, prepend=sequence[:1] - 1) != 0
        if np.count_nonzero(change) != len(np.unique(sequence)):  # shuffled
            change, position = None, None
    if change is None and lengths is not None:
        change = np.zeros(n, bool)
        change[np.cumsum(lengths[lengths > 0])[:-1]] = True
    if change is None:
        change = np.zeros(n, bool)
        if position is not None:
            change[1:] = np.diff(position) <= 0
    change[0] = True
    run = np.cumsum(change) - 1
    first = np.flatnonzero(change)
    plain = np.arange(n) - first[run]
    if position is None or not _usable(position, change, first):
        position = plain
    for name, own in (("sequence", run), ("position", position)):
        if name in columns and not np.array_equal(columns[name], own):
            labels.setdefault(f"source_{name}", columns[name])
    return run, position


def _whole(values: np.ndarray | None) -> np.ndarray | None:
    return None if values is None or values.dtype.kind not in "iu" else values.astype(np.int64)


def _usable(position: np.ndarray, change: np.ndarray, first: np.ndarray) -> bool:
    """Whether positions grow within each sequence, and gaps between them are not most of all."""
    last = np.append(first[1:], len(position)) - 1
    total = float((position[last] + 1.0).sum())
    grows = (np.diff(position) > 0) | change[1:]
    return bool(grows.all() and position.min() >= 0 and total <= max(2**24, 64 * len(position)))


def _ids(
    columns: Mapping[str, np.ndarray], n: int, gaps: bool, left_out: dict[str, str]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Token ids, -1 where they are not known, and the vocabulary: with gaps, of one text more."""
    ids, texts = _whole(columns.get("token_id")), columns.get("token_text")
    if ids is not None and not 0 <= ids.min() <= ids.max() < 2**31 - 1:
        ids, left_out["token_id"] = None, "these are no token ids: they must be from 0 to 2^31 - 2"
    if texts is None:
        return (np.full(n, -1) if ids is None else ids), None
    coded = Categorical.of([str(t) for t in texts])
    if ids is None:
        ids, table = coded.codes.astype(np.int64), coded.values
    else:
        if ids.max() > _MOST_IDS:
            left_out["token_text"] = f"token ids go up to {ids.max():,}"
            return ids, None
        table = np.full(int(ids.max()) + 1, "", dtype=object)
        table[ids] = coded.values[coded.codes]
        if (table[ids] != coded.values[coded.codes]).any():
            left_out["token_text"] = "one token id has several texts"
            return ids, None
    return ids, np.append(table, UNKNOWN_TEXT) if gaps else table


def _constant(values: np.ndarray, first: np.ndarray, run: np.ndarray) -> bool:
    """Whether every sequence has one value."""
    own = values[first][run]
    same = values == own
    if values.dtype.kind == "f":
        same = same | (np.isnan(values) & np.isnan(own))
    return bool(np.all(same))


def _column(values: np.ndarray) -> Column:
    if values.dtype.kind in "OUS":
        return Categorical.of([str(v) for v in values])
    return values.astype(np.float32) if values.dtype == np.float16 else values


def _spread(values: np.ndarray, place: np.ndarray, total: int) -> Column:
    """A label at every input; at those that are not known NaN, no text, or false."""
    column = _column(values)
    if len(values) == total:
        return column
    if isinstance(column, Categorical):
        texts = np.full(total, "", dtype=object)
        texts[place] = column.decode()
        return Categorical.of(list(texts))
    kind = np.float64 if column.dtype.kind in "iu" else column.dtype
    blank = False if column.dtype.kind == "b" else np.nan
    whole = np.full(total, blank, kind)
    whole[place] = column
    return whole
