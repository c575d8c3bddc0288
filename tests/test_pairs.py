"""Matrices of pairs as flat tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
from helpers import write_small

import actstore
from actstore.errors import UsageError
from actstore.queries import information


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> actstore.Store:
    path = tmp_path_factory.mktemp("pairs") / "small.zarr"
    write_small(path)
    return actstore.open(path)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("computed")


def test_the_upper_triangle_row_by_row(small: actstore.Store) -> None:
    lazy = actstore.mutual_information(small, stages="hidden,mlp_out", null=2)
    with dask.config.set(scheduler=never):
        table = actstore.pairs(lazy)
    assert table["mutual_information"].dims == ("stage", "layer", "pair")
    assert table["covariance"].chunks and table["token_text_b"].chunks
    result = actstore.compute(lazy)
    whole = actstore.pairs(result)
    xr.testing.assert_identical(actstore.compute(table), whole)
    i, j = np.triu_indices(small.n_tokens, 1)
    for name in ("mutual_information", "covariance", "null_mean", "null_std", "z"):
        np.testing.assert_array_equal(whole[name], result[name].values[..., i, j])
        assert whole[name].attrs == result[name].attrs
    np.testing.assert_array_equal(whole["token_a"], i)
    np.testing.assert_array_equal(whole["token_b"], j)
    for column in ("sequence", "position"):
        values = np.asarray(small.column(column))
        np.testing.assert_array_equal(whole[f"{column}_a"], values[i])
        np.testing.assert_array_equal(whole[f"{column}_b"], values[j])
    text = small.column("token_text").decode()
    np.testing.assert_array_equal(whole["token_text_a"], text[i])
    np.testing.assert_array_equal(whole["token_text_b"], text[j])
    assert whole.attrs["query"] == "mutual_information"
    frame = whole.sel(stage="hidden", layer=1).to_dataframe()
    assert len(frame) == len(i) and frame.index.name == "pair"
    row = frame.iloc[500]
    assert row["token_a"] == i[500] and row["token_text_b"] == text[j[500]]
    assert row["covariance"] == result["covariance"].sel(stage="hidden", layer=1).values[i, j][500]


def test_chunks_follow_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each task holds some rows of the matrix at most."""
    monkeypatch.setattr(information, "BLOCK", 16)
    acts = np.random.default_rng(0).normal(size=(2, 70, 9)).astype("f4")
    data = xr.DataArray(acts, dims=("layer", "token", "neuron"))
    lazy = actstore.mutual_information(data)
    table = actstore.pairs(lazy)
    rows = [16, 16, 16, 16, 6]
    lengths = [sum(69 - r for r in range(16 * k, 16 * k + n)) for k, n in enumerate(rows)]
    assert table["covariance"].chunks == ((1, 1), tuple(lengths))
    assert table["token_a"].chunks == (tuple(lengths),)
    calls = []

    def counted(name: str) -> None:
        plain = getattr(information._Pairs, name)
        monkeypatch.setattr(
            information._Pairs, name, lambda *given: calls.append(name) or plain(*given)
        )

    counted("compare")
    counted("vectors")
    one = table["covariance"].isel(layer=0).to_dataset(name="covariance")
    found = actstore.compute(one)
    # Each block at or above the diagonal once, and so each of their rows.
    assert (calls.count("compare"), calls.count("vectors")) == (15, 5)
    calls.clear()
    monkeypatch.setattr(information, "_MOST_READY", 70 * 9 * 18 - 1)  # not all are held
    again = actstore.pairs(actstore.mutual_information(data))["covariance"].isel(layer=0)
    again = actstore.compute(again.to_dataset(name="covariance"))
    assert (calls.count("compare"), calls.count("vectors")) == (15, 25)
    xr.testing.assert_equal(again, found)
    xr.testing.assert_identical(actstore.compute(table), actstore.pairs(actstore.compute(lazy)))
    only = actstore.pairs(actstore.mutual_information(data, tokens=np.arange(70) == 3))
    assert actstore.compute(only)["covariance"].shape == (2, 0)


