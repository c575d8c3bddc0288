"""Dumps of the command line as processes that can be killed, starved, stopped and run again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from helpers import tree_digests

TOKENS, BLOCKS = 5000, 20  # of 256 tokens, the last one short
STAGES = {"hidden": 128, "mlp_post": 512}
LAYERS, WIDTH = 3, sum(STAGES.values())
JOB = [
    *("--stages", "hidden,mlp_post", "--layers", "0,3,-1"),
    *("--max-tokens", str(TOKENS), "--buffer", "4MiB"),
]
COMMAND = [sys.executable, "-m", "actstore_cli"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ENVIRONMENT.pop("RANK", None)
ENVIRONMENT.pop("WORLD_SIZE", None)


class Run:
    """One run of the command line."""

    def __init__(self, warm: Warm, pid: int, out: Path) -> None:
        self._warm, self.pid, self._out = warm, pid, out

    def wait(self) -> int:
        """Exit status, negative for a signal."""
        return self._warm.ask({"wait": self.pid})["status"]

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    @property
    def running(self) -> bool:
        with open(f"/proc/{self.pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"

    @property
    def stdout(self) -> str:
        return Path(f"{self._out}.out").read_text()

    @property
    def stderr(self) -> str:
        return Path(f"{self._out}.err").read_text()

    @property
    def operations(self) -> str:
        """What the run has done to files, a letter each."""
        return Path(f"{self._out}.ops").read_text()


class Warm:
    """The warm process that runs are forked from; see warm.py."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self._folder, self._count = folder, 0
        script = Path(__file__).with_name("warm.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=ENVIRONMENT | environment,
            text=True,
            bufsize=1,
        )
        assert self._answer() == {"ready": True}

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def start(self, *argv: object, **request: Any) -> Run:
        self._count += 1
        out = self._folder / f"run-{self._count}"
        answer = self.ask({"argv": list(map(str, argv)), "out": str(out), **request})
        assert answer["pid"] > 0
        return Run(self, answer["pid"], out)

    def dump(self, text: Path, place: object, *options: object, **request: Any) -> Run:
        """Start the dump that everything here is about."""
        return self.start("dump", "demo", text, place, *JOB, *options, **request)

    def finish(self, text: Path, place: object, *options: object, **request: Any) -> Run:
        """Run that dump to its end, which it has to reach."""
        run = self.dump(text, place, *options, **request)
        assert run.wait() == 0, run.stderr
        assert "Traceback" not in run.stderr
        return run

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Reference:
    """An undisturbed dump, and how long its parts took."""

    def __init__(self, warm: Warm, text: Path, path: Path) -> None:
        # The first run on a machine compiles kernels; the times of the second are all others'.
        assert warm.dump(text, path.with_name("first.zarr")).wait() == 0
        began = time.perf_counter()
        run = warm.dump(text, path)
        while not records(path) and run.running:
            time.sleep(0.002)
        self.planning = time.perf_counter() - began
        while records(path) < BLOCKS and run.running:
            time.sleep(0.002)
        self.filling = time.perf_counter() - began - self.planning
        assert run.wait() == 0, run.stderr
        self.sealing = time.perf_counter() - began - self.planning - self.filling
        self.path = path
        self.tree = tree_digests(path)
        self.operations = run.operations
        assert records(path) == BLOCKS


def records(path: Path) -> int:
    """Blocks that are committed."""
    return len(list(path.glob("journal/p0.b*.json")))


def phase(path: Path) -> str:
    """Where a dump has got to."""
    if (path / "zarr.json").exists():
        return "sealed"
    done = records(path)
    return "plan" if not done else ("fill" if done < BLOCKS else "seal")


def wait_for(path: Path, blocks: int, run: Run) -> None:
    """Return when so many blocks are committed (or the run is over)."""
    while records(path) < blocks and run.running:
        time.sleep(0.001)


