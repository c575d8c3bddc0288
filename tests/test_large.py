"""Distribution queries over a store that memory cannot hold, against numpy piece by piece."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xarray as xr
from helpers import bare_corpus
from scipy import stats
from test_distributions import reference_peak

import actstore
from actstore.plan import Plan, StageSpec
from actstore.writer import Writer

LAYERS, TOKENS, WIDTH = 2, 122_880, 3072  # 3.02 GB of float32
PIECE = 4096
LIMIT = 1_500_000_000
"""Bytes that the process that asks may hold, libraries and all: half of the store."""

FEW = [0, 1, 2, 3, 4, 5, 17, 1500, 3071]
"""Neurons that are compared one by one, all kinds among them."""

STEP, REACH = 8, 48  # edges k / 8 from -6 to 6: what falls where is exact in float32
EDGES = np.arange(-REACH, REACH + 1) / STEP
Q = (0, 0.01, 0.5, 0.975, 1)
HEIGHT = 0.02

QUERIES: dict[str, tuple[str, dict[str, Any]]] = {
    "layer histogram": ("histogram", {"bins": EDGES.tolist()}),
    "layer range": ("histogram", {"bins": 64}),
    "neuron histogram": ("histogram", {"bins": 50, "per": "neuron"}),
    "layer quantiles": ("quantiles", {"q": Q}),
    "neuron quantiles": ("quantiles", {"q": Q, "per": "neuron"}),
    "neuron moments": ("moments", {}),
    "layer moments": ("moments", {"per": "layer"}),
    "zeroness": ("zeroness", {"threshold": 0.5}),
    "peaks": ("peaks", {"height": HEIGHT}),
    "neuron normality": ("normality", {}),
    "top_tokens": ("top_tokens", {"k": 20}),
    "mean_activation": ("mean_activation", {}),
    "tokens": ("sample", {"n": 500}),
    "values": ("sample", {"n": 5000, "unit": "value"}),
}

CHILD = """
import json, sys, time
import actstore
path, out, queries = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
store = actstore.open(path)
seconds = {}
for label, (name, options) in queries.items():
    start = time.perf_counter()
    query = getattr(actstore, name)(store, **options)
    assert query.attrs["source"] == "scan"
    actstore.save(query, f"{out}/{label}.nc")
    seconds[label] = round(time.perf_counter() - start, 1)
# Not getrusage: it counts what the process that started this one held.
peak = next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM:"))
print(json.dumps([1024 * int(peak), seconds]))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is from /proc"),
]


def make(layer: int, number: int, like: np.ndarray) -> np.ndarray:
    """A piece of a layer: normal values of many widths, and neurons unlike the others."""
    x = np.random.default_rng([layer, number]).standard_normal((PIECE, WIDTH), np.float32)
    x *= like
    x[:, 0] = 3000 + 10 * x[:, 0]
    x[:, 1] -= 5
    x[:, 2] = 0.1
    x[:, 3] = 0
    x[:, 4] = np.maximum(x[:, 4], 0)
    x[::1000, 5] *= 100
    return x


