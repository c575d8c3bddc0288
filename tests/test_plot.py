"""Pictures: what is drawn are the result's numbers, nothing overlaps, files are what they say."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import actstore_cli
import numpy as np
import pytest
import xarray as xr
from actstore_cli.plot import _EXAMPLES
from helpers import write_small
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import FillBetweenPolyCollection, LineCollection, PathCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

import actstore
from actstore import plot
from actstore.errors import UnknownNameError, UsageError
from actstore.plot.style import STAGE_STYLE, group_colours
from actstore.queries.registry import QUERIES
from actstore.schema import STAGES

MLP = ("mlp_in", "mlp_pre", "mlp_post", "mlp_out")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("plot") / "small.zarr"
    write_small(path)
    return actstore.open(path)


@pytest.fixture
def ax() -> Axes:
    return figure().subplots()


def figure(size: tuple[float, float] | None = None) -> Figure:
    """A figure as `save` makes them."""
    made = Figure(layout="constrained")
    FigureCanvasAgg(made)
    if size is None:
        made.fit_panels = True  # type: ignore[attr-defined]
    else:
        made.set_size_inches(size)
    return made


def stairs(ax: Axes) -> list[tuple[np.ndarray, np.ndarray]]:
    """(values, edges) of each step line."""
    return [(p.get_data().values, p.get_data().edges) for p in ax.patches]


def points(ax: Axes) -> list[np.ndarray]:
    return [np.asarray(c.get_offsets()) for c in ax.collections if isinstance(c, PathCollection)]


def in_order(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort(rows.T)]


@cache
def deep() -> dict[str, xr.Dataset]:
    """Results of 4 stages by 12 layers, one for each of several queries."""
    rng = np.random.default_rng(0)
    n, size = 6, 41
    coords = {"stage": np.array(MLP, object), "layer": np.arange(12)}
    edges = np.linspace(-2, 2, size + 1)
    about = {"store": "run.zarr", "tokens_used": 4070, "tokens": "position > 0"}

    def made(query: str, parameters: dict[str, Any], variables: dict[str, Any], **more: Any) -> Any:
        attrs = {"query": query, "parameters": json.dumps(parameters), **about}
        return xr.Dataset(variables, {**coords, **more}, attrs)

    dims = ("stage", "layer")
    spread = np.linspace(0.3, 1, 12)[:, None] * np.array([1, 1.2, 0.1, 0.5])[:, None, None]
    centre = (edges[1:] + edges[:-1]) / 2
    density = np.exp(-((centre / spread) ** 2)) / spread
    labelled = {"long_name": "probability density", "units": "1/activation"}
    return {
        "histogram": made(
            "histogram",
            {"bins": edges.tolist(), "range": None, "transform": None},
            {
                "density": ((*dims, "bin"), density, labelled),
                "edges": ((*dims, "edge"), np.broadcast_to(edges, (4, 12, size + 1))),
                "below": (dims, np.full((4, 12), 10_000)),
                "above": (dims, np.full((4, 12), 4)),
            },
        ),
        "quantiles": made(
            "quantiles",
            {},
            {"quantile": ((*dims, "q"), np.sort(rng.normal(size=(4, 12, 5)), axis=-1))},
            q=[0.05, 0.25, 0.5, 0.75, 0.95],
        ),
        "moments": made(
            "moments",
            {},
            {
                name: ((*dims, "neuron"), rng.normal(size=(4, 12, n)))
                for name in plot.PLOTS["moments"].keywords["variables"]  # type: ignore[attr-defined]
            },
            neuron=np.arange(n),
        ),
        "peaks": made(
            "peaks",
            {},
            {
                "position": ((*dims, "neuron"), rng.normal(size=(4, 12, n))),
                "centred_on_zero": ((*dims, "neuron"), rng.random((4, 12, n)) < 0.7),
            },
            neuron=np.arange(n),
        ),
        "mean_activation": made(
            "mean_activation",
            {},
            {"mean": ((*dims, "neuron"), rng.normal(size=(4, 12, n)))},
            neuron=np.arange(n),
        ),
    }


# -- histograms -----------------------------------------------------------------------------------


def test_histogram_by_stage(store: Any, ax: Axes) -> None:
    result = actstore.histogram(
        store, stages="hidden,mlp_post,mlp_out", layers=1, bins=20, range=(-2, 2), density=True
    ).compute()
    assert plot.histogram(result, ax) is ax
    for drawn, stage in zip(stairs(ax), result["stage"].values, strict=True):
        np.testing.assert_array_equal(drawn[0], result["density"].sel(stage=stage).values[0])
        np.testing.assert_array_equal(drawn[1], np.linspace(-2, 2, 21))
    words = [t.get_text() for t in ax.get_legend().get_texts()]
    assert words == ["hidden", "mlp_post", "mlp_out"]
    colours = [to_hex(p.get_edgecolor()) for p in ax.patches]
    assert colours == [plot.stage_colour(s) for s in words]
    outside = int(result["below"].sum() + result["above"].sum())
    assert outside > 0 and ax.get_xlabel() == f"activation; {outside:,} outside"
    assert ax.get_ylabel() == "probability density\n(1/activation)"
    assert ax.get_title(loc="left") == "layer 1"
    assert not ax.spines["top"].get_visible()


def test_histogram_by_layer_has_a_colour_bar_with_names(store: Any) -> None:
    result = actstore.histogram(store, stages="hidden", bins=15).compute()
    axes = plot.histograms(result, figure())
    assert axes.shape == (1, 2)
    assert [ax.get_yscale() for ax in axes.flat] == ["linear", "log"]
    assert [ax.get_title(loc="left") for ax in axes.flat] == [
        "hidden, linear scale",
        "hidden, log scale",
    ]
    for ax in axes.flat:
        for drawn, layer in zip(stairs(ax), range(3), strict=True):
            np.testing.assert_array_equal(drawn[0], result["counts"].sel(layer=layer))
            np.testing.assert_array_equal(drawn[1], result["edges"].sel(layer=layer))
        assert ax.get_legend() is None
    assert bar_names(axes[0, 0]) == ["emb", "h.0", "h.1"]
    # Dark is shallow.
    light = [sum(to_rgb(p.get_edgecolor())) for p in axes[0, 0].patches]
    assert light == sorted(light)


def bar_names(ax: Axes) -> list[str]:
    (bar,) = (a for a in ax.figure.axes if a.get_label() == "<colorbar>")
    assert bar.get_ylabel() == "layer"
    return [t.get_text() for t in bar.get_yticklabels()]


def test_histogram_alone_makes_its_own_bar(store: Any, ax: Axes) -> None:
    plot.histogram(actstore.histogram(store, stages="mlp_post", bins=9), ax, log=True)
    assert bar_names(ax) == ["0", "1"]
    assert ax.get_yscale() == "log"


def test_histogram_by_group_and_by_head(store: Any) -> None:
    result = actstore.histogram(store, stages="mlp_post", layers=1, by="play", bins=9).compute()
    (ax,) = plot.draw(result, figure()).flat
    for i, drawn in enumerate(stairs(ax)):
        np.testing.assert_array_equal(drawn[0], result["counts"].values[0, i])
        np.testing.assert_array_equal(drawn[1], result["edges"].values[0, i])
    words = [t.get_text() for t in ax.get_legend().get_texts()]
    assert words == [v or "''" for v in result["play"].values]  # an empty name is not hidden
    heads = actstore.histogram(store, stages="attn_z", per="head", bins="fd").compute()
    axes = plot.draw(heads, figure())
    assert axes.shape == (1, 2) and [len(ax.patches) for ax in axes.flat] == [4, 4]
    bins = int(heads["n_bins"][0, 2])
    values, edges = stairs(axes[0, 0])[2]  # without the padding
    np.testing.assert_array_equal(values, heads["counts"].values[0, 2, :bins])
    np.testing.assert_array_equal(edges, heads["edges"].values[0, 2, : bins + 1])


def test_many_groups_have_a_colour_bar(ax: Axes) -> None:
    n = 20
    tokens = xr.DataArray(
        np.random.default_rng(0).normal(size=(100, 2)),
        dims=("token", "neuron"),
        coords={"word": ("token", [f"w{i % n}" for i in range(100)])},
    )
    plot.histogram(actstore.histogram(tokens, by="word", bins=[-5, 0, 5]), ax)
    assert len(ax.patches) == n and ax.get_legend() is None
    (bar,) = (a for a in ax.figure.axes if a is not ax)
    assert bar.get_ylabel() == "word" and bar.get_yticklabels()[1].get_text() == "w2"


def test_neurons_overlaid(store: Any, ax: Axes) -> None:
    result = actstore.histogram(store, stages="mlp_post", layers=1, per="neuron", bins=7).compute()
    plot.histogram(result, ax)
    (lines,) = ax.collections
    assert isinstance(lines, LineCollection)
    drawn = np.array(lines.get_segments())
    np.testing.assert_array_equal(drawn[:, :, 1], result["counts"].values[0])
    edges = result["edges"].values[0]
    np.testing.assert_array_equal(drawn[:, :, 0], (edges[:, 1:] + edges[:, :-1]) / 2)
    assert ax.get_yscale() == "log" and lines.get_rasterized()
    low, high = ax.get_ylim()
    counts = result["counts"].values
    assert low < counts[counts > 0].min() and high > counts.max()


def test_a_spike_is_cut_and_said_so(ax: Axes) -> None:
    result = deep()["histogram"].isel(layer=[0])
    plot.histogram(result, ax)
    top = result["density"].values.max(axis=-1).ravel()
    assert top[2] > 4 * np.median(top)
    assert np.sort(top)[-2] < ax.get_ylim()[1] < top[2]
    assert f"goes to {top[2]:.3g}" in ax.get_ylabel().replace("\n", " ")
    np.testing.assert_array_equal(stairs(ax)[2][0], result["density"].values[2, 0])


def test_tails_too_low_to_be_seen_are_left_out_but_not_asked_ones() -> None:
    x = np.append(np.random.default_rng(0).normal(size=100_000), [-500.0, 900.0])[:, None]
    array = xr.DataArray(x, dims=("token", "neuron"))
    own = plot.histogram(actstore.histogram(array, bins=2000), figure().subplots())
    assert own.get_xlim()[0] > -20 and own.get_xlim()[1] < 20
    asked = plot.histogram(
        actstore.histogram(array, bins=2000, range=(-500, 900)), figure().subplots()
    )
    assert asked.get_xlim()[0] <= -500 and asked.get_xlim()[1] >= 900
    log = plot.histogram(actstore.histogram(array, bins=2000), figure().subplots(), log=True)
    assert log.get_xlim()[1] >= 900


def test_stages_by_layers_share_colours_of_depth() -> None:
    result = deep()["histogram"]
    axes = plot.draw(result, figure())
    assert axes.shape == (2, 2)
    for ax, stage in zip(axes.flat, MLP, strict=True):
        assert ax.get_title(loc="left") == stage
        drawn = np.array([values for values, _ in stairs(ax)])
        np.testing.assert_array_equal(drawn, result["density"].sel(stage=stage))
    assert bar_names(axes[0, 0]) == [str(n) for n in range(12)]
    for a, b in itertools.pairwise(axes.flat):
        assert [p.get_edgecolor() for p in a.patches] == [p.get_edgecolor() for p in b.patches]


def test_stages_of_other_depths_keep_colours_by_number(store: Any) -> None:
    result = actstore.histogram(store, stages="hidden,mlp_out", bins=[-9, 0, 9]).compute()
    hidden, mlp = plot.draw(result, figure()).flat
    assert len(hidden.patches) == 3 and len(mlp.patches) == 2
    for a, b in zip(hidden.patches, mlp.patches, strict=False):
        assert a.get_edgecolor() == b.get_edgecolor()


def test_results_with_nothing_in_them(store: Any) -> None:
    result = actstore.histogram(store, stages="mlp_post", bins=[50, 60], density=True).compute()
    assert np.isnan(result["density"].values).all()
    axes = plot.draw(result, figure())
    axes[0, 0].figure.canvas.draw()  # type: ignore[union-attr]
    assert not axes[0, 0].patches
    counts = actstore.histogram(store, stages="mlp_post", bins=[50, 60], per="neuron")
    plot.draw(counts, figure())[0, 0].figure.canvas.draw()  # type: ignore[union-attr]


# -- zeroed and centred neurons, peaks ------------------------------------------------------------


@pytest.fixture(scope="module")
def neurons(store: Any) -> dict[str, xr.Dataset]:
    where: dict[str, Any] = {"stages": "attn_z", "layers": 1}
    per: dict[str, Any] = {**where, "per": "neuron", "bins": 30, "range": (-3, 3)}
    return {
        "plain": actstore.histogram(store, **per).compute(),
        "peak": actstore.histogram(store, **per, transform="peak").compute(),
        "scale": actstore.histogram(store, **per, transform="scale").compute(),
        "zeroness": actstore.zeroness(store, **where, threshold=0.7).compute(),
        "peaks": actstore.peaks(store, **where, height=0.02).compute(),
    }


@pytest.mark.parametrize("flag", ["zeroness", "peaks"])
def test_zeroed_and_centred_panels(neurons: dict[str, xr.Dataset], flag: str) -> None:
    peak, scale = neurons["peak"], neurons["scale"]
    name = {"zeroness": "zeroed", "peaks": "centred_on_zero"}[flag]
    flags = neurons[flag]
    flags = flags.assign({name: (flags[name].dims, np.arange(32)[None] % 3 > 0)})
    axes = plot.neuron_panels(neurons["plain"], flags, figure((12, 3)), peak=peak, mean=scale)
    zero = flags[name].values[0]
    counts = neurons["plain"]["counts"].values[0]
    wanted = [counts[zero], counts[~zero], peak["counts"].values[0], scale["counts"].values[0]]
    for ax, values in zip(axes.flat, wanted, strict=True):
        drawn = np.array(ax.collections[0].get_segments())[:, :, 1]
        np.testing.assert_array_equal(drawn, values)
        assert ax.get_ylim() == axes[0, 0].get_ylim()
    assert f"{zero.sum()} neurons" in axes[0, 0].get_title(loc="left")
    assert "neuron peak" in axes[0, 2].get_xlabel() and "neuron mean" in axes[0, 3].get_xlabel()
    two = plot.neuron_panels(neurons["plain"], flags, figure((6, 3)))
    assert two.shape == (1, 2)


def test_panels_where_no_neuron_or_one_is_zeroed(neurons: dict[str, xr.Dataset]) -> None:
    for zeroed in (np.zeros((1, 32), bool), np.arange(32)[None] == 5):
        flags = neurons["zeroness"].assign(zeroed=(("layer", "neuron"), zeroed))
        plot.neuron_panels(neurons["plain"], flags, figure((6, 3)))[0, 0].figure.canvas.draw()
    with pytest.raises(UsageError, match="31 neurons and the histograms about 32"):
        plot.neuron_panels(neurons["plain"], flags.isel(neuron=slice(31)), figure())


def test_peaks_are_marked_on_the_histogram(neurons: dict[str, xr.Dataset], ax: Axes) -> None:
    chosen = neurons["plain"].isel(neuron=[3, 8])
    plot.neuron_peaks(chosen, neurons["peaks"], ax)
    np.testing.assert_array_equal([values for values, _ in stairs(ax)], chosen["counts"].values[0])
    every, mine = ax.lines[0], ax.lines[1]
    peaks = neurons["peaks"].sel(neuron=3, layer=1)
    found = peaks["peak_position"].values
    np.testing.assert_array_equal(every.get_xdata(), found[np.isfinite(found)])
    np.testing.assert_array_equal(mine.get_xdata(), [peaks["position"].item()])
    edges = chosen["edges"].values.ravel()
    bin_ = np.searchsorted(edges, mine.get_xdata()[0], "right") - 1
    height = chosen["counts"].values[0, 0, bin_]
    assert mine.get_ydata()[0] == height
    ((run,),) = (c.get_segments() for c in ax.collections[:1])
    np.testing.assert_allclose(run[:, 0], [peaks["run_low"], peaks["run_high"]])
    np.testing.assert_allclose(run[:, 1], height / 2)
    with pytest.raises(UsageError, match=r"32 neurons .* select at most 8, as result.sel\(neuron="):
        plot.neuron_peaks(neurons["plain"], neurons["peaks"], ax)
    plot.neuron_peaks(neurons["plain"].sel(neuron=3), neurons["peaks"].sel(neuron=[3]), ax)


def test_peak_positions(ax: Axes) -> None:
    result = deep()["peaks"].sel(stage="mlp_pre")
    plot.peak_positions(result, ax)
    near, far = points(ax)
    zero = result["centred_on_zero"].values
    np.testing.assert_array_equal(near[:, 1], result["position"].values[zero])
    np.testing.assert_array_equal(far[:, 1], result["position"].values[~zero])
    np.testing.assert_array_equal(np.round(near[:, 0]), np.nonzero(zero)[0])
    words = [t.get_text() for t in ax.get_legend().get_texts()]
    assert words == [f"near 0: {zero.sum()}", f"elsewhere: {(~zero).sum()}"]


def test_peak_positions_of_one_layer_and_without_peaks(store: Any, ax: Axes) -> None:
    result = actstore.peaks(store, stages="hidden", layers=1).compute()  # 200 tokens: none
    result["position"][0, 4] = 1.5
    plot.peak_positions(result, ax)
    assert [t.get_text() for t in ax.get_legend().get_texts()][2] == "none: 23"
    np.testing.assert_array_equal(np.concatenate(points(ax)), [[4, 1.5]])
    assert (ax.get_xlabel(), ax.get_title(loc="left")) == ("neuron", "hidden, h.0")


# -- over layers ----------------------------------------------------------------------------------


def test_quantiles(ax: Axes) -> None:
    result = deep()["quantiles"].sel(stage="mlp_in")
    plot.quantiles(result, ax)
    bands = [c for c in ax.collections if isinstance(c, FillBetweenPolyCollection)]
    values = result["quantile"].values
    for i, band in enumerate(bands):
        corners = {tuple(v) for v in band.get_paths()[0].vertices}
        assert {(n, values[n, i]) for n in range(12)} <= corners
        assert {(n, values[n, -1 - i]) for n in range(12)} <= corners
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), values[:, 2])
    words = [t.get_text() for t in ax.get_legend().get_texts()]
    assert words == ["0.05 to 0.95", "0.25 to 0.75", "0.5"]
    with pytest.raises(UsageError, match=r"neuron: 6.*result.sel\(neuron=0\)"):
        plot.quantiles(result.expand_dims(neuron=np.arange(6)), ax)


def test_panels_of_quantiles_share_a_legend(store: Any) -> None:
    drawn = figure()
    axes = plot.draw(actstore.quantiles(store, by="play"), drawn)
    assert axes.size > 1 and all(ax.get_legend() is None for ax in axes.flat)
    (legend,) = drawn.legends
    assert [t.get_text() for t in legend.get_texts()] == ["0.05 to 0.95", "0.25 to 0.75", "0.5"]
    (one,) = plot.draw(actstore.quantiles(store, stages="mlp_post"), figure()).flat
    assert one.get_legend() is not None


def test_profile_of_layers_and_of_neurons(store: Any) -> None:
    for per in ("layer", "neuron"):
        result = actstore.moments(store, per=per).compute()
        ax = plot.profile(result, "std", figure().subplots())
        parts = plot.style.stages_of(result)
        for line, (stage, part) in zip(ax.lines, parts.items(), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), part["layer"])
            drawn = part["std"].median("neuron") if per == "neuron" else part["std"]
            np.testing.assert_allclose(line.get_ydata(), drawn)
            assert (line.get_color(), line.get_marker()) == STAGE_STYLE[stage]
        bands = [c for c in ax.collections if isinstance(c, FillBetweenPolyCollection)]
        assert len(bands) == (4 if per == "neuron" else 0)
        assert ("middle half of neurons" in ax.get_xlabel()) == (per == "neuron")
    band = bands[0].get_paths()[0].vertices
    quartiles = part["std"]  # the last stage's
    np.testing.assert_allclose(
        np.sort(bands[-1].get_paths()[0].vertices[:, 1])[[0, -1]],
        [quartiles.quantile(0.25, "neuron").min(), quartiles.quantile(0.75, "neuron").max()],
    )
    assert len(band) > 4


def test_profile_of_truth_values_groups_and_hidden(store: Any) -> None:
    zero = actstore.zeroness(store, stages="hidden", by="condition").compute()
    ax = plot.profile(zero, "zeroed", figure().subplots())
    for line, group in zip(ax.lines, zero["condition"].values, strict=True):
        share = zero["zeroed"].sel(condition=group).mean("neuron")
        np.testing.assert_allclose(line.get_ydata(), share)
        assert line.get_label() == f"condition {group}"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["emb", "h.0", "h.1"]
    assert ax.get_ylabel() == "share of neurons"
    several = actstore.zeroness(store, stages="hidden,mlp_post", by="condition").compute()
    with pytest.raises(UsageError, match=r"condition: 2.*result.sel\(condition="):
        plot.profile(several, "zeroed", figure().subplots())
    axes = plot.draw(several, figure())
    assert axes.shape == (2, 2)
    assert axes[0, 1].get_title(loc="left") == "mlp_post, zeroed"


def test_many_layers_have_few_ticks() -> None:
    values = xr.DataArray(np.ones((48, 5, 2)), dims=("layer", "token", "neuron"))
    ax = plot.profile(actstore.moments(values, per="layer"), "mean", figure().subplots())
    assert [t.get_text() for t in ax.get_xticklabels()] == [str(n) for n in range(0, 48, 4)]
    ax = plot.histogram(actstore.histogram(values, bins=3), figure().subplots())
    assert bar_names(ax) == [str(n) for n in range(0, 48, 4)]


def test_profile_with_infinite_scores(store: Any) -> None:
    result = actstore.zeroness(store, stages="mlp_post", threshold=100).compute()
    assert np.isinf(result["score"].values).all()
    plot.draw(result, figure(), log=True)[0, 0].figure.canvas.draw()  # type: ignore[union-attr]


# -- single values --------------------------------------------------------------------------------


@pytest.mark.parametrize("along", ["neuron", "token"])
def test_scatter(store: Any, ax: Axes, along: Any) -> None:
    data = store["mlp_out"].sel(layer=1)[:7, 3:9]
    plot.scatter(data, ax, along=along)
    (drawn,) = points(ax)
    rows, columns = np.indices((7, 6))
    x, colour = (columns + 3, rows) if along == "neuron" else (rows, columns + 3)
    wanted = np.stack([x, data.values, colour], axis=-1).reshape(-1, 3)
    colours = np.asarray(ax.collections[0].get_array())
    np.testing.assert_allclose(in_order(np.column_stack([drawn, colours])), in_order(wanted))
    assert ax.get_title(loc="left").startswith("layer 1, a colour for each")


def test_scatter_of_a_sample(store: Any) -> None:
    result = actstore.sample(store, stages="hidden,mlp_post", layers=1, n=9).compute()
    axes = plot.draw(result, figure())
    assert axes.shape == (2, 2)
    for row, stage in zip(axes, ("hidden", "mlp_post"), strict=True):
        values = np.sort(result[stage]["activation"].values.ravel())
        for ax in row:
            np.testing.assert_array_equal(np.sort(points(ax)[0][:, 1]), values)


def test_scatter_of_very_many_says_what_it_shows(ax: Axes) -> None:
    data = xr.DataArray(np.zeros((3000, 100), "f4"), dims=("token", "neuron"))
    plot.scatter(data, ax)
    assert len(points(ax)[0]) <= 100_000
    assert ax.get_title(loc="left").endswith("(1,000 of 3,000)")


def test_pair_plot(store: Any) -> None:
    result = actstore.sample(store, stages="hidden", n=200, unit="value").compute()
    axes = plot.draw(result, figure())
    values = result["activation"].values
    for i, j in itertools.product(range(3), range(3)):
        ax = axes[i, j]
        if i > j:
            np.testing.assert_array_equal(points(ax)[0], np.column_stack([values[j], values[i]]))
        elif i == j:
            counts = [p.get_height() for p in ax.patches]
            np.testing.assert_array_equal(counts, np.histogram(values[i], bins=40)[0])
        else:
            r = np.corrcoef(values[i], values[j])[0, 1]
            assert ax.texts[0].get_text() == f"r = {r:.2f}"
    assert [ax.get_xlabel() for ax in axes[2]] == ["emb", "h.0", "h.1"]
    assert [row[0].get_ylabel() for row in axes] == ["emb", "h.0", "h.1"]
    one = actstore.sample(store, stages="hidden", layers=0, n=20, unit="value")
    with pytest.raises(UsageError, match="a pair plot of 1 layers: give 2 to 8"):
        plot.draw(one, figure())
    with pytest.raises(UsageError, match="give 2 to 8"):
        plot.pair_plot(result.isel(layer=[0] * 9), figure())


def test_conditions(store: Any) -> None:
    result = actstore.mean_activation(store, stages="hidden", layers=2, by="condition").compute()
    axes = plot.draw(result, figure())
    x, y = result["mean"].values[0].T
    over = points(axes[0, 0])
    np.testing.assert_array_equal(over[0], np.column_stack([np.arange(24), x]))
    np.testing.assert_array_equal(over[1], np.column_stack([np.arange(24), y]))
    np.testing.assert_array_equal(points(axes[0, 1])[0], np.column_stack([x, y]))
    assert f"r = {np.corrcoef(x, y)[0, 1]:.3f}" in axes[0, 1].get_title(loc="left")
    first, second = result["condition"].values
    assert axes[0, 1].get_xlabel().endswith(first) and axes[0, 1].get_ylabel().endswith(second)


def test_conditions_other_than_two(store: Any, ax: Axes) -> None:
    result = actstore.mean_activation(store, stages="hidden", layers="0,2", by="play").compute()
    axes = plot.draw(result, figure())
    assert [len(points(a)) for a in axes.flat] == [4, 4]
    (made,) = axes[0, 0].figure.legends  # type: ignore[union-attr]
    assert [t.get_text() for t in made.get_texts()] == [v or "''" for v in result["play"].values]
    chosen = result.isel(layer=0)
    with pytest.raises(
        UsageError, match=r"4 conditions: .*result.sel\(play=\['As You Like It', 'L"
    ):
        plot.condition_scatter(chosen, ax)
    plot.condition_scatter(chosen.sel(play=["Lear", "As You Like It"]), ax)
    np.testing.assert_array_equal(points(ax)[0][:, 0], chosen["mean"].sel(play="Lear"))
    alone = actstore.mean_activation(store, stages="hidden").compute()
    assert plot.draw(alone, figure()).shape == (1, 3)
    with pytest.raises(UsageError, match="1 conditions"):
        plot.condition_scatter(alone.isel(layer=0), ax)


def test_top_tokens(store: Any, ax: Axes) -> None:
    result = actstore.top_tokens(store, stages="mlp_post", layers=1, neurons=[5], k=6).compute()
    awkward = ["$x$", "\n", " the", "象", "<b>", ""]
    result["token_text"] = (result["value"].dims, np.array([[awkward]], object))
    plot.top_tokens(result, ax)
    widths = [bar.get_width() for bar in ax.patches]
    np.testing.assert_array_equal(widths, result["value"].values.ravel())
    ax.figure.canvas.draw()  # a warning about a missing character would be an error
    shown = [t.get_text() for t in ax.get_yticklabels()]
    assert shown == ["'$x$'", "'\\n'", "' the'", "'\\u8c61'", "'<b>'", "''"]
    assert ax.yaxis_inverted() and not ax.get_yticklabels()[0].get_parse_math()
    with pytest.raises(UsageError, match="50 tokens do not fit"):
        plot.top_tokens(result.isel(rank=[0] * 50), ax)


def test_top_tokens_of_many_neurons_are_those_of_the_largest(store: Any) -> None:
    for largest in (True, False):
        result = actstore.top_tokens(store, k=2, largest=largest).compute()
        axes = plot.draw(result, figure())
        best = [ax.patches[0].get_width() for ax in axes.flat if ax.patches]
        every = np.concatenate(
            [node["value"].values[..., 0].ravel() for node in result.children.values()]
        )
        every = np.sort(every)
        np.testing.assert_array_equal(best, every[::-1][:12] if largest else every[:12])
        assert axes[0, 0].figure.get_supxlabel().startswith(f"12 of {every.size} neurons")


def test_top_tokens_of_an_array_without_texts_and_of_few_tokens() -> None:
    array = xr.DataArray(np.float32([[1, 2], [3, 4]]), dims=("token", "neuron"))
    axes = plot.draw(actstore.top_tokens(array, k=5), figure())
    assert [t.get_text() for t in axes[0, 0].get_yticklabels()] == ["token 1", "token 0"]
    assert len(axes[0, 0].patches) == 2


# -- any picture ----------------------------------------------------------------------------------

PICTURES: dict[str, Callable[[Any], Any]] = {
    "histogram of all": lambda s: actstore.histogram(s, bins=20),
    "histogram by group": lambda s: actstore.histogram(
        s, stages="hidden,mlp_post", by="play", bins=20, density=True
    ),
    "histogram of neurons": lambda s: actstore.histogram(s, per="neuron", bins=9, range=(-1, 1)),
    "histogram of stages": lambda s: actstore.histogram(s, layers=1, bins=9, range=(-1, 1)),
    "quantiles": actstore.quantiles,
    "quantiles by group": lambda s: actstore.quantiles(s, layers=0, by="play"),
    "moments": actstore.moments,
    "moments by group": lambda s: actstore.moments(s, by="condition"),
    "zeroness": actstore.zeroness,
    "peaks": lambda s: actstore.peaks(s, height=0.02),
    "normality": actstore.normality,
    "mean_activation": actstore.mean_activation,
    "mean_activation by group": lambda s: actstore.mean_activation(s, by="play"),
    "mean_activation by two": lambda s: actstore.mean_activation(s, by="condition"),
    "sample": lambda s: actstore.sample(s, layers=1, n=20),
    "sample of values": lambda s: actstore.sample(s, stages="hidden", unit="value"),
    "top_tokens": lambda s: actstore.top_tokens(s, k=8),
    **{f"{name}, 4 by 12": (lambda s, name=name: deep()[name]) for name in deep()},
}


def test_every_query_has_a_picture_here() -> None:
    assert {name.split(",")[0].split()[0] for name in PICTURES} < set(plot.PLOTS)
    assert set(_EXAMPLES) == set(plot.PLOTS) <= set(QUERIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_nothing_overlaps_or_leaves_the_picture(name: str, store: Any) -> None:
    made = figure()
    result = PICTURES[name](store)
    axes = plot.draw(result, made)
    assert isinstance(axes, np.ndarray) and all(isinstance(ax, Axes) for ax in axes.flat)
    made.canvas.draw()
    page = made.bbox.padded(1)
    boxes = []
    for ax in made.axes:
        if not ax.axison:
            assert not ax.lines and not ax.patches
            continue
        texts = [ax.xaxis.label, ax.yaxis.label, ax._left_title]  # type: ignore[attr-defined]
        boxes += [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text()]
        view = ax.get_window_extent().padded(0.5)
        for axis, labels in ((0, ax.get_xticklabels()), (1, ax.get_yticklabels())):
            shown = [t for t in labels if t.get_text() and _within(t, view, axis)]
            extents = [t.get_window_extent() for t in shown]
            for box in extents:
                assert page.x0 <= box.x0 and box.x1 <= page.x1, shown
                assert page.y0 <= box.y0 and box.y1 <= page.y1, shown
            for a, b in itertools.pairwise(extents):
                assert not a.overlaps(b), f"tick labels {[t.get_text() for t in shown]}"
        boxes.append((f"plot {ax.get_title(loc='left')}", ax.get_window_extent()))
        above = ax.get_legend()
        if above is not None and above.get_bbox_to_anchor().y0 >= ax.get_window_extent().y1:
            boxes.append(("legend above", above.get_window_extent()))
    boxes += [("legend", m.get_window_extent()) for m in made.legends]
    boxes += [(t.get_text(), t.get_window_extent()) for t in made.texts]
    for text, box in boxes:
        assert page.x0 <= box.x0 and box.x1 <= page.x1, f"{text!r} leaves the picture"
        assert page.y0 <= box.y0 and box.y1 <= page.y1, f"{text!r} leaves the picture"
    for (first, a), (second, b) in itertools.combinations(boxes, 2):
        assert not a.padded(-1).overlaps(b.padded(-1)), f"{first!r} overlaps {second!r}"


def _within(text: Any, view: Any, axis: int) -> bool:
    x, y = text.get_transform().transform(text.get_position())
    return bool(view.x0 <= x <= view.x1 if axis == 0 else view.y0 <= y <= view.y1)


def test_heading_says_what_was_asked(store: Any) -> None:
    result = actstore.moments(store, tokens="position > 0", per="layer")
    axes = plot.draw(result, figure())
    used = result.attrs["tokens_used"]
    heading = f"moments, {store.name}, {used} tokens (position > 0)"
    assert axes[0, 0].figure.get_suptitle() == heading
    assert plot.draw(result, figure(), title="")[0, 0].figure.get_suptitle() == ""
    assert plot.draw(result, figure(), title="$ mine $")[0, 0].figure.get_suptitle() == "$ mine $"


def test_a_lazy_result_is_computed_once(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import actstore.plot.style as style

    seen = []

    def compute(result: Any) -> Any:
        seen.append(bool(getattr(result, "chunks", None)))
        return actstore.compute(result)

    monkeypatch.setattr(style, "compute", compute)
    for result in (actstore.histogram(store, bins=5, stages="hidden"), actstore.moments(store)):
        seen.clear()
        plot.draw(result, figure())
        assert sum(seen) <= 1


def test_figures_and_subfigures_of_ones_own(store: Any) -> None:
    result = actstore.histogram(store, stages="hidden", bins=5)
    made = figure((9, 4))
    left, right = made.subfigures(1, 2)
    axes = plot.draw(result, left)
    plot.draw(actstore.moments(store), right)
    assert axes[0, 0].figure is left
    made.canvas.draw()
    assert tuple(made.get_size_inches()) == (9, 4)


def test_stages_have_colours_that_everybody_can_tell_apart() -> None:
    assert list(STAGE_STYLE) == list(STAGES)
    # Linear RGB as seen with no, and with the three dichromatic, colour blindnesses (Machado 2009).
    eyes = [
        np.eye(3),
        [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
        [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
        [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
    ]
    for colours in ([c for c, _ in STAGE_STYLE.values()], group_colours(8)):
        for eye in eyes:
            seen = [_lab(np.asarray(eye) @ _linear(c)) for c in colours]
            nearest = min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))
            assert nearest > 15  # just noticeable is 2
    assert plot.stage_colour("mlp_post") == "#bd1f01"
    assert plot.stage_colour("my.stage") == plot.stage_colour("my.stage") != ""


def _linear(colour: str) -> np.ndarray:
    c = np.array(to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def _lab(linear: np.ndarray) -> np.ndarray:
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = to_xyz @ linear.clip(0, 1) / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# -- errors ---------------------------------------------------------------------------------------


def test_messages_say_what_to_select(store: Any, ax: Axes) -> None:
    several = actstore.histogram(store, bins=5)
    with pytest.raises(UsageError, match=r"stage: 4, layer: 3.*one of stage, layer.*result.sel\("):
        plot.histogram(several, ax)
    tree = actstore.histogram(store, per="neuron", bins=5)
    with pytest.raises(UsageError, match=r"differ in width.*result\['hidden'\].to_dataset\(\)"):
        plot.histogram(tree, ax)
    with pytest.raises(UsageError, match=r"holds .*mean.* needs counts or density, as actstore.h"):
        plot.histogram(actstore.moments(store, stages="hidden"), ax)
    with pytest.raises(UsageError, match="needs nonsense"):
        plot.profile(actstore.moments(store, stages="hidden"), "nonsense", ax)
    with pytest.raises(UsageError, match=r"of \(token, neuron\)"):
        plot.scatter(actstore.sample(store, stages="hidden", layers=0, unit="value"), ax)
    with pytest.raises(UsageError, match=r"select, as result.sel\(layer=0\)"):
        plot.scatter(store["hidden"][:, :5], ax)
    with pytest.raises(UnknownNameError, match="unknown axis 'neurons'"):
        plot.scatter(store["hidden"], ax, along="neurons")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"60 panels do not fit .* at most 48"):
        wide = deep()["mean_activation"].isel(stage=[0, 1, 2, 3, 0])
        plot.draw(wide.assign_coords(stage=["a", "b", "c", "d", "e"]), figure())
    with pytest.raises(UsageError, match="no picture of a result without"):
        plot.draw(xr.Dataset(), figure())
    with pytest.raises(UsageError, match="no picture of one_of_tomorrow; there are pictures of"):
        plot.draw(xr.Dataset(attrs={"query": "one_of_tomorrow"}), figure())


# -- files ----------------------------------------------------------------------------------------

STARTS = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".pdf": b"%PDF-"}
ENDS = {".png": b"IEND\xaeB`\x82", ".svg": b"</svg>", ".pdf": b"%%EOF"}


@pytest.mark.parametrize("ending", plot.ENDINGS)
def test_files(store: Any, tmp_path: Path, ending: str) -> None:
    result = actstore.histogram(store, stages="mlp_post", per="neuron", bins=9).compute()
    first = plot.save(result, tmp_path / f"a{ending}").read_bytes()
    assert first.startswith(STARTS[ending]) and first.rstrip().endswith(ENDS[ending])
    assert plot.save(result, str(tmp_path / f"b{ending}")).read_bytes() == first


def test_size_and_dots(store: Any, tmp_path: Path) -> None:
    result = actstore.moments(store, per="layer").compute()
    path = plot.save(result, tmp_path / "a.png", size=(7, 3), dpi=50)
    width, height = (int.from_bytes(path.read_bytes()[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (350, 150)
    with pytest.raises(UnknownNameError, match=r"'.jpg'.* Known: .png, .svg, .pdf"):
        plot.save(result, tmp_path / "a.jpg")


def test_no_global_state_where_axes_or_a_file_are_given(tmp_path: Path) -> None:
    code = f"""
