"""The notebooks run, and what is stored in them is what they give today."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output
from notebook_outputs import (
    FOLDER,
    clean,
    differences,
    execute,
    pictures,
    read,
    text_differences,
    text_digest,
)
from PIL import Image

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [
    "0_quickstart",
    "1_neuron_distributions",
    "2_mlp_progression",
    "3_punctuation_information",
    "4_state_similarity",
    "5_hidden_state_distributions",
]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


# What is stored


def test_all_are_there():
    assert [path.stem for path in NOTEBOOKS] == NAMES


def test_every_cell_was_run_in_order_without_an_error(path):
    code = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {o.output_type for o in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(o.name == "stdout" for o in outputs if o.output_type == "stream")


def test_the_first_code_cell_chooses_the_store(path):
    first = next(cell for cell in read(path).cells if cell.cell_type == "code")
    assert first.source.startswith("STORE = None")


def test_small_and_with_pictures_that_can_be_read(path):
    assert path.stat().st_size < 1_500_000
    found = [Image.open(io.BytesIO(data)) for _, data in pictures(read(path))]
    assert len(found) >= 5
    for picture in found:
        assert 250 < picture.width < 1300 and 100 < picture.height < 1300
        assert np.asarray(picture.convert("L"), float).std() > 5  # not blank


def test_nothing_of_the_machine_is_in_it(path):
    notebook = read(path)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
    text = json.dumps(notebook, ensure_ascii=False)
    # A path of this or another machine, an address in memory, a colour code of a terminal.
    for unwanted in (
        r"(?<![\w:/.])/(tmp|home|root|work|usr|var|mnt|Users)/",
        r"[A-Z]:\\\\",
        r"at 0x",
    ):
        assert not re.search(unwanted, text), unwanted
    assert "\x1b" not in text and "Traceback" not in text
    assert not {"execution", "widgets"} & {key for cell in notebook.cells for key in cell.metadata}


@pytest.mark.slow
def test_a_fresh_run_gives_what_is_stored(path):
    stored = read(path)
    fresh = execute(stored)  # raises where a cell fails
    if stored.metadata.text != text_digest():
        kinds = [[o.output_type for o in c.get("outputs", [])] for c in stored.cells]
        assert kinds == [[o.output_type for o in c.get("outputs", [])] for c in fresh.cells]
        pytest.skip("all cells ran; another Python has other documentation, so other numbers")
    assert differences(stored, fresh) == []


# The comparison itself


def picture(shift: float = 0, title: str = "r = 0.51", width: float = 3, panels: int = 1) -> bytes:
    """A line in each panel; in the last it is moved."""
    figure = Figure(figsize=(width * panels, 2 * panels), dpi=72)
    for ax in figure.subplots(panels, panels, squeeze=False).flat:
        ax.plot([0, 1, 2, 3], [0, 1, 0.2, 0.5], color="#717581", linewidth=1)
    ax.lines[0].set_ydata([0, 1 - shift, 0.2 + shift, 0.5])
    ax.set_title(title)
    made = io.BytesIO()
    figure.savefig(made)
    return made.getvalue()


def notebook(text: str = "", data: bytes | None = None) -> NotebookNode:
    outputs = [new_output("stream", name="stdout", text=text)] if text else []
    if data is not None:
        encoded = base64.b64encode(data).decode()
        outputs.append(new_output("display_data", {"image/png": encoded, "text/plain": "<Figure>"}))
    return new_notebook(cells=[new_code_cell("1", outputs=outputs)])


@pytest.mark.parametrize(
    ("stored", "fresh"),
    [
        ("mean 1.234", "mean 1.235"),
        ("mean 0.01", "mean 0.02"),  # one in the last decimal
        ("r = −0.20", "r = -0.21"),
        ("12,978 tokens", "12,979 tokens"),
        ("1.50e-07", "1.51e-07"),
        ("layer  3\n 9.99  1.0", "layer  3\n10.00  1.0"),  # a table moves with its numbers
        ("-------\n    a", "--------\n     a"),
    ],
)
def test_last_digits_may_differ(stored, fresh):
    assert list(text_differences(stored, fresh)) == []


@pytest.mark.parametrize(
    ("stored", "fresh"),
    [
        ("mean 1.234", "mean 1.260"),
        ("mean 0.01", "mean 0.03"),
        ("r = −0.20", "r = 0.20"),
        ("layer 3", "layer 4"),
        ("100 tokens", "102 tokens"),
        ("12,978 tokens", "13,978 tokens"),
        ("1.50e-07", "1.50e-06"),
        ("mlp_in 1.0", "mlp_on 1.0"),
        ("mlp_in2 1.0", "mlp_in3 1.0"),  # a digit within a name is no number
        ("1.0", "nan"),
        ("1.0", "1.0 2.0"),
        ("1.0\n", "1.0\n2.0\n"),
        ("' the'", "' a'"),
    ],
)
def test_other_numbers_and_words_are_detected(stored, fresh):
    assert list(text_differences(stored, fresh))


def test_a_changed_picture_is_detected():
    stored = notebook("1.0", picture())
    assert differences(stored, copy.deepcopy(stored)) == []
    for same in (picture(shift=0.003), picture(title="r = 0.52")):
        assert differences(stored, notebook("1.0", same)) == []
    for changed in (picture(shift=0.2), picture(title="another title"), picture(width=3.1)):
        (line,) = differences(stored, notebook("1.0", changed))
        assert "picture" in line


def test_a_changed_line_in_one_panel_of_nine_is_detected():
    stored = notebook(data=picture(panels=3))
    assert differences(stored, notebook(data=picture(panels=3, shift=0.003))) == []
    assert differences(stored, notebook(data=picture(panels=3, shift=0.2)))


def test_printed_text_is_one_output_however_it_came():
    pieces = [new_output("stream", name="stdout", text=text) for text in ("a\n", "b\n")]
    pieces.insert(1, new_output("stream", name="stderr", text="a warning"))
    made = clean(new_notebook(cells=[new_code_cell("1", outputs=pieces)]))
    assert [o.text for o in made.cells[0].outputs] == ["a\nb\n"]


def test_a_missing_output_and_an_error_are_detected():
    stored = notebook("1.0", picture())
    assert differences(stored, notebook("1.0"))
    assert differences(stored, notebook(data=picture()))
    failed = new_output("error", ename="ValueError", evalue="no", traceback=[])
    broken = new_notebook(cells=[new_code_cell("1", outputs=[failed])])
    assert differences(broken, copy.deepcopy(broken)) == ["cell 0: ValueError: no"]
    with pytest.raises(ValueError):
        differences(stored, new_notebook())
