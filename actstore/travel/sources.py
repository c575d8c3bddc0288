"""Activations that other tools wrote, as arrays by name, in pieces that are opened one by one.

A piece holds some tokens: a file of a batch, a row group, some rows of a dataset, or everything.
Opening one reads no activations; its arrays are read as they are sliced.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from crc32c import crc32c

from ..errors import UsageError
from ..records import load_dataset
from .files import TENSOR_TYPES

__all__ = ["Array", "Piece", "Pieces", "find_pieces"]

ENDINGS = (".safetensors", ".parquet", ".nc", ".npy", ".npz", ".pt", ".pth")
ROWS_NBYTES = 2**26
"""About what the rows of a dataset take that make a piece."""


class Array(Protocol):
    """An array that is read as it is sliced.

    Attributes
    ----------
    shape : tuple of int
    dtype : str
        As numpy names it; also "bfloat16", and "text".
    lengths : ndarray of int or None
        Of an array (token, ...) whose rows are sequences end to end, their tokens.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def lengths(self) -> np.ndarray | None: ...
    def read(self, *where: slice) -> np.ndarray:
        """Some of the values, one slice for each of the first dimensions; bfloat16 as float32."""


Piece = Mapping[str, Array]


@dataclass
class Pieces:
    """Where activations come from.

    Attributes
    ----------
    format : str
    openers : list of callable
        Each opens a piece; all pieces have the same names.
    files : list of path
        What is read, where it is files.
    fingerprint : str
        Of what is no files.
    facts : dict
        What an export of actstore's says of itself.
    bare : bool
        Whether the arrays have no names but those of their files.
    """

    format: str
    openers: list[Callable[[], Piece]]
    files: list[Path] = field(default_factory=list)
    fingerprint: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    bare: bool = False

    def digest(self) -> str:
        """Of all that is read, so that something else of the same shape is told apart."""
        if not self.files:
            return self.fingerprint
        value = 0
        for path in self.files:
            with open(path, "rb") as file:
                while data := file.read(2**24):
                    value = crc32c(data, value)
        return f"crc32c {value:08x} of {sum(p.stat().st_size for p in self.files)} bytes"


def find_pieces(source: Any, *, config: str | None = None, split: str | None = None) -> Pieces:
    """What a file, a folder or a dataset holds.

    Raises
    ------
    UsageError
        Nothing there that can be read, or a file that would run code.
    """
    if hasattr(source, "features") and hasattr(source, "with_format"):
        return _dataset(source)
    path = Path(source)
    if path.is_file():
        return _of_files([path], path.suffix)
    if path.is_dir() and not _is_dataset(path):
        if (path / "zarr.json").exists():
            raise UsageError(f"{source} is a Zarr store: `actstore export` takes parts of stores")
        files = [p for p in path.iterdir() if p.suffix in ENDINGS and p.is_file()]
        found = sorted({p.suffix for p in files})
        if not found:
            raise UsageError(f"{source} has no file of the kinds {', '.join(ENDINGS)}")
        if len(found) > 1:
            raise UsageError(f"{source} has files of several kinds ({', '.join(found)}): give one")
        return _of_files(sorted(files, key=_natural), found[0])
    if path.suffix in ENDINGS:
        raise UsageError(f"{source} does not exist")
    return _dataset(load_dataset(str(source), config, split or "train"))


def _is_dataset(path: Path) -> bool:
    return any((path / n).is_file() for n in ("state.json", "dataset_dict.json"))


