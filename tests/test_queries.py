"""Moments and histograms over stores and arrays, against numpy and scipy in float64."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
from helpers import (
    PLAYS,
    STAGES,
    VOCABULARY,
    bare_corpus,
    plan_of,
    random_values,
    stored,
    write_small,
    write_store,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import actstore
from actstore.errors import UnknownNameError, UsageError
from actstore.plan import StageSpec
from actstore.queries.registry import QUERIES
from actstore.queries.selection import RESULT_NAMES
from actstore.storage import counters

EDGES = [-3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 2.5]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The small store, its values as stored, and columns of its tokens."""
    path = tmp_path_factory.mktemp("queries") / "run.zarr"
    plan, values = write_small(path)
    values = {s.name: stored(values[s.name], s.source_dtype) for s in STAGES}
    corpus, kept = plan.corpus, np.flatnonzero(plan.corpus.keep)
    sequence = corpus.sequence[kept]
    columns = {
        "position": corpus.position[kept],
        "token_text": np.array([VOCABULARY[i] for i in corpus.token_ids[kept]], object),
        "play": np.array([PLAYS[s % 4] for s in sequence], object),
        "year": np.array([1599 + s % 5 for s in sequence]),
        "special": corpus.token_ids[kept] == 0,
        "offset": corpus.token_labels["offset"][kept],
        "condition": corpus.token_labels["condition"].decode()[kept],
    }
    return SimpleNamespace(path=path, store=actstore.open(path), values=values, columns=columns)


def nothing_runs(*_: Any, **__: Any) -> Any:
    raise AssertionError("something was computed")


# -- references ----------------------------------------------------------------------------


def plain_moments(values: np.ndarray) -> dict[str, float]:
    """Of a flat array."""
    x, n = values.astype(np.float64).ravel(), values.size
    constant = n < 2 or x.min() == x.max()
    nan = float("nan")
    return {
        "count": n,
        "mean": x.mean(),
        "variance": x.var(ddof=1) if n > 1 else nan,
        "std": x.std(ddof=1) if n > 1 else nan,
        "skewness": nan if constant else stats.skew(x),
        "kurtosis": nan if constant else stats.kurtosis(x),
        "min": x.min(),
        "max": x.max(),
        "zero_fraction": (x == 0).mean(),
        "positive_fraction": (x > 0).mean(),
    }


EXACT = ("count", "min", "max", "zero_fraction", "positive_fraction")


def check_moments(found: Any, values: np.ndarray) -> None:
    """Compare one row of a result with the values it is about."""
    expected = plain_moments(values)
    spread = max(expected["std"], 1e-300)
    for name, right in expected.items():
        value = found[name].item()
        if name in EXACT:
            assert value == right, name
        elif np.isnan(right):
            assert np.isnan(value), name
        elif name == "mean":
            assert abs(value - right) <= 1e-6 * spread if spread > 1e-300 else value == right
        else:
            assert np.isclose(
                value, right, rtol=2e-5, atol=2e-5 if name[-4:] == "osis" else 2e-6
            ), name


def check_per_neuron(result: xr.Dataset, values: np.ndarray) -> None:
    """Compare with values (layer, token, neuron)."""
    for i in range(values.shape[0]):
        for j in range(values.shape[2]):
            check_moments(result.isel(layer=i, neuron=j), values[i, :, j])


def plain_histogram(values: np.ndarray, edges: Any) -> dict[str, Any]:
    x = values.astype(np.float64).ravel()
    finite = x[~np.isnan(x)]
    return {
        "counts": np.histogram(finite, edges)[0].tolist(),
        "below": int((x < edges[0]).sum()),
        "above": int((x > edges[-1]).sum()),
        "nonfinite": int(np.isnan(x).sum()),
    }


def check_histogram(found: xr.Dataset, values: np.ndarray, edges: Any = EDGES) -> None:
    for name, right in plain_histogram(values, edges).items():
        assert found[name].values.tolist() == right, name


# -- the small store -----------------------------------------------------------------------


@pytest.mark.parametrize("stage", [s.name for s in STAGES])
def test_moments_of_each_neuron(small: SimpleNamespace, stage: str) -> None:
    result = actstore.moments(small.store, stages=stage).compute()
    values = small.values[stage]
    assert result["mean"].dims == ("layer", "neuron")
    assert result["layer"].values.tolist() == list(range(len(values)))
    assert result["neuron"].values.tolist() == list(range(values.shape[2]))
    check_per_neuron(result, values)


