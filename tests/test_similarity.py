"""RSA, CKA and cosines against plain numpy, by either route, on data that break shortcuts."""

from __future__ import annotations

import shutil
from pathlib import Path

import dask
import numpy as np
import pytest
import xarray as xr
from helpers import bare_corpus, plan_of, random_values, write_store
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import rankdata, spearmanr
from sklearn.metrics.pairwise import cosine_similarity

import actstore
from actstore.errors import UnknownNameError, UsageError
from actstore.plan import StageSpec
from actstore.queries import joint
from actstore.stats import gram, products
from actstore.stats.products import Core, Products

KINDS = ("normal", "far", "near_one", "few", "correlated")


def data(kind, n, d, seed=0):
    """Rows (n, d), float32."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * rng.lognormal(size=d)
    if kind == "far":  # a neuron at 3000 +- 10
        x[:, 0] = 3000 + 10 * rng.normal(size=n)
    if kind == "near_one":  # all cosines in 0.9999..1
        x = 100 + x
    if kind == "few":
        x[:, 1:] = x[:, 1:] > 1
        x[:, 0] += 0.01
    if kind == "correlated":
        x = rng.normal(size=(n, 3)) @ rng.normal(size=(3, d)) + 0.1 * x
    return x.astype("float32")


def similarity(x, metric):
    x = x.astype(np.float64)
    if metric == "sqeuclidean":
        return ((x[:, None] - x[None]) ** 2).sum(-1)
    if metric == "correlation":
        x = x - x.mean(1, keepdims=True)
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    return u @ u.T


def upper(matrix):
    return matrix[np.triu_indices(len(matrix), 1)]


def reference_rsa(x, y, metric="cosine", ranks=False):
    a, b = upper(similarity(x, metric)), upper(similarity(y, metric))
    if ranks:
        a, b = rankdata(a), rankdata(b)
    return np.corrcoef(a, b)[0, 1]


def reference_cka(x, y, debiased=False):
    x, y = x.astype(np.float64), y.astype(np.float64)
    n = len(x)
    if not debiased:
        x, y = x - x.mean(0), y - y.mean(0)
        cross = np.linalg.norm(x.T @ y) ** 2
        return cross / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)

    def hsic(k, m):
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        one = np.ones(n)
        last = one @ k @ m @ one
        total = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / (n - 1) / (n - 2)
        return (total - 2 * last / (n - 2)) / (n * (n - 3))

    x, y = x - x.mean(0), y - y.mean(0)  # changes nothing but rounding
    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def streamed(x, y, space, cuts, keep_zeros=False):
    """Products of two views, in blocks."""
    d, e = x.shape[1], y.shape[1]
    cores = [Core(0, 0, slice(0, d)), Core(1, 1, slice(0, e))]
    cores += [Core(0, 1, slice(0, d // 2)), Core(0, 1, slice(d // 2, d))]
    made = Products(space, cores, [(0, 1)], keep_zeros)
    for a, b in zip([0, *cuts], [*cuts, len(x)], strict=True):
        made.add([x[a:b], y[a:b]])
    return made


# -- statistics ----------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["cosine", "correlation", "sqeuclidean"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "cuts"), [(5, [2]), (60, [1, 30]), (400, [100, 110, 390])])
def test_rsa_by_both_routes(metric, kind, n, cuts):
    x, y = data(kind, n, 24), data("normal", n, 40, seed=1)
    y[:, :24] += x * (3 / x.std())
    want = reference_rsa(x, y, metric)
    space = "linear" if metric == "sqeuclidean" else metric
    made = streamed(x, y, space, cuts)
    got = products.rsa(made.pair(0, 1), made.own(0, 1), made.own(1, 0), metric == "sqeuclidean")
    assert got == pytest.approx(want, abs=1e-6)
    a, b = (gram.standardised(gram.Gram.of(v).similarity(metric)[0]) for v in (x, y))
    assert gram.correlate(a, b) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [5, 60, 400])
def test_cka_by_both_routes(debiased, kind, n):
    x, y = data(kind, n, 24), data("normal", n, 40, seed=1)
    y[:, :24] += x * (3 / x.std())
    want = reference_cka(x, y, debiased)
    made = streamed(x, y, "linear", [n // 3])
    by_products = products.debiased_cka if debiased else products.cka
    by_grams = gram.debiased_cka if debiased else gram.cka
    assert by_products(made.pair(0, 1), made.own(0, 1), made.own(1, 0)) == pytest.approx(
        want, abs=1e-6
    )
    a, b = gram.Gram.of(x).centred, gram.Gram.of(y).centred
    assert by_grams(a, b) == pytest.approx(want, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    x=arrays(np.float32, (9, 3), elements=st.sampled_from([0, 0, 0, 1, -2, 5, 3000])),
    y=arrays(np.float32, (9, 4), elements=st.sampled_from([0, 0, 1, 7])),
    cuts=st.lists(st.integers(1, 8), unique=True).map(sorted),
    keep=st.booleans(),
)
def test_rows_of_zeros(x, y, cuts, keep):
    """They are left out of the pair, or have cosine 0 with every row, as in scikit-learn."""
    there = np.ones(9, bool) if keep else x.any(1) & y.any(1)
    made = streamed(x, y, "cosine", cuts, keep)
    assert made.dropped[0, 1] == np.count_nonzero(~there)
    got = products.rsa(made.pair(0, 1), made.own(0, 1), made.own(1, 0))
    if np.count_nonzero(there) < 3:
        assert np.isnan(got)
        return
    a, b = (upper(cosine_similarity(v[there].astype(np.float64))) for v in (x, y))
    if a.std() > 1e-3 and b.std() > 1e-3:  # else no spread but rounding, no correlation
        assert got == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-5)


def test_constant_similarity_has_no_correlation():
    x = np.ones((6, 4), "float32")
    y = data("normal", 6, 4)
    made = streamed(x, y, "cosine", [2])
    assert np.isnan(products.rsa(made.pair(0, 1), made.own(0, 1), made.own(1, 0)))
    a, b = (gram.standardised(gram.Gram.of(v).similarity("cosine")[0]) for v in (x, y))
    assert np.isnan(gram.correlate(a, b))


def test_jackknife_is_the_plain_one():
    x, y = data("normal", 30, 8), data("normal", 30, 9, seed=2)
    groups = np.repeat(np.arange(6), 5)[np.random.default_rng(0).permutation(30)]
    a, b = (gram.standardised(similarity(v, "cosine")) for v in (x, y))
    got = gram.jackknife(a, b, groups).values
    want = [reference_rsa(x[groups != g], y[groups != g]) for g in range(6)]
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_permuted_product():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 12, 12))
    order = rng.permutation(12)
    assert gram.permuted(a, b, order) == pytest.approx((a * b[np.ix_(order, order)]).sum())


# -- queries -------------------------------------------------------------------------------

STAGES = (
    StageSpec("hidden", (0, 1, 2, 3), 20),
    StageSpec("mlp_in", (0, 1, 2), 20),
    StageSpec("mlp_pre", (0, 1, 2), 48),
    StageSpec("mlp_out", (0, 1, 2), 20),
)
LENGTHS = [40, 1, 73, 120, 66, 90, 10] * 3


def make(path, seed=0, lengths=LENGTHS, zeros=True):
    plan = plan_of(bare_corpus(lengths), STAGES, 256)
    values = {}
    for k, stage in enumerate(STAGES):
        rows = [
            data(KINDS[(k + i) % 5], plan.n_tokens, stage.width, seed + 10 * k + i)
            for i in range(len(stage.layers))
        ]
        values[stage.name] = np.stack(rows)
    for name in ("mlp_in", "mlp_pre", "mlp_out"):
        values[name][..., :20] += values["hidden"][:3] * 0.5
    if zeros:
        values["mlp_in"][1, [3, 700]] = 0
        values["mlp_out"][1, [5, 3]] = 0
    write_store(path, plan, values)
    return actstore.open(path), values


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make(tmp_path_factory.mktemp("similarity") / "a.zarr")


PAIRS = [("mlp_in", "mlp_pre"), ("mlp_in", "mlp_out"), ("mlp_pre", "mlp_out")]


@pytest.fixture(params=["grams", "products"])
def route(request, monkeypatch):
    """Both routes on the same data, whichever is the cheaper."""
    by_grams = request.param == "grams"
    monkeypatch.setattr(joint, "choose_grams", lambda grams, products: by_grams)
    return request.param


@pytest.mark.parametrize("metric", ["cosine", "correlation", "sqeuclidean"])
def test_rsa_of_a_store(store, route, metric):
    opened, values = store
    result = actstore.compute(actstore.rsa(opened, tokens="position > 0", metric=metric))
    assert result["rsa"].dims == ("layer", "pair")
    assert result["pair"].values.tolist() == [f"{a}:{b}" for a, b in PAIRS]
    assert result["stage_a"].values.tolist() == [a for a, _ in PAIRS]
    chosen = opened.column("position") > 0
    for i in range(3):
        for j, (a, b) in enumerate(PAIRS):
            x, y = values[a][i][chosen], values[b][i][chosen]
            there = np.ones(len(x), bool) if metric == "sqeuclidean" else x.any(1) & y.any(1)
            got = result["rsa"].sel(layer=i, pair=f"{a}:{b}").item()
            assert got == pytest.approx(reference_rsa(x[there], y[there], metric), abs=1e-6)
            assert result["dropped"][i, j] == np.count_nonzero(~there)
    assert result.attrs["source"] == "scan"
    assert result.attrs["passes"] == 1


def test_rsa_with_zeros_kept(store, route):
    opened, values = store
    result = actstore.compute(actstore.rsa(opened, layers=1, compat="notebook"))
    for a, b in PAIRS:
        x, y = (upper(cosine_similarity(values[s][1].astype(np.float64))) for s in (a, b))
        got = result["rsa"].sel(layer=1, pair=f"{a}:{b}").item()
        assert got == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
    assert (result["dropped"] == 0).all()


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_of_a_store(store, route, debiased):
    opened, values = store
    result = actstore.compute(actstore.cka(opened, debiased=debiased))
    for i in range(3):
        for a, b in PAIRS:
            want = reference_cka(values[a][i], values[b][i], debiased)
            assert result["cka"].sel(layer=i, pair=f"{a}:{b}").item() == pytest.approx(
                want, abs=1e-6
            )


def test_pairs_of_layers(store, route):
    opened, values = store
    result = actstore.compute(actstore.rsa(opened, stages="hidden,mlp_out", pairs="layers"))
    assert result["rsa"].dims == ("stage", "pair")
    for a, b, pair in zip(
        result["layer_a"].values, result["layer_b"].values, result["pair"].values, strict=True
    ):
        assert pair == f"{a}:{b}" and a < b
        for stage in ("hidden", "mlp_out"):
            got = result["rsa"].sel(stage=stage, pair=pair).item()
            if b < len(values[stage]):
                x, y = values[stage][a], values[stage][b]
                there = x.any(1) & y.any(1)
                assert got == pytest.approx(reference_rsa(x[there], y[there]), abs=1e-6)
            else:
                assert np.isnan(got)
    one = actstore.rsa(opened, stages="mlp_out", pairs="layers")
    assert one["rsa"].dims == ("pair",)


def test_any_two_views(store):
    opened, values = store
    result = actstore.compute(actstore.cka(opened, pairs="hidden@3:mlp_out@2, mlp_pre@0:mlp_pre@0"))
    assert result["cka"].dims == ("pair",)
    want = reference_cka(values["hidden"][3], values["mlp_out"][2])
    np.testing.assert_allclose(result["cka"], [want, 1], atol=1e-6)
    assert result["layer_b"].values.tolist() == [2, 0]
    named = actstore.compute(actstore.cka(opened, pairs=[("mlp_out", "mlp_in")], layers=1))
    want = reference_cka(values["mlp_out"][1], values["mlp_in"][1])
    np.testing.assert_allclose(named["cka"], [[want]], atol=1e-6)


def test_across_stores(store, tmp_path, route):
    opened, values = store
    other, others = make(tmp_path / "b.zarr", seed=50)
    result = actstore.compute(actstore.rsa(opened, data_b=other, layers=2))
    assert result["pair"].values.tolist() == [f"{s.name}:{s.name}" for s in STAGES]
    for stage in STAGES:
        want = reference_rsa(values[stage.name][2], others[stage.name][2])
        got = result["rsa"].sel(layer=2, pair=f"{stage.name}:{stage.name}").item()
        assert got == pytest.approx(want, abs=1e-6)
    assert result.attrs["store_b"] == "b.zarr"
    table = actstore.compute(actstore.rsa(opened, stages="mlp_out", data_b=other, pairs="layers"))
    assert len(table["pair"]) == 9
    same, _ = make(tmp_path / "c.zarr", lengths=LENGTHS[::-1])
    with pytest.raises(UsageError, match="other tokens than data: token_id differs"):
        actstore.rsa(opened, data_b=same)
    short, _ = make(tmp_path / "d.zarr", lengths=[900], zeros=False)
    with pytest.raises(UsageError, match=r"data_b has 900 tokens and data 1,200"):
        actstore.rsa(opened, data_b=short)


def test_groups(store, route):
    opened, values = store
    result = actstore.compute(actstore.rsa(opened, by="sequence", tokens="sequence < 4", layers=0))
    assert result["rsa"].dims == ("layer", "sequence", "pair")
    sequence = opened.column("sequence")
    for s in (0, 2, 3):
        x, y = (values[name][0][sequence == s] for name in ("mlp_in", "mlp_out"))
        got = result["rsa"].sel(layer=0, sequence=s, pair="mlp_in:mlp_out").item()
        assert got == pytest.approx(reference_rsa(x, y), abs=1e-6)
    assert np.isnan(result["rsa"].sel(sequence=1)).all()  # of one token


def test_spearman(store):
    opened, values = store
    chosen = opened.column("sequence") < 3
    result = actstore.compute(
        actstore.rsa(opened, compare="spearman", tokens="sequence < 3", layers=0)
    )
    a, b = (upper(similarity(values[s][0][chosen], "cosine")) for s in ("mlp_in", "mlp_pre"))
    want = spearmanr(a, b).statistic
    assert result["rsa"][0, 0].item() == pytest.approx(want, abs=1e-6)
    assert "sampled" not in result.attrs
    some = actstore.compute(actstore.rsa(opened, compare="spearman", sample=200, layers=0))
    assert some.attrs["sampled"] == "200 tokens, for ranks"
    whole = actstore.compute(actstore.rsa(opened, compare="spearman", layers=0))
    np.testing.assert_allclose(some["rsa"], whole["rsa"], atol=0.1)


def test_interval_and_null(store):
    opened, values = store
    asked = {"layers": "0,2", "interval": True, "null": 99, "tokens": "position > 0"}
    result = actstore.compute(actstore.rsa(opened, **asked))
    assert (result["rsa_low"] < result["rsa"]).all()
    assert (result["rsa"] < result["rsa_high"]).all()
    chosen = opened.column("position") > 0
    sequence = opened.column("sequence")[chosen]
    x, y = (values[s][0][chosen] for s in ("mlp_in", "mlp_out"))
    left = [reference_rsa(x[sequence != s], y[sequence != s]) for s in np.unique(sequence)]
    z, k = np.arctanh(left), len(left)
    error = np.sqrt((k - 1) / k * ((z - z.mean()) ** 2).sum())
    from scipy.stats import t

    low = np.tanh(np.arctanh(reference_rsa(x, y)) - t.ppf(0.975, k - 1) * error)
    got = result["rsa_low"].sel(layer=0, pair="mlp_in:mlp_out").item()
    assert got == pytest.approx(low, abs=1e-6)
    assert ((result["p_value"] >= 0.01) & (result["p_value"] <= 1)).all()
    # By a sample, about the estimate of all tokens.
    some = actstore.compute(actstore.rsa(opened, sample=300, **asked))
    np.testing.assert_allclose(some["rsa"], result["rsa"], atol=1e-6)
    assert some.attrs["sampled"] == "300 tokens, for interval, null"
    assert (some["rsa_high"] > some["rsa_low"]).all()
    again = actstore.compute(actstore.rsa(opened, sample=300, **asked))
    assert again.identical(some)


def test_unrelated_views_are_not_significant():
    rng = np.random.default_rng(3)
    acts = rng.normal(size=(2, 80, 10)).astype("float32")
    sequence = ("token", np.repeat(np.arange(8), 10))
    frame = xr.DataArray(acts, dims=("layer", "token", "neuron"), coords={"sequence": sequence})
    result = actstore.compute(actstore.rsa(frame, pairs="layers", null=199, interval=True))
    assert result["p_value"].item() > 0.05
    assert result["rsa_low"].item() < 0 < result["rsa_high"].item()
    acts[1] = acts[0] + 0.1 * acts[1]
    result = actstore.compute(actstore.rsa(frame, pairs="layers", null=199, interval=True))
    assert result["p_value"].item() == 1 / 200


def test_little_memory_takes_several_passes(tmp_path):
    plan = plan_of(
        bare_corpus([500, 700]), [StageSpec("a", (0,), 600), StageSpec("b", (0,), 900)], 256
    )
    rng = np.random.default_rng(0)
    values = {
        s.name: rng.normal(size=(1, 1200, s.layout.width)).astype("float32") for s in plan.stages
    }
    values["b"][..., :600] += values["a"]
    write_store(tmp_path / "a.zarr", plan, values)
    opened = actstore.open(tmp_path / "a.zarr")
    result = actstore.compute(actstore.rsa(opened, memory="16MiB"))
    assert result.attrs["passes"] > 1
    assert result["rsa"].item() == pytest.approx(
        reference_rsa(values["a"][0], values["b"][0]), abs=1e-6
    )
    found = actstore.compute(actstore.cka(opened, memory="16MiB"))
    want = reference_cka(values["a"][0], values["b"][0])
    assert found["cka"].item() == pytest.approx(want, abs=1e-6)


def test_asked_together_data_are_read_once(store, monkeypatch):
    opened, _ = store
    reads = []
    read = joint.View.read
    monkeypatch.setattr(
        joint.View, "read", lambda v, t: (reads.append((v.stage, v.layer)), read(v, t))[1]
    )
    asked = {"stages": "mlp_in,mlp_pre,mlp_out", "tokens": "position > 0"}
    apart = [
        actstore.compute(q(opened, **asked))
        for q in (actstore.dimensionality, actstore.rsa, actstore.cka)
    ]
    once = len(reads) // 3
    assert once == 9 and len(reads) == 27
    reads.clear()
    together = actstore.compute(
        actstore.dimensionality(opened, **asked),
        actstore.rsa(opened, **asked),
        actstore.cka(opened, **asked),
    )
    assert len(reads) == once
    for a, b in zip(apart, together, strict=True):
        xr.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_nothing_is_computed_when_built(store):
    import dask

    def refuse(*_, **__):
        raise AssertionError("computed")

    opened, _ = store
    with dask.config.set(scheduler=refuse):
        for build in (
            lambda: actstore.rsa(opened, interval=True, null=5),
            lambda: actstore.cka(opened, pairs="layers"),
            lambda: actstore.dimensionality(opened, by="sequence"),
            lambda: actstore.spectrum(opened),
            lambda: actstore.intrinsic_dimension(opened),
            lambda: actstore.cosine_pairs(opened),
            lambda: actstore.gaussian_baseline(opened, dimensions=[3]),
            lambda: actstore.cosine_matrix(opened),
            lambda: actstore.cosine_matrix(opened, reduce="histogram"),
        ):
            build()


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"pairs": "mlp_in-mlp_out"}, UsageError, "pair 'mlp_in-mlp_out' is not understood"),
        ({"pairs": "mlp_in:mlp_uot"}, UnknownNameError, "did you mean 'mlp_out'"),
        ({"pairs": "mlp_in@1:mlp_out@9"}, UnknownNameError, "layer of mlp_out"),
        ({"pairs": "mlp_in@1:mlp_out"}, UsageError, "layers for all stages"),
        ({"stages": "mlp_in"}, UsageError, "make no pair within a layer"),
        ({"stages": "mlp_in", "layers": 1, "pairs": "layers"}, UsageError, "but one layer"),
        ({"metric": "cosin"}, UnknownNameError, "did you mean 'cosine'"),
        ({"memory": "2 apples"}, UsageError, "write a size of at least 16 MiB"),
        ({"null": -1}, UsageError, "null is -1"),
        ({"interval": True, "tokens": "sequence == 0"}, UsageError, "of a single one"),
    ],
)
def test_bad_questions(store, asked, error, message):
    with pytest.raises(error, match=message):
        actstore.rsa(store[0], **asked)


def test_interval_of_bare_arrays():
    acts = np.eye(5, dtype="f4")[None].repeat(2, 0)
    frame = xr.DataArray(acts, dims=("layer", "token", "neuron"))
    with pytest.raises(UsageError, match="give the data a coordinate 'sequence'"):
        actstore.rsa(frame, pairs="layers", interval=True)


# -- cosines -------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["cosine", "correlation", "euclidean"])
def test_cosine_matrix(store, metric):
    opened, values = store
    lazy = actstore.cosine_matrix(opened, metric=metric, layers="0,1", tokens="position > 0")
    assert lazy["similarity"].dims == ("stage", "layer", "token", "token_b")
    chosen = np.flatnonzero(opened.column("position") > 0)
    result = lazy.compute()
    assert result["token"].values.tolist() == chosen.tolist()
    for stage in ("hidden", "mlp_in", "mlp_pre"):
        for layer in (0, 1):
            x = values[stage][layer][chosen]
            with np.errstate(invalid="ignore"):
                want = similarity(x, "sqeuclidean" if metric == "euclidean" else metric)
            got = result["similarity"].sel(stage=stage, layer=layer).values
            if metric == "euclidean":
                np.testing.assert_allclose(got, np.sqrt(want), rtol=1e-6, atol=1e-6)
            else:
                np.testing.assert_allclose(got, want, atol=1e-9)
    if metric == "cosine":
        zero = actstore.cosine_matrix(opened, layers=1, stages="mlp_in", compat="notebook")
        want = cosine_similarity(values["mlp_in"][1].astype(np.float64))
        np.testing.assert_allclose(zero["similarity"][0], want, atol=1e-9)


def test_cosine_matrix_between_stages(store, tmp_path):
    opened, values = store
    result = actstore.cosine_matrix(opened, stages="mlp_in", stage_b="mlp_out", layers=2)
    want = cosine_similarity(*(values[s][2].astype(np.float64) for s in ("mlp_in", "mlp_out")))
    np.testing.assert_allclose(result["similarity"][0], want, atol=1e-9)
    asked = {"stages": "mlp_in", "stage_b": "mlp_out", "layers": 2}
    reduced = actstore.compute(actstore.cosine_matrix(opened, reduce="histogram", **asked))
    counts, edges = np.histogram(want, np.linspace(-1, 1, 201))
    np.testing.assert_array_equal(reduced["counts"][0], counts)
    np.testing.assert_allclose(reduced["edges"], edges)
    with pytest.raises(UsageError, match="have 20 and 48 neurons"):
        actstore.cosine_matrix(opened, stages="mlp_in", stage_b="mlp_pre")
    with pytest.raises(UnknownNameError, match="did you mean 'mlp_out'"):
        actstore.cosine_matrix(opened, stage_b="mlp_outt")
    other, others = make(tmp_path / "b.zarr", seed=9)
    across = actstore.cosine_matrix(opened, stages="mlp_out", data_b=other, layers=0)
    want = cosine_similarity(values["mlp_out"][0].astype("f8"), others["mlp_out"][0].astype("f8"))
    np.testing.assert_allclose(across["similarity"][0], want, atol=1e-9)


def test_cosine_matrix_reduced_and_grouped(store):
    opened, values = store
    asked = {"stages": "mlp_pre", "layers": "0,2"}
    mean = actstore.compute(actstore.cosine_matrix(opened, reduce="mean", **asked))
    for i, layer in enumerate((0, 2)):
        want = upper(similarity(values["mlp_pre"][layer], "cosine")).mean()
        assert mean["mean"][i].item() == pytest.approx(want, abs=1e-9)
    tree = actstore.cosine_matrix(opened, by="sequence", tokens="sequence < 3", **asked)
    assert set(tree.children) == {"0", "1", "2"}
    assert tree["2/similarity"].shape == (2, 73, 73)
    with pytest.raises(UsageError, match="give edges for distances"):
        actstore.cosine_matrix(opened, metric="euclidean", reduce="histogram")


def test_matrix_of_too_many_tokens():
    frame = xr.DataArray(np.ones((50_001, 2), "f4"), dims=("token", "neuron"))
    with pytest.raises(UsageError, match=r"50,001 tokens would take 20 GB a layer"):
        actstore.cosine_matrix(frame)


@pytest.mark.parametrize("asked", [{}, {"center": True}, {"split": True}, {"n": 500}, {"n": 0}])
def test_cosine_pairs(store, asked):
    opened, values = store
    quantiles = [0, 0.01, 0.5, 1]
    asked = {"stages": "mlp_in,mlp_out", "layers": 1, "tokens": "position > 0", **asked}
    result = actstore.compute(
        actstore.cosine_pairs(opened, quantiles=quantiles, bins=50, range=(-0.5, 0.5), **asked)
    )
    chosen = np.flatnonzero(opened.column("position") > 0)
    if 0 < asked.get("n", 2000) < len(chosen):
        drawn = np.random.default_rng(0).choice(chosen, asked["n"], replace=False)
        chosen = np.sort(drawn)
    for stage in ("mlp_in", "mlp_out"):
        own = result.sel(stage=stage, layer=1)
        order = chosen
        if asked.get("split"):
            order = np.random.default_rng(0).permutation(chosen)
        x = values[stage][1][order].astype(np.float64)
        if asked.get("center"):
            x = x - x.mean(0)
        there = x.any(1)
        u = np.zeros_like(x)
        u[there] = x[there] / np.linalg.norm(x[there], axis=1, keepdims=True)
        cosines = u @ u.T
        if asked.get("split"):
            half = len(x) // 2
            cosines = cosines[:half, half:][np.ix_(there[:half], there[half:])].ravel()
        else:
            cosines = upper(cosines[np.ix_(there, there)])
        counts = np.histogram(cosines, np.linspace(-0.5, 0.5, 51))[0]
        assert np.abs(own["counts"] - counts).sum() <= 2  # rounding at an edge
        assert own["below"] == np.count_nonzero(cosines < -0.5)
        assert own["mean"].item() == pytest.approx(cosines.mean(), abs=1e-9)
        assert own["matching_dimension"].item() == pytest.approx(1 / (cosines**2).mean())
        want = np.sort(cosines)[[int(q * (len(cosines) - 1)) for q in quantiles]]
        np.testing.assert_allclose(own["cosine"], want, atol=1e-9)
        for i in range(len(quantiles)):
            a, b = own["token_a"][i].item(), own["token_b"][i].item()
            assert a != b
            rows = values[stage][1][[a, b]].astype(np.float64)
            if asked.get("center"):
                rows -= values[stage][1][order].mean(0, dtype=np.float64)
            got = rows[0] @ rows[1] / np.linalg.norm(rows[0]) / np.linalg.norm(rows[1])
            assert got == pytest.approx(own["cosine"][i].item(), abs=1e-7)


def test_pairs_have_contexts(store):
    opened, _ = store
    result = actstore.compute(actstore.cosine_pairs(opened, stages="mlp_in", layers=0, n=100))
    for side in ("a", "b"):
        token = int(result[f"token_{side}"][0, 1])
        assert result[f"context_{side}"][0, 1].item() == opened.decode(token, before=9)
        assert result[f"next_{side}"][0, 1].item() == opened.decode(token, before=-1, after=1)


def test_values_that_are_not_finite():
    acts = data("normal", 40, 6)
    acts[3, 2], acts[9, 0] = np.nan, np.inf
    finite = np.delete(acts, [3, 9], axis=0)
    for center in (False, True):
        got, want = (
            actstore.compute(
                actstore.cosine_pairs(xr.DataArray(x, dims=("token", "neuron")), center=center)
            )
            for x in (acts, finite)
        )
        np.testing.assert_array_equal(got["counts"], want["counts"])
        np.testing.assert_allclose(got["cosine"], want["cosine"])
    frame = xr.DataArray(acts, dims=("token", "neuron"))
    assert np.isnan(actstore.compute(actstore.dimensionality(frame))["effective_dimension"]).all()


def test_contexts_are_of_the_store_that_is_asked(tmp_path):
    path = tmp_path / "a.zarr"
    for lengths in ([300, 300], [600]):  # another store at the same place
        opened, _ = make(path, lengths=lengths, zeros=False)
        result = actstore.compute(actstore.cosine_pairs(opened, stages="mlp_in", layers=0))
        token = int(result["token_b"][0, 0])
        assert result["context_b"][0, 0].item() == opened.decode(token, before=9)
        shutil.rmtree(path)


def test_what_does_not_fit_together_is_asked_apart(tmp_path):
    """Two stages at a time fit the memory; all four that both questions name do not."""
    names = ("a", "b", "c", "d")
    plan = plan_of(bare_corpus([300, 300]), [StageSpec(n, (0,), 16) for n in names], 64)
    values = {n: data("normal", 600, 16, seed=i)[None] for i, n in enumerate(names)}
    write_store(tmp_path / "a.zarr", plan, values)
    opened = actstore.open(tmp_path / "a.zarr")
    asked = {"memory": "16MiB", "compare": "spearman"}
    both = actstore.compute(
        actstore.rsa(opened, stages="a,b", **asked), actstore.rsa(opened, stages="c,d", **asked)
    )
    for result, (a, b) in zip(both, (("a", "b"), ("c", "d")), strict=True):
        want = reference_rsa(values[a][0], values[b][0], ranks=True)
        assert result["rsa"].item() == pytest.approx(want, abs=1e-5)
    with pytest.raises(UsageError, match=r"for 4 stages and layers take 0\.0 GB.*raise memory"):
        actstore.rsa(opened, stages="a,b,c,d", **asked)


def test_values_are_not_hashed_to_lay_a_query_out(monkeypatch):
    """An array of the user's own may be large; what identifies it is known."""
    hashed = []
    register = dask.base.normalize_token
    monkeypatch.setattr(
        dask.base, "normalize_token", lambda x: (hashed.append(np.size(x)), register(x))[1]
    )
    frame = xr.DataArray(np.ones((3, 500, 70), "f4"), dims=("layer", "token", "neuron"))
    actstore.rsa(frame, pairs="layers")
    actstore.cosine_matrix(frame)
    assert max(hashed, default=0) < frame.size // 3


