"""Mutual information and covariance against the plain double loop."""

from __future__ import annotations

import dask
import numpy as np
import pytest
import xarray as xr
from helpers import bare_corpus, plan_of, write_store
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import mutual_info_score

import actstore
from actstore.errors import UnknownNameError, UsageError
from actstore.plan import StageSpec
from actstore.queries import information
from actstore.stats.information import (
    copula_information,
    copula_ranks,
    covariances,
    pair_information,
    prepare,
)


def kept_of(x, y, threshold):
    if not threshold or len(x) < 2:
        return np.ones(len(x), bool)
    with np.errstate(invalid="ignore", divide="ignore"):
        zx, zy = ((v - v.mean()) / v.std(ddof=1) for v in (x, y))
    return ~((np.abs(zx) > threshold) | (np.abs(zy) > threshold))


def reference(x, y, bins=15, threshold=5.0):
    """MI in bits, covariance, and what the correction after Miller and Madow adds."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    keep = kept_of(x, y, threshold)
    x, y = x[keep], y[keep]
    p = np.histogram2d(x, y, bins=bins)[0] / len(x)
    px, py = p.sum(1), p.sum(0)

    def entropy(q):
        return -np.sum(q * np.log2(q + 1e-12))

    occupied = [np.count_nonzero(q) for q in (px, py, p)]
    correction = (occupied[0] + occupied[1] - occupied[2] - 1) / (2 * len(x) * np.log(2))
    covariance = ((x - x.mean()) * (y - y.mean())).sum() / (len(x) - 1)
    return entropy(px) + entropy(py) - entropy(p), covariance, correction


def nasty(n=60, d=1024, seed=0):
    """Massive dimensions, constants, duplicates, ties at edges, masks of their own."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * rng.lognormal(size=(n, 1))
    x[:, 3] = 300 * rng.normal(size=n)
    x[:, d // 2] = 3000 + 10 * rng.normal(size=n)
    x[5] = 2.5
    x[6] = 0
    x[8] = x[7]
    x[9] = -x[7]
    x[10] = np.round(x[10])
    x[11] = rng.integers(0, 16, d)
    x[12] = x[11] * 2
    for i in range(20, min(n, 40)):  # outliers of their own, which hold the ends of others
        x[i, rng.integers(0, d, 3)] = rng.choice([-1, 1], 3) * 50 * x[i].std()
    return x.astype("float32")


def test_equals_the_double_loop():
    x = nasty()
    made = prepare(x, 15, 5.0)
    information, samples, occupied = pair_information(made, made, True)
    covariance = covariances(made, made)
    again = 0
    for i in range(len(x)):
        for j in range(i + 1, len(x)):
            want, cov, correction = reference(x[i], x[j])
            assert information[i, j] == pytest.approx(want, abs=1e-9)
            scale = np.sqrt(abs(covariance[i, i] * covariance[j, j]))
            assert covariance[i, j] == pytest.approx(cov, abs=1e-6 * max(1, scale))
            keep = kept_of(x[i].astype("f8"), x[j].astype("f8"), 5.0)
            assert samples[i, j] == keep.sum()
            got = (occupied[i, j] - 1) / (2 * samples[i, j] * np.log(2))
            assert got == pytest.approx(correction, abs=1e-12)
            own = x[i][kept_of(x[i].astype("f8"), x[i].astype("f8"), 5.0)]
            again += np.ptp(x[i][keep]) != np.ptp(own)
    assert again > 20  # the bins of some pairs are not those of their vectors


VALUES = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, 7.0, 100.0, -1e6, 1 / 3, 1e-30])


@settings(max_examples=200, deadline=None)
@given(
    x=arrays(np.float64, st.tuples(st.integers(2, 4), st.integers(1, 40)), elements=VALUES),
    bins=st.integers(1, 20),
    threshold=st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]),
)
def test_any_vectors(x, bins, threshold):
    made = prepare(x, bins, threshold)
    information, samples, _ = pair_information(made, made, True)
    covariance = covariances(made, made)
    for i in range(len(x)):
        for j in range(i + 1, len(x)):
            n = kept_of(x[i], x[j], threshold).sum()
            assert samples[i, j] == n
            if n == 0:
                assert np.isnan(information[i, j])
                continue
            with np.errstate(invalid="ignore", divide="ignore"):
                want, cov, _ = reference(x[i], x[j], bins, threshold)
            assert information[i, j] == pytest.approx(want, abs=1e-9)
            if n > 1:
                scale = np.abs(x[[i, j]]).max() ** 2
                assert covariance[i, j] == pytest.approx(cov, abs=1e-9 * max(scale, 1))
            else:
                assert np.isnan(covariance[i, j])


