"""Inputs to sequences with labels: cutting, event-locked windows, selection of tokens.

`build` takes records (see `actstore.records`) and lays all their sequences end to end in a
`Corpus`, which says everything about the input of a dump and nothing about the model.

Every record becomes one sequence, or several where it is longer than the context. With
``windows``, sequences are cut around the occurrences of a token instead, with two more columns:
``condition`` names the window's label, ``offset`` counts tokens from the event, which is 0. Where
an offset means nothing (special tokens put round a window, sequences that are no windows) it is
NaN: no comparison holds there but ``!=``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property, partial
from itertools import chain
from typing import Any

import numpy as np

from .errors import CorpusError, UnknownNameError, UsageError
from .records import Record, read_records
from .schema import Categorical
from .select import Expression, parse
from .tokenise import Tokeniser, Tokens, TokenTexts

__all__ = ["Corpus", "Record", "build", "read_records"]

Column = np.ndarray | Categorical


@dataclass(frozen=True)
class Corpus:
    """Sequences of tokens with their labels; make one with `actstore.build_corpus`.

    Attributes
    ----------
    token_ids : ndarray of int32 (input,)
        All sequences end to end, special tokens included.
    starts : ndarray of int64 (sequence + 1,)
        Sequence s is ``token_ids[starts[s]:starts[s + 1]]``.
    special : ndarray of bool (input,)
        Tokens that were added, or are special ids of the tokenizer.
    keep : ndarray of bool (input,)
        Tokens to capture.
    texts : list of str or None
        Text of each sequence (``""`` for one given as token ids); None without any text.
    char_start, char_end : ndarray of int32 (input,) or None
        Where the token is in the text of its sequence; 0, 0 for added tokens.
    sequence_labels : dict of str to ndarray or Categorical
        Columns with a value per sequence: ``document`` (index of the record in the input),
        ``condition`` (with windows), and the user's own.
    token_labels : dict of str to ndarray or Categorical
        Columns with a value per input token: ``offset`` (with windows), and the user's own.
    notes : dict
        What was left out and why, as JSON holds it.

    Examples
    --------
    >>> from actstore import build_corpus
    >>> corpus = build_corpus([[5, 6, 7], [8, 9]], skip_first=1)
    >>> corpus.n_sequences, corpus.position.tolist(), corpus.keep.tolist()
    (2, [0, 1, 2, 0, 1], [False, True, True, False, True])
    """

    token_ids: np.ndarray
    starts: np.ndarray
    special: np.ndarray
    keep: np.ndarray
    texts: list[str] | None
    char_start: np.ndarray | None
    char_end: np.ndarray | None
    sequence_labels: dict[str, Column]
    token_labels: dict[str, Column]
    notes: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        labels = ", ".join([*self.sequence_labels, *self.token_labels])
        return (
            f"<Corpus: {self.n_sequences:,} sequences, {len(self.token_ids):,} tokens, "
            f"{np.count_nonzero(self.keep):,} kept; labels: {labels}>"
        )

    @classmethod
    def of_lengths(cls, lengths: Sequence[int] | np.ndarray) -> Corpus:
        """Sequences of which nothing is known but their lengths: enough to plan a dump.

        Takes memory by the sequence and not by the token: that of 10 billion tokens can be planned.
        Every token is kept, and has id 0.

        Parameters
        ----------
        lengths : sequence of int
            Tokens of each sequence, at least 1.

        Returns
        -------
        Corpus

        Examples
        --------
        >>> corpus = Corpus.of_lengths(np.full(2_441_407, 4096))
        >>> f"{len(corpus.token_ids):,}"
        '10,000,003,072'
        """
        sizes = np.asarray(lengths, dtype=np.int64)
        if sizes.ndim != 1 or not sizes.size or sizes.min() < 1:
            raise CorpusError("lengths are whole numbers of at least 1, one for each sequence")
        starts = np.concatenate([[0], np.cumsum(sizes)])
        total = int(starts[-1])
        return _Lengths(
            token_ids=np.broadcast_to(np.int32(0), total),
            starts=starts,
            special=np.broadcast_to(np.bool_(False), total),
            keep=np.broadcast_to(np.bool_(True), total),
            texts=None,
            char_start=None,
            char_end=None,
            sequence_labels={},
            token_labels={},
        )

    @property
    def n_sequences(self) -> int:
        """Number of sequences."""
        return len(self.starts) - 1

    @cached_property
    def kept_lengths(self) -> np.ndarray:
        """Tokens of each sequence that are captured (int64)."""
        return np.add.reduceat(self.keep, self.starts[:-1], dtype=np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each sequence (int64)."""
        return np.diff(self.starts)

    @cached_property
    def sequence(self) -> np.ndarray:
        """Index of each input token's sequence (int64)."""
        return np.repeat(np.arange(self.n_sequences), self.lengths)

    @cached_property
    def position(self) -> np.ndarray:
        """Index of each input token in its sequence (int64)."""
        return np.arange(len(self.token_ids)) - self.starts[self.sequence]

    def columns(self, vocabulary: Sequence[str] | np.ndarray | None = None) -> dict[str, Column]:
        """Every column of the input tokens, for `actstore.select.Expression.evaluate`.

        Parameters
        ----------
        vocabulary : sequence of str, optional
            Text of each token id; adds the column ``token_text``.

        Returns
        -------
        dict of str to ndarray or Categorical
            ``sequence position token_id length special``, every label spread to the tokens, and
            ``token_text`` where `vocabulary` is given.
        """
        columns: dict[str, Column] = {
            "sequence": self.sequence,
            "position": self.position,
            "token_id": self.token_ids,
            "length": self.lengths[self.sequence],
            "special": self.special,
        }
        columns |= {name: label[self.sequence] for name, label in self.sequence_labels.items()}
        columns |= self.token_labels
        if vocabulary is not None:
            texts = np.asarray(vocabulary, dtype=object)
            if len(self.token_ids) and int(self.token_ids.max()) >= len(texts):
                raise CorpusError(
                    f"the vocabulary has {len(texts):,} texts, and the corpus token id "
                    f"{self.token_ids.max()}; give one text for every token id"
                )
            columns["token_text"] = Categorical(self.token_ids, texts)
        return columns

    def digest(self) -> str:
        """SHA-256 over everything that determines a dump: tokens, texts, labels, choice.

        Returns
        -------
        str
            In hexadecimal.
        """
        state = hashlib.sha256()

        def add(name: str, data: bytes) -> None:
            state.update(f"{name} {len(data)}\n".encode())
            state.update(data)

        for name in ("token_ids", "starts", "special", "keep", "char_start", "char_end"):
            add(name, _bytes(getattr(self, name)))
        add("texts", json.dumps(self.texts).encode())
        for of, labels in (("sequence", self.sequence_labels), ("token", self.token_labels)):
            for label, column in labels.items():
                add(f"{of} label", json.dumps(label).encode())
                add("values", _bytes(column))
        return state.hexdigest()


