"""What this machine can do at most: disk, memory, matrix product, copy from a GPU."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .rounds import Row, limit, seconds
from .setting import CORES, Setting, drop_cached

__all__ = ["facts", "machine"]

_PIECE = 2**24
_PACKAGES = ("actstore", "numpy", "torch", "zarr", "dask", "numba")


def facts(device: str) -> dict[str, Any]:
    """Which machine this is, and the versions that were measured."""
    import torch

    cuda = torch.cuda.is_available() and device != "cpu"
    return {
        "processor": _processor(),
        "cores": CORES,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine(setting: Setting) -> Iterator[Row]:
    """Limits of the machine, each measured alone."""
    yield from _disk(setting)
    yield from _memory(setting)
    yield from _product(setting)
    yield from _device(setting)


def _disk(setting: Setting) -> Iterator[Row]:
    from actstore.storage import aligned_buffer

    nbytes = max(_PIECE, int(setting.gigabytes * 1e9 / 4) // _PIECE * _PIECE)
    data = aligned_buffer(_PIECE)
    data[:] = _random(_PIECE)
    file = setting.scratch / "disk.bin"

    def write(flags: int) -> Callable[[], float]:
        def work() -> float:
            file.unlink(missing_ok=True)
            began = time.perf_counter()
            fd = os.open(file, os.O_WRONLY | os.O_CREAT | flags, 0o666)
            try:
                for _ in range(0, nbytes, _PIECE):
                    os.write(fd, data)
                os.fdatasync(fd)
            finally:
                os.close(fd)
            return time.perf_counter() - began

        return work

    def read() -> float:
        began = time.perf_counter()
        fd = os.open(file, os.O_RDONLY)
        try:
            while os.readv(fd, [data]):
                pass
        finally:
            os.close(fd)
        return time.perf_counter() - began

    def cold() -> float:
        drop_cached([file])
        return read()

    size = nbytes / 1e9
    kinds = {"disk write through the page cache, synced": 0}
    if hasattr(os, "O_DIRECT"):
        kinds["disk write past the page cache, synced"] = os.O_DIRECT
    for what, flags in kinds.items():
        try:
            yield limit("machine", what, write(flags), setting.rounds, size, "GB")
        except OSError as error:
            yield Row("machine", what, note=f"not here: {error.strerror}")
    yield limit(
        "machine", "disk read, dropped from the page cache", cold, setting.rounds, size, "GB"
    )
    yield limit("machine", "disk read, from the page cache", read, setting.rounds, size, "GB")
    file.unlink()


def _random(nbytes: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)


def _memory(setting: Setting) -> Iterator[Row]:
    import numpy as np

    parts = [(_random(2**27), np.empty(2**27, np.uint8)) for _ in range(CORES)]
    with ThreadPoolExecutor(CORES) as pool:

        def copy() -> None:
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), parts))

        # Twice: what is read and what is written.
        moved = 2 * 2**27 * CORES / 1e9
        what = "memory copy by all cores, read and written"
        yield limit("machine", what, seconds(copy), setting.rounds, moved, "GB")


def _product(setting: Setting) -> Iterator[Row]:
    import numpy as np

    n = 4 * setting.width
    a, b = np.random.default_rng(0).standard_normal((2, n, n), np.float32)
    out = np.empty((n, n), np.float32)
    work = seconds(lambda: np.matmul(a, b, out=out))
    what = f"float32 matrix product, {n:,} x {n:,}"
    yield limit("machine", what, work, setting.rounds, 2 * n**3 / 1e9, "GFLOP")


def _device(setting: Setting) -> Iterator[Row]:
    import torch

    what = "copy from the GPU to pinned memory"
    if not torch.cuda.is_available():
        yield Row("machine", what, note="no CUDA device here")
        return
    there = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    here = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)

    def copy() -> None:
        here.copy_(there, non_blocking=True)
        torch.cuda.synchronize()

    yield limit("machine", what, seconds(copy), setting.rounds, 2**28 / 1e9, "GB")
