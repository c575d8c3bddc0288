"""Queries of distributions, against plain numpy and scipy, and the numbers of the notebooks.

The references are written out from the definitions, on values in memory. "Notebook" references
follow the computation of the notebooks that people start from: float32, torch and numpy as they
use them.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import numpy as np
import pytest
import torch
import xarray as xr
from helpers import bare_corpus, plan_of, stored, write_small, write_store
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.signal import find_peaks
from typer.testing import CliRunner

import actstore
from actstore.errors import UnknownNameError, UsageError
from actstore.plan import StageSpec
from actstore.queries.registry import COMMON, QUERIES
from actstore.stats.quantiles import Quantiles, following
from actstore.storage import counters

NAMES = (
    "histogram",
    "mean_activation",
    "moments",
    "normality",
    "peaks",
    "quantiles",
    "sample",
    "top_tokens",
    "zeroness",
)
LENGTH = 40
SHAPE = (2, 1200, 20)
Q = (0, 0.013, 0.25, 0.5, 0.75, 0.9, 1)


def nasty_values(seed: int = 0) -> np.ndarray:
    """Float32 (layer, token, neuron), most of the neurons unlike the others."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=SHAPE) * rng.lognormal(0, 1, SHAPE[2])
    x[..., 0] = 3000 + 10 * rng.normal(size=SHAPE[:2])
    x[..., 1] -= 5
    x[..., 2] = 0.1  # has no exact float32
    x[..., 3] = 0
    x[..., 4] = np.maximum(rng.normal(-1, 1, SHAPE[:2]), 0)
    x[..., 5] = rng.lognormal(0, 2, SHAPE[:2])
    x[:, 7, 6] = 1e4
    x[..., 8] = np.where(rng.random(SHAPE[:2]) < 0.4, 4, 0) + rng.normal(size=SHAPE[:2]) * 0.1
    x[..., 9] = rng.integers(-3, 4, SHAPE[:2])
    x[..., 10] *= 1e-6
    return x.astype(np.float32)


@pytest.fixture(scope="module")
def acts() -> xr.DataArray:
    """An array of the user's own, with labels."""
    return labelled(nasty_values())