import sys, actstore, xarray as xr, numpy as np
from actstore import plot
assert "matplotlib" not in sys.modules
acts = xr.DataArray(np.eye(4, dtype="f4"), dims=("token", "neuron"))
result = actstore.histogram(acts, bins=[0, 1, 2])
plot.save(result, {str(tmp_path / "a.svg")!r})
from matplotlib.figure import Figure
plot.histogram(result, Figure().subplots())
assert "matplotlib.pyplot" not in sys.modules
plot.histogram(result), plot.draw(result)
import matplotlib.pyplot
assert len(matplotlib.pyplot.get_fignums()) == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"MPLBACKEND": "agg"})


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def command(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    def run(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["actstore", *map(str, argv)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            actstore_cli.main()
        return stop.value.code or 0, *capfd.readouterr()  # type: ignore[return-value]

    return run


@pytest.mark.parametrize("name", plot.PLOTS)
def test_plot_command(name: str, command: Any, store: Any, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    more = ["--layers", "1"] if name == "sample" else []
    status, stdout, stderr = command("plot", name, store.path, "--out", out, *more, "--dpi", "60")
    assert status == 0, stderr
    assert stdout == "" and "drawn to" in stderr
    assert out.read_bytes().startswith(STARTS[".png"])


def test_plot_command_passes_everything_on(command: Any, store: Any, tmp_path: Path) -> None:
    options = ["--title", "Mine", "--size", "6x3", "--log", "--stages", "hidden", "--bins=-2:2:9"]
    status, _, stderr = command(
        "plot", "histogram", store.path, "--out", tmp_path / "a.svg", *options
    )
    assert status == 0, stderr
    text = (tmp_path / "a.svg").read_text()
    assert 'width="432pt" height="216pt"' in text
    result = actstore.histogram(store, stages="hidden", bins=np.linspace(-2, 2, 9).tolist())
    twin = plot.save(result, tmp_path / "b.svg", title="Mine", size=(6, 3), log=True)
    assert twin.read_text() == text


def test_plot_command_refuses(command: Any, store: Any, tmp_path: Path) -> None:
    ask = ("plot", "moments", store.path)
    for argv, words in (
        ((*ask, "--out", tmp_path / "a.jpg"), "unknown file ending '.jpg'"),
        ((*ask, "--out", tmp_path / "a.jpg"), "Known: .png, .svg, .pdf"),
        ((*ask, "--out", tmp_path / "no" / "a.png"), "there is no folder"),
        ((*ask, "--out", tmp_path / "a.png", "--size", "8"), "as 8x5"),
        ((*ask,), "--out"),
        (("plot", "momens", store.path), "momens"),
    ):
        status, stdout, stderr = command(*argv)
        assert status == 2 and stdout == "" and words in stderr and "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []
