"""Records to tokens, with the place of each token in its text.

Nothing is added here: what goes round a sequence (its `Frame`) is put there by `actstore.corpus`,
which cuts first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import CorpusError, UnknownNameError
from .records import Record, as_record
from .schema import Categorical

__all__ = ["BOS", "Frame", "TokenTexts", "Tokeniser", "Tokens", "encode", "token_texts"]

BOS = ("auto", "always", "never")
"""What `bos` may be: the tokenizer's own special tokens, a BOS in any case, nothing added."""


@dataclass(frozen=True)
class Frame:
    """The special tokens that go round every sequence."""

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prefix) + len(self.suffix)


@dataclass(frozen=True)
class Tokens:
    """A record's whole token sequence, uncut and without its frame.

    Attributes
    ----------
    record : Record
        What was tokenised.
    document : int
        The record's index in the input.
    ids : ndarray of int32
        Token ids.
    spans : ndarray of int32 or None
        (token, 2): where each token begins and ends in the text; None if that is not known.
    special : ndarray of bool
        Which of them are special tokens.
    frame : Frame
        What is to go round each sequence that is cut from it.
    decode : callable
        Token ids to text, for a text whose spans are not known.
    """

    record: Record
    document: int
    ids: np.ndarray
    spans: np.ndarray | None
    special: np.ndarray
    frame: Frame
    decode: Callable[[np.ndarray], str]


class Tokeniser:
    """Turns records into tokens, many texts at a time.

    Parameters
    ----------
    tokenizer : transformers tokenizer or None
        None serves records of token ids only.
    vocab_size : int, optional
        Token ids must be below it.
    bos : {"auto", "always", "never"}
        What goes round each sequence: what the tokenizer itself puts there (nothing round given
        token ids), a BOS in any case, or nothing.
    model : str
        The model's name, for messages.

    Attributes
    ----------
    notes : Counter
        Records read, empty records, padding dropped.
    left_out : dict
        Keys that are no labels, and why.
    """

    BATCH_RECORDS = 1024
    BATCH_CHARS = 4_000_000

    def __init__(
        self, tokenizer: Any, *, vocab_size: int | None, bos: str, model: str = "the model"
    ) -> None:
        if bos not in BOS:
            raise UnknownNameError("bos", bos, BOS)
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.model = model
        self.text_frame, self.ids_frame = _frames(tokenizer, bos, model)
        self.special_ids = np.array(getattr(tokenizer, "all_special_ids", []), dtype=np.int64)
        self.notes: Counter[str] = Counter()
        self.left_out: dict[str, str] = {}

    def batches(self, items: Iterable[Any]) -> Iterator[list[Tokens]]:
        """Tokenise records in order, a batch at a time; empty ones are counted and skipped."""
        batch: list[tuple[int, Record]] = []
        size = 0
        for index, item in enumerate(items):
            record = as_record(item, f"record {index}")
            self.left_out.update(record.left_out)
            self.notes["records"] += 1
            self.notes["padding"] += record.padding
            batch.append((index, record))
            size += len(record.text or "")
            if len(batch) >= self.BATCH_RECORDS or size >= self.BATCH_CHARS:
                yield self._tokens(batch)
                batch, size = [], 0
        yield self._tokens(batch)

    def _tokens(self, batch: list[tuple[int, Record]]) -> list[Tokens]:
        texts = [record.text for _, record in batch if record.text is not None]
        if texts and self.tokenizer is None:
            where = next(record.where for _, record in batch if record.text is not None)
            raise CorpusError(
                f"{where} is text, but {self.model} has no tokenizer. Put the tokenizer's files "
                "beside the model's, or give token ids: JSON lines with 'input_ids'"
            )
        try:
            encoded = iter(encode(self.tokenizer, texts))
        except Exception as error:  # the library's own, of any kind
            places = f"{batch[0][1].where} to {batch[-1][1].where}"
            raise CorpusError(
                f"the tokenizer of {self.model} fails on the text of {places}: {error}"
            ) from error
        found = []
        for index, record in batch:
            if record.input_ids is None:
                (ids, spans), frame = next(encoded), self.text_frame
            else:
                (ids, spans), frame = (record.input_ids, None), self.ids_frame
            if not len(ids):
                self.notes["empty_records"] += 1
                continue
            self._check(ids, record)
            special = np.isin(ids, self.special_ids)
            ids = ids.astype(np.int32)
            found.append(Tokens(record, index, ids, spans, special, frame, self._decode))
        return found

    def _decode(self, ids: np.ndarray) -> str:
        return str(self.tokenizer.decode(ids.tolist()))

    def _check(self, ids: np.ndarray, record: Record) -> None:
        size = 2**31 if self.vocab_size is None else self.vocab_size
        wrong = np.flatnonzero((ids < 0) | (ids >= size))
        if wrong.size:
            at = int(wrong[0])
            raise CorpusError(
                f"{record.where}: token {at} has id {ids[at]}, outside the vocabulary of "
                f"{self.model}: 0 to {size - 1} ({wrong.size} such tokens). Use the tokenizer that "
                "the model was trained with"
            )


def _frames(tokenizer: Any, bos: str, model: str) -> tuple[Frame, Frame]:
    """What goes round texts, and round given token ids."""
    if bos == "never":
        return Frame(), Frame()
    own = Frame() if tokenizer is None else template(tokenizer)
    if bos == "auto":
        return own, Frame()
    first = getattr(tokenizer, "bos_token_id", None)
    if first is None:
        first = getattr(tokenizer, "cls_token_id", None)
    if first is None:
        lack = "no tokenizer" if tokenizer is None else "a tokenizer without BOS and CLS"
        raise CorpusError(
            f"--bos always: {model} has {lack}, so nothing can be put in front; use --bos auto"
        )
    return (own if first in own.prefix else Frame((first, *own.prefix), own.suffix)), Frame(
        (first,)
    )