def labelled(values: np.ndarray) -> xr.DataArray:
    tokens = np.arange(values.shape[1])
    return xr.DataArray(
        values,
        dims=("layer", "token", "neuron"),
        coords={
            "position": ("token", tokens % LENGTH),
            "sequence": ("token", tokens // LENGTH),
            "condition": ("token", np.where(tokens % 3 == 0, "internal", "terminal")),
            "token_text": ("token", np.array([f" t{t % 17}" for t in tokens])),
            "head": ("neuron", np.arange(values.shape[2]) // 5),
        },
        name="mlp_post",
    )


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A store of such values, of each element type, and the values as stored."""
    path = tmp_path_factory.mktemp("distributions") / "run.zarr"
    values = nasty_values()
    stages = [StageSpec("mlp_post", (3, 5), SHAPE[2], request.param)]
    plan = plan_of(bare_corpus([LENGTH] * (SHAPE[1] // LENGTH)), stages, 256, sketch=False)
    write_store(path, plan, {"mlp_post": values})
    kept = stored(values, request.param)
    return SimpleNamespace(store=actstore.open(path), values=kept, dtype=request.param)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> actstore.Store:
    path = tmp_path_factory.mktemp("small") / "run.zarr"
    write_small(path)
    return actstore.open(path)


def ask(name: str, data: Any, **options: Any) -> xr.Dataset:
    result = actstore.compute(getattr(actstore, name)(data, **options))
    assert isinstance(result, xr.Dataset)
    return result


def rows(values: np.ndarray, per: str) -> np.ndarray:
    """Values (layer, row, ...) of what each row of a result is about."""
    if per == "layer":
        return values.reshape(len(values), 1, -1)
    return values.swapaxes(1, 2)


def flat(result: xr.DataArray, *last: str) -> np.ndarray:
    """A result as (layer, row, ...)."""
    found = result.values
    return found.reshape(len(found), -1, *(result.sizes[d] for d in last))


# -- histogram -----------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["layer", "neuron"])
@pytest.mark.parametrize("compat", ["textbook", "notebook"])
def test_histogram_over_the_datas_own_range(acts: xr.DataArray, per: Any, compat: Any) -> None:
    found = ask("histogram", acts, bins=37, per=per, compat=compat, density=True)
    counted = ask("histogram", acts, bins=37, per=per, compat=compat)
    for i, layer in enumerate(rows(acts.values, per)):
        for j, x in enumerate(layer):
            x = x if compat == "notebook" else x.astype(np.float64)
            counts, edges = np.histogram(x, bins=37)
            density, _ = np.histogram(x, bins=37, density=True)
            assert np.array_equal(flat(counted["counts"], "bin")[i, j], counts)
            assert np.array_equal(flat(counted["edges"], "edge")[i, j], edges)
            assert np.allclose(flat(found["density"], "bin")[i, j], density, rtol=1e-12)
    for name in ("below", "above", "nonfinite"):
        assert not found[name].any()


@pytest.mark.parametrize("compat", ["textbook", "notebook"])
def test_histogram_of_a_store(saved: Any, compat: Any) -> None:
    found = ask("histogram", saved.store, bins=50, per="neuron", compat=compat)
    for i in range(2):
        for j in range(SHAPE[2]):
            x = saved.values[i, :, j]
            kind = x.dtype if compat == "notebook" else np.float64
            if kind == np.float16 and j == 0:
                continue  # bins narrower than float16 can tell: numpy refuses
            edges = np.histogram_bin_edges(x.astype(kind), 50)
            got = found.isel(layer=i, neuron=j)
            assert np.array_equal(got["edges"], edges)
            counts = np.histogram(x.astype(np.float64), edges.astype(np.float64))[0]
            assert np.array_equal(got["counts"], counts)


def test_histogram_of_a_given_range_in_the_datas_type(acts: xr.DataArray) -> None:
    # numpy takes the edges of a range to the type of the data, which moves them.
    found = ask("histogram", acts, bins=300, range=(-0.7, 3.1), compat="notebook", per="neuron")
    for i in range(2):
        for j in range(SHAPE[2]):
            counts, _ = np.histogram(acts.values[i, :, j], bins=300, range=(-0.7, 3.1))
            assert np.array_equal(found["counts"][i, j], counts)
    assert found["edges"].dims == ("layer", "edge")


def fd_reference(x: np.ndarray) -> tuple[int, str]:
    """Number of bins by the textbook, and the rule that gave it."""
    x = x.astype(np.float64)
    if x.min() == x.max():
        return 1, "one_bin"
    low, high = np.quantile(x, [0.25, 0.75])
    if low == high:
        return int(np.ceil(np.log2(x.size) + 1)), "sturges"
    return int(np.ceil((x.max() - x.min()) / (2 * (high - low) / x.size ** (1 / 3)))), (
        "freedman_diaconis"
    )


@pytest.mark.parametrize("per", ["layer", "neuron"])
def test_freedman_diaconis(acts: xr.DataArray, per: Any) -> None:
    found = ask("histogram", acts, bins="fd", per=per)
    cap = 10_000 if per == "layer" else 1_000
    names = found["rule"].attrs["flag_meanings"].split()
    seen = set()
    for i, layer in enumerate(rows(acts.values, per)):
        for j, x in enumerate(layer):
            bins, rule = fd_reference(x)
            if bins > cap:
                bins, rule = cap, "capped"
            assert flat(found["n_bins"])[i, j] == bins
            assert names[flat(found["rule"])[i, j]] == rule
            counts, edges = np.histogram(x.astype(np.float64), bins)
            own, own_edges = flat(found["counts"], "bin")[i, j], flat(found["edges"], "edge")[i, j]
            assert np.array_equal(own[:bins], counts)
            assert not own[bins:].any()
            assert np.array_equal(own_edges[: bins + 1], edges)
            assert np.isnan(own_edges[bins + 1 :]).all()
            seen.add(rule)
    if per == "neuron":
        assert seen == {"freedman_diaconis", "one_bin", "sturges", "capped"}


@pytest.mark.parametrize("limits", [None, (-2.5, 4.0)])
def test_freedman_diaconis_as_numpy(acts: xr.DataArray, limits: Any) -> None:
    found = ask("histogram", acts, bins="fd", per="neuron", range=limits, compat="notebook")
    for i in range(2):
        for j in range(SHAPE[2]):
            x = acts.values[i, :, j]
            inside = x if limits is None else x[(x >= limits[0]) & (x <= limits[1])]
            if not len(inside):
                assert not found["counts"][i, j].any()
                continue
            edges = np.histogram_bin_edges(x, bins="fd", range=limits)
            bins = len(edges) - 1
            assert found["n_bins"][i, j] == min(bins, 1000)
            if bins > 1000:
                continue
            counts = np.histogram(x, bins="fd", range=limits)[0]
            assert np.array_equal(found["edges"][i, j, : bins + 1], edges)
            assert np.array_equal(found["counts"][i, j, :bins], counts)


def test_mlp_stages_as_the_notebook_draws_them() -> None:
    """np.histogram(stage[1:].flatten(), bins="fd", density=True), of one long sequence."""
    rng = np.random.default_rng(3)
    values = rng.standard_t(4, size=(1, 93, 64)).astype(np.float32)
    acts = labelled(values).assign_coords(position=("token", np.arange(93)))
    found = ask(
        "histogram", acts, bins="fd", density=True, tokens="position > 0", compat="notebook"
    )
    y, x = np.histogram(values[0, 1:, :].flatten(), bins="fd", density=True)
    assert int(found["n_bins"][0]) == len(y)
    assert np.array_equal(found["edges"][0, : len(x)], x)
    assert np.array_equal(found["density"][0, : len(y)], y)
    assert np.isnan(found["density"][0, len(y) :]).all()


def test_hidden_states_as_the_notebook_draws_them() -> None:
    """300 bins from -15 to 15 of each layer's flattened values, without the first token."""
    values = nasty_values()[:, :50]
    acts = labelled(values).assign_coords(position=("token", np.arange(50)))
    bounds = np.linspace(-15, 15, 301)
    found = ask("histogram", acts, bins=bounds, tokens="position > 0", compat="notebook")
    for i in range(2):
        everything = np.zeros(values[i, 1:].size)
        everything[:] = values[i, 1:].flatten()
        assert np.array_equal(found["counts"][i], np.histogram(everything, bins=bounds)[0])
    outside = (np.abs(values[:, 1:]) > 15).sum(axis=(1, 2))
    assert np.array_equal(found["below"] + found["above"], outside)


@pytest.mark.parametrize("compat", ["textbook", "notebook"])
@pytest.mark.parametrize("transform", ["center", "scale", "peak"])
def test_transforms(acts: xr.DataArray, transform: Any, compat: Any) -> None:
    found = ask("histogram", acts, bins=100, per="neuron", transform=transform, compat=compat)
    kind = np.float32 if compat == "notebook" else np.float64
    x = acts.values.astype(kind)
    wide = acts.values.astype(np.float64)
    std = wide.std(axis=1, ddof=1, keepdims=True)
    centre = wide.mean(axis=1, keepdims=True)
    if transform == "peak":
        height = 200 if compat == "notebook" else 0.02
        centre = ask("peaks", acts, height=height, compat=compat)["position"].values[:, None]
    moved = (x - centre.astype(kind)).astype(kind)
    spread = wide.max(axis=1) > wide.min(axis=1)
    if transform != "center":
        layer_std = std.mean(axis=2, keepdims=True).astype(kind)
        moved = moved * layer_std / np.where(std > 0, std, np.nan).astype(kind)
    for i in range(2):
        for j in range(SHAPE[2]):
            got = found.isel(layer=i, neuron=j)
            if not np.isfinite(moved[i, :, j]).all():
                assert not spread[i, j] or np.isnan(centre[i, 0, j])
                assert got["nonfinite"] == SHAPE[1]
                continue
            counts, edges = np.histogram(moved[i, :, j].astype(kind), bins=100)
            assert np.allclose(got["edges"], edges, rtol=1e-4, atol=1e-5 * np.ptp(edges))
            assert got["counts"].sum() == SHAPE[1]
            if j == 9:
                continue  # whole numbers: all on edges but for rounding
            # Means differ in their last digits, which moves values across edges here and there.
            moves = 0.02 if compat == "notebook" or not spread[i, j] else 0.001
            assert np.abs(got["counts"].cumsum() - counts.cumsum()).max() <= moves * SHAPE[1]


def test_transforms_of_a_layer_take_all_of_it(acts: xr.DataArray) -> None:
    whole = ask("histogram", acts, bins=20, range=(-9, 9), transform="scale", per="neuron")
    part = ask("histogram", acts, bins=20, range=(-9, 9), transform="scale", neurons="6,11-13")
    expected = whole["counts"].sel(neuron=[6, 11, 12, 13]).sum("neuron")
    assert np.array_equal(part["counts"], expected)
    with_rule = ask("histogram", acts, bins="fd", transform="scale")
    shown = (with_rule["counts"].sum("bin") + with_rule["nonfinite"]).values
    assert shown.tolist() == [SHAPE[1] * SHAPE[2]] * 2


def test_values_that_are_not_numbers() -> None:
    values = nasty_values()[:1, :30, 11:14]
    values[0, :4, 0] = [np.nan, np.inf, -np.inf, np.nan]
    values[0, :, 1] = np.nan
    found = ask("histogram", labelled(values), bins=5, per="neuron").isel(layer=0)
    finite = values[0, 4:, 0].astype(np.float64)
    assert np.array_equal(found["counts"][0], np.histogram(finite, bins=5)[0])
    assert found["nonfinite"].values.tolist() == [2, 30, 0]
    assert (found["below"][0], found["above"][0]) == (1, 1)
    assert np.isnan(found["edges"][1]).all()
    assert ask("histogram", labelled(values), bins="fd")["nonfinite"] == 32
    middle = ask("quantiles", labelled(values), q=0.5, per="neuron")["quantile"][0, :, 0]
    assert np.isnan(middle).values.tolist() == [True, True, False]
    # NaN is neither large nor small.
    top = ask("top_tokens", labelled(values), k=2, largest=False).isel(layer=0)
    assert top["token"][0, 0] == 2
    assert (top["token"][1] == -1).all()


@given(
    low=st.floats(-1e6, 1e6),
    width=st.floats(1e-3, 1e6),
    bins=st.integers(1, 2000),
    seed=st.integers(0, 2**32 - 1),
    per=st.sampled_from(["layer", "neuron"]),
    compat=st.sampled_from(["textbook", "notebook"]),
)
@settings(max_examples=60, deadline=None)
def test_bins_are_numpys(
    low: float, width: float, bins: int, seed: int, per: Any, compat: Any
) -> None:
    rng = np.random.default_rng(seed)
    edges = np.linspace(low, low + width, bins + 1)
    if compat == "notebook":
        edges = edges.astype(np.float32)
    if not (np.diff(edges) > 0).all():
        return
    # Half of the values lie on edges or a rounding away from them.
    near = rng.choice(edges, 200).astype(np.float32)
    near[::3] = np.nextafter(near[::3], np.float32(np.inf))
    near[1::3] = np.nextafter(near[1::3], np.float32(-np.inf))
    spread = rng.uniform(low - width / 3, low + 4 * width / 3, 200).astype(np.float32)
    x = rng.permutation(np.concatenate([near, spread])).reshape(1, 100, 4)
    options: dict[str, Any] = {"range": (low, low + width), "per": per, "compat": compat}
    found = ask("histogram", labelled(x), bins=bins, **options)
    for j, column in enumerate(rows(x, per)[0]):
        right = np.histogram(column.astype(np.float64), edges.astype(np.float64))[0]
        assert np.array_equal(flat(found["counts"], "bin")[0, j], right)
    total = sum(found[n].sum() for n in ("counts", "below", "above", "nonfinite"))
    assert total == x.size


# -- quantiles -----------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["layer", "neuron"])
def test_quantiles(saved: Any, per: Any) -> None:
    found = ask("quantiles", saved.store, q=Q, per=per)
    x = rows(saved.values.astype(np.float64), per)
    assert np.array_equal(
        flat(found["quantile"], "q"), np.moveaxis(np.quantile(x, Q, axis=-1), 0, -1)
    )
    assert found["q"].values.tolist() == list(Q)
    assert found.attrs["passes"] >= (2 if saved.dtype == "float32" else 1)


def test_quantiles_of_heads(acts: xr.DataArray) -> None:
    found = ask("quantiles", acts, q=0.3, per="head")["quantile"].values[..., 0]
    x = acts.values.astype(np.float64).reshape(2, SHAPE[1], 4, 5)
    assert np.array_equal(found, np.quantile(x.swapaxes(1, 2).reshape(2, 4, -1), 0.3, axis=-1))


@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40),
    q=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    kind=st.sampled_from([np.float32, np.float64]),
)
@settings(max_examples=150, deadline=None)
def test_quantiles_of_any_numbers(values: list[float], q: list[float], kind: Any) -> None:
    x = np.array(values, kind)
    search = Quantiles(tuple(q), np.zeros(1, np.int64), np.dtype(kind), 8 * x.itemsize, x.size)
    while True:
        state = search.combine(search.chunk(x[::2, None]), search.chunk(x[1::2, None]))
        results = search.finalize(state)
        if "next" not in results:
            break
        search = following(results)
    with np.errstate(all="ignore"):
        right = np.quantile(x.astype(np.float64), q)
        sides = np.sort(x)[np.floor((len(x) - 1) * np.array(q)).astype(int)]
    assert np.array_equal(results["lower"][0], sides)
    known = np.isfinite(right)
    assert np.array_equal(results["quantile"][0][known], right[known])


