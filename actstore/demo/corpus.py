"""The demo corpus: text that every Python installation carries.

Two sources: the help topics of ``pydoc_data.topics``, and the docstrings of the standard library,
read from its source files without importing them. About a tenth of the documents is held out,
chosen by name, so that the choice is the same on every version of Python. The demo model was
trained on the rest.

Topics contain one another ("compound" holds all of "if"), and docstrings are copied between
modules. A paragraph is therefore kept only where it first occurs, and the held-out documents come
first, so that no paragraph of theirs was trained on.
"""

from __future__ import annotations

import ast
import inspect
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import CorpusError

__all__ = ["Document", "demo_records", "documents", "is_held_out"]

# Folders of the standard library that are not it (site-packages), are its tests, or are
# applications and old tools that not every installation has.
SKIPPED = frozenset(
    {
        "__phello__",
        "__pycache__",
        "dist-packages",
        "distutils",
        "ensurepip",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)

SHORTEST_DOCUMENT = 200  # characters; less is not worth a document
SHORTEST_REPEAT = 40  # a shorter paragraph ("For example:") may occur again
PIECE = 640  # the most characters of a demo record: nearly always within the model's 256 tokens


@dataclass(frozen=True)
class Document:
    """One document of the corpus.

    Attributes
    ----------
    name : str
        "topics/NAME" or "docstrings/MODULE".
    source : str
        "topics" or "docstrings".
    text : str
        Paragraphs with a blank line between.
    held_out : bool
        Whether it is kept back from training.
    """

    name: str
    source: str
    text: str
    held_out: bool


def is_held_out(name: str) -> bool:
    """Whether the document of this name is kept back from training.

    Parameters
    ----------
    name : str
        The name of a `Document`.

    Returns
    -------
    bool
        True for about one name in ten, by its checksum alone.

    Examples
    --------
    >>> is_held_out("docstrings/json"), is_held_out("topics/calls")
    (False, True)
    """
    return zlib.crc32(name.encode()) % 10 == 0


def documents(held_out: bool | None = None) -> list[Document]:
    """Read the corpus from the running Python's standard library.

    Parameters
    ----------
    held_out : bool, optional
        True for only the held-out documents (quick, as the other modules are not parsed), False
        for only those to train on; both by default.

    Returns
    -------
    list of Document
        In order of name.

    Raises
    ------
    CorpusError
        If the installation has neither the topics nor any source file. With one of the two, the
        corpus is that one.
    """
    topics = _topics()
    modules = _modules()
    if not topics and not modules:
        raise CorpusError(
            "the demo corpus is read from the Python installation, and this one has neither "
            f"pydoc_data.topics nor source files under {_stdlib()}. Use a Python with its "
            "standard library unpacked, or dump a text of your own."
        )
    names = sorted([*topics, *modules])
    # The training text depends on the held-out text, which must go first, but not the other
    # way round.
    order = [n for n in names if is_held_out(n)]
    if not held_out:
        order += [n for n in names if not is_held_out(n)]
    seen: set[str] = set()
    found = []
    for name in order:
        raw = topics[name] if name in topics else _docstrings(modules[name])
        text = "\n\n".join(_new_paragraphs(raw, seen))
        if len(text) >= SHORTEST_DOCUMENT:
            found.append(Document(name, name.partition("/")[0], text, is_held_out(name)))
    if held_out is not None:
        found = [d for d in found if d.held_out == held_out]
    return sorted(found, key=lambda d: d.name)


def demo_records(limit: int = 80_000) -> list[dict[str, str]]:
    """Return the records that ``actstore demo`` dumps, from held-out documents only.

    Parameters
    ----------
    limit : int
        About how many characters of text to return in all, half from each source where both
        have enough.

    Returns
    -------
    list of dict
        With "text" (a few paragraphs of one document), "source" ("topics" or "docstrings") and
        "name" (the document), in order of name.
    """
    by_source: dict[str, list[list[dict[str, str]]]] = {}
    for d in documents(held_out=True):
        records = [{"text": t, "source": d.source, "name": d.name} for t in _pieces(d.text)]
        by_source.setdefault(d.source, []).append(records)
    chosen: list[dict[str, str]] = []
    room = limit
    # The smaller source first, so that the other can fill what it leaves.
    sources = sorted(by_source.values(), key=lambda docs: sum(map(len, docs)))
    for i, docs in enumerate(sources):
        share = room // (len(sources) - i)
        # The first piece of every document, then the second of every document ...: many
        # documents are then represented, and a long one does not crowd out the rest.
        for round_ in range(max(map(len, docs))):
            for records in docs:
                if round_ < len(records) and len(records[round_]["text"]) <= share:
                    chosen.append(records[round_])
                    share -= len(records[round_]["text"])
                    room -= len(records[round_]["text"])
    return sorted(chosen, key=lambda r: r["name"])  # stable: the pieces stay in order


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _topics() -> dict[str, str]:
    """The help topics by document name; none where the module is missing."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return {f"topics/{name}": text for name, text in topics.items()}


def _modules() -> dict[str, Path]:
    """The source files of the standard library by document name."""
    root = _stdlib()
    found = {}
    for path in _walk(root):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]  # a package keeps its name when a module becomes one
        found["docstrings/" + ".".join(parts)] = path
    return found


def _walk(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():  # python311.zip and the like
        return
    for path in folder.iterdir():
        if path.is_dir():
            # An identifier leaves out "config-3.11-x86_64-linux-gnu".
            if path.name not in SKIPPED and path.name.isidentifier():
                yield from _walk(path)
        # _sysconfigdata_... is written at build time, for one platform.
        elif path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
            yield path


def _docstrings(path: Path) -> str:
    """The docstrings of a source file, in order of line; empty where it cannot be parsed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(inspect.cleandoc(ast.get_docstring(n, clean=False) or "") for n in nodes)


def _paragraphs(text: str) -> Iterator[str]:
    lines: list[str] = []
    for line in [*text.expandtabs().splitlines(), ""]:
        if line.strip():
            lines.append(line.rstrip())
        elif lines:
            yield "\n".join(lines)
            lines = []


def _new_paragraphs(text: str, seen: set[str]) -> Iterator[str]:
    """The paragraphs that are not in `seen`, where they are then put."""
    for paragraph in _paragraphs(text):
        words = " ".join(paragraph.split())  # the same text may be wrapped or indented otherwise
        if len(words) >= SHORTEST_REPEAT:
            if words in seen:
                continue
            seen.add(words)
        yield paragraph


def _pieces(text: str) -> Iterator[str]:
    """Cut a text into pieces of at most `PIECE` characters, between paragraphs or else lines."""
    while len(text) > PIECE:
        for gap in ("\n\n", "\n", " "):
            end = text.rfind(gap, PIECE // 4, PIECE)  # not too near the start: no tiny pieces
            if end > 0:
                break
        else:
            end = PIECE
        yield text[:end]
        text = text[end:].lstrip("\n")
    if text:
        yield text
