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

import fault_table
import numpy as np
import pytest
import questions
from faults import (
    BLOCKS,
    COMMAND,
    ENVIRONMENT,
    JOB,
    LAYERS,
    Reference,
    Warm,
    fill_up,
    kill_in,
    needed_bytes,
    operation_of,
    phase,
    records,
    resize,
    set_writable,
    small_disk,
    wait_for,
)
from helpers import (
    STAGES,
    VOCABULARY,
    assert_same_tree,
    plan_of,
    prose,
    random_values,
    scratch,
    small_corpus,
    tree_bytes,
    tree_digests,
    write_small,
    write_store,
)
from serving import client, finished

from actstore.errors import PlanError
from actstore.journal import Record
from actstore.storage import LocalStorage


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


@pytest.fixture(scope="module")
def reference(warm: Warm, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(warm, text, tmp_path_factory.mktemp("reference") / "book.zarr")


def test_the_reference_is_a_whole_store(reference: Reference) -> None:
    shards = [k for k in reference.tree if "/activation/c." in k]
    assert len(shards) == BLOCKS * LAYERS * 2
    assert not [k for k in reference.tree if "partial" in k or "rank" in k or "sketch/p" in k]
    assert reference.planning > 0.05 and reference.filling > 0.1


# -- killed ---------------------------------------------------------------------------------------


PHASES = ("plan", "fill", "seal")


def killed_and_rerun(
    warm: Warm, text: Path, reference: Reference, folder: Path, each: int, seed: int
) -> Counter[str]:
    """Kill dumps until so many died in each phase, and let each store finish; count them."""
    rng = random.Random(seed)
    hit: Counter[str] = Counter()
    while min(hit[where] for where in PHASES) < each:
        assert hit.total() < 9 * each, f"the phases are hard to hit: {hit}"
        path = folder / f"{seed}-{hit.total()}.zarr"
        for where in PHASES:  # the same store again and again
            if not (path / "zarr.json").exists():
                hit[kill_in(where, warm, text, path, reference, rng)] += 1
        warm.finish(text, path)
        assert_same_tree(path, reference.tree)
        shutil.rmtree(path)
    return hit


def test_killed_at_random_moments(
    warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    hit = killed_and_rerun(warm, text, reference, tmp_path, each=3, seed=11)
    assert sum(hit[where] for where in PHASES) >= 9, hit


@pytest.mark.slow
def test_killed_at_30_random_moments(
    warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    hit = killed_and_rerun(warm, text, reference, tmp_path, each=10, seed=12)
    assert sum(hit[where] for where in PHASES) >= 30, hit


def die_at_operations(
    warm: Warm, text: Path, reference: Reference, folder: Path, each: dict[str, int]
) -> None:
    rng = random.Random(3)
    for where, times in each.items():
        for i in range(times):
            path = folder / f"{where}-{i}.zarr"
            moment = operation_of(where, reference, rng)
            assert warm.dump(text, path, die_at=moment).wait() == -signal.SIGKILL, moment
            warm.finish(text, path)
            assert_same_tree(path, reference.tree)
            shutil.rmtree(path)


@pytest.mark.slow
def test_killed_between_single_operations(
    warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    die_at_operations(warm, text, reference, tmp_path, {"plan": 1, "fill": 1, "seal": 2})


@pytest.mark.slow
def test_killed_between_many_operations(
    warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    die_at_operations(warm, text, reference, tmp_path, {"plan": 6, "fill": 8, "seal": 16})


# -- stopped --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_says_how_to_go_on(
    number: int, warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    path = tmp_path / "book.zarr"
    for wanted in (0, 8, BLOCKS):
        run = warm.dump(text, path)
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
    warm.finish(text, path)
    assert_same_tree(path, reference.tree)


def test_resuming_redoes_only_what_is_missing(
    warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    path = tmp_path / "book.zarr"
    run = warm.dump(text, path)
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
    done = json.loads(warm.finish(text, path, "--json").stdout)
    assert {p: p.stat().st_mtime_ns for p in kept} == {p: before[p] for p in kept}
    whole = sum(p.stat().st_size for p in path.rglob("c.*"))
    assert done["sealed"] and done["nbytes_written"] < 0.6 * whole
    again = warm.finish(text, path, "--json")
    assert json.loads(again.stdout)["nbytes_written"] == 0
    assert "is complete and every byte of it is right: nothing to do" in again.stderr
    assert_same_tree(path, reference.tree)


def test_the_journal_is_trusted_and_not_the_files(
    warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    path = tmp_path / "book.zarr"
    run = warm.dump(text, path)
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
    warm.finish(text, path)
    assert_same_tree(path, reference.tree)


# -- a full disk ----------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 16 MiB."""
    try:
        with small_disk(tmp_path / "disk", "16m") as where:
            yield where
    except OSError as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")


def test_disk_too_small_is_said_beforehand(
    warm: Warm, text: Path, reference: Reference, disk: Path
) -> None:
    path = disk / "book.zarr"
    run = warm.dump(text, path)
    assert run.wait() == 1
    assert "the dump needs 0.04 GB more and 0.02 GB are free" in run.stderr
    assert "Traceback" not in run.stderr
    assert not path.exists()


@pytest.mark.parametrize("blocks", [0, 10, BLOCKS - 1])
def test_disk_that_fills_up(
    blocks: int, warm: Warm, text: Path, reference: Reference, disk: Path
) -> None:
    resize(disk, "100m")
    path, ballast = disk / "book.zarr", disk / "ballast"
    run = warm.dump(text, path)
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
    copied = disk.parent / "elsewhere.zarr"
    shutil.copytree(path, copied)
    ballast.unlink()
    resize(disk, "200m")
    warm.finish(text, path)
    assert_same_tree(path, reference.tree)
    # ... nor by going elsewhere.
    assert records(copied) == done
    warm.finish(text, copied)
    assert_same_tree(copied, reference.tree)


def test_disk_that_is_a_little_too_small(
    warm: Warm, text: Path, reference: Reference, disk: Path
) -> None:
    # Room for the values, and not for all that is beside them.
    resize(disk, str(needed_bytes() + 200_000))
    path = disk / "book.zarr"
    run = warm.dump(text, path)
    assert run.wait() == 1
    assert "No space left on device" in run.stderr and "Traceback" not in run.stderr
    assert phase(path) == "fill"
    resize(disk, "100m")
    warm.finish(text, path)
    assert_same_tree(path, reference.tree)


# -- a folder that cannot be written into ---------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory."""
    with scratch() as made:
        yield Path(made)


def test_a_read_only_folder(warm: Warm, text: Path, reference: Reference, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    run = warm.dump(text, closed / "new.zarr", plain=True)
    assert run.wait() == 1
    assert f"cannot write to {closed}/new.zarr: Permission denied" in run.stderr
    assert "Traceback" not in run.stderr
    assert not any(closed.iterdir())
    # A whole store is read all the same.
    path = tmp_path / "whole.zarr"
    shutil.copytree(reference.path, path)
    set_writable(path, False)
    run = warm.dump(text, path, plain=True)
    assert run.wait() == 0, run.stderr
    assert "every byte of it is right: nothing to do" in run.stderr
    answers = warm.start("ask", path, plain=True)
    assert answers.wait() == 0, answers.stderr
    found, right = json.loads(answers.stdout), questions.expected(reference.path)
    assert found["verify"] == {}
    for name, answer in found["answers"].items():
        assert questions.is_right(answer, right[name]), name


# -- clocks ---------------------------------------------------------------------------------------


def test_the_server_does_not_go_by_the_clock(memory: Path) -> None:
    """A store is written anew, and its files' times are put back to what they were."""
    path, other = memory / "run.zarr", memory / "other.zarr"
    plan, _ = write_small(path)
    write_store(other, plan, random_values(plan, seed=1), vocabulary=VOCABULARY)

    def mean(http: Any, name: str) -> Any:
        asked = f"/api/stores/{name}/moments?stages=mlp_post&layers=1&per=layer"
        return finished(http, asked).json()["variables"]["mean"]["data"]

    with client(path) as http:
        before = mean(http, "run")
        for key, data in tree_bytes(other).items():
            status = (path / key).stat()
            (path / key).write_bytes(data)
            os.utime(path / key, ns=(status.st_atime_ns, status.st_mtime_ns))
        after = mean(http, "run")
    with client(other) as http:
        assert after == mean(http, "other") != before


# -- what no digest covers -------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["journal/plan.json", "zarr.json"])
def test_a_damaged_plan_or_root_is_written_anew(key: str, memory: Path) -> None:
    path = memory / "run.zarr"
    plan, values = write_small(path)
    whole = tree_digests(path)
    sound = (path / key).read_bytes()
    at = sound.index(b'"sketch"')
    for damage in (None, sound[: len(sound) // 2], sound[:at] + b'"skexch"' + sound[at + 8 :]):
        (path / key).unlink() if damage is None else (path / key).write_bytes(damage)
        assert write_store(path, plan, values, vocabulary=VOCABULARY).sealed
        assert_same_tree(path, whole)


def test_the_plan_of_another_dump_is_not_overwritten(memory: Path) -> None:
    path = memory / "run.zarr"
    write_small(path)
    (path / "journal/plan.json").unlink()
    whole = tree_digests(path)
    other = plan_of(small_corpus(), STAGES[:1], 64)
    with pytest.raises(PlanError, match="choose another output"):
        write_store(path, other, random_values(other))
    assert_same_tree(path, whole)


# -- all of it ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_table_of_faults(tmp_path: Path) -> None:
    """Nothing lost, nothing wrong; the table in SCALING.md is the same at length."""
    rows = fault_table.run_all(tmp_path, seed=1, share=0.1)
    for row in rows:
        assert row.times, row.fault
        assert row.is_well, (row.fault, row.details)
        assert row.right + row.refused or row.blind, row.fault
    swapped = next(row for row in rows if row.blind)
    assert swapped.said and not swapped.missed


def test_an_answer_that_is_not_numpys_is_wrong(reference: Reference) -> None:
    right = questions.expected(reference.path)
    for name, answer in right.items():
        same = json.loads(json.dumps({k: np.asarray(v).tolist() for k, v in answer.items()}))
        assert questions.is_right(same, answer), name
        key = next(iter(answer))
        changed = np.array(answer[key], dtype=object).ravel()
        changed[-1] = changed[-1] + ("x" if name == "texts" else 1)
        odd = {**same, key: changed.reshape(np.shape(answer[key])).tolist()}
        assert not questions.is_right(odd, answer), name


def test_the_table_is_put_into_a_page(tmp_path: Path) -> None:
    row = fault_table.Row("a fault", times=3, files=20, lost=1, right=5, refused=2, wrong=1)
    row.say("block 7 of 20 in run.zarr: missing")
    assert not row.is_well
    made = fault_table.table([row])
    assert made.splitlines()[-1] == (
        "| a fault | 3 | 1 of 20 files | 1 of 8 (2 refused) "
        "| `block 7 of 20 in run.zarr: missing` |"
    )
    page = tmp_path / "PAGE.md"
    page.write_text("# A page\n\nAbove.\n")
    fault_table.write_into(page, made)
    once = page.read_text()
    assert once.startswith("# A page\n\nAbove.\n\n## Through faults\n") and made in once
    page.write_text(f"{once}\nBelow.\n")
    fault_table.write_into(page, "another")
    assert page.read_text() == f"{once}\nBelow.\n".replace(made, "another")


# -- several processes ----------------------------------------------------------------------------


def test_two_ranks_at_the_same_time(
    warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    for attempt in range(2):
        path = tmp_path / f"{attempt}.zarr"
        if attempt == 0:
            runs = [warm.dump(text, path, "--rank", r, "--world-size", 2) for r in (0, 1)]
        else:  # as torchrun says it
            runs = [warm.dump(text, path, env={"RANK": str(r), "WORLD_SIZE": "2"}) for r in (1, 0)]
        for run in runs:
            assert run.wait() == 0, run.stderr
            assert "Traceback" not in run.stderr
        assert_same_tree(path, reference.tree)
        shutil.rmtree(path)


def test_one_rank_after_another_and_one_killed(
    warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    path = tmp_path / "book.zarr"
    run = warm.finish(text, path, "--rank", 1, "--world-size", 2)
    assert "this rank's blocks are done; the last rank to finish seals the store" in run.stderr
    assert records(path) == BLOCKS // 2
    run = warm.dump(text, path, env={"RANK": "0", "WORLD_SIZE": "2"})
    wait_for(path, BLOCKS // 2 + 3, run)
    run.kill()
    run.wait()
    run = warm.finish(text, path, "--rank", 0, "--world-size", 2)
    assert_same_tree(path, reference.tree)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_rank_killed_while_it_seals_leaves_nothing(
    share: float, warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    path = tmp_path / "book.zarr"
    warm.finish(text, path, "--rank", 0, "--world-size", 2)
    copy = tmp_path / "copy.zarr"
    shutil.copytree(path, copy)
    operations = warm.finish(text, copy, "--rank", 1, "--world-size", 2).operations
    assert_same_tree(copy, reference.tree)
    start = operations.rindex("R") + 2
    moment = 2 * int(start + share * (len(operations) - start))
    moment += 2 * operations[moment // 2 :].index("r")  # a temporary file is whole, not renamed
    options = ["--rank", 1, "--world-size", 2]
    for later in range(0, 40, 2):  # stages are merged at the same time: not the same every run
        shutil.rmtree(path)
        warm.finish(text, path, "--rank", 0, "--world-size", 2)
        run = warm.dump(text, path, *options, die_at=moment + later)
        assert run.wait() == -signal.SIGKILL
        assert phase(path) == "seal"
        if list(path.rglob("*.1.partial")):
            break
    assert list(path.rglob("*.1.partial"))
    warm.finish(text, path)
    assert_same_tree(path, reference.tree)


def test_a_second_dump_to_the_same_place_is_refused(
    warm: Warm, text: Path, reference: Reference, tmp_path: Path
) -> None:
    path = tmp_path / "book.zarr"
    first = warm.dump(text, path)
    wait_for(path, 1, first)
    first.kill(signal.SIGSTOP)  # so that it is surely still there
    for rank in ([], ["--rank", 0, "--world-size", 2]):
        second = warm.dump(text, path, *rank)
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
        warm.dump(text, path),
        warm.dump(text, path, "--rank", 0, "--world-size", 3),
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


@pytest.mark.slow
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
