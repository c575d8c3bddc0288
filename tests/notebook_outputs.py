"""Run a notebook in a fresh kernel, keep what is stable of its outputs, and compare two runs.

    python tests/notebook_outputs.py                 # run all of notebooks/ and store the outputs
    python tests/notebook_outputs.py NOTEBOOK ...    # only these

What is stored holds nothing that changes from run to run: no times, no temporary folders, no
memory addresses, no progress bars. Two runs on different machines agree in every word; numbers may
differ in their last digits, pictures in a few dots.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

from actstore.demo.corpus import documents

FOLDER = Path(__file__).parents[1] / "notebooks"

RELATIVE = 0.01
"""Numbers may differ by so much of their size; or by one in their last decimal."""

PIXELS = 2
"""So many dots may a picture be wider or higher."""

SHRINK = 4
"""Pictures are compared with squares of so many dots as one: lines half a dot away are the same."""

DIFFERENCE = 1.0
"""Mean difference of two pictures, of 255."""

SQUARE = 24.0
"""A square that differs by more is another one; of these there may be `FEW` and a thousandth."""

FEW = 8

_NUMBER = re.compile(r"(?<![\w.])[-−+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def read(path: Path) -> NotebookNode:
    """A notebook, checked against the format."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def execute(notebook: NotebookNode, seconds: int = 600) -> NotebookNode:
    """A copy with the outputs of a run in a fresh kernel and an empty folder.

    Raises `nbclient.exceptions.CellExecutionError`, which names the cell, where one fails.
    """
    fresh = nbformat.from_dict(notebook)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            fresh,
            timeout=seconds,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
        )
        client.execute()
    return clean(fresh)


def clean(notebook: NotebookNode) -> NotebookNode:
    """Leave out what differs from run to run, in place."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "text": text_digest(),
        }
    )
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = joined(own for own in cell.outputs if own.get("name") != "stderr")
            for output in cell.outputs:
                if "metadata" in output:
                    output.metadata = {}
    return notebook


def joined(outputs: Iterable[NotebookNode]) -> list[NotebookNode]:
    """Printed text that follows on printed text as one: a kernel sends it in chance pieces."""
    found: list[NotebookNode] = []
    for output in outputs:
        if found and output.output_type == found[-1].output_type == "stream":
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def text_digest() -> str:
    """Of the text that the demo reads, which another version of Python words differently."""
    texts = "".join(d.text for d in documents(held_out=True))
    return hashlib.sha256(texts.encode()).hexdigest()[:16]


def pictures(notebook: NotebookNode) -> Iterator[tuple[int, bytes]]:
    """The number of the cell and the bytes of every stored picture."""
    for i, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                yield i, base64.b64decode(output.data["image/png"])


def differences(stored: NotebookNode, fresh: NotebookNode) -> list[str]:
    """In what the outputs of two runs of the same notebook differ, a line for each."""
    found = []
    for i, (a, b) in enumerate(zip(stored.cells, fresh.cells, strict=True)):
        if a.cell_type != "code":
            continue
        own, other = a.outputs, b.outputs
        if [_kind(o) for o in own] != [_kind(o) for o in other]:
            kinds = (
                ", ".join(map(str, map(_kind, outputs))) or "nothing" for outputs in (own, other)
            )
            found.append("cell {}: stored {}, now {}".format(i, *kinds))
            continue
        for x, y in zip(own, other, strict=True):
            found += [f"cell {i}: {line}" for line in _of_output(x, y)]
    return found


def _kind(output: NotebookNode) -> tuple[str, ...]:
    return output.output_type, *sorted(output.get("data", [output.get("name", "")]))


def _of_output(stored: NotebookNode, fresh: NotebookNode) -> Iterator[str]:
    if stored.output_type == "error":
        yield f"{stored.ename}: {stored.evalue}"
    elif stored.output_type == "stream":
        yield from text_differences(stored.text, fresh.text)
    else:
        for kind, value in stored.data.items():
            if kind == "image/png":
                pair = (base64.b64decode(data) for data in (value, fresh.data[kind]))
                yield from picture_differences(*pair)
            else:
                yield from text_differences(value, fresh.data[kind])


def text_differences(stored: str, fresh: str) -> Iterator[str]:
    """Lines that differ: in a word, or in a number by more than the tolerance."""
    old, new = stored.splitlines(), fresh.splitlines()
    if len(old) != len(new):
        yield f"stored {len(old)} lines, now {len(new)}"
        return
    for a, b in zip(old, new, strict=True):
        # A number that got longer or shorter moves the spaces of its table.
        words = (re.sub(r"[\s-]+", " ", _NUMBER.sub("#", line)).strip() for line in (a, b))
        same = len(set(words)) == 1
        numbers = zip(_NUMBER.findall(a), _NUMBER.findall(b), strict=False)
        if not (same and all(_near(x, y) for x, y in numbers)):
            yield f"stored {a.strip()!r}, now {b.strip()!r}"


def _near(a: str, b: str) -> bool:
    """Within the tolerance, which small whole numbers never are; or one of the last digit."""
    if a == b:
        return True
    x, y = (float(n.replace(",", "").replace("−", "-")) for n in (a, b))
    digits, _, power = a.partition("e")
    decimals = len(digits.partition(".")[2])
    last = 1.001 * 10.0 ** (int(power or 0) - decimals) if decimals else 0
    return abs(x - y) <= max(RELATIVE * max(abs(x), abs(y)), last)


def picture_differences(stored: bytes, fresh: bytes) -> Iterator[str]:
    """Whether two pictures differ in size, or to the eye."""
    a, b = (Image.open(io.BytesIO(data)).convert("RGB") for data in (stored, fresh))
    if max(abs(m - n) for m, n in zip(a.size, b.size, strict=True)) > PIXELS:
        yield f"the picture was {a.size}, now {b.size}"
        return
    size = tuple(-(-side // SHRINK) for side in a.size)
    small = (np.asarray(p.resize(size, Image.Resampling.BOX), float) for p in (a, b))
    difference = np.abs(np.subtract(*small)).mean(axis=2)
    others = int((difference > SQUARE).sum())
    if difference.mean() > DIFFERENCE or others > FEW + difference.size / 1000:
        yield (
            f"the picture differs by {difference.mean():.2f} of 255 in the mean, and in {others} "
            f"of {difference.size} squares"
        )


def main(names: list[str]) -> None:
    for path in map(Path, names) if names else sorted(FOLDER.glob("*.ipynb")):
        print(path, flush=True)
        nbformat.write(execute(read(path)), path)


if __name__ == "__main__":
    main(sys.argv[1:])
