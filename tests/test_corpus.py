"""Inputs to sequences: reading, tokenising, cutting, windows, labels, selection."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

import actstore
from actstore import records as reading
from actstore import tokenise
from actstore.corpus import Corpus, build, label_column, read_records
from actstore.errors import CorpusError, ExpressionError, UnknownNameError
from actstore.records import Record, as_record
from actstore.schema import Categorical
from actstore.tokenise import encode, token_texts

TEXT = (
    "The ship was slow, and the sea was wide. It cost 3.14 pounds, or 10,000 pence. "
    "“Naïve,” said the Zürich man – and then 😀 he slept. No. 7 was late. "
    "The coffee, the coffee and the tea were cold.\r\n\r\n\tBut 5. was a list, and .5 a number."
)


@cache
def tokenizer(frame: str = "none") -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on TEXT; with nothing, <s> or [CLS] ... [SEP] round a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "[CLS]", "[SEP]"]
    bpe.train_from_iterator(
        [TEXT] * 3,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    names: dict[str, Any] = {"none": {}, "bos": {"bos_token": "<s>"}}
    names["bert"] = {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    template = {"bos": "<s> $A", "bert": "[CLS] $A [SEP]"}
    if frame in template:
        bpe.post_processor = processors.TemplateProcessing(
            single=template[frame], special_tokens=[(t, bpe.token_to_id(t)) for t in special]
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=16, **names[frame])


def bare(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"]


def sequences(corpus: Corpus) -> list[list[int]]:
    return [
        corpus.token_ids[a:b].tolist()
        for a, b in zip(corpus.starts[:-1], corpus.starts[1:], strict=True)
    ]


def decoded(column: Any) -> list[Any]:
    return (column.decode() if isinstance(column, Categorical) else column).tolist()


texts = st.one_of(
    st.text(min_size=1, max_size=60).filter(lambda t: t.isascii() or t.encode("utf-8", "ignore")),
    st.lists(st.sampled_from(TEXT.split(" ")), min_size=1, max_size=30).map(" ".join),
).filter(lambda t: not any("\ud800" <= c <= "\udfff" for c in t))


# ---------------------------------------------------------------- texts to sequences


@settings(max_examples=60, deadline=None)
@given(
    st.lists(texts, min_size=1, max_size=4), st.integers(4, 30), st.sampled_from(["bos", "bert"])
)
def test_the_pieces_of_a_text_are_its_tokens_and_cover_it(
    given_texts: list[str], context: int, frame: str
) -> None:
    assume(not any("<s>" in t or "[CLS]" in t for t in given_texts))
    corpus = build(given_texts, tokenizer(frame), context=context)
    prefix, suffix = (1, 0) if frame == "bos" else (1, 1)
    assert corpus.lengths.max() <= context
    documents = corpus.sequence_labels["document"]
    for number, text in enumerate(given_texts):
        whole = tokenizer()(text, return_offsets_mapping=True, verbose=False)
        ids: list[int] = []
        covered = 0
        for s in np.flatnonzero(documents == number):
            inner = slice(corpus.starts[s] + prefix, corpus.starts[s + 1] - suffix)
            places = whole["offset_mapping"][len(ids) : len(ids) + inner.stop - inner.start]
            ids += corpus.token_ids[inner].tolist()
            piece, low = corpus.texts[s], places[0][0]
            assert low <= covered and text.startswith(piece, low)
            covered = low + len(piece)
            spans = zip(corpus.char_start[inner], corpus.char_end[inner], strict=True)
            assert [(low + a, low + b) for a, b in spans] == places
            assert max(b for _, b in places) == covered
        assert covered == len(text) and ids == whole["input_ids"]


@pytest.mark.parametrize("frame", ["none", "bos", "bert"])
@pytest.mark.parametrize("bos", ["auto", "never"])
def test_special_tokens_are_the_tokenizers_own_or_none(frame: str, bos: str) -> None:
    corpus = build([TEXT, "The sea."], tokenizer(frame), bos=bos)
    expected = [
        tokenizer(frame)(t, add_special_tokens=bos == "auto", verbose=False)["input_ids"]
        for t in (TEXT, "The sea.")
    ]
    assert sequences(corpus) == expected
    added = [i in tokenizer(frame).all_special_ids for ids in expected for i in ids]
    assert corpus.special.tolist() == added
    assert not corpus.char_end[corpus.special].any() and corpus.char_end[~corpus.special].all()


def test_each_piece_of_a_cut_text_has_its_own_special_tokens() -> None:
    corpus = build([TEXT], tokenizer("bert"), context=16)
    cls, sep = tokenizer("bert").cls_token_id, tokenizer("bert").sep_token_id
    assert corpus.n_sequences > 3 and corpus.notes["texts_cut"] == 1
    assert all(ids[0] == cls and ids[-1] == sep and len(ids) <= 16 for ids in sequences(corpus))
    assert [i for ids in sequences(corpus) for i in ids[1:-1]] == bare(TEXT)
    assert "".join(corpus.texts)[:40] == TEXT[:40]


def test_bos_always_puts_one_in_front_of_texts_and_ids() -> None:
    named = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer()._tokenizer, bos_token="<s>", model_max_length=16
    )
    ids = bare("The sea")
    assert sequences(build(["The sea", {"input_ids": ids}], named)) == [ids, ids]
    both = build(["The sea", {"input_ids": ids}], named, bos="always")
    assert sequences(both) == [[named.bos_token_id, *ids]] * 2
    assert both.special.tolist() == [True] + [False] * len(ids) + [True] + [False] * len(ids)
    bert = tokenizer("bert")
    framed = build(["The sea", ids], bert, bos="always")
    assert sequences(framed) == [
        [bert.cls_token_id, *ids, bert.sep_token_id],
        [bert.cls_token_id, *ids],
    ]


def test_given_ids_are_taken_as_they_are() -> None:
    ids = [[1, 2, 3], np.array([4, 5]), (6,)]
    corpus = build(ids, context=2)
    assert sequences(corpus) == [[1, 2], [3], [4, 5], [6]]
    assert corpus.texts is None and corpus.char_start is None and not corpus.special.any()
    assert sequences(build(ids, tokenizer("bos"))) == [[1, 2, 3], [4, 5], [6]]
    mixed = build([[7, 8], "The sea"], tokenizer())
    assert mixed.texts == ["", "The sea"] and mixed.char_end[:2].tolist() == [0, 0]


def test_padding_is_dropped_by_its_mask() -> None:
    corpus = build(
        [{"input_ids": [0, 0, 7, 8], "attention_mask": [0, 0, 1, 1], "pos": list("abcd")}]
    )
    assert corpus.token_ids.tolist() == [7, 8] and corpus.notes["padding"] == 2
    assert decoded(corpus.token_labels["pos"]) == ["c", "d"]
    with pytest.raises(CorpusError, match=r"record 0: 'attention_mask' has shape \(1,\)"):
        build([{"input_ids": [7, 8], "attention_mask": [1]}])


@pytest.mark.parametrize(
    ("records", "options"),
    [
        (["<s>The sea"], {}),
        (["The sea<s>The sea"], {"context": 4}),
        ([{"input_ids": [0, 5]}], {"bos": "always"}),
    ],
)
def test_a_doubled_bos_is_an_error(records: list[Any], options: dict[str, Any]) -> None:
    first = len(bare("The sea"))
    if "context" in options:
        options = {"context": first + 1}
    with pytest.raises(CorpusError, match=r"record 0: .* begins with .* --bos never"):
        build(records, tokenizer("bos"), **options)
    assert build(records, tokenizer("bos"), bos="never").special.any()


def test_empty_records_are_counted_and_skipped() -> None:
    corpus = build(["", "The sea", {"input_ids": []}, "wide"], tokenizer())
    assert corpus.n_sequences == 2
    assert corpus.sequence_labels["document"].tolist() == [1, 3]
    assert corpus.notes == {"records": 4, "empty_records": 2}


def test_a_long_text_makes_no_noise(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        build([TEXT, TEXT * 10], tokenizer("bert"), context=16)
        build([TEXT], spelling(), context=16)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_position_sequence_and_columns_agree() -> None:
    corpus = build([TEXT, {"text": "The sea", "mood": "calm"}], tokenizer("bos"), context=20)
    vocabulary = token_texts(tokenizer(), range(len(tokenizer())))
    columns = corpus.columns(vocabulary)
    assert corpus.n_sequences == len(corpus.lengths) == len(corpus.texts)
    for i in range(len(corpus.token_ids)):
        s = columns["sequence"][i]
        assert corpus.starts[s] + columns["position"][i] == i
        assert columns["length"][i] == corpus.starts[s + 1] - corpus.starts[s]
    assert decoded(columns["mood"])[-3:] == ["calm"] * 3 and decoded(columns["mood"])[0] == ""
    assert decoded(columns["token_text"]) == [vocabulary[i] for i in corpus.token_ids]
    assert "token_text" not in corpus.columns() and "3 kept" not in repr(corpus)
    with pytest.raises(CorpusError, match=r"vocabulary has 2 texts"):
        corpus.columns(["a", "b"])


# ---------------------------------------------------------------- long texts, other tokenizers


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(TEXT.split(" ")), min_size=300, max_size=600).map(" ".join))
def test_tokenising_in_parts_is_tokenising_whole(text: str) -> None:
    (whole_ids, whole_spans), (ids, spans) = (
        encode(tokenizer(), [text], part, 400)[0] for part in (10**9, 301)
    )
    np.testing.assert_array_equal(ids, whole_ids)
    np.testing.assert_array_equal(spans, whole_spans)


@pytest.mark.parametrize("agree", [5, 40, 500])
def test_where_parts_disagree_the_text_is_tokenised_whole(
    agree: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise, "AGREE", agree)
    pairs = Tokenizer(models.BPE({"a": 0, "aa": 1}, [("a", "a")]))
    fast = PreTrainedTokenizerFast(tokenizer_object=pairs)
    for by, text in (
        (fast, "a" * 3000),
        (tokenizer(), "😀" * 800),
        (tokenizer(), TEXT + "é" * 900),
    ):
        ids, spans = encode(by, [text], 301, 100)[0]
        whole_ids, whole_spans = encode(by, [text])[0]
        np.testing.assert_array_equal(ids, whole_ids)
        np.testing.assert_array_equal(spans, whole_spans)


def test_the_frame_is_found_whatever_the_vocabulary() -> None:
    words = {"[CLS]": 0, "[SEP]": 1, "sea": 2}
    level = Tokenizer(models.WordLevel(words))
    level.pre_tokenizer = pre_tokenizers.Whitespace()
    level.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=level, cls_token="[CLS]", sep_token="[SEP]")
    assert sequences(build(["sea sea"], fast)) == [[0, 2, 2, 1]]
    with pytest.raises(CorpusError, match=r"of the model fails on the text of record 0 .*UNK"):
        build(["unknown"], fast)
    empty = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    empty.normalizer = normalizers.Replace(Regex("."), "")
    with pytest.raises(CorpusError, match=r"1 records read, 1 of them without any token"):
        build(["sea"], PreTrainedTokenizerFast(tokenizer_object=empty))


class Spelling(PreTrainedTokenizer):
    """A tokenizer in Python: every character is a token; no offsets."""

    def __init__(self, **options: Any) -> None:
        self.ids = {c: i for i, c in enumerate(["<s>", *sorted(set(TEXT))])}
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        return len(self.ids)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.ids)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.ids[token]

    def _convert_id_to_token(self, index: int) -> str | None:
        return dict(enumerate(self.ids)).get(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def build_inputs_with_special_tokens(self, ids: list[int], pair: Any = None) -> list[int]:
        return [0, *ids]


@cache
def spelling() -> Spelling:
    return Spelling(bos_token="<s>", model_max_length=16)


def test_a_tokenizer_without_offsets_serves() -> None:
    corpus = build([TEXT, "The sea"], spelling(), context=11)
    assert corpus.char_start is None
    assert "".join(corpus.texts[:-1]) == TEXT and corpus.texts[-1] == "The sea"
    assert all(ids[0] == 0 and len(ids) <= 11 for ids in sequences(corpus))
    windows = build([TEXT], spelling(), windows=["stop=."], before=2, after=0)
    assert all(ids[-1] == spelling().ids["."] for ids in sequences(windows))
    assert len(windows.texts) == TEXT[2:].count(".") and windows.texts[0] == "de."


def test_token_texts_keep_the_space_that_a_lone_token_loses() -> None:
    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    pieces.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    pieces.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(special_tokens=["<unk>"], vocab_size=80, show_progress=False)
    pieces.train_from_iterator(["the sea the sea 3 . 3"] * 5, trainer)
    llama = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>")
    ids = llama("the sea .3", add_special_tokens=False)["input_ids"]
    assert llama.decode([ids[0]]) == "the"
    assert "".join(token_texts(llama, ids)) == " the sea .3"
    assert token_texts(llama, [10**6]) == [""]
    # So a digit behind a space does not stand directly beside the stop.
    spaced = build(
        ["the sea . 3"], llama, windows=["s=."], before=1, after=0, not_beside_digits="s"
    )
    assert spaced.notes["windows"]["s"]["used"] == 1


# ---------------------------------------------------------------- windows


def punctuation(ids: list[int], start: int) -> tuple[list[int], list[int], int]:
    """The search of a notebook: commas, and full stops with no digit on either side."""
    internal, terminal, beside_digits = [], [], 0
    for t in range(start, len(ids)):
        token = tokenizer().decode([ids[t]]).strip()
        if token == ",":
            internal.append(t)
        elif token == ".":
            previous = tokenizer().decode([ids[t - 1]]) if t else ""
            following = tokenizer().decode([ids[t + 1]]) if t + 1 < len(ids) else ""
            if previous[-1:] in set("0123456789") or following[:1] in set("0123456789"):
                beside_digits += 1
            else:
                terminal.append(t)
    return internal, terminal, beside_digits


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much],  # few windows fit short texts
)
@given(
    st.lists(st.sampled_from([*TEXT.split(" "), ". 7", "3.", ".5", "é,"]), min_size=5, max_size=80),
    st.integers(0, 6),
    st.integers(0, 6),
    st.integers(0, 20),
    st.one_of(st.none(), st.integers(1, 5)),
)
def test_windows_are_those_of_a_plain_double_loop(
    words: list[str], before: int, after: int, start: int, limit: int | None
) -> None:
    text = " ".join(words)
    ids = bare(text)
    internal, terminal, beside = punctuation(ids, start)
    expected: dict[str, list[list[int]]] = {"internal": [], "terminal": []}
    for label, events in (("internal", internal), ("terminal", terminal)):
        for t in events:
            if t - before >= 0 and t + after < len(ids):
                expected[label].append(ids[t - before : t + after + 1])
    assume(all(expected.values()))
    corpus = build(
        [text],
        tokenizer(),
        windows=["internal=,", "terminal=."],
        before=before,
        after=after,
        limit=limit,
        not_beside_digits=["terminal"],
        from_token=start,
    )
    assert sequences(corpus) == [w for label in expected.values() for w in label[:limit]]
    conditions = [label for label, found in expected.items() for _ in found[:limit]]
    assert decoded(corpus.sequence_labels["condition"]) == conditions
    offsets = corpus.token_labels["offset"].reshape(-1, before + 1 + after)
    np.testing.assert_array_equal(offsets - np.arange(-before, after + 1), 0)
    for label, events in (("internal", internal), ("terminal", terminal)):
        counts = corpus.notes["windows"][label]
        reasons = ("used", "no_full_context", "beside_digits", "before_from_token", "over_limit")
        assert counts["found"] == sum(counts[r] for r in reasons)
        assert counts["used"] == len(expected[label][:limit])
        assert counts["no_full_context"] == len(events) - len(expected[label])
        assert counts["beside_digits"] == (beside if label == "terminal" else 0)


def test_windows_do_not_cross_records_and_keep_their_labels() -> None:
    records = [{"text": t, "n": i} for i, t in enumerate(["a, b", ", c", "", "d, e,f"])]
    corpus = build(records, tokenizer("bert"), windows=["comma=,"], before=1, after=1)
    assert corpus.texts == ["a, ", "d, ", "e,f"]
    assert corpus.notes["windows"]["comma"]["no_full_context"] == 1
    assert corpus.sequence_labels["document"].tolist() == [0, 3, 3]
    assert corpus.sequence_labels["n"].tolist() == [0, 3, 3]
    assert list(corpus.sequence_labels) == ["document", "condition", "n"]
    # Special tokens are no part of the window: their offset is no number.
    offsets = corpus.token_labels["offset"].reshape(3, -1)
    np.testing.assert_array_equal(offsets, [[np.nan, -1, 0, 1, np.nan]] * 3)
    kept = build(
        records, tokenizer("bert"), windows=["comma=,"], before=1, after=1, keep="offset == 0"
    )
    assert {tokenizer().decode([i]) for i in kept.token_ids[kept.keep]} == {","}


def test_a_label_may_have_several_tokens_exact_or_stripped() -> None:
    text = "The coffee, the coffee and the tea were cold."
    comma_or_stop = build([text], tokenizer(), windows=["mark=,", "mark=."], before=1, after=0)
    assert [i[-1] for i in sequences(comma_or_stop)] == [bare(",")[0], bare(".")[0]]
    mapping = build([text], tokenizer(), windows={"mark": [",", "."]}, before=1, after=0)
    assert sequences(mapping) == sequences(comma_or_stop)
    assert (
        sequences(build([text], tokenizer(), windows={"x": "the"}, before=0, after=0))
        == [bare(" the")] * 2
    )
    exact = build([text], tokenizer(), windows=["x== the"], before=0, after=0)
    assert exact.token_ids.tolist() == bare(" the") * 2
    assert exact.notes["windows"]["x"]["found"] == 2


def test_a_plain_sequence_stands_beside_the_windows() -> None:
    corpus = build(
        [TEXT, "No. 7"], tokenizer(), windows=["stop=."], before=2, after=1, plain="one=30"
    )
    assert sequences(corpus)[-1] == bare(TEXT)[:30]
    assert decoded(corpus.sequence_labels["condition"])[-1] == "one"
    assert np.isnan(corpus.token_labels["offset"][corpus.sequence == corpus.n_sequences - 1]).all()
    assert TEXT.startswith(corpus.texts[-1])
    framed = build([TEXT], tokenizer("bert"), windows=["stop=."], context=16, before=2, plain="one")
    assert framed.lengths[-1] == 16 and sequences(framed)[-1][1:-1] == bare(TEXT)[:14]
    whole = build([TEXT], tokenizer(), windows=["stop=."], before=2, plain="one")
    assert whole.texts[-1] == TEXT


WINDOW_ERRORS = [
    ({"windows": ["stop"]}, "'stop' is not LABEL=TOKEN.*terminal=."),
    ({"windows": ["=."]}, "is not LABEL=TOKEN"),
    ({"windows": ["x= "]}, "is not LABEL=TOKEN"),
    ({"windows": ["x=="]}, "is not LABEL=TOKEN"),
    ({"windows": {"x": ""}}, "is not LABEL=TOKEN"),
    ({"windows": ["s=!"]}, r"window label 's': no token of the input is '!'"),
    ({"windows": ["s==the"]}, r"no token of the input is 'the'; nearest: ' the'"),
    ({"windows": ["s=the sea"]}, r"'the sea' is \d tokens here: 't'.* single token"),
    (
        {"windows": ["s=7"], "before": 500},
        r"'s': none of the 1 occurrences of '7' can be used \(1 no full context; --before 500",
    ),
    ({"windows": ["s=."], "context": 31, "bos": "always"}, "20 . 1 . 10 tokens does not fit"),
    ({"windows": ["s=."], "before": -1}, "before -1: a whole number of at least 0"),
    ({"windows": ["s=."], "limit": 0}, "limit 0: a whole number of at least 1"),
    ({"windows": ["s=."], "plain": "s"}, "'s' is the label of windows too"),
    ({"windows": ["s=."], "plain": "one=00"}, "is not LABEL or LABEL=N"),
    ({"windows": ["s=."], "plain": "one=9999"}, r"record 0 has only \d+; write --plain one=\d+"),
    (
        {"windows": ["s=."], "plain": "one=50", "context": 40},
        "the context holds 39; write --plain one=39",
    ),
    ({"plain": "one"}, "--max-tokens"),
    ({"limit": 3}, "need --windows"),
    ({"from_token": 3}, "need --windows"),
    ({"not_beside_digits": ["s"]}, "need --windows"),
]


@pytest.mark.parametrize(("options", "message"), WINDOW_ERRORS)
def test_window_errors_say_what_to_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        build([TEXT], tokenizer("bos"), **options)


def test_more_window_errors() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown window label 'terminl'.*'terminal'"):
        build([TEXT], tokenizer(), windows=["terminal=."], not_beside_digits=["terminl"])
    with pytest.raises(CorpusError, match=r"tiny has no tokenizer"):
        build([[1, 2]], windows=["s=."], model="tiny")
    with pytest.raises(CorpusError, match=r"record 0: the key 'condition'.*'my_condition'"):
        build([{"text": TEXT, "condition": 1}], tokenizer(), windows=["s=."])


# ---------------------------------------------------------------- which tokens are captured


def test_keep_is_an_expression_over_every_column() -> None:
    records = [{"text": TEXT, "play": "Hamlet"}, {"text": "the sea, the sea", "play": "Lear"}]
    corpus = build(
        records,
        tokenizer("bos"),
        keep="position > 1 and play == 'Lear' and token_text in [' the', ','] and not special "
        "and document == 1 and length < 100",
    )
    assert [tokenizer().decode([i]) for i in corpus.token_ids[corpus.keep]] == [",", " the"]
    assert corpus.n_sequences == 2  # sequences without a kept token stay readable


def test_skipping_special_and_first_tokens() -> None:
    corpus = build([TEXT, "The sea"], tokenizer("bert"), skip_special=True, skip_first=2)
    np.testing.assert_array_equal(corpus.keep, ~corpus.special & (corpus.position >= 2))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.sampled_from([None, "position > 2", "token_text == ','"]))
def test_max_tokens_keeps_the_first_ones(most: int, keep: str | None) -> None:
    whole = build([TEXT, TEXT, TEXT], tokenizer("bos"), context=20, keep=keep)
    corpus = build([TEXT, TEXT, TEXT], tokenizer("bos"), context=20, keep=keep, max_tokens=most)
    kept = np.flatnonzero(whole.keep)[:most]
    np.testing.assert_array_equal(np.flatnonzero(corpus.keep), kept)
    assert sequences(corpus) == sequences(whole)[: corpus.n_sequences]
    if len(kept) == most:  # the last sequence is whole, and the one with the last kept token
        assert corpus.n_sequences == whole.sequence[kept[-1]] + 1


def test_max_tokens_does_not_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise.Tokeniser, "BATCH_RECORDS", 2)

    def endless() -> Iterator[str]:
        while True:
            yield TEXT

    corpus = build(endless(), tokenizer("bos"), context=20, max_tokens=500, skip_first=1)
    assert np.count_nonzero(corpus.keep) == 500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "position > 999"}, r"--keep 'position > 999' removes all of the \d+ tokens"),
        ({"skip_first": 999}, "--skip-first 999 removes all"),
        ({"keep": "special", "skip_special": True}, "--skip-special removes all of the 1 tokens"),
    ],
)
def test_a_rule_that_removes_everything_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        build([TEXT], tokenizer("bos"), **options)


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([1, 2], np.int64, [1, 2]),
        ([1, 2.5], np.float64, [1.0, 2.5]),
        ([True, False], bool, [True, False]),
        ([True, None], object, ["true", ""]),
        (["a", 1, None, 2.5, True], object, ["a", "1", "", "2.5", "true"]),
        ([None, None], object, ["", ""]),
        ([2**63, 1], np.float64, [2.0**63, 1.0]),
        ([2**53 + 1, 0.5], object, ["9007199254740993", "0.5"]),
        ([10**400], object, [str(10**400)]),
    ],
)
def test_a_column_takes_the_type_that_holds_its_values(
    values: list[Any], dtype: Any, expected: list[Any]
) -> None:
    column = label_column(values)
    assert (column.values if isinstance(column, Categorical) else column).dtype == dtype
    assert decoded(column) == expected


def test_missing_numbers_are_nan() -> None:
    np.testing.assert_array_equal(label_column([1, None, 3]), [1, np.nan, 3])


def test_labels_of_sequences_and_of_tokens() -> None:
    records = [
        {"input_ids": [1, 2, 3], "pos": ["D", "N", "V"], "play": "Hamlet"},
        {"input_ids": [4], "score": 1},
        {"input_ids": [5, 6], "pos": ["N", "V"], "score": 2},
    ]
    corpus = build(records, context=2)
    assert decoded(corpus.token_labels["pos"]) == ["D", "N", "V", "", "N", "V"]
    assert decoded(corpus.sequence_labels["play"]) == ["Hamlet", "Hamlet", "", ""]
    np.testing.assert_array_equal(corpus.sequence_labels["score"], [np.nan, np.nan, 1, 2])
    assert list(corpus.sequence_labels) == ["document", "play", "score"]
    framed = build(records, tokenizer("bos"), bos="always")
    assert decoded(framed.token_labels["pos"]) == ["", "D", "N", "V", "", "", "", "N", "V"]


def test_condition_and_offset_are_free_without_windows() -> None:
    corpus = build([{"text": "The sea", "condition": "calm", "offset": 3}], tokenizer())
    assert decoded(corpus.sequence_labels["condition"]) == ["calm"]
    assert corpus.token_labels == {} and "offset" in corpus.sequence_labels
    assert set(build(["The sea"], tokenizer()).columns()) == {
        *("sequence", "position", "token_id", "length", "special", "document")
    }


def test_objects_are_no_labels_and_noted() -> None:
    corpus = build(
        [{"text": "The sea", "meta": {"url": "x"}, "day": np.datetime64("2020-01-02")}], tokenizer()
    )
    assert corpus.notes["labels_left_out"] == {"meta": "an object"}
    assert decoded(corpus.sequence_labels["day"]) == ["2020-01-02"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a", "position": 1}, "x: the key 'position' is a column .* 'my_position'"),
        ({"text": "a", "a/b": 1}, "x: the key 'a/b' cannot name a column"),
        ({"text": "a", "part of speech": 1}, "x: the key 'part of speech' .*'part_of_speech'"),
        ({"text": "a", " who\u2003is": 1}, "the key ' who.* for example to 'who_is'"),
        ({"text": "a", "who\n": 1}, "has white space.* for example to 'who'"),
        ({"text": "a", " ": 1}, "cannot name a column"),
        ({"text": "a", "zarr.json": 1}, "cannot name a column"),
        ({"text": "a", "": 1}, "cannot name a column"),
        ({"text": "a", "pos": ["D"]}, "x: the label 'pos' is a list.*needs 'input_ids'"),
        ({"input_ids": [1, 2], "pos": ["D"]}, "'pos' has 1 values and 'input_ids' 2"),
        ({"input_ids": [1], "pos": [["D"]]}, "list of lists or objects"),
        (
            {"txt": "a", "n": 1},
            "x has neither 'text' nor 'input_ids'; its keys: txt, n. Did you mean 'txt'",
        ),
        ({"text": 3}, "x: 'text' is a number"),
        ({"text": {"a": 1}}, "'text' is an object"),
        ({"input_ids": [1.5]}, "one flat list of whole numbers"),
        ({"input_ids": [[1, 2]]}, "one flat list of whole numbers"),
        ({"input_ids": [[1], [1, 2]]}, "cannot be read as token ids"),
        ({"input_ids": [True]}, "one flat list of whole numbers"),
        ({"input_ids": [2**70]}, "one flat list of whole numbers"),
        ({"text": "a\ud800b"}, "half a surrogate pair.*at character 1"),
        ({"text": "a", "who": "\ud800"}, "the label 'who' has half a surrogate pair"),
        (3, "x is 3: a record is a text, a list of token ids"),
        (None, "x is None: a record is a text"),
    ],
)
def test_a_bad_record_is_named(record: Any, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        as_record(record, "x")


def test_labels_with_white_space_are_refused(tmp_path: Path) -> None:
    """Stock xarray would not find them again."""
    message = "the key 'first name' has white space, at which xarray splits.*'first_name'"
    with pytest.raises(CorpusError, match=f"record 1: {message}"):
        actstore.build_corpus([[1, 2], {"input_ids": [3], "first name": "Ann"}])
    path = tmp_path / "people.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", "first name": "Ann"}\n')
    with pytest.raises(CorpusError, match=f"people.jsonl, line 2: {message}"):
        list(actstore.read_records(path))
    path.write_text('{"text": "b", "first_name": "Ann Lee"}\n')
    assert [r.labels for r in actstore.read_records(path)] == [{"first_name": "Ann Lee"}]


# ---------------------------------------------------------------- errors of the whole input


def test_a_token_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(
        CorpusError, match=r"record 1: token 2 has id 50, .* of tiny: 0 to 49 \(1 such"
    ):
        build([[1, 2], [3, 4, 50]], vocab_size=50, model="tiny")
    with pytest.raises(CorpusError, match=r"record 0: token 0 has id -1"):
        build([[-1]])
    with pytest.raises(CorpusError, match=r"Use the tokenizer that the model was trained with"):
        build([TEXT], tokenizer(), vocab_size=100)


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([], {}, "the corpus is empty: 0 records read"),
        (["", []], {}, "the corpus is empty: 2 records read, 2 of them without any token"),
        (
            ["The sea"],
            {"tokenizer": None, "model": "tiny"},
            "record 0 is text, but tiny has no tok",
        ),
        ("The sea", {}, r"this is one str; write \[record\]"),
        ({"text": "The sea"}, {}, "this is one dict"),
        ([1, 2], {}, "record 0 is 1: .* write"),
        (["The sea"], {"bos": "sometimes"}, "unknown bos 'sometimes'.*auto, always, never"),
        (["The sea"], {"bos": "always"}, "--bos always: the model has a tokenizer without BOS"),
        ([[1]], {"bos": "always", "tokenizer": None}, "the model has no tokenizer"),
        (["The sea"], {"context": 0}, "context 0: a whole number"),
        (["The sea"], {"context": 2, "tokenizer": tokenizer("bert")}, "context 2 has no room"),
        (["The sea"], {"max_tokens": 0}, "max_tokens 0"),
        (["The sea"], {"skip_first": 1.5}, "skip_first 1.5"),
    ],
)
def test_other_errors_say_what_to_do(records: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((CorpusError, UnknownNameError), match=message):
        build(records, **{"tokenizer": tokenizer(), **options})


def test_errors_in_keep_are_the_expressions() -> None:
    with pytest.raises(ExpressionError, match=r"empty"):
        build(["The sea"], tokenizer(), keep="")
    with pytest.raises(UnknownNameError, match=r"'offset'.*Known: sequence, position"):
        build(["The sea"], tokenizer(), keep="offset == 0", max_tokens=3)


# ---------------------------------------------------------------- digest


def test_the_digest_is_of_everything_that_determines_a_dump() -> None:
    def digest(**options: Any) -> str:
        records = options.pop("records", [{"text": TEXT, "play": "Hamlet", "n": 1}])
        return build(records, tokenizer("bos"), **{"context": 20, **options}).digest()

    others = [
        digest(),
        digest(context=21),
        digest(bos="never"),
        digest(keep="position > 0"),
        digest(max_tokens=30),
        digest(windows=["s=."], before=2),
        digest(records=[{"text": TEXT, "play": "Lear", "n": 1}]),
        digest(records=[{"text": TEXT, "play": "Hamlet", "n": 1.5}]),
        digest(records=[{"text": TEXT, "work": "Hamlet", "n": 1}]),
        digest(records=[{"text": TEXT + "!", "play": "Hamlet", "n": 1}]),
        digest(records=[{"input_ids": bare(TEXT), "play": "Hamlet", "n": 1}]),
    ]
    assert len(set(others)) == len(others) and digest() == others[0]
    assert re.fullmatch("[0-9a-f]{64}", others[0])


def test_notes_are_json() -> None:
    corpus = build([TEXT, ""], tokenizer(), windows=["s=."], before=1)
    assert json.loads(json.dumps(corpus.notes)) == corpus.notes


# ---------------------------------------------------------------- reading


def test_a_text_file_is_one_document_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    (record,) = read_records(path)
    assert (record.text, record.labels, record.where) == (TEXT, {}, "book.txt")
    assert "\r\n" in build(read_records(str(path)), tokenizer()).texts[0]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(
        '\ufeff{"text": "The sea", "play": "Hamlet"}\n\n  \n{"input_ids": [1, 2], "text": "x"}\r\n'
    )
    first, second = read_records(path)
    assert (first.text, first.labels, first.where) == (
        "The sea",
        {"play": "Hamlet"},
        "data.jsonl, line 1",
    )
    assert second.input_ids.tolist() == [1, 2] and second.where == "data.jsonl, line 4"
    assert second.left_out == {"text": "another input"}
    path.write_text('{"body": "The sea", "text": "unused"}')
    (record,) = read_records(path, column="body")
    assert record.text == "The sea" and record.labels == {}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (TEXT.encode(), [TEXT]),
        (b'\xef\xbb\xbf \n{"text": "a"}\n{"text": "b"}', ["a", "b"]),
        (b"", [""]),
    ],
)
def test_standard_input_is_text_or_json_lines(
    raw: bytes, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    assert [record.text for record in read_records("-")] == expected


BAD_LINES = [
    (b'{"text": "a"}\n{"text": ', r"data.jsonl, line 2 is not JSON: .* column 10.*jq"),
    (b"[1, 2]\n", "data.jsonl, line 1 is a list, not an object"),
    (b"3\n", "line 1 is a number, not an object"),
    (b"[" * 100_000, "line 1 .*JSON"),
    (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 1 cannot be read as JSON"),
    (b'{"txt": "a"}\n', "line 1 has neither 'text' nor 'input_ids'; its keys: txt"),
    (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not UTF-8: byte 0xff at offset 24"),
    (b'{"text": "a", "length": 3}\n', "line 1: the key 'length' is a column"),
]


@pytest.mark.parametrize(("raw", "message"), BAD_LINES)
def test_a_bad_line_is_named(raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(raw)
    with pytest.raises(CorpusError, match=message):
        list(read_records(path))


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.binary(max_size=80), st.text(alphabet='{}[]":,text1 \n', max_size=60)))
def test_any_bytes_are_read_or_refused(raw: bytes | str) -> None:
    lines = (raw if isinstance(raw, bytes) else raw.encode()).splitlines(keepends=True)
    try:
        found = list(reading._line_records(lines, "data.jsonl", None))
    except CorpusError as error:
        assert "data.jsonl, line " in str(error)
    else:
        assert all(isinstance(record, Record) for record in found)


def test_text_that_is_not_utf8_is_refused_with_its_offset(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"\xef\xbb\xbfna\xefve")
    with pytest.raises(CorpusError, match=r"latin.txt is not UTF-8: byte 0xef at offset 5.*iconv"):
        read_records(path)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that fails to read")
@pytest.mark.parametrize("name", ["book.txt", "data.jsonl"])
def test_a_file_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to("/proc/self/mem")
    with pytest.raises(CorpusError, match=rf"cannot read .*{name}: Input/output error"):
        list(read_records(tmp_path / name))


def test_a_path_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(TEXT)
    with pytest.raises(CorpusError, match=r"no input at .*bok.txt: did you mean .*book.txt\?"):
        read_records(tmp_path / "bok.txt")
    with pytest.raises(CorpusError, match=r"there is no folder .*nowhere"):
        read_records(tmp_path / "nowhere" / "book.txt")
    with pytest.raises(CorpusError, match=r"no input at To be"):
        read_records("To be, or not to be " * 300)


def test_options_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    with pytest.raises(CorpusError, match=r"--split 'train': .* is not a dataset"):
        read_records(path, split="train")
    with pytest.raises(CorpusError, match=r"--column 'body': book.txt is plain text"):
        read_records(path, column="body")


# ---------------------------------------------------------------- datasets


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    library.disable_progress_bars()
    return library


def test_a_saved_dataset(datasets: Any, tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "mood": datasets.ClassLabel(names=["calm", "wild"]),
            "n": datasets.Value("int32"),
            "tags": datasets.List(datasets.Value("string")),
        }
    )
    rows = {"text": ["The sea", "The ship"], "mood": [0, -1], "n": [3, None], "tags": [["a"], []]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(tmp_path / "one")
    first, second = read_records(tmp_path / "one")
    assert first.text == "The sea" and first.labels == {"mood": "calm", "n": 3}
    assert second.labels == {"mood": None, "n": None} and first.left_out == {"tags": "List"}
    assert first.where.endswith("one, row 0")

    splits = datasets.DatasetDict({"train": dataset, "test": dataset.select([1])})
    splits.save_to_disk(tmp_path / "two")
    assert [r.text for r in read_records(tmp_path / "two", split="test")] == ["The ship"]
    with pytest.raises(CorpusError, match=r"has the splits train, test; choose one with --split"):
        read_records(tmp_path / "two")
    with pytest.raises(UnknownNameError, match=r"unknown split 'tst': did you mean 'test'"):
        read_records(tmp_path / "two", split="tst")
    with pytest.raises(UnknownNameError, match=r"unknown column 'txt': did you mean 'text'"):
        read_records(tmp_path / "one", column="txt")


def test_a_dataset_of_tokens(datasets: Any, tmp_path: Path) -> None:
    rows = {"input_ids": [[0, 5, 6]], "attention_mask": [[0, 1, 1]], "pos": [["", "D", "N"]]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "tokens")
    corpus = build(read_records(tmp_path / "tokens"))
    assert corpus.token_ids.tolist() == [5, 6]
    assert decoded(corpus.token_labels["pos"]) == ["D", "N"]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_folder_of_files(datasets: Any, tmp_path: Path, form: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    dataset = datasets.Dataset.from_dict({"body": ["The sea", "wide"], "n": [1, 2]})
    if form == "jsonl":
        dataset.to_json(folder / "train.jsonl")
    else:
        dataset.to_parquet(folder / "train-00000-of-00001.parquet")
    records = list(read_records(folder, column="body"))
    assert [(r.text, r.labels) for r in records] == [("The sea", {"n": 1}), ("wide", {"n": 2})]
    assert [r.text for r in read_records(folder, column="body", split="train[1:]")] == ["wide"]
    with pytest.raises(UnknownNameError, match=r"unknown column 'text'.*Known: body, n"):
        read_records(folder)
    with pytest.raises(CorpusError, match=r"cannot load the dataset .*--split"):
        read_records(folder, split="nowhere")


def test_a_dataset_id_goes_to_the_library(datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        if len(asked) > 1:
            raise ConnectionError("no network\nat all")
        return datasets.Dataset.from_dict({"text": ["The sea"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    (record,) = read_records("owner/name.v2", config="en", split="train")
    assert asked == [(("owner/name.v2", "en"), {"split": "train"})] and record.text == "The sea"
    with pytest.raises(CorpusError, match=r"cannot load .*'imdb': no network. .*no file or folder"):
        read_records("imdb")


def test_without_the_library_the_message_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match=r"pip install 'actstore\[hub\]'"):
        read_records("owner/name")


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, actstore.corpus; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