# -- zeroness and peaks --------------------------------------------------------------------


def test_zeroness(acts: xr.DataArray) -> None:
    found = ask("zeroness", acts, threshold=0.3, ratio=2)
    x = acts.values.astype(np.float64)
    scaled = np.abs(x) / x.std(axis=1, ddof=1).mean(axis=1)[:, None, None]
    small, large = (scaled < 0.3).sum(axis=1), (scaled >= 0.3).sum(axis=1)
    with np.errstate(divide="ignore"):
        score = small / large
    assert np.array_equal(found["score"], score)
    assert np.array_equal(found["zeroed"], score > 2)
    assert np.isinf(score).any()


def test_zeroness_as_the_notebook() -> None:
    rng = np.random.default_rng(1)
    values = (rng.normal(size=(2, 2000, 16)) * rng.lognormal(0, 1, 16)).astype(np.float32)
    found = ask("zeroness", labelled(values[:, :, :]), compat="notebook")
    a = torch.from_numpy(values).permute(0, 2, 1)  # layer, neuron, token
    norm = 1 / a.std(dim=-1).mean(dim=-1).unsqueeze(-1).unsqueeze(-1)
    small, large = (a.abs() * norm < 1).sum(dim=-1), (a.abs() * norm >= 1).sum(dim=-1)
    score = small / large
    same = np.isclose(found["score"], score.numpy(), rtol=1e-6)
    assert same.mean() > 0.9
    assert np.allclose(found["score"], score.numpy(), rtol=5e-3)  # the stds' last digits
    assert np.array_equal(found["zeroed"], (score > 1).numpy())


