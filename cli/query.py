"""`actstore query NAME STORE`: one command for each registered query, made from the registry."""

from __future__ import annotations

import inspect
import typing
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal

import numpy as np
import typer

from actstore.errors import UsageError

from .output import console, print_json, print_table, say

__all__ = ["add_query_commands", "parse_number_list"]

_TABLE_ROWS = 60


def add_query_commands(app: typer.Typer) -> None:
    from actstore.queries.registry import QUERIES

    group = typer.Typer(no_args_is_help=True, help="Ask a store a question.")
    for query in QUERIES.values():
        group.command(
            name=query.name,
            help=query.summary,
            epilog=f"Example: actstore query {query.name} book.zarr {query.example}",
        )(_command(query))
    app.add_typer(group, name="query", epilog="Example: actstore query moments book.zarr --json")


def _command(query: Any) -> Any:
    """A function with the query's parameters as options, for Typer to read."""
    parameters = [
        inspect.Parameter(
            "store",
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            annotation=Annotated[Path, typer.Argument(metavar="STORE", help="A sealed store.")],
        )
    ]
    parsers = {}
    for p in query.parameters:
        kind, parser = _option_type(p.annotation)
        parsers[p.name] = parser
        option = p.name.replace("_", "-")
        name = f"--{option}/--no-{option}" if p.default is True else f"--{option}"
        parameters.append(
            inspect.Parameter(
                p.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_as_text(p.default) if kind is str else p.default,
                annotation=Annotated[kind, typer.Option(name, help=p.description)],
            )
        )
    for name, text in (
        ("json", "Print JSON."),
        ("csv", "Print CSV."),
        ("table", "Print a table, the default."),
    ):
        parameters.append(
            inspect.Parameter(
                f"as_{name}",
                inspect.Parameter.KEYWORD_ONLY,
                default=False,
                annotation=Annotated[bool, typer.Option(f"--{name}", help=text)],
            )
        )

    def command(**values: Any) -> None:
        store = values.pop("store")
        as_json, as_csv, _ = (values.pop(f"as_{n}") for n in ("json", "csv", "table"))
        asked = {
            name: parsers[name](name, value) if isinstance(value, str) else value
            for name, value in values.items()
        }
        _answer(query, store, asked, as_json, as_csv)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__name__ = query.name
    return command


def _answer(query: Any, store: Path, asked: dict[str, Any], as_json: bool, as_csv: bool) -> None:
    import actstore
    from actstore.wire import to_csv, to_json, to_records

    result = actstore.compute(query.function(store, **asked))
    if as_json:
        print_json(to_json(result))
    elif as_csv:
        typer.echo(to_csv(result), nl=False)
    else:
        header, rows = to_records(result)
        shown = rows[:_TABLE_ROWS] if console.is_terminal else rows
        print_table(header, shown)
        if len(shown) < len(rows):
            say(f"{len(rows) - len(shown):,} more rows: --csv or --json prints them all")
        attrs = result.attrs
        say(f"{attrs['tokens_used']:,} tokens ({attrs['tokens']}), by {attrs['source']}")


def _option_type(annotation: Any) -> tuple[Any, Any]:
    """The type Typer is told, and how text becomes the value."""
    args = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return annotation, _as_it_is
    if annotation in (bool, int, float):
        return annotation, _as_it_is
    if typing.get_origin(annotation) in (UnionType, typing.Union):
        inner = [a for a in args if a is not type(None)]
        words = [w for a in inner if typing.get_origin(a) is Literal for w in typing.get_args(a)]
        if len(inner) == 1 and (inner[0] in (bool, int, float) or words):
            return annotation, _as_it_is
        parser = _as_it_is
        if any(_is_numbers(a) for a in inner) and str not in inner:
            parser = partial(_word_or_numbers, words)
        return str | None if type(None) in args else str, parser
    return str, parse_number_list if _is_numbers(annotation) else _as_it_is


def _is_numbers(annotation: Any) -> bool:
    return float in typing.get_args(annotation)


def _as_it_is(name: str, text: str) -> Any:
    return text


def _word_or_numbers(words: list[str], name: str, text: str) -> Any:
    return text if text in words else parse_number_list(name, text)


def _as_text(default: Any) -> str:
    """A default as it would be typed."""
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def parse_number_list(name: str, text: str) -> int | float | list[float]:
    """A number, a comma list of numbers, or ``start:stop:count`` for evenly spaced ones.

    Examples
    --------
    >>> parse_number_list("bins", "50"), parse_number_list("bins", "-1:1:3")
    (50, [-1.0, 0.0, 1.0])
    >>> parse_number_list("q", "0.5")
    0.5
    >>> parse_number_list("range", "-5,5")
    [-5.0, 5.0]
    """
    try:
        if ":" in text:
            start, stop, count = text.split(":")
            return np.linspace(float(start), float(stop), int(count)).tolist()
        if "," in text:
            return [float(part) for part in text.split(",")]
        return float(text) if set(text) & set(".eE") else int(text)
    except ValueError:
        raise UsageError(
            f"--{name} {text!r} is not understood: write a number, a comma list such as 0,1,2.5, "
            "or start:stop:count for evenly spaced numbers"
        ) from None