def _natural(path: Path) -> list[Any]:
    """batch_2 before batch_10."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(p), "") if p.isdigit() else (-1, p) for p in parts]


def _of_files(files: list[Path], suffix: str) -> Pieces:
    if suffix not in ENDINGS:
        raise UsageError(f"{files[0]}: {suffix or 'no ending'} is not of {', '.join(ENDINGS)}")
    form = {".pt": "torch", ".pth": "torch", ".nc": "netcdf"}.get(suffix, suffix[1:])
    if form == "parquet":
        return _parquet(files)
    opener = {
        "safetensors": _open_safetensors,
        "npy": _open_npy,
        "npz": _open_npz,
        "torch": _open_torch,
        "netcdf": _open_netcdf,
    }[form]
    first = opener(files[0])
    made = Pieces(form, [partial(opener, f) for f in files], files, facts=first.facts)
    made.bare = list(first) == [""]
    if len(files) > 1 and not made.bare:
        names = [set(opener(f)) for f in files]
        if not set.intersection(*names):  # parts of one piece, as of a model's files
            made.openers = [partial(_together, opener, files)]
        elif any(n != names[0] for n in names):
            other = next(f for f, n in zip(files, names, strict=True) if n != names[0])
            odd = sorted(names[0] ^ set(opener(other)))
            raise UsageError(
                f"{other} does not have the same arrays as {files[0]} (they differ in "
                f"{', '.join(odd[:5])}): files of batches must"
            )
    return made


class _Opened(dict[str, Array]):
    """A piece, with what its file says of itself."""

    facts: dict[str, Any]

    def __init__(self, arrays: Mapping[str, Array], facts: Any = None) -> None:
        super().__init__(arrays)
        self.facts = facts if isinstance(facts, dict) else {}


def _together(opener: Callable[[Path], _Opened], files: Sequence[Path]) -> Piece:
    return {name: array for file in files for name, array in opener(file).items()}


def _no_json(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def _facts(text: Any) -> dict[str, Any]:
    try:
        facts = json.loads(text, parse_constant=_no_json)
    except (TypeError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


# -- arrays ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sliced:
    """An array of a library's that is sliced."""

    array: Any
    shape: tuple[int, ...]
    dtype: str
    lengths: None = None

    def read(self, *where: slice) -> np.ndarray:
        values = self.array[where or ...]
        if hasattr(values, "numpy"):  # torch's
            values = (values.float() if self.dtype == "bfloat16" else values).numpy()
        return np.asarray(values)


def _numpy(array: np.ndarray) -> _Sliced:
    if array.dtype.kind == "O":
        array = array.astype(str)
    return _Sliced(array, array.shape, "text" if array.dtype.kind in "US" else str(array.dtype))


def _texts(codes: Array, texts: Sequence[str]) -> Array:
    """Codes and their texts, as texts; -1 stands for none."""
    own, table = codes.read(), np.array([*map(str, texts), ""], dtype=object)
    if own.dtype.kind not in "iu" or (own < -1).any() or (own >= len(texts)).any():
        raise UsageError(f"a column of codes into {len(texts):,} texts holds what is no code")
    return _Sliced(table[own], codes.shape, "text")


# -- files -----------------------------------------------------------------------------------


def _open_safetensors(path: Path) -> _Opened:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is not a safetensors file: {error}") from None
    facts = _facts((file.metadata() or {}).get("actstore"))
    texts = facts.get("texts")
    arrays: dict[str, Array] = {}
    for name in file.keys():  # noqa: SIM118 - not a mapping
        part = file.get_slice(name)
        shape = tuple(part.get_shape())
        if not shape:
            continue
        kind = _SAFE.get(part.get_dtype(), part.get_dtype())
        array: Array = _Sliced(part, shape, kind)
        if isinstance(texts, dict) and isinstance(texts.get(name), list):
            array = _texts(array, texts[name])
        arrays[name] = array
    return _Opened(arrays, facts)


_SAFE = {theirs: ours for ours, theirs in TENSOR_TYPES.items()}


def _open_npy(path: Path) -> _Opened:
    try:
        return _Opened({"": _numpy(np.load(path, mmap_mode="r", allow_pickle=False))})
    except ValueError as error:
        raise UsageError(f"{path} is not read: {error}") from None


def _open_npz(path: Path) -> _Opened:
    """Members are mapped where they are stored as they are; compressed ones are read whole."""
    arrays: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                with archive.open(member) as file:
                    version = np.lib.format.read_magic(file)
                    read = {
                        (1, 0): np.lib.format.read_array_header_1_0,
                        (2, 0): np.lib.format.read_array_header_2_0,
                    }[version]
                    shape, fortran, dtype = read(file)
                    header = file.tell()
                name = member.filename.removesuffix(".npy")
                if dtype.hasobject:
                    raise ValueError(f"{name} holds Python objects, which are code")
                plain = member.compress_type == zipfile.ZIP_STORED
                if plain and dtype.itemsize and 0 not in shape:
                    order = "F" if fortran else "C"
                    at = _data_offset(path, member) + header
                    mapped: Any = np.memmap
                    arrays[name] = _numpy(mapped(path, dtype, "r", at, shape, order))
                else:
                    with np.load(path, allow_pickle=False) as whole:
                        arrays[name] = _numpy(whole[name])
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not read: {error}") from None
    return _Opened({name: array for name, array in arrays.items() if array.shape})


def _data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a member's data begin: behind a header of its own, with two lengths at its end."""
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        header = file.read(30)
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return member.header_offset + 30 + name + extra