class _Lengths(Corpus):
    """A corpus whose tokens are all the same, in constant memory."""

    @cached_property
    def kept_lengths(self) -> np.ndarray:
        return self.lengths

    def digest(self) -> str:
        return hashlib.sha256(b"lengths " + _bytes(self.lengths)).hexdigest()


def _bytes(column: Column | None) -> bytes:
    """A column's content as bytes that differ wherever the content does."""
    if column is None:
        return b"none"
    if isinstance(column, Categorical):
        return json.dumps(column.values.tolist()).encode() + b"\n" + _bytes(column.codes)
    little = np.ascontiguousarray(column, dtype=column.dtype.newbyteorder("<"))
    return little.dtype.str.encode() + b" " + little.tobytes()


# ---------------------------------------------------------------- build


def build(
    records: Iterable[Any],
    tokenizer: Any = None,
    *,
    context: int | None = None,
    vocab_size: int | None = None,
    bos: str = "auto",
    windows: Sequence[str] | Mapping[str, str | Sequence[str]] = (),
    before: int = 20,
    after: int = 10,
    limit: int | None = None,
    not_beside_digits: str | Sequence[str] = (),
    from_token: int = 0,
    plain: str | None = None,
    keep: str | None = None,
    skip_special: bool = False,
    skip_first: int = 0,
    max_tokens: int | None = None,
    model: str = "the model",
) -> Corpus:
    """Lay records out as sequences of tokens.

    Parameters
    ----------
    records : iterable of str, sequence of int, mapping or Record
        The input; of a mapping, ``text`` or ``input_ids`` is used and every other key is a label.
    tokenizer : transformers tokenizer, optional
        Needed for text, for windows, and for ``token_text`` in `keep`.
    context : int, optional
        Longest sequence, special tokens included; longer records are cut into consecutive ones.
    vocab_size : int, optional
        Token ids must be below it.
    bos : {"auto", "always", "never"}
        What goes round each sequence. "auto": what the tokenizer itself puts round a text, and
        nothing round given token ids. "always": a BOS (else CLS) in front in any case. "never":
        nothing.
    windows : sequence of str, or mapping
        Event-locked windows: ``"LABEL=TOKEN"`` (TOKEN is matched after stripping white space from
        the token's text) or ``"LABEL==TEXT"`` (matched exactly); a label may come more than once.
        A mapping of labels to one or several tokens matches after stripping.
    before, after : int
        Tokens of a window before and after its event. An occurrence without as many in its
        record is left out and counted.
    limit : int, optional
        At most so many windows of each label, in the order of the text.
    not_beside_digits : str or sequence of str
        Labels whose token does not count where a digit stands directly on either side (3.14).
    from_token : int
        Where in each record the search begins.
    plain : str, optional
        ``"LABEL"`` or ``"LABEL=N"``: beside the windows, one uncut sequence of the first N tokens
        of the first record (as many as fit the context), with LABEL as its condition.
    keep : str, optional
        Token expression (see `actstore.select`) that says which tokens to capture.
    skip_special : bool
        Do not capture special tokens.
    skip_first : int
        Do not capture so many tokens at the start of each sequence.
    max_tokens : int, optional
        Capture no more than so many tokens; sequences after that are dropped.
    model : str
        The model's name, for messages.

    Returns
    -------
    Corpus
        Sequences in the order of the records; with windows, all those of the first label, then of
        the second ..., then the plain one.

    Raises
    ------
    CorpusError
        The input cannot be used, or nothing of it remains; the message says where or why.

    Examples
    --------
    >>> from actstore import build_corpus
    >>> corpus = build_corpus([{"input_ids": [5, 6, 7, 8], "play": "Hamlet"}, [9]], context=3)
    >>> corpus.token_ids.tolist(), corpus.starts.tolist()
    ([5, 6, 7, 8, 9], [0, 3, 4, 5])
    >>> corpus.sequence_labels["play"].decode().tolist()
    ['Hamlet', 'Hamlet', '']
    """
    if isinstance(records, str | bytes | Mapping):
        raise CorpusError(
            f"records are a list, and this is one {type(records).__name__}; write [record], or "
            "read_records(path) for a file"
        )
    if isinstance(not_beside_digits, str):
        not_beside_digits = [not_beside_digits]
    _at_least(0, before=before, after=after, from_token=from_token, skip_first=skip_first)
    _at_least(1, context=context, limit=limit, max_tokens=max_tokens, vocab_size=vocab_size)
    tokeniser = Tokeniser(tokenizer, vocab_size=vocab_size, bos=bos, model=model)
    texts = TokenTexts(tokenizer) if tokenizer is not None else None
    choice = _Choice(
        None if keep is None else parse(keep), skip_special, skip_first, max_tokens, texts
    )
    cutter: _Cutter | _Windows
    if windows:
        if texts is None:
            raise CorpusError(
                f"--windows matches the text of tokens, but {model} has no tokenizer; put the "
                "tokenizer's files beside the model's"
            )
        cutter = _Windows(
            _window_rules(windows),
            texts,
            context=context,
            before=before,
            after=after,
            limit=limit,
            not_beside_digits=not_beside_digits,
            from_token=from_token,
            plain=plain,
        )
    else:
        _only_with_windows(limit, from_token, not_beside_digits, plain)
        cutter = _Cutter(context)

    kept = 0
    for batch in tokeniser.batches(records):
        pieces = [piece for tokens in batch for piece in cutter.take(tokens)]
        if max_tokens is not None and pieces:  # enough read: the rest need not be tokenised
            kept += choice.count(pieces)
            if kept >= max_tokens:
                break
    pieces = cutter.pieces()
    if not pieces:
        read, empty = tokeniser.notes["records"], tokeniser.notes["empty_records"]
        raise CorpusError(
            f"the corpus is empty: {read} records read, {empty} of them without any token. Check "
            "the input, or which column holds the text (--column)"
        )
    notes = {**tokeniser.notes, **cutter.notes}
    if tokeniser.left_out:
        notes["labels_left_out"] = tokeniser.left_out
    return replace(choice.apply(pieces), notes={k: v for k, v in notes.items() if v})