def reference_peak(x: np.ndarray, height: float, bins: int = 50) -> dict[str, Any]:
    """The textbook's peaks of one neuron: zeros on either side, ends exclusive."""
    counts, edges = np.histogram(x.astype(np.float64), bins=bins)
    middle = (edges[:-1] + edges[1:]) / 2
    scale = bins / 50
    padded = np.concatenate([[0], counts, [0]])
    peaks = find_peaks(padded, height=height, distance=40 * scale)[0] - 1
    if not len(peaks):
        return {"position": np.nan, "n_peaks": 0, "all": []}
    at = min(peaks, key=lambda k: abs(middle[k]))
    half = [k for k in range(bins) if 2 * counts[k] <= counts[at]]
    left = max([k for k in half if k < at], default=-1)
    right = min([k for k in half if k > at], default=bins)
    low, high = edges[left + 1], edges[right]
    if right - left > 20 * scale:
        at = (left + right) // 2
    return {
        "position": middle[at],
        "n_peaks": len(peaks),
        "all": middle[peaks],
        "run_low": low,
        "run_high": high,
    }


@pytest.mark.parametrize(("bins", "height"), [(50, 200), (50, 0.05), (120, 40), (120, 5000)])
def test_peaks(acts: xr.DataArray, bins: int, height: float) -> None:
    found = ask("peaks", acts, bins=bins, height=height)
    count = height * SHAPE[1] if height < 1 else height
    spread = acts.values.astype(np.float64).std(axis=1, ddof=1).mean(axis=1)
    for i in range(2):
        for j in range(SHAPE[2]):
            right = reference_peak(acts.values[i, :, j], count, bins)
            got = found.isel(layer=i, neuron=j)
            assert got["n_peaks"] == right["n_peaks"]
            every = got["peak_position"].values
            assert np.array_equal(every[~np.isnan(every)], right["all"])
            near = not np.isnan(right["position"]) and abs(right["position"]) / spread[i] < 1
            assert bool(got["centred_on_zero"]) == near
            for name in ("position", "run_low", "run_high"):
                assert np.array_equal(got[name], right.get(name, np.nan), equal_nan=True)
    if height == 5000:
        assert not found["n_peaks"].any()
    elif height < 1:
        assert found["n_peaks"].max() == 2


def test_peaks_in_the_first_bin() -> None:
    values = np.maximum(np.random.default_rng(0).normal(-1, 1, (1, 1000, 2)), 0).astype("f4")
    seen = ask("peaks", labelled(values))
    unseen = ask("peaks", labelled(values), compat="notebook")
    assert (seen["n_peaks"] == 1).all()
    assert (seen["run_low"] == 0).all()
    assert not unseen["n_peaks"].any()
    assert np.isnan(unseen["position"]).all()


