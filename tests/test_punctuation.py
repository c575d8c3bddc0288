"""Commas and full stops of a book, from a text file to every picture, by the command line alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from helpers import prose
from test_cli import Command, command  # noqa: F401 - a fixture
from test_information import reference

import actstore
from actstore.demo import MODEL_DIR

BEFORE, AFTER, LIMIT, FROM = 20, 10, 30, 60
TWO = {"internal": ",", "terminal": "."}


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(prose(20_000))
    return path


def by_hand(text: str) -> dict[str, np.ndarray]:
    """Hidden states (layer, window, neuron) of the marks themselves, straight from the model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, local_files_only=True).eval()
    ids = tokenizer(text)["input_ids"]
    pieces = [tokenizer.decode([i]) for i in ids]
    found = {}
    for label, mark in TWO.items():
        at = [i for i in range(FROM, len(ids)) if pieces[i].strip() == mark]
        if label == "terminal":
            at = [
                i
                for i in at
                if not pieces[i - 1][-1].isdigit()
                and not (i + 1 < len(ids) and pieces[i + 1][0].isdigit())
            ]
        at = [i for i in at if i >= BEFORE and i + AFTER < len(ids)][:LIMIT]
        windows = torch.tensor([ids[i - BEFORE : i + AFTER + 1] for i in at])
        with torch.no_grad():
            states = model(windows, output_hidden_states=True).hidden_states
        found[label] = np.stack([h[:, BEFORE].numpy() for h in states])
    return found


def test_the_five_exercises(command: Command, book: Path, tmp_path: Path) -> None:  # noqa: F811
    store = tmp_path / "marks.zarr"
    windows = [f"--windows={label}={mark}" for label, mark in TWO.items()]
    windows += ["--not-beside-digits", "terminal", "--from-token", FROM]
    windows += ["--before", BEFORE, "--after", AFTER, "--limit", LIMIT]
    dump = ["dump", "demo", book, store, "--stages", "hidden", *windows, "--keep", "offset == 0"]
    assert command(*dump).status == 0
    opened = actstore.open(store)
    column = opened.column("condition").decode()
    assert {label: int((column == label).sum()) for label in TWO} == dict.fromkeys(TWO, LIMIT)
    assert {t.strip() for t in opened.column("token_text").decode()} == {",", "."}
    states = by_hand(book.read_text())
    for label in TWO:
        kept = opened["hidden"].values[:, column == label]
        np.testing.assert_allclose(kept, states[label], rtol=1e-4, atol=1e-5)

    # Information and covariance of all pairs, over all layers.
    out = tmp_path / "pairs.nc"
    asked = ["mutual_information", store, "--by", "condition"]
    assert command("query", *asked, "--out", out).status == 0
    for label in TWO:
        with xr.open_dataset(out, group=label) as found:
            assert found["mutual_information"].shape == (7, LIMIT, LIMIT)
            kept = opened["hidden"].values[:, column == label]
            for layer in (0, 3, 6):
                for i in range(LIMIT):
                    for j in range(i + 1, min(i + 4, LIMIT)):
                        bits, covariance, _ = reference(kept[layer, i], kept[layer, j])
                        own = found.isel(layer=layer, token=i, token_b=j)
                        assert own["mutual_information"].item() == pytest.approx(bits, abs=1e-9)
                        assert own["covariance"].item() == pytest.approx(covariance, abs=1e-6)

    # The figures.
    one = ["--layers", "3", "--by", "condition"]
    for name, arguments in {
        "activations": ["mean_activation", store, *one],
        "one layer": ["mutual_information", store, *one],
        "all layers": asked,
        "distributions": [*asked, "--reduce", "histogram"],
        "joint": [*asked, "--reduce", "joint"],
        "layers": ["layer_covariance", store],
        "labels": ["label_information", store, "--layers", "3", "--null", "20"],
    }.items():
        picture = tmp_path / f"{name}.png"
        result = command("plot", *arguments, "--out", picture)
        assert result.status == 0, result.err
        assert picture.stat().st_size > 20_000

    # Which neurons tell a comma from a full stop.
    told = command("query", "label_information", store, "--layers", 3, "--k", 3, "--json").json
    assert told["dims"] == {"layer": 1, "rank": 3}
    bits = told["variables"]["information"]["data"][0]
    assert 0.5 < bits[0] <= 1 and bits == sorted(bits, reverse=True)