def test_agrees_with_scikit_learn():
    x = nasty(20, 400)
    made = prepare(x, 15, 0)
    information = pair_information(made, made, True)[0]
    for i in range(20):
        for j in range(i + 1, 20):
            want = mutual_info_score(made.codes[i], made.codes[j]) / np.log(2)
            assert information[i, j] == pytest.approx(want, abs=1e-9)


def test_gaussian_copula():
    """Of bivariate normals it is -log2(1 - r^2) / 2, and 0 on average where there is nothing."""
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 200, 300))
    for r in (0.0, 0.5, 0.9):
        y = r * x + np.sqrt(1 - r**2) * noise
        a, b = copula_ranks(np.exp(x)), copula_ranks(y**3)  # any monotone function will do
        found = np.diagonal(copula_information(a, b))
        assert found.mean() == pytest.approx(-np.log2(1 - r**2) / 2, abs=0.005 + 0.03 * r)


# -- queries -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    plan = plan_of(
        bare_corpus([40, 60, 100]),
        [StageSpec("hidden", (0, 1, 2), 90), StageSpec("mlp_out", (0, 1), 90)],
        64,
    )
    values = {
        s.name: np.stack([nasty(200, 90, seed=i + 10 * k) for i in range(len(s.layers))])
        for k, s in enumerate(plan.stages)
    }
    path = tmp_path_factory.mktemp("information") / "a.zarr"
    write_store(path, plan, values)
    return actstore.open(path), values


def test_matrices(store):
    opened, values = store
    lazy = actstore.mutual_information(opened, layers="0,2", correction="miller-madow")
    assert lazy["mutual_information"].dims == ("stage", "layer", "token", "token_b")
    assert lazy["mutual_information"].chunks[2] == (128, 72)
    result = lazy.compute()
    rng = np.random.default_rng(0)
    for stage, layer in (("hidden", 0), ("hidden", 2), ("mlp_out", 0)):
        own = result.sel(stage=stage, layer=layer)
        matrix = own["mutual_information"].values
        np.testing.assert_array_equal(matrix, matrix.T)
        assert np.isnan(np.diagonal(matrix)).all()
        assert np.isnan(np.diagonal(own["covariance"])).all()
        for i, j in rng.integers(0, 200, (60, 2)):
            if i == j:
                continue
            x = values[stage][layer]
            want, cov, correction = reference(*(x[[i, j]] if i < j else x[[j, i]]))
            assert matrix[i, j] == pytest.approx(want + correction, abs=1e-9)
            assert own["covariance"][i, j].item() == pytest.approx(cov, rel=1e-6, abs=1e-6)
    assert np.isnan(result["mutual_information"].sel(stage="mlp_out", layer=2)).all()
    notebook = actstore.mutual_information(
        opened, layers=0, stages="hidden", tokens="sequence == 0", compat="notebook"
    ).compute()
    matrix = notebook["mutual_information"].values[0]
    assert (matrix[np.tril_indices(40)] == 0).all()
    want = reference(values["hidden"][0][3], values["hidden"][0][30])[0]
    assert matrix[3, 30] == pytest.approx(want, abs=1e-9)


def test_two_sets_of_tokens(store):
    opened, values = store
    result = actstore.mutual_information(
        opened, stages="hidden", layers=1, tokens="sequence == 0", tokens_b="sequence == 2"
    ).compute()
    assert result["mutual_information"].shape == (1, 40, 100)
    assert result["token_b"].values.tolist() == list(range(100, 200))
    want = reference(values["hidden"][1][20], values["hidden"][1][150])[0]
    assert result["mutual_information"][0, 20, 50].item() == pytest.approx(want, abs=1e-9)
    with pytest.raises(UsageError, match="use one"):
        actstore.mutual_information(opened, tokens_b="position > 0", by="sequence")


def test_groups_make_a_tree(store):
    opened, _ = store
    tree = actstore.mutual_information(opened, stages="hidden", layers=0, by="sequence").compute()
    assert [tree[k]["mutual_information"].shape for k in ("0", "1", "2")] == [
        (1, 40, 40),
        (1, 60, 60),
        (1, 100, 100),
    ]
    assert tree.attrs["query"] == "mutual_information"