def notebook_peak(acts: np.ndarray) -> float:
    """The notebook's loop over one neuron."""
    counts, bins = np.histogram(acts, bins=50)
    mids = (bins[:-1] + bins[1:]) / 2
    peaks, _ = find_peaks(counts, height=200, distance=40)
    if not len(peaks):
        return np.nan  # where the notebook stops with an error
    at = peaks[np.argmin(np.abs(mids[peaks]))]
    close = counts * 2 > counts[at]
    left = right = at
    while left > 0 and close[left] > 0:
        left -= 1
    while right < len(close) and close[right] > 0:
        right += 1
    return mids[(left + right) // 2 if right - left > 20 else at]


def test_peaks_as_the_notebook() -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(rng.normal(0, 2, 24), rng.lognormal(0, 1, 24), (2, 6000, 24))
    values[..., :8] += np.where(rng.random((2, 6000, 8)) < 0.3, 12, 0)
    values[..., 8:12] = rng.uniform(-1, 1, (2, 6000, 4)) + values[..., 8:12] * 0.05
    values = values.astype(np.float32)
    found = ask("peaks", labelled(values), compat="notebook")
    right = np.array([[notebook_peak(values[i, :, j]) for j in range(24)] for i in range(2)])
    assert 30 < np.isfinite(right).sum() < 48
    assert np.array_equal(found["position"], right, equal_nan=True)
    std = torch.from_numpy(values).std(dim=1).mean(dim=-1).numpy()
    assert np.array_equal(found["centred_on_zero"], np.abs(right) / std[:, None] < 1)


# -- the others ----------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["layer", "neuron"])
def test_normality(acts: xr.DataArray, per: Any) -> None:
    found = ask("normality", acts, per=per)
    grid = np.linspace(-5, 5, 201)
    for i, layer in enumerate(rows(acts.values.astype(np.float64), per)):
        for j, x in enumerate(layer):
            distance = flat(found["distance"])[i, j]
            if x.min() == x.max():
                assert np.isnan(distance)
                assert np.isnan(flat(found["skewness"])[i, j])
                continue
            edges = x.mean() + x.std(ddof=1) * grid
            below = np.searchsorted(np.sort(x), edges) / len(x)
            assert np.isclose(distance, np.abs(below - stats.norm.cdf(grid)).max(), atol=2e-3)
            assert np.isclose(flat(found["skewness"])[i, j], stats.skew(x), rtol=1e-5, atol=1e-6)
            assert np.isclose(
                flat(found["kurtosis"])[i, j], stats.kurtosis(x), rtol=1e-5, atol=1e-5
            )
    assert float(found["distance"].max()) <= 1


@pytest.mark.parametrize("largest", [True, False])
def test_top_tokens(saved: Any, largest: bool) -> None:
    found = ask("top_tokens", saved.store, k=7, largest=largest)
    x = saved.values.astype(np.float64)
    order = np.argsort(-x if largest else x, axis=1, kind="stable")[:, :7].swapaxes(1, 2)
    assert found["token"].dims == ("layer", "neuron", "rank")
    assert np.array_equal(found["token"], order)
    assert np.array_equal(found["value"], np.take_along_axis(x.swapaxes(1, 2), order, 2))
    assert np.array_equal(found["position"], order % LENGTH)
    assert np.array_equal(found["sequence"], order // LENGTH)


def test_top_tokens_say_what_they_are(acts: xr.DataArray, small: actstore.Store) -> None:
    found = ask("top_tokens", acts, k=3)
    assert np.array_equal(found["token_text"], acts["token_text"].values[found["token"].values])
    few = ask("top_tokens", acts, k=5, tokens="position == 3 and sequence < 2")
    assert (few["token"][..., 2:] == -1).all()
    assert np.isnan(few["value"][..., 2:]).all()
    assert (few["token_text"][..., 2:] == "").all()
    assert (few["position"][..., :2] == 3).all()
    assert (few["position"][..., 2:] == -1).all()
    own = ask("top_tokens", small, stages="mlp_post", k=2)
    texts = np.vectorize(lambda token: small.decode(token, before=0))(own["token"].values)
    special = own["token_text"].values == "<s>"
    assert np.array_equal(texts[~special], own["token_text"].values[~special])
    both = ask("top_tokens", small, stages="attn_z,mlp_out", k=2)
    for stage in ("attn_z", "mlp_out"):
        alone = ask("top_tokens", small, stages=stage, k=2)
        for name in ("value", "token", "position", "token_text"):
            assert np.array_equal(both[name].sel(stage=stage), alone[name])


def test_mean_activation(acts: xr.DataArray) -> None:
    found = ask("mean_activation", acts, by="condition")
    assert found["mean"].dims == ("layer", "neuron", "condition")
    for name in ("internal", "terminal"):
        own = acts.values[:, (acts["condition"] == name).values].astype(np.float64)
        off = np.abs(found["mean"].sel(condition=name).values - own.mean(axis=1))
        assert (off <= 1e-6 * own.std(axis=1) + 1e-8).all()
        assert (found["count"].sel(condition=name) == own.shape[1]).all()
    assert ask("mean_activation", acts)["mean"].dims == ("layer", "neuron")


def test_samples_of_tokens(saved: Any) -> None:
    found = ask("sample", saved.store, n=30, seed=4, tokens="position > 0")
    assert found["activation"].dims == ("layer", "sample", "neuron")
    token = found["token"].values
    assert (np.diff(token) > 0).all()
    assert np.array_equal(found["activation"], saved.values[:, token])
    assert np.array_equal(found["position"], token % LENGTH)
    assert (found["position"] > 0).all()
    again = ask("sample", saved.store, n=30, seed=4, tokens="position > 0")
    assert again.identical(found)
    other = ask("sample", saved.store, n=30, seed=5, tokens="position > 0")
    assert not np.array_equal(other["token"], token)


def test_samples_of_values(acts: xr.DataArray) -> None:
    found = ask("sample", acts, n=500, unit="value", neurons="3-9", seed=1)
    token, neuron = found["token"].values, found["neuron"].values
    assert found["activation"].dims == ("layer", "sample")
    assert np.array_equal(found["activation"], acts.values[:, token, neuron])
    assert len({*zip(token, neuron, strict=True)}) == 500
    assert set(neuron) == set(range(3, 10))
    # As likely in one half of the data as in the other.
    assert 180 < (token < SHAPE[1] / 2).sum() < 320


def test_pair_plots_as_the_notebook_takes_them(acts: xr.DataArray) -> None:
    """The first 1,000 values of each flattened layer, without the first token."""
    first = np.arange(SHAPE[1]) > 0
    found = ask("sample", acts, n=1000, unit="value", tokens=first, compat="notebook")
    flattened = acts.values[:, 1:].reshape(2, -1)
    assert np.array_equal(found["activation"], flattened[:, :1000])


@pytest.mark.parametrize("unit", ["token", "value"])
def test_samples_of_groups(acts: xr.DataArray, unit: Any) -> None:
    few = np.isin(np.arange(SHAPE[1]), [0, 1, 2, 4, 5, 7])  # one internal, five terminal
    found = ask("sample", acts, n=3, by="condition", unit=unit, tokens=few, neurons="12")
    assert found["activation"].dims[:3] == ("layer", "condition", "sample")
    for name, size in (("internal", 1), ("terminal", 3)):
        own = found.sel(condition=name)
        token = own["token"].values
        assert (token[size:] == -1).all()
        got = own["activation"].values.reshape(2, 3)
        assert np.array_equal(got[:, :size], acts.values[:, token[:size], 12])
        assert np.isnan(got[:, size:]).all()
        assert (acts["condition"].values[token[:size]] == name).all()


# -- what all of them share ----------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "histogram": {"bins": 9, "per": "neuron", "transform": "scale"},
    "peaks": {"height": 0.02},
    "quantiles": {"per": "neuron"},
    "sample": {"n": 7},
    "top_tokens": {"k": 4},
}


def build(name: str, data: Any, **options: Any) -> Any:
    return getattr(actstore, name)(data, **{**OPTIONS.get(name, {}), **options})


def equal(a: xr.Dataset, b: xr.Dataset) -> None:
    for name, variable in a.variables.items():
        xr.testing.assert_equal(variable, b[name].variable)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "sample"])