def _at_least(least: int, **options: int | None) -> None:
    for name, value in options.items():
        if value is not None and (not isinstance(value, int | np.integer) or value < least):
            raise CorpusError(f"{name} {value!r}: a whole number of at least {least} is needed")


def _only_with_windows(
    limit: int | None, from_token: int, not_beside_digits: Sequence[str], plain: str | None
) -> None:
    if plain is not None:
        raise CorpusError(
            f"--plain {plain!r} goes beside --windows; without them every sequence is plain: leave "
            "it out, and choose the number of tokens with --max-tokens"
        )
    if limit is not None or from_token or not_beside_digits:
        raise CorpusError(
            "--limit, --from-token and --not-beside-digits need --windows, for example "
            "--windows terminal=."
        )


# ---------------------------------------------------------------- tokens -> pieces


@dataclass(frozen=True)
class _Piece:
    """A run of a record's tokens that becomes one sequence, inside its frame."""

    tokens: Tokens
    start: int
    stop: int
    condition: str | None = None
    event: int | None = None

    def __len__(self) -> int:
        return self.stop - self.start + len(self.tokens.frame)

    def framed(self, inner: np.ndarray, filler: Any) -> list[np.ndarray]:
        """Parts of a column: values of the piece's own tokens, a filler for added ones."""
        frame = self.tokens.frame
        shape, dtype = inner.shape[1:], inner.dtype
        before = np.full((len(frame.prefix), *shape), filler, dtype)
        return [before, inner, np.full((len(frame.suffix), *shape), filler, dtype)]

    def ids(self) -> list[np.ndarray]:
        own, frame = self.tokens.ids[self.start : self.stop], self.tokens.frame
        if own[0] in frame.prefix:
            raise CorpusError(
                f"{self.tokens.record.where}: the sequence from token {self.start} begins with "
                f"the special token {own[0]} already, and another would be put in front; pass "
                "--bos never, or take it out of the input"
            )
        return [np.array(frame.prefix, np.int32), own, np.array(frame.suffix, np.int32)]

    def special(self) -> list[np.ndarray]:
        return self.framed(self.tokens.special[self.start : self.stop], True)

    def offsets(self) -> list[np.ndarray]:
        event = np.nan if self.event is None else self.event
        own = np.arange(self.start, self.stop) - event
        return self.framed(own.astype(np.float32), np.nan)

    def label(self, name: str) -> list[Any]:
        """A label's value for every token."""
        value = self.tokens.record.labels.get(name)
        own = value[self.start : self.stop] if isinstance(value, list) else None
        frame = self.tokens.frame
        return [
            *[None] * len(frame.prefix),
            *([value] * (self.stop - self.start) if own is None else own),
            *[None] * len(frame.suffix),
        ]

    def text(self) -> tuple[int, str]:
        """Where the piece's text begins in the record's, and the text.

        Texts of consecutive pieces cover the record's text: white space between two tokens that
        belongs to neither goes to the first.
        """
        text, spans, n = self.tokens.record.text, self.tokens.spans, len(self.tokens.ids)
        if text is None:
            return 0, ""
        if spans is None:
            cut = (self.start, self.stop) != (0, n)
            return 0, self.tokens.decode(self.tokens.ids[self.start : self.stop]) if cut else text
        low = int(spans[self.start, 0]) if self.start else 0
        if self.stop == n:
            return low, text[low:]
        return low, text[low : max(spans[self.stop - 1, 1], spans[self.stop, 0])]

    def spans(self, low: int) -> list[np.ndarray]:
        if self.tokens.spans is None:
            return self.framed(np.zeros((self.stop - self.start, 2), np.int32), 0)
        return self.framed(np.maximum(self.tokens.spans[self.start : self.stop] - low, 0), 0)


