"""Every fault, many times, at random moments; and what came of it, as a table for the docs.

    python tests/fault_table.py --seed 0

Dumps are processes of the command line. After a fault a process of its own verifies the store and
asks it the questions of questions.py, whose answers numpy knows; then the same dump is run again,
and every file compared with those of a dump that nothing disturbed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import questions
from faults import (
    BLOCKS,
    Reference,
    Run,
    Warm,
    clocked,
    clone,
    fill_up,
    kill_in,
    needed_bytes,
    operation_of,
    records,
    resize,
    set_clock,
    set_writable,
    shift_times,
    small_disk,
    wait_for,
    wait_for_a_moment_in,
)
from helpers import flip, prose, tree_digests
from s3_faults import Faults, objects, s3_server, s3_settings

from actstore.journal import Record
from actstore.storage import LocalStorage

PHASES = ("plan", "fill", "seal")
PAGE = Path(__file__).parents[1] / "SCALING.md"
SECTION = "## Through faults"
BEGIN, END = "<!-- fault table: begin -->", "<!-- fault table: end -->"
S3_JOB = ("--max-tokens", 1280)  # five blocks


@dataclass
class Row:
    """What came of one kind of fault.

    Attributes
    ----------
    blind : bool
        Whether nothing but `verify` can tell that something is wrong.
    times : int
        Faults injected.
    files, lost : int
        Files compared after the dump was run again, and those that were not as undisturbed; also
        shards that were committed, undamaged, and made once more.
    right, refused, wrong, crashed : int
        Answers of stores that were unfinished or damaged.
    missed : int
        Damaged objects that `verify` did not find.
    said : Counter
        Messages.
    """

    fault: str
    blind: bool = False
    times: int = 0
    files: int = 0
    lost: int = 0
    right: int = 0
    refused: int = 0
    wrong: int = 0
    crashed: int = 0
    missed: int = 0
    said: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)

    def say(self, message: str) -> None:
        self.said[message] += 1

    def cells(self) -> tuple[str, str, str, str, str]:
        asked = self.right + self.refused + self.wrong + self.crashed
        answers = f"{self.wrong + self.crashed} of {asked:,}"
        if self.refused:
            answers += f" ({self.refused:,} refused)"
        if self.blind:
            answers += ", asked before `verify`"
        lost = f"{self.lost} of {self.files:,} files"
        return self.fault, f"{self.times:,}", lost, answers, self._report()

    @property
    def is_well(self) -> bool:
        """Whether nothing was lost, wrong or overlooked."""
        wrong = 0 if self.blind else self.wrong
        return not (self.lost or wrong or self.crashed or self.missed)

    def _report(self) -> str:
        """The commonest kind of message, by what is in it beside numbers and names of objects."""
        kinds: dict[str, list[str]] = {}
        for message, count in (self.said or self.refusals).items():
            kind = re.sub(r"[\w./]*\d[\w./]*", "#", message)
            kinds.setdefault(kind, []).extend([message] * count)
        if not kinds:
            return "nothing to report"
        message = max(kinds.values(), key=len)[0]
        return f"`{message if len(message) <= 110 else message[:107] + '...'}`"


class Lab:
    """Where it happens: an undisturbed store and what to ask it, and processes to disturb.

    Parameters
    ----------
    folder : path
    seed : int
    share : float
        Of the usual number of times.
    """

    def __init__(self, folder: Path, seed: int, share: float) -> None:
        self.folder, self.share = folder, share
        self.rng = random.Random(seed)
        self.text = folder / "book.txt"
        self.text.write_text(prose(20_000))
        self.warm = Warm(folder)
        self.reference = Reference(self.warm, self.text, folder / "whole.zarr")
        self.expected = questions.expected(self.reference.path)
        self._places = 0

    def times(self, usual: int) -> range:
        return range(max(1, round(usual * self.share)))

    def until(self, row: Row, usual: int) -> Iterator[int]:
        """Go on until a fault came in time so often; what is aimed at may have ended before."""
        wanted = len(self.times(usual))
        for attempt in range(10 * wanted):
            if row.times >= wanted:
                return
            yield attempt
        raise AssertionError(f"{row.fault}: hard to hit")

    def place(self) -> Path:
        self._places += 1
        return self.folder / f"{self._places}.zarr"

    def ask(
        self,
        row: Row,
        place: object,
        damaged: set[str] | None = None,
        expected: Mapping[str, questions.Answer] | None = None,
        **request: Any,
    ) -> None:
        """Ask a store everything; `damaged` is what its verification has to name."""
        run = self.warm.start("ask", place, **request)
        assert run.wait() == 0, run.stderr
        found = json.loads(run.stdout)
        for name, answer in found["answers"].items():
            if "refused" in answer:
                row.refused += 1
                row.refusals[shown(answer["refused"], place)] += 1
            elif "crashed" in answer:
                row.crashed += 1
                row.details.append(f"{name} of {damaged}: {answer['crashed']}")
            elif questions.is_right(answer, (expected or self.expected)[name]):
                row.right += 1
            else:
                row.wrong += 1
                row.details.append(f"{name} of {damaged}: a wrong answer")
        for key in damaged or ():
            problems = found["verify"]
            if "refused" in problems:
                row.say(shown(problems["refused"], place))
            elif key in problems:
                row.say(f"{key}: {problems[key]}")
            else:
                row.missed += 1
                row.details.append(f"verify did not name {key} but {problems}")

    def hear(self, row: Row, run: Run, place: object) -> None:
        """Note the last thing that a run which failed had to say; a traceback is a crash."""
        if "Traceback" in run.stderr:
            row.crashed += 1
            row.details.append(run.stderr[-600:])
        lines = run.stderr.strip().splitlines() or ["(stopped before it said anything)"]
        row.say(shown(lines[-1], place))

    def mend(
        self,
        row: Row,
        path: Path,
        *options: object,
        kept: Mapping[Path, int] | None = None,
        **request: Any,
    ) -> None:
        """Run the dump again, and compare what it leaves with what it should."""
        run = self.warm.dump(self.text, path, *options, **request)
        if run.wait() != 0:
            row.details.append(f"not mended: {run.stderr[-600:]}")
        for shard, inode in (kept or {}).items():
            row.lost += not shard.exists() or shard.stat().st_ino != inode
        self.compare(row, tree_digests(path) if path.exists() else {})
        shutil.rmtree(path, ignore_errors=True)

    def compare(self, row: Row, found: Mapping[str, str], right: Any = None) -> None:
        right = right or self.reference.tree
        different = {k for k in found.keys() | right.keys() if found.get(k) != right.get(k)}
        row.files += len(right)
        row.lost += len(different)
        if different:
            row.details.append(f"{len(different)} files differ, such as {sorted(different)[:4]}")

    def moment(self) -> str:
        return self.rng.choice(PHASES)


def shown(message: str, place: object) -> str:
    """A message on one line, without the place's own name."""
    line = " ".join(message.split()).replace(str(place), "run.zarr")
    return line.removeprefix("actstore: ")


