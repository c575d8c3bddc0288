"""The query string of an address as a question: checked names, lengths, and typed values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl

from ..errors import UnknownNameError
from ..queries import QUERIES
from ..queries.parse import kind_of
from ..queries.registry import Parameter, Query
from ..store import Store
from .failures import ServiceError

__all__ = ["Asked", "names_a_store", "parameters_of", "parse_query", "whole_number"]

MAX_VALUE = 8_000
"""Characters of one parameter's value: a long list of tokens, and no more."""

MAX_NUMBERS = 1_000_000
"""Layers or neurons in ranges."""

MAX_QUERY = 32_000
"""Characters of a whole query string."""


@dataclass(frozen=True)
class Asked:
    """A question as text, which is how it travels to another process and into a name in the cache.

    Attributes
    ----------
    query : str
        A registered query.
    text : dict
        Text of its parameters; those that are left out have their defaults.
    """

    query: str
    text: Mapping[str, str]

    @cached_property
    def values(self) -> dict[str, Any]:
        """The parameters' values; of stores, still their names.

        Raises
        ------
        UsageError
            A text that does not stand for a value.
        """
        known = {p.name: p for p in QUERIES[self.query].parameters}
        for name in ("layers", "neurons"):
            _check_ranges(name, self.text.get(name, ""))
        return {n: kind_of(known[n].annotation).parse(n, text) for n, text in self.text.items()}

    @cached_property
    def canonical(self) -> str:
        """The same for questions that are spelled differently."""
        known = {p.name: p.default for p in QUERIES[self.query].parameters}
        other = {n: v for n, v in self.values.items() if v != known[n] or type(v) is bool}
        return json.dumps([self.query, other], sort_keys=True)

    def arguments(self, store_of: Callable[[str], Any]) -> dict[str, Any]:
        """Arguments of the query's function; `store_of` gives a store by name."""
        query = QUERIES[self.query]
        stores = {p.name for p in query.parameters if names_a_store(p)}
        return {n: store_of(v) if n in stores else v for n, v in self.values.items()}

    def stores(self) -> list[str]:
        """Names of the other stores that it is asked of."""
        query = QUERIES[self.query]
        return [
            self.values[p.name]
            for p in query.parameters
            if names_a_store(p) and p.name in self.values
        ]


def _check_ranges(name: str, text: str) -> None:
    """Refuse ranges that would be written out as more numbers than there can be."""
    ranges = re.findall(r"(\d{1,12})-(\d{1,12})", text, re.ASCII)
    if sum(int(high) - int(low) for low, high in ranges) > MAX_NUMBERS:
        raise ServiceError(413, "too_large", f"{name} has over {MAX_NUMBERS:,} numbers", text)


def names_a_store(parameter: Parameter) -> bool:
    """Whether a parameter takes a second store: over HTTP, the name of one that is served."""
    return Store in getattr(parameter.annotation, "__args__", ())


def parameters_of(query: Query) -> list[dict[str, Any]]:
    """A query's parameters, described."""
    found = []
    for p in query.parameters:
        kind = kind_of(p.annotation)
        found.append(
            {
                "name": p.name,
                "type": kind.name,
                "default": list(p.default) if isinstance(p.default, tuple) else p.default,
                "description": "Name of another served store over the same tokens."
                if names_a_store(p)
                else p.description,
                "choices": list(kind.choices) if kind.choices and kind.name == "string" else None,
            }
        )
    return found


def parse_query(raw: bytes, allowed: list[str]) -> dict[str, str]:
    """The parameters of a query string; empty ones are left out.

    Raises
    ------
    ServiceError
        One that is unknown, given twice or too long.
    """
    if len(raw) > MAX_QUERY:
        raise ServiceError(
            413, "too_large", f"the query string is over {MAX_QUERY:,} characters long"
        )
    try:
        pairs = parse_qsl(
            raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=100
        )
    except ValueError:
        raise ServiceError(
            400, "bad_parameter", "the query string is not UTF-8, or has too many parameters"
        ) from None
    found: dict[str, str] = {}
    for name, value in pairs:
        if name not in allowed:
            raise ServiceError.of(UnknownNameError("parameter", name[:200], allowed))
        if name in found:
            raise ServiceError(400, "bad_parameter", f"{name} is given twice", name)
        if len(value) > MAX_VALUE:
            raise ServiceError(
                413, "too_large", f"{name} is over {MAX_VALUE:,} characters long", value
            )
        if "\0" in value:
            raise ServiceError(400, "bad_parameter", f"{name} holds a null character", name)
        found[name] = value
    return {name: value for name, value in found.items() if value.strip()}


def whole_number(
    given: Mapping[str, str], name: str, default: int | None, least: int, most: int
) -> int:
    """A parameter that is a whole number within limits."""
    text = given.get(name)
    if text is None:
        if default is None:
            raise ServiceError(400, "bad_parameter", f"{name} is needed: give a whole number", name)
        return default
    try:
        value = int(text) if len(text) < 20 else most + 1
    except ValueError:
        raise ServiceError(400, "bad_parameter", f"{name} is not a whole number", text) from None
    if not least <= value <= most:
        raise ServiceError(400, "bad_parameter", f"{name} goes from {least:,} to {most:,}", text)
    return value
