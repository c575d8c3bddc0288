"""What the commands print: data on stdout, progress and messages on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from actstore.wire import dumps

__all__ = ["print_json", "print_table", "progress", "say", "size"]

console = Console()
messages = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """A message for the person, on stderr."""
    messages.print(text, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    sys.stdout.write(dumps(value) + "\n")


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """A table: drawn on a terminal, tab-separated elsewhere."""
    if not console.is_terminal:
        for row in [header, *rows]:
            sys.stdout.write("\t".join(_cell(v) for v in row) + "\n")
        return
    table = Table(*header, title=title or None, title_justify="left", header_style="bold")
    for row in rows:
        table.add_row(*(_cell(v) for v in row))
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def size(nbytes: float) -> str:
    """Bytes for people: 1.23 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.2f} TB"


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
    """A bar on stderr; nothing where stderr is not a terminal.

    Yields
    ------
    callable
        ``update(done, note, total)``; the total only where it was not known before.
    """
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit + "  {task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=messages,
        disable=not messages.is_terminal,
        transient=True,
    ) as bars:
        task = bars.add_task(label, total=total, note="")

        def update(done: int, note: str = "", of: int = total) -> None:
            bars.update(task, completed=done, note=note, total=of)

        yield update