def test_groups_follow_one_another(small: actstore.Store) -> None:
    tree = actstore.pairwise_covariance(small, stages="hidden", by="condition")
    table = actstore.compute(actstore.pairs(tree))
    computed = actstore.compute(tree)
    xr.testing.assert_identical(table, actstore.pairs(computed))
    column = small.column("condition").decode()
    for name, node in computed.children.items():
        own = table.isel(pair=table["condition"].values == name)
        chosen = np.flatnonzero(column == name)
        i, j = np.triu_indices(len(chosen), 1)
        np.testing.assert_array_equal(own["token_a"], chosen[i])
        np.testing.assert_array_equal(own["token_b"], chosen[j])
        np.testing.assert_array_equal(own["covariance"], node["covariance"].values[:, i, j])
    means = table["covariance"].sel(layer=1).groupby("condition").mean()
    assert set(means["condition"].values) == {"internal", "terminal"}
    by_number = actstore.pairs(actstore.pairwise_covariance(small, stages="hidden", by="year"))
    assert actstore.compute(by_number)["year"].dtype.kind == "i"


def test_two_sets_give_all_pairs(small: actstore.Store) -> None:
    lazy = actstore.mutual_information(
        small, stages="hidden", tokens="position == 1", tokens_b="position == 2"
    )
    result, table = actstore.compute(lazy, actstore.pairs(lazy))
    xr.testing.assert_identical(table, actstore.pairs(result))
    n, m = result.sizes["token"], result.sizes["token_b"]
    assert table.sizes["pair"] == n * m
    np.testing.assert_array_equal(table["token_a"], np.repeat(result["token"], m))
    np.testing.assert_array_equal(table["token_b"], np.tile(result["token_b"], n))
    assert set(table["position_a"].values) == {1} and set(table["position_b"].values) == {2}
    np.testing.assert_array_equal(
        table["covariance"], result["covariance"].values.reshape(len(result["layer"]), -1)
    )


def test_other_results_of_pairs(small: actstore.Store) -> None:
    neurons = actstore.mutual_information(small, stages="hidden", axis="neuron", neurons="3-7")
    table = actstore.compute(actstore.pairs(neurons))
    assert table["neuron_a"].values.tolist() == [3, 3, 3, 3, 4, 4, 4, 5, 5, 6]
    assert table["neuron_b"].values.tolist() == [4, 5, 6, 7, 5, 6, 7, 6, 7, 7]
    cosines = actstore.cosine_matrix(small, stages="hidden", tokens="sequence == 3")
    table = actstore.compute(actstore.pairs(cosines))
    n = cosines.sizes["token"]
    assert table.sizes["pair"] == n * (n - 1) // 2
    between = actstore.cosine_matrix(
        small, stages="mlp_out", stage_b="attn_z", tokens="sequence == 3"
    )
    assert actstore.pairs(between).sizes["pair"] == n * n  # a token with itself at the other stage
    layers = actstore.compute(actstore.pairs(actstore.layer_covariance(small, stages="hidden")))
    assert layers["layer_a"].values.tolist() == [0, 0, 1]
    assert layers["r_squared"].dims == ("pair",)


def test_what_has_no_pairs(small: actstore.Store) -> None:
    with pytest.raises(UsageError, match=r"none beside its pair.*mutual_information.*reduce"):
        actstore.pairs(actstore.mutual_information(small, stages="hidden", reduce="mean"))


def test_a_table_is_written_without_being_held(small: actstore.Store, tmp_path: Path) -> None:
    table = actstore.pairs(actstore.mutual_information(small, stages="hidden"))
    actstore.save(table, tmp_path / "pairs.nc")
    with xr.open_dataset(tmp_path / "pairs.nc") as opened:
        np.testing.assert_array_equal(opened["covariance"], table["covariance"].values)
        np.testing.assert_array_equal(opened["token_text_a"], table["token_text_a"].values)
    numbers = table.drop_vars(["stage", "token_text_a", "token_text_b"]).drop_attrs()
    numbers.to_zarr(tmp_path / "pairs.zarr", consolidated=False)
    again = xr.open_zarr(tmp_path / "pairs.zarr", consolidated=False)
    np.testing.assert_array_equal(again["token_b"], table["token_b"].values)
