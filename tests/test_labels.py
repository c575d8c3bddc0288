"""What neurons tell about a label, against scikit-learn and a plain loop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from helpers import bare_corpus, write_small
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import expected_mutual_information

import actstore
from actstore.errors import UnknownNameError, UsageError
from actstore.plan import Plan, StageSpec
from actstore.stats.labels import LabelCounts, shuffled_information, table_information
from actstore.writer import Writer


def binned(x: np.ndarray, bins: int, threshold: float) -> np.ndarray:
    """Bins of values by numpy's own, those far out in the first or last one."""
    x = x.astype(np.float64)
    low, high = x.min(), x.max()
    if threshold and len(x) > 1:
        low = max(low, x.mean() - threshold * x.std(ddof=1))
        high = min(high, x.mean() + threshold * x.std(ddof=1))
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)
    return np.searchsorted(edges[1:-1], x, side="right")


def reference(codes: np.ndarray, labels: np.ndarray, correct: bool = False) -> float:
    """Bits, by the plainest loop over the table."""
    n, found = len(codes), 0.0
    joint = {}
    for c, y in zip(codes.tolist(), labels.tolist(), strict=True):
        joint[c, y] = joint.get((c, y), 0) + 1
    for (c, y), count in joint.items():
        p, q = (codes == c).mean(), (labels == y).mean()
        found += count / n * np.log2(count / n / p / q)
    if correct:
        k = len(set(codes.tolist())) + len(set(labels.tolist())) - len(joint) - 1
        found += k / (2 * n * np.log(2))
    return found


def nasty(n: int = 400, d: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Neurons of all kinds, and labels that some of them tell."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(["comma", "stop", "colon"], n, p=[0.6, 0.38, 0.02])
    x = rng.normal(size=(n, d))
    x[:, 1] += 2 * (labels == "stop")
    x[:, 2] = np.where(labels == "colon", 500, 0) + rng.normal(size=n)  # large at a rare label
    x[:, 3] = 3000 + 10 * x[:, 3]
    x[:, 4] = 2.5
    x[:, 5] = np.round(x[:, 5])
    x[:, 6] = rng.integers(0, 16, n)
    x[:, 7] = np.where(labels == "comma", 1, -1)
    x[:, 8] = -x[:, 1]
    x[rng.integers(0, n, 3), 9] = 1e4
    return x.astype(np.float32), labels


def frame(x: np.ndarray, labels: np.ndarray) -> xr.DataArray:
    made = xr.DataArray(x, dims=("token", "neuron"), name="mlp_out")
    return made.assign_coords(mark=("token", labels))


@pytest.mark.parametrize(("bins", "threshold"), [(15, 5.0), (4, 0.0), (255, 2.0), (1, 5.0)])
def test_equals_the_loop_and_scikit_learn(bins: int, threshold: float) -> None:
    x, labels = nasty()
    asked: dict[str, Any] = {"label": "mark", "bins": bins, "outlier_threshold": threshold}
    plain = actstore.label_information(frame(x, labels), **asked).compute()
    corrected = actstore.label_information(
        frame(x, labels), correction="miller-madow", **asked
    ).compute()
    for j in range(x.shape[1]):
        codes = binned(x[:, j], bins, threshold)
        got = plain["information"].values[0, j]
        assert got == pytest.approx(reference(codes, labels), abs=1e-9)
        assert got == pytest.approx(mutual_info_score(codes, labels) / np.log(2), abs=1e-9)
        want = reference(codes, labels, correct=True)
        assert corrected["information"].values[0, j] == pytest.approx(want, abs=1e-9)
    p = np.unique(labels, return_counts=True)[1] / len(labels)
    assert plain["label_entropy"].item() == pytest.approx(-(p * np.log2(p)).sum(), abs=1e-12)


def test_what_tells_is_ranked_first() -> None:
    x, labels = nasty()
    result = actstore.label_information(frame(x, labels), label="mark", null=50).compute()
    rank = result["rank"].values[0]
    assert sorted(rank) == list(range(1, 13))
    order = np.argsort(-result["information"].values[0], kind="stable")
    np.testing.assert_array_equal(rank[order], np.arange(1, 13))
    assert rank[7] == 1 and {rank[1], rank[8]} == {2, 3}
    # Large at a label of 2 percent: an outlier, and yet it tells all there is to tell of it.
    own = (labels == "colon").mean()
    entropy = -own * np.log2(own) - (1 - own) * np.log2(1 - own)
    assert result["information"].values[0, 2] > 0.9 * entropy
    assert result["information"].values[0, 4] == 0
    best = actstore.label_information(frame(x, labels), label="mark", null=50, k=4).compute()
    assert best["information"].dims == ("layer", "rank")
    np.testing.assert_array_equal(best["neuron"].values[0], order[:4])
    for name in ("information", "null_mean", "null_std", "z"):
        np.testing.assert_array_equal(best[name].values[0], result[name].values[0, order[:4]])
    more = actstore.label_information(frame(x, labels), label="mark", k=20).compute()
    assert more["neuron"].values[0, 12:].tolist() == [-1] * 8
    assert np.isnan(more["information"].values[0, 12:]).all()


def test_the_null_is_that_of_shuffled_labels() -> None:
    """Beside shuffles by hand, and the expectation that scikit-learn computes exactly."""
    x, labels = nasty(200)
    result = actstore.label_information(frame(x, labels), label="mark", null=2000).compute()
    again = actstore.label_information(frame(x, labels), label="mark", null=2000).compute()
    assert again.identical(result)
    other = actstore.label_information(frame(x, labels), label="mark", null=2000, seed=1).compute()
    assert not other.identical(result)
    rng = np.random.default_rng(3)
    for j in (0, 3, 5, 7):
        codes = binned(x[:, j], 15, 5.0)
        table = np.zeros((15, 3), np.int64)
        values = {v: i for i, v in enumerate(np.unique(labels))}
        for c, y in zip(codes, labels, strict=True):
            table[c, values[y]] += 1
        exact = expected_mutual_information(table[table.any(1)], 200) / np.log(2)
        got, spread = (result[n].values[0, j] for n in ("null_mean", "null_std"))
        assert got == pytest.approx(exact, abs=5 * spread / np.sqrt(2000))
        shuffled = [reference(codes, rng.permutation(labels)) for _ in range(200)]
        assert spread == pytest.approx(np.std(shuffled, ddof=1), rel=0.25)
        z = (result["information"].values[0, j] - got) / spread
        assert result["z"].values[0, j] == pytest.approx(z)
    assert abs(result["z"].values[0, 0]) < 4 and result["z"].values[0, 7] > 30


def test_drawn_tables_keep_their_totals() -> None:
    from actstore.stats.labels import _draw

    counts = np.random.default_rng(0).integers(0, 9, (5, 6, 4))
    drawn = _draw(counts, 7, np.random.default_rng(1))
    assert (drawn >= 0).all()
    assert (drawn.sum(-1) == counts.sum(-1)).all() and (drawn.sum(-2) == counts.sum(-2)).all()
    mean, std = shuffled_information(np.zeros((2, 3, 2), int), 5, 0, True)
    assert np.isnan(mean).all() and np.isnan(std).all()


VALUES = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, 7.0, 100.0, -1e6, 1 / 3, 1e-30])


@settings(max_examples=150, deadline=None)
@given(
    x=arrays(np.float32, st.tuples(st.integers(2, 30), st.integers(1, 3)), elements=VALUES),
    bins=st.integers(1, 20),
    threshold=st.sampled_from([0.0, 1.0, 5.0]),
    data=st.data(),
)
def test_any_values(x: np.ndarray, bins: int, threshold: float, data: Any) -> None:
    labels = np.array(data.draw(st.lists(st.sampled_from("ab"), min_size=len(x), max_size=len(x))))
    labels[:2] = "a", "b"
    result = actstore.label_information(
        frame(x, labels), label="mark", bins=bins, outlier_threshold=threshold
    ).compute(scheduler="sync")
    for j in range(x.shape[1]):
        info = result["information"].values[0, j]
        assert -1e-12 <= info <= result["label_entropy"].item() + 1e-12
        if len(np.unique(x[:, j])) < 2 or threshold == 0:
            # Else the ends hang on the last digit of the mean, and ties may fall either way.
            want = reference(binned(x[:, j], bins, threshold), labels)
            assert info == pytest.approx(want, abs=1e-9)


def test_counts_leave_out_nan() -> None:
    x = np.float32([[1, np.nan], [2, 3], [np.inf, 4]])
    labels = np.array([0, 1, 1], np.int32)
    counts = LabelCounts(np.array([1.0, 3.0]), np.array([2.0, 4.0]), 2, labels, 2)
    made = counts.chunk(x, np.arange(3))["counts"]
    assert made.tolist() == [[[1, 0], [0, 2]], [[0, 1], [0, 1]]]
    assert np.isnan(table_information(np.zeros((1, 2, 2)), False))[0]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> actstore.Store:
    path = tmp_path_factory.mktemp("labels") / "small.zarr"
    write_small(path)
    return actstore.open(path)