def wait_for_a_moment_in(
    where: str, run: Run, path: Path, reference: Reference, rng: random.Random
) -> None:
    """Return at a random moment of a phase of a dump, or soon after it."""
    if where == "plan":
        time.sleep(rng.uniform(0, reference.planning))
    elif where == "fill":
        wait_for(path, rng.randrange(1, BLOCKS), run)
        time.sleep(rng.uniform(0, 0.02))
    else:
        wait_for(path, BLOCKS, run)
        time.sleep(rng.uniform(0, reference.sealing))


def kill_in(
    where: str, warm: Warm, text: Path, path: Path, reference: Reference, rng: random.Random
) -> str:
    """Begin or resume a dump, kill it at a random moment; gives the phase that it died in.

    "plan" is until it commits a block, "seal" is when it has committed the last one; "ended" if
    it was too late.
    """
    before = records(path)
    run = warm.dump(text, path)
    wait_for_a_moment_in(where, run, path, reference, rng)
    run.kill()
    status = run.wait()
    assert status in (-signal.SIGKILL, 0), run.stderr
    if status == 0:
        return "ended"
    if records(path) == before:
        return "plan"
    return phase(path).replace("sealed", "seal")


def operation_of(where: str, reference: Reference, rng: random.Random) -> int:
    """A moment before or after a single write, sync or rename of a phase, for `die_at`."""
    total = len(reference.operations)
    first, last = reference.operations.index("S"), reference.operations.rindex("R")
    begin, end = {"plan": (0, first), "fill": (first, last), "seal": (last, total)}[where]
    return rng.randrange(2 * begin, 2 * end)


# -- disks ----------------------------------------------------------------------------------------


@contextmanager
def small_disk(where: Path, size: str) -> Iterator[Path]:
    """A file system of its own; OSError with the reason where none can be mounted."""
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "actstore-test", str(where)]
    made = subprocess.run(mount, capture_output=True, text=True)
    if made.returncode:
        raise OSError(made.stderr.strip())
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)


def resize(where: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(where)], check=True)


def needed_bytes() -> int:
    return TOKENS * LAYERS * WIDTH * 4


def fill_up(ballast: Path, room: int = 0) -> None:
    """Write until so many bytes are free."""
    status = os.statvfs(ballast.parent)
    nbytes = max(0, status.f_bavail * status.f_frsize - room)
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while room == 0 or file.tell() + size <= nbytes:
                    file.write(bytes(size))
            except OSError:
                pass


def set_writable(path: Path, writable: bool) -> None:
    """Let a folder and those in it be written into, or not."""
    for folder in [path, *(p for p in path.rglob("*") if p.is_dir())]:
        folder.chmod(0o777 if writable else 0o555)


# -- clocks ---------------------------------------------------------------------------------------


def clocked(control: Path) -> dict[str, str]:
    """Environment of processes whose clock is set by a file, such as "-10d"; see libfaketime.

    Their monotonic clock and the times of files stay as they are.
    """
    found = find_spec("libfaketime")
    assert found is not None and found.origin is not None
    library = Path(found.origin).parent / "vendor/libfaketime/src/libfaketime.so.1"
    assert library.exists()
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(control),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_FORCE_MONOTONIC_FIX": "0",
        "NO_FAKE_STAT": "1",
    }


def set_clock(control: Path, shift: str) -> None:
    """Put a clock forwards or back at once, as "+0" or "-3600"."""
    part = control.with_suffix(".part")
    part.write_text(f"{shift}\n")
    part.replace(control)


def shift_times(path: Path, seconds: int) -> None:
    """Make files later or earlier, as they look to a clock that was put back or forwards."""
    for file in path.rglob("*"):
        status = file.stat()
        times = (status.st_atime_ns, status.st_mtime_ns)
        os.utime(file, ns=tuple(t + seconds * 10**9 for t in times))


def clone(path: Path, to: Path) -> Path:
    """A copy whose files are links: for stores, whose files are replaced and never changed."""
    shutil.copytree(path, to, copy_function=os.link)
    return to