def _open_torch(path: Path) -> _Opened:
    """Tensors alone; a file that would run code is refused before it does."""
    import torch

    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # of an older form, which cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise UsageError(f"{path} is not a file of torch.save with tensors alone") from None
        raise UsageError(
            f"{path} holds {code[1]} beside tensors, numbers and texts: reading it would run code "
            "of its author's, so it was not read. Save a dict of tensors"
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise UsageError(f"{path} is not a file of torch.save: {error}") from None
    return _Opened(dict(_tensors(loaded, "")))


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Array]]:
    """Tensors and lists of plain values in dicts and lists, by dotted names."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.ndim:
            yield name, _Sliced(value.detach(), tuple(value.shape), str(value.dtype).split(".")[1])
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        if value and all(isinstance(v, (str, int, float, bool)) for v in value):
            yield name, _numpy(np.array(value))
        else:
            for i, inner in enumerate(value):
                yield from _tensors(inner, f"{name}.{i}" if name else str(i))


def _open_netcdf(path: Path) -> _Opened:
    """Each group's activation by layers, as ``STAGE.LAYER``, and the columns along tokens."""
    import h5netcdf

    try:
        file = h5netcdf.File(path, "r")
    except OSError as error:
        raise UsageError(f"{path} is not a NetCDF file that can be read: {error}") from None
    arrays: dict[str, Array] = {}
    for stage, group in file.groups.items():
        if "activation" not in group.variables:
            continue
        activation = group.variables["activation"]
        if activation.dimensions != ("layer", "token", "neuron"):
            raise UsageError(
                f"{path}: {stage}/activation has dimensions {activation.dimensions}, and they must "
                "be layer, token, neuron"
            )
        kind = str(activation.attrs.get("source_dtype", activation.dtype))
        for i, layer in enumerate(group.variables["layer"][...].tolist()):
            own = _Layer(activation, i, activation.shape[1:], kind, (file, group))
            arrays[f"{stage}.{layer}"] = own
        for name, variable in group.variables.items():
            if variable.dimensions == ("token",) and f"token.{name}" not in arrays:
                arrays[f"token.{name}"] = _column(variable)
    if not arrays:
        raise UsageError(f"{path} has no group with a variable 'activation'")
    return _Opened(arrays, _facts(file.attrs.get("actstore")))


@dataclass(frozen=True)
class _Layer:
    """One layer of a variable, which lives as long as the file and group that it is in."""

    array: Any
    layer: int
    shape: tuple[int, ...]
    dtype: str
    within: tuple[Any, ...]
    lengths: None = None

    def read(self, *where: slice) -> np.ndarray:
        return np.asarray(self.array[(self.layer, *where)])


def _column(variable: Any) -> _Sliced:
    values = np.asarray(variable[...])
    if values.dtype.kind == "O":
        values = np.array([v.decode() if isinstance(v, bytes) else v for v in values], object)
    elif variable.attrs.get("dtype") == "bool":
        values = values.astype(bool)
    return _numpy(values)


# -- tables ----------------------------------------------------------------------------------


