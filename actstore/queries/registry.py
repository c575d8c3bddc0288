"""The registry of queries: the one list behind the Python names, the CLI and the server.

A query is a function with a numpydoc docstring, registered by decorator. Its parameters, their
types, defaults and descriptions are read off its signature and its docstring, so that no interface
can drift from another. What all queries share is described once, here, and put into each docstring
by the decorator.
"""

from __future__ import annotations

import inspect
import re
import textwrap
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["COMMON", "QUERIES", "Parameter", "Query", "query"]

COMMON = {
    "stages : str or sequence of str, optional": 'Stages, as "mlp_pre,mlp_post"; default all.',
    "layers : str, int or sequence of int, optional": 'Layers, as "0,3-5" or "-1"; default all.',
    "tokens : str or ndarray of bool, optional": (
        "Tokens, as \"position > 0 and condition == 'terminal'\", or a mask; default all."
    ),
    "neurons : str, int or sequence of int, optional": 'Neurons, as "0,3-5"; default all.',
    "by : str, optional": "Label column to split by.",
    "exclude_sinks : str, optional": (
        "Stage. Leave out tokens whose norm there, at its middle layer, is over 10 times the "
        "median norm (of all tokens). Sketches know the norms; of data without sketches that "
        "layer is read when the query is built."
    ),
}
"""Selection parameters that every query takes."""

_HEADER = "Parameters\n----------\n"

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
    """A registered query.

    Attributes
    ----------
    name : str
    function : callable
    summary : str
        First line of the docstring.
    parameters : tuple of Parameter
        All but ``data``.
    example : str
        Arguments of an example on the command line, after the store.
    """

    name: str
    function: Callable[..., Any]
    summary: str
    parameters: tuple[Parameter, ...]
    example: str


QUERIES: dict[str, Query] = {}
"""All queries by name."""


def query(example: str) -> Callable[[Function], Function]:
    """Register a query.

    Parameters
    ----------
    example : str
        Arguments of an example on the command line, after the store.
    """

    def register(function: Function) -> Function:
        doc = function.__doc__ = _documented(inspect.getdoc(function) or "")
        described = _descriptions(doc)
        hints = typing.get_type_hints(function)
        parameters = tuple(
            Parameter(name, hints[name], p.default, described[name])
            for name, p in inspect.signature(function).parameters.items()
            if name != "data"
        )
        name = function.__name__
        QUERIES[name] = Query(name, function, doc.partition("\n")[0], parameters, example)
        return function

    return register


def _documented(doc: str) -> str:
    """A docstring with the common parameters described in front of the query's own."""
    entries = {"data : Store, path or DataArray": "What to ask.", **COMMON}
    common = "".join(
        f"{head}\n{textwrap.indent(textwrap.fill(text, 92), '    ')}\n"
        for head, text in entries.items()
    )
    return doc.replace(_HEADER, _HEADER + common, 1)


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
