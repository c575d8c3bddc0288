"""What the commands print: data on stdout, progress and messages on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
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
from rich.text import Text

from actstore.errors import UnknownNameError, UsageError
from actstore.wire import dumps

__all__ = ["check_out", "print_json", "print_table", "progress", "say", "size", "some"]

console = Console()
messages = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """A message for the person, on stderr."""
    messages.print(text, markup=False, soft_wrap=True)


def some(n: int, one: str, many: str = "") -> str:
    """A number of things: "1 block", "2 blocks"."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def print_json(value: Any) -> None:
    sys.stdout.write(dumps(value) + "\n")


def print_table(
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    title: str = "",
    *,
    draw: bool | None = None,
) -> None:
    """A table: drawn on a terminal or when asked to, tab-separated elsewhere."""
    if draw is False or (draw is None and not console.is_terminal):
        for row in [header, *rows]:
            sys.stdout.write("\t".join(_cell(v) for v in row) + "\n")
        return
    table = Table(*header, title=title or None, title_justify="left", header_style="bold")
    for row in rows:
        table.add_row(*(Text(_cell(v)) for v in row))
    # Where no terminal sets the width, the table does.
    wide = console if console.is_terminal else Console(file=sys.stdout, width=10_000)
    wide.print(table)


def check_out(path: Path, endings: Iterable[str]) -> None:
    """Refuse a file that could not be written, before anything takes long."""
    if path.suffix not in endings:
        raise UnknownNameError("file ending", path.suffix, endings)
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.absolute().parent}; make it first")
    if path.is_dir():
        raise UsageError(f"{path} exists: remove it, or choose another name")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    # A token may be a tab or a new line, which would be taken for the table's own.
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


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