class _Rows:
    """A column of some rows of a table, read when its values are asked for.

    Rows of floats, as many each, are vectors: (row, neuron). Rows of vectors are sequences, put
    end to end: (token, neuron) with `lengths`; so are rows of other lists: (token,).
    """

    def __init__(self, load: Callable[[], Any], rows: int, kind: Any) -> None:
        self._load, self._rows, self._kind = load, rows, _stored(kind)

    @cached_property
    def _flat(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Values, and the tokens of each row where a row has several."""
        array = self._load()
        if not _depth(self._kind):
            return _values(array), None
        per, inner = _per_row(array), array.flatten()
        if _depth(self._kind) == 2:
            widths = np.unique(_per_row(inner))
            if len(widths) != 1:
                raise UsageError(f"rows hold vectors of {widths.tolist()[:5]} numbers: give one")
            return _values(inner.flatten()).reshape(-1, int(widths[0])), per
        if self.dtype.startswith("float") and len(np.unique(per)) == 1:
            return _values(inner).reshape(len(per), -1), None
        return _values(inner), per

    @property
    def dtype(self) -> str:
        kind = _element(self._kind)
        return "text" if _is_text(kind) else str(np.dtype(kind.to_pandas_dtype()))

    @property
    def _vector(self) -> bool:
        """Whether it is known without reading that rows are vectors."""
        fixed = str(self._kind).startswith("fixed_size_list")
        return fixed and _depth(self._kind) == 1 and self.dtype.startswith("float")

    @property
    def shape(self) -> tuple[int, ...]:
        if self._vector:
            return self._rows, self._kind.list_size
        return self._flat[0].shape if _depth(self._kind) else (self._rows,)

    @property
    def lengths(self) -> np.ndarray | None:
        return None if self._vector or not _depth(self._kind) else self._flat[1]

    def read(self, *where: slice) -> np.ndarray:
        return self._flat[0][where or ...]


def _stored(kind: Any) -> Any:
    """The type that an extension's values are stored as; of coded texts that of texts."""
    return kind.value_type if _coded(kind) else getattr(kind, "storage_type", kind)


def _coded(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_dictionary(kind))


def _one(column: Any) -> Any:
    """A column as one array of plain type."""
    import pyarrow as pa

    chunks = [getattr(c, "storage", c) for c in column.chunks]
    chunks = [c.dictionary_decode() if _coded(c.type) else c for c in chunks]
    return pa.concat_arrays(chunks) if chunks else pa.array([], _stored(column.type))


def _element(kind: Any) -> Any:
    return _element(kind.value_type) if _depth(kind) else kind


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _values(array: Any) -> np.ndarray:
    if _is_text(array.type):
        return np.array(["" if v is None else v for v in array.to_pylist()], object)
    return array.to_numpy(zero_copy_only=False)


def _depth(kind: Any) -> int:
    """How many lists are in one another."""
    import pyarrow as pa

    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return 1 + _depth(kind.value_type) if any(f(kind) for f in lists) else 0


def _per_row(array: Any) -> np.ndarray:
    import pyarrow as pa

    if array.null_count:
        raise UsageError(f"{array.null_count:,} rows hold nothing where others hold lists")
    if pa.types.is_fixed_size_list(array.type):
        return np.full(len(array), array.type.list_size)
    return np.diff(array.offsets.to_numpy(zero_copy_only=False))


def _usable(kind: Any) -> bool:
    """Whether a column is of numbers, truth values or texts, or lists of them."""
    import pyarrow as pa

    kind = _stored(kind)
    element = _element(kind)
    tests = (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean, _is_text)
    return _depth(kind) <= 2 and any(test(element) for test in tests)


def _parquet(files: list[Path]) -> Pieces:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UsageError("Parquet needs pyarrow: pip install 'actstore[hub]'") from None
    openers: list[Callable[[], Piece]] = []
    facts: dict[str, Any] = {}
    for path in files:
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise UsageError(f"{path} is not a Parquet file: {error}") from None
        facts = facts or _facts((file.schema_arrow.metadata or {}).get(b"actstore"))
        openers += [partial(_row_group, path, i) for i in range(file.num_row_groups)]
    return Pieces("parquet", openers, files, facts=facts)


def _row_group(path: Path, number: int) -> Piece:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    rows = file.metadata.row_group(number).num_rows
    return {
        column.name: _Rows(partial(_group_column, file, number, column.name), rows, column.type)
        for column in file.schema_arrow
        if _usable(column.type)
    }


def _group_column(file: Any, number: int, name: str) -> Any:
    return _one(file.read_row_group(number, columns=[name]).column(0))


def _dataset(dataset: Any) -> Pieces:
    """Rows of a Hugging Face dataset, about as many at a time as memory should take."""
    if not hasattr(dataset, "num_rows") or isinstance(dataset.num_rows, dict):
        raise UsageError("of a dataset with splits, or one that streams, give one split: data[...]")
    table = dataset.with_format("arrow")
    schema = table[:1].schema
    size = max(1, sum(c.nbytes for c in table[:16].columns) // min(16, max(1, dataset.num_rows)))
    rows = max(1, ROWS_NBYTES // size)

    def opened(start: int) -> Piece:
        count = min(rows, dataset.num_rows - start)
        piece: dict[str, Array] = {}
        for column in schema:
            if _usable(column.type):
                own: Array = _Rows(partial(load, column.name, start, count), count, column.type)
                classes = getattr(dataset.features[column.name], "names", None)
                piece[column.name] = own if classes is None else _texts(own, classes)
        return piece

    def load(name: str, start: int, count: int) -> Any:
        return _one(table.select_columns([name])[start : start + count].column(0))

    openers: list[Callable[[], Piece]] = [
        partial(opened, start) for start in range(0, dataset.num_rows, rows)
    ]
    return Pieces("dataset", openers, fingerprint=str(dataset._fingerprint))
