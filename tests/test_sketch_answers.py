"""Answers from sketches equal those of a scan over the same values, and read no shard."""

import numpy as np
import pytest
import xarray as xr

import actstore
from actstore.plan import Plan, StageSpec
from actstore.queries.selection import select
from actstore.storage import counters
from actstore.writer import Writer

LAYERS, WIDTH, LENGTHS = (0, 1, 2), 32, [40, 75, 9, 200, 131, 60]


def store_of(path, dtype, sketch, sketch_by=None):
    rng = np.random.default_rng(3)
    records = [
        {"input_ids": rng.integers(1, 50, n).tolist(), "kind": "ab"[i % 2]}
        for i, n in enumerate(LENGTHS)
    ]
    made = actstore.build_corpus(records)
    values = rng.normal(size=(len(LAYERS), sum(LENGTHS), WIDTH)).astype(np.float32)
    values[..., 0] = 300 + 10 * values[..., 0]
    values[..., 1] = 0
    values[..., 2] = np.maximum(values[..., 2], 0)
    plan = Plan.build(
        made,
        [StageSpec("mlp_post", LAYERS, WIDTH)],
        dtype=dtype,
        buffer="150KiB",
        sketch=sketch,
        sketch_by=sketch_by,
    )
    with Writer(path, plan) as writer:
        for i, layer in enumerate(LAYERS):
            writer.put("mlp_post", layer, 0, values[i])
    return actstore.open(path)


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def pair(request, tmp_path_factory):
    """The same values in a store with sketches and one without."""
    folder = tmp_path_factory.mktemp(request.param)
    return (
        store_of(folder / "with.zarr", request.param, True),
        store_of(folder / "without.zarr", request.param, False),
    )


REST = "position > 0"
AT_ONCE = {
    "moments": [{}, {"per": "layer"}, {"tokens": REST}, {"neurons": "3-9", "layers": "-1"}],
    "mean_activation": [{}, {"tokens": "position == 0"}],
    "top_tokens": [{"k": 20}, {"k": 5, "largest": False, "tokens": REST}, {"neurons": [2, 1]}],
}
# Exact from sketches only where a value has 16 bits.
SIXTEEN_BITS = {
    "quantiles": [{"q": [0, 0.1, 0.5, 1]}, {"tokens": REST}],
    "histogram": [
        {"bins": 30, "range": (-2, 2)},
        {"bins": [-3.0, -0.5, 0.0, 2.0], "density": True},
        {"bins": 40},
        {"bins": "fd", "tokens": REST},
    ],
}
HALF_WAY = {
    "normality": [{}],
    "zeroness": [{"neurons": "0-7"}],
    "peaks": [{"height": 0.02}],
    "histogram": [{"bins": 20, "per": "neuron"}, {"bins": 20, "transform": "scale"}],
}


def cases(table):
    return [(name, asked) for name, many in table.items() for asked in many]


def answer(store, name, asked):
    result = getattr(actstore, name)(store, **asked)
    counters.reset()
    return result, result.compute()


def same(a, b):
    assert set(a.variables) == set(b.variables)
    for name in a.variables:
        if a[name].dtype.kind in "fc":
            # A mean that is all but zero is rounding beside the values that were summed, and an
            # excess kurtosis beside the 3 that was taken off.
            atol = 2e-5 if name == "kurtosis" else 1e-6
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=atol, err_msg=name)
        else:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize(("name", "asked"), cases(AT_ONCE))
def test_sketches_answer_at_once(pair, name, asked):
    lazy, known = answer(pair[0], name, asked)
    assert counters.reads == 0
    assert lazy.attrs["source"] == "sketch"
    lazy, scanned = answer(pair[1], name, asked)
    assert counters.reads > 0
    assert lazy.attrs["source"] == "scan"
    same(known, scanned)


@pytest.mark.parametrize(("name", "asked"), cases(SIXTEEN_BITS))
def test_tables_answer_for_sixteen_bits(pair, name, asked):
    exact = pair[0].attrs["capture"]["stages"]["mlp_post"]["dtype"] != "float32"
    lazy, known = answer(pair[0], name, asked)
    assert (counters.reads == 0) == exact
    assert lazy.attrs["source"] == ("sketch" if exact else "scan")
    same(known, answer(pair[1], name, asked)[1])