class _Cutter:
    """Cuts each record into consecutive sequences that fit the context."""

    def __init__(self, context: int | None) -> None:
        self.context = context
        self.notes: dict[str, Any] = {"texts_cut": 0}
        self._pieces: list[_Piece] = []

    def take(self, tokens: Tokens) -> list[_Piece]:
        room = _room(self.context, tokens) or len(tokens.ids)
        starts = range(0, len(tokens.ids), room)
        self.notes["texts_cut"] += len(starts) > 1
        pieces = [_Piece(tokens, s, min(s + room, len(tokens.ids))) for s in starts]
        self._pieces += pieces
        return pieces

    def pieces(self) -> list[_Piece]:
        return self._pieces


def _room(context: int | None, tokens: Tokens) -> int | None:
    """Tokens of a record that fit a sequence beside its special tokens; None is any number."""
    if context is None:
        return None
    if context <= len(tokens.frame):
        raise CorpusError(
            f"context {context} has no room for a token beside the {len(tokens.frame)} special "
            "tokens put round each sequence; choose a larger --context, or --bos never"
        )
    return context - len(tokens.frame)


# ---------------------------------------------------------------- windows


@dataclass(frozen=True)
class _Rule:
    """Whether a token of this text is an event."""

    token: str
    exact: bool

    def __call__(self, text: str) -> bool:
        return (text if self.exact else text.strip()) == self.token


