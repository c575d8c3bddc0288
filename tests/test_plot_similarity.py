"""Pictures of dimensions, similarities and cosines: what is drawn are the result's numbers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from helpers import write_small
from matplotlib.axes import Axes
from matplotlib.collections import FillBetweenPolyCollection, LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from test_plot import MLP, bar_names, figure, points, stairs
from test_plot import PICTURES as OTHERS

from actstore import plot, queries
from actstore.errors import UsageError
from actstore.plot.style import STAGE_STYLE, Depth, group_colours, shades
from actstore.store import open_store

PAIRS = list(itertools.combinations(MLP, 2))
NAMES = [f"{a}:{b}" for a, b in PAIRS]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("plot") / "small.zarr"
    write_small(path)
    return open_store(path)


@pytest.fixture
def ax() -> Axes:
    return figure().subplots()


def made(query: str, variables: dict[str, Any], by: str = "", **coords: Any) -> xr.Dataset:
    """A result of a query, by hand."""
    attrs = {"query": query, "parameters": json.dumps({}), "store": "run.zarr"}
    attrs |= {"tokens_used": 4070, "tokens": "position > 0", **({"by": by} if by else {})}
    return xr.Dataset(variables, coords, attrs)


@cache
def deep() -> dict[str, xr.Dataset]:
    """Results of 4 stages by 12 layers, and by 2 groups."""
    rng = np.random.default_rng(0)
    stages, layers = np.array(MLP, object), np.arange(12)
    place = {"stage": stages, "layer": layers}
    arc = np.sin(np.linspace(0.4, 2.6, 12))

    def around(values: Any, spread: float = 0.04) -> np.ndarray:
        return values * np.exp(rng.normal(0, spread, np.shape(values)))

    ratio = around(np.outer([18, 60, 120, 45], 0.4 + arc))
    effective = around(3.1 * ratio + 40)
    null = np.broadcast_to([[640], [1750], [1750], [640]], (4, 12))
    described = {"long_name": "participation ratio", "units": "1"}
    fraction = {"long_name": "components for 0.95 of the variance", "units": "1"}
    shrink = np.arange(1, 769.0) ** -np.linspace(0.6, 1.6, 12)[:, None]
    variance = shrink * np.array([1, 2, 0.3, 4])[:, None, None]
    explained = variance / variance.sum(-1, keepdims=True)
    two = {"condition": np.array(["internal", "terminal"], object)}
    rsa = np.clip(around(np.outer([0.5, 0.4, 0.3, 0.8, 0.6, 0.7], 0.3 + 0.7 * arc)), 0, 0.97).T
    correlated = {"long_name": "correlation of similarities", "units": "1"}
    between = list(itertools.combinations(range(12), 2))
    apart = np.array([j - i for i, j in between])
    alike = np.stack([np.exp(-apart / s) - 0.06 for s in (3, 5, 8, 4)])
    edges = np.linspace(-1, 1, 201)
    middle = (edges[1:] + edges[:-1]) / 2
    centre, width = np.outer([0.5, 0.2, 0.1, 0.0], arc), np.outer([1, 0.7, 0.4, 1.2], 1.3 - arc) / 5
    curve = np.exp(-0.5 * ((middle - centre[..., None]) / width[..., None]) ** 2)
    density = curve / curve.sum(-1, keepdims=True) * 100
    q = np.array([0.01, 0.5, 0.99])
    cosine = centre[..., None] + width[..., None] * [-2.3, 0, 2.3]
    whole = {"edges": ("edge", edges)}
    matching = 1 / (centre**2 + width**2)
    tokens = np.arange(100, 140)
    vectors = rng.normal(size=(4, 12, 40, 8)) + np.linspace(0, 1, 4)[:, None, None, None]
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return {
        "dimensionality": made(
            "dimensionality",
            {
                "participation_ratio": (("stage", "layer"), ratio, described),
                "effective_dimension": (("stage", "layer"), effective, fraction),
                "null_participation_ratio": (("stage", "layer"), null),
            },
            **place,
        ),
        "dimensionality by group": made(
            "dimensionality",
            {
                "participation_ratio": (
                    ("stage", "layer", "condition"),
                    np.stack([ratio, around(ratio / 2)], -1),
                    described,
                ),
                "effective_dimension": (
                    ("stage", "layer", "condition"),
                    np.stack([effective, around(effective / 2)], -1),
                    fraction,
                ),
                "null_participation_ratio": (
                    ("stage", "layer", "condition"),
                    np.stack([null, null / 2], -1),
                ),
            },
            "condition",
            **place,
            **two,
        ),
        "intrinsic_dimension": made(
            "intrinsic_dimension",
            {
                "dimension": (
                    ("stage", "layer"),
                    around(np.outer([9, 12, 14, 11], 0.7 + arc)),
                    {"long_name": "intrinsic dimension", "units": "1"},
                ),
                "stderr": (("stage", "layer"), np.full((4, 12), 0.5)),
                "duplicates": (("stage", "layer"), np.zeros((4, 12), int)),
            },
            **place,
        ),
        "spectrum": made(
            "spectrum",
            {
                "variance": (
                    ("stage", "layer", "component"),
                    variance,
                    {"long_name": "variance of the component (ddof 1)", "units": "activation^2"},
                ),
                "explained": (("stage", "layer", "component"), explained),
                "cumulative": (
                    ("stage", "layer", "component"),
                    explained.cumsum(-1),
                    {"long_name": "fraction of the variance up to the component", "units": "1"},
                ),
            },
            **place,
            component=np.arange(1, 769),
        ),
        "rsa": made(
            "rsa",
            {
                "rsa": (("layer", "pair"), rsa, correlated),
                "rsa_low": (("layer", "pair"), rsa - 0.04),
                "rsa_high": (("layer", "pair"), rsa + 0.03),
                "p_value": (("layer", "pair"), np.where(rsa < 0.25, 0.2, 0.01)),
                "dropped": (("layer", "pair"), np.zeros((12, 6), int)),
            },
            layer=layers,
            **_paired(NAMES, stage_a=[a for a, _ in PAIRS], stage_b=[b for _, b in PAIRS]),
        ),
        "rsa of layers": made(
            "rsa",
            {"rsa": (("stage", "pair"), alike, correlated)},
            stage=stages,
            **_paired(
                [f"{i}:{j}" for i, j in between],
                layer_a=[i for i, _ in between],
                layer_b=[j for _, j in between],
            ),
        ),
        "cosine_pairs": made(
            "cosine_pairs",
            {
                "density": (
                    ("stage", "layer", "bin"),
                    density,
                    {"long_name": "probability density", "units": "1"},
                ),
                "below": (("stage", "layer"), np.zeros((4, 12), int)),
                "above": (("stage", "layer"), np.zeros((4, 12), int)),
                "cosine": (("stage", "layer", "quantile"), cosine),
                **whole,
            },
            **place,
            bin=middle,
            quantile=q,
        ),
        "gaussian_baseline": made(
            "gaussian_baseline",
            {
                "density": (("dimension", "bin"), np.stack([_normal(n, middle) for n in (10, 90)])),
                "matching_dimension": (
                    ("stage", "layer"),
                    matching,
                    {"long_name": "dimension of normal data with cosines as wide", "units": "1"},
                ),
                "matching_density": (
                    ("stage", "layer", "bin"),
                    np.stack([[_normal(n, middle) for n in row] for row in matching]),
                ),
                **whole,
            },
            **place,
            bin=middle,
            dimension=[10, 90],
        ),
        "cosine_matrix": made(
            "cosine_matrix",
            {
                "similarity": (
                    ("stage", "layer", "token", "token_b"),
                    np.einsum("slid,sljd->slij", vectors, vectors),
                )
            },
            **place,
            token=tokens,
            token_b=tokens,
        ),
    }


def _paired(names: list[str], **columns: Any) -> dict[str, Any]:
    coords = {"pair": names, **columns}
    return {
        k: ("pair", np.array(v, object if isinstance(v[0], str) else int))
        for k, v in coords.items()
    }


def _normal(n: float, at: np.ndarray) -> np.ndarray:
    """Density of the cosine of two normal vectors of n dimensions."""
    density = (1 - at**2) ** ((n - 3) / 2)
    return density / density.sum() * 100


def legend_words(of: Any) -> list[str]:
    return [t.get_text() for t in of.get_texts()]


def shared_words(axes: np.ndarray) -> list[str]:
    (shared,) = axes.flat[0].figure.legends
    return legend_words(shared)


# -- dimensions -----------------------------------------------------------------------------------


def test_dimensions_over_layers() -> None:
    result = deep()["dimensionality"]
    axes = plot.draw(result, figure())
    assert axes.shape == (1, 3)
    for ax, variable in zip(axes[0], ("participation_ratio", "effective_dimension"), strict=False):
        for line, stage in zip(ax.lines, MLP, strict=False):
            np.testing.assert_array_equal(line.get_ydata(), result[variable].sel(stage=stage))
            assert (line.get_color(), line.get_marker()) == STAGE_STYLE[stage]
    # Normal data are far above: logarithmic.
    assert [ax.get_yscale() for ax in axes[0]] == ["log", "linear", "linear"]
    assert axes[0, 1].get_ylim()[0] == 0
    dashed = [line for line in axes[0, 0].lines if line.get_linestyle() == "--"]
    null = result["null_participation_ratio"]
    for line, stage in zip(dashed, MLP, strict=False):
        np.testing.assert_array_equal(line.get_ydata(), null.sel(stage=stage))
        assert line.get_color() == plot.stage_colour(stage)
    assert not [line for line in axes[0, 1].lines if line.get_linestyle() == "--"]
    assert shared_words(axes) == [*MLP, "normal data"]
    assert axes[0, 1].get_ylabel().replace("\n", " ") == "components for 0.95 of the variance"


def test_scatter_of_dimensions(ax: Axes) -> None:
    result = deep()["dimensionality"]
    plot.dimension_scatter(result, ax)
    colours = Depth(range(12)).colours
    for drawn, dots, stage in zip(points(ax), ax.collections, MLP, strict=True):
        own = result.sel(stage=stage)
        wanted = np.column_stack([own["participation_ratio"], own["effective_dimension"]])
        np.testing.assert_array_equal(drawn, wanted)
        np.testing.assert_allclose(np.asarray(dots.get_facecolor())[:, :3], colours[:, :3])
    assert legend_words(ax.get_legend()) == list(MLP)
    assert bar_names(ax) == [str(n) for n in range(12)]
    both = (result[n].values.ravel() for n in ("participation_ratio", "effective_dimension"))
    assert ax.get_title(loc="left") == f"r = {np.corrcoef(*both)[0, 1]:.2f}"
    few = plot.dimension_scatter(result.isel(layer=[2]), figure().subplots())
    assert [to_hex(c.get_facecolor()[0]) for c in few.collections] == [  # type: ignore[index]
        plot.stage_colour(s) for s in MLP
    ]
    assert few.get_title(loc="left").startswith("layer 2, r = ")


def test_dimensions_at_one_layer_are_bars(store: Any) -> None:
    result = queries.dimensionality(store, stages="mlp_post,mlp_out", layers=1).compute()
    axes = plot.draw(result, figure())
    assert axes.shape == (1, 3)
    for ax, variable in zip(axes[0], ("participation_ratio", "effective_dimension"), strict=False):
        widths = [bar.get_width() for bar in ax.patches]
        np.testing.assert_array_equal(widths, result[variable].values.ravel())
        assert [t.get_text() for t in ax.get_yticklabels()] == ["mlp_post", "mlp_out"]
        assert ax.get_title(loc="left") == f"layer 1, {variable.replace('_', ' ')}"
    (null,) = axes[0, 0].collections
    assert isinstance(null, LineCollection) and "normal data" in axes[0, 0].get_xlabel()
    drawn = [segment[0, 0] for segment in null.get_segments()]
    np.testing.assert_array_equal(drawn, result["null_participation_ratio"].values.ravel())


def test_dimensions_of_groups(store: Any) -> None:
    result = deep()["dimensionality by group"]
    axes = plot.draw(result, figure())
    assert axes.shape == (3, 4)
    for row, variable in zip(axes, ("participation_ratio", "effective_dimension"), strict=False):
        for ax, stage in zip(row, MLP, strict=True):
            drawn = np.array([line.get_ydata() for line in ax.lines[:2]])
            np.testing.assert_array_equal(drawn.T, result[variable].sel(stage=stage))
    for ax, stage in zip(axes[2], MLP, strict=True):
        own = result["participation_ratio"].sel(stage=stage).values
        np.testing.assert_array_equal(np.array([p[:, 0] for p in points(ax)]).T, own)
    words = ["condition internal", "condition terminal", "normal data"]
    assert shared_words(axes) == words
    one = queries.dimensionality(store, layers=1, by="condition").compute()
    axes = plot.draw(one, figure())
    assert axes.shape == (1, 2) and shared_words(axes) == list(one["condition"].values)
    widths = np.reshape([bar.get_width() for bar in axes[0, 0].patches], (2, 4))
    np.testing.assert_array_equal(widths.T, one["participation_ratio"].values[:, 0])


def test_violins() -> None:
    result = deep()["dimensionality"]
    axes = plot.dimension_violins(result, figure())
    for ax, variable in zip(axes[0], ("participation_ratio", "effective_dimension"), strict=True):
        for i, (dots, stage) in enumerate(zip(points(ax), MLP, strict=True)):
            values = result[variable].sel(stage=stage).values
            np.testing.assert_array_equal(dots, np.column_stack([np.full(12, i), values]))
        medians = [
            s[0, 1]
            for c in ax.collections
            if isinstance(c, LineCollection)
            for s in c.get_segments()
        ]
        np.testing.assert_allclose(medians, result[variable].median("layer"))
        assert [t.get_text() for t in ax.get_xticklabels()] == list(MLP)
    groups = plot.dimension_violins(deep()["dimensionality by group"], figure())
    assert groups.shape == (2, 2)
    assert groups[1, 0].get_title(loc="left") == "condition terminal\nparticipation ratio"
    with pytest.raises(UsageError, match="violins are over layers, and the result has one"):
        plot.dimension_violins(result.isel(layer=[0]), figure())


def test_intrinsic_dimension(store: Any) -> None:
    result = deep()["intrinsic_dimension"]
    (ax,) = plot.draw(result, figure()).flat
    bars = [c for c in ax.collections if isinstance(c, LineCollection)]
    for line, error, stage in zip(ax.lines[:4], bars, MLP, strict=True):
        own = result.sel(stage=stage)
        np.testing.assert_array_equal(line.get_ydata(), own["dimension"])
        ends = np.array(error.get_segments())[:, :, 1]
        np.testing.assert_allclose(ends[:, 0], own["dimension"] - own["stderr"])
        np.testing.assert_allclose(ends[:, 1], own["dimension"] + own["stderr"])
    small = queries.intrinsic_dimension(store, layers=0, n=60).compute()
    (ax,) = plot.draw(small, figure()).flat
    np.testing.assert_array_equal(
        [b.get_width() for b in ax.patches], small["dimension"].values[:, 0]
    )
    (errors,) = (c for c in ax.collections if isinstance(c, LineCollection))
    ends = np.array(errors.get_segments())[:, :, 0]
    np.testing.assert_allclose(np.diff(ends)[:, 0] / 2, small["stderr"].values[:, 0])


def test_spectra(store: Any) -> None:
    result = deep()["spectrum"]
    axes = plot.draw(result, figure())
    assert axes.shape == (2, 4)
    for row, variable in zip(axes, ("variance", "cumulative"), strict=True):
        for ax, stage in zip(row, MLP, strict=True):
            drawn = np.array([line.get_ydata() for line in ax.lines])
            np.testing.assert_array_equal(drawn, result[variable].sel(stage=stage))
            np.testing.assert_array_equal(ax.lines[3].get_xdata(), np.arange(1, 769))
            assert ax.get_xscale() == "log"
            assert ax.get_yscale() == ("log" if variable == "variance" else "linear")
    assert bar_names(axes[0, 0]) == [str(n) for n in range(12)]
    alone = plot.draw(queries.spectrum(store, stages="hidden", k=9), figure())
    assert alone.shape == (1, 2) and bar_names(alone[0, 0]) == ["emb", "h.0", "h.1"]
    stages = plot.draw(queries.spectrum(store, layers=1, k=9), figure())
    assert stages.shape == (1, 2) and len(shared_words(stages)) == 4
    groups = plot.draw(queries.spectrum(store, stages="hidden,mlp_out", by="condition"), figure())
    assert groups.shape == (4, 2)
    with pytest.raises(UsageError, match=r"one of stage, layer.*result.sel\("):
        plot.spectrum(result, "variance", figure().subplots())


def test_variance_that_is_noise_of_the_arithmetic_is_left_out(ax: Axes) -> None:
    result = deep()["spectrum"].isel(stage=[0], layer=[0]).copy(deep=True)
    result["variance"][..., 500:] = 1e-19
    plot.spectrum(result, "variance", ax)
    assert ax.get_ylim()[0] > 1e-4
    result["variance"][:] = 0
    plot.spectrum(result, "variance", figure().subplots()).figure.canvas.draw()  # type: ignore[union-attr]


# -- RSA and CKA ----------------------------------------------------------------------------------


def test_pairs_over_layers(store: Any) -> None:
    result = deep()["rsa"]
    axes = plot.draw(result, figure())
    (ax,) = axes.flat
    bands = [c for c in ax.collections if isinstance(c, FillBetweenPolyCollection)]
    for i, (line, band) in enumerate(zip(ax.lines[::2], bands, strict=True)):
        own = result.isel(pair=i)
        np.testing.assert_array_equal(line.get_ydata(), own["rsa"])
        assert line.get_color() == group_colours(6)[i]
        corners = {tuple(v) for v in band.get_paths()[0].vertices}
        assert {(n, own["rsa_low"].values[n]) for n in range(12)} <= corners
        assert {(n, own["rsa_high"].values[n]) for n in range(12)} <= corners
        weak = own["p_value"].values > 0.05
        np.testing.assert_array_equal(ax.lines[2 * i + 1].get_xdata(), np.flatnonzero(weak))
        np.testing.assert_array_equal(ax.lines[2 * i + 1].get_ydata(), own["rsa"].values[weak])
    assert ax.get_xlabel() == "layer; open: p > 0.05;\nbands: 95% intervals"
    assert legend_words(ax.get_legend()) == NAMES
    groups = queries.cka(store, by="condition").compute()
    axes = plot.draw(groups, figure())
    assert axes.shape == (1, 2) and shared_words(axes) == list(groups["pair"].values)
    for ax, key in zip(axes[0], groups["condition"].values, strict=True):
        drawn = np.array([line.get_ydata() for line in ax.lines])
        np.testing.assert_array_equal(drawn.T, groups["cka"].sel(condition=key))
        assert ax.get_title(loc="left") == f"condition {key}, CKA"


def test_pairs_at_one_layer_are_bars(store: Any) -> None:
    result = queries.rsa(store, layers=1, interval=True, null=20).compute()
    (ax,) = plot.draw(result, figure()).flat
    widths = [bar.get_width() for bar in ax.patches]
    np.testing.assert_array_equal(widths, result["rsa"].values[0])
    ends = np.array(ax.collections[0].get_segments())[:, :, 0]
    np.testing.assert_allclose(ends[:, 0], result["rsa_low"].values[0])
    np.testing.assert_allclose(ends[:, 1], result["rsa_high"].values[0])
    names = [
        f"{n}, p = {p:.2g}"
        for n, p in zip(result["pair"].values, result["p_value"].values[0], strict=True)
    ]
    assert [t.get_text() for t in ax.get_yticklabels()] == names
    assert ax.get_title(loc="left") == "layer 1, RSA"
    groups = queries.rsa(store, layers=1, by="condition").compute()
    (ax,) = plot.draw(groups, figure()).flat
    widths = np.reshape([bar.get_width() for bar in ax.patches], (2, 3))
    np.testing.assert_array_equal(widths, groups["rsa"].values[0])
    assert legend_words(ax.get_legend()) == list(groups["condition"].values)
    named = queries.cka(store, pairs=["hidden@1:mlp_out@0", "hidden@2:mlp_out@1"]).compute()
    (ax,) = plot.draw(named, figure()).flat
    assert [t.get_text() for t in ax.get_yticklabels()] == list(named["pair"].values)


def test_many_pairs_are_a_map(ax: Axes) -> None:
    small = deep()["rsa"][["rsa"]]
    many = xr.concat(
        [small.assign_coords(pair=[f"{n}{i}" for n in NAMES]) for i in range(3)], "pair"
    )
    axes = plot.draw(many, figure())
    (image,) = axes[0, 0].images
    np.testing.assert_array_equal(image.get_array(), many["rsa"].values.T)
    assert [t.get_text() for t in axes[0, 0].get_yticklabels()] == list(many["pair"].values)
    with pytest.raises(UsageError, match=r"18 pairs cannot be told apart: select at most 8"):
        plot.pair_profile(many, ax)


def test_layers_by_layers(store: Any) -> None:
    result = deep()["rsa of layers"]
    axes = plot.draw(result, figure())
    assert axes.shape == (2, 2)
    for ax, stage in zip(axes.flat, MLP, strict=True):
        (image,) = ax.images
        drawn = np.asarray(image.get_array())
        own = result["rsa"].sel(stage=stage)
        for (i, j), value in zip(itertools.combinations(range(12), 2), own.values, strict=True):
            assert drawn[i, j] == drawn[j, i] == value
        assert np.asarray(image.get_array().mask).diagonal().all()  # type: ignore[union-attr]
        assert image.get_clim() == (result["rsa"].min(), result["rsa"].max())
        assert ax.get_title(loc="left") == stage and not ax.yaxis_inverted()
    hidden = queries.cka(store, stages="hidden,mlp_out", pairs="layers").compute()
    axes = plot.draw(hidden, figure())
    assert axes[0, 1].images[0].get_array().shape == (2, 2)  # the layers it has
    assert [t.get_text() for t in axes[0, 0].get_xticklabels()] == ["emb", "h.0", "h.1"]
    both = queries.cka(store, stages="hidden", pairs="layers", data_b=store).compute()
    (ax,) = plot.draw(both, figure()).flat
    np.testing.assert_array_equal(ax.images[0].get_array().ravel(), both["cka"].values)
    assert ax.get_xlabel() == ax.get_ylabel() == f"layer of {store.name}"


# -- matrices of tokens ---------------------------------------------------------------------------


def test_matrices_share_a_scale() -> None:
    result = deep()["cosine_matrix"].isel(layer=[3])
    axes = plot.draw(result, figure())
    assert axes.shape == (2, 2)
    others = result["similarity"].values[..., ~np.eye(40, dtype=bool)]
    for ax, stage in zip(axes.flat, MLP, strict=True):
        (image,) = ax.images
        np.testing.assert_array_equal(image.get_array(), result["similarity"].sel(stage=stage)[0])
        assert image.get_clim() == (others.min(), others.max())
        assert ax.get_title(loc="left") == f"{stage}, layer 3"
    axes[0, 0].figure.canvas.draw()
    assert {"100", "120"} <= {t.get_text() for t in axes[0, 0].get_xticklabels()}
    (bar,) = (a for a in axes[0, 0].figure.axes if a.get_label() == "<colorbar>")
    assert bar.get_ylabel() == "cosine"


def test_matrices_between_stages_of_groups_and_reduced(store: Any) -> None:
    where: dict[str, Any] = {"layers": "0,1", "tokens": "position < 4"}
    cross = queries.cosine_matrix(store, stages="attn_z", stage_b="mlp_out", **where).compute()
    axes = plot.draw(cross, figure())
    assert axes.shape == (1, 2) and axes[0, 0].get_xlabel() == "token at mlp_out"
    assert axes[0, 0].get_ylabel() == "token at attn_z"
    assert axes[0, 0].images[0].get_clim() == (cross["similarity"].min(), cross["similarity"].max())
    groups = queries.cosine_matrix(store, stages="mlp_out", by="condition", **where).compute()
    axes = plot.draw(groups, figure())
    assert axes.shape == (2, 2)
    titles = [ax.get_title(loc="left") for ax in axes.flat]
    for i, (name, node) in enumerate(groups.children.items()):
        assert titles[2 * i + 1] == f"mlp_out, layer 1\ncondition {name}"
        drawn = axes[i, 1].images[0].get_array()
        np.testing.assert_array_equal(drawn, node["similarity"].values[1])
    counted = queries.cosine_matrix(store, stages="mlp_out", reduce="histogram", **where).compute()
    (ax,) = plot.draw(counted, figure()).flat
    np.testing.assert_array_equal([v for v, _ in stairs(ax)], counted["density"].values)
    mean = queries.cosine_matrix(store, reduce="mean", **where).compute()
    (ax,) = plot.draw(mean, figure()).flat
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), mean["mean"].values[1, :2])
    second = queries.cosine_matrix(store, stages="mlp_out", data_b=store, **where).compute()
    (ax, _) = plot.draw(second, figure()).flat
    assert ax.get_xlabel() == ax.get_ylabel() == f"token of {store.name}"
    distance = queries.cosine_matrix(store, stages="mlp_out", metric="euclidean", **where).compute()
    plot.draw(distance, made_figure := figure())
    (bar,) = (a for a in made_figure.axes if a.get_label() == "<colorbar>")
    assert bar.get_ylabel() == "distance"


def test_scales_are_white_at_zero() -> None:
    both = shades([np.array([-0.5, np.nan]), np.array([1.0])])
    assert (both["vmin"], both["vmax"]) == (-0.5, 1)
    at = [both["cmap"]((v + 0.5) / 1.5) for v in (-0.5, 0.0, 0.5, 1.0)]
    assert min(at[1][:3]) > 0.95
    assert at[0][2] > at[0][0] and at[2][0] > at[2][2] and at[3][0] > at[3][2]
    # Equal steps of colour: what is 0.5 away from 0 is as dark on either side.
    assert abs(sum(at[0][:3]) - sum(at[2][:3])) < 0.4
    assert shades([np.array([0.2, 1.0])])["cmap"] == "viridis"
    assert shades([np.array([np.nan])])["vmax"] == 1


# -- cosines --------------------------------------------------------------------------------------


def test_cosines_of_one_place_beside_normal_data(ax: Axes) -> None:
    result, normal = deep()["cosine_pairs"], deep()["gaussian_baseline"]
    one = result.sel(stage="mlp_post", layer=4)
    plot.cosine_density(one, ax, baseline=normal)
    drawn = stairs(ax)
    own = normal.sel(stage="mlp_post", layer=4)
    wanted = [one["density"], one["density"], own["matching_density"], *normal["density"]]
    for (values, edges), density in zip(drawn, wanted, strict=True):
        np.testing.assert_array_equal(values, density)
        np.testing.assert_array_equal(edges, result["edges"])
    quantiles = [line.get_xdata()[0] for line in ax.lines]
    np.testing.assert_array_equal(quantiles, one["cosine"])
    words = legend_words(ax.get_legend())
    assert f"quantile 0.5: {one['cosine'].values[1]:.3f}" in words
    n = own["matching_dimension"].item()
    assert f"normal, {n:,.0f} dimensions (matching)" in words
    top = max(one["density"].max(), own["matching_density"].max())
    assert top < ax.get_ylim()[1] < 1.2 * top
    assert ax.get_title(loc="left") == "mlp_post, layer 4"


def test_cosines_of_several(store: Any) -> None:
    result = deep()["cosine_pairs"]
    axes = plot.draw(result, figure())
    assert axes.shape == (2, 2) and bar_names(axes[0, 0]) == [str(n) for n in range(12)]
    for ax, stage in zip(axes.flat, MLP, strict=True):
        own = result.sel(stage=stage)
        np.testing.assert_array_equal([v for v, _ in stairs(ax)], own["density"])
        marks = [line.get_xdata()[0] for line in ax.lines]
        np.testing.assert_array_equal(marks, own["cosine"].values.ravel())
        assert ax.get_xlabel().endswith("quantiles 0.01, 0.5, 0.99")
    alone = queries.cosine_pairs(store, stages="hidden", layers=1).compute()
    (ax,) = plot.draw(alone, figure()).flat
    np.testing.assert_array_equal(stairs(ax)[0][0], alone["density"].values[0])
    assert len(ax.get_legend().get_texts()) == 4
    stages = queries.cosine_pairs(store, layers=1, by="condition").compute()
    assert plot.draw(stages, figure()).shape == (2, 2)
    narrow = queries.cosine_pairs(store, stages="hidden", layers=1, range=(0, 0.1)).compute()
    (ax,) = plot.draw(narrow, figure()).flat
    outside = int(narrow["below"].sum() + narrow["above"].sum())
    assert outside and ax.get_xlabel() == f"cosine of two tokens; {outside:,} pairs outside"


def test_cosines_with_baselines_in_panels(store: Any) -> None:
    ask: dict[str, Any] = {"stages": "hidden,mlp_out", "layers": "0,1", "n": 50}
    result = queries.cosine_pairs(store, **ask).compute()
    normal = queries.gaussian_baseline(store, **ask, dimensions=[4, 40]).compute()
    axes = plot.cosine_densities(result, figure(), baseline=normal)
    assert axes.shape == (2, 2)
    np.testing.assert_array_equal(
        stairs(axes[1, 0])[2][0], normal["matching_density"].sel(stage="hidden", layer=1)
    )
    drawn_only = queries.gaussian_baseline(store, **ask, match=False).compute()
    plot.cosine_densities(result, figure(), baseline=drawn_only)


def test_baselines(store: Any) -> None:
    result = deep()["gaussian_baseline"]
    left, right = plot.draw(result, figure()).flat
    np.testing.assert_array_equal([v for v, _ in stairs(left)], result["density"])
    assert legend_words(left.get_legend()) == ["10", "90"]
    for line, stage in zip(right.lines, MLP, strict=True):
        own = result["matching_dimension"].sel(stage=stage)
        np.testing.assert_array_equal(line.get_ydata(), own)
    one = queries.gaussian_baseline(store, layers=1, n=50, dimensions=7)
    assert plot.draw(one, figure()).shape == (1, 2)
    groups = queries.gaussian_baseline(store, by="condition", n=50)
    assert plot.draw(groups, figure()).shape == (1, 5)
    bare = queries.gaussian_baseline(store, n=50, match=False)
    assert plot.draw(bare, figure()).shape == (1, 1)


# -- any picture ----------------------------------------------------------------------------------

PICTURES: dict[str, Callable[[Any], Any]] = {
    "dimensionality": queries.dimensionality,
    "dimensionality of a stage": lambda s: queries.dimensionality(s, stages="hidden"),
    "dimensionality of a layer": lambda s: queries.dimensionality(s, layers=1),
    "dimensionality by group": lambda s: queries.dimensionality(s, by="condition"),
    "dimensionality of a layer by group": lambda s: queries.dimensionality(
        s, layers=1, by="condition"
    ),
    "dimensionality of a group of layers": lambda s: queries.dimensionality(
        s, stages="mlp_post", by="play", null=False
    ),
    "spectrum": queries.spectrum,
    "spectrum of a layer": lambda s: queries.spectrum(s, layers=1, k=20),
    "spectrum by group": lambda s: queries.spectrum(s, stages="mlp_post", by="condition"),
    "spectrum of a layer by group": lambda s: queries.spectrum(s, layers=1, by="condition"),
    "intrinsic_dimension": lambda s: queries.intrinsic_dimension(s, n=60),
    "intrinsic_dimension by group": lambda s: queries.intrinsic_dimension(s, by="condition"),
    "intrinsic_dimension of a layer": lambda s: queries.intrinsic_dimension(s, layers=0),
    "cosine_matrix": lambda s: queries.cosine_matrix(s, tokens="sequence < 10"),
    "cosine_matrix by group": lambda s: queries.cosine_matrix(s, layers=1, by="condition"),
    "cosine_matrix of one": lambda s: queries.cosine_matrix(s, stages="hidden", layers=1),
    "cosine_matrix at one place": lambda s: deep()["cosine_matrix"].sel(stage="mlp_in", layer=3),
    "rsa": queries.rsa,
    "rsa with intervals": lambda s: queries.rsa(s, interval=True, null=9),
    "rsa of a layer": lambda s: queries.rsa(s, layers=0, interval=True, null=9),
    "rsa of a layer by group": lambda s: queries.rsa(s, layers=0, by="play"),
    "rsa of layers": lambda s: queries.rsa(s, stages="hidden", pairs="layers"),
    "cka by group": lambda s: queries.cka(s, by="condition"),
    "cka of layers by group": lambda s: queries.cka(s, pairs="layers", by="condition"),
    "cosine_pairs": queries.cosine_pairs,
    "cosine_pairs of stages": lambda s: queries.cosine_pairs(s, layers=1),
    "cosine_pairs of one": lambda s: queries.cosine_pairs(s, stages="hidden", layers=1),
    "cosine_pairs by group": lambda s: queries.cosine_pairs(s, stages="hidden", by="condition"),
    "gaussian_baseline": lambda s: queries.gaussian_baseline(s, n=50),
    "gaussian_baseline by group": lambda s: queries.gaussian_baseline(s, n=50, by="condition"),
    **{f"{name}, 4 by 12": (lambda s, name=name: deep()[name]) for name in deep()},
}


def test_pictures_of_queries_that_there_are() -> None:
    drawn = {name.split(",")[0].split()[0] for name in [*PICTURES, *OTHERS]}
    assert drawn <= set(plot.PLOTS)


OWN: dict[str, Callable[[Any, Figure], Any]] = {
    "violins": lambda s, f: plot.dimension_violins(deep()["dimensionality"], f),
    "violins of groups": lambda s, f: plot.dimension_violins(deep()["dimensionality by group"], f),
    "violins of a stage": lambda s, f: plot.dimension_violins(
        queries.dimensionality(s, stages="hidden"), f
    ),
    "cosines and baselines": lambda s, f: plot.cosine_densities(
        deep()["cosine_pairs"].isel(layer=[1, 5, 9]), f, baseline=deep()["gaussian_baseline"]
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PICTURES, *OWN])
def test_nothing_overlaps_or_leaves_the_picture(name: str, store: Any) -> None:
    drawn = figure()
    if name in OWN:
        OWN[name](store, drawn)
    else:
        plot.draw(PICTURES[name](store), drawn)
    assert_laid_out(drawn)


def assert_laid_out(drawn: Figure) -> None:
    drawn.canvas.draw()
    page = drawn.bbox.padded(1)
    boxes = []
    for ax in drawn.axes:
        if not ax.axison:
            continue
        texts = [ax.xaxis.label, ax.yaxis.label, ax._left_title]  # type: ignore[attr-defined]
        boxes += [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text()]
        boxes.append((f"plot {ax.get_title(loc='left')}", ax.get_window_extent()))
        own = ax.get_legend()
        if own is not None and not own.get_window_extent().overlaps(ax.get_window_extent()):
            boxes.append(("legend of a panel", own.get_window_extent()))
        view = ax.get_window_extent().padded(0.5)
        for axis, labels in ((0, ax.get_xticklabels()), (1, ax.get_yticklabels())):
            shown = [t for t in labels if t.get_text() and _within(t, view, axis)]
            extents = [t.get_window_extent() for t in shown]
            boxes += [(f"tick {t.get_text()}", e) for t, e in zip(shown, extents, strict=True)]
    boxes += [("legend", m.get_window_extent()) for m in drawn.legends]
    boxes += [(t.get_text(), t.get_window_extent()) for t in drawn.texts]
    for text, box in boxes:
        assert page.x0 <= box.x0 and box.x1 <= page.x1, f"{text!r} leaves the picture"
        assert page.y0 <= box.y0 and box.y1 <= page.y1, f"{text!r} leaves the picture"
    for (first, a), (second, b) in itertools.combinations(boxes, 2):
        assert not a.padded(-1).overlaps(b.padded(-1)), f"{first!r} overlaps {second!r}"


def _within(text: Any, view: Any, axis: int) -> bool:
    x, y = text.get_transform().transform(text.get_position())
    return bool(view.x0 <= x <= view.x1 if axis == 0 else view.y0 <= y <= view.y1)


# -- errors ---------------------------------------------------------------------------------------


def test_messages_say_what_to_select(store: Any, ax: Axes) -> None:
    deep_ = deep()
    with pytest.raises(UsageError, match=r"layer: 12.*result.sel\(layer=0\)"):
        plot.dimension_bars(deep_["dimensionality"], "participation_ratio", ax)
    with pytest.raises(UsageError, match=r"condition: 2.*result.sel\(condition='internal'\)"):
        plot.dimension_scatter(deep_["dimensionality by group"], ax)
    with pytest.raises(UsageError, match=r"needs participation_ratio, as actstore.dimensionality"):
        plot.dimension_scatter(deep_["rsa"], ax)
    with pytest.raises(UsageError, match="no pairs of layers: ask rsa with pairs='layers'"):
        plot.layer_matrix(deep_["rsa"], ax)
    with pytest.raises(UsageError, match=r"stage: 4.*result.sel\(stage='mlp_in'\)"):
        plot.layer_matrix(deep_["rsa of layers"], ax)
    with pytest.raises(UsageError, match="needs rsa or cka"):
        plot.pair_bars(deep_["dimensionality"], ax)
    with pytest.raises(UsageError, match=r"layer: 12.*hold pair.*result.sel\(layer=0\)"):
        plot.pair_bars(deep_["rsa"], ax)
    with pytest.raises(UsageError, match=r"result.sel\(stage='mlp_in', layer=0\)"):
        plot.token_matrix(deep_["cosine_matrix"], ax)
    large = np.zeros((1, 1, 6000, 6000), np.int8)
    many = made("cosine_matrix", {"similarity": (("stage", "layer", "token", "token_b"), large)})
    with pytest.raises(UsageError, match=r"too few dots for a matrix of 6,000 tokens: .* 5,000"):
        plot.token_matrix(many, ax)
    rows = xr.DataArray(da.zeros((40_000, 8), chunks=(1000, 8)), dims=("token", "neuron"))
    with pytest.raises(UsageError, match=r"12.8 GB is more than a picture can show"):
        plot.draw(queries.cosine_matrix(rows))
    with pytest.raises(UsageError, match="one of stage, layer"):
        plot.cosine_density(deep_["cosine_pairs"], ax)
    normal = deep_["gaussian_baseline"]
    with pytest.raises(UsageError, match="hold none"):
        plot.cosine_density(deep_["cosine_pairs"].isel(layer=0), ax, baseline=normal)
    one = deep_["cosine_pairs"].isel(stage=0, layer=5)
    with pytest.raises(UsageError, match="the baseline is not about layer 5: ask gaussian_base"):
        plot.cosine_density(one, ax, baseline=normal.isel(layer=slice(3)))


def test_save(store: Any, tmp_path: Path) -> None:
    for name in ("rsa", "dimensionality", "cosine_matrix"):
        result = PICTURES[name](store).compute()
        first = plot.save(result, tmp_path / f"{name}.svg").read_bytes()
        assert plot.save(result, tmp_path / f"{name}2.svg").read_bytes() == first
    assert partial(plot.save, result)(tmp_path / "a.png").exists()