def test_gaussian_baseline(store):
    opened, _ = store
    result = actstore.compute(
        actstore.gaussian_baseline(opened, stages="mlp_pre", dimensions=[4, 300], bins=40)
    )
    from scipy.stats import beta

    edges = result["edges"].values
    for d in (4, 300):
        # The cosine of two normal directions: (1 + cos) / 2 is a beta variable.
        mass = np.diff(beta.cdf((1 + edges) / 2, (d - 1) / 2, (d - 1) / 2))
        got = result["density"].sel(dimension=d) * np.diff(edges)
        np.testing.assert_allclose(got, mass, atol=0.004)
    pairs = actstore.compute(actstore.cosine_pairs(opened, stages="mlp_pre"))
    np.testing.assert_allclose(result["matching_dimension"], pairs["matching_dimension"])
    bare = actstore.gaussian_baseline(opened, match=False, dimensions=10)
    assert set(bare.data_vars) == {"density", "edges"}
    with pytest.raises(UsageError, match="whole numbers of dimensions"):
        actstore.gaussian_baseline(opened, dimensions=[2.5])


# -- other people's ------------------------------------------------------------------------


@pytest.mark.parametrize("compare", ["pearson", "spearman"])
def test_agrees_with_rsatoolbox(compare):
    import rsatoolbox

    x, y = data("correlated", 60, 20), data("far", 60, 30, seed=3)
    rdms = [
        rsatoolbox.rdm.calc_rdm(rsatoolbox.data.Dataset(v.astype("f8")), method="correlation")
        for v in (x, y)
    ]
    method = {"pearson": "corr", "spearman": "spearman"}[compare]
    want = rsatoolbox.rdm.compare(*rdms, method=method).item()
    frames = [
        xr.DataArray(v, dims=("token", "neuron"), name="mlp_out").expand_dims(layer=[0])
        for v in (x, y)
    ]
    result = actstore.compute(
        actstore.rsa(frames[0], data_b=frames[1], metric="correlation", compare=compare)
    )
    assert result["rsa"].item() == pytest.approx(want, abs=1e-6)


def test_groups_whose_names_are_no_names_of_groups(tmp_path: Path) -> None:
    """Marks that are steps of a path, or the same once "/" is replaced, are all there."""
    marks = [".", "..", "/", "_", "a"]
    corpus = actstore.build_corpus([{"input_ids": [1, 2, 3], "mark": mark} for mark in marks])
    plan = plan_of(corpus, [StageSpec("hidden", (0,), 8)], 16)
    write_store(tmp_path / "marks.zarr", plan, random_values(plan))
    tree = actstore.cosine_matrix(actstore.open(tmp_path / "marks.zarr"), by="mark")
    assert {str(group["mark"].values) for group in tree.children.values()} == set(marks)
