"""A README for whoever gets a store: what it holds, and how to load it without actstore.

The front matter is that of a Hugging Face dataset. What a store cannot know of itself (licence,
where the texts come from) is left to fill in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..errors import UsageError
from ..places import storage_at
from ..store import Store, open_store

__all__ = ["card", "write_card"]

NAME = "README.md"
UNKNOWN = "[More Information Needed]"
"""As the Hub's own templates have it."""

_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")


def card(store: Store | str | os.PathLike[str]) -> str:
    """A store's card: README.md with the front matter of a Hugging Face dataset.

    Parameters
    ----------
    store : Store or path
        A sealed store.

    Returns
    -------
    str
        Markdown: what is in the store and of which model, a snippet that loads it with xarray
        alone, and ``[More Information Needed]`` wherever the store does not know.

    Examples
    --------
    >>> import numpy as np, tempfile, actstore
    >>> corpus = actstore.build_corpus([[1, 2, 3]])
    >>> plan = actstore.Plan.build(corpus, [actstore.StageSpec("mlp_post", (0,), 16)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with actstore.Writer(f"{folder}/run.zarr", plan) as writer:
    ...         writer.put("mlp_post", 0, 0, np.ones((3, 16), "float32"))
    ...     print(actstore.card(f"{folder}/run.zarr")[:20])
    ---
    license: unknown
    """
    if not isinstance(store, Store):
        store = open_store(store)
    facts = store.info()
    parts = [
        _front_matter(facts),
        f"# {_plain(_title(facts))}",
        f"{facts['tokens']:,} tokens of {facts['sequences']:,} sequences, with the activations "
        "that a transformer had at each, labelled, in one "
        "[Zarr](https://zarr.dev) store that [xarray](https://xarray.dev) opens.",
        "## Source",
        _table(("", ""), _source(store)),
        "## Activations",
        _table(("stage", "layers", "neurons", "type", "bytes", "meaning"), _stages(facts)),
        "Each stage is a group with an array `activation` (layer, token, neuron). Tokens carry "
        f"{_listed(['input', 'sequence', 'position', 'token_id', *facts['labels']])}."
        + _own_words(facts),
        "## Load it",
        "With xarray alone (`pip install xarray zarr dask`), nothing else installed:",
        f"```python\n{_snippet(store)}```",
        "With actstore, which checks every checksum and answers most questions without reading it "
        "all:",
        f"```python\nimport actstore\n\nstore = actstore.open({facts['name']!r})\n"
        f"actstore.moments(store).compute()\n```",
        f"Store id `{facts['id']}`, config hash `{store.attrs['config_hash']}`, format "
        f"{facts['format']} of actstore.",
    ]
    return "\n\n".join(parts) + "\n"


def write_card(
    store: Store | str | os.PathLike[str], out: str | os.PathLike[str] | None = None
) -> str:
    """Write a store's card, by default as README.md into the store itself.

    Parameters
    ----------
    store : Store or path
    out : path, optional
        Another file.

    Returns
    -------
    str
        Where it is.

    Raises
    ------
    UsageError
        There is another README, which someone may have filled in.
    """
    if not isinstance(store, Store):
        store = open_store(store)
    folder, name = (store.path, NAME) if out is None else os.path.split(os.path.abspath(out))
    place = os.path.join(folder, name)
    if out is not None and not os.path.isdir(folder):
        raise UsageError(f"{place}: there is no folder {folder}; make it first")
    storage, text = storage_at(folder), card(store).encode()
    there = storage.get(name)
    if os.path.isdir(place) or there not in (None, text):
        raise UsageError(
            f"{place} exists and is another: what was filled in there is kept. Remove it, or "
            "write the card elsewhere with --out"
        )
    if there is None:
        storage.put(name, text)
    return place


