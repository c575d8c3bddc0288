"""A selection of a store in another format, or as a smaller store: `actstore export`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..concatenation import open_any
from ..errors import UnknownNameError, UsageError
from ..places import is_url
from ..store import Store
from .chosen import choose
from .files import FILES, write_file
from .smaller import write_store

__all__ = ["FORMATS", "Exported", "ExportedStage", "export"]

FORMATS = {
    "safetensors": ".safetensors",
    "parquet": ".parquet",
    "netcdf": ".nc",
    "zarr": ".zarr",
}
"""Formats and the endings by which they are known."""


@dataclass(frozen=True)
class ExportedStage:
    """How a stage was written.

    Attributes
    ----------
    layers : list of int
    width : int
    dtype : str
    max_error, max_relative_error, rms_error : float
        Of the values written against those in the store; 0 where they stay as they are.
    """

    layers: list[int]
    width: int
    dtype: str
    max_error: float
    max_relative_error: float
    rms_error: float


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes
    ----------
    path, format : str
    tokens : int
    nbytes : int
        On disk; of a store at a URL those of its activations before compression.
    stages : dict of str to ExportedStage
    """

    path: str
    format: str
    tokens: int
    nbytes: int
    stages: dict[str, ExportedStage]

    def as_dict(self) -> dict[str, Any]:
        """JSON only."""
        return asdict(self)


def export(
    store: Store | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str | None = None,
    stages: Any = None,
    layers: Any = None,
    tokens: str | np.ndarray | None = None,
    dtype: str | None = None,
    keep_bits: int | None = None,
    buffer: int | str = "1GiB",
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write a selection of a store to another format, or to a smaller store.

    Memory stays bounded however large it is. A file takes its name when it is whole; a store that
    was cut short is unfinished, and the same call goes on with it.

    Parameters
    ----------
    store : Store or path
        Also several as one, from `actstore.concat`.
    out : path
        What to write. A file must not exist yet; a store may be what the same call has begun.
    format : {"safetensors", "parquet", "netcdf", "zarr"}, optional
        Default by the ending: .safetensors, .parquet, .nc, .zarr.

        - safetensors: a tensor ``STAGE.LAYER`` (token, neuron) for each stage and layer, and a
          tensor ``token.COLUMN`` for each column of the tokens. Columns of text are codes; their
          texts, and the origin, are JSON in the metadata under ``actstore``.
        - parquet: a row for each token, with its columns (texts as texts) and for each stage and
          layer a list ``STAGE.LAYER`` of fixed length, as Hugging Face datasets, pandas, polars
          and duckdb read it.
        - netcdf: a group for each stage with ``activation`` (layer, token, neuron), float32, and
          the columns as coordinates: ``xarray.open_dataset(out, group=STAGE)``.
        - zarr: a store of actstore's with everything: sketches, predictions, inputs and texts of
          the sequences that have a chosen token, and whose it is a part of.
    stages : str or sequence of str, optional
        Stages, as "mlp_pre,mlp_post"; default all.
    layers : str, int or sequence of int, optional
        Layers, as "0,3-5" or "-1"; default all.
    tokens : str or ndarray of bool, optional
        Tokens, as "position > 0 and condition == 'terminal'", or a mask; default all.
    dtype : {"float32", "float16", "bfloat16"}, optional
        Element type; default each stage's own.
    keep_bits : int, optional
        Round values to so many bits of mantissa (1 to 23), which makes them compress well in
        parquet, netcdf, and in stores up to 7 bits: those are stored as bfloat16, as exactly.
    buffer : int or str
        Memory for the blocks of a store being written.
    progress : callable, optional
        Called with bytes of activations written, and in all.

    Returns
    -------
    Exported
        With the greatest absolute and relative errors and the RMS error of each stage.

    Raises
    ------
    UsageError
        Unknown names, a selection without tokens, or something of the name `out`.
    HalfOverflowError
        A value that float16 cannot hold.
    WriteError
        The disk is too small, or fails; nothing is left that looks finished.

    Examples
    --------
    >>> import numpy as np, tempfile, actstore
    >>> folder = tempfile.TemporaryDirectory()
    >>> corpus = actstore.build_corpus([[1, 2, 3]])
    >>> plan = actstore.Plan.build(corpus, [actstore.StageSpec("mlp_post", (0, 1), 16)])
    >>> with actstore.Writer(f"{folder.name}/run.zarr", plan) as writer:
    ...     for layer in (0, 1):
    ...         writer.put("mlp_post", layer, 0, np.full((3, 16), 1.2, "float32"))
    >>> out = f"{folder.name}/run.parquet"
    >>> made = export(f"{folder.name}/run.zarr", out, tokens="position > 0", keep_bits=3)
    >>> made.tokens, round(made.stages["mlp_post"].max_error, 3)
    (2, 0.05)
    >>> import pandas as pd
    >>> pd.read_parquet(out)["mlp_post.1"][0][:2].tolist()
    [1.25, 1.25]
    >>> folder.cleanup()
    """
    if not isinstance(store, Store):
        store = open_any(store)
    form = format or _by_ending(out)
    if form not in FORMATS:
        raise UnknownNameError("format", form, FORMATS)
    chosen = choose(store, stages, layers, tokens, dtype, keep_bits)
    total, done = sum(s.nbytes for s in chosen.stages), 0

    def step(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    if form in FILES:
        if is_url(out):
            raise UsageError(f"{os.fspath(out)}: {form} is written to a path; zarr also to a URL")
        write_file(chosen, Path(out), form, step)
    else:
        write_store(chosen, out, buffer, step)
    return Exported(
        os.fspath(out),
        form,
        len(chosen.tokens),
        _size(out, sum(s.nbytes for s in chosen.stages)),
        {
            s.name: ExportedStage(
                s.layers,
                s.width,
                s.dtype,
                s.fidelity.largest,
                s.fidelity.largest_relative,
                s.fidelity.rms,
            )
            for s in chosen.stages
        },
    )


def _by_ending(out: str | os.PathLike[str]) -> str:
    for form, ending in FORMATS.items():
        if os.fspath(out).rstrip("/").endswith(ending):
            return form
    raise UsageError(
        f"{os.fspath(out)}: its ending names no format ({', '.join(FORMATS.values())}); give one "
        f"of them, or --format {', '.join(FORMATS)}"
    )


def _size(out: str | os.PathLike[str], otherwise: int) -> int:
    if is_url(out):
        return otherwise
    path = Path(out)
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