def pieces(layer: int) -> Iterator[np.ndarray]:
    like = np.random.default_rng(layer).lognormal(0, 0.7, WIDTH).astype(np.float32)
    for number in range(TOKENS // PIECE):
        yield make(layer, number, like)


class Layer:
    """What plain numpy makes of one layer, a piece at a time."""

    def __init__(self) -> None:
        self.columns = np.empty((TOKENS, len(FEW)), np.float32)
        self.counts = np.zeros(2 * REACH + 2, np.int64)
        self.low, self.high = np.inf, -np.inf
        self.shift = np.zeros(WIDTH)
        self.sums = np.zeros((2, WIDTH))
        self.zeros = self.positives = self.seen = 0

    def add(self, x: np.ndarray) -> None:
        if not self.seen:
            self.shift = x.mean(0, dtype=np.float64)
        self.columns[self.seen : self.seen + len(x)] = x[:, FEW]
        self.seen += len(x)
        bins = np.clip(np.floor(x * STEP), -REACH - 1, REACH).astype(np.int16) + REACH + 1
        bins[x == REACH / STEP] -= 1  # the last bin is closed on both sides
        self.counts += np.bincount(bins.ravel(), minlength=2 * REACH + 2)
        self.low, self.high = min(self.low, x.min()), max(self.high, x.max())
        self.zeros += np.count_nonzero(x == 0)
        self.positives += np.count_nonzero(x > 0)
        away = x - self.shift
        self.sums += away.sum(0), np.einsum("tn,tn->n", away, away)

    def describe(self) -> None:
        """Mean and std of each neuron, and of all values together."""
        off = self.sums[0] / TOKENS
        squares = self.sums[1] - TOKENS * off**2
        self.mean, self.std = self.shift + off, np.sqrt(squares / (TOKENS - 1))
        total = TOKENS * WIDTH
        between = TOKENS * ((self.mean - self.mean.mean()) ** 2).sum()
        self.layer_mean = self.mean.mean()
        self.layer_std = np.sqrt((squares.sum() + between) / (total - 1))


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The answers of a process of its own, the most memory it held, and what they should be."""
    with tempfile.TemporaryDirectory(dir=tmp_path_factory.mktemp("large")) as folder:
        path = Path(folder) / "run.zarr"
        right = [Layer() for _ in range(LAYERS)]
        plan = Plan.build(
            bare_corpus([1024] * (TOKENS // 1024)),
            [StageSpec("mlp_post", tuple(range(LAYERS)), WIDTH)],
            buffer="256MiB",
            sketch=False,
        )
        with Writer(path, plan) as writer:
            for number, both in enumerate(zip(*map(pieces, range(LAYERS)), strict=True)):
                for layer, x in enumerate(both):
                    writer.put("mlp_post", layer, number * PIECE, x)
                    right[layer].add(x)
        store = actstore.open(path)
        assert store.info()["stages"]["mlp_post"]["nbytes"] > 3e9
        for one in right:
            one.describe()
        command = [sys.executable, "-c", CHILD, str(path), folder, json.dumps(QUERIES)]
        out = subprocess.run(command, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        peak, seconds = json.loads(out.stdout)
        print(f"{peak / 1e6:,.0f} MB;", seconds)
        found = {}
        for label in QUERIES:
            with xr.open_dataset(f"{folder}/{label}.nc") as opened:
                found[label] = opened.load()
        yield SimpleNamespace(found=found, right=right, peak=peak)


def test_memory(asked: SimpleNamespace) -> None:
    """It cannot have held the store."""
    assert asked.peak < LIMIT


def test_layers(asked: SimpleNamespace) -> None:
    """Histograms and moments of all values of a layer."""
    total = TOKENS * WIDTH
    for i, right in enumerate(asked.right):
        counted = asked.found["layer histogram"].isel(layer=i)
        below, *counts, above = right.counts.tolist()
        assert counted["counts"].values.tolist() == counts
        assert (counted["below"], counted["above"], counted["nonfinite"]) == (below, above, 0)
        ranged = asked.found["layer range"].isel(layer=i)
        assert ranged["edges"].values[[0, -1]].tolist() == [right.low, right.high]
        assert ranged["counts"].sum() == total
        moments = asked.found["layer moments"].isel(layer=i)
        assert moments["count"] == total
        assert (moments["min"], moments["max"]) == (right.low, right.high)
        assert moments["zero_fraction"] == right.zeros / total
        assert moments["positive_fraction"] == right.positives / total
        assert np.isclose(moments["mean"], right.layer_mean, atol=1e-6 * right.layer_std)
        assert np.isclose(moments["std"], right.layer_std, rtol=1e-6)


def test_quantiles_of_layers(asked: SimpleNamespace) -> None:
    """The values of the ranks on either side, found by counting the pieces once more."""
    total = TOKENS * WIDTH
    for layer in range(LAYERS):
        values = asked.found["layer quantiles"]["quantile"].values[layer]
        below, upto = np.zeros((2, len(Q)), np.int64)
        lower, upper = np.full(len(Q), -np.inf), np.full(len(Q), np.inf)
        for x in pieces(layer):
            for k, value in enumerate(values):
                less, more = x <= value, x >= value
                below[k] += x.size - np.count_nonzero(more)
                upto[k] += np.count_nonzero(less)
                lower[k] = max(lower[k], x.max(where=less, initial=-np.inf))
                upper[k] = min(upper[k], x.min(where=more, initial=np.inf))
        for k, q in enumerate(Q):
            rank, between = divmod(q * (total - 1), 1)
            if lower[k] == upper[k]:
                assert below[k] <= rank < upto[k]
            else:  # between two values, which are neighbours
                assert below[k] == upto[k] == rank + 1
                step = between * (upper[k] - lower[k])
                assert np.isclose(values[k], lower[k] + step, rtol=1e-12)


def test_moments_of_all_neurons(asked: SimpleNamespace) -> None:
    for i, right in enumerate(asked.right):
        moments = asked.found["neuron moments"].isel(layer=i)
        assert (moments["count"] == TOKENS).all()
        spread = np.maximum(right.std, 1e-6)
        for found in (moments, asked.found["mean_activation"].isel(layer=i)):
            assert (np.abs(found["mean"] - right.mean) <= 1e-6 * spread).all()
        assert np.allclose(moments["std"], right.std, rtol=1e-6, atol=1e-7)
        for j, neuron in enumerate(FEW):
            x, got = right.columns[:, j].astype(np.float64), moments.isel(neuron=neuron)
            assert (got["min"], got["max"]) == (x.min(), x.max())
            assert got["zero_fraction"] == (x == 0).mean()
            assert got["positive_fraction"] == (x > 0).mean()


def test_neurons(asked: SimpleNamespace) -> None:
    """A few neurons, by numpy and scipy on the whole column."""
    grid = np.linspace(-5, 5, 201)
    for i, right in enumerate(asked.right):
        for j, neuron in enumerate(FEW):
            x = right.columns[:, j].astype(np.float64)
            got = {
                k: v.isel(layer=i, neuron=neuron)
                for k, v in asked.found.items()
                if "neuron" in v.dims and "sample" not in v.dims
            }
            counts, edges = np.histogram(x, 50)
            assert got["neuron histogram"]["counts"].values.tolist() == counts.tolist()
            assert np.array_equal(got["neuron histogram"]["edges"], edges)
            assert np.array_equal(got["neuron quantiles"]["quantile"], np.quantile(x, Q))
            near = (np.abs(x) / right.std.mean() < 0.5).sum()
            with np.errstate(divide="ignore"):
                score = near / (TOKENS - near)
            assert np.isclose(got["zeroness"]["score"], score, rtol=1e-4)
            assert got["zeroness"]["zeroed"] == (score > 1)
            peak = reference_peak(x, HEIGHT * TOKENS)
            assert got["peaks"]["n_peaks"] == peak["n_peaks"]
            for name in ("position", "run_low", "run_high"):
                assert got["peaks"][name] == peak[name]
            order = np.argsort(-x, kind="stable")[:20]
            assert got["top_tokens"]["token"].values.tolist() == order.tolist()
            assert np.array_equal(got["top_tokens"]["value"], x[order])
            normal = got["neuron normality"]
            if x.min() == x.max():
                assert np.isnan(normal["distance"]) and np.isnan(normal["skewness"])
                continue
            below = np.searchsorted(np.sort(x), x.mean() + x.std(ddof=1) * grid) / TOKENS
            distance = np.abs(below - stats.norm.cdf(grid)).max()
            assert np.isclose(normal["distance"], distance, atol=1e-4)
            assert np.isclose(normal["skewness"], stats.skew(x), rtol=1e-5, atol=1e-6)
            assert np.isclose(normal["kurtosis"], stats.kurtosis(x), rtol=1e-5, atol=1e-5)


def test_samples(asked: SimpleNamespace) -> None:
    tokens, values = asked.found["tokens"], asked.found["values"]
    assert len(np.unique(tokens["token"])) == 500
    assert (np.diff(tokens["token"]) > 0).all()
    place = {neuron: j for j, neuron in enumerate(FEW)}
    mine = np.isin(values["neuron"], FEW)
    assert mine.any()
    for i, right in enumerate(asked.right):
        rows = tokens["activation"].isel(layer=i, neuron=FEW)
        assert np.array_equal(rows, right.columns[tokens["token"]])
        columns = [place[n] for n in values["neuron"].values[mine].tolist()]
        found = values["activation"].values[i, mine]
        assert np.array_equal(found, right.columns[values["token"].values[mine], columns])
