"""Spectra and dimensions against an SVD in float64, by either route."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from helpers import bare_corpus, plan_of, write_store
from hypothesis import given, settings
from hypothesis import strategies as st
from test_similarity import KINDS, data

import actstore
from actstore.errors import UnknownNameError, UsageError
from actstore.plan import StageSpec
from actstore.queries import joint
from actstore.stats.dimensionality import (
    components_needed,
    effective_dimension,
    nearest,
    twonn,
    variances,
)

STAGES = (StageSpec("mlp_in", (0, 1), 30), StageSpec("mlp_pre", (0, 1, 2), 64))


def spectrum(x):
    x = x.astype(np.float64)
    return np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2 / (len(x) - 1)


def make(path, lengths):
    plan = plan_of(bare_corpus(lengths), STAGES, 32)
    values = {
        s.name: np.stack(
            [
                data(KINDS[(i + k) % 5], plan.n_tokens, s.width, seed=i + 7 * k)
                for i in range(len(s.layers))
            ]
        )
        for k, s in enumerate(STAGES)
    }
    values["mlp_pre"][0, :, 5] = 2.5  # constant
    values["mlp_pre"][0, :, 6] = 0
    write_store(path, plan, values)
    return actstore.open(path), values


@pytest.fixture(scope="module", params=[[25, 16], [300, 240, 1, 160]], ids=["few", "many"])
def store(request, tmp_path_factory):
    """Fewer tokens than neurons, and more."""
    return make(tmp_path_factory.mktemp("dimensions") / "a.zarr", request.param)


@pytest.fixture(params=["grams", "products"])
def route(request, monkeypatch):
    monkeypatch.setattr(joint, "choose_grams", lambda grams, products: request.param == "grams")
    return request.param


def views():
    return [(s.name, layer) for s in STAGES for layer in s.layers]


def test_dimensionality(store, route):
    opened, values = store
    result = actstore.compute(actstore.dimensionality(opened, tokens="position > 0"))
    assert result["participation_ratio"].dims == ("stage", "layer")
    chosen = opened.column("position") > 0
    for stage, layer in views():
        x = values[stage][layer][chosen]
        variance = spectrum(x)
        own = result.sel(stage=stage, layer=layer)
        want = variance.sum() ** 2 / (variance**2).sum()
        assert own["participation_ratio"].item() == pytest.approx(want, rel=1e-5)
        fraction = np.cumsum(variance) / variance.sum()
        assert own["effective_dimension"].item() == np.flatnonzero(fraction >= 0.95)[0] + 1
        n, d = len(x) - 1, x.shape[1]
        assert own["null_participation_ratio"].item() == (n * d + 2) / (n + d + 1)
    assert np.isnan(result["participation_ratio"].sel(stage="mlp_in", layer=2))
    notebook = actstore.compute(
        actstore.dimensionality(opened, compat="notebook", threshold=0.8, null=False)
    )
    assert "null_participation_ratio" not in notebook
    for stage, layer in views():
        fraction = np.cumsum(variance := spectrum(values[stage][layer])) / variance.sum()
        got = notebook["effective_dimension"].sel(stage=stage, layer=layer).item()
        assert got == np.where(fraction > 0.8)[0][0]


def test_spectrum(store, route):
    opened, values = store
    result = actstore.compute(actstore.spectrum(opened))
    for stage, layer in views():
        want = spectrum(values[stage][layer])
        own = result.sel(stage=stage, layer=layer)
        got = own["variance"].values
        assert np.isnan(got[len(want) :]).all()
        np.testing.assert_allclose(got[: len(want)], want, atol=1e-5 * want[0])
        np.testing.assert_allclose(own["explained"][: len(want)], want / want.sum(), atol=1e-5)
        assert own["cumulative"][len(want) - 1].item() == pytest.approx(1)
    assert result["component"][0] == 1
    few = actstore.compute(actstore.spectrum(opened, k=3, layers=0, stages="mlp_pre"))
    assert few["variance"].shape == (1, 3)
    np.testing.assert_allclose(
        few["variance"][0], result["variance"].sel(stage="mlp_pre", layer=0)[:3]
    )


def test_groups(store, route):
    opened, values = store
    result = actstore.compute(actstore.dimensionality(opened, by="sequence", stages="mlp_pre"))
    assert result["participation_ratio"].dims == ("layer", "sequence")
    sequence = opened.column("sequence")
    for s in np.unique(sequence):
        variance = spectrum(values["mlp_pre"][1][sequence == s]) if (sequence == s).sum() > 1 else 0
        got = result["participation_ratio"].sel(layer=1, sequence=s).item()
        if np.ndim(variance):
            want = variance.sum() ** 2 / (variance**2).sum()
            assert got == pytest.approx(want, rel=1e-5)
        else:
            assert np.isnan(got)


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**32 - 1),
    decay=st.floats(0, 12),
    outlier=st.sampled_from([1.0, 1e3, 1e8]),
    near=st.sampled_from([None, 0.0, 1e-12, -1e-9, 1e-9, -1e-6, 1e-6]),
    notebook=st.booleans(),
)
def test_components_are_counted_as_in_float64(seed, decay, outlier, near, notebook):
    rng = np.random.default_rng(seed)
    scales = np.exp(-decay * np.linspace(0, 1, 40))
    scales[0] *= outlier
    x = rng.normal(size=(60, 40)) * scales
    scatter = x.T @ x
    values = variances(scatter, 60, 40)
    fraction = np.cumsum(values) / values.sum()
    threshold = 0.9 if near is None else min(max(fraction[rng.integers(40)] + near, 1e-3), 1.0)
    expected = effective_dimension(values, threshold, notebook)
    np.testing.assert_equal(components_needed(scatter, 60, 40, threshold, notebook), expected)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_hardly_any_tokens(rows, route):
    frame = xr.DataArray(data("normal", rows, 6), dims=("token", "neuron"))
    result = actstore.compute(actstore.dimensionality(frame))
    if rows == 1:
        assert all(np.isnan(v).all() for v in result.data_vars.values())
    else:
        assert 1 - 1e-6 <= result["participation_ratio"].item() <= rows - 1 + 1e-6
    if rows == 2:
        assert result["null_participation_ratio"].item() == 1
        assert result["effective_dimension"].item() == 1


def test_constant_data_have_no_dimension(route):
    frame = xr.DataArray(np.full((9, 4), 3, "f4"), dims=("token", "neuron"))
    result = actstore.compute(actstore.dimensionality(frame))
    assert np.isnan(result["participation_ratio"]).all()
    assert np.isnan(result["effective_dimension"]).all()


def test_null_is_what_normal_data_give():
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(200):
        variance = spectrum(rng.normal(size=(40, 25)))
        ratios.append(variance.sum() ** 2 / (variance**2).sum())
    frame = xr.DataArray(rng.normal(size=(40, 25)), dims=("token", "neuron"))
    null = actstore.compute(actstore.dimensionality(frame))["null_participation_ratio"].item()
    assert np.mean(ratios) == pytest.approx(null, rel=0.01)


def test_too_wide_for_the_memory(tmp_path):
    plan = plan_of(bare_corpus([3000]), [StageSpec("a", (0,), 1000)], 512)
    values = {"a": np.random.default_rng(0).normal(size=(1, 3000, 1000)).astype("f4")}
    write_store(tmp_path / "a.zarr", plan, values)
    with pytest.raises(UsageError, match="covariance of a, 1,000 neurons wide"):
        actstore.dimensionality(tmp_path / "a.zarr", memory="16MiB")
    result = actstore.compute(actstore.dimensionality(tmp_path / "a.zarr"))
    variance = spectrum(values["a"][0])
    want = variance.sum() ** 2 / (variance**2).sum()
    assert result["participation_ratio"].item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"threshold": 95}, UsageError, "95% is 0.95"),
        ({"threshold": 0}, UsageError, "goes from 0 to 1"),
        ({"compat": "seed"}, UnknownNameError, "value of compat"),
    ],
)
def test_bad_questions(store, asked, error, message):
    with pytest.raises(error, match=message):
        actstore.dimensionality(store[0], **asked)


# -- nearest neighbours --------------------------------------------------------------------


def test_nearest_distances():
    x = data("far", 200, 12).astype(np.float64)
    distances = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))
    np.fill_diagonal(distances, np.inf)
    want = np.sort(distances, axis=1)[:, :2]
    np.testing.assert_allclose(np.stack(nearest(x), 1), want, rtol=1e-9)


def test_twonn_agrees_with_scikit_dimension():
    import skdim

    rng = np.random.default_rng(0)
    for d in (1, 3, 8):
        x = rng.normal(size=(500, d)) @ rng.normal(size=(d, 20))
        want = skdim.id.TwoNN(discard_fraction=0.1, method="linear").fit(x).dimension_
        assert twonn(x).dimension == pytest.approx(want, rel=1e-6)


def test_participation_ratio_agrees_with_scikit_dimension():
    import skdim

    x = data("correlated", 300, 20)
    want = skdim.id.lPCA(ver="participation_ratio").fit(x.astype("f8")).dimension_
    frame = xr.DataArray(x, dims=("token", "neuron"))
    got = actstore.compute(actstore.dimensionality(frame))["participation_ratio"].item()
    assert got == pytest.approx(want, rel=1e-5)


def test_twonn_error_is_that_of_repeated_draws():
    found = [twonn(np.random.default_rng(s).normal(size=(400, 5))) for s in range(40)]
    spread = np.std([f.dimension for f in found])
    assert 0.6 < np.mean([f.stderr for f in found]) / spread < 1.6


def test_duplicates_are_left_out_and_counted():
    x = np.random.default_rng(0).normal(size=(300, 4)).astype("f4")
    doubled = np.concatenate([x, x[:40]])
    frame = xr.DataArray(doubled, dims=("token", "neuron"))
    result = actstore.compute(actstore.intrinsic_dimension(frame))
    assert result["duplicates"].item() == 40
    plain = actstore.compute(
        actstore.intrinsic_dimension(xr.DataArray(x, dims=("token", "neuron")))
    )
    np.testing.assert_allclose(result["dimension"], plain["dimension"], rtol=1e-6)


def test_intrinsic_dimension_of_a_store(store):
    opened, values = store
    result = actstore.compute(actstore.intrinsic_dimension(opened, n=30, seed=4))
    assert result["dimension"].dims == ("stage", "layer")
    tokens = np.arange(opened.n_tokens)
    chosen = np.sort(np.random.default_rng(4).choice(tokens, 30, replace=False))
    for stage, layer in views():
        want = twonn(values[stage][layer][chosen])
        got = result.sel(stage=stage, layer=layer)
        assert got["dimension"].item() == pytest.approx(want.dimension)
        assert got["stderr"].item() == pytest.approx(want.stderr)
    assert np.isnan(result["dimension"].sel(stage="mlp_in", layer=2))
    with pytest.raises(UsageError, match="from 5 to 50,000"):
        actstore.intrinsic_dimension(opened, n=2)
