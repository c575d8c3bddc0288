"""Hostile input for minutes: python tests/fuzz.py --minutes 3 --seed 0 [--page SCALING.md]

Every case is made from its number, given to a child process that may hold 1 GiB above what it
held once everything was imported and warm, and has a time limit. What is good is an answer, which
for damaged stores is that of the sound one, or an error of actstore.errors; all else is counted
and printed with the number of its case. `--page` writes the table into a page between its marks.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import select
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import psutil
from helpers import VOCABULARY, scratch, small_corpus

import actstore
from actstore.errors import ActstoreError, CorpusError

ROOM = 2**30
SECONDS = 20.0
GOOD = ("refused", "answered")
BAD = ("failed", "wrong", "over memory", "hung", "crashed")
_KEPT = contextlib.ExitStack()
MARKS = "<!-- tests/fuzz.py -->", "<!-- end -->"

Case = Callable[[int], str]


class WrongError(Exception):
    """An answer that looks right and is not."""


# -- what a user does with a stranger's store ------------------------------------------------------


def _values(store: Any) -> Any:
    return [np.asarray(store[stage][:, 3:70, ::5].values) for stage in store.stages]


def _columns(store: Any) -> Any:
    found = [store.column(name) for name in ("play", "year", "token_text", "length", "loss")]
    plain = [c.decode() if hasattr(c, "decode") else c for c in found]
    return [*plain, *(store.tokens[n].values for n in ("position", "condition", "input"))]


def _tables(store: Any) -> Any:
    return [store.inputs["token_id"].values, store.sequences["text"].values] + [
        v.values for v in (*store.predictions.values(), *store.outcomes.values())
    ]


def _result(result: Any) -> Any:
    computed = result.compute()
    nodes = computed.subtree if hasattr(computed, "subtree") else [computed]
    return [v.values for node in nodes for _, v in sorted(node.data_vars.items())]


def _hidden(store: Any) -> dict[str, Any]:
    return {"data": store, "stages": "hidden"}


ACTS: dict[str, Callable[[Any], Any]] = {
    "info": lambda s: (json.dumps(s.info()), repr(s), s._repr_html_(), None)[-1],
    "values": _values,
    "columns": _columns,
    "tables": _tables,
    "tree": lambda s: s.tree["mlp_post"]["activation"][0, :5].values,
    "decode": lambda s: [s.decode(i, 5, 2) for i in (0, 40, 146)],
    "moments by sketch": lambda s: _result(actstore.moments(**_hidden(s))),
    "moments by scan": lambda s: _result(actstore.moments(**_hidden(s), tokens="position > 1")),
    "histogram": lambda s: _result(actstore.histogram(**_hidden(s), bins=8)),
    "top_tokens": lambda s: _result(actstore.top_tokens(**_hidden(s), k=3)),
    "rsa": lambda s: _result(actstore.rsa(s, stages="mlp_post,mlp_out")),
    "by label": lambda s: _result(actstore.mean_activation(**_hidden(s), by="play")),
    "loss": lambda s: _result(actstore.mean_activation(**_hidden(s), tokens="loss > 0.5")),
}


BRIEFLY = ("info", "values", "columns", "tables", "decode", "moments by sketch", "top_tokens")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, np.ndarray):
        kind = a.dtype.kind == b.dtype.kind == "f"
        return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=kind))
    return bool(a == b)


class Stores:
    """A sound store, and its answers."""

    def __init__(self, folder: Path) -> None:
        self.sound, self.own, self.count = folder / "sound.zarr", folder / "case.zarr", 0
        hostile.make(self.sound)
        store = actstore.open(self.sound)
        self.answers = {name: act(store) for name, act in ACTS.items()}

    def fresh(self) -> Path:
        """A copy, in another place every time: what was read before is remembered by place."""
        shutil.rmtree(self.own, ignore_errors=True)
        self.count += 1
        self.own = self.own.with_name(f"case-{self.count}.zarr")
        shutil.copytree(self.sound, self.own, symlinks=True)
        return self.own

    def ask(self, acts: dict[str, Callable[[Any], Any]], truth: bool, what: str) -> Counter[str]:
        """Do all of it; an error of ours is a refusal of that one act."""
        seen: Counter[str] = Counter()
        try:
            store = actstore.open(self.own)
        except ActstoreError as error:
            _check_message(error)
            seen["refused"] += 1
            self._verify(seen)
            return seen
        for name, act in acts.items():
            try:
                answer = act(store)
            except ActstoreError as error:
                _check_message(error)
                seen["refused"] += 1
                continue
            if truth and not _same(self.answers[name], answer):
                raise WrongError(f"{name}: {what}")
            seen["answered"] += 1
        self._verify(seen)
        return seen

    def _verify(self, seen: Counter[str]) -> None:
        try:
            seen["found by verify"] = sum(p is not None for _, p in actstore.verify(self.own))
        except ActstoreError as error:
            _check_message(error)
            seen["found by verify"] += 1


def _check_message(error: ActstoreError) -> None:
    if not str(error).strip() or len(str(error)) > 5000:
        raise WrongError(
            f"a message of {len(str(error))} characters: {str(error)[:80]} ... {str(error)[-80:]}"
        )


def _outcome(seen: Counter[str]) -> str:
    return "refused" if seen["refused"] else "answered"


def stores_damaged(folder: Path) -> Case:
    stores = Stores(folder)

    def case(number: int) -> str:
        rng = random.Random(number)
        path = stores.fresh()
        what = "; ".join(hostile.damage(rng, path) for _ in range(rng.choice([1, 1, 2])))
        names = rng.sample(sorted(ACTS), 5)
        return _outcome(stores.ask({n: ACTS[n] for n in names}, True, what))

    return case


def stores_crafted(folder: Path) -> Case:
    stores = Stores(folder)

    def case(number: int) -> str:
        rng = random.Random(number)
        path = stores.fresh()
        what = hostile.craft(rng, path)
        names = rng.sample(sorted(ACTS), 5)
        return _outcome(stores.ask({n: ACTS[n] for n in names}, False, what))

    return case


def bombs(folder: Path) -> Case:
    """The hand-written ones, one after another; the acts that reach everything, of each."""
    stores = Stores(folder)
    names = list(hostile.BOMBS)

    def case(number: int) -> str:
        name = names[number % len(names)]
        hostile.BOMBS[name](stores.fresh())
        seen = stores.ask({n: ACTS[n] for n in BRIEFLY}, False, name)
        if not seen["refused"] and not seen["found by verify"]:
            raise WrongError(f"{name}: nothing was said of it")
        return _outcome(seen)

    return case


# -- expressions, records ------------------------------------------------------------------------


WORDS = [
    *"position play year score good offset special token_text condition loss `play` no".split(),  # noqa: SIM905
    *"and or not in == != < <= > >= ( ) [ ] , - 0 1 -1 0.5 1e308 1e999 true false 'Lear'".split(),  # noqa: SIM905
    *["9" * 20, "'a\\'b'", "`", "'", '"', ".", "=", "&", "|", "!", "~", "\\", "\0", "é", "𝔸", "\n"],
]


def expressions(_: Path) -> Case:
    columns = small_corpus().columns(VOCABULARY)
    count = len(columns["position"])

    def case(number: int) -> str:
        rng = random.Random(number)
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(0, 14)))
        kind = rng.randrange(12)
        if kind == 0:
            text = "".join(
                chr(rng.choice([rng.randrange(128), rng.randrange(0xD800)])) for _ in range(30)
            )
        elif kind == 1:
            depth = rng.choice([5, 40, 10_000, 49_000])
            text = "(" * depth + (text or "good") + ")" * depth
        elif kind == 2:
            text = (
                rng.choice(["not ", "good and ", "year < ", "- "]) * rng.choice([3, 9_000]) + "good"
            )
        elif kind == 3:
            text = (
                "token_id in ["
                + ",".join(str(rng.randrange(10 ** rng.choice([1, 30]))) for _ in range(5_000))
                + "]"
            )
        elif kind <= 6:
            column, other = rng.choices(["position", "year", "score", "offset", "token_id"], k=2)
            text = f"{column} {rng.choice(['<', '==', '>='])} {other} and not {text or 'good'}"
        try:
            mask = actstore.select.parse(text).evaluate(columns)
        except ActstoreError as error:
            _check_message(error)
            return "refused"
        if mask.shape != (count,) or mask.dtype != bool:
            raise WrongError(f"{text!r} gives {mask.dtype} {mask.shape}")
        return "answered"

    return case


LINES = [
    '{"text": "To be", "play": "Hamlet"}',
    '{"input_ids": [1, 2, 3], "year": 1603}',
    '{"input_ids": [4, 5], "mark": ["a", "b"], "attention_mask": [1, 0]}',
    '{"input_ids": [7], "x": {"y": [1]}, "score": null}',
    '{"input_ids": [2147483648, -1], "play": true}',
]


def records(folder: Path) -> Case:
    from actstore.corpus import build
    from actstore.records import read_records

    path = folder / "case.jsonl"

    def case(number: int) -> str:
        rng = random.Random(number)
        lines = [rng.choice(LINES) for _ in range(rng.randint(1, 6))]
        act = rng.randrange(8)
        if act <= 3:
            at = rng.randrange(len(lines))
            lines[at] = json.dumps(hostile.mutate_json(rng, json.loads(lines[at])))
        elif act == 4:
            lines[0] = hostile._nested(rng.choice([10, 100_000]))
        elif act == 5:
            lines[0] = '{"input_ids": [1], "n": ' + "9" * rng.choice([10, 5000, 10**6]) + "}"
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
        if act >= 5:
            data = hostile.mutate_bytes(rng, data)
        path.write_bytes(data)
        if act == 7:
            path.rename(path.with_suffix(".txt"))
        try:
            source = path.with_suffix(".txt") if act == 7 else path
            column = rng.choice([None, None, None, "text", "input_ids", "play"])
            corpus = build(read_records(source, column=None if act == 7 else column), None)
        except CorpusError as error:
            _check_message(error)
            return "refused"
        except ActstoreError as error:
            _check_message(error)
            return "refused"
        lengths = {len(v) for v in (corpus.special, corpus.keep, *corpus.token_labels.values())}
        if lengths != {len(corpus.token_ids)} or corpus.starts[-1] != len(corpus.token_ids):
            raise WrongError(repr(corpus))
        return "answered"

    return case


# -- parameters of queries, on the command line and over HTTP ----------------------------------


PARAMETERS = {
    "stages": ["hidden", "mlp_post", "hidden,mlp_post", "nothing", ""],
    "layers": ["0", "-1", "0,1", "0-1", "9", "0-99999999", "one", "1-0", "-99", "0-999999," * 30],
    "neurons": ["0", "0-3", "7,7", "-1", "99999", "x"],
    "tokens": ["position > 0", "play == 'Lear'", "loss > 1", "position", "((", "nothing > 0"],
    "by": ["play", "condition", "good", "nothing", "position", ".", "token"],
    "bins": [
        "10",
        "0",
        "-1",
        "999999999999",
        "nan",
        "1,2,3",
        "-5:5:11",
        "5:1:3",
        "0:1:1e9",
        "auto",
    ],
    "range": ["-1,1", "1,-1", "nan,1", "0", "inf,inf", "1e308,-1e308"],
    "quantiles": ["0.5", "0,1", "2", "-0.1", "nan", ""],
    "k": ["1", "0", "-3", "10000000000", "1.5", "nan"],
    "per": ["layer", "neuron", "token", "x"],
    "sample": ["5", "0", "-1", "99999999999"],
    "seed": ["0", "-1", "99999999999999999999999"],
    "metric": ["cosine", "correlation", "euclid", ""],
    "interval": ["true", "false", "1", "maybe"],
}


def _asked(rng: random.Random) -> tuple[str, dict[str, str]]:
    from actstore.queries.registry import QUERIES

    query = rng.choice(sorted(QUERIES))
    own = [p.name for p in QUERIES[query].parameters]
    asked: dict[str, str] = {}
    for _ in range(rng.randint(0, 4)):
        name = rng.choice([*own, *own, *PARAMETERS])
        text = rng.choice(PARAMETERS.get(name, ["1", "x", "", "nan", "-1", "0,0", "true"]))
        if rng.random() < 0.15:
            text = hostile.mutate_bytes(rng, text.encode()).decode("utf-8", "replace")
        asked[name] = text
    return query, asked


def http(folder: Path) -> Case:
    from serving import client

    path = folder / "small.zarr"
    hostile.make(path)
    asking = _KEPT.enter_context(client(path, jobs=1, seconds=SECONDS / 2))

    def case(number: int) -> str:
        rng = random.Random(number)
        query, asked = _asked(rng)
        asked |= {"format": rng.choice(["json", "csv", "nc", "x"])} if rng.random() < 0.3 else {}
        response = asking.get(f"/api/stores/small/{query}", params={**asked, "wait": "10"})
        if response.status_code >= 500 and response.json()["error"]["code"] == "internal":
            raise WrongError(f"{query} {asked}: {response.text[:500]}")
        return "answered" if response.status_code < 300 else "refused"

    return case


def command_line(folder: Path) -> Case:
    import actstore_cli
    import click

    path = folder / "small.zarr"
    hostile.make(path)

    def case(number: int) -> str:
        rng = random.Random(number)
        query, asked = _asked(rng)
        words = ["query", query, str(path), "--json"]
        for name, text in asked.items():
            words += [f"--{name.replace('_', '-')}={text}".replace("\0", "")]
        sys.argv = ["actstore", *words]
        out, status = io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            try:
                actstore_cli.main()
            except SystemExit as end:
                status = int(end.code or 0)
            except click.exceptions.Exit as end:
                status = end.exit_code
        if status not in (0, 1, 2):
            raise WrongError(f"{words}: exit status {status}")
        if status == 0:
            json.loads(out.getvalue())
        return "refused" if status else "answered"

    return case


TARGETS: dict[str, Callable[[Path], Case]] = {
    "stores, hand-written": bombs,
    "stores, damaged": stores_damaged,
    "stores, crafted": stores_crafted,
    "token expressions": expressions,
    "JSON lines": records,
    "command line": command_line,
    "HTTP": http,
}


# -- the child ---------------------------------------------------------------------------------


def child(target: str) -> None:
    """Answer case numbers on standard input, one line each."""
    talk = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with scratch() as folder:
        case = TARGETS[target](Path(folder))
        with contextlib.suppress(ActstoreError, WrongError, ValueError):
            for warm in range(3):
                case(10**9 + warm)
        if target != "HTTP":  # whose worker would inherit it; the parent watches in any case
            limit = _data_nbytes() + ROOM
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        print(json.dumps({"ready": True}), file=talk, flush=True)
        for line in sys.stdin:
            print(json.dumps(_answer(case, int(line))), file=talk, flush=True)


def _answer(case: Case, number: int) -> dict[str, str]:
    try:
        return {"outcome": case(number)}
    except WrongError as error:
        return {"outcome": "wrong", "why": str(error)}
    except MemoryError:
        return {"outcome": "over memory", "why": traceback.format_exc(limit=-6)}
    except BaseException:
        return {"outcome": "failed", "why": traceback.format_exc(limit=-12)}


def _data_nbytes() -> int:
    """Private writable memory, which the limit is on: what was asked for, touched or not."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmData:\s+(\d+)", status)[1])  # type: ignore[index]


