"""`actstore bench all`: every group gives numbers; missing peers and failures are said."""

import json
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import actstore_cli
import datasets
import numpy as np
import pytest
import torch
from actstore_cli.speed import groups, rounds
from actstore_cli.speed.dumping import WAYS, keep_all, plan_of
from actstore_cli.speed.passes import gpt2
from actstore_cli.speed.rounds import Reference, Row, compare, peer
from actstore_cli.speed.setting import Setting
from actstore_cli.speed.table import cells, markdown
from safetensors.torch import load_file

import actstore
from actstore.fill import fill

SMALL = (
    "--rounds 1 --tokens 128 --layers 2 --width 64 --gigabytes 0.05 --store-gigabytes 0.02 "
    "--shards 1000 --growth 512 --batches 8192 --device cpu"
)
QUICK = ["machine", "writer", "reading", "sketches", "histograms", "covariance", "open"]
LONG = ["dump", "ways", "information", "similarity", "loader", "growth"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in this process: exit status, output, messages."""

    def command(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["actstore", "bench", "all", *map(str, argv)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            actstore_cli.main()
        return int(stop.value.code or 0), *capfd.readouterr()

    return command


def test_every_group_is_run_here() -> None:
    assert sorted(QUICK + LONG) == sorted(groups.GROUPS)


def measured(run: Run, tmp_path: Path, names: list[str]) -> list[dict[str, Any]]:
    """Rows of some groups, each with finite numbers where it was measured."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    only = ["--only", ",".join(names), "--folder", scratch, "--json"]
    status, out, err = run(*only, *shlex.split(SMALL))
    assert status == 0, err
    assert list(scratch.iterdir()) == []
    document = json.loads(out)
    assert document["machine"]["cores"] > 0 and document["seconds"] > 0
    rows = document["rows"]
    assert list(dict.fromkeys(row["group"] for row in rows)) == names
    for row in rows:
        if row["seconds"] is None:  # there is no GPU, or no such peer, or no direct writing
            assert "no CUDA" in row["note"] or "not" in row["note"], row
            continue
        assert 0 < row["seconds"] < math.inf, row
        assert row["amount"] is None or row["amount"] > 0, row
        if row["its_seconds"] is None:
            assert row["group"] == "machine" or "not installed" in row["note"], row
            continue
        assert 0 < row["its_seconds"] < math.inf, row
        if row["low"] is not None:
            assert 0 < row["low"] <= row["ratio"] <= row["high"] < math.inf, row
        if row["target"] is not None:
            assert row["met"] is (row["ratio"] >= row["target"])
    (tmp_path / "speed.json").write_text(out)
    return rows


def test_quick_groups(run: Run, tmp_path: Path) -> None:
    rows = measured(run, tmp_path, QUICK)
    held = {row["against"] for row in rows if row["target"] is not None}
    assert {"plain files, synced", "np.fromfile of the same bytes"} <= held

    # The same results again, as a table and a picture.
    again = ["--results", tmp_path / "speed.json", "--only", "open,writer"]
    shown = [tmp_path / "speed.md", tmp_path / "speed.png"]
    status, out, _ = run(*again, "--markdown", shown[0], "--picture", shown[1])
    assert status == 0
    own = [row for row in rows if row["group"] in ("open", "writer")]
    assert out.count("\n") == len(own) + 1
    assert all(row["what"] in shown[0].read_text() for row in own)
    assert shown[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_long_groups(name: str, run: Run, tmp_path: Path) -> None:
    rows = measured(run, tmp_path, [name])
    assert all(row["ratio"] is not None or "not installed" in row["note"] for row in rows)
    if name == "growth":
        assert all(row["peak_bytes"] > 10**7 for row in rows)
    status, _, err = run("--results", tmp_path / "speed.json", "--picture", tmp_path / "speed.svg")
    assert status == 0, err
    assert (tmp_path / "speed.svg").stat().st_size > 1000


def test_the_other_ways_keep_what_a_dump_keeps(tmp_path: Path) -> None:
    model, _ = gpt2("float32", "cpu", 2, 64)
    plan, points = plan_of(model, 2048, sketch=False)
    assert len(plan.batches) == 2
    with actstore.Writer(tmp_path / "run.zarr", plan) as writer:
        fill(model, points, writer)
    store = actstore.open(tmp_path / "run.zarr")
    expected = {
        f"{stage}.{layer}": store[stage].sel(layer=layer).values
        for stage in store.stages
        for layer in (0, 1)
    }
    assert len(expected) == 8
    for name, (_, way) in WAYS.items():
        folder = tmp_path / name
        folder.mkdir()
        keep_all(model, plan, way(folder))
        found = READ[name](folder)
        assert found.keys() == expected.keys()
        for array, values in expected.items():
            np.testing.assert_array_equal(found[array], values, err_msg=f"{name}: {array}")


def _batches(files: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([np.asarray(own[name]) for own in files]) for name in files[0]}


def _npy(folder: Path) -> dict[str, np.ndarray]:
    names = {path.name.rsplit(".", 2)[0] for path in folder.iterdir()}
    return _batches([{n: np.load(folder / f"{n}.{b}.npy") for n in names} for b in (0, 1)])


def _arrow(folder: Path) -> dict[str, np.ndarray]:
    kept = datasets.Dataset.from_file(str(folder / "data.arrow")).with_format("numpy")
    return {name: kept[name][:] for name in kept.column_names}


READ: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    "torch.save of each batch": lambda f: _batches(
        [torch.load(f / f"{b}.pt", weights_only=True) for b in (0, 1)]
    ),
    "safetensors of each batch": lambda f: _batches(
        [load_file(f / f"{b}.safetensors") for b in (0, 1)]
    ),
    "np.save of each array": _npy,
    "HF datasets, ArrowWriter": _arrow,
}


def test_ratios_are_of_speeds_within_a_round() -> None:
    ours, its = iter([9.0, 1, 2, 4]), iter([9.0, 3, 2, 2])
    reference = Reference("plain", lambda: next(its))
    work = {"ours": (lambda: next(ours), {"plain": 1.0})}
    (row,) = compare("group", work, [reference], 3, amount=6, unit="GB")
    assert (row.seconds, row.its_seconds, row.ratio, row.low, row.high) == (2, 2, 1, 0.5, 3)
    assert row.met is True
    shown = cells(row.document())
    assert shown == ["ours", "3 GB/s", "plain", "3 GB/s", "1", "0.5 to 3", "1", ""]


def test_a_peer_that_is_not_installed_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> float:
        raise AssertionError("it is not here")

    absent = peer("no_such_module", "no-such-package", "a peer", never)
    (row,) = compare("group", {"ours": (lambda: 1.0, {"a peer": 3})}, [absent], 1)
    assert (row.seconds, row.its_seconds, row.ratio, row.met) == (1, None, None, None)
    assert "no-such-package is not installed: pip install" in row.note


def test_a_group_that_fails_leaves_the_others(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setting: Setting) -> list[Row]:
        raise OSError("the disk has gone")

    def sound(setting: Setting) -> list[Row]:
        return [rounds.limit("open", "a limit", lambda: 0.5, 1, 2.0, "GB")]

    monkeypatch.setitem(groups.GROUPS, "writer", broken)
    monkeypatch.setitem(groups.GROUPS, "open", sound)
    status, out, err = run("--only", "writer,open", "--json")
    first, second = json.loads(out)["rows"]
    assert status == 1 and "the disk has gone" in err
    assert first["failed"] and "the disk has gone" in first["note"]
    assert second["seconds"] == 0.5 and "4 GB/s" in markdown(json.loads(out))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "writer,openn"], "open"),
        (["--picture", "speed.gif"], ".png"),
        (["--results", "nothing.json"], "actstore bench all --json"),
    ],
)
def test_messages(argv: list[str], message: str, run: Run) -> None:
    status, out, err = run(*argv)
    assert status in (1, 2) and out == ""
    assert message in err and "Traceback" not in err