def test_between_neurons(store):
    opened, values = store
    result = actstore.mutual_information(
        opened, stages="hidden", layers=1, axis="neuron", neurons="10-19"
    ).compute()
    assert result["mutual_information"].dims == ("layer", "neuron", "neuron_b")
    want, cov, _ = reference(values["hidden"][1][:, 12], values["hidden"][1][:, 17])
    own = result.sel(layer=1, neuron=12, neuron_b=17)
    assert own["mutual_information"].item() == pytest.approx(want, abs=1e-9)
    assert own["covariance"].item() == pytest.approx(cov, rel=1e-6)


def test_null(store):
    opened, values = store
    asked = {"stages": "hidden", "layers": 0, "tokens": "sequence == 1"}
    result = actstore.mutual_information(opened, null=20, **asked).compute()
    again = actstore.mutual_information(opened, null=20, **asked).compute()
    assert again.identical(result)
    x = values["hidden"][0][40:100]
    random = np.random.default_rng(0)
    shuffled = []
    for _ in range(20):
        order = random.permutation(90)
        keep = [kept_of(v.astype("f8"), v.astype("f8"), 5.0) for v in x[[3, 4]]]
        a, b = x[3].astype("f8"), x[4].astype("f8")[order]
        both = keep[0] & keep[1][order]
        shuffled.append(reference(a[both], b[both], threshold=0)[0])
    mean, std = np.mean(shuffled), np.std(shuffled, ddof=1)
    own = result.isel(layer=0, token=3, token_b=4)
    assert own["null_mean"].item() == pytest.approx(mean, abs=1e-9)
    assert own["null_std"].item() == pytest.approx(std, abs=1e-9)
    want = (reference(x[3], x[4])[0] - mean) / std
    assert own["z"].item() == pytest.approx(want, rel=1e-6)
    many = actstore.mutual_information(opened, null=2000, **asked)
    assert max(many["z"].chunks[1]) < 20  # no task takes long


def test_null_of_unrelated_vectors():
    """The estimate lies among those of shuffled vectors, far from 0."""
    acts = np.random.default_rng(5).normal(size=(40, 300)).astype("f4")
    frame = xr.DataArray(acts, dims=("token", "neuron"))
    result = actstore.mutual_information(frame, null=30).compute()
    z = (result["mutual_information"] - result["null_mean"]) / result["null_std"]
    own = z.values[0][np.triu_indices(40, 1)]
    assert abs(own.mean()) < 0.1 and 0.9 < own.std() < 1.2
    assert result["null_mean"].values[0][0, 1] > 0.2


@pytest.mark.parametrize("estimator", ["histogram", "gaussian-copula"])
def test_reduced(store, estimator):
    opened, _ = store
    asked = {"stages": "hidden", "layers": "0,1", "estimator": estimator}
    whole = actstore.mutual_information(opened, **asked).compute()
    i, j = np.triu_indices(200, 1)
    mean = actstore.compute(actstore.mutual_information(opened, reduce="mean", **asked))
    counted = actstore.compute(
        actstore.mutual_information(opened, reduce="histogram", reduce_bins=30, **asked)
    )
    joint = actstore.compute(
        actstore.mutual_information(opened, reduce="joint", reduce_bins=12, **asked)
    )
    for layer in (0, 1):
        own = whole.sel(layer=layer)
        flat = {n: own[n].values[i, j] for n in ("mutual_information", "covariance")}
        for name, values in flat.items():
            got = mean[f"mean_{name}"].sel(layer=layer).item()
            assert got == pytest.approx(values.mean(), rel=1e-9)
            counts, edges = np.histogram(values, 30)
            np.testing.assert_allclose(counted[f"edges_{name}"].sel(layer=layer), edges)
            np.testing.assert_array_equal(counted[f"counts_{name}"].sel(layer=layer), counts)
        both = np.histogram2d(flat["covariance"], flat["mutual_information"], 12)[0]
        np.testing.assert_array_equal(joint["counts"].sel(layer=layer), both)