def test_groups_are_selections(acts: xr.DataArray, name: str) -> None:
    split = actstore.compute(build(name, acts, by="condition"))
    for value in ("internal", "terminal"):
        alone = actstore.compute(build(name, acts, tokens=f"condition == '{value}'"))
        for variable in alone.data_vars:
            found = split[variable].sel(condition=value)
            xr.testing.assert_equal(found.variable, alone[variable].variable)


def test_groups_without_tokens(acts: xr.DataArray) -> None:
    for name in NAMES:
        few = actstore.compute(build(name, acts, by="condition", tokens="condition != 'internal'"))
        for variable in few.data_vars.values():
            gone = variable.sel(condition="internal").values
            if variable.dtype.kind == "f":
                assert np.isnan(gone).all()
            else:
                assert (gone == (-1 if variable.name == "token" else 0)).all()


@pytest.mark.parametrize("name", NAMES)
def test_layers_and_neurons_are_parts_of_the_whole(acts: xr.DataArray, name: str) -> None:
    whole = actstore.compute(build(name, acts))
    part = actstore.compute(build(name, acts, layers="-1", neurons="0,7-9"))
    equal(part, whole.sel(layer=[1], neuron=[0, 7, 8, 9]))


@pytest.mark.parametrize("name", NAMES)
def test_masks_and_expressions(acts: xr.DataArray, name: str) -> None:
    mask = (acts["position"] > 2).values & (acts["condition"] == "terminal").values
    result = actstore.compute(build(name, acts, tokens=mask))
    equal(
        result,
        actstore.compute(build(name, acts, tokens="position > 2 and condition == 'terminal'")),
    )
    kept = labelled(acts.values[:, mask])
    chosen = actstore.compute(build(name, kept))
    for variable in result.data_vars:
        if variable != "token":  # other chunks: other last digits
            a, b = result[variable].variable, chosen[variable].variable
            if name == "histogram" and variable in ("counts", "edges"):
                a, b = a[:, 10:], b[:, 10:]
            xr.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 2])