def _front_matter(facts: Mapping[str, Any]) -> str:
    size = next((i for i, s in enumerate(_SIZES) if facts["tokens"] < _number(s)), len(_SIZES))
    bounds = ["n<1K", *(f"{a}<n<{b}" for a, b in pairwise(_SIZES)), "n>1T"]
    lines = [
        "---",
        "license: unknown  # fill in: of the texts and of the model's outputs, such as cc-by-4.0",
        f"pretty_name: {json.dumps(_title(facts))}",
        "task_categories:\n- feature-extraction",
        "size_categories:\n- " + bounds[size],
        "tags:\n- activations\n- interpretability\n- xarray\n- zarr\n- actstore",
        "viewer: false",
        "---",
    ]
    return "\n".join(lines)


def _number(size: str) -> int:
    return int(size[:-1]) * 1000 ** ("KMBT".index(size[-1]) + 1)


def _title(facts: Mapping[str, Any]) -> str:
    model = facts.get("model", {}).get("name")
    return f"Activations of {model}" if model else f"Activations: {facts['name']}"


def _source(store: Store) -> list[Sequence[str]]:
    """What is known of where the values come from, and what is to be filled in."""
    model = store.attrs.get("model", {})
    tokenizer = store.attrs.get("tokenizer", {})
    versions = store.attrs.get("versions", {})
    corpus = store.attrs["corpus"]
    return [
        ("model", _code(model.get("name"))),
        ("class", _code(model.get("class"))),
        ("revision", _code(model.get("revision"))),
        ("weights (sha256)", _code(model.get("sha256"))),
        ("tokenizer", _code(tokenizer.get("class"))),
        ("data", UNKNOWN),
        ("tokens and labels (sha256)", _code(corpus["sha256"])),
        ("tokens kept, of all read", f"{corpus['tokens']:,} of {corpus['inputs']:,}"),
        ("versions", ", ".join(_plain(f"{k} {v}") for k, v in versions.items()) or UNKNOWN),
    ]


def _stages(facts: Mapping[str, Any]) -> list[Sequence[str]]:
    return [
        [
            _code(name),
            ", ".join(map(str, stage["layers"])),
            f"{stage['width']:,}",
            stage["dtype"],
            f"{stage['nbytes']:,}",
            _plain(stage["meaning"]),
        ]
        for name, stage in facts["stages"].items()
    ]


def _own_words(facts: Mapping[str, Any]) -> str:
    words = ""
    if facts["predictions"]:
        words += (
            f" `predictions/` has the {facts['predictions']} next tokens that the model found "
            "likeliest at each token."
        )
    if facts["outcomes"]:
        words += f" `outcomes/` has {_listed(facts['outcomes'])} of the true next token."
    return words


def _snippet(store: Store) -> str:
    """Opens a stage with xarray alone, labels and tokens as text."""
    lines = [
        "import numpy as np",
        "import xarray as xr",
        "",
        f"path = {store.name!r}  # the folder that this card is in",
        f'acts = xr.open_zarr(path, group={store.stages[-1]!r})["activation"]  # lazy',
        "for name, column in acts.coords.items():",
        '    if "label_values" in column.attrs:  # codes of texts',
        '        texts = np.array(column.attrs["label_values"])[column.values]',
        "        acts = acts.assign_coords({name: (column.dims, texts)})",
    ]
    if store.vocabulary is not None:
        lines += [
            'words = xr.open_zarr(path, group="vocabulary")["token_text"].values',
            'acts = acts.assign_coords(token_text=("token", words[acts["token_id"].values]))',
        ]
    lines += ["print(acts)", ""]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(_code(n) for n in names)


def _code(text: object) -> str:
    """A name of the store's as code; nothing in it is taken for Markdown or HTML."""
    if not text:
        return UNKNOWN
    return f"`{_flat(text)}`".replace("|", "\\|")


def _plain(text: object) -> str:
    """Text in which nothing is taken for Markdown or HTML."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|" else c for c in _flat(text))


def _flat(text: object) -> str:
    """One line without back quotes, which would end a code span."""
    return " ".join(str(text).replace("`", "'").split())