def _window_rules(
    windows: Sequence[str] | Mapping[str, str | Sequence[str]],
) -> dict[str, list[_Rule]]:
    """Labels, and what counts as an event of each."""
    found: list[tuple[str, str, bool]] = []
    if isinstance(windows, Mapping):
        for label, tokens in windows.items():
            found += [(label, t, False) for t in ([tokens] if isinstance(tokens, str) else tokens)]
    else:
        for spec in [windows] if isinstance(windows, str) else windows:
            match = re.fullmatch(r"([^=]+)=(=?+)(.+)", spec, re.DOTALL)
            if match is None:
                raise _bad_window(spec)
            found.append((match[1].strip(), match[3], match[2] == "="))
    rules: dict[str, list[_Rule]] = {}
    for label, token, exact in found:
        token = token if exact else token.strip()
        if not label or not token:
            raise _bad_window(f"{label}={token}")
        rules.setdefault(label, []).append(_Rule(token, exact))
    return rules


def _bad_window(spec: str) -> CorpusError:
    return CorpusError(
        f"--windows {spec!r} is not LABEL=TOKEN; write for example --windows terminal=. (any token "
        "that is '.' between white space), or --windows coffee==' coffee' (exactly this text)"
    )


class _Windows:
    """Cuts a sequence round each occurrence of a token."""

    DIGITS = frozenset("0123456789")

    def __init__(
        self,
        rules: dict[str, list[_Rule]],
        texts: TokenTexts,
        *,
        context: int | None,
        before: int,
        after: int,
        limit: int | None,
        not_beside_digits: Sequence[str],
        from_token: int,
        plain: str | None,
    ) -> None:
        for label in not_beside_digits:
            if label not in rules:
                raise UnknownNameError("window label", label, rules)
        self.rules = rules
        self.texts = texts
        self.context = context
        self.before, self.after = before, after
        self.limit = limit
        self.not_beside_digits = frozenset(not_beside_digits)
        self.from_token = from_token
        self.plain = plain
        self.plain_label, self.plain_tokens = _plain(plain, rules)
        self.plain_pieces: list[_Piece] = []
        self.found: dict[str, list[_Piece]] = {label: [] for label in rules}
        self.counts: dict[str, Counter[str]] = {label: Counter() for label in rules}

    def take(self, tokens: Tokens) -> list[_Piece]:
        for name in ("condition", "offset"):
            if name in tokens.record.labels:
                raise CorpusError(
                    f"{tokens.record.where}: the key {name!r} is a column that --windows makes; "
                    f"rename it, for example to 'my_{name}'"
                )
        room = _room(self.context, tokens)
        if room is not None and room <= self.before + self.after:
            raise CorpusError(
                f"a window of {self.before} + 1 + {self.after} tokens does not fit the context of "
                f"{self.context} ({len(tokens.frame)} special tokens go round it); choose smaller "
                "--before and --after"
            )
        if self.plain is not None and not self.plain_pieces:
            self.plain_pieces.append(self._plain_piece(tokens, room))
        column = self.texts.column(tokens.ids)
        beside = self._beside_digits(column)
        for label, rules in self.rules.items():
            table = np.array([any(rule(text) for rule in rules) for text in column.values])
            events = np.flatnonzero(table[column.codes])
            avoid = label in self.not_beside_digits
            self._cut(label, tokens, events, beside[events] & avoid)
        return []  # how many there will be is known at the end only

    def _beside_digits(self, column: Categorical) -> np.ndarray:
        """Tokens with a digit directly before or after them."""
        beside = np.zeros(len(column), dtype=bool)
        if self.not_beside_digits:
            opens = np.array([text[:1] in self.DIGITS for text in column.values])[column.codes]
            closes = np.array([text[-1:] in self.DIGITS for text in column.values])[column.codes]
            beside[:-1] |= opens[1:]
            beside[1:] |= closes[:-1]
        return beside

    def _cut(self, label: str, tokens: Tokens, events: np.ndarray, beside: np.ndarray) -> None:
        """Keep the events that can be used; count the others by the first reason that applies."""
        early = events < self.from_token
        beside = beside & ~early
        short = (events < self.before) | (events + self.after >= len(tokens.ids))
        short = short & ~early & ~beside
        usable = events[~early & ~beside & ~short]
        room = None if self.limit is None else self.limit - len(self.found[label])
        used = usable[:room]
        self.found[label] += [
            _Piece(tokens, t - self.before, t + self.after + 1, label, t) for t in used.tolist()
        ]
        self.counts[label].update(
            found=len(events),
            used=len(used),
            no_full_context=int(short.sum()),
            beside_digits=int(beside.sum()),
            before_from_token=int(early.sum()),
            over_limit=len(usable) - len(used),
        )

    def _plain_piece(self, tokens: Tokens, room: int | None) -> _Piece:
        have = len(tokens.ids)
        fits = have if room is None else min(have, room)
        wanted = self.plain_tokens or fits
        if wanted > fits:
            reason = (
                f"{tokens.record.where} has only {have}"
                if wanted > have
                else f"the context holds {room}"
            )
            raise CorpusError(
                f"--plain {self.plain!r}: {wanted} tokens are wanted and {reason}; write "
                f"--plain {self.plain_label}={fits}"
            )
        return _Piece(tokens, 0, wanted, self.plain_label)

    @property
    def notes(self) -> dict[str, Any]:
        return {"windows": {label: dict(counts) for label, counts in self.counts.items()}}

    def pieces(self) -> list[_Piece]:
        if self.texts.known:
            for label in self.rules:
                if not self.found[label]:
                    raise self._none(label)
        return [*chain(*self.found.values()), *self.plain_pieces]

    def _none(self, label: str) -> CorpusError:
        counts = self.counts[label]
        tokens = " or ".join(repr(rule.token) for rule in self.rules[label])
        if counts["found"]:
            reasons = ", ".join(
                f"{n} {reason.replace('_', ' ')}"
                for reason, n in counts.items()
                if n and reason != "found"
            )
            return CorpusError(
                f"window label {label!r}: none of the {counts['found']} occurrences of {tokens} "
                f"can be used ({reasons}; --before {self.before}, --after {self.after}, "
                f"--from-token {self.from_token})"
            )
        return CorpusError(
            f"window label {label!r}: no token of the input is {tokens}"
            + "".join(self._hint(rule.token) for rule in self.rules[label])
            + ". A window is cut round a single token"
        )

    def _hint(self, token: str) -> str:
        seen = sorted(set(self.texts.known.values()))
        bare = token.strip().casefold()
        near = [t for t in seen if t.strip().casefold() == bare][:5]
        near += [t for t in get_close_matches(token, seen, n=3) if t not in near]
        split = self.texts.split(token)
        return (f"; nearest: {', '.join(map(repr, near))}" if near else "") + (
            f"; {token!r} is {len(split)} tokens here: {', '.join(map(repr, split))}"
            if len(split) > 1
            else ""
        )


