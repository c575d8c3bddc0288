"""`actstore bench all`: this machine's limits, and the product against them and its peers."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import check_out, print_json, print_table, say

__all__ = ["everything"]


def everything(
    only: Annotated[
        str | None, typer.Option(help="Groups to measure, as a comma list; default all.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds, after one more.")] = 5,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a dump.")] = 8192,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model and store.")] = 12,
    width: Annotated[int, typer.Option(min=64, help="Width of the model.")] = 768,
    gigabytes: Annotated[float, typer.Option(help="What the writer alone writes.")] = 4,
    store_gigabytes: Annotated[float, typer.Option(help="The store that is scanned.")] = 8.5,
    shards: Annotated[int, typer.Option(min=100, help="Of the largest store opened.")] = 100_000,
    growth: Annotated[int, typer.Option(min=1, help="Tokens of the smallest that grows.")] = 8192,
    batches: Annotated[
        int, typer.Option(min=1, help="Tokens that training batches are drawn from.")
    ] = 2**19,
    device: Annotated[str, typer.Option(help="Where the model runs: auto, cpu, cuda ...")] = "auto",
    folder: Annotated[
        Path | None, typer.Option(help="On the disk to measure; default the temporary folder.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="What --json printed before, to show and not measure.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also a table here: FILE.md.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Also a picture here: FILE.png or FILE.svg.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The limits of this machine, and actstore against them and against its peers.

    In rounds: ours and what it is held against follow one another, and ratios are of speeds within
    a round; medians of the rounds, of which the first is dropped. Peers come with the extra `test`;
    of one that is not installed the row says so. Groups: machine, dump (against the bare forward
    pass), ways (other ways to keep activations), writer, reading, sketches, histograms,
    information, similarity, covariance, loader, open, growth.
    """
    from .speed.groups import GROUPS
    from .speed.setting import Setting
    from .speed.table import HEADER, cells
    from .speed.table import markdown as as_markdown

    for path, endings in ((markdown, [".md"]), (picture, [".png", ".svg"])):
        if path is not None:
            check_out(path, endings)
    names = _names(only, GROUPS)
    if results is not None:
        document = _read(results, names)
    else:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            setting = Setting(
                Path(scratch), rounds, device, tokens, layers, width, gigabytes, store_gigabytes,
                shards, growth, batches,
            )  # fmt: skip
            document = _measured(setting, names)
    rows = document["rows"]
    if as_json:
        print_json(document)
    else:
        print_table(HEADER, [cells(row) for row in rows])
    if markdown is not None:
        markdown.write_text(as_markdown(document))
    if picture is not None:
        from .speed.picture import draw

        draw(document, picture)
    missed = [row["what"] for row in rows if row["met"] is False]
    say(f"{len(rows)} rows, {len(missed)} below what they are to be at least")
    if any(row["failed"] for row in rows):
        raise typer.Exit(1)


def _names(only: str | None, known: Any) -> list[str]:
    from actstore.errors import UnknownNameError

    names = list(known) if only is None else [name.strip() for name in only.split(",")]
    for name in names:
        if name not in known:
            raise UnknownNameError("group", name, known)
    return names


def _measured(setting: Any, names: list[str]) -> dict[str, Any]:
    from .speed.groups import measure
    from .speed.machine import facts
    from .speed.rounds import Row

    began = time.perf_counter()
    rows = []
    for name in names:
        say(f"{time.perf_counter() - began:5.0f} s  {name}")
        try:
            for row in measure(setting, [name]):
                rows.append(row.document())
        except Exception as error:  # what was measured before must not be lost
            say(f"{name} failed: {error!r}")
            rows.append(Row(name, name, note=f"failed: {error!r}", failed=True).document())
    return {
        "command": shlex.join(["actstore", *sys.argv[1:]]),
        "seconds": time.perf_counter() - began,
        "machine": facts(setting.device),
        "rows": rows,
    }


def _read(path: Path, names: list[str]) -> dict[str, Any]:
    from actstore.errors import UsageError

    try:
        document = json.loads(path.read_text())
        rows = [row for row in document["rows"] if row["group"] in names]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not what `actstore bench all --json` prints ({error})"
        ) from None
    return {**document, "rows": rows}