# -- the parent ----------------------------------------------------------------------------------


class Child:
    """A watched process that answers cases of one target."""

    def __init__(self, target: str, command: list[str] | None = None) -> None:
        self.process = subprocess.Popen(
            command or [sys.executable, "-W", "ignore", __file__, "--child", target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"},
            text=True,
        )
        self._base = sys.maxsize - ROOM
        if self._line(300.0) != {"ready": True}:
            self.end()
            raise RuntimeError(f"the child of {target!r} does not start: try --case 0 of it")

        self._base = self._resident()

    def _line(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if select.select([self.process.stdout], [], [], 0.05)[0]:
                line = self.process.stdout.readline()
                return dict(json.loads(line)) if line else {"outcome": "crashed", "why": ""}
            if self._resident() > self._base + ROOM:
                return {"outcome": "over memory", "why": f"{self._resident():,} bytes"}
        return {"outcome": "hung", "why": f"no answer in {seconds} s"}

    def _resident(self) -> int:
        """Memory of the process and of those that it started."""
        family = [psutil.Process(self.process.pid)]
        with contextlib.suppress(psutil.NoSuchProcess):
            family += family[0].children(recursive=True)
        total = 0
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += member.memory_info().rss
        return total

    def ask(self, number: int, seconds: float = SECONDS) -> dict[str, str]:
        assert self.process.stdin is not None
        print(number, file=self.process.stdin, flush=True)
        answer = self._line(seconds)
        if answer["outcome"] == "crashed":
            answer["why"] = f"exit status {self.process.wait()}"
        if answer["outcome"] in ("hung", "crashed", "over memory"):
            self.end()
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def fuzz(
    target: str, numbers: Iterator[int], seconds: float, most: int | None = None
) -> Iterator[tuple[int, dict[str, str]]]:
    """Give cases to a child, and to the next one where it dies."""
    made: Child | None = None
    until = time.monotonic() + seconds
    try:
        for count, number in enumerate(numbers):
            if time.monotonic() > until or (most is not None and count >= most):
                return
            made = made or Child(target)
            if count == 0:
                until = time.monotonic() + seconds  # importing is not fuzzing
            answer = made.ask(number)
            yield number, answer
            if made.process.returncode is not None:
                made = None
    finally:
        if made is not None:
            made.end()


def table(counts: dict[str, Counter[str]]) -> str:
    names = ("inputs", *GOOD, *BAD)
    lines = [f"| target | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    for target, own in counts.items():
        cells = [own.total(), *(own[n] for n in names[1:])]
        lines.append(f"| {target} | {' | '.join(f'{n:,}' for n in cells)} |")
    return "\n".join(lines)


def write_page(page: Path, text: str) -> None:
    head, _, rest = page.read_text().partition(MARKS[0])
    tail = rest.partition(MARKS[1])[2]
    page.write_text(f"{head}{MARKS[0]}\n{text}\n{MARKS[1]}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", default=",".join(TARGETS), help="beginnings, separated by ;")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--case", type=int, help="one case, in this process")
    parser.add_argument("--child")
    given = parser.parse_args()
    if given.child:
        child(given.child)
        return
    chosen = [t for t in TARGETS if any(t.startswith(w) for w in re.split("[;,] ?", given.targets))]
    if given.case is not None:
        with scratch() as folder:
            print(TARGETS[chosen[0]](Path(folder))(given.case))
        return
    counts: dict[str, Counter[str]] = {}
    for target in chosen:
        counts[target] = Counter()
        whole = len(hostile.BOMBS) if target.endswith("hand-written") else None
        seconds = 600.0 if whole else given.minutes * 60 / max(1, len(chosen) - 1)
        numbers = iter(range(0 if whole else given.seed * 10**6, 10**9))
        for number, answer in fuzz(target, numbers, seconds, whole):
            counts[target][answer["outcome"]] += 1
            if answer["outcome"] not in GOOD:
                shown = list(hostile.BOMBS)[number] if whole else number
                print(
                    f"{target}, case {shown}: {answer['outcome']}: {answer['why']}", file=sys.stderr
                )
    text = table(counts)
    print(text)
    if given.page:
        how = f"`python tests/fuzz.py --minutes {given.minutes:g} --seed {given.seed}`:"
        write_page(given.page, f"{how}\n\n{text}")
    sys.exit(any(own[name] for own in counts.values() for name in BAD))


if __name__ == "__main__":
    main()