def _plain(spec: str | None, rules: Mapping[str, Any]) -> tuple[str, int | None]:
    """Label and number of tokens of ``LABEL[=N]``."""
    if spec is None:
        return "", None
    match = re.fullmatch(r"([^=]+)(?:=([0-9]{1,9}))?", spec)
    if match is None or not match[1].strip() or (match[2] and int(match[2]) == 0):
        raise CorpusError(f"--plain {spec!r} is not LABEL or LABEL=N; write for example one=500")
    if match[1].strip() in rules:
        raise CorpusError(
            f"--plain {spec!r}: {match[1].strip()!r} is the label of windows too; choose another"
        )
    return match[1].strip(), int(match[2]) if match[2] else None


# ---------------------------------------------------------------- pieces -> corpus


def _assemble(pieces: Sequence[_Piece]) -> Corpus:
    """Pieces end to end, every token kept."""
    token_ids = _concatenate(p.ids() for p in pieces)
    texts = spans = None
    if any(p.tokens.record.text is not None for p in pieces):
        placed = [p.text() for p in pieces]
        texts = [text for _, text in placed]
        if any(p.tokens.spans is not None for p in pieces):
            lows = (low for low, _ in placed)
            spans = _concatenate(p.spans(low) for p, low in zip(pieces, lows, strict=True))
    sequence_labels, token_labels = _labels(pieces)
    return Corpus(
        token_ids=token_ids,
        starts=np.cumsum([0, *map(len, pieces)], dtype=np.int64),
        special=_concatenate(p.special() for p in pieces),
        keep=np.ones(len(token_ids), dtype=bool),
        texts=texts,
        char_start=None if spans is None else np.ascontiguousarray(spans[:, 0]),
        char_end=None if spans is None else np.ascontiguousarray(spans[:, 1]),
        sequence_labels=sequence_labels,
        token_labels=token_labels,
    )