def committed(path: Path) -> dict[Path, int]:
    """Shards that a store's records say are durable, and the inodes of their files."""
    found: dict[Path, int] = {}
    for block in range(BLOCKS):
        record = Record.read(LocalStorage(path), 0, block)
        for shard in record.shards if record else ():
            found[path / shard.key] = (path / shard.key).stat().st_ino
    return found


FAULTS: list[Callable[[Lab], list[Row]]] = []


def fault(function: Callable[[Lab], list[Row]]) -> Callable[[Lab], list[Row]]:
    FAULTS.append(function)
    return function


# -- processes that end ---------------------------------------------------------------------------


@fault
def killed(lab: Lab) -> list[Row]:
    names = ("while it plans", "while it fills", "while it seals")
    rows = {w: Row(f"SIGKILL {name}") for w, name in zip(PHASES, names, strict=True)}
    each, attempts = len(lab.times(12)), 0
    while min(row.times for row in rows.values()) < each:
        attempts += 1
        assert attempts < 20 * each, "the phases are hard to hit"
        path, last = lab.place(), None
        for where in PHASES:
            if (path / "zarr.json").exists():
                break
            hit = kill_in(where, lab.warm, lab.text, path, lab.reference, lab.rng)
            if hit != "ended":
                last = rows[hit]
                last.times += 1
                lab.ask(last, path)
        lab.mend(last or rows["seal"], path, kept=committed(path))
    return list(rows.values())


@fault
def killed_at_operations(lab: Lab) -> list[Row]:
    row = Row("SIGKILL just before or after one write, sync or rename")
    for where, usual in (("plan", 4), ("fill", 6), ("seal", 8)):
        for _ in lab.times(usual):
            path, moment = lab.place(), operation_of(where, lab.reference, lab.rng)
            status = lab.warm.dump(lab.text, path, die_at=moment).wait()
            row.times += status == -signal.SIGKILL
            lab.ask(row, path)
            lab.mend(row, path, kept=committed(path))
    return [row]


