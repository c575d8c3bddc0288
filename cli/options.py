"""Options made from the registry of queries, for every command that asks one.

Each parameter of a query becomes an option of the same name, type, default and description.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from actstore.queries.parse import kind_of

from .output import progress

__all__ = ["option", "query_command"]


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
    kinds = {p.name: kind_of(p.annotation) for p in query.parameters}

    def command(**values: Any) -> None:
        store = values.pop("store")
        scheduler = values.pop("scheduler")
        mine = {p.name: values.pop(p.name) for p in own}
        asked = {
            name: kinds[name].parse(f"--{name}", value) if isinstance(value, str) else value
            for name, value in values.items()
        }

        def ask() -> Any:
            import actstore

            lazy = query.function(store, **asked)
            with progress("query", 1, "tasks") as bar:

                def told(done: int, total: int) -> None:
                    bar(done, "", total)

                return actstore.compute(lazy, scheduler=scheduler, progress=told)

        run(query, ask, **mine)

    store = inspect.Parameter(
        "store",
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        annotation=Annotated[
            str, typer.Argument(metavar="STORE", help="A sealed store, a path or URL.")
        ],
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
    kind = _option_type(p.annotation)
    name = p.name.replace("_", "-")
    flag = f"--{name}/--no-{name}" if p.default is True else f"--{name}"
    default = _as_text(p.default) if kind is str else p.default
    return option(p.name, kind, default, p.description, flag)


def _option_type(annotation: Any) -> Any:
    """The type Typer is told: what it can convert and list itself, else text."""
    kind = kind_of(annotation)
    if kind.name == "array" or (kind.name == "string" and not kind.choices):
        return str | None if kind.optional else str
    return annotation


def _as_text(default: Any) -> str:
    """A default as it would be typed."""
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