@pytest.mark.parametrize("steps", [1, 10**6, 2**40])
def test_reduced_in_any_number_of_tasks(store, monkeypatch, steps):
    """Of tokens with themselves, of two sets, of neurons, and of groups one of which is empty."""
    opened, _ = store
    monkeypatch.setattr(information, "BLOCK", 32)
    monkeypatch.setattr(information, "_TASK_STEPS", steps)
    where = {"stages": "hidden", "layers": 2}
    for asked in (
        {"tokens": "sequence > 0"},
        {"tokens": "sequence == 0", "tokens_b": "sequence > 0"},
        {"axis": "neuron", "tokens": "sequence == 2"},
    ):
        lazy = actstore.mutual_information(opened, reduce="joint", reduce_bins=7, **asked, **where)
        tasks = [k for k in dict(lazy.__dask_graph__()) if str(k[0]).startswith("ends-")]
        assert len(tasks) == 1 or steps < 2**40
        reduced, whole = actstore.compute(
            lazy, actstore.pairs(actstore.mutual_information(opened, **asked, **where))
        )
        flat = [whole[n].values[0] for n in ("covariance", "mutual_information")]
        want = np.histogram2d(*flat, 7)
        np.testing.assert_array_equal(reduced["counts"][0], want[0])
        np.testing.assert_allclose(reduced["edges_covariance"][0], want[1], rtol=1e-12)
        np.testing.assert_allclose(reduced["mean_covariance"][0], flat[0].mean(), rtol=1e-9)
    groups = actstore.pairwise_covariance(
        opened, stages="hidden,mlp_out", by="sequence", tokens="sequence != 1", reduce="histogram"
    )
    groups = actstore.compute(groups)
    assert groups["counts_covariance"].dims == ("stage", "layer", "sequence", "bin_covariance")
    counted = groups["counts_covariance"].sum("bin_covariance")
    assert counted.sel(stage="mlp_out", layer=1, sequence=2).item() == 100 * 99 / 2
    assert np.isnan(groups["mean_covariance"].sel(sequence=1)).all()
    assert np.isnan(groups["mean_covariance"].sel(stage="mlp_out", layer=2)).all()


def test_nothing_is_computed_until_asked(store):
    def never(*_, **__):
        raise AssertionError("computed")

    with dask.config.set(scheduler=never):
        for reduce in (None, "mean", "histogram", "joint"):
            made = actstore.mutual_information(store[0], reduce=reduce, by="sequence")
            assert made.attrs["query"] == "mutual_information"
        actstore.layer_covariance(store[0])


def test_labels_of_tokens(store):
    """Which tokens the rows and columns are of, in words."""
    opened, _ = store
    one = actstore.mutual_information(opened, stages="hidden", tokens="sequence == 1")
    assert one["position"].dims == ("token",) and one["position"].values.tolist() == [*range(60)]
    two = actstore.mutual_information(
        opened, stages="hidden", tokens="sequence == 1", tokens_b="position == 5"
    )
    assert two["sequence_b"].dims == ("token_b",) and two["sequence_b"].values.tolist() == [0, 1, 2]


def test_covariance_alone(store):
    opened, _ = store
    asked = {"stages": "mlp_out", "tokens": "sequence < 2"}
    alone = actstore.pairwise_covariance(opened, **asked).compute()
    beside = actstore.mutual_information(opened, **asked).compute()
    xr.testing.assert_allclose(alone["covariance"], beside["covariance"])
    assert set(alone.data_vars) == {"covariance"}


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"bins": 0}, UsageError, "bins is 0: it must be from 1 to 255"),
        ({"null": 1}, UsageError, "at least 2 permutations"),
        ({"correction": "miller"}, UnknownNameError, "value of correction"),
        ({"estimator": "gaussian"}, UnknownNameError, "did you mean 'gaussian-copula'"),
        ({"axis": "layer"}, UnknownNameError, "value of axis"),
        ({"axis": "neuron", "tokens_b": "position > 0"}, UsageError, "leave it out"),
        ({"null": 5, "reduce": "mean"}, UsageError, "leave out reduce"),
        (
            {"correction": "miller-madow", "estimator": "gaussian-copula"},
            UsageError,
            "has its own",
        ),
        ({"reduce": "median"}, UnknownNameError, "value of reduce"),
        ({"reduce": "histogram", "reduce_bins": 0}, UsageError, "reduce_bins is 0"),
        (
            {"reduce": "joint", "reduce_bins": 2000},
            UsageError,
            "of a joint histogram at most 1,000",
        ),
    ],
)
def test_bad_questions(store, asked, error, message):
    with pytest.raises(error, match=message):
        actstore.mutual_information(store[0], **asked)


def test_too_many_tokens():
    frame = xr.DataArray(np.ones((50_001, 2), "f4"), dims=("token", "neuron"))
    with pytest.raises(UsageError, match=r"all pairs of 50,001 tokens would take 20 GB"):
        actstore.mutual_information(frame)