def test_hardly_any_tokens(name: str, tokens: int) -> None:
    few = labelled(nasty_values()[:, :tokens])
    result = actstore.compute(build(name, few))
    assert result.sizes["layer"] == 2
    if name == "quantiles":
        right = np.quantile(few.values.astype(float), result["q"], axis=1)
        assert np.array_equal(result["quantile"], np.moveaxis(right, 0, -1))
    if name == "moments" and tokens == 1:
        assert np.isnan(result["std"]).all()
    assert actstore.compute(build(name, few, neurons=5)).sizes["neuron"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_several_stages(small: actstore.Store, name: str) -> None:
    """Stages of one width share a dimension; others are groups of a tree."""
    both = actstore.compute(build(name, small, stages="attn_z,mlp_out"))
    for stage in ("attn_z", "mlp_out"):
        alone = actstore.compute(build(name, small, stages=stage))
        for variable in alone.data_vars:
            assert np.array_equal(
                both[variable].sel(stage=stage).values, alone[variable].values, equal_nan=True
            )
    tree = actstore.compute(build(name, small, stages="mlp_post,mlp_out"))
    assert isinstance(tree, xr.DataTree)
    assert set(tree.children) == {"mlp_post", "mlp_out"}


def raising(*_: Any, **__: Any) -> Any:
    raise AssertionError("something was computed")


@pytest.mark.parametrize("name", NAMES)
def test_building_computes_nothing(small: actstore.Store, name: str) -> None:
    more: list[dict[str, Any]] = [{}, {"by": "condition"}, {"stages": "attn_z,mlp_out"}]
    if name == "histogram":
        more += [{"bins": "fd", "transform": t} for t in (None, "center", "scale", "peak")]
        more += [{"bins": b, "transform": None} for b in (5, [0, 1, 2])]
    if name == "sample":
        more += [{"unit": "value"}]
    with dask.config.set(scheduler=raising):
        data = small["mlp_post"]
        before = counters.bytes
        for options in more:
            build(name, small, **options)
        built = build(name, data)
        assert counters.bytes - before < 100_000  # token columns, no activations
        with pytest.raises(AssertionError, match="computed"):
            built.compute()
    assert dask.is_dask_collection(built)


def scan(store: actstore.Store, *queries: Callable[[], Any]) -> int:
    """Bytes that computing queries together reads."""
    built = [q() for q in queries]
    before = counters.bytes
    actstore.compute(*built)
    return counters.bytes - before


def test_reads_are_shared_pass_by_pass(saved: Any) -> None:
    store = saved.store
    once = scan(store, lambda: actstore.histogram(store, bins=[0, 1]))
    twice = scan(store, lambda: actstore.histogram(store, bins=5))
    assert twice == 2 * once
    together = scan(
        store,
        lambda: actstore.histogram(store, bins=5),
        lambda: actstore.moments(store),
        lambda: actstore.zeroness(store),
        lambda: actstore.peaks(store, height=0.02),
        lambda: actstore.top_tokens(store),
    )
    assert round(together / once, 2) == 2  # the shards' small indices are read more often
    passes = actstore.quantiles(store).attrs["passes"]
    assert round(scan(store, lambda: actstore.quantiles(store)) / once, 2) == passes


PLACES = np.arange(400)


@pytest.mark.parametrize(
    "mask",
    [PLACES >= 0, PLACES % 100 != 1, PLACES % 2 == 0, PLACES < 9],
    ids=["all", "gaps", "halves", "few"],
)
def test_layers_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: np.ndarray
) -> None:
    """Where neurons are pooled, they are read a few at a time, and without gaps between tokens."""
    values = np.random.default_rng(9).normal(1, 3, (1, 400, 96)).astype(np.float32)
    stages = [StageSpec("mlp_post", (0,), 96)]
    plan = plan_of(bare_corpus([100] * 4), stages, 128, sketch=False)
    write_store(tmp_path / "run.zarr", plan, {"mlp_post": values})
    store = actstore.open(tmp_path / "run.zarr")
    assert store.array("mlp_post").layout.chunk_width == 32
    asked: list[tuple[str, dict[str, Any]]] = [
        ("moments", {}),
        ("histogram", {"bins": 20}),
        ("histogram", {"bins": "fd"}),
        ("quantiles", {"q": Q}),
        ("normality", {}),
    ]
    results = []
    for nbytes in (2**22, 1):
        monkeypatch.setattr("actstore.queries.lanes.PIECE_NBYTES", nbytes)
        results.append([ask(n, store, per="layer", tokens=mask, **o) for n, o in asked])
    for whole, pieces in zip(*results, strict=True):
        off = 0 if whole.attrs["query"] in ("histogram", "quantiles") else 1e-6
        for name in whole.data_vars:
            np.testing.assert_allclose(pieces[name], whole[name], rtol=off, atol=off)
    x = values[:, mask].astype(np.float64).ravel()
    assert np.isclose(results[1][0]["variance"], x.var(ddof=1), rtol=1e-6)
    assert np.array_equal(results[1][1]["counts"][0], np.histogram(x, 20)[0])
    assert np.array_equal(results[1][3]["quantile"][0], np.quantile(x, Q))


def test_provenance(small: actstore.Store) -> None:
    result = actstore.peaks(small, stages="mlp_post", tokens="position > 0", by="play", bins=60)
    attrs = result.attrs
    assert attrs["query"] == "peaks"
    assert '"bins": 60' in attrs["parameters"]
    assert attrs["compat"] == "textbook"
    assert attrs["by"] == "play"
    assert attrs["store_id"] == small.id
    assert attrs["config_hash"]
    assert attrs["model"] == "tiny <model>"
    assert attrs["tokens"] == "position > 0"
    assert attrs["tokens_used"] + attrs["excluded_by_tokens"] == small.n_tokens
    assert attrs["excluded_by_sinks"] == 0
    assert attrs["source"] == "scan"
    assert actstore.zeroness(small, stages="mlp_post", compat="notebook").attrs["compat"] == (
        "notebook"
    )


