"""Where input comes from: files, standard input and datasets to records.

A *record* is one text or one list of token ids with its labels.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CorpusError, UnknownNameError

__all__ = ["RESERVED", "Record", "as_record", "check_name", "load_dataset", "read_records"]

RESERVED = frozenset(
    """
    activation char_end char_start document head input input_ids kept layer layer_name length
    neuron position sequence special start text token token_id token_text
    """.split()  # noqa: SIM905 - a list of words reads better as words
)
"""Names that a label cannot have: the columns and dimensions that every store has."""

# ---------------------------------------------------------------- records


@dataclass(frozen=True)
class Record:
    """One text, or one list of token ids, with its labels.

    Attributes
    ----------
    text : str or None
        The text; None where token ids were given.
    input_ids : ndarray of int64 or None
        The token ids; None where a text was given.
    labels : mapping of str to str, int, float, bool, None, or a list of those
        A list holds one value for each token id.
    where : str
        The place it came from, for messages: ``"data.jsonl, line 3"``.
    left_out : mapping of str to str
        Keys that are not kept as labels, and why.
    padding : int
        Token ids that were dropped because their attention mask was 0.
    """

    text: str | None
    input_ids: np.ndarray | None
    labels: Mapping[str, Any]
    where: str
    left_out: Mapping[str, str] = field(default_factory=dict)
    padding: int = 0


def as_record(item: Any, where: str, column: str | None = None) -> Record:
    """Read a text, a list of token ids or a mapping as a record.

    Parameters
    ----------
    item : Record, str, mapping or sequence of int
        A mapping has ``text`` or ``input_ids`` (which wins); every other key is a label, but
        for ``attention_mask``, whose zeros mark padding to drop.
    where : str
        The place it comes from, for messages.
    column : str, optional
        The key that holds the text or the token ids, where it has another name.

    Raises
    ------
    CorpusError
        It is none of these, or holds what cannot be used; the message names `where`.

    Examples
    --------
    >>> as_record({"text": "To be", "play": "Hamlet"}, "line 1").labels
    {'play': 'Hamlet'}
    """
    if isinstance(item, Record):
        return item
    if isinstance(item, str):
        return Record(_whole_text(item, where, "the text"), None, {}, where)
    if isinstance(item, Mapping):
        return _mapping_record(item, where, column)
    if isinstance(item, int | float | bytes) or item is None:
        raise CorpusError(
            f"{where} is {item!r}: a record is a text, a list of token ids, or a mapping with "
            "'text' or 'input_ids'. For one list of ids write [ids]"
        )
    return Record(None, _token_ids(item, where, "the record"), {}, where)


def _mapping_record(item: Mapping[str, Any], where: str, column: str | None) -> Record:
    key = column or ("input_ids" if item.get("input_ids") is not None else "text")
    value = item.get(key)
    if value is None:
        keys = ", ".join(str(k)[:100] for k in list(item)[:50]) or "none"
        near = get_close_matches(key, [str(k) for k in item], n=1)
        wanted = repr(column) if column else "neither 'text' nor 'input_ids'"
        raise CorpusError(
            f"{where} has {'no ' if column else ''}{wanted}; its keys: {keys}. "
            + (f"Did you mean {near[0]!r}? " if near else "")
            + "Name the key that holds the text with --column"
        )
    inputs = ("text", "input_ids")
    rest = {k: v for k, v in item.items() if k not in (key, "attention_mask", *inputs)}
    unused = {k: "another input" for k in inputs if k in item and k != key}
    if isinstance(value, str):
        labels, left_out = _labels(rest, where, None)
        return Record(_whole_text(value, where, key), None, labels, where, {**unused, **left_out})
    if isinstance(value, bool | int | float | bytes | Mapping):
        raise CorpusError(
            f"{where}: {key!r} is {_json_kind(value)}; it must be a text or a list of token ids"
        )
    ids = _token_ids(value, where, repr(key))
    labels, left_out = _labels(rest, where, len(ids))
    record = Record(None, ids, labels, where, {**unused, **left_out})
    mask = item.get("attention_mask")
    return record if mask is None else _without_padding(record, ids, mask)


def _without_padding(record: Record, ids: np.ndarray, mask: Any) -> Record:
    try:
        real = np.asarray(mask).astype(bool)
    except (ValueError, TypeError):
        raise CorpusError(
            f"{record.where}: 'attention_mask' is no flat list of zeros and ones"
        ) from None
    if real.shape != ids.shape:
        raise CorpusError(
            f"{record.where}: 'attention_mask' has shape {real.shape}, 'input_ids' {ids.shape}; "
            "they must be of one length"
        )
    kept = np.flatnonzero(real)
    labels = {
        k: [v[i] for i in kept] if isinstance(v, list) else v for k, v in record.labels.items()
    }
    return Record(None, ids[kept], labels, record.where, record.left_out, len(ids) - len(kept))


def _whole_text(text: str, where: str, what: str) -> str:
    """The text, which must be one that UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{where}: {what} has half a surrogate pair, {text[error.start]!r}, at character "
            f"{error.start}; write the whole character"
        ) from None
    return text


