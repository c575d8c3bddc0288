"""Pairs of more tokens than a matrix could hold; Ctrl-C; a store larger than memory's limit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import bare_corpus

import actstore
from actstore.corpus import label_column
from actstore.plan import Plan, StageSpec
from actstore.stats.information import pair_information, prepare
from actstore.writer import Writer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is from /proc"),
]

PEAK = """
peak = next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM:"))
"""


def write(path: Path, tokens: int, width: int, layers: int = 1, **labels: Any) -> None:
    """A store of normal values whose layers and tokens have something in common."""
    corpus = replace(bare_corpus([1000] * (tokens // 1000)), token_labels=labels)
    stages = [StageSpec("hidden", tuple(range(layers)), width)]
    plan = Plan.build(corpus, stages, buffer="64MiB", sketch=False)
    with Writer(path, plan) as writer:
        for start in range(0, tokens, 1000):
            rng = np.random.default_rng(start)
            common = rng.standard_normal((1000, width), np.float32)
            for layer in range(layers):
                own = rng.standard_normal((1000, width), np.float32)
                writer.put("hidden", layer, start, common + (1 + layer) * own)


def child(code: str, *arguments: str) -> Any:
    command = [sys.executable, "-c", code, *arguments]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


REDUCE = f"""
import json, sys, time
import actstore
store = actstore.open(sys.argv[1])
began = time.perf_counter()
result = actstore.compute(
    actstore.mutual_information(store, by="condition", reduce="histogram", reduce_bins=50)
)
seconds = time.perf_counter() - began
found = {{str(k): v.values.tolist() for k, v in result.data_vars.items()}}
{PEAK}
print(json.dumps([1024 * int(peak), seconds, found]))
"""


def test_ten_thousand_tokens_are_reduced_in_one_gigabyte(tmp_path: Path) -> None:
    """5,000 of each condition: 12.5 million pairs each, never held."""
    condition = ["internal", "terminal"] * 5000
    write(tmp_path / "a.zarr", 10_000, 1024, condition=label_column(condition))
    peak, seconds, found = child(REDUCE, str(tmp_path / "a.zarr"))
    print(f"{peak / 1e6:,.0f} MB, {seconds:.0f} s")
    assert peak < 1e9
    pairs = 5000 * 4999 / 2
    for name in ("mutual_information", "covariance"):
        assert np.shape(found[f"counts_{name}"]) == (1, 2, 50)
        np.testing.assert_array_equal(np.sum(found[f"counts_{name}"], -1), pairs)
    # Means of the first 200 tokens of a condition are near those of all.
    x = actstore.open(tmp_path / "a.zarr")["hidden"][0, :400:2].values
    own = prepare(x, 15, 5.0)
    some = pair_information(own, own, True)[0]
    mean = found["mean_mutual_information"][0][0]
    assert np.nanmean(some) == pytest.approx(mean, abs=0.01)


def test_ctrl_c_stops_it(tmp_path: Path) -> None:
    """What would take minutes is over within seconds, and says nothing strange."""
    write(tmp_path / "a.zarr", 30_000, 512)
    for options in (["--reduce", "histogram"], ["--tokens", "position < 300", "--null", "500"]):
        command = ["-m", "actstore_cli", "query", "mutual_information", str(tmp_path / "a.zarr")]
        running = subprocess.Popen(
            [sys.executable, *command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        time.sleep(12)
        assert running.poll() is None
        running.send_signal(signal.SIGINT)
        began = time.monotonic()
        try:
            _, errors = running.communicate(timeout=60)
        finally:
            running.kill()
        seconds = time.monotonic() - began
        print(f"{options[0]}: {seconds:.1f} s after SIGINT")
        assert running.returncode not in (0, -signal.SIGKILL)
        assert seconds < 15
        assert b"Traceback" not in errors


LAYERS = f"""
import json, sys, time
import actstore
store = actstore.open(sys.argv[1])
began = time.perf_counter()
result = actstore.compute(actstore.layer_covariance(store))
seconds = time.perf_counter() - began
{PEAK}
print(json.dumps([1024 * int(peak), seconds, result["covariance"].values.tolist()]))
"""


def test_layers_of_a_store_larger_than_the_limit(tmp_path: Path) -> None:
    """2.5 GB, by a process that holds a third of it at most."""
    tokens, width, layers = 100_000, 1024, 6
    path = tmp_path / "a.zarr"
    write(path, tokens, width, layers)
    assert actstore.open(path).info()["stages"]["hidden"]["nbytes"] > 2.4e9
    peak, seconds, found = child(LAYERS, str(path))
    print(f"{peak / 1e6:,.0f} MB, {seconds:.0f} s")
    assert peak < 0.8e9
    # Sums of products of all values, piece by piece.
    sums, products = np.zeros(layers), np.zeros((layers, layers))
    acts = actstore.open(path)["hidden"]
    for start in range(0, tokens, 2000):
        x = acts[:, start : start + 2000].values.reshape(layers, -1).astype(np.float64)
        sums += x.sum(1)
        products += x @ x.T
    n = tokens * width
    want = (products - np.outer(sums, sums) / n) / (n - 1)
    spread = np.sqrt(np.outer(np.diagonal(want), np.diagonal(want)))
    assert (np.abs(np.array(found) - want) < 1e-6 * spread).all()
