"""The registry of queries: the one list behind the Python names, the CLI and the server.

A query is a function with a numpydoc docstring, registered by decorator. Its own parameters,
their types, defaults and descriptions are read off its signature and its docstring, so that no
interface can drift from another.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["COMMON", "QUERIES", "Parameter", "Query", "query"]

COMMON = ("stages", "layers", "tokens", "neurons", "by")
"""Selection parameters that every query takes."""

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Parameter:
    """One parameter of a query.

    Attributes
    ----------
    name : str
    annotation : type
        As in the signature.
    default : object
    description : str
        From the docstring.
    """

    name: str
    annotation: Any
    default: Any
    description: str


@dataclass(frozen=True)
class Query:
    """A registered query."""

    name: str
    function: Callable[..., Any]
    summary: str
    parameters: tuple[Parameter, ...]


QUERIES: dict[str, Query] = {}
"""All queries by name."""


def query(function: Function) -> Function:
    """Register a query."""
    doc = inspect.getdoc(function) or ""
    described = _descriptions(doc)
    hints = typing.get_type_hints(function)
    parameters = tuple(
        Parameter(name, hints[name], p.default, described[name])
        for name, p in inspect.signature(function).parameters.items()
        if name != "data"
    )
    name = function.__name__
    QUERIES[name] = Query(name, function, doc.partition("\n")[0], parameters)
    return function


def _descriptions(doc: str) -> dict[str, str]:
    """Parameter descriptions from the Parameters section of a numpydoc docstring."""
    section = re.search(r"^Parameters\n-+\n(.*?)(?=^\S[^\n]*\n-+\n|\Z)", doc, re.M | re.S)
    found: dict[str, str] = {}
    for entry in re.finditer(
        r"^(\S[^\n]*?) :[^\n]*\n((?:[ \t]+[^\n]*\n?|\n)*)", section[1] if section else "", re.M
    ):
        text = " ".join(entry[2].split())
        for name in entry[1].split(","):
            found[name.strip()] = text
    return found