@pytest.mark.parametrize(("name", "asked"), cases(HALF_WAY))
def test_sketches_spare_a_first_reading(pair, name, asked):
    lazy, known = answer(pair[0], name, asked)
    spared = counters.bytes
    assert lazy.attrs["source"] == "scan"
    same(known, answer(pair[1], name, asked)[1])
    assert spared < counters.bytes


def test_a_selection_that_cuts_a_stratum_scans(pair):
    for tokens in ("position > 1", "token_id == 7", np.arange(sum(LENGTHS)) % 2 == 0):
        lazy, found = answer(pair[0], "moments", {"tokens": tokens})
        assert lazy.attrs["source"] == "scan"
        same(found, answer(pair[1], "moments", {"tokens": tokens})[1])


def test_groups_of_the_label_that_was_sketched_by(tmp_path):
    with_label = store_of(tmp_path / "a.zarr", "float32", True, "kind")
    without = store_of(tmp_path / "b.zarr", "float32", False)
    for asked in ({"by": "kind"}, {"tokens": "kind == 'b'"}, {"by": "kind", "tokens": REST}):
        lazy, known = answer(with_label, "mean_activation", asked)
        assert lazy.attrs["source"] == "sketch"
        same(known, answer(without, "mean_activation", asked)[1])
    assert actstore.moments(with_label, by="document").attrs["source"] == "scan"


def with_sinks(path, dtype, sketch, seed=0, allow_nonfinite=False, bad=None):
    """Three layers of tokens, some of which are far out at the middle one."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(3, 300, WIDTH)) * rng.lognormal(0, 1.2, (3, 300, 1))
    values[1, rng.integers(0, 300, 5)] *= 40
    if bad is not None:
        values[1, 7, 3] = bad
    made = actstore.build_corpus([list(range(300))])
    stages = [StageSpec("mlp_post", LAYERS, WIDTH), StageSpec("mlp_out", LAYERS, WIDTH)]
    plan = Plan.build(made, stages, dtype=dtype, buffer="150KiB", sketch=sketch)
    with Writer(path, plan, allow_nonfinite=allow_nonfinite) as writer:
        for i, layer in enumerate(LAYERS):
            writer.put("mlp_post", layer, 0, values[i].astype(np.float32))
            writer.put("mlp_out", layer, 0, values[i].astype(np.float32))
    return actstore.open(path)


def masks_without_sinks(store):
    """The mask, and how many shards were read for it."""
    counters.reset()
    mask = select(store, None, None, None, None, None, exclude_sinks="mlp_post").mask
    return mask, counters.reads


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_sinks_are_known_from_sketches(tmp_path, dtype):
    for seed in range(4):
        known = with_sinks(tmp_path / f"{seed}a.zarr", dtype, True, seed)
        bare = with_sinks(tmp_path / f"{seed}b.zarr", dtype, False, seed)
        norms = np.linalg.norm(known["mlp_post"].values[1].astype(np.float64), axis=1)
        mask, reads = masks_without_sinks(known)
        assert reads == 0
        scanned, reads = masks_without_sinks(bare)
        assert reads > 0
        np.testing.assert_array_equal(mask, norms <= 10 * np.median(norms))
        np.testing.assert_array_equal(mask, scanned)
        assert 3 < (~mask).sum() < 60
        asked = [select(s, "mlp_post", None, None, None, None) for s in (known, bare)]
        kept, read = (selection.sources[0].norms(1) for selection in asked)
        assert kept.dtype == read.dtype == np.float64
        np.testing.assert_allclose(kept, read, rtol=1e-6)
    results = [
        actstore.moments(s, stages="mlp_out", exclude_sinks="mlp_post") for s in (known, bare)
    ]
    assert results[0].attrs["excluded_by_sinks"] == results[1].attrs["excluded_by_sinks"] > 0
    same(*actstore.compute(*results))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e30])
def test_norms_that_sketches_cannot_hold_are_read(tmp_path, bad):
    """NaN and infinities, and numbers whose square float32 has not."""
    known = with_sinks(tmp_path / "a.zarr", None, True, allow_nonfinite=True, bad=bad)
    bare = with_sinks(tmp_path / "b.zarr", None, False, allow_nonfinite=True, bad=bad)
    mask, reads = masks_without_sinks(known)
    assert reads > 0
    np.testing.assert_array_equal(mask, masks_without_sinks(bare)[0])


def test_nonfinite_values_are_scanned(tmp_path):
    made = actstore.build_corpus([[1, 2, 3, 4]])
    values = np.ones((4, WIDTH), np.float32)
    values[2, 5] = np.nan
    plan = Plan.build(made, [StageSpec("mlp_post", (0,), WIDTH)])
    with Writer(tmp_path / "a.zarr", plan, allow_nonfinite=True) as writer:
        writer.put("mlp_post", 0, 0, values)
    store = actstore.open(tmp_path / "a.zarr")
    assert store.attrs["nonfinite"] == 1
    assert actstore.moments(store).attrs["source"] == "scan"
    assert actstore.histogram(store, bins=3).compute()["nonfinite"].item() == 1


def test_data_of_the_users_own_are_scanned(pair):
    result = actstore.moments(pair[0]["mlp_post"])
    assert isinstance(result, xr.Dataset)
    assert result.attrs["source"] == "scan"
    same(result.compute(), actstore.moments(pair[0]).compute())


def test_two_stores_at_one_path_are_not_mixed_up(tmp_path):
    """Sketches are cached by the store's identity, not by where it lies."""
    made = actstore.build_corpus([[1, 2, 3, 4]])
    for value in (1.0, 2.0):
        plan = Plan.build(made, [StageSpec("mlp_post", (0,), WIDTH)])
        with Writer(tmp_path / str(value), plan) as writer:
            writer.put("mlp_post", 0, 0, np.full((4, WIDTH), value, np.float32))
    assert actstore.moments(tmp_path / "1.0").compute()["mean"].values.max() == 1
    (tmp_path / "1.0").rename(tmp_path / "away")
    (tmp_path / "2.0").rename(tmp_path / "1.0")
    assert actstore.moments(tmp_path / "1.0").compute()["mean"].values.max() == 2