@fault
def stopped(lab: Lab) -> list[Row]:
    row = Row("SIGTERM or SIGINT at a random moment")
    for i in lab.until(row, 8):
        path = lab.place()
        run = lab.warm.dump(lab.text, path)
        wait_for_a_moment_in(lab.moment(), run, path, lab.reference, lab.rng)
        run.kill((signal.SIGTERM, signal.SIGINT)[i % 2])
        if run.wait() == 0:
            continue  # it had ended
        row.times += 1
        lab.hear(row, run, path)
        lab.ask(row, path)
        lab.mend(row, path, kept=committed(path))
    return [row]


@fault
def rank_killed(lab: Lab) -> list[Row]:
    row = Row("SIGKILL of one of two ranks")
    for _ in lab.until(row, 6):
        path = lab.place()
        runs = [lab.warm.dump(lab.text, path, "--rank", r, "--world-size", 2) for r in range(2)]
        wait_for(path, lab.rng.randrange(BLOCKS), runs[0])
        time.sleep(lab.rng.uniform(0, 0.2))
        victim = lab.rng.randrange(2)
        runs[victim].kill()
        row.times += [run.wait() for run in runs][victim] == -signal.SIGKILL
        lab.ask(row, path)
        lab.mend(row, path, kept=committed(path))
    return [row]


@fault
def two_at_once(lab: Lab) -> list[Row]:
    row = Row("a second dump to the same path")
    for _ in lab.times(8):
        path = lab.place()
        first = lab.warm.dump(lab.text, path)
        time.sleep(lab.rng.uniform(0, lab.reference.planning + lab.reference.filling))
        second = lab.warm.dump(lab.text, path)
        row.times += 1
        ends = {run: run.wait() for run in (first, second)}
        for run, status in ends.items():
            if status:
                lab.hear(row, run, path)
        if all(ends.values()):
            row.details.append("neither was let through")
        lab.ask(row, path)
        lab.compare(row, tree_digests(path))
        shutil.rmtree(path)
    return [row]


# -- disks ----------------------------------------------------------------------------------------


@contextmanager
def disk_of(lab: Lab) -> Iterator[Path]:
    with small_disk(lab.folder / f"disk-{lab.place().stem}", "150m") as where:
        yield where


@fault
def disk_full(lab: Lab) -> list[Row]:
    row = Row("disk full at a random moment")
    for _ in lab.until(row, 10):
        with disk_of(lab) as disk:
            path = disk / "run.zarr"
            run = lab.warm.dump(lab.text, path)
            while not (path / "journal/plan.json").exists():
                time.sleep(0.001)
            wait_for(path, lab.rng.randrange(BLOCKS), run)
            fill_up(disk / "ballast", room=round(lab.rng.uniform(0, 0.3) * needed_bytes()))
            if run.wait() != 0:
                row.times += 1
                lab.hear(row, run, path)
                lab.ask(row, path)
            kept = committed(path)
            (disk / "ballast").unlink()
            resize(disk, "200m")
            lab.mend(row, path, kept=kept)
    return [row]


@fault
def read_only(lab: Lab) -> list[Row]:
    row = Row("the folder is read-only, or becomes it")
    for i in lab.until(row, 10):
        above = lab.place().with_suffix("")
        above.mkdir()
        path = above / "run.zarr"
        if i % 5 == 0:  # from the first
            above.chmod(0o555)
        run = lab.warm.dump(lab.text, path, plain=True)
        if i % 5:
            while not path.exists():
                time.sleep(0.001)
            where = lab.rng.choice(("fill", "seal"))
            wait_for_a_moment_in(where, run, path, lab.reference, lab.rng)
            set_writable(path, False)
        if run.wait() != 0:
            row.times += 1
            lab.hear(row, run, path)
            lab.ask(row, path, plain=True)
        above.chmod(0o755)
        kept = committed(path)
        if path.exists():
            set_writable(path, True)
        lab.mend(row, path, kept=kept, plain=True)
    return [row]


# -- damage ---------------------------------------------------------------------------------------


Damage = Callable[[random.Random, Path], set[str]]
"""Damages a store; gives the keys of what it damaged."""


def keys_of(path: Path, pattern: str) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.glob(pattern) if p.is_file())


def a_shard(rng: random.Random, path: Path) -> str:
    return rng.choice(keys_of(path, "*/activation/c.*"))


def a_record(rng: random.Random, path: Path) -> str:
    return rng.choice(keys_of(path, "journal/p*.json"))


def another(rng: random.Random, path: Path) -> str:
    """Labels, texts, sketches, metadata, manifest, plan, root: all that is not a shard."""
    others = [k for k in keys_of(path, "**/*") if "/activation/c." not in k]
    kinds = sorted({re.sub(r"\d+", "#", k) for k in others})
    kind = rng.choice(kinds)  # one of each kind as likely as of any other
    return rng.choice([k for k in others if re.sub(r"\d+", "#", k) == kind])


