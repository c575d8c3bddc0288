"""Covariance between layers against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from helpers import bare_corpus, plan_of, write_store
from test_similarity import KINDS, data

import actstore
from actstore.errors import UnknownNameError, UsageError
from actstore.plan import StageSpec


def assert_covariance(got, want):
    """Equal to 1e-6 of what the spreads of the two allow."""
    spread = np.sqrt(np.outer(np.diagonal(want), np.diagonal(want)))
    np.testing.assert_array_less(np.abs(got - want), 1e-6 * spread + 1e-12)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    plan = plan_of(
        bare_corpus([200, 1, 250]),
        [StageSpec("hidden", (0, 1, 2, 3), 30), StageSpec("mlp_out", (0, 1, 2), 20)],
        64,
    )
    values = {
        s.name: np.stack(
            [data(KINDS[i], plan.n_tokens, s.layout.width, seed=i) for i in range(len(s.layers))]
        )
        for s in plan.stages
    }
    values["hidden"][1:] += values["hidden"][:1]
    values["hidden"][2, :, 7] = 4  # constant
    path = tmp_path_factory.mktemp("layers") / "a.zarr"
    write_store(path, plan, values)
    return actstore.open(path), values


def test_flattened(store):
    opened, values = store
    result = actstore.compute(actstore.layer_covariance(opened, tokens="position > 0"))
    assert result["covariance"].dims == ("stage", "layer", "layer_b")
    chosen = opened.column("position") > 0
    for stage, n in (("hidden", 4), ("mlp_out", 3)):
        flat = values[stage][:, chosen].reshape(n, -1).astype(np.float64)
        own = result.sel(stage=stage).isel(layer=slice(n), layer_b=slice(n))
        assert_covariance(own["covariance"].values, np.cov(flat))
        want = np.corrcoef(flat)
        np.testing.assert_allclose(own["correlation"], want, atol=1e-6)
        np.testing.assert_allclose(own["r_squared"], want**2, atol=1e-6)
    assert np.isnan(result["covariance"].sel(stage="mlp_out", layer=3)).all()


def test_by_neuron(store):
    opened, values = store
    result = actstore.compute(actstore.layer_covariance(opened, stages="hidden", per="neuron"))
    x = values["hidden"].astype(np.float64)
    for a in range(4):
        for b in range(4):
            covariances, squares = [], []
            for j in range(30):
                c = np.cov(x[a, :, j], x[b, :, j])
                covariances.append(c[0, 1])
                if c[0, 0] > 0 and c[1, 1] > 0:
                    squares.append(c[0, 1] ** 2 / (c[0, 0] * c[1, 1]))
            got = result.sel(layer=a, layer_b=b)
            assert got["covariance"].item() == pytest.approx(np.mean(covariances), rel=1e-5)
            assert got["r_squared"].item() == pytest.approx(np.mean(squares), abs=1e-6)


def test_layers_of_two_stages(tmp_path):
    """A stage's layers with those of another as wide: rows of the one, columns of the other."""
    stages = [StageSpec("hidden", (0, 1, 2), 12), StageSpec("attn_out", (0, 1), 12)]
    stages.append(StageSpec("mlp_out", (0, 1), 12))
    plan = plan_of(bare_corpus([50, 40]), stages, 64)
    rng = np.random.default_rng(0)
    values = {s.name: rng.normal(size=(len(s.layers), 90, 12)).astype("f4") for s in plan.stages}
    values["mlp_out"] += values["hidden"][:2]
    write_store(tmp_path / "a.zarr", plan, values)
    opened = actstore.open(tmp_path / "a.zarr")
    asked = {"stages": "hidden,attn_out", "stage_b": "mlp_out"}
    result = actstore.compute(actstore.layer_covariance(opened, **asked))
    assert dict(result.sizes) == {"stage": 2, "layer": 3, "layer_b": 2}
    assert result.attrs["stage_b"] == "mlp_out"
    each = actstore.compute(actstore.layer_covariance(opened, per="neuron", by="sequence", **asked))
    for stage, n in (("hidden", 3), ("attn_out", 2)):
        both = np.concatenate([values[stage], values["mlp_out"]]).astype(np.float64)
        flat = both.reshape(n + 2, -1)
        own = result.sel(stage=stage).isel(layer=slice(n))
        np.testing.assert_allclose(own["covariance"], np.cov(flat)[:n, n:], atol=1e-6)
        want = np.corrcoef(flat)[:n, n:]
        np.testing.assert_allclose(own["correlation"], want, atol=1e-6)
        np.testing.assert_allclose(own["r_squared"], want**2, atol=1e-6)
        squares = [np.corrcoef(both[:, 50:, j])[:n, n:] ** 2 for j in range(12)]
        got = each["r_squared"].sel(stage=stage, sequence=1).isel(layer=slice(n))
        np.testing.assert_allclose(got, np.mean(squares, 0), atol=1e-6)
    assert np.isnan(result["covariance"].sel(stage="attn_out", layer=2)).all()
    one = actstore.layer_covariance(opened, layers=1, stages="hidden", stage_b="mlp_out")
    assert actstore.compute(one)["covariance"].shape == (1, 1)
    assert actstore.pairs(result.sel(stage="hidden")).sizes["pair"] == 6
    with pytest.raises(UsageError, match=r"mlp_out has none of the layers asked; it has \[0, 1\]"):
        actstore.layer_covariance(opened, layers=2, stages="hidden", stage_b="mlp_out")


def test_groups_and_bad_questions(store):
    opened, values = store
    result = actstore.compute(actstore.layer_covariance(opened, stages="mlp_out", by="sequence"))
    assert result["covariance"].dims == ("sequence", "layer", "layer_b")
    chosen = opened.column("sequence") == 2
    want = np.cov(values["mlp_out"][:, chosen].reshape(3, -1).astype(np.float64))
    assert_covariance(result["covariance"].sel(sequence=2).values, want)
    with pytest.raises(UnknownNameError, match="value of per"):
        actstore.layer_covariance(opened, per="head")
    with pytest.raises(UnknownNameError, match=r"value of stage_b 'mlp_ot'.*did you mean"):
        actstore.layer_covariance(opened, stage_b="mlp_ot")
    with pytest.raises(UsageError, match="hidden and mlp_out have 30 and 20 neurons"):
        actstore.layer_covariance(opened, stages="hidden", stage_b="mlp_out")
    with pytest.raises(UsageError, match="needs two"):
        actstore.layer_covariance(opened, layers=1)
    frame = xr.DataArray(np.ones((2, 1, 1), "f4"), dims=("layer", "token", "neuron"))
    assert np.isnan(actstore.compute(actstore.layer_covariance(frame))["covariance"]).all()