@pytest.mark.parametrize("tokens", [None, REST])
@pytest.mark.parametrize(
    "asked",
    [{"bins": 7}, {"bins": 3000}, {"bins": 60, "range": (-2, 2)}, {"bins": [-1e-3, 0, 0.3, 310.7]}],
)
def test_approximate_histograms_are_exact_at_their_own_edges(pair, asked, tokens):
    known, plain = pair
    built = actstore.histogram(known, tokens=tokens, approximate=True, **asked)
    before = counters.bytes
    found = actstore.compute(built)
    assert counters.bytes == before
    assert found.attrs["source"] == "sketch"
    exact = actstore.compute(actstore.histogram(plain, tokens=tokens, **asked))
    values = plain["mlp_post"].values[:, np.ones(len(plain.tokens["token"]), bool)]
    if tokens is not None:
        values = values[:, plain.tokens["position"].values > 0]
    for row in range(len(LAYERS)):
        edges = found["edges"].values[row]
        edges = edges[np.isfinite(edges)]
        counts = found["counts"].values[row]
        assert (np.diff(edges) > 0).all()
        right = np.histogram(values[row].astype(np.float64), edges)[0]
        assert np.array_equal(counts[: len(right)], right)
        assert not counts[len(right) :].any()
        assert found["below"][row] == (values[row] < edges[0]).sum()
        assert found["above"][row] == (values[row] > edges[-1]).sum()
        # Each edge is that which was asked, or moved by less than a run of the sketch is wide.
        wanted = exact["edges"].values[row]
        near = np.abs(wanted[:, None] - edges).min(axis=1)
        assert (near <= np.maximum(np.abs(wanted) * 2.0**-7, 1e-38)).all()


def test_approximate_histograms_without_sketches_are_exact(pair):
    asked = {"bins": 30, "range": (-2, 2)}
    _, plain = pair
    found = actstore.compute(actstore.histogram(plain, approximate=True, **asked))
    exact = actstore.compute(actstore.histogram(plain, **asked))
    assert found["counts"].equals(exact["counts"])
    assert found["edges"].equals(exact["edges"])