def _token_ids(value: Any, where: str, what: str) -> np.ndarray:
    try:
        ids = np.asarray(value)
    except Exception as error:  # ragged lists, tensors on a device ...
        raise CorpusError(f"{where}: {what} cannot be read as token ids: {error}") from error
    if ids.ndim == 1 and ids.size == 0:
        return np.zeros(0, dtype=np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.dtype == np.uint64:
        raise CorpusError(
            f"{where}: {what} must be one flat list of whole numbers such as [464, 3290], not "
            f"shape {ids.shape} of {ids.dtype}"
        )
    return ids.astype(np.int64)


def _labels(
    rest: Mapping[str, Any], where: str, n_tokens: int | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The labels among the other keys of a record, and the keys that cannot be labels."""
    labels: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name, value in rest.items():
        check_name(name, where)
        scalar = _scalar(value, where, name)
        if scalar is not _NOT_SCALAR:
            labels[name] = scalar
        elif isinstance(value, Mapping | bytes) or not hasattr(value, "__len__"):
            left_out[name] = _json_kind(value)
        else:
            labels[name] = _token_label(name, value, where, n_tokens)
    return labels, left_out


def check_name(name: Any, where: str) -> None:
    """Refuse a name that no label can have."""
    if name in RESERVED:
        raise CorpusError(
            f"{where}: the key {name!r} is a column that every store has already; rename it, for "
            f"example to 'my_{name}'"
        )
    words = name.split() if isinstance(name, str) else []
    if words and words != [name]:
        raise CorpusError(
            f"{where}: the key {name[:100]!r} has white space, at which xarray splits the names of "
            "coordinates, so that the label would be lost; rename it, for example to "
            f"{'_'.join(words)[:100]!r}"
        )
    usable = words and re.fullmatch(r"(?!\.|__|zarr\.json$)[^/`]{1,100}", name)
    if not usable or not name.isprintable():
        raise CorpusError(
            f"{where}: the key {str(name)[:100]!r} cannot name a column; use letters, digits and "
            "'_', at most 100 (no '/', no '`', no '.' or '__' in front)"
        )


_NOT_SCALAR = object()


def _scalar(value: Any, where: str, name: str) -> Any:
    """A label's value as plain Python, or `_NOT_SCALAR`."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return _whole_text(value, where, f"the label {name!r}")
    if value is None or isinstance(value, bool | int | float):
        return value
    if hasattr(value, "isoformat"):  # dates and times, which datasets give
        return value.isoformat()
    return _NOT_SCALAR


def _token_label(name: str, value: Any, where: str, n_tokens: int | None) -> list[Any]:
    if n_tokens is None:
        raise CorpusError(
            f"{where}: the label {name!r} is a list, one value for each token, which needs "
            "'input_ids' in place of 'text' (a text's tokens are not known beforehand). Give one "
            "value for the whole text, or leave the key out"
        )
    if len(value) != n_tokens:
        raise CorpusError(
            f"{where}: the label {name!r} has {len(value)} values and 'input_ids' {n_tokens}; a "
            "list must have one value for each token"
        )
    values = [_scalar(v, where, name) for v in value]
    if any(v is _NOT_SCALAR for v in values):
        raise CorpusError(f"{where}: the label {name!r} is a list of lists or objects; flatten it")
    return values


def _json_kind(value: Any) -> str:
    kinds: list[tuple[Any, str]] = [
        (bool, "true or false"),
        (int | float, "a number"),
        (Mapping, "an object"),
        (list, "a list"),
    ]
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)


# ---------------------------------------------------------------- reading


def read_records(
    source: str | Path,
    *,
    config: str | None = None,
    split: str | None = None,
    column: str | None = None,
) -> Iterator[Record]:
    """Read a text file, JSON lines, standard input or a Hugging Face dataset as records.

    Parameters
    ----------
    source : str or Path
        A text file (one record, as it is, but for a byte order mark); ``.jsonl``, ``.ndjson`` or
        ``.json`` with one object a line; ``-`` for standard input (JSON lines if it begins with
        ``{``, else one text); a dataset's folder; or a dataset's id on the Hugging Face hub.
    config, split : str, optional
        Which part of a dataset.
    column : str, optional
        The key or column that holds the text (or the token ids).

    Returns
    -------
    iterator of Record

    Raises
    ------
    CorpusError
        Nothing is there, or a line cannot be read: it names file and line.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "plays.jsonl")
    >>> _ = path.write_text('{"text": "To be", "play": "Hamlet"}')
    >>> [(record.text, record.labels) for record in read_records(path)]
    [('To be', {'play': 'Hamlet'})]
    """
    name = str(source)
    path = Path(source)
    if name != "-" and (os.path.isdir(name) or not os.path.exists(name)):
        if not os.path.isdir(name) and not _is_dataset_id(name):
            raise _not_found(path)
        return _dataset_records(name, config, split, column)
    for option, value in (("--config", config), ("--split", split)):
        if value is not None:
            raise CorpusError(f"{option} {value!r}: {name} is not a dataset; leave {option} out")
    if name == "-":
        return _stdin_records(column)
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        return _file_lines(path, column)
    return _text_record(_bytes(path), path.name, column)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from error


def _decode(raw: bytes, name: str, at: int = 0) -> str:
    """Bytes that begin at byte `at` of a file as text; a byte order mark is dropped."""
    if at == 0 and raw.startswith(b"\xef\xbb\xbf"):
        raw, at = raw[3:], 3
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{name} is not UTF-8: byte {raw[error.start]:#04x} at offset {at + error.start}. "
            "Convert the file (iconv -f latin1 -t utf-8 OLD > NEW); of a parquet or arrow dataset "
            "give the folder that holds it"
        ) from None


def _text_record(raw: bytes, name: str, column: str | None) -> Iterator[Record]:
    if column is not None:
        raise CorpusError(
            f"--column {column!r}: {name} is plain text, without columns; leave it out"
        )
    return iter([as_record(_decode(raw, name), name)])


def _stdin_records(column: str | None) -> Iterator[Record]:
    name = "standard input"
    raw = sys.stdin.buffer.read()
    if raw.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{":
        return _line_records(raw.splitlines(keepends=True), name, column)
    return _text_record(raw, name, column)


def _file_lines(path: Path, column: str | None) -> Iterator[Record]:
    try:
        with path.open("rb") as lines:
            yield from _line_records(lines, path.name, column)
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from error


def _line_records(lines: Iterable[bytes], name: str, column: str | None) -> Iterator[Record]:
    at = 0
    for number, raw in enumerate(lines, start=1):
        where = f"{name}, line {number}"
        line = _decode(raw, where, at)
        at += len(raw)
        if line.strip():
            yield as_record(_parse_line(line, where), where, column)


def _parse_line(line: str, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(
            f"{where} is not JSON: {error.msg} at column {error.colno}. Each line is one object "
            'such as {"text": "..."}; an array on many lines becomes that with jq -c \'.[]\''
        ) from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond all measure
        raise CorpusError(f"{where} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorpusError(
            f"{where} is {_json_kind(value)}, not an object; write one object a line, such as "
            '{"text": "..."} or {"input_ids": [464, 3290]}'
        )
    return value


def _is_dataset_id(name: str) -> bool:
    """Whether this could be a dataset of the hub: ``imdb`` or ``owner/name``, not a file's path."""
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*|[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        return False
    suffix = Path(name).suffix.lower()
    owner = name.partition("/")[0]
    return suffix not in (".txt", ".json", ".jsonl", ".ndjson", ".md") and (
        owner == name or not Path(owner).exists()
    )


def _not_found(path: Path) -> CorpusError:
    shown = str(path) if len(str(path)) < 200 else f"{str(path)[:200]}..."
    if not os.path.isdir(path.parent):
        return CorpusError(f"no input at {shown}: there is no folder {str(path.parent)[:200]}")
    beside = sorted(os.listdir(path.parent)) if os.access(path.parent, os.R_OK) else []
    near = get_close_matches(path.name[:200], beside, n=1, cutoff=0.5)
    hint = f"did you mean {path.parent / near[0]}?" if near else "check the path."
    return CorpusError(
        f"no input at {shown}: {hint} An input is a text file, a .jsonl file, a dataset's folder "
        "or id such as owner/name, or - for standard input"
    )


# ---------------------------------------------------------------- datasets


def _dataset_records(
    source: str, config: str | None, split: str | None, column: str | None
) -> Iterator[Record]:
    dataset = load_dataset(source, config, split)
    inputs = [column] if column else [c for c in ("input_ids", "text") if c in dataset.features]
    if not inputs or inputs[0] not in dataset.features:
        raise UnknownNameError(
            "column",
            column or "text",
            dataset.features,
            f"Name a text column of {source}: --column",
        )
    return _rows(dataset, source, inputs[0])


def load_dataset(source: str, config: str | None, split: str | None) -> Any:
    """One split of a Hugging Face dataset, by its name or the folder it was saved to."""
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(
            f"{source} is a Hugging Face dataset; to read it: pip install 'actstore[hub]'"
        ) from error
    folder = Path(source)
    saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            loaded = datasets.load_from_disk(source)
        else:
            loaded = datasets.load_dataset(source, config, split=split)
    except Exception as error:  # the library raises a dozen kinds
        message = (str(error).splitlines() or [""])[0]
        raise CorpusError(
            f"cannot load the dataset {source!r}: {message or type(error).__name__}. Check the "
            "name, --config and --split"
            + ("" if folder.is_dir() else "; there is no file or folder of this name either")
        ) from error
    return _one_split(loaded, source, split)


def _one_split(loaded: Any, source: str, split: str | None) -> Any:
    if not isinstance(loaded, dict):  # a single Dataset
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split is None:
        raise CorpusError(f"{source} has the splits {', '.join(loaded)}; choose one with --split")
    if split not in loaded:
        raise UnknownNameError("split", split, loaded, f"Choose one of {source} with --split.")
    return loaded[split]


def _rows(dataset: Any, source: str, column: str) -> Iterator[Record]:
    """The rows of a dataset; columns of pictures, sound and nested objects are left out."""
    from datasets import ClassLabel, Value

    listed = not isinstance(dataset.features[column], Value)
    left_out, classes, kept = {}, {}, []
    for name, feature in dataset.features.items():
        plain = isinstance(feature, ClassLabel | Value)
        if plain or (listed and isinstance(getattr(feature, "feature", None), Value)):
            kept.append(name)
        else:
            left_out[name] = type(feature).__name__
        if isinstance(feature, ClassLabel):
            classes[name] = feature.names
    for number, row in enumerate(dataset.select_columns(kept)):
        for name, names in classes.items():  # class numbers become names; -1 is "not known"
            index = row[name]
            row[name] = None if index is None or index < 0 else names[index]
        record = as_record(row, f"{source}, row {number}", column)
        yield Record(
            record.text,
            record.input_ids,
            record.labels,
            record.where,
            {**left_out, **record.left_out},
            record.padding,
        )