def rewrite(path: Path, data: bytes) -> None:
    """Change a file, and no other that it is linked to."""
    path.unlink()
    path.write_bytes(data)


def truncate(rng: random.Random, path: Path, key: str) -> set[str]:
    data = (path / key).read_bytes()
    rewrite(path / key, data[: rng.randrange(len(data))])
    return {key}


def flip_a_byte(rng: random.Random, path: Path, key: str) -> set[str]:
    data = (path / key).read_bytes()
    rewrite(path / key, data)
    flip(path / key, rng.randrange(len(data)))
    return {key}


def delete(rng: random.Random, path: Path, key: str) -> set[str]:
    (path / key).unlink()
    return {key}


def swap_shards(rng: random.Random, path: Path) -> set[str]:
    first = a_shard(rng, path)
    folder = first.rpartition("/")[0]
    second = rng.choice([key for key in keys_of(path, f"{folder}/c.*") if key != first])
    a, b = ((path / key).read_bytes() for key in (first, second))
    rewrite(path / first, b)
    rewrite(path / second, a)
    return {first, second}


def damage_a_record(rng: random.Random, path: Path) -> set[str]:
    how = rng.choice((truncate, flip_a_byte, delete))
    return how(rng, path, a_record(rng, path))


DAMAGES: dict[str, tuple[int, Damage]] = {
    "a shard truncated": (10, lambda r, p: truncate(r, p, a_shard(r, p))),
    "a byte of a shard flipped": (12, lambda r, p: flip_a_byte(r, p, a_shard(r, p))),
    "a shard deleted": (8, lambda r, p: delete(r, p, a_shard(r, p))),
    "a journal record damaged": (10, damage_a_record),
    "a byte flipped in any other file": (30, lambda r, p: flip_a_byte(r, p, another(r, p))),
    "any other file truncated": (10, lambda r, p: truncate(r, p, another(r, p))),
    "any other file deleted": (10, lambda r, p: delete(r, p, another(r, p))),
    "two shards swapped": (8, swap_shards),
}


@fault
def damaged(lab: Lab) -> list[Row]:
    rows = []
    for name, (usual, damage) in DAMAGES.items():
        row = Row(name, blind=damage is swap_shards)
        for _ in lab.times(usual):
            path = clone(lab.reference.path, lab.place())
            keys = damage(lab.rng, path)
            row.times += 1
            lab.ask(row, path, damaged=keys)
            lab.mend(row, path)
        rows.append(row)
    return rows


@fault
def damaged_while_unfinished(lab: Lab) -> list[Row]:
    """Shards and records of a dump that was killed: found on resuming, or once it is sealed."""
    row = Row("a shard or record of an unfinished dump damaged")
    for _ in lab.times(8):
        path = lab.place()
        while not 0 < records(path) < BLOCKS:
            shutil.rmtree(path, ignore_errors=True)
            kill_in("fill", lab.warm, lab.text, path, lab.reference, lab.rng)
        key = lab.rng.choice([str(p.relative_to(path)) for p in committed(path)])
        how = lab.rng.choice((truncate, flip_a_byte, delete))
        if lab.rng.random() < 0.3:
            key = a_record(lab.rng, path)
        keys = how(lab.rng, path, key)
        row.times += 1
        lab.ask(row, path)
        if lab.warm.dump(lab.text, path).wait() != 0:
            row.details.append(f"not resumed after {how.__name__} of {key}")
        if tree_digests(path) != lab.reference.tree:  # a flipped byte, which only reading shows
            lab.ask(row, path, damaged=keys)
        lab.mend(row, path)
    return [row]


# -- clocks ---------------------------------------------------------------------------------------


@fault
def clock_back(lab: Lab) -> list[Row]:
    row = Row("clock put back while it dumps (half of them killed, too)")
    control = lab.folder / "clock"
    set_clock(control, "+0")
    warm = Warm(lab.folder, **clocked(control))
    plain, lab.warm = lab.warm, warm
    try:
        for i in lab.times(8):
            path, back = lab.place(), lab.rng.choice((1, 60, 3600, 86_400, 10 * 31_536_000))
            set_clock(control, "+0")
            run = warm.dump(lab.text, path)
            wait_for_a_moment_in(lab.moment(), run, path, lab.reference, lab.rng)
            set_clock(control, f"-{back}")
            row.times += 1
            if i % 2:
                run.kill()
                run.wait()
                shift_times(path, back)  # what was written before is of the future now
                lab.ask(row, path)
            elif run.wait() != 0:
                lab.hear(row, run, path)
            lab.ask(row, path)
            lab.mend(row, path, kept=committed(path))
    finally:
        lab.warm = plain
        warm.close()
    return [row]


