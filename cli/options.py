"""Options made from the registry of queries, for every command that asks one.

Each parameter of a query becomes an option of the same name, type, default and description.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal

import numpy as np
import typer

from actstore.errors import UsageError

__all__ = ["option", "parse_number_list", "query_command"]


def query_command(
    query: Any, own: list[inspect.Parameter], run: Callable[..., None]
) -> Callable[..., None]:
    """A function for Typer to read: a store, a query's parameters, and a command's own options.

    Whatever the command, `--scheduler` says where the query runs.

    Parameters
    ----------
    query : Query
        Out of the registry.
    own : list of Parameter
        The command's options, from `option`.
    run : callable
        Called as ``run(query, ask, **own)``, where ``ask()`` gives the computed result.
    """
    parsers = {p.name: _option_type(p.annotation)[1] for p in query.parameters}

    def command(**values: Any) -> None:
        store = values.pop("store")
        scheduler = values.pop("scheduler")
        mine = {p.name: values.pop(p.name) for p in own}
        asked = {
            name: parsers[name](name, value) if isinstance(value, str) else value
            for name, value in values.items()
        }

        def ask() -> Any:
            import actstore

            return actstore.compute(query.function(store, **asked), scheduler=scheduler)

        run(query, ask, **mine)

    store = inspect.Parameter(
        "store",
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        annotation=Annotated[Path, typer.Argument(metavar="STORE", help="A sealed store.")],
    )
    scheduler = option(
        "scheduler",
        str | None,
        None,
        "What runs the tasks: threads (default), sync, processes, or tcp://HOST:PORT of a "
        "dask.distributed scheduler, whose workers must see the store at the same path.",
    )
    parameters = [store, *map(_of_query, query.parameters), *own, scheduler]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__name__ = query.name
    return command


def option(name: str, kind: Any, default: Any, text: str, flag: str = "") -> inspect.Parameter:
    """One option of a command."""
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Option(flag or f"--{name.replace('_', '-')}", help=text)],
    )


def _of_query(p: Any) -> inspect.Parameter:
    kind = _option_type(p.annotation)[0]
    name = p.name.replace("_", "-")
    flag = f"--{name}/--no-{name}" if p.default is True else f"--{name}"
    default = _as_text(p.default) if kind is str else p.default
    return option(p.name, kind, default, p.description, flag)


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
