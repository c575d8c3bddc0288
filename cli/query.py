"""`actstore query NAME STORE`: one command for each registered query, made from the registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from actstore.errors import UsageError

from .options import option, query_command
from .output import check_out, console, print_json, print_table, say

__all__ = ["add_query_commands"]

_TABLE_ROWS = 60


def add_query_commands(app: typer.Typer) -> None:
    from actstore.queries.registry import QUERIES

    group = typer.Typer(no_args_is_help=True, help="Ask a store a question.")
    own = [
        option("as_json", bool, False, "Print JSON.", "--json"),
        option("as_csv", bool, False, "Print CSV.", "--csv"),
        option(
            "as_table",
            bool,
            False,
            "Draw a table, as on a terminal; elsewhere the default is text between tabs.",
            "--table",
        ),
        option("out", Path | None, None, "Write the result, labels and all: .nc or .zarr."),
    ]
    for query in QUERIES.values():
        group.command(
            name=query.name,
            help=query.summary,
            epilog=f"Example: actstore query {query.name} book.zarr {query.example}",
        )(query_command(query, own, _answer))
    app.add_typer(group, name="query", epilog="Example: actstore query moments book.zarr --json")


def _answer(
    query: Any,
    ask: Callable[[], Any],
    as_json: bool,
    as_csv: bool,
    as_table: bool,
    out: Path | None,
) -> None:
    from actstore.wire import ENDINGS, save, to_csv, to_json, to_records

    if as_json + as_csv + as_table > 1:
        raise UsageError("one of --json, --csv and --table at a time")
    if out is not None:
        check_out(out, ENDINGS)
    result = ask()
    if as_json:
        print_json(to_json(result))
    elif as_csv:
        typer.echo(to_csv(result), nl=False)
    elif as_table or out is None:
        header, rows = to_records(result)
        shown = rows[:_TABLE_ROWS] if console.is_terminal else rows
        print_table(header, shown, draw=as_table or console.is_terminal)
        if len(shown) < len(rows):
            say(f"{len(rows) - len(shown):,} more rows: --csv or --json prints them all")
    if out is not None:
        save(result, out)
        say(f"written to {out}")
    attrs = result.attrs
    say(f"{attrs['tokens_used']:,} tokens ({attrs['tokens']}), by {attrs['source']}")
