"""Dumps that are killed, stopped, starved of disk or run side by side end as one undisturbed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_same_tree, prose, tree_digests

from actstore.journal import Record
from actstore.storage import LocalStorage

TOKENS, BLOCKS = 5000, 20  # of 256 tokens, the last one short
LAYERS, WIDTH = 3, 128 + 512
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

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        script = Path(__file__).with_name("warm.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=ENVIRONMENT,
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

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    process = Warm(tmp_path_factory.mktemp("warm"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(prose(20_000))
    return path


class Reference:
    """An undisturbed dump, and how long its parts took."""

    def __init__(self, warm: Warm, text: Path, path: Path) -> None:
        began = time.perf_counter()
        run = warm.start("dump", "demo", text, path, *JOB)
        while not records(path) and run.running:
            time.sleep(0.002)
        self.planning = time.perf_counter() - began
        while records(path) < BLOCKS and run.running:
            time.sleep(0.002)
        self.filling = time.perf_counter() - began - self.planning
        assert run.wait() == 0, run.stderr
        self.sealing = time.perf_counter() - began - self.planning - self.filling
        self.tree = tree_digests(path)
        self.operations = run.operations
        assert records(path) == BLOCKS


@pytest.fixture(scope="module")
def reference(warm: Warm, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("reference")
    # The first run on a machine compiles kernels; the times of the second are those of all others.
    assert warm.start("dump", "demo", text, folder / "first.zarr", *JOB).wait() == 0
    return Reference(warm, text, folder / "book.zarr")


def records(path: Path) -> int:
    """Blocks that are committed."""
    return len(list(path.glob("journal/p0.b*.json")))


def phase(path: Path) -> str:
    """Where a dump has got to."""
    if (path / "zarr.json").exists():
        return "sealed"
    done = records(path)
    return "plan" if not done else ("fill" if done < BLOCKS else "seal")


def finish(warm: Warm, text: Path, path: Path, *options: object) -> Run:
    run = warm.start("dump", "demo", text, path, *JOB, *options)
    assert run.wait() == 0, run.stderr
    assert "Traceback" not in run.stderr
    return run


def wait_for(path: Path, blocks: int, run: Run) -> None:
    """Return when so many blocks are committed (or the run is over)."""
    while records(path) < blocks and run.running:
        time.sleep(0.001)


def test_the_reference_is_a_whole_store(reference: Reference) -> None:
    shards = [k for k in reference.tree if "/activation/c." in k]
    assert len(shards) == BLOCKS * LAYERS * 2
    assert not [k for k in reference.tree if "partial" in k or "rank" in k or "sketch/p" in k]
    assert reference.planning > 0.05 and reference.filling > 0.1


# -- killed ---------------------------------------------------------------------------------------


def kill_at_a_random_moment(
    run: Run, path: Path, reference: Reference, where: str, rng: random.Random
) -> None:
    if where == "plan":
        time.sleep(rng.uniform(0, reference.planning))
    elif where == "fill":
        wait_for(path, rng.randrange(1, BLOCKS), run)
        time.sleep(rng.uniform(0, 0.02))
    else:
        wait_for(path, BLOCKS, run)
        time.sleep(rng.uniform(0, reference.sealing))
    run.kill()


def killed_and_rerun(
    warm: Warm, text: Path, reference: Reference, folder: Path, kills: int, seed: int
) -> Counter[str]:
    """Kill dumps of one store again and again, then let it finish; count where they were."""
    rng = random.Random(seed)
    hit: Counter[str] = Counter()
    order = ["plan", "fill", "fill", "seal"]
    for chain in range(-(-kills // len(order))):
        path = folder / f"{seed}-{chain}.zarr"
        for where in order[: kills - sum(hit.values())]:
            run = warm.start("dump", "demo", text, path, *JOB)
            kill_at_a_random_moment(run, path, reference, where, rng)
            status = run.wait()
            assert status in (-signal.SIGKILL, 0), run.stderr
            hit["sealed" if status == 0 else phase(path)] += 1
        finish(warm, text, path)
        assert_same_tree(path, reference.tree)
        shutil.rmtree(path)
    return hit


def test_killed_at_20_random_moments(
    warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    hit = killed_and_rerun(warm, text, reference, tmp_path, kills=20, seed=11)
    assert sum(hit.values()) == 20
    assert hit["plan"] >= 1 and hit["fill"] >= 5, hit


@pytest.mark.slow
def test_killed_at_100_random_moments(
    warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    hit = killed_and_rerun(warm, text, reference, tmp_path, kills=100, seed=12)
    assert min(hit["plan"], hit["fill"], hit["seal"]) >= 5, hit


def operations_to_die_at(reference: Reference, plan: int, fill: int, seal: int) -> list[int]:
    """Moments before or after single writes, syncs and renames, some of each phase."""
    total = len(reference.operations)
    first, last = reference.operations.index("S"), reference.operations.rindex("R")
    rng = random.Random(3)
    return [
        *(rng.randrange(0, 2 * first) for _ in range(plan)),
        *(rng.randrange(2 * first, 2 * last) for _ in range(fill)),
        *(rng.randrange(2 * last, 2 * total) for _ in range(seal)),
    ]


def die_at_operations(
    warm: Warm, text: Path, reference: Reference, folder: Path, moments: list[int]
) -> Counter[str]:
    hit: Counter[str] = Counter()
    for moment in moments:
        path = folder / f"{moment}.zarr"
        status = warm.start("dump", "demo", text, path, *JOB, die_at=moment).wait()
        hit[phase(path)] += 1
        assert status == -signal.SIGKILL, moment
        finish(warm, text, path)
        assert_same_tree(path, reference.tree)
        shutil.rmtree(path)
    return hit


def test_killed_between_single_operations(
    warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    moments = operations_to_die_at(reference, plan=1, fill=1, seal=2)
    hit = die_at_operations(warm, text, reference, tmp_path, moments)
    assert hit["seal"] + hit["sealed"] >= 1, hit


@pytest.mark.slow
def test_killed_between_many_operations(
    warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    moments = operations_to_die_at(reference, plan=10, fill=15, seal=35)
    die_at_operations(warm, text, reference, tmp_path, moments)


# -- stopped --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_says_how_to_go_on(
    number: int, warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    path = tmp_path / "book.zarr"
    for wanted in (0, 8, BLOCKS):
        run = warm.start("dump", "demo", text, path, *JOB)
        if wanted == 0:
            time.sleep(reference.planning / 4)  # the model is being loaded
        wait_for(path, wanted, run)
        run.kill(number)
        status = run.wait()
        assert "Traceback" not in run.stderr
        if status == 0:  # it had ended
            assert wanted == BLOCKS
            continue
        assert status in (1, 130)
        assert run.stdout == ""
        done = records(path)
        assert done >= wanted
        if wanted:
            assert f"stopped: {done} of {BLOCKS} blocks are complete in {path}." in run.stderr
            assert "Run the same command again to go on" in run.stderr
        leftovers = [p.name for p in path.rglob("*.partial")]
        assert not leftovers
    finish(warm, text, path)
    assert_same_tree(path, reference.tree)


def test_resuming_redoes_only_what_is_missing(
    warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    path = tmp_path / "book.zarr"
    run = warm.start("dump", "demo", text, path, *JOB)
    wait_for(path, 12, run)
    run.kill()
    run.wait()
    before = {p: p.stat().st_mtime_ns for p in path.rglob("c.*") if p.suffix != ".partial"}
    kept = {
        path / shard.key
        for record in (Record.read(LocalStorage(path), 0, b) for b in range(BLOCKS))
        if record is not None
        for shard in record.shards
    }
    assert len(kept) >= 12 * LAYERS * 2
    done = json.loads(finish(warm, text, path, "--json").stdout)
    assert {p: p.stat().st_mtime_ns for p in kept} == {p: before[p] for p in kept}
    whole = sum(p.stat().st_size for p in path.rglob("c.*"))
    assert done["sealed"] and done["nbytes_written"] < 0.6 * whole
    again = finish(warm, text, path, "--json")
    assert json.loads(again.stdout)["nbytes_written"] == 0
    assert "is complete and every byte of it is right: nothing to do" in again.stderr
    assert_same_tree(path, reference.tree)


def test_the_journal_is_trusted_and_not_the_files(
    warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    path = tmp_path / "book.zarr"
    run = warm.start("dump", "demo", text, path, *JOB)
    wait_for(path, 8, run)
    run.kill()
    run.wait()
    done = [b for b in range(BLOCKS) if (path / f"journal/p0.b{b:08}.json").exists()]
    missing = [b for b in range(BLOCKS) if b not in done]
    a, b, c, d = done[:4]
    folder = path / "mlp_post" / "activation"
    # Shards without a record, under their final names: half written, and wrong to the last byte.
    whole = (folder / f"c.0.{a}.0").read_bytes()
    (folder / f"c.0.{missing[0]}.0").write_bytes(whole[: len(whole) // 2])
    (folder / f"c.1.{missing[1]}.0").write_bytes(whole)
    # Records without their shards, or that are damaged themselves.
    (folder / f"c.2.{a}.0").unlink()
    (folder / f"c.1.{b}.0").write_bytes(whole[:-7])
    (path / f"journal/p0.b{c:08}.json").write_bytes(b'{"block":')
    record = path / f"journal/p0.b{d:08}.json"
    record.write_bytes(record.read_bytes().replace(b'"pass":0', b'"pass":1'))
    finish(warm, text, path)
    assert_same_tree(path, reference.tree)


# -- a full disk ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 16 MiB."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "actstore-test", str(where)]
    try:
        made = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    if made.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {made.stderr.strip()}")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def resize(where: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(where)], check=True)


def needed_bytes() -> int:
    return TOKENS * LAYERS * WIDTH * 4


def test_disk_too_small_is_said_beforehand(
    warm: Warm, text: Path, reference: Reference, small_disk: Path
) -> None:
    path = small_disk / "book.zarr"
    run = warm.start("dump", "demo", text, path, *JOB)
    assert run.wait() == 1
    assert "the dump needs 0.04 GB more and 0.02 GB are free" in run.stderr
    assert "Traceback" not in run.stderr
    assert not path.exists()


@pytest.mark.parametrize("blocks", [0, 10, BLOCKS - 1])
def test_disk_that_fills_up(
    blocks: int, warm: Warm, text: Path, reference: Reference, small_disk: Path
) -> None:
    resize(small_disk, "100m")
    path, ballast = small_disk / "book.zarr", small_disk / "ballast"
    run = warm.start("dump", "demo", text, path, *JOB)
    while not (path / "journal").exists():
        time.sleep(0.001)
    wait_for(path, blocks, run)
    fill_up(ballast)
    assert run.wait() == 1, run.stderr
    assert "No space left on device" in run.stderr
    assert "run the same dump again to go on" in run.stderr
    assert "Traceback" not in run.stderr
    assert blocks <= records(path) < BLOCKS or blocks == BLOCKS - 1
    done = records(path)
    # Nothing is lost, neither by making room here ...
    copied = small_disk.parent / "elsewhere.zarr"
    shutil.copytree(path, copied)
    ballast.unlink()
    resize(small_disk, "200m")
    finish(warm, text, path)
    assert_same_tree(path, reference.tree)
    # ... nor by going elsewhere.
    assert records(copied) == done
    finish(warm, text, copied)
    assert_same_tree(copied, reference.tree)


def fill_up(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


def test_disk_that_is_a_little_too_small(
    warm: Warm, text: Path, reference: Reference, small_disk: Path
) -> None:
    # Room for the values, and not for all that is beside them.
    resize(small_disk, str(needed_bytes() + 200_000))
    path = small_disk / "book.zarr"
    run = warm.start("dump", "demo", text, path, *JOB)
    assert run.wait() == 1
    assert "No space left on device" in run.stderr and "Traceback" not in run.stderr
    assert phase(path) == "fill"
    resize(small_disk, "100m")
    finish(warm, text, path)
    assert_same_tree(path, reference.tree)


# -- several processes ----------------------------------------------------------------------------


def test_two_ranks_at_the_same_time(
    warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    for attempt in range(2):
        path = tmp_path / f"{attempt}.zarr"
        if attempt == 0:
            runs = [
                warm.start("dump", "demo", text, path, *JOB, "--rank", r, "--world-size", 2)
                for r in (0, 1)
            ]
        else:  # as torchrun says it
            runs = [
                warm.start(
                    "dump", "demo", text, path, *JOB, env={"RANK": str(r), "WORLD_SIZE": "2"}
                )
                for r in (1, 0)
            ]
        for run in runs:
            assert run.wait() == 0, run.stderr
            assert "Traceback" not in run.stderr
        assert_same_tree(path, reference.tree)
        shutil.rmtree(path)


def test_one_rank_after_another_and_one_killed(
    warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    path = tmp_path / "book.zarr"
    run = finish(warm, text, path, "--rank", 1, "--world-size", 2)
    assert "this rank's blocks are done; the last rank to finish seals the store" in run.stderr
    assert records(path) == BLOCKS // 2
    run = warm.start("dump", "demo", text, path, *JOB, env={"RANK": "0", "WORLD_SIZE": "2"})
    wait_for(path, BLOCKS // 2 + 3, run)
    run.kill()
    run.wait()
    run = finish(warm, text, path, "--rank", 0, "--world-size", 2)
    assert_same_tree(path, reference.tree)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_rank_killed_while_it_seals_leaves_nothing(
    share: float, warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    path = tmp_path / "book.zarr"
    finish(warm, text, path, "--rank", 0, "--world-size", 2)
    copy = tmp_path / "copy.zarr"
    shutil.copytree(path, copy)
    operations = finish(warm, text, copy, "--rank", 1, "--world-size", 2).operations
    assert_same_tree(copy, reference.tree)
    start = operations.rindex("R") + 2
    moment = 2 * int(start + share * (len(operations) - start))
    moment += 2 * operations[moment // 2 :].index("r")  # a temporary file is whole, not renamed
    options = ["--rank", 1, "--world-size", 2]
    for later in range(0, 40, 2):  # stages are merged at the same time: not the same every run
        shutil.rmtree(path)
        finish(warm, text, path, "--rank", 0, "--world-size", 2)
        run = warm.start("dump", "demo", text, path, *JOB, *options, die_at=moment + later)
        assert run.wait() == -signal.SIGKILL
        assert phase(path) == "seal"
        if list(path.rglob("*.1.partial")):
            break
    assert list(path.rglob("*.1.partial"))
    finish(warm, text, path)
    assert_same_tree(path, reference.tree)


def test_a_second_dump_to_the_same_place_is_refused(
    warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    path = tmp_path / "book.zarr"
    first = warm.start("dump", "demo", text, path, *JOB)
    wait_for(path, 1, first)
    first.kill(signal.SIGSTOP)  # so that it is surely still there
    for rank in ([], ["--rank", 0, "--world-size", 2]):
        second = warm.start("dump", "demo", text, path, *JOB, *rank)
        assert second.wait() == 1
        assert f"{path} is being written by another process" in second.stderr
        assert "Traceback" not in second.stderr
    first.kill(signal.SIGCONT)
    assert first.wait() == 0
    assert_same_tree(path, reference.tree)


def test_the_same_rank_twice_is_refused(
    warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    path = tmp_path / "book.zarr"
    options = [*JOB, "--world-size", 2, "--rank"]
    first = warm.start("dump", "demo", text, path, *options, 0)
    wait_for(path, 1, first)
    first.kill(signal.SIGSTOP)
    for second in (
        warm.start("dump", "demo", text, path, *options, 0),
        warm.start("dump", "demo", text, path, *JOB),
        warm.start("dump", "demo", text, path, *JOB, "--rank", 0, "--world-size", 3),
    ):
        assert second.wait() == 1, second.stderr
        assert "is being written by another process" in second.stderr
    assert warm.start("dump", "demo", text, path, *options, 1).wait() == 0
    first.kill(signal.SIGCONT)
    assert first.wait() == 0
    assert_same_tree(path, reference.tree)


@pytest.mark.slow
def test_torchrun(text: Path, reference: Reference, tmp_path: Path) -> None:
    path = tmp_path / "book.zarr"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "actstore_cli", "dump", "demo", str(text), str(path), *JOB]
    out = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert out.returncode == 0, out.stderr
    assert_same_tree(path, reference.tree)


def test_a_process_of_its_own(text: Path, reference: Reference, tmp_path: Path) -> None:
    """Nothing above depends on the warm process: killed and rerun from nothing."""
    path = tmp_path / "book.zarr"
    command = [*COMMAND, "dump", "demo", str(text), str(path), *JOB]
    run = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while records(path) < 7:
        time.sleep(0.002)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    assert 7 <= records(path) < BLOCKS
    out = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert_same_tree(path, reference.tree)