def _concatenate(parts: Iterable[list[np.ndarray]]) -> np.ndarray:
    return np.concatenate(list(chain.from_iterable(parts)))


def _labels(pieces: Sequence[_Piece]) -> tuple[dict[str, Column], dict[str, Column]]:
    of_sequences: dict[str, Column] = {"document": np.array([p.tokens.document for p in pieces])}
    of_tokens: dict[str, Column] = {}
    if any(p.condition is not None for p in pieces):
        of_sequences["condition"] = Categorical.of([p.condition or "" for p in pieces])
        of_tokens["offset"] = _concatenate(p.offsets() for p in pieces)
    for name in dict.fromkeys(chain.from_iterable(p.tokens.record.labels for p in pieces)):
        values = [p.tokens.record.labels.get(name) for p in pieces]
        if any(isinstance(v, list) for v in values):
            of_tokens[name] = label_column([v for p in pieces for v in p.label(name)])
        else:
            of_sequences[name] = label_column(values)
    return of_sequences, of_tokens


def label_column(values: Sequence[Any]) -> Column:
    """Label values as one column.

    Whole numbers give int64; numbers, of which some may be missing, float64 (missing is NaN);
    booleans bool; anything else strings (missing is ``""``, booleans ``"true"`` and ``"false"``).
    Numbers that these types cannot hold exactly become strings.

    Examples
    --------
    >>> label_column([1, None, 2.5]).tolist(), label_column(["a", None]).decode().tolist()
    ([1.0, nan, 2.5], ['a', ''])
    """
    kinds = {type(v) for v in values}
    if kinds == {bool}:
        return np.array(values, dtype=bool)
    if kinds == {int} and all(-(2**63) <= v < 2**63 for v in values):
        return np.array(values, dtype=np.int64)
    if kinds & {int, float} and kinds <= {int, float, type(None)} and all(map(_is_float, values)):
        return np.array([np.nan if v is None else v for v in values], dtype=np.float64)
    return Categorical.of([_as_string(v) for v in values])