@pytest.mark.parametrize("stage", [s.name for s in STAGES])
def test_moments_and_histograms_of_layers(small: SimpleNamespace, stage: str) -> None:
    values = small.values[stage]
    moments, histogram = actstore.compute(
        actstore.moments(small.store, stages=stage, per="layer"),
        actstore.histogram(small.store, stages=stage, bins=EDGES),
    )
    assert moments["mean"].dims == ("layer",)
    assert histogram["counts"].dims == ("layer", "bin")
    for i in range(len(values)):
        check_moments(moments.isel(layer=i), values[i])
        check_histogram(histogram.isel(layer=i), values[i])


def test_heads(small: SimpleNamespace) -> None:
    values = small.values["attn_z"]
    moments = actstore.moments(small.store, stages="attn_z", per="head").compute()
    assert moments["mean"].dims == ("layer", "head")
    some = actstore.histogram(
        small.store, stages="attn_z", per="head", bins=EDGES, neurons="9-11,24-31"
    ).compute()
    assert moments["head"].values.tolist() == [0, 1, 2, 3]
    assert some["head"].values.tolist() == [1, 3]
    for i in range(2):
        for head in range(4):
            check_moments(
                moments.isel(layer=i).sel(head=head), values[i][:, 8 * head : 8 * head + 8]
            )
        for head, columns in [(1, [9, 10, 11]), (3, list(range(24, 32)))]:
            check_histogram(some.isel(layer=i).sel(head=head), values[i][:, columns])


def test_histograms_of_neurons(small: SimpleNamespace) -> None:
    values = small.values["mlp_out"]
    result = actstore.histogram(small.store, stages="mlp_out", per="neuron", bins=EDGES).compute()
    assert result["counts"].dims == ("layer", "neuron", "bin")
    for i in range(2):
        for j in range(32):
            check_histogram(result.isel(layer=i, neuron=j), values[i, :, j])


def test_layers_and_neurons(small: SimpleNamespace) -> None:
    result = actstore.moments(
        small.store, stages="hidden", layers="0,-1", neurons=[3, 23, 4]
    ).compute()
    assert result["layer"].values.tolist() == [0, 2]
    assert result["neuron"].values.tolist() == [3, 4, 23]
    check_per_neuron(result, small.values["hidden"][[0, 2]][:, :, [3, 4, 23]])
    one = actstore.histogram(
        small.store, stages="hidden", layers=1, neurons=7, bins=EDGES
    ).compute()
    check_histogram(one.isel(layer=0), small.values["hidden"][1][:, 7])


EXPRESSIONS = {
    "position > 0": lambda c: c["position"] > 0,
    "position == 0": lambda c: c["position"] == 0,
    "position > 0 and condition == 'terminal'": lambda c: (
        (c["position"] > 0) & (c["condition"] == "terminal")
    ),
    "play in ['Lear', ''] or year >= 1602": lambda c: (
        (c["play"] == "Lear") | (c["play"] == "") | (c["year"] >= 1602)
    ),
    "token_text == ' sea'": lambda c: c["token_text"] == " sea",
    "not special and offset < 0": lambda c: ~c["special"] & (c["offset"] < 0),
}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_token_expressions(small: SimpleNamespace, expression: str) -> None:
    mask = EXPRESSIONS[expression](small.columns).astype(bool)
    assert 0 < mask.sum() < 147
    values = small.values["mlp_post"]
    for tokens in (expression, mask, mask.tolist()):
        moments, histogram = actstore.compute(
            actstore.moments(small.store, stages="mlp_post", tokens=tokens),
            actstore.histogram(small.store, stages="mlp_post", tokens=tokens, bins=EDGES),
        )
        check_per_neuron(moments, values[:, mask])
        for i in range(2):
            check_histogram(histogram.isel(layer=i), values[i, mask])
        for result in (moments, histogram):
            assert result.attrs["tokens_used"] == mask.sum()
            assert result.attrs["tokens_excluded"] == 147 - mask.sum()