def template(tokenizer: Any) -> Frame:
    """The special tokens that a tokenizer puts round every text by itself.

    They are found by tokenising a short text with and without them, which any tokenizer can do.
    """
    for probe in _probes(tokenizer):
        try:
            bare = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
            framed = list(tokenizer(probe)["input_ids"])
        except Exception:  # it has no token for this probe; the next may do
            continue
        if set(bare) <= set(tokenizer.all_special_ids):
            continue  # nothing, or what the frame itself might hold
        for i in range(len(framed) - len(bare) + 1):
            if framed[i : i + len(bare)] == bare:
                return Frame(tuple(framed[:i]), tuple(framed[i + len(bare) :]))
    return Frame()


def _probes(tokenizer: Any) -> Iterator[str]:
    """Short texts, one of which any tokenizer has a token for."""
    yield from ("a", "1", ".")
    yield from list(tokenizer.get_vocab())[:100]


PART = 999_983
"""Characters of a long text tokenised at a time: a hundred bytes a token add up. Prime, so that
a periodic text is not in phase from one part to the next and cannot agree by accident."""

PARTS_AT_ONCE = 4
"""Parts tokenised together, in parallel."""

OVERLAP = 8192
"""Characters that one part shares with the next."""

AGREE = 32
"""Tokens on either side of a seam on which both parts must agree."""


def encode(
    tokenizer: Any, texts: Sequence[str], part: int = PART, overlap: int = OVERLAP
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Token ids and spans of texts, without special tokens.

    A text of more than `part` characters is tokenised in overlapping parts, joined in the middle
    of the overlap if both agree there on every token and place; else it is tokenised whole.
    """
    if not texts:
        return []
    if not getattr(tokenizer, "is_fast", False):
        ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [(np.array(i, dtype=np.int64), None) for i in ids]
    short = [text for text in texts if len(text) <= part + overlap]
    whole = iter(_encode_fast(tokenizer, short))
    return [
        next(whole)
        if len(text) <= part + overlap
        else _encode_parts(tokenizer, text, part, overlap)
        for text in texts
    ]


def _encode_fast(tokenizer: Any, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # that a text is longer than the model's context is known: it is cut later
    )
    return [
        (np.array(ids, dtype=np.int32), np.array(spans, dtype=np.int32).reshape(-1, 2))
        for ids, spans in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _encode_parts(
    tokenizer: Any, text: str, part: int, overlap: int
) -> tuple[np.ndarray, np.ndarray]:
    starts = range(0, len(text) - overlap, part)
    done: list[tuple[np.ndarray, np.ndarray]] = []
    for first in range(0, len(starts), PARTS_AT_ONCE):
        batch = starts[first : first + PARTS_AT_ONCE]
        encoded = _encode_fast(tokenizer, [text[s : s + part + overlap] for s in batch])
        for start, (ids, spans) in zip(batch, encoded, strict=True):
            placed = ids, spans + np.int32(start)
            seam = _seam(done[-1], placed, start + overlap // 2) if done else (0, 0)
            if seam is None:
                return _encode_fast(tokenizer, [text])[0]
            if done:
                done[-1] = done[-1][0][: seam[0]], done[-1][1][: seam[0]]
            done.append((placed[0][seam[1] :], placed[1][seam[1] :]))
    return np.concatenate([ids for ids, _ in done]), np.concatenate([spans for _, spans in done])


def _seam(
    left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray], middle: int
) -> tuple[int, int] | None:
    """Where to leave one part and enter the next, near a character; None if they differ there."""
    i, j = (int(np.searchsorted(spans[:, 0], middle)) for _, spans in (left, right))
    if min(i, j, len(left[0]) - i, len(right[0]) - j) < AGREE:
        return None
    for a, b in zip(left, right, strict=True):
        if not np.array_equal(a[i - AGREE : i + AGREE], b[j - AGREE : j + AGREE]):
            return None
    return i, j


# ---------------------------------------------------------------- the text of single tokens


def token_texts(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    """The text of each token by itself.

    A part of a multi-byte character is shown as the replacement character. The space that
    SentencePiece-like tokenizers drop in front of a lone token is kept. An id that the tokenizer
    does not have gives ``""``.
    """
    found = []
    for i in map(int, ids):
        piece = tokenizer.convert_ids_to_tokens(i)
        if piece is None:
            found.append("")
            continue
        text = tokenizer.decode([i], clean_up_tokenization_spaces=False)
        spaced = isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" ")
        found.append(" " + text if spaced else text)
    return found


class TokenTexts:
    """Texts of the token ids met so far; each is decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.known: dict[int, str] = {}

    def column(self, ids: np.ndarray) -> Categorical:
        """Token texts of a run of tokens."""
        distinct, codes = np.unique(ids, return_inverse=True)
        new = [i for i in distinct.tolist() if i not in self.known]
        self.known.update(zip(new, token_texts(self._tokenizer, new), strict=True))
        values = np.empty(len(distinct), dtype=object)
        values[:] = [self.known[i] for i in distinct.tolist()]
        return Categorical(codes.astype(np.int32), values)

    def split(self, text: str) -> list[str]:
        """The tokens that a text would be cut into."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return token_texts(self._tokenizer, ids)