def test_results_go_to_netcdf(acts: xr.DataArray, tmp_path: Path) -> None:
    for name in NAMES:
        result = actstore.compute(build(name, acts, by="condition"))
        result.to_netcdf(tmp_path / f"{name}.nc", engine="h5netcdf")
    rule = ask("histogram", acts, bins="fd")
    rule.to_netcdf(tmp_path / "rule.nc", engine="h5netcdf")


@pytest.mark.parametrize("name", NAMES)
def test_sinks_are_left_out(name: str) -> None:
    values = np.random.default_rng(2).normal(size=(3, 200, 8)).astype(np.float32)
    values[1, [0, 50, 120]] *= 40  # at the middle layer: sinks
    values[2, 7] *= 40  # at another layer: none
    data = labelled(values)
    norms = np.linalg.norm(values[1].astype(float), axis=1)
    sinks = norms > 10 * np.median(norms)
    assert np.flatnonzero(sinks).tolist() == [0, 50, 120]
    asked = data["position"].values > 0  # token 120 is at position 0, and so is 0
    without = actstore.compute(build(name, data, tokens="position > 0", exclude_sinks="mlp_post"))
    equal(without, actstore.compute(build(name, data, tokens=asked & ~sinks)))
    assert without.attrs["excluded_by_tokens"] == 5
    assert without.attrs["excluded_by_sinks"] == 1
    assert without.attrs["tokens_used"] == 194
    assert without.attrs["exclude_sinks"] == "mlp_post"


def test_sinks_of_another_stage(small: actstore.Store) -> None:
    with pytest.raises(UnknownNameError, match=r"hiden.*did you mean 'hidden'"):
        actstore.moments(small, exclude_sinks="hiden")
    assert (
        actstore.moments(small, stages="mlp_post", exclude_sinks="hidden").attrs[
            "excluded_by_sinks"
        ]
        == 0
    )


# -- the registry --------------------------------------------------------------------------


def test_all_queries_are_registered_and_public() -> None:
    assert set(NAMES) <= set(QUERIES)
    assert set(QUERIES) <= set(actstore.__all__)


@pytest.mark.parametrize("name", sorted(QUERIES))
def test_queries_are_described(name: str) -> None:
    query = QUERIES[name]
    doc = query.function.__doc__ or ""
    for section in ("Parameters", "Returns", "Examples"):
        assert f"\n{section}\n---" in doc
    assert ">>> " in doc
    assert query.summary.endswith((".", "?"))
    assert [p.name for p in query.parameters][: len(COMMON)] == [c.split()[0] for c in COMMON]
    for parameter in query.parameters:
        assert parameter.description.endswith("."), parameter.name
    words = shlex.split(query.example)
    options = {w.split("=")[0][2:] for w in words if w.startswith("--")}
    assert options
    known = {p.name.replace("_", "-") for p in query.parameters} | {"json", "csv", "table"}
    assert options <= known


@pytest.mark.parametrize("name", sorted(QUERIES))
def test_the_command_line_knows_them(name: str, small: actstore.Store) -> None:
    from actstore_cli import app

    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
    helped = runner.invoke(app, ["query", name, "--help"])
    assert helped.exit_code == 0
    plain = "".join(c for c in helped.output if c not in "│╭╮╰╯─")
    text = " ".join(plain.split())
    for parameter in QUERIES[name].parameters:
        assert f"--{parameter.name.replace('_', '-')}" in text
    assert QUERIES[name].example.split()[0] in text
    asked = runner.invoke(app, ["query", name, small.path, "--stages", "attn_z,mlp_out", "--json"])
    assert asked.exit_code == 0, asked.output
    assert '"attrs"' in asked.stdout


# -- wrong questions -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("histogram", {"bins": "sturges"}, "unknown rule for bins 'sturges'.*Known: fd"),
        ("histogram", {"bins": 0}, "bins is 0: it must be from 1 to"),
        ("histogram", {"bins": [1, 0]}, "edges that ascend"),
        ("histogram", {"bins": [0, 1], "range": (0, 1)}, "leave range out"),
        ("histogram", {"range": (1, 1)}, "the smaller first"),
        ("histogram", {"range": (0, np.inf)}, "give two numbers"),
        ("histogram", {"transform": "centre"}, "did you mean 'center'"),
        ("histogram", {"compat": "notebok"}, "did you mean 'notebook'"),
        ("histogram", {"per": "nueron"}, "did you mean 'neuron'"),
        ("quantiles", {"q": 95}, "the 95th percentile is 0.95"),
        ("quantiles", {"q": []}, "q has 0 fractions"),
        ("quantiles", {"q": [0.5, -1]}, "q holds -1"),
        ("peaks", {"bins": 2}, "bins is 2: it must be from 3 to"),
        ("peaks", {"distance": 0}, "both must be above 0"),
        ("top_tokens", {"k": 0}, "k is 0: it must be from 1 to"),
        ("sample", {"n": 0}, "n is 0: it must be from 1 to"),
        ("sample", {"unit": "row"}, "unknown value of unit 'row'.*Known: token, value"),
        ("zeroness", {"compat": "no"}, "Known: textbook, notebook"),
        ("moments", {"exclude_sinks": "hidden"}, "unknown stage 'hidden'"),
    ],
)
def test_wrong_questions(acts: xr.DataArray, name: str, options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        getattr(actstore, name)(acts, **options)


def test_tables_that_are_too_large(acts: xr.DataArray) -> None:
    wide = xr.DataArray(np.zeros((1, 1, 20_000), "f4"), dims=("layer", "token", "neuron"))
    with pytest.raises(UsageError, match="ask for fewer bins or neurons"):
        actstore.histogram(wide, bins=10_000, per="neuron")