def _is_float(value: int | float | None) -> bool:
    return not isinstance(value, int) or (abs(value) < 2**1000 and float(value) == value)


def _as_string(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


# ---------------------------------------------------------------- which tokens are captured


@dataclass(frozen=True)
class _Choice:
    """Which tokens are captured."""

    keep: Expression | None
    skip_special: bool
    skip_first: int
    max_tokens: int | None
    texts: TokenTexts | None

    def rules(self) -> Iterator[tuple[str, Callable[[Corpus], np.ndarray]]]:
        """What is asked for, as on the command line, and the tokens that it allows."""
        if self.keep is not None:
            yield f"--keep {self.keep.text!r}", partial(self._expressed, self.keep)
        if self.skip_special:
            yield "--skip-special", lambda corpus: ~corpus.special
        if self.skip_first:
            yield f"--skip-first {self.skip_first}", lambda c: c.position >= self.skip_first

    def _expressed(self, keep: Expression, corpus: Corpus) -> np.ndarray:
        columns = corpus.columns()
        if "token_text" in keep.columns and self.texts is not None:
            columns["token_text"] = self.texts.column(corpus.token_ids)
        return keep.evaluate(columns)

    def mask(self, corpus: Corpus) -> np.ndarray:
        mask = np.ones(len(corpus.token_ids), dtype=bool)
        for name, allowed in self.rules():
            before = np.count_nonzero(mask)
            mask &= allowed(corpus)
            if not mask.any():
                raise CorpusError(
                    f"no token is left to capture: {name} removes all of the {before:,} tokens "
                    f"in {corpus.n_sequences:,} sequences"
                )
        return mask

    def count(self, pieces: Sequence[_Piece]) -> int:
        """Tokens captured of these pieces; 0 where only the whole corpus can tell."""
        try:
            return int(np.count_nonzero(self.mask(_assemble(pieces))))
        except UsageError:  # for instance a label that only later records have
            return 0

    def apply(self, pieces: Sequence[_Piece]) -> Corpus:
        corpus = _assemble(pieces)
        mask = self.mask(corpus)
        if self.max_tokens is None or np.count_nonzero(mask) < self.max_tokens:
            return replace(corpus, keep=mask)
        last = int(np.flatnonzero(mask)[self.max_tokens - 1])
        mask[last + 1 :] = False
        sequences = int(corpus.sequence[last]) + 1
        if sequences < len(pieces):
            corpus = _assemble(pieces[:sequences])
        return replace(corpus, keep=mask[: len(corpus.token_ids)].copy())