# -- object stores --------------------------------------------------------------------------------


@fault
def object_store(lab: Lab) -> list[Row]:
    """Whole dumps and questions through a proxy that fails; then killed, then without a bucket."""
    local = lab.place()
    assert lab.warm.dump(lab.text, local, *S3_JOB).wait() == 0
    right, expected = tree_digests(local), questions.expected(local)
    with s3_server() as server:
        settings = s3_settings()

        def dump(url: str) -> Run:
            return lab.warm.dump(lab.text, url, *S3_JOB, env=settings)

        def whole(row: Row, url: str) -> None:
            server.kind = "none"
            run = dump(url)
            if run.wait() != 0:
                row.details.append(f"not mended: {run.stderr[-600:]}")
            lab.compare(row, digests_of(objects(url)), right)

        def ask(row: Row, url: str) -> None:
            lab.ask(row, url, expected=expected, env=settings)

        rows = []
        for kind, every, name in (
            ("500", 4, "S3: status 500"),
            ("dropped", 4, "S3: connection dropped"),
            ("slow", 12, "S3: slow answers (0.2 s)"),
        ):
            row = Row(name)
            server.injected[kind] = 0
            for _ in lab.times(1):
                url = f"s3://runs/{lab.place().name}"
                server.kind, server.every = kind, every
                run = dump(url)
                if run.wait() != 0:
                    lab.hear(row, run, url)
                ask(row, url)
                row.times = server.injected[kind]
                whole(row, url)
            if not row.said:
                row.say("tried again, with longer and longer pauses; nothing to report")
            rows.append(row)
        rows += [_killed_at_s3(lab, dump, ask, whole), _bucket_gone(lab, server, dump, ask, whole)]
    return rows


def _killed_at_s3(lab: Lab, dump: Any, ask: Any, whole: Any) -> Row:
    row = Row("S3: SIGKILL at a random moment")
    for _ in lab.until(row, 5):
        url = f"s3://runs/{lab.place().name}"
        run = dump(url)
        time.sleep(lab.rng.uniform(0.2, 1.6))
        run.kill()
        if run.wait() == 0:
            continue
        row.times += 1
        ask(row, url)
        whole(row, url)
    return row


def _bucket_gone(lab: Lab, server: type[Faults], dump: Any, ask: Any, whole: Any) -> Row:
    row = Row("S3: the bucket vanishes (and comes back)")
    for _ in lab.until(row, 5):
        url = f"s3://runs/{lab.place().name}"
        run = dump(url)
        time.sleep(lab.rng.uniform(0.2, 1.6))
        server.kind, server.every = "gone", 1
        if run.wait() == 0:
            server.kind = "none"
            continue
        row.times += 1
        lab.hear(row, run, url)
        ask(row, url)
        server.kind = "none"
        ask(row, url)
        whole(row, url)
    return row


def digests_of(found: Mapping[str, bytes]) -> dict[str, str]:
    return {key: sha256(data).hexdigest() for key, data in found.items()}


# -- the table ------------------------------------------------------------------------------------


def run_all(folder: Path, seed: int, share: float, only: str = "") -> list[Row]:
    """Inject every fault; gives the rows, each printed to stderr as it is known."""
    lab, rows = Lab(folder, seed, share), []
    try:
        for inject in FAULTS:
            if only in inject.__name__:
                began = time.perf_counter()
                for row in inject(lab):
                    rows.append(row)
                    print("|".join(row.cells()), file=sys.stderr)
                    for line in row.details:
                        print("   ", line, file=sys.stderr)
                print(f"    {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    finally:
        lab.warm.close()
    return rows


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    heads = ("fault", "times injected", "data lost", "wrong answers", "how it was reported")
    lines = [heads, ("---",) * len(heads), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_into(page: Path, made: str) -> None:
    """Put the table between its marks in a page; a page without marks gets a section."""
    text = page.read_text() if page.exists() else "# Scaling\n"
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n{SECTION}\n\n{BEGIN}\n{END}\n"
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    page.write_text(f"{head}{BEGIN}\n{made}\n{END}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the usual number of times")
    parser.add_argument("--only", default="", help="faults whose function has this in its name")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="actstore-faults-") as made:
        rows = run_all(Path(made), asked.seed, asked.share, asked.only)
    print(table(rows))
    if asked.write:
        write_into(PAGE, table(rows))
    bad = [row.fault for row in rows if not row.is_well]
    sys.exit(f"not as it should be: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