def test_a_store(small: actstore.Store) -> None:
    """All stages, with sketches and without; groups; labels of texts and numbers."""
    result = actstore.label_information(small)
    assert result.attrs["passes"] == 1  # the moments are known
    tree = actstore.compute(result)
    assert set(tree.children) == {"hidden", "attn_z", "mlp_post", "mlp_out"}
    column = small.column("condition").decode()
    for stage, node in tree.children.items():
        values = small[stage].values.astype(np.float64)
        for i, j in ((0, 3), (1, 20)):
            want = reference(binned(values[i, :, j], 15, 5.0), column)
            assert node["information"].values[i, j] == pytest.approx(want, abs=1e-9)
    some = small.column("position") > 2
    text = small.column("token_text").decode()[some]
    one = actstore.label_information(
        small, stages="mlp_post", layers=1, tokens="position > 2", label="token_text", k=3
    ).compute()
    values = small["mlp_post"].sel(layer=1).values[some]
    best = int(one["neuron"][0, 0])
    want = reference(binned(values[:, best], 15, 5.0), text)
    assert one["information"].values[0, 0] == pytest.approx(want, abs=1e-9)
    groups = actstore.label_information(small, stages="hidden", by="play").compute()
    assert groups["information"].dims == ("layer", "play", "neuron")
    chosen = small.column("play").decode() == "Lear"
    values = small["hidden"].values[2, chosen, 5].astype(np.float64)
    want = reference(binned(values, 15, 5.0), column[chosen])
    got = groups["information"].sel(layer=2, play="Lear", neuron=5).item()
    assert got == pytest.approx(want, abs=1e-9)
    together = actstore.compute(
        actstore.label_information(small, stages="mlp_out", label="good"),
        actstore.moments(small, stages="mlp_out"),
    )
    assert together[0]["information"].notnull().all()


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"label": "condtion"}, UnknownNameError, "unknown column 'condtion'.*condition"),
        ({"tokens": "condition == 'internal'"}, UsageError, "is 'internal' for every token"),
        ({"bins": 0}, UsageError, "bins is 0: it must be from 1 to 255"),
        ({"null": 1}, UsageError, "null is 1: give 0, or at least 2 shuffles"),
        ({"k": 0}, UsageError, "k is 0: ask for at least one neuron"),
        ({"correction": "miller"}, UnknownNameError, "value of correction"),
    ],
)
def test_bad_questions(
    small: actstore.Store, asked: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        actstore.label_information(small, **asked)


def test_too_many_values() -> None:
    x = xr.DataArray(np.zeros((1200, 2), "f4"), dims=("token", "neuron"))
    x = x.assign_coords(n=("token", np.arange(1200)), few=("token", np.arange(1200) // 3))
    with pytest.raises(UsageError, match="n has 1,200 values among the tokens asked"):
        actstore.label_information(x, label="n")
    wide = xr.DataArray(np.zeros((1200, 9000), "f4"), dims=("token", "neuron"))
    wide = wide.assign_coords(few=("token", np.arange(1200) // 3))
    with pytest.raises(UsageError, match="9,000 neurons x 15 bins x 400 values of few are"):
        actstore.label_information(wide, label="few")


CHILD = """
import sys, actstore
store = actstore.open(sys.argv[1])
result = actstore.compute(actstore.label_information(store, label="even", null=20, k=5))
assert result["neuron"].values.tolist() == [[7, *result["neuron"].values[0, 1:]]]
print(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM:")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is from /proc")
def test_memory_does_not_grow_with_tokens(tmp_path: Path) -> None:
    """1.5 GB of activations in 700 MB, libraries and all."""
    from dataclasses import replace

    from actstore.corpus import label_column

    tokens, width = 122_880, 3072
    bare = bare_corpus([1024] * (tokens // 1024))
    even = np.random.default_rng(0).random(tokens) < 0.5
    corpus = replace(bare, token_labels={"even": label_column([bool(e) for e in even])})
    stages = [StageSpec("mlp_post", (0,), width)]
    plan = Plan.build(corpus, stages, buffer="256MiB", sketch=False)
    with Writer(tmp_path / "run.zarr", plan) as writer:
        for start in range(0, tokens, 4096):
            x = np.random.default_rng(start).standard_normal((4096, width), np.float32)
            x[:, 7] += even[start : start + 4096]
            writer.put("mlp_post", 0, start, x)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "run.zarr")]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    print(f"{int(out.stdout) / 1024:,.0f} MiB")
    assert int(out.stdout) * 1024 < 700e6
