"""Questions to the store of tests/faults.py, and what numpy makes of the same values."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from crc32c import crc32c

import actstore
from actstore.errors import ActstoreError

Answer = Mapping[str, Any]
"""Named arrays."""

PLACES = (0, 1, 17, 300, -1)
WORD = " the"


def _moments(store: actstore.Store, stage: str, **options: Any) -> Answer:
    found = actstore.moments(store, stages=[stage], **options).compute()
    return {"mean": found["mean"].values, "variance": found["variance"].values}


def _median(store: actstore.Store) -> Answer:
    found = actstore.quantiles(store, stages=["hidden"], q=0.5).compute()
    return {"quantile": found["quantile"].values.ravel()}


def _largest(store: actstore.Store) -> Answer:
    found = actstore.top_tokens(store, stages=["mlp_post"], k=3).compute()
    return {name: found[name].values for name in ("value", "token")}


def _after_a_word(store: actstore.Store) -> Answer:
    asked = f"token_text == '{WORD}'"
    found = actstore.mean_activation(store, stages=["hidden"], tokens=asked).compute()
    return {"mean": found["mean"].values}


def _values(store: actstore.Store) -> Answer:
    """Every value of one stage, as a checksum, and some neurons of the other."""
    whole = store["hidden"].values
    return {"whole": [crc32c(whole.tobytes())], "some": store["mlp_post"][:, ::50, 7].values}


def _tokens(store: actstore.Store) -> Answer:
    return {name: store.tokens[name].values for name in ("token_id", "position", "sequence")}


def _texts(store: actstore.Store) -> Answer:
    return {"texts": [store.decode(t, before=6, after=2) for t in PLACES]}


QUESTIONS: dict[str, Callable[[actstore.Store], Answer]] = {
    "moments": lambda store: _moments(store, "hidden"),
    "moments of some tokens": lambda store: _moments(store, "mlp_post", tokens="position > 5"),
    "median": _median,
    "largest": _largest,
    "mean at a word": _after_a_word,
    "values": _values,
    "tokens": _tokens,
    "texts": _texts,
}


def ask(place: str) -> dict[str, Any]:
    """Open a store, verify it, and ask it everything.

    Returns
    -------
    dict
        For each question its answer as lists, or ``{"refused": message}`` where actstore says
        what is wrong, or ``{"crashed": message}`` for any other exception; and under "verify" the
        problems by key.
    """

    def attempt(question: Callable[[], Any]) -> Any:
        try:
            return question()
        except ActstoreError as error:
            return {"refused": str(error)}
        except Exception as error:
            return {"crashed": f"{type(error).__name__}: {error}"}

    answers = {
        name: attempt(lambda question=question: _plain(question(actstore.open(place))))  # type: ignore[misc]
        for name, question in QUESTIONS.items()
    }
    found = attempt(lambda: {p.key: p.what for _, p in actstore.verify(place) if p is not None})
    return {"answers": answers, "verify": found}


def _plain(answer: Answer) -> dict[str, Any]:
    return {name: np.asarray(values).tolist() for name, values in answer.items()}


def print_answers(place: str) -> None:
    print(json.dumps(ask(place)))


def expected(path: Path) -> dict[str, Answer]:
    """The same from the arrays as stock zarr reads them, by numpy alone."""
    tree = zarr.open_group(path, mode="r")

    def array(key: str) -> np.ndarray:
        return np.asarray(tree[key][...])  # type: ignore[index]

    hidden, post = array("hidden/activation"), array("mlp_post/activation")
    position, ids = array("hidden/position"), array("hidden/token_id")
    word = np.flatnonzero(array("vocabulary/token_text") == WORD)
    some = post[:, position > 5].astype(np.float64)
    order = np.argsort(-post, axis=1, kind="stable")[:, :3]
    return {
        "moments": {
            "mean": hidden.mean(1, np.float64),
            "variance": hidden.var(1, np.float64, ddof=1),
        },
        "moments of some tokens": {"mean": some.mean(1), "variance": some.var(1, ddof=1)},
        "median": {"quantile": np.quantile(hidden.reshape(len(hidden), -1), 0.5, axis=1)},
        "largest": {
            "value": np.take_along_axis(post, order, 1).swapaxes(1, 2),
            "token": order.swapaxes(1, 2),
        },
        "mean at a word": {"mean": hidden[:, np.isin(ids, word)].mean(1, np.float64)},
        "values": {"whole": [crc32c(hidden.tobytes())], "some": post[:, ::50, 7]},
        "tokens": {
            "token_id": ids,
            "position": position,
            "sequence": array("hidden/sequence"),
        },
        "texts": {"texts": _contexts(array)},
    }


def _contexts(array: Callable[[str], np.ndarray]) -> list[str]:
    """Text around the tokens of PLACES, cut out of the sequences' own."""
    texts = []
    for place in PLACES:
        at, sequence = int(array("hidden/input")[place]), int(array("hidden/sequence")[place])
        first = int(array("sequences/start")[sequence])
        last = first + int(array("sequences/length")[sequence]) - 1
        window = slice(max(first, at - 6), min(last, at + 2) + 1)
        starts, ends = array("inputs/char_start")[window], array("inputs/char_end")[window]
        real = starts < ends
        text = str(array("sequences/text")[sequence])
        texts.append(text[starts[real].min() : ends[real].max()] if real.any() else "")
    return texts


def is_right(answer: Answer, right: Answer) -> bool:
    """Whether an answer of `ask` is what numpy says."""
    if answer.keys() != right.keys():
        return False
    for name, values in right.items():
        a, b = np.asarray(answer[name]), np.asarray(values)
        if a.shape != b.shape:
            return False
        exact = b.dtype.kind in "iuUO"
        if not (np.array_equal(a, b) if exact else np.allclose(a, b, rtol=2e-5, atol=1e-6)):
            return False
    return True
