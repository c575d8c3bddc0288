"""What the groups of measurements share: where they write, how much, how often."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

__all__ = ["CORES", "Setting", "drop_cached", "fresh"]

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Setting:
    """Sizes of everything.

    Attributes
    ----------
    scratch : Path
        A folder on the disk that is measured.
    rounds : int
    device : str
        Where the model runs.
    tokens : int
        Of one dump.
    layers, width : int
        Of the model, and of the store that is read.
    gigabytes : float
        What the writer alone writes.
    store_gigabytes : float
        The store that is read.
    shards : int
        Of the largest store that is opened.
    growth : int
        Tokens of the smallest of the stores that grow.
    batches : int
        Tokens that training batches are drawn from.
    """

    scratch: Path
    rounds: int = 5
    device: str = "auto"
    tokens: int = 8192
    layers: int = 12
    width: int = 768
    gigabytes: float = 4.0
    store_gigabytes: float = 8.5
    shards: int = 100_000
    growth: int = 8192
    batches: int = 2**19

    @cached_property
    def store(self) -> Path:
        """A float32 store of random values with sketches, made when it is first asked for."""
        from .stores import make_store

        path = self.scratch / "store.zarr"
        make_store(path, self.store_gigabytes * 1e9, self.layers, 4 * self.width)
        return path


def fresh(folder: Path) -> Path:
    """An empty folder, and nothing of before still on its way to the disk."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.sync()
    return folder


def drop_cached(files: list[Path]) -> None:
    """Have the system forget what it holds of files, so that they come from the disk."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fdatasync(fd)  # what is not written yet is not forgotten
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
