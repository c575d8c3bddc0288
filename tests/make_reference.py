"""Write notebooks/reference.md, all of it from the docstrings: ``python tests/make_reference.py``.

griffe reads the docstrings; here is only what goes where. `test_docs` fails when the page is not
what the docstrings say.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import griffe

import actstore
from actstore import errors, plot, select
from actstore.queries.registry import COMMON, QUERIES

PAGE = Path(__file__).parents[1] / "notebooks" / "reference.md"

HEAD = """\
# Reference

Every public name, from its docstring. `python tests/make_reference.py` writes this page; the
[guide](guide.md) says what to use when. Examples leave out the module of the function itself.
"""
SELECTION = """\
Every query takes these, too, and returns a lazy `xarray.Dataset` (a `DataTree` where stages or
groups have shapes of their own): nothing is read before `.compute()` or `actstore.compute`.
Everywhere, `data` is a Store, a path, or a DataArray (token, neuron) or (layer, token, neuron) of
your own.
"""
PICTURES = """\
`draw` and `save` take the result of any query; the others draw one kind of picture into a
Matplotlib `Axes` or `Figure` of yours (default: a new one), which they return.
"""


def members(module: Any) -> dict[str, Any]:
    """Public functions and classes of a module, by name."""
    found = {name: getattr(module, name) for name in module.__all__}
    return {name: own for name, own in found.items() if callable(own)}


def public(own: type) -> dict[str, Any]:
    """Methods and properties of a class, without those whose names begin with _."""
    kinds = (Callable, property, classmethod, cached_property)
    return {
        name: getattr(own, name) if isinstance(value, classmethod) else value
        for name, value in vars(own).items()
        if not name.startswith("_") and isinstance(value, kinds)
    }


def is_value(own: Any) -> bool:
    """Whether it is read, not called."""
    return isinstance(own, property | cached_property)


def is_made_by_hand(own: Any) -> bool:
    """Whether people call it; other classes are made for them, as a Store is by `open`."""
    if not inspect.isclass(own):
        return not is_value(own)
    return is_dataclass(own) or any(s.kind.value == "parameters" for s in sections(own))


def sections(own: Any) -> list[griffe.DocstringSection]:
    """A docstring's parts: texts, parameters, what is returned ..."""
    return griffe.Docstring(inspect.getdoc(own) or "").parse("numpy", warnings=False)


def arguments(own: Any) -> list[inspect.Parameter]:
    """Parameters as a caller sees them."""
    return [p for p in inspect.signature(own).parameters.values() if p.name not in ("self", "cls")]


def render() -> str:
    """The page."""
    own = members(actstore)
    queries = {name: query.function for name, query in QUERIES.items()}
    others = {name: own[name] for name in sorted(own, key=str.lower) if name not in queries}
    functions = {name: value for name, value in others.items() if not inspect.isclass(value)}
    classes = {name: value for name, value in others.items() if inspect.isclass(value)}
    exceptions = members(errors)
    parts = [HEAD, "## Functions", *entries("actstore.", functions)]
    parts += ["## Classes", *entries("actstore.", classes)]
    parts += ["## Queries", SELECTION, selection()]
    parts += entries("actstore.", dict(sorted(queries.items())), hidden=shared())
    parts += ["## Pictures", PICTURES, *entries("actstore.plot.", members(plot))]
    parts += ["## Token expressions", page_of(select), "## Errors", page_of(errors)]
    parts += entries("actstore.errors.", {k: v for k, v in exceptions.items() if takes_part(v)})
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def entries(prefix: str, named: dict[str, Any], hidden: frozenset[str] = frozenset()) -> list[str]:
    return [part for name in named for part in entry(3, prefix + name, named[name], hidden)]


def entry(level: int, name: str, own: Any, hidden: frozenset[str] = frozenset()) -> Iterator[str]:
    """A name's heading, signature, and docstring; of a class, its properties and methods, too."""
    yield f"{'#' * level} {name.rpartition('.')[2]}"
    if is_made_by_hand(own):
        yield fenced(signature(name, own), "python")
    for section in sections(own):
        yield from SECTIONS[section.kind.value](section, hidden)
    if inspect.isclass(own):
        found = public(own)
        values = {key: value for key, value in found.items() if is_value(value)}
        if values:
            yield "Properties:"
            yield "\n".join(item(key, "", inspect.getdoc(v) or "") for key, v in values.items())
        for key, value in found.items():
            if not is_value(value):
                yield from entry(level + 1, f"{name}.{key}", value)


def takes_part(own: Any) -> bool:
    """Whether there is more to say of an error than its line in the hierarchy."""
    return len(sections(own)) > 1


def signature(name: str, own: Any) -> str:
    """Names and defaults; types are below, in words."""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in arguments(own)]
    text = f"{name}{inspect.Signature(bare)}"
    return "\n".join(textwrap.wrap(text, 96, subsequent_indent="    ", break_on_hyphens=False))


def shared() -> frozenset[str]:
    return frozenset({"data", *(head.partition(" :")[0] for head in COMMON)})


def selection() -> str:
    heads = {head.partition(" : ")[::2]: text for head, text in COMMON.items()}
    return "\n".join(item(name, kind, text) for (name, kind), text in heads.items())


def item(name: str, kind: str, text: str) -> str:
    shown = f"**`{name}`**" if name else ""
    shown += (", " if shown and kind else "") + (f"*{kind}*" if kind else "")
    return f"- {shown}" + (": " + textwrap.indent(text, "  ").strip() if text else "")


def listed(title: str) -> Callable[..., Iterator[str]]:
    def show(section: Any, hidden: frozenset[str]) -> Iterator[str]:
        rows = [row for row in section.value if getattr(row, "name", "") not in hidden]
        if rows:  # names that are described together stay together
            together = groupby(rows, key=lambda row: (str(row.annotation or ""), row.description))
            yield f"{title}:"
            yield "\n".join(
                item(", ".join(getattr(row, "name", "") for row in group), kind, text)
                for (kind, text), group in together
            )

    return show


def examples(section: Any, _: frozenset[str]) -> Iterator[str]:
    for kind, text in section.value:
        yield fenced(text, "pycon") if kind.value == "examples" else text


def text(section: Any, _: frozenset[str]) -> Iterator[str]:
    yield section.value


def page_of(module: Any) -> str:
    """A module's docstring, its literal blocks fenced."""
    return re.sub(
        r"(^|:):\n\n((?: {4}.*\n|\n)+)",
        lambda m: f"{m[1]}\n\n{fenced(textwrap.dedent(m[2]).strip())}\n\n",
        (inspect.getdoc(module) or "") + "\n",
        flags=re.MULTILINE,
    )


def fenced(code: str, language: str = "text") -> str:
    return f"```{language}\n{code}\n```"


SECTIONS: dict[str, Callable[..., Iterator[str]]] = {
    "text": text,
    "parameters": listed("Parameters"),
    "other parameters": listed("Parameters"),
    "attributes": listed("Attributes"),
    "returns": listed("Returns"),
    "yields": listed("Yields"),
    "raises": listed("Raises"),
    "examples": examples,
}

if __name__ == "__main__":
    PAGE.write_text(render())
    print(f"{PAGE}: {len(PAGE.read_text().splitlines()):,} lines")
