"""Pictures of pairs, of layers and of labels: what is drawn are the result's numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from helpers import bare_corpus, plan_of, write_store
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from test_plot import MLP, bar_names, figure, points, stairs
from test_plot import PICTURES as DISTRIBUTIONS
from test_plot_similarity import PICTURES as SIMILARITY
from test_plot_similarity import assert_laid_out, legend_words, shared_words

import actstore
from actstore import plot
from actstore.corpus import label_column
from actstore.errors import UsageError
from actstore.plan import StageSpec
from actstore.plot.style import Depth

TWO = ("internal", "terminal")
UPPER = np.triu_indices(20, 1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """4 stages of 12 layers, whose spread grows with depth; `hidden` has one layer more."""
    rng = np.random.default_rng(0)
    condition = np.array(list(TWO) * 20)
    corpus = replace(
        bare_corpus([4] * 10), token_labels={"condition": label_column(condition.tolist())}
    )
    stages = [StageSpec("hidden", tuple(range(13)), 24)]
    stages += [StageSpec(name, tuple(range(12)), 24) for name in MLP]
    values = {}
    for stage in stages:
        common = rng.normal(size=(2, 24))[(condition == "terminal").astype(int)]
        grown = np.exp(0.4 * np.arange(len(stage.layers)))[:, None, None]
        own = rng.normal(size=(len(stage.layers), 40, 24))
        values[stage.name] = (grown * (common + 0.7 * own)).astype("f4")
    values["hidden"][0] = values["hidden"][0, :1]  # the same for all tokens
    path = tmp_path_factory.mktemp("plot") / "marks.zarr"
    write_store(path, plan_of(corpus, stages, 64), values)
    return actstore.open(path)


@pytest.fixture
def ax() -> Axes:
    return figure().subplots()


def ask(store: Any, **asked: Any) -> Any:
    return actstore.compute(actstore.mutual_information(store, **asked))


def titles(axes: np.ndarray) -> list[str]:
    return [ax.get_title(loc="left") for ax in axes.flat if ax.axison]


# -- pairs ----------------------------------------------------------------------------------------


def test_matrices_distributions_and_scatter_of_one_place(store: Any) -> None:
    tree = ask(store, stages="mlp_out", layers=3, by="condition")
    drawn = figure()
    axes = plot.draw(tree, drawn)
    assert axes.shape == (3, 3)
    for row, name in zip(axes, ("mutual_information", "covariance"), strict=False):
        every = np.concatenate([tree[k][name].values[0][UPPER] for k in TWO])
        for ax, key in zip(row, TWO, strict=False):
            (image,) = ax.images
            np.testing.assert_array_equal(image.get_array(), tree[key][name].values[0])
            assert image.get_clim() == pytest.approx(tuple(np.quantile(every, (0.005, 0.995))))
            assert ax.get_title(loc="left") == f"mlp_out, layer 3\ncondition {key}"
        for (density, edges), key in zip(stairs(row[2]), TWO, strict=True):
            values = tree[key][name].values[0][UPPER]
            want = np.histogram(values, edges, density=True)[0]
            np.testing.assert_allclose(density, want, rtol=1e-6)
            assert edges[[0, -1]] == pytest.approx((values.min(), values.max()))
    assert legend_words(axes[0, 2].get_legend()) == list(TWO)
    assert axes[1, 2].get_legend() is None  # the same again, over the lines
    for ax, key in zip(axes[2], TWO, strict=False):
        own = [tree[key][n].values[0][UPPER] for n in ("covariance", "mutual_information")]
        np.testing.assert_array_equal(points(ax)[0], np.column_stack(own))
        r = np.corrcoef(*own)[0, 1]
        assert ax.get_title(loc="left").endswith(f"condition {key}, r = {r:.2f}")
    assert [len(p) for p in points(axes[2, 2])] == [190, 190]
    bars = [a.get_ylabel() for a in drawn.axes if a.get_label() == "<colorbar>"]
    assert bars == ["mutual information (bit)", "covariance (activation^2)"]
    axes[0, 1].figure.canvas.draw()
    assert {"1", "21"} <= {t.get_text() for t in axes[0, 1].get_xticklabels()}  # tokens, not rows


def test_one_set_two_sets_and_neurons(store: Any) -> None:
    where = {"stages": "mlp_out", "layers": 3}
    one = ask(store, **where)
    axes = plot.draw(one, figure())
    assert axes.shape == (2, 3) and not axes[1, 2].axison
    np.testing.assert_array_equal(axes[1, 0].images[0].get_array(), one["covariance"][0])
    two = ask(store, tokens="position < 2", tokens_b="position == 3", **where)
    axes = plot.draw(two, figure())
    assert axes[0, 0].images[0].get_array().shape == (20, 10)
    drawn = np.column_stack([two[n].values.ravel() for n in ("covariance", "mutual_information")])
    np.testing.assert_array_equal(points(axes[0, 2])[0], drawn)
    neurons = ask(store, axis="neuron", **where)
    axes = plot.draw(neurons, figure())
    assert axes[0, 0].get_xlabel() == axes[0, 0].get_ylabel() == "neuron"
    alone = actstore.pairwise_covariance(store, by="condition", **where)
    assert plot.draw(alone, figure()).shape == (1, 3)


def test_information_against_covariance_in_a_grid(store: Any) -> None:
    tree = ask(store, stages=",".join(MLP), by="condition")
    axes = plot.draw(tree, figure())
    assert axes.shape == (12, 4)
    assert shared_words(axes) == list(TWO)
    for (layer, k), ax in np.ndenumerate(axes):
        assert ax.get_title(loc="left") == f"{MLP[k]}, layer {layer}"
        for drawn, key in zip(points(ax), TWO, strict=True):
            own = tree[key].to_dataset().sel(stage=MLP[k], layer=layer)
            want = [own[n].values[UPPER] for n in ("covariance", "mutual_information")]
            np.testing.assert_array_equal(drawn, np.column_stack(want))
        assert bool(ax.get_xlabel()) == (layer == 11) and bool(ax.get_ylabel()) == (k == 0)
    hidden = ask(store, stages="hidden")
    axes = plot.draw(hidden, figure())
    assert titles(axes)[0].startswith("hidden, emb") and len(titles(axes)) == 13
    gaps = plot.draw(ask(store, stages="hidden,mlp_out", layers="11,12"), figure())
    assert [ax.axison for ax in gaps.flat] == [True, True, True, False]
    few = plot.information_scatter(
        ask(store, stages="mlp_in", layers=1), figure().subplots(), most=100
    )
    assert len(points(few)[0]) == 98  # every 8th of 780


def test_distributions_and_means_over_layers(store: Any) -> None:
    asked = {"stages": "mlp_out", "by": "condition"}
    counted = ask(store, reduce="histogram", reduce_bins=30, **asked)
    drawn = figure()
    axes = plot.draw(counted, drawn)
    assert axes.shape == (2, 3) and bar_names(axes[0, 0]) == [str(n) for n in range(12)]
    colours = Depth(range(12)).colours
    for k, key in enumerate(TWO):
        for layer, ((density, edges), patch) in enumerate(
            zip(stairs(axes[0, k]), axes[0, k].patches, strict=True)
        ):
            own = counted.sel(condition=key, layer=layer)
            want = own["edges_mutual_information"].values
            np.testing.assert_array_equal(edges, want)
            counts = own["counts_mutual_information"].values
            np.testing.assert_allclose(density, counts / counts.sum() / np.diff(want))
            np.testing.assert_allclose(patch.get_edgecolor(), colours[layer])
    for row, name in zip(axes, ("mutual_information", "covariance"), strict=True):
        for line, key in zip(row[2].lines, TWO, strict=True):
            want = counted[f"mean_{name}"].sel(condition=key)
            np.testing.assert_array_equal(line.get_ydata(), want)
    # Covariances grow by orders of magnitude: density by decade, the same pairs under each line.
    assert axes[1, 0].get_xscale() == axes[1, 2].get_yscale() == "log"
    assert axes[0, 0].get_xscale() == "linear" and axes[0, 2].get_ylim()[0] == 0
    for density, edges in stairs(axes[1, 0]):
        share = (density / ((edges[1:] + edges[:-1]) / 2 * np.log(10)) * np.diff(edges)).sum()
        assert 0.5 < share < 1.0001
    # Of the matrices: the same means, whatever the bins.
    whole = plot.information_depth(ask(store, **asked), figure())
    assert whole.shape == (2, 3)
    for a, b in zip(whole[:, 2], axes[:, 2], strict=True):
        for line, other in zip(a.lines, b.lines, strict=True):
            np.testing.assert_allclose(line.get_ydata(), other.get_ydata(), rtol=1e-9)


def test_pairs_that_are_all_the_same_are_a_line(store: Any, ax: Axes) -> None:
    counted = ask(store, stages="hidden", layers="0,1", reduce="histogram")
    plot.information_density(counted, "covariance", ax)
    assert len(stairs(ax)) == 1
    (line,) = ax.lines
    assert line.get_xdata()[0] == counted["mean_covariance"].values[0]  # type: ignore[index]
    assert ax.get_xlim()[0] <= line.get_xdata()[0] <= ax.get_xlim()[1]  # type: ignore[index]


def test_joint_histograms_and_means(store: Any) -> None:
    joint = ask(store, stages="mlp_out", layers="2,5", reduce="joint", reduce_bins=9)
    axes = plot.draw(joint, figure())
    for ax, layer in zip(axes.flat, (2, 5), strict=True):
        (mesh,) = ax.collections
        drawn = np.ma.filled(mesh.get_array(), 0).reshape(9, 9)
        np.testing.assert_array_equal(drawn, joint["counts"].sel(layer=layer).values.T)
        assert titles(axes) == ["mlp_out, layer 2", "mlp_out, layer 5"]
    mean = ask(store, stages="mlp_in,mlp_out", reduce="mean")
    axes = plot.draw(mean, figure())
    assert axes.shape == (1, 2)
    for ax, name in zip(axes.flat, ("mutual_information", "covariance"), strict=True):
        for line, stage in zip(ax.lines, ("mlp_in", "mlp_out"), strict=True):
            np.testing.assert_array_equal(line.get_ydata(), mean[f"mean_{name}"].sel(stage=stage))
        assert "ddof" not in ax.get_ylabel()


# -- layers by layers -----------------------------------------------------------------------------


def test_layers_by_layers(store: Any) -> None:
    result = actstore.compute(actstore.layer_covariance(store, stages="hidden,mlp_out"))
    axes = plot.draw(result, figure())
    assert axes.shape == (2, 2)
    for row, (stage, n) in zip(axes, (("hidden", 13), ("mlp_out", 12)), strict=True):
        own = result.sel(stage=stage).isel(layer=slice(n), layer_b=slice(n))
        np.testing.assert_array_equal(row[0].images[0].get_array(), own["covariance"])
        np.testing.assert_allclose(row[1].images[0].get_array(), 100 * own["r_squared"])
        low, high = row[0].images[0].get_clim()
        assert -low == high == abs(own["covariance"]).max()
        assert row[1].images[0].get_clim() == (0, 100)
        assert not row[0].yaxis_inverted()
    assert [t.get_text() for t in axes[0, 0].get_xticklabels()][:3] == ["emb", "h.1", "h.3"]
    assert titles(axes) == [
        "hidden, covariance",
        "hidden, R²",
        "mlp_out, covariance",
        "mlp_out, R²",
    ]
    groups = actstore.layer_covariance(store, stages="mlp_in", by="condition", per="neuron")
    axes = plot.draw(groups, figure())
    assert titles(axes)[2:] == [
        "mlp_in, covariance\ncondition terminal",
        "mlp_in, R²\ncondition terminal",
    ]
    between = actstore.layer_covariance(store, stages="hidden", stage_b="mlp_out")
    between = actstore.compute(between)
    (left, _) = plot.draw(between, figure()).flat
    np.testing.assert_array_equal(left.images[0].get_array(), between["covariance"])
    assert (left.get_ylabel(), left.get_xlabel()) == ("layer of hidden", "layer of mlp_out")
    one = actstore.compute(actstore.layer_covariance(store, stages="mlp_in"))
    drawn = plot.layer_covariance_matrix(one, "correlation", figure().subplots())
    np.testing.assert_array_equal(drawn.images[0].get_array(), one["correlation"])


# -- labels ---------------------------------------------------------------------------------------


def test_neurons_that_tell_most(store: Any, ax: Axes) -> None:
    asked = {"stages": "mlp_out", "layers": 8, "null": 20}
    result = actstore.compute(actstore.label_information(store, **asked))
    plot.label_bars(result, ax)
    values = result["information"].values[0]
    order = np.argsort(-values, kind="stable")[:20]
    np.testing.assert_array_equal([bar.get_width() for bar in ax.patches], values[order])
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert names == [f"neuron {n}" for n in order]
    segments = np.array(ax.collections[0].get_segments())[:, :, 0]  # type: ignore[attr-defined]
    mean, std = (result[n].values[0, order] for n in ("null_mean", "null_std"))
    np.testing.assert_allclose(segments, np.column_stack([mean - 2 * std, mean + 2 * std]))
    assert ax.get_xlabel().startswith("information about condition (bit of 1.00)")
    best = actstore.label_information(store, stages="mlp_out", layers="3,8", k=5)
    axes = plot.draw(best, figure())
    assert axes.shape == (1, 2) and len(axes[0, 1].patches) == 5
    np.testing.assert_array_equal([b.get_width() for b in axes[0, 1].patches], values[order[:5]])


def test_labels_over_layers(store: Any) -> None:
    result = actstore.compute(actstore.label_information(store, stages=",".join(MLP), null=9))
    axes = plot.draw(result, figure())
    assert axes.shape == (2, 3) and not axes[1, 2].axison
    for line, stage in zip(axes[0, 0].lines, MLP, strict=True):
        best = result["information"].sel(stage=stage).max("neuron")
        np.testing.assert_array_equal(line.get_ydata(), best)
    for ax, stage in zip(axes.flat[1:], MLP, strict=False):
        drawn = np.array([line.get_ydata() for line in ax.lines[:12]])
        want = -np.sort(-result["information"].sel(stage=stage).values, axis=-1)
        np.testing.assert_array_equal(drawn, want)
        middle = np.median(result["null_mean"].sel(stage=stage))
        assert ax.lines[12].get_ydata()[0] == pytest.approx(middle)  # type: ignore[index]
    assert bar_names(axes[0, 0]) == [str(n) for n in range(12)]
    groups = actstore.label_information(store, label="position", by="condition", stages="mlp_in")
    axes = plot.draw(groups, figure())
    assert titles(axes)[1:] == ["mlp_in\ncondition internal", "mlp_in\ncondition terminal"]


# -- any picture ----------------------------------------------------------------------------------

PICTURES: dict[str, Callable[[Any], Any]] = {
    "mutual_information of one": lambda s: ask(s, stages="mlp_out", layers=3),
    "mutual_information of one by group": lambda s: ask(
        s, stages="hidden", layers=3, by="condition"
    ),
    "mutual_information with a null": lambda s: ask(s, stages="hidden", layers=3, null=3),
    "mutual_information of two sets": lambda s: ask(
        s, stages="hidden", layers=3, tokens="position == 0", tokens_b="position > 1"
    ),
    "mutual_information of neurons": lambda s: ask(s, stages="hidden", layers=3, axis="neuron"),
    "mutual_information of layers": lambda s: ask(s, stages="hidden"),
    "mutual_information of layers by group": lambda s: ask(s, stages="hidden", by="condition"),
    "mutual_information of stages": lambda s: ask(s, layers=3, by="condition"),
    "mutual_information, 4 by 12": lambda s: ask(s, stages=",".join(MLP), by="condition"),
    "mutual_information, histograms": lambda s: ask(s, reduce="histogram", layers=4),
    "mutual_information, histograms by group": lambda s: ask(
        s, reduce="histogram", stages="hidden", by="condition"
    ),
    "mutual_information, histograms, 4 by 12": lambda s: ask(
        s, reduce="histogram", stages=",".join(MLP)
    ),
    "mutual_information, histograms, 4 by 12 by group": lambda s: ask(
        s, reduce="histogram", stages=",".join(MLP), by="condition"
    ),
    "mutual_information, joint": lambda s: ask(
        s, reduce="joint", stages="hidden", layers="0-5", by="condition"
    ),
    "mutual_information, joint, 4 by 12": lambda s: ask(s, reduce="joint", stages=",".join(MLP)),
    "mutual_information, means": lambda s: ask(s, reduce="mean"),
    "mutual_information, means by group": lambda s: ask(s, reduce="mean", by="condition"),
    "mutual_information, means of a layer": lambda s: ask(s, reduce="mean", layers=2),
    "pairwise_covariance of one": lambda s: actstore.pairwise_covariance(
        s, stages="hidden", layers=2, by="condition"
    ),
    "pairwise_covariance": lambda s: actstore.pairwise_covariance(s, stages=",".join(MLP)),
    "pairwise_covariance by group": lambda s: actstore.pairwise_covariance(s, by="condition"),
    "layer_covariance": actstore.layer_covariance,
    "layer_covariance of one": lambda s: actstore.layer_covariance(s, stages="hidden"),
    "layer_covariance of two stages": lambda s: actstore.layer_covariance(
        s, stages="hidden,mlp_in", stage_b="mlp_out"
    ),
    "layer_covariance by group": lambda s: actstore.layer_covariance(s, by="condition"),
    "label_information": lambda s: actstore.label_information(s, null=5),
    "label_information of a layer": lambda s: actstore.label_information(s, layers=3, null=5),
    "label_information, best": lambda s: actstore.label_information(s, stages="hidden", k=5),
    "label_information by group": lambda s: actstore.label_information(
        s, label="position", by="condition", stages="hidden,mlp_out"
    ),
}


def test_every_query_with_a_picture_is_drawn_somewhere() -> None:
    every = [*PICTURES, *DISTRIBUTIONS, *SIMILARITY]
    assert {name.split(",")[0].split()[0] for name in every} == set(plot.PLOTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_nothing_overlaps_or_leaves_the_picture(name: str, store: Any) -> None:
    drawn = figure()
    axes = plot.draw(PICTURES[name](store), drawn)
    assert all(isinstance(ax, Axes) for ax in axes.flat)
    assert_laid_out(drawn)


def test_long_names_of_groups(store: Any) -> None:
    drawn = figure()
    plot.draw(renamed(ask(store, stages="hidden", layers=3, by="condition")), drawn)
    assert_laid_out(drawn)


def renamed(tree: xr.DataTree) -> xr.DataTree:
    """With names of groups that are long, or mean something to matplotlib."""
    names = ["$internal$ punctuation", "_terminal"]
    nodes = {
        f"/{i}": node.to_dataset().assign_coords(condition=name)
        for i, (node, name) in enumerate(zip(tree.children.values(), names, strict=True))
    }
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=tree.attrs), **nodes})


def test_save(store: Any, tmp_path: Path) -> None:
    for name in ("mutual_information of one by group", "label_information", "layer_covariance"):
        result = actstore.compute(PICTURES[name](store))
        first = plot.save(result, tmp_path / "a.svg").read_bytes()
        assert plot.save(result, tmp_path / "b.svg").read_bytes() == first


def test_messages_say_what_to_do(store: Any, ax: Axes) -> None:
    whole = ask(store, stages="hidden", layers="1,2")
    with pytest.raises(UsageError, match=r"result.sel\(layer=1\)"):
        plot.information_matrix(whole, ax=ax)
    with pytest.raises(UsageError, match=r"result.sel\(layer=1\)"):
        plot.information_scatter(whole, ax)
    with pytest.raises(UsageError, match="without reduce"):
        reduced = xr.Dataset({"covariance": ("layer", [1.0])}, attrs={"query": "x"})
        plot.information_matrix(reduced, "covariance", ax)
    two = ask(store, layers="1,2", reduce="histogram")
    with pytest.raises(UsageError, match="one of stage, layer"):
        plot.information_density(two, ax=ax)
    large = xr.DataArray(np.zeros((6000, 2), "f4"), dims=("token", "neuron"))
    matrix = np.zeros((1, 6000, 6000), np.int8)
    many = actstore.pairwise_covariance(large)
    many = many.assign(covariance=(many["covariance"].dims, matrix))
    with pytest.raises(UsageError, match=r"too few dots for a matrix of 6,000 tokens"):
        plot.information_matrix(many, "covariance", ax)
    with pytest.raises(UsageError, match="needs covariance, as actstore"):
        plot.layer_covariances(ask(store, layers=1, reduce="mean"), Figure())
    with pytest.raises(UsageError, match=r"result.sel\(stage='hidden'"):
        plot.label_bars(actstore.label_information(store, layers=1), ax)
    assert json.loads(whole.attrs["parameters"])["bins"] == 15