def test_groups(small: SimpleNamespace) -> None:
    """A play of which no token is asked gives zeros and NaN."""
    mask = small.columns["play"] != "Lear"
    moments, histogram = actstore.compute(
        actstore.moments(small.store, stages="mlp_post", by="play", tokens="play != 'Lear'"),
        actstore.histogram(
            small.store, stages="mlp_post", by="play", tokens="play != 'Lear'", bins=EDGES
        ),
    )
    assert moments["mean"].dims == ("layer", "play", "neuron")
    assert histogram["counts"].dims == ("layer", "play", "bin")
    assert moments["play"].values.tolist() == histogram["play"].values.tolist() == PLAYS
    for play in set(PLAYS) - {"Lear"}:
        chosen = mask & (small.columns["play"] == play)
        check_per_neuron(moments.sel(play=play), small.values["mlp_post"][:, chosen])
        for i in range(2):
            check_histogram(
                histogram.isel(layer=i).sel(play=play), small.values["mlp_post"][i, chosen]
            )
    nobody = moments.sel(play="Lear")
    assert (nobody["count"] == 0).all()
    assert all(
        np.isnan(nobody[name]).all() for name in plain_moments(np.ones(3)) if name != "count"
    )
    assert (histogram.sel(play="Lear")[["counts", "below", "above"]].to_array() == 0).all()


def test_groups_by_numbers(small: SimpleNamespace) -> None:
    result = actstore.moments(small.store, stages="mlp_post", by="year", per="layer").compute()
    assert result["year"].values.tolist() == [1599, 1600, 1601, 1602, 1603]
    for year in range(1599, 1604):
        values = small.values["mlp_post"][1, small.columns["year"] == year]
        check_moments(result.isel(layer=1).sel(year=year), values)


