"""The command line: what it prints where, exit statuses, messages, and that nothing is hidden."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import actstore_cli
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
import typer.main
from helpers import assert_same_tree, flip, prose, tree_digests

import actstore
import actstore.models
from actstore.queries.registry import QUERIES
from actstore.schema import MLP_STAGES
from actstore.storage import LocalStorage
from actstore.wire import to_csv, to_json

SMALL = ["--stages", "hidden,mlp_post", "--layers", "0,-1"]
JOB = [*SMALL, "--max-tokens", "900", "--buffer", "2MiB"]


@dataclass
class Result:
    """What a command left."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out, parse_constant=_not_strict)


def _not_strict(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


Command = Callable[..., Result]


@pytest.fixture
def command(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Command]:
    """Run the command line in this process, as `actstore ...` would."""
    monkeypatch.setattr(actstore.models, "load_model", _loaded(actstore.models.load_model))
    monkeypatch.setenv("COLUMNS", "120")
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    handler = signal.getsignal(signal.SIGTERM)

    def run(*argv: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["actstore", *map(str, argv)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            actstore_cli.main()
        out, err = capfd.readouterr()
        return Result(stop.value.code or 0, out, err)  # type: ignore[arg-type]

    yield run
    signal.signal(signal.SIGTERM, handler)


@cache
def _loaded(load: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but that the demo model is read once."""
    kept: dict[str, Any] = {}

    def load_model(name: str, **options: Any) -> Any:
        key = repr((name, sorted(options.items())))
        if name != "demo":
            return load(name, **options)
        return kept[key] if key in kept else kept.setdefault(key, load(name, **options))

    return load_model


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(prose(6_000))
    return path


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A store with several blocks, windows and labels."""
    path = tmp_path_factory.mktemp("book") / "book.zarr"
    model, tokenizer = actstore.load_model("demo", device="cpu")
    actstore.dump(
        model,
        tokenizer,
        [text.read_text()],
        path,
        stages=["hidden", "attn_z", *MLP_STAGES],
        buffer="4MiB",
        windows={"internal": ",", "terminal": "."},
        limit=12,
        name="demo",
    )
    assert len(list(path.glob("journal/p0*.json"))) >= 4
    return path


# -- help -----------------------------------------------------------------------------------------


def commands() -> dict[str, Any]:
    """Every command and group by what is typed to reach it."""
    found = {"actstore": typer.main.get_command(actstore_cli.app)}
    for name, entry in list(found.items()):
        found |= _within(name, entry)
    return found


def _within(name: str, entry: Any) -> dict[str, Any]:
    found = {}
    for child, inner in getattr(entry, "commands", {}).items():
        found[f"{name} {child}"] = inner
        found |= _within(f"{name} {child}", inner)
    return found


def test_there_are_commands() -> None:
    expected = {"actstore", *(f"actstore {c}" for c in ("plan", "dump", "info", "verify", "query"))}
    assert expected | {f"actstore query {q}" for q in QUERIES} <= set(commands())
    assert len(commands()) == len(list(_documented(actstore_cli.app)))


def _documented(app: typer.Typer) -> Iterator[Any]:
    """Commands and groups as they were registered: none is added behind Typer's back."""
    yield app
    yield from app.registered_commands
    for group in app.registered_groups:
        yield from _documented(group.typer_instance)


@pytest.mark.parametrize("name", commands())
def test_everything_is_documented(name: str) -> None:
    entry = commands()[name]
    assert entry.help and len(entry.help) > 10, "a command without help"
    assert entry.epilog and entry.epilog.startswith(f"Example: {name}"), "no example"
    for parameter in entry.params:
        assert getattr(parameter, "help", None), f"{parameter.name} without help"
        assert not parameter.hidden


@pytest.mark.parametrize("name", commands())
def test_help(name: str, command: Command) -> None:
    result = command(*name.split()[1:], "--help")
    assert result.status == 0 and result.err == ""
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.out).split())
    assert commands()[name].epilog.split("Example: ")[1] in shown
    for parameter in commands()[name].params:
        for option in parameter.opts:
            if option.startswith("--"):
                assert option in shown


def test_query_commands_have_the_parameters_of_the_registry() -> None:
    for query in QUERIES.values():
        entry = commands()[f"actstore query {query.name}"]
        beside = {"store", "as_json", "as_csv", "as_table", "out", "scheduler"}
        assert {p.name for p in entry.params} - beside == {p.name for p in query.parameters}


def test_nothing_asked(command: Command) -> None:
    for argv in ([], ["query"], ["bench"]):
        result = command(*argv)
        assert result.status in (0, 2) and "Usage" in result.out + result.err


EXAMPLES = [
    (name, entry.epilog.removeprefix("Example: "))
    for name, entry in commands().items()
    if not hasattr(entry, "commands")
    and not name.startswith(("actstore bench", "actstore serve", "actstore push", "actstore pull"))
]


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=[n for n, _ in EXAMPLES])
def test_examples_work(
    name: str,
    example: str,
    command: Command,
    book: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(text, "book.txt")
    argv = shlex.split(example)[1:]
    if argv[0] == "demo":
        argv = ["demo", str(tmp_path / "demo"), "--tokens", "600"]
    elif argv[0] == "import":
        own = {"blocks.0.mlp.hook_post": torch.ones(4, 16)}
        safetensors.torch.save_file(own, "acts.safetensors")
    elif argv[0] not in ("plan", "dump"):
        shutil.copytree(book, "book.zarr")
    result = command(*argv)
    assert result.status == 0, result.err
    assert "Traceback" not in result.err
    if argv[0] in ("plan", "info", "query"):
        assert result.out
    elif argv[0] != "demo":
        assert result.out == "" and result.err


def test_bench_of_a_moment(command: Command, tmp_path: Path) -> None:
    small = ["--tokens", "80", "--pairs", "1", "--layers", "1", "--width", "64"]
    argv = ["bench", "capture", "--shape", "ragged", "--json", "--folder", tmp_path]
    result = command(*argv, *small)
    assert result.status == 0, result.err
    assert result.json["rows"][0]["ratio"] > 0
    assert list(tmp_path.iterdir()) == []


# -- plan -----------------------------------------------------------------------------------------


def test_plan_writes_nothing_and_says_what_dump_does(
    command: Command, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run.zarr"
    result = command("plan", "demo", text, out, *JOB, "--json")
    assert result.status == 0 and result.err == ""
    assert list(tmp_path.iterdir()) == []
    facts = result.json
    light = command("plan", "demo", text, out, *JOB, "--json", "--no-weights").json
    assert light.pop("seconds") is None and facts.pop("seconds") > 0
    light.pop("free_bytes"), facts.pop("free_bytes")
    assert light == facts
    shown = command("plan", "demo", text, out, *JOB)
    assert shown.out.splitlines()[0].split("\t") == ["stage", "layers", "neurons", "type", "bytes"]
    assert f"{facts['blocks']:,} blocks of {facts['block_tokens']:,} tokens" in shown.err
    assert "note: blocks hold only" in shown.err
    assert list(tmp_path.iterdir()) == []

    done = command("dump", "demo", text, out, *JOB, "--json")
    assert done.status == 0
    shards = list(out.glob("*/activation/c.*"))
    assert len(shards) == facts["files"] and facts["tokens"] == 900 == done.json["tokens"]
    store = actstore.open(out)
    info = store.info()
    assert info["block_tokens"] == facts["block_tokens"]
    assert {s: (v["layers"], v["width"], v["nbytes"]) for s, v in info["stages"].items()} == {
        s: (v["layers"], v["width"], v["nbytes"]) for s, v in facts["stages"].items()
    }
    assert facts["nbytes"] <= sum(p.stat().st_size for p in shards) < 1.2 * facts["nbytes"]


# -- data on stdout, messages on stderr -----------------------------------------------------------


def test_dump_info_and_verify(command: Command, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    first = command("dump", "demo", text, out, *JOB)
    assert first.status == 0 and first.out == ""
    assert f"Next: actstore info {out}" in first.err
    assert "\x1b" not in first.err and "━" not in first.err  # no bars where nobody watches
    again = command("dump", "demo", text, out, *JOB, "--json")
    assert again.json["sealed"] and again.json["nbytes_written"] == 0
    assert "every byte of it is right: nothing to do" in again.err

    info = command("info", out)
    assert info.status == 0
    rows = [line.split("\t") for line in info.out.splitlines()]
    assert [r[:4] for r in rows] == [
        ["stage", "layers", "neurons", "type"],
        ["hidden", "0,6", "128", "float32"],
        ["mlp_post", "0,5", "512", "float32"],
    ]
    assert "900 tokens kept of" in info.err and "from demo (GPT2Model)" in info.err
    facts = command("info", out, "--json")
    assert facts.err == "" and facts.json == json.loads(json.dumps(actstore.open(out).info()))

    verify = command("verify", out)
    assert (verify.status, verify.out) == (0, "")
    assert re.search(r"\d+ objects, all as they were written", verify.err)
    result = command("verify", out, "--json").json
    assert result["problems"] == [] and result["objects"] > 20


def test_query_gives_what_python_gives(command: Command, book: Path) -> None:
    chosen = ["--stages", "mlp_pre,mlp_post", "--layers", "1,4-5", "--tokens", "position > 0"]
    keywords: dict[str, Any] = {
        "stages": "mlp_pre,mlp_post",
        "layers": "1,4-5",
        "tokens": "position > 0",
    }
    moments = actstore.compute(actstore.moments(str(book), per="layer", **keywords))
    answer = command("query", "moments", book, *chosen, "--per", "layer", "--json")
    assert answer.status == 0
    assert answer.json == json.loads(json.dumps(to_json(moments)))
    mean = answer.json["variables"]["mean"]
    data = actstore.open(book)["mlp_post"].sel(layer=[1, 4, 5])
    direct = data[:, data["position"].values > 0].astype("float64")
    assert np.array(mean["data"])[1] == pytest.approx(
        direct.mean(("token", "neuron")).values, rel=1e-7
    )

    bins = ["--bins=-2:2:9", "--by", "condition"]
    histogram = actstore.compute(
        actstore.histogram(
            str(book), bins=np.linspace(-2, 2, 9).tolist(), by="condition", **keywords
        )
    )
    answer = command("query", "histogram", book, *chosen, *bins, "--json")
    assert answer.status == 0
    assert answer.json == json.loads(json.dumps(to_json(histogram)))
    used = histogram.attrs["tokens_used"]
    total = sum(int(histogram[v].sum()) for v in ("counts", "below", "above", "nonfinite"))
    assert total == used * 512 * 3 * 2

    as_csv = command("query", "moments", book, *chosen, "--per", "layer", "--csv")
    assert as_csv.out == to_csv(moments)
    rows = list(csv.DictReader(io.StringIO(as_csv.out)))
    assert [(r["stage"], r["layer"]) for r in rows] == [
        (s, n) for s in ("mlp_pre", "mlp_post") for n in "145"
    ]
    table = command("query", "moments", book, *chosen, "--per", "layer")
    assert len(table.out.splitlines()) == 7 and table.out.startswith("stage\tlayer\t")
    assert f"{used:,} tokens (position > 0)" in table.err


def test_json_is_strict_where_values_are_undefined(command: Command, book: Path) -> None:
    only = ["--tokens", "input == 0", "--layers", "0", "--neurons", "0-3"]
    answer = command("query", "moments", book, *only, "--stages", "mlp_pre", "--json")
    data = answer.json["variables"]["variance"]["data"]
    assert np.array(data, dtype=object).ravel().tolist() == [None] * 4


# -- input ----------------------------------------------------------------------------------------


def test_standard_input_is_like_a_file(command: Command, text: Path, tmp_path: Path) -> None:
    a, b, c, d = (tmp_path / f"{n}.zarr" for n in "abcd")
    assert command("dump", "demo", text, a, *JOB).status == 0
    assert command("dump", "demo", "-", b, *JOB, stdin=text.read_bytes()).status == 0
    lines = [{"text": "Return None.", "kind": "x"}, {"input_ids": [5, 6, 7], "kind": "y"}]
    jsonl = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "lines.jsonl").write_text(jsonl)
    assert command("dump", "demo", tmp_path / "lines.jsonl", c, *SMALL, "--no-sketch").status == 0
    assert command("dump", "demo", "-", d, *SMALL, "--no-sketch", stdin=jsonl.encode()).status == 0
    assert_same_tree(a, b)
    assert_same_tree(c, d)
    store = actstore.open(c)
    assert set(store.tokens["kind"].values.tolist()) == {"x", "y"}


def test_windows_are_those_cut_by_hand(command: Command, text: Path, tmp_path: Path) -> None:
    _, tokenizer = actstore.load_model("demo", device="cpu")
    ids = tokenizer(text.read_text())["input_ids"]
    marks = [tokenizer.decode([i]) for i in ids]
    rows = []
    for label, mark in (("internal", ","), ("terminal", ".")):
        found = [i for i, t in enumerate(marks) if t.strip() == mark]
        found = [i for i in found if i >= 100 and i >= 8 and i + 4 < len(ids)]
        if label == "terminal":
            found = [
                i for i in found if not marks[i - 1][-1].isdigit() and not marks[i + 1][0].isdigit()
            ]
        rows += [{"input_ids": ids[i - 8 : i + 5], "kind": label} for i in found[:12]]
    rows.append({"input_ids": ids[:50], "kind": "one"})
    assert len(rows) > 20
    (tmp_path / "cut.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    options = [*SMALL, "--batch-tokens", "1", "--no-sketch"]
    windows = [
        *("--windows", "internal=,", "--windows", "terminal=.", "--not-beside-digits", "terminal"),
        *("--before", "8", "--after", "4", "--limit", "12", "--from-token", "100"),
        *("--plain", "one=50"),
    ]
    auto, hand, events = (tmp_path / f"{n}.zarr" for n in ("auto", "hand", "events"))
    assert command("dump", "demo", text, auto, *options, *windows).status == 0
    assert command("dump", "demo", tmp_path / "cut.jsonl", hand, *options).status == 0
    keep = ["--keep", "offset == 0"]
    assert command("dump", "demo", text, events, *options, *windows, *keep).status == 0
    a, b, c = actstore.open(auto), actstore.open(hand), actstore.open(events)
    assert a.tokens["condition"].values.tolist() == b.tokens["kind"].values.tolist()
    at = np.flatnonzero(a.tokens["offset"].values == 0)
    assert len(at) == len(rows) - 1
    for stage in a:
        assert (a[stage].values == b[stage].values).all()
        assert (c[stage].values == a[stage].values[:, at]).all()
    notes = json.loads(command("info", auto, "--json").out)["notes"]["windows"]
    assert notes["internal"]["used"] == notes["terminal"]["used"] == 12
    assert notes["internal"]["over_limit"] > 0


# -- what goes wrong: each has a status and a message, and none a traceback -----------------------


def refused(result: Result, status: int, *messages: str) -> None:
    assert "Traceback" not in result.err and "Error:" not in result.err, result.err
    assert result.status == status, result.err
    assert result.out == ""
    said = " ".join(result.err.split())
    for message in messages:
        assert message in said, said


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=64, bos_token_id=0
    )
    transformers.GPT2Model(config).save_pretrained(folder)
    return folder


def changed(tiny: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of the model with other weights."""
    shutil.copytree(tiny, folder)
    file = folder / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    change(weights)
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    return folder


IDS = "".join(json.dumps({"input_ids": [i % 60 for i in range(n)]}) + "\n" for n in range(1, 40))


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    path = tmp_path / "ids.jsonl"
    path.write_text(IDS)
    return path


def test_model_path_wrong(command: Command, ids: Path, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    wrong = tiny.with_name("tiny-gtp2")
    refused(command("dump", wrong, ids, out), 1, f"there is no folder '{wrong}'; did you mean")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(command("dump", empty, ids, out), 1, "the folder has no config.json (nothing)")
    refused(command("plan", ids, ids, out), 1, "is a file; give the folder it is in")
    (empty / "config.json").write_text('{"model_type": "gpt2"}')
    refused(command("dump", empty, ids, out), 1, "cannot load model")
    assert not out.exists()


def test_no_tokenizer_and_text_given(
    command: Command, tiny: Path, text: Path, tmp_path: Path
) -> None:
    for name in ("plan", "dump"):
        result = command(name, tiny, text, tmp_path / "run.zarr")
        refused(result, 2, f"{tiny} has no tokenizer")
    assert not (tmp_path / "run.zarr").exists()


def test_output_from_other_arguments(command: Command, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    assert command("dump", "demo", text, out, *JOB).status == 0
    before = tree_digests(out)
    other: list[tuple[list[str], str]] = [
        (["--layers", "0,1"], "capture.stages.mlp_post.layers: [0, 5] there, [0, 1] here"),
        (["--stages", "hidden"], "capture.stages.mlp_post.width: 512 there, absent here"),
        (["--dtype", "float16"], "capture.stages.hidden.dtype: float32 there, float16 here"),
        (["--max-tokens", "901"], "corpus.tokens: 900 there, 901 here"),
        (["--passes", "2"], "capture.passes: 1 there, 2 here"),
        (["--padding-side", "left"], "capture.padding_side: right there, left here"),
        (["--skip-first", "1"], "the input text, its labels or its selection (its digest differs)"),
        (["--model-dtype", "bfloat16"], "model.dtype: float32 there, bfloat16 here"),
        (["--no-sketch"], "sketch"),
    ]
    for options, difference in other[:-1]:
        result = command("dump", "demo", text, out, *JOB, *options)
        refused(result, 2, f"{out} was begun with other arguments:", difference)
        assert "Give the same ones to go on with it, or choose another output" in result.err
    assert_same_tree(out, before)


def test_output_that_is_something_else(command: Command, ids: Path, tiny: Path) -> None:
    refused(command("dump", tiny, ids, ids), 2, f"{ids} is a file: choose another output")
    folder = ids.with_name("folder")
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    refused(command("dump", tiny, ids, folder), 2, "exists and is not a store of actstore's")
    assert [p.name for p in folder.iterdir()] == ["thesis.tex"]
    beneath = ids / "run.zarr"
    refused(command("dump", tiny, ids, beneath), 1, f"cannot write to {beneath}: Not a directory")


def test_unknown_names(command: Command, ids: Path, tiny: Path, tmp_path: Path) -> None:
    job = ("dump", tiny, ids, tmp_path / "run.zarr")
    refused(
        command(*job, "--stages", "hidden,mlp_pots"),
        2,
        "unknown stage 'mlp_pots': did you mean 'mlp_post'? Known: hidden, resid_pre,",
    )
    refused(command(*job, "--layers", "0,5"), 2, "unknown layer 5. Known: 0, 1.")
    refused(command(*job, "--layers", "first"), 2, "'first' is not a number or a range")
    refused(command(*job, "--device", "abacus"), 2, "unknown device 'abacus'")
    refused(command(*job, "--stages", "x=h.{layer}.mpl"), 2, "did you mean 'mlp'?")
    refused(command(*job, "--buffer", "much"), 2, "size 'much' is not understood")
    refused(command(*job, "--buffer", "1kB"), 2, "raise --buffer, use --passes, or keep fewer")
    refused(command(*job, "--passes", "9"), 2, "passes is 9: it must be from 1 to 2")
    refused(command(*job, "--context", "65"), 2, "context 65 is more than the model's 64 positions")
    refused(command(*job, "--rank", "2", "--world-size", "2"), 2, "rank 2 is not below")
    refused(command(*job, "--keep", "position >"), 2, "position >")
    refused(command(*job, "--keep", "postion > 1"), 2, "did you mean 'position'?")
    refused(command(*job, "--keep", "position > 99"), 2, "no token is left to capture")
    assert not (tmp_path / "run.zarr").exists()


def test_rank_from_the_environment(
    command: Command, ids: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "first")
    result = command("dump", tiny, ids, tmp_path / "run.zarr")
    refused(result, 2, "the environment variable RANK is 'first'", "or --rank")


def test_input_that_cannot_be_used(command: Command, tiny: Path, tmp_path: Path) -> None:
    def dump(name: str, content: bytes, model: object = tiny, *options: str) -> Result:
        path = tmp_path / name
        path.write_bytes(content)
        return command("dump", model, path, tmp_path / "run.zarr", *options)

    good = b'{"input_ids": [1, 2]}\n'
    refused(dump("a.txt", b"", "demo"), 2, "the corpus is empty: 1 records read, 1 of them without")
    refused(dump("a.jsonl", b"\n\n"), 2, "the corpus is empty: 0 records read")
    refused(dump("b.jsonl", good + b"{'input_ids': [1]}\n"), 2, "b.jsonl, line 2 is not JSON")
    refused(dump("c.jsonl", good * 3 + b"[1, 2]\n"), 2, "c.jsonl, line 4 is a list, not an object")
    refused(dump("d.jsonl", good + b'{"ids": [1]}\n'), 2, "d.jsonl, line 2", "--column")
    beyond = b'{"input_ids": [3, 64]}\n'
    refused(dump("e.jsonl", good + beyond), 2, "e.jsonl, line 2", "64", "vocabulary")
    refused(dump("f.jsonl", b'{"input_ids": [3, -1]}\n'), 2, "f.jsonl, line 1", "-1")
    refused(dump("g.txt", b"na\xefve", "demo"), 2, "g.txt is not UTF-8: byte 0xef at offset 2")
    missing = ["--windows", "x=\u2603"]
    refused(dump("h.txt", b"plain text " * 9, "demo", *missing), 2, "no token of the input is")
    refused(dump("i.txt", b"text", "demo", "--split", "train"), 2, "is not a dataset")
    gone = tmp_path / "gone.txt"
    refused(command("dump", tiny, gone, tmp_path / "run.zarr"), 2, f"no input at {gone}")
    assert not (tmp_path / "run.zarr").exists()


def test_nan_in_the_weights(command: Command, ids: Path, tiny: Path, tmp_path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        name = next(k for k in weights if k.endswith("h.1.mlp.c_fc.bias"))
        weights[name][7] = torch.nan

    model, out = changed(tiny, tmp_path / "nan", change), tmp_path / "run.zarr"
    job = ("dump", model, ids, out, "--stages", "mlp_in,mlp_pre")
    refused(command(*job), 1, "stage mlp_pre, layer 1", "run again with --allow-nonfinite")
    assert command(*job, "--allow-nonfinite").status == 0
    values = actstore.open(out)["mlp_pre"].values
    assert np.isnan(values[1, :, 7]).all() and np.isnan(values).sum() == values.shape[1]
    assert command("verify", out).status == 0
    counts = command("query", "histogram", out, "--bins=-1:1:3", "--stages", "mlp_pre", "--json")
    nonfinite = counts.json["variables"]["nonfinite"]["data"]
    assert np.ravel(nonfinite).tolist() == [0, values.shape[1]]


def test_a_value_beyond_float16(command: Command, ids: Path, tiny: Path, tmp_path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        name = next(k for k in weights if k.endswith("h.0.mlp.c_proj.bias"))
        weights[name][3] = 7e4

    model, out = changed(tiny, tmp_path / "large", change), tmp_path / "run.zarr"
    result = command("dump", model, ids, out, "--dtype", "float16")
    refused(result, 1, "stage mlp_out, layer 0, do not fit float16", "--dtype bfloat16 or float32")


def test_disk_too_small(
    command: Command, ids: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalStorage, "free_bytes", lambda self: 1000)
    out = tmp_path / "run.zarr"
    refused(command("dump", tiny, ids, out), 1, "the dump needs 0.00 GB more", "free some")
    planned = command("plan", tiny, ids, out)
    assert planned.status == 1 and "are needed and 0 B are free" not in planned.err
    assert "1 kB are free there" in planned.err and planned.out.startswith("stage\t")
    assert not out.exists()


def test_opening_what_is_no_sealed_store(
    command: Command, ids: Path, tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run.zarr"
    job = ["dump", tiny, ids, out, "--buffer", "512KiB", "--no-sketch"]
    questions = (["info"], ["verify"], ["query", "moments"])

    def each(status: int, *messages: str) -> None:
        for question in questions:
            refused(command(*question, out), status, *messages)

    each(1, f"{out} does not exist.")
    out.mkdir()
    each(1, f"{out} is not a store: it has neither zarr.json nor a journal")
    out.rmdir()
    assert command(*job, "--rank", "0", "--world-size", "2").status == 0
    done = len(list(out.glob("journal/p0.b*.json")))
    total = command("plan", *job[1:], "--json").json["blocks"]
    assert 1 < done < total
    each(
        1,
        f"{out} is not finished: {done} of {total} blocks are complete.",
        "Run the same dump command again to go on",
    )
    assert command(*job).status == 0
    root = out / "zarr.json"
    sealed = root.read_text()
    root.write_text(sealed.replace('"format": 1,', '"format": 99,'))
    each(1, "has format 99 and this version reads up to 1: pip install -U actstore")
    root.write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    each(1, "is not a store of actstore's: its zarr.json has no such attribute")
    root.write_text(sealed[:-20])
    each(1, "is not a store of actstore's")
    root.write_text(sealed)
    assert command("verify", out).status == 0


def test_questions_that_cannot_be_asked(command: Command, book: Path) -> None:
    ask = ("query", "moments", book)
    refused(command(*ask, "--stages", "mlp_pst"), 2, "unknown stage 'mlp_pst': did you mean 'mlp_p")
    refused(command(*ask, "--layers", "17"), 2, "unknown layer 17")
    refused(command(*ask, "--tokens", "condition = 'x'"), 2, "condition")
    refused(command(*ask, "--tokens", "conditon == 'x'"), 2, "did you mean 'condition'?")
    refused(command(*ask, "--tokens", "position > 5000"), 2, "no token satisfies 'position > 5000'")
    refused(command(*ask, "--by", "colour"), 2, "unknown column 'colour'")
    bins = ("query", "histogram", book, "--stages", "hidden")
    refused(command(*bins, "--bins", "ten"), 2, "--bins 'ten' is not understood")
    refused(command(*bins, "--bins=1,0,2"), 2, "bins")
    for wrong in (["query", "momets", book], ["dmup"], ["info"], ["info", book, "--jsno"]):
        result = command(*wrong)
        assert result.status == 2 and result.out == "" and "Traceback" not in result.err


# -- damage, and its repair -----------------------------------------------------------------------


def damages(out: Path) -> dict[str, Callable[[], list[str]]]:
    """Ways to damage a store; each returns the keys that should be named."""
    activation = out / "mlp_post" / "activation"

    def a_flipped_byte() -> list[str]:
        flip(activation / "c.1.2.0", 1000)
        return ["mlp_post/activation/c.1.2.0"]

    def a_lost_shard() -> list[str]:
        (activation / "c.0.3.0").unlink()
        return ["mlp_post/activation/c.0.3.0"]

    def a_short_shard() -> list[str]:
        path = out / "hidden" / "activation" / "c.0.0.0"
        path.write_bytes(path.read_bytes()[:-1])
        return ["hidden/activation/c.0.0.0"]

    def two_swapped_shards() -> list[str]:
        first, second = activation / "c.0.0.0", activation / "c.0.1.0"
        first.rename(out / "x")
        second.rename(first)
        (out / "x").rename(second)
        return ["mlp_post/activation/c.0.0.0", "mlp_post/activation/c.0.1.0"]

    def a_wrong_label() -> list[str]:
        path = next(p for p in (out / "hidden" / "token_id").rglob("0") if p.is_file())
        flip(path, 20)
        return [str(path.relative_to(out))]

    def a_lost_record() -> list[str]:
        (out / "journal" / "p0.b00000001.json").unlink()
        return ["journal/p0.b00000001.json", "journal/manifest.json"]

    def a_wrong_sketch() -> list[str]:
        path = max(
            (p for p in (out / "sketch").rglob("c/**/*") if p.is_file()),
            key=lambda p: p.stat().st_size,
        )
        flip(path, 50)
        return [str(path.relative_to(out))]

    return {f.__name__: f for f in locals().values() if callable(f)}


def test_damage_is_named_and_repaired(command: Command, text: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.zarr", tmp_path / "run.zarr"
    assert command("dump", "demo", text, whole, *JOB).status == 0
    expected = tree_digests(whole)
    for name in damages(out):
        shutil.copytree(whole, out)
        keys = damages(out)[name]()
        result = command("verify", out)
        refused(result, 1, *(f"{key}: " for key in keys))
        objects = re.search(r"(\d+) of [\d,]+ objects are wrong: run the dump that", result.err)
        assert objects is not None and int(objects[1]) == len(keys), (name, result.err)
        answer = command("verify", out, "--json")
        assert answer.status == 1
        assert sorted(p["key"] for p in answer.json["problems"]) == sorted(keys), name
        repair = command("dump", "demo", text, out, *JOB, "--json")
        assert repair.status == 0, repair.err
        assert f"{out} is mended" in repair.err or "tokens, " in repair.err, name
        assert "nothing to do" not in repair.err, name
        assert_same_tree(out, expected)
        assert command("verify", out).status == 0
        shutil.rmtree(out)


# -- as processes ---------------------------------------------------------------------------------


def test_a_pipe_that_closes(book: Path) -> None:
    module = f"{shlex.quote(sys.executable)} -m actstore_cli"
    line = (
        f"{module} query moments {shlex.quote(str(book))} --csv | head -2; echo ${{PIPESTATUS[0]}}"
    )
    out = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = out.stdout.splitlines()
    assert len(lines) == 3 and lines[0].startswith("stage,layer")
    assert lines[2] in ("0", "1")
    assert "Traceback" not in out.stderr and "Broken" not in out.stderr


def test_help_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys, actstore_cli\n"
        "sys.argv = ['actstore', '--help']\n"
        "try:\n    actstore_cli.main()\n"
        "except SystemExit as stop:\n"
        "    print(stop.code or 0, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "0 False False"
