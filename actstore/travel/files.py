"""One file with a selection: safetensors, Parquet or NetCDF, written piece by piece.

A file is written beside its name and takes it only when it is whole, so that what was cut short
never looks finished.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError, WriteError
from ..schema import Categorical, layer_name
from ..storage import LocalStorage
from .chosen import Chosen, ChosenStage

__all__ = ["FILES", "TENSOR_TYPES", "write_file"]

ROW_GROUP_NBYTES = 2**26
_MOST_HEADER = 100_000_000  # what readers of safetensors take

Step = Callable[[int], None]
"""Told of bytes of activations written."""


def write_file(chosen: Chosen, out: Path, format: str, step: Step) -> None:
    """Write a selection to one file.

    Raises
    ------
    UsageError
        There is something of that name.
    WriteError
        The disk is too small, or fails.
    """
    if not out.absolute().parent.is_dir():
        raise UsageError(f"{out}: there is no folder {out.absolute().parent}; make it first")
    free = LocalStorage(out.absolute().parent).free_bytes()
    if chosen.nbytes > free:
        raise WriteError(
            f"the export needs {chosen.nbytes / 1e9:,.2f} GB and {free / 1e9:,.2f} GB are free at "
            f"{out.absolute().parent}: free some, choose another disk, or fewer stages, layers or "
            "tokens"
        )
    with _whole(out) as partial:
        FILES[format](chosen, partial, step)


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A name to write under, which becomes the file's own at the end or goes."""
    _refuse_existing(out)
    for left in out.parent.glob(f".{escape(out.name)}.*.partial"):
        if not _alive(left.suffixes[-2]):
            left.unlink(missing_ok=True)  # by an export that was killed
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        _refuse_existing(out)
        os.rename(partial, out)
        LocalStorage(out.parent).sync_folder("")
    except OSError as error:
        raise WriteError(
            f"writing {out} failed: {error.strerror or error}. Nothing of it is left: make room "
            "or mend the disk, then export again"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise UsageError(f"{out} exists: remove it, or choose another name")


def _alive(suffix: str) -> bool:
    try:
        os.kill(int(suffix.lstrip(".")), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True


# -- safetensors -----------------------------------------------------------------------------

TENSOR_TYPES = {
    "bool": "BOOL",
    "bfloat16": "BF16",
    **{f"float{n}": f"F{n}" for n in (16, 32, 64)},
    **{f"int{n}": f"I{n}" for n in (8, 16, 32, 64)},
    **{f"uint{n}": f"U{n}" for n in (8, 16, 32, 64)},
}
"""Element types, and what safetensors calls them."""


def _safetensors(chosen: Chosen, partial: Path, step: Step) -> None:
    """A tensor ``STAGE.LAYER`` (token, neuron) for each, and ``token.COLUMN`` for each column.

    Text columns are int32 codes into lists of texts in the metadata.
    """
    columns = {f"token.{name}": chosen.column(name) for name in chosen.names}
    texts = {k: c.values.tolist() for k, c in columns.items() if isinstance(c, Categorical)}
    plain = {k: c.codes if isinstance(c, Categorical) else c for k, c in columns.items()}
    facts = json.dumps({**chosen.facts(), "texts": texts}, ensure_ascii=False)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "actstore": facts}}
    end = 0
    for stage in chosen.stages:
        for layer in stage.layers:
            nbytes = len(stage.tokens) * stage.width * stage.itemsize
            shape = [len(stage.tokens), stage.width]
            header[f"{stage.name}.{layer}"] = _entry(stage.dtype, shape, end, end + nbytes)
            end += nbytes
    for name, values in plain.items():
        header[name] = _entry(str(values.dtype), [len(values)], end, end + values.nbytes)
        end += values.nbytes
    encoded = json.dumps(header, ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > _MOST_HEADER:
        raise UsageError(
            f"texts of labels take {len(encoded) / 1e6:,.0f} MB, and a safetensors header holds "
            "100: export fewer tokens, or to parquet"
        )
    with open(partial, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for stage in chosen.stages:
            for layer in stage.layers:
                for _, values in _pieces(stage, layer):
                    if stage.dtype == "bfloat16":
                        values = (values.view(np.uint32) >> 16).astype(np.uint16)
                    file.write(np.ascontiguousarray(values).data)
                    step(values.nbytes)
        for values in plain.values():
            file.write(np.ascontiguousarray(values).data)


def _entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": TENSOR_TYPES[dtype], "shape": shape, "data_offsets": [start, stop]}


def _pieces(stage: ChosenStage, layer: int) -> Iterator[tuple[slice, np.ndarray]]:
    n = len(stage.tokens)
    for start in range(0, n, stage.step):
        stop = min(n, start + stage.step)
        yield slice(start, stop), stage.read(layer, start, stop)


# -- Parquet ---------------------------------------------------------------------------------


def _parquet(chosen: Chosen, partial: Path, step: Step) -> None:
    """A row for each token: its columns, and of each stage and layer a list ``STAGE.LAYER``."""
    pa, pq = _arrow()
    columns = {name: chosen.column(name) for name in chosen.names}
    fields = [pa.field(name, _arrow_type(pa, c)) for name, c in columns.items()]
    wide = []
    for stage in chosen.stages:
        item = pa.float16() if stage.dtype == "float16" else pa.float32()
        for layer in stage.layers:
            wide.append(f"{stage.name}.{layer}")
            fields.append(pa.field(wide[-1], pa.list_(item, stage.width)))
    schema = pa.schema(fields, {"actstore": json.dumps(chosen.facts(), ensure_ascii=False)})
    rows = max(1, ROW_GROUP_NBYTES // sum(4 * len(s.layers) * s.width for s in chosen.stages))
    options: dict[str, Any] = {
        "compression": "zstd",
        "use_dictionary": list(columns),
        "use_byte_stream_split": [f"{name}.list.element" for name in wide],
    }
    with pq.ParquetWriter(partial, schema, **options) as writer:
        for start in range(0, len(chosen.tokens), rows):
            stop = min(len(chosen.tokens), start + rows)
            arrays = [_arrow_column(pa, c[start:stop]) for c in columns.values()]
            for stage in chosen.stages:
                for layer in stage.layers:
                    values = stage.read(layer, start, stop)
                    flat = pa.array(values.reshape(-1))
                    arrays.append(pa.FixedSizeListArray.from_arrays(flat, stage.width))
                    step((stop - start) * stage.width * stage.itemsize)
            writer.write_table(pa.table(arrays, schema=schema), row_group_size=stop - start)


def _arrow() -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UsageError("Parquet needs pyarrow: pip install 'actstore[hub]'") from None
    return pa, pq


def _arrow_type(pa: Any, column: np.ndarray | Categorical) -> Any:
    if isinstance(column, Categorical):
        return pa.string()
    return pa.from_numpy_dtype(column.dtype)


def _arrow_column(pa: Any, column: np.ndarray | Categorical) -> Any:
    if not isinstance(column, Categorical):
        return pa.array(column)
    codes = pa.array(column.codes)
    return pa.DictionaryArray.from_arrays(codes, pa.array(column.values, pa.string())).cast(
        pa.string()
    )


# -- NetCDF ----------------------------------------------------------------------------------


def _netcdf(chosen: Chosen, partial: Path, step: Step) -> None:
    """A group for each stage, as in the store, its labels as text."""
    import h5netcdf

    columns = {name: chosen.column(name) for name in chosen.names}
    with _Disk(partial) as disk, h5netcdf.File(disk, "w") as file:
        file.attrs["actstore"] = json.dumps(chosen.facts(), ensure_ascii=False)
        for stage in chosen.stages:
            group = file.create_group(stage.name)
            group.dimensions = {
                "layer": len(stage.layers),
                "token": len(stage.tokens),
                "neuron": stage.width,
            }
            _put(group, "layer", "layer", np.array(stage.layers))
            _put(group, "neuron", "neuron", np.arange(stage.width))
            if stage.name == "hidden":
                names = [layer_name(stage.name, n) for n in stage.layers]
                _put(group, "layer_name", "layer", np.array(names, object))
            if stage.source.heads is not None:
                _put(group, "head", "neuron", stage.source.heads)
            for name, column in columns.items():
                values = column.decode() if isinstance(column, Categorical) else column
                _put(group, name, "token", values)
            squeezed = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
            plain = stage.dtype == "float32" and stage.keep_bits is None
            rows = min(len(stage.tokens), max(1, 2**20 // (4 * stage.width)))
            activation = group.create_variable(
                "activation",
                ("layer", "token", "neuron"),
                np.float32,  # NetCDF has no shorter floats
                chunks=(1, rows, stage.width),
                **({} if plain else squeezed),
            )
            others = [n for n in group.variables if n not in ("layer", "neuron", "activation")]
            activation.attrs["long_name"] = f"{stage.name} activation"
            activation.attrs["units"] = "1"
            activation.attrs["source_dtype"] = stage.dtype
            activation.attrs["coordinates"] = " ".join(others)
            for i, layer in enumerate(stage.layers):
                for where, values in _pieces(stage, layer):
                    activation[i, where, :] = values.astype(np.float32, copy=False)
                    disk.check()
                    step(values.nbytes)


class _Disk:
    """A file for HDF5, which does not survive a write that fails: the failure is kept for later."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115 - closed by who writes
        self._error: OSError | None = None

    def __enter__(self) -> _Disk:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._file.close()
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise what went wrong since."""
        if self._error is not None:
            raise self._error

    def write(self, data: Any) -> int:
        view = memoryview(data)
        while view.nbytes and self._error is None:
            try:
                view = view[self._file.write(view) :]
            except OSError as error:
                self._error = error
        return memoryview(data).nbytes

    def read(self, size: int = -1) -> bytes:  # by which h5py knows a file
        return self._file.read(size) or b""

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer) or 0

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def truncate(self, size: int | None = None) -> int:
        try:
            return self._file.truncate(size)
        except OSError as error:
            self._error = self._error or error
            return size or 0

    def flush(self) -> None:
        """Nothing is held back."""


def _put(group: Any, name: str, dim: str, values: np.ndarray) -> None:
    """A column as a variable; truth values as xarray writes them."""
    import h5py

    truth = values.dtype.kind == "b"
    kind: Any = np.int8 if truth else values.dtype
    if values.dtype.kind == "O":
        kind, values = h5py.string_dtype(), np.array([str(v) for v in values], object)
    variable = group.create_variable(name, (dim,), kind)
    if truth:
        variable.attrs["dtype"] = "bool"
    variable[...] = values.astype(kind) if truth else values


FILES: dict[str, Callable[[Chosen, Path, Step], None]] = {
    "safetensors": _safetensors,
    "parquet": _parquet,
    "netcdf": _netcdf,
}
"""Formats that are one file."""