def grouped_array(name: str) -> xr.DataArray:
    """90 tokens in three groups by a label of this name."""
    values = np.random.default_rng(5).normal(size=(2, 90, 6)).astype(np.float32)
    array = xr.DataArray(values, dims=("layer", "token", "neuron"), name="mlp_post")
    return array.assign_coords({name: ("token", np.arange(90) // 30)})


@pytest.mark.parametrize("name", sorted(RESULT_NAMES - {"layer", "neuron"}))
def test_labels_named_like_dimensions_of_results(name: str) -> None:
    array = grouped_array(name)
    for query in (actstore.moments, actstore.sample, actstore.quantiles):
        with pytest.raises(UsageError, match=rf"by='{name}': results have .* of that name.*'my_"):
            query(array, by=name)
    assert actstore.moments(array, tokens=f"{name} == 1").attrs["tokens_used"] == 30


@pytest.mark.parametrize("name", sorted(QUERIES))
def test_names_of_results_are_known(small: SimpleNamespace, name: str) -> None:
    """Whatever dimensions and coordinates a query makes, labels to split by are not named so."""
    more: list[dict[str, Any]] = [{}]
    more += {
        "histogram": [{"bins": EDGES}, {"per": "head", "stages": "attn_z"}, {"per": "neuron"}],
        "sample": [{"unit": "value"}],
        "rsa": [{"pairs": "layers"}],
        "cka": [{"pairs": "layers"}],
        "cosine_matrix": [{"reduce": "histogram"}],
        "mutual_information": [{"reduce": r} for r in ("mean", "histogram", "joint")],
        "pairwise_covariance": [{"reduce": "histogram"}],
    }.get(name, [])
    for options in more:
        result = QUERIES[name].function(small.store, **{"stages": "attn_z,mlp_out", **options})
        assert isinstance(result, xr.Dataset)
        labels = {"sequence", "position", "token_text"}
        assert {str(n) for n in (*result.dims, *result.coords)} - labels <= RESULT_NAMES


def test_labels_of_a_store_named_like_dimensions(tmp_path: Path) -> None:
    """What the message says can be done can be done."""
    records = [{"input_ids": [1, 2, 3, 4], "rank": word} for word in ("low", "high", "low")]
    plan = plan_of(actstore.build_corpus(records), [StageSpec("mlp_post", (0,), 8)], 16)
    write_store(tmp_path / "run.zarr", plan, random_values(plan))
    store = actstore.open(tmp_path / "run.zarr")
    with pytest.raises(UnknownNameError, match="unknown column 'bin'"):
        actstore.moments(store, by="bin")
    with pytest.raises(UsageError, match=r"rename\({'rank': 'my_rank'}\), by='my_rank'") as refused:
        actstore.moments(store, by="rank")
    assert "component, dimension" in str(refused.value)
    split = actstore.moments(store["mlp_post"].rename({"rank": "my_rank"}), by="my_rank")
    assert split["my_rank"].values.tolist() == ["low", "high"]
    values = store["mlp_post"].values[:, 4:8]
    check_per_neuron(split.sel(my_rank="high").compute(), values)
    few = actstore.moments(store["mlp_post"], tokens="rank == 'high'")
    check_per_neuron(few.compute(), values)


@pytest.mark.parametrize("name", ["mean", "variance", "count"])
def test_labels_named_like_variables_of_the_result(name: str) -> None:
    with pytest.raises(UsageError, match=f"by='{name}': the result has a variable of that name"):
        actstore.moments(grouped_array(name), by=name)
    assert name in actstore.histogram(grouped_array(name), bins=EDGES, by=name).compute()


@pytest.mark.parametrize("by", ["position", "sequence", "token_text"])
def test_groups_by_columns_that_results_show(small: SimpleNamespace, by: str) -> None:
    """Samples and top tokens have a label less, as each group is of one value of it."""
    queries = [
        query(small.store, stages="mlp_post", by=by, **options)
        for query, options in (
            (actstore.moments, {}),
            (actstore.histogram, {"bins": EDGES}),
            (actstore.top_tokens, {"k": 2}),
            (actstore.sample, {"n": 3}),
        )
    ]
    for result in actstore.compute(*queries):
        for i, value in enumerate(result[by].values[:4]):
            own = small.store.column(by)
            own = own.decode() if hasattr(own, "decode") else own
            chosen = np.flatnonzero(own == value)
            one = result.isel({by: i})
            if "token" in one.variables:
                tokens = one["token"].values.ravel()
                assert np.isin(tokens[tokens >= 0], chosen).all()
            elif "counts" in one:
                check_histogram(one.isel(layer=0), small.values["mlp_post"][0, chosen])
            else:
                check_per_neuron(one, small.values["mlp_post"][:, chosen])
    if by == "position":
        with pytest.raises(UsageError, match="by='position': the result has a variable"):
            actstore.peaks(small.store, by=by)


# -- several stages ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two stages of one width over layers that differ, and one that is wider."""
    specs = [
        StageSpec("resid_pre", (0, 1, 2), 24),
        StageSpec("mlp_post", (1, 2), 48),
        StageSpec("mlp_out", (2, 3), 24),
    ]
    plan = plan_of(bare_corpus([30, 20]), specs, 32)
    values = random_values(plan)
    path = tmp_path_factory.mktemp("mixed") / "mixed.zarr"
    write_store(path, plan, values)
    layers = {s.name: list(s.layers) for s in specs}
    return SimpleNamespace(store=actstore.open(path), values=values, layers=layers)


def test_stages_of_one_width_share_a_dimension(mixed: SimpleNamespace) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lazy = actstore.moments(mixed.store, stages="resid_pre,mlp_out")
    result = lazy.compute()
    assert result["mean"].dims == ("stage", "layer", "neuron")
    assert result["stage"].values.tolist() == ["resid_pre", "mlp_out"]
    assert result["layer"].values.tolist() == [0, 1, 2, 3]
    for stage in ("resid_pre", "mlp_out"):
        own = mixed.layers[stage]
        one = result.sel(stage=stage)
        check_per_neuron(one.sel(layer=own), mixed.values[stage])
        assert np.isnan(one["mean"].sel(layer=[n for n in range(4) if n not in own])).all()
    assert result["mean"].attrs == {"long_name": "mean", "units": "activation"}


def test_stages_of_several_widths(mixed: SimpleNamespace) -> None:
    tree = actstore.moments(mixed.store)
    assert isinstance(tree, xr.DataTree)
    assert list(tree.children) == mixed.store.stages
    done = actstore.compute(tree)
    for stage, values in mixed.values.items():
        assert done[stage]["layer"].values.tolist() == mixed.layers[stage]
        check_per_neuron(done[stage].to_dataset(), values)
        assert done[stage].attrs["query"] == "moments"
    by_layer = actstore.histogram(mixed.store, bins=EDGES).compute()
    assert by_layer["counts"].dims == ("stage", "layer", "bin")
    for stage, values in mixed.values.items():
        for i, layer in enumerate(mixed.layers[stage]):
            check_histogram(by_layer.sel(stage=stage, layer=layer), values[i])
    some = actstore.moments(mixed.store, neurons="0-3").compute()
    assert some["mean"].dims == ("stage", "layer", "neuron")


def test_layers_that_some_stages_lack(mixed: SimpleNamespace) -> None:
    result = actstore.moments(mixed.store, layers="1,2", per="layer").compute()
    assert result["layer"].values.tolist() == [1, 2]
    for stage in mixed.store.stages:
        for layer in {1, 2} & set(mixed.layers[stage]):
            values = mixed.values[stage][mixed.layers[stage].index(layer)]
            check_moments(result.sel(stage=stage, layer=layer), values)
    assert np.isnan(result["mean"].sel(stage="mlp_out", layer=1))
    some = actstore.moments(mixed.store, stages="resid_pre,mlp_out", layers="0,3", per="layer")
    assert some.compute()["count"].sel(stage="mlp_out", layer=3) == 50 * 24
    with pytest.raises(UnknownNameError, match=r"unknown layer 7\. Known: 0, 1, 2, 3"):
        actstore.moments(mixed.store, layers=7)


# -- data of one's own ---------------------------------------------------------------------

rng = np.random.default_rng(3)


def nasty() -> Iterator[tuple[str, np.ndarray]]:
    noise = rng.normal(size=(2, 300, 20)).astype(np.float32)
    outlier = noise.copy()
    outlier[:, :, 3] = 3000 + 10 * noise[:, :, 3]
    outlier[:, :, 4] = -3000 + 10 * noise[:, :, 4]
    yield "outliers at 3000", outlier
    constant = noise.copy()
    constant[:, :, 0] = 0.1
    constant[:, :, 1] = 0
    constant[:, :, 2] = -1e9
    yield "constants", constant
    yield "zeros", np.zeros((1, 40, 5), np.float32)
    yield "negative zeros", np.full((1, 40, 5), -0.0, np.float32)
    yield "one token", noise[:, :1]
    yield "two tokens", noise[:, :2]
    yield "fewer tokens than neurons", noise[:, :7]
    yield "one neuron", noise[:, :, :1]
    yield "tiny", noise * np.float32(1e-12)
    yield "huge", noise * np.float32(1e12)
    yield "heavy tails", (noise**5).astype(np.float32)
    yield "many rows", rng.exponential(size=(1, 5000, 3)).astype(np.float32)
    yield "float16", noise.astype(np.float16)
    yield "integers", rng.integers(-4, 5, (2, 50, 6))


@pytest.mark.parametrize(("name", "values"), list(nasty()), ids=[n for n, _ in nasty()])
def test_nasty_data(name: str, values: np.ndarray) -> None:
    array = xr.DataArray(values, dims=("layer", "token", "neuron"))
    each, layer, histogram = actstore.compute(
        actstore.moments(array),
        actstore.moments(array, per="layer"),
        actstore.histogram(array, bins=EDGES),
    )
    check_per_neuron(each, values)
    for i in range(len(values)):
        check_histogram(histogram.isel(layer=i), values[i])
        if name not in ("constants",):  # neurons nine magnitudes apart
            check_moments(layer.isel(layer=i), values[i])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nasty_data_in_a_store(tmp_path: Path, dtype: str) -> None:
    """From sketches, and from the data where a token is left out."""
    values = rng.normal(size=(2, 300, 16)).astype(np.float32)
    values[:, :, 0] = 3000 + 10 * values[:, :, 0]
    values[:, :, 1], values[:, :, 2] = 0.1, 0
    values[:, :, 3] *= np.float32(1e-12)
    values[:, :, 4] *= np.float32(1e12)
    values[:, ::7, 5] = 40
    spec = StageSpec("mlp_post", (0, 1), 16, dtype)
    write_store(
        tmp_path / "run.zarr", plan_of(bare_corpus([300]), [spec], 64), {"mlp_post": values}
    )
    values = stored(values, dtype)
    some = np.arange(300) != 17
    check_per_neuron(actstore.moments(tmp_path / "run.zarr").compute(), values)
    check_per_neuron(
        actstore.moments(tmp_path / "run.zarr", tokens=some).compute(), values[:, some]
    )


def test_nonfinite_values_are_counted(tmp_path: Path) -> None:
    values = rng.normal(size=(1, 30, 4)).astype(np.float32)
    values[0, :3, 1], values[0, :5, 2], values[0, :7, 3] = np.nan, np.inf, -np.inf
    array = xr.DataArray(values, dims=("layer", "token", "neuron"))
    result = actstore.histogram(array, per="neuron", bins=EDGES).compute()
    for j in range(4):
        check_histogram(result.isel(layer=0, neuron=j), values[0, :, j])
    plan = plan_of(bare_corpus([30]), [StageSpec("mlp_post", (0,), 4)], 32)
    write_store(tmp_path / "run.zarr", plan, {"mlp_post": values}, allow_nonfinite=True)
    again = actstore.histogram(tmp_path / "run.zarr", per="neuron", bins=EDGES).compute()
    assert again["nonfinite"].values.tolist() == result["nonfinite"].values.tolist()


def labelled(values: np.ndarray) -> xr.DataArray:
    return xr.DataArray(
        values,
        dims=("layer", "token", "neuron"),
        coords={
            "layer": [3, 5],
            "condition": ("token", np.arange(values.shape[1]) % 3),
            "word": ("token", np.array(["a", "b"])[np.arange(values.shape[1]) % 2]),
        },
        name="mine",
    )


@pytest.mark.parametrize(
    "chunks", [{"token": 7}, {"layer": 1, "token": 50, "neuron": 3}, {"token": (1, 98, 1)}, {}]
)
def test_dask_arrays(chunks: dict[str, Any]) -> None:
    values = rng.normal(size=(2, 100, 8)).astype(np.float32)
    array = labelled(values)
    array = array.copy(data=array.chunk(chunks).data)
    with dask.config.set(scheduler=nothing_runs):
        lazy = actstore.moments(array, tokens="condition != 1 and word == 'a'", layers=5)
        binned = actstore.histogram(array.transpose("neuron", "token", "layer"), bins=EDGES)
        grouped = actstore.moments(array, by="word", per="layer")
    mask = (np.arange(100) % 3 != 1) & (np.arange(100) % 2 == 0)
    result = lazy.compute()
    assert result["layer"].values.tolist() == [5]
    assert result["stage"].item() == "mine"
    check_per_neuron(result, values[1:, mask])
    binned = binned.compute()
    for i in range(2):
        check_histogram(binned.isel(layer=i), values[i])
    for word, start in [("a", 0), ("b", 1)]:
        check_moments(grouped.compute().sel(word=word, layer=3), values[0, start::2])


def test_arrays_without_layers_and_labels() -> None:
    values = rng.normal(size=(20, 3)).astype(np.float32)
    result = actstore.moments(xr.DataArray(values, dims=("token", "neuron"))).compute()
    assert result["layer"].values.tolist() == [0]
    check_per_neuron(result, values[None])


def test_arrays_that_were_opened_and_not_loaded(tmp_path: Path) -> None:
    values = rng.normal(size=(2, 100, 8)).astype(np.float32)
    mine = labelled(values).drop_vars("word").to_dataset()
    mine.to_zarr(tmp_path / "mine.zarr", consolidated=False)
    mine = xr.open_dataset(tmp_path / "mine.zarr", engine="zarr", consolidated=False)["mine"]
    moments, histogram = actstore.compute(
        actstore.moments(mine), actstore.histogram(mine, bins=EDGES)
    )
    check_per_neuron(moments, values)
    check_histogram(histogram.isel(layer=1), values[1])


# -- laziness and sharing ------------------------------------------------------------------


def test_building_computes_nothing(small: SimpleNamespace, mixed: SimpleNamespace) -> None:
    counters.reset()
    with dask.config.set(scheduler=nothing_runs):
        queries = [
            actstore.moments(small.store),
            actstore.moments(str(small.path), stages="mlp_post", tokens="position > 0", by="play"),
            actstore.histogram(small.path, stages="attn_z", per="head", bins=EDGES),
            actstore.histogram(mixed.store, bins=10, range=(-1, 1), density=True),
        ]
    assert (counters.reads, counters.bytes) == (0, 0)
    for query in queries[1:]:
        assert all(
            dask.is_dask_collection(query[name]) for name in ("below", "mean") if name in query
        )


def test_queries_computed_together_read_each_shard_once(small: SimpleNamespace) -> None:
    def nbytes(*queries: Any) -> int:
        counters.reset()
        actstore.compute(*queries)
        return counters.bytes

    cut = np.arange(147) != 5  # through a stratum: no sketch knows

    def three() -> list[Any]:
        asked = {"stages": "mlp_post", "tokens": cut}
        return [
            actstore.moments(small.store, **asked),
            actstore.histogram(small.store, bins=EDGES, **asked),
            actstore.histogram(small.store, bins=EDGES, per="neuron", **asked),
        ]

    alone = [nbytes(q) for q in three()]
    values = small.values["mlp_post"].nbytes
    assert all(values <= n <= 1.6 * values for n in alone)  # the last chunks are padded
    assert nbytes(*three()) == alone[0]
    counters.reset()
    actstore.moments(small.store, stages="mlp_post", layers=1, tokens=cut).compute()
    assert counters.bytes == alone[0] / 2


VARIANTS: list[dict[str, Any]] = [
    {},
    {"layers": "1"},
    {"layers": "1,2"},
    {"neurons": "3"},
    {"neurons": "3", "per": "layer"},
    {"neurons": "0-4"},
    {"per": "layer"},
    {"tokens": "position > 0"},
    {"by": "play"},
    {"by": "condition"},
    {"by": "condition", "tokens": "position > 2"},
]


@pytest.mark.parametrize("name", ["moments", "histogram"])
def test_queries_computed_together_do_not_mix(small: SimpleNamespace, name: str) -> None:
    """Whatever each asks of the same data, it gets what it gets alone."""
    query = getattr(actstore, name)
    more = {"bins": EDGES} if name == "histogram" else {}
    queries = [query(small.store, stages="hidden", **more, **options) for options in VARIANTS]
    queries.append(query(small.store, stages="mlp_post", **more))
    alone = [q.compute(scheduler="synchronous") for q in queries]
    together = actstore.compute(*queries)
    for options, a, b in zip([*VARIANTS, {"stages": "mlp_post"}], alone, together, strict=True):
        assert a.identical(b), options
        assert a.attrs == b.attrs


def test_groups_of_the_same_codes_do_not_mix() -> None:
    """Two columns with equal codes and other values, one of them with a value more."""
    values = rng.normal(size=(1, 40, 3)).astype(np.float32)
    array = xr.DataArray(values, dims=("layer", "token", "neuron"))
    array = array.assign_coords(
        a=("token", np.array(["x", "y"])[np.arange(40) % 2]),
        b=("token", np.array(["u", "v"])[np.arange(40) % 2]),
    )
    a, b = actstore.compute(actstore.moments(array, by="a"), actstore.moments(array, by="b"))
    assert (a["a"].values.tolist(), b["b"].values.tolist()) == (["x", "y"], ["u", "v"])
    assert np.array_equal(a["mean"], b["mean"])


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_the_scheduler_changes_nothing(small: SimpleNamespace, scheduler: str) -> None:
    query = actstore.moments(small.store, stages="mlp_post", tokens="position > 0")
    first = actstore.compute(query, scheduler="synchronous")
    assert actstore.compute(query, scheduler=scheduler).identical(first)
    assert query.compute(scheduler=scheduler).identical(first)


# -- bins ----------------------------------------------------------------------------------

STEP = st.floats(1e-3, 10)


@st.composite
def edge_lists(draw: st.DrawFn) -> np.ndarray:
    """Ascending edges: even ones, nearly even ones, and any."""
    kind = draw(st.sampled_from(["even", "nearly", "any", "one"]))
    low = draw(st.floats(-100, 100))
    if kind == "one":
        return np.array([low, low + draw(STEP)])
    if kind == "any":
        return low + np.cumsum([0.0, *draw(st.lists(STEP, min_size=1, max_size=30))])
    edges = np.linspace(low, low + draw(STEP), draw(st.integers(2, 60)))
    if kind == "nearly":
        shake = np.random.default_rng(draw(st.integers(0, 2**32))).uniform(-0.45, 0.45, len(edges))
        edges = edges + shake * (edges[1] - edges[0])
    return edges


@given(edge_lists(), st.integers(0, 2**32), st.booleans())
@settings(max_examples=150, deadline=None)
def test_bins_are_numpys(edges: np.ndarray, seed: int, wide: bool) -> None:
    """Values on, just below and just above every edge, and anywhere, in float32 and float64."""
    own = np.random.default_rng(seed)
    kind = np.float64 if wide else np.float32
    near = edges.astype(kind)
    values = np.concatenate(
        [
            near,
            np.nextafter(near, kind(-np.inf)),
            np.nextafter(near, kind(np.inf)),
            own.uniform(edges[0] - 1, edges[-1] + 1, 200).astype(kind),
            [np.inf, -np.inf, np.nan, 0, -0.0],
        ]
    ).astype(kind)
    array = xr.DataArray(values[:, None], dims=("token", "neuron"))
    result = actstore.histogram(array, bins=edges).compute()
    check_histogram(result.isel(layer=0), values, edges)
    centres = (edges[1:] + edges[:-1]) / 2
    assert result["bin"].values.tolist() == centres.tolist()
    assert np.array_equal(result["edges"].values.ravel(), edges)


@given(st.integers(1, 200), st.floats(-50, 50), STEP)
@settings(max_examples=100, deadline=None)
def test_a_number_of_bins_is_numpys(bins: int, low: float, width: float) -> None:
    limits = (low, low + width)
    values = np.random.default_rng(bins).uniform(low - 0.1, low + width, (500, 2))
    values = values.astype(np.float32)
    array = xr.DataArray(values, dims=("token", "neuron"))
    result = actstore.histogram(array, bins=bins, range=limits).compute()
    counts, edges = np.histogram(values.astype(np.float64), bins=np.linspace(*limits, bins + 1))
    assert result["counts"].values[0].tolist() == counts.tolist()
    assert np.array_equal(result["edges"].values.ravel(), edges)


def test_density(small: SimpleNamespace) -> None:
    result = actstore.histogram(small.store, stages="mlp_post", bins=EDGES, density=True).compute()
    assert "counts" not in result
    for i in range(2):
        values = small.values["mlp_post"][i].astype(np.float64)
        expected = np.histogram(values, EDGES, density=True)[0]
        assert np.allclose(result["density"].values[i], expected, rtol=1e-12, atol=0)


# -- results and errors --------------------------------------------------------------------


def test_results_say_where_they_are_from(small: SimpleNamespace) -> None:
    result = actstore.moments(small.store, stages="mlp_post", tokens="position > 0", per="layer")
    for attrs in (result.attrs, result.compute().attrs):
        assert attrs["query"] == "moments"
        assert json.loads(attrs["parameters"])["per"] == "layer"
        assert (attrs["store"], attrs["store_id"]) == ("run.zarr", small.store.id)
        assert attrs["model"] == "tiny <model>"
        assert attrs["config_hash"] == small.store.attrs["config_hash"]
        assert attrs["tokens"] == "position > 0"
        assert attrs["tokens_used"] + attrs["tokens_excluded"] == 147
        assert attrs["source"] in ("scan", "sketch")
    for name, variable in result.data_vars.items():
        assert {"long_name", "units"} <= set(variable.attrs), name


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"stages": "mlp_pots"}, UnknownNameError, "did you mean 'mlp_post'"),
        ({"stages": ["mlp_post", "nothing"]}, UnknownNameError, "unknown stage 'nothing'"),
        ({"layers": "9"}, UnknownNameError, "unknown layer 9"),
        ({"layers": "a"}, UsageError, "'a' is not a number or a range"),
        ({"neurons": "0-99"}, UnknownNameError, "unknown neuron"),
        ({"tokens": "positon > 0"}, UnknownNameError, "did you mean 'position'"),
        ({"tokens": "position >"}, UsageError, "position >"),
        ({"tokens": "position > 1000"}, UsageError, "no token satisfies 'position > 1000'"),
        ({"tokens": np.ones(3, bool)}, UsageError, r"shape \(3,\): give a boolean mask"),
        ({"tokens": np.ones(147)}, UsageError, "array of float64"),
        ({"by": "plays"}, UnknownNameError, "did you mean 'play'"),
        ({"per": "head"}, UsageError, "not made of heads"),
        ({"per": "neurons"}, UnknownNameError, "did you mean 'neuron'"),
    ],
)
def test_questions_that_are_wrong(
    small: SimpleNamespace, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    for query in (actstore.moments, actstore.histogram):
        with pytest.raises(kind, match=message):
            query(small.store, **{"stages": "mlp_post", **options})


@pytest.mark.parametrize(
    "options",
    [
        {"bins": 0},
        {"bins": 10**9},
        {"bins": [1.0]},
        {"bins": [1.0, 1.0]},
        {"bins": [2.0, 1.0]},
        {"bins": [0.0, np.nan, 1.0]},
        {"bins": [[0.0, 1.0]]},
        {"bins": 5, "range": (1, 1)},
        {"bins": 5, "range": (2, 1)},
        {"bins": 5, "range": (0, np.inf)},
    ],
)
def test_bins_that_are_wrong(small: SimpleNamespace, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"bins|range"):
        actstore.histogram(small.store, stages="mlp_post", **options)


def test_data_that_is_wrong(tmp_path: Path) -> None:
    for data, message in [
        (np.zeros((3, 4)), "data is a ndarray: give a Store, a path, or an xarray.DataArray"),
        (xr.DataArray(np.zeros((3, 4)), dims=("token", "unit")), "it needs"),
        (xr.DataArray(np.zeros((3, 4, 2)), dims=("token", "neuron", "run")), "it needs"),
    ]:
        with pytest.raises(UsageError, match=message):
            actstore.moments(data)
    with pytest.raises(actstore.errors.NotAStoreError):
        actstore.moments(tmp_path / "nothing.zarr")


@pytest.mark.parametrize(
    "name", [n for n, q in QUERIES.items() if "seed" in {p.name for p in q.parameters}]
)
def test_seeds_that_are_wrong(small: SimpleNamespace, name: str) -> None:
    own = {"label": "sequence"} if name == "label_information" else {}
    with pytest.raises(UsageError, match="seed is -1: it must be a whole number from 0"):
        QUERIES[name].function(small.store, stages="mlp_post", seed=-1, **own)
