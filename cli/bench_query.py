"""`actstore bench query`: the groups of `actstore bench all` that are about questions."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .bench_similarity import peak_memory
from .output import print_json, print_table, say, size

__all__ = ["query"]

NAMES = ("reading", "sketches", "histograms", "similarity", "information")


def query(
    gigabytes: Annotated[float, typer.Option(help="Size of the store that is made.")] = 4.5,
    repeats: Annotated[int, typer.Option(help="Interleaved repeats of each measurement.")] = 5,
    folder: Annotated[
        Path | None, typer.Option(help="Where to write; default the temporary folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Queries over a float32 store of random values, 12 layers x 3,072 neurons.

    A scan against merely reading; sketches; a histogram of every neuron, dimensionality and RSA,
    information and covariance of all pairs, each against the plain route and its peers. These are
    the groups reading, sketches, histograms, similarity and information of `actstore bench all`.
    """
    from .speed.groups import measure
    from .speed.setting import Setting
    from .speed.table import HEADER, cells

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        setting = Setting(Path(scratch), rounds=repeats, store_gigabytes=gigabytes)
        rows = [row.document() for row in measure(setting, NAMES)]
    peak = peak_memory()
    if as_json:
        print_json({"rows": rows, "peak_bytes": peak})
        return
    print_table(HEADER, [cells(row) for row in rows])
    say(f"peak memory {size(peak)}")
