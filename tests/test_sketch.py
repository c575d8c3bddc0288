"""Sketches made while writing equal plain numpy over the same values, however they came about."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore import journal
from actstore.plan import Plan, StageSpec
from actstore.resketch import add_sketches
from actstore.schema import KEYS, MOMENTS, RANKS
from actstore.sketch import empty_lists, empty_moments, no_limits
from actstore.sketched import union_of_strata
from actstore.stats.moments import moments_of, moments_of_all
from actstore.stats.sketching import compact_lists, sketch_chunk
from actstore.writer import Writer

LAYERS = (0, 3)
WIDTH = 48


def nasty(rng, tokens):
    """Activations with outlier, constant, all-zero and ReLU-like neurons, and ties."""
    x = rng.normal(size=(len(LAYERS), tokens, WIDTH)).astype(np.float32)
    x[..., 0] = 3000 + 10 * x[..., 0]
    x[..., 1] = 7.25
    x[..., 2] = 0
    x[..., 3] = np.maximum(x[..., 3], 0)
    x[..., 4] = np.round(x[..., 4])
    x[..., 5] = -0.0
    return x


def corpus(lengths, **options):
    records = [
        {"input_ids": list(range(1, n + 1)), "kind": "ab"[i % 2]} for i, n in enumerate(lengths)
    ]
    return actstore.build_corpus(records, **options)


def write(path, values, made, dtype=None, order=None, buffer="1GiB", sketch_by=None, piece=97):
    plan = Plan.build(
        made,
        [StageSpec("mlp_post", LAYERS, WIDTH)],
        dtype=dtype,
        buffer=buffer,
        sketch_by=sketch_by,
    )
    plan = replace(plan, buffer=plan.buffer + 2**20)  # room for blocks that are open all at once
    with Writer(path, plan) as writer:
        starts = np.arange(0, plan.n_tokens, piece)
        for start in starts if order is None else order(starts):
            for i, layer in enumerate(LAYERS):
                writer.put("mlp_post", layer, int(start), values[i, start : start + piece])
    assert writer.sealed
    return actstore.open(path)


def stored(path, name):
    if name in MOMENTS:
        return stored(path, "moments")[list(MOMENTS).index(name)]
    return zarr.open_array(path, path=f"sketch/mlp_post/{name}", mode="r")[:]


def reference_moments(x):
    """(9, neuron) in float64."""
    y = x.astype(np.float64)
    d = y - y.mean(0)
    powers = [(d**p).sum(0) for p in (2, 3, 4)]
    ends = [y.min(0), y.max(0), (y == 0).sum(0), (y > 0).sum(0)]
    return np.stack([np.full(x.shape[1], len(x), float), y.mean(0), *powers, *ends])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_sketches_equal_numpy(tmp_path, dtype):
    made = corpus([70, 1, 130, 300, 11] * 4)
    values = nasty(np.random.default_rng(0), int(made.keep.sum()))
    store = write(tmp_path / "a.zarr", values, made, dtype=dtype, buffer="200KiB")
    assert store.attrs["capture"]["block_tokens"] < 1024  # several blocks
    x = store["mlp_post"].values
    position = store.column("position")
    names = list(stored(store.path, "stratum"))
    assert names == ["first", "special", "rest"]
    chosen = {"first": position == 0, "special": position < 0, "rest": position > 0}
    for s, name in enumerate(names):
        for i in range(len(LAYERS)):
            part = x[i, chosen[name]]
            if not len(part):
                assert (stored(store.path, "count")[s, i] == 0).all()
                assert (stored(store.path, "largest_token")[s, i] == -1).all()
                continue
            got = np.stack([stored(store.path, n)[s, i] for n in MOMENTS])
            want = reference_moments(part)
            scale = np.maximum(np.abs(want), np.abs(want[2]) ** (np.r_[0, 0, 2, 3, 4] / 2).max())
            np.testing.assert_allclose(got[[0, 5, 6, 7, 8]], want[[0, 5, 6, 7, 8]])
            np.testing.assert_allclose(got[1:3], want[1:3], rtol=1e-6, atol=1e-6)
            spread = np.sqrt(want[2] / len(part))
            for k, row in ((3, 3), (4, 4)):
                error = np.abs(got[row] - want[row]) / np.maximum(len(part) * spread**k, 1e-12)
                assert error.max() < 1e-5, scale.shape
            check_counts(stored(store.path, "counts")[s, i], part, dtype)
            check_extremes(store.path, s, i, part, np.flatnonzero(chosen[name]))
    norms = np.linalg.norm(x.astype(np.float64), axis=2)
    np.testing.assert_allclose(stored(store.path, "norm"), norms, rtol=1e-6)


def check_counts(got, part, dtype):
    bits = part.view(np.uint16) if dtype == "float16" else part.view(np.uint32) >> 16
    np.testing.assert_array_equal(got, np.bincount(bits.ravel(), minlength=KEYS))


def check_extremes(path, s, i, part, tokens):
    """The largest and smallest of each neuron; ties go to the earlier token."""
    for side, sign in (("largest", -1), ("smallest", 1)):
        order = np.argsort(sign * part.astype(np.float64), axis=0, kind="stable")[:RANKS]
        value = stored(path, f"{side}_value")[s, i]
        token = stored(path, f"{side}_token")[s, i]
        n = len(order)
        np.testing.assert_array_equal(token[:, :n], tokens[order].T)
        np.testing.assert_array_equal(value[:, :n], np.take_along_axis(part, order, 0).T)
        assert (token[:, n:] == -1).all()
        assert np.isnan(value[:, n:]).all()


def tree(path):
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()
    }


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 60) | st.integers(600, 1500),
    kind=st.sampled_from(["normal", "ties", "relu", "odd", "rising", "apart"]),
    share=st.sampled_from([0.02, 0.5, 1.0]),
    limited=st.booleans(),
)
def test_a_chunk_lists_what_sorting_lists(seed, n, kind, share, limited):
    """Ties go to the earlier row, NaN is never listed; what earlier blocks beat may be missing."""
    rng = np.random.default_rng(seed)
    columns = int(rng.integers(1, 21))
    x = rng.standard_normal((n, columns)).astype(np.float32)
    if kind == "ties":
        x = np.round(2 * x) / 2
    elif kind == "apart":
        x[::23] *= 10
    elif kind == "relu":
        x = np.maximum(x, 0)
    elif kind == "rising":
        x += np.linspace(-50, 50, n, dtype=np.float32)[:, np.newaxis]
    elif kind == "odd":
        x[rng.random(x.shape) < 0.2] = np.nan
        x[rng.random(x.shape) < 0.05] = np.inf
        x[rng.random(x.shape) < 0.05] = -np.inf
    rows = np.flatnonzero(rng.random(n) < share)
    limits = no_limits(1, columns)[0]
    if limited:
        limits[:] = [[0.5], [-0.5]]
    extremes, moments = empty_lists(1, columns)[0], empty_moments(1, columns)[0]
    half = n // 2
    for top, part in ((0, slice(0, half)), (half, slice(half, n))):
        own = rows[(rows >= part.start) & (rows < part.stop)] - top
        piece, norms = x[part], np.zeros(part.stop - part.start)
        counts = np.zeros(KEYS, np.uint64)
        keys = piece.view(np.uint16)[:, 1::2]
        sketch_chunk(piece, keys, own, top, 0, moments, counts, norms, limits, extremes)
    np.testing.assert_array_equal(moments[0], len(rows))
    if len(rows):  # the ends leave out NaN, in a scan, too
        low, high = np.fmin.reduce(x[rows]), np.fmax.reduce(x[rows])
        scanned = moments_of(x[rows])
        for found in (moments[5:7], [scanned["min"], scanned["max"]]):
            np.testing.assert_array_equal(found, [low, high])
    for side, sign in enumerate((1, -1)):
        for j in range(columns):
            ranked = sorted((-sign * v, i) for i, v in zip(rows, x[rows, j], strict=True) if v == v)
            due = [(-sign * v, i) for v, i in ranked if v < np.inf][:RANKS]
            due = [(v, i) for v, i in due if sign * v >= sign * limits[side, j]]
            one = extremes[np.newaxis, :, j : j + 1].copy()
            one[:, 1 - side] = 0
            lengths, values, at = compact_lists(one, np.array([0]))
            assert lengths[0, side].tolist() == [len(due)]
            assert list(zip(values.tolist(), at.tolist(), strict=True)) == due


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), piece=st.sampled_from([13, 64, 200]))
def test_any_order_of_writing_gives_the_same_sketches(tmp_path_factory, seed, piece):
    made = corpus([90, 40, 170])
    values = nasty(np.random.default_rng(1), 300)
    folder = tmp_path_factory.mktemp("order")
    write(folder / "a.zarr", values, made, buffer="40KiB")
    shuffle = np.random.default_rng(seed).permutation
    store = write(folder / "b.zarr", values, made, order=shuffle, buffer="40KiB", piece=piece)
    assert store.id == actstore.open(folder / "a.zarr").id
    a, b = tree(folder / "a.zarr"), tree(folder / "b.zarr")
    a.pop("journal/plan.json"), b.pop("journal/plan.json")
    assert a == b
    shutil.rmtree(folder)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    block=st.sampled_from([16, 32, 64, 256, 1024]),
    piece=st.integers(1, 200),
)
def test_any_split_in_any_order_gives_what_a_scan_gives(
    tmp_path_factory, seed, lengths, block, piece
):
    """Blocks of any size, written in pieces of any size in any order: to 1e-6 of float64."""
    rng = np.random.default_rng(seed)
    made, tokens = corpus(lengths), sum(lengths)
    values = nasty(rng, tokens)
    folder = tmp_path_factory.mktemp("split")
    buffer = 2 * block * 4 * WIDTH * len(LAYERS)
    store = write(
        folder / "a.zarr", values, made, order=rng.permutation, buffer=buffer, piece=piece
    )
    assert store.attrs["capture"]["block_tokens"] <= block
    sketched, strata = store.sketched("mlp_post"), store.strata[1]
    assert set(strata.tolist()) <= {0, 2}
    for chosen in ([0], [2], [0, 2], [0, 1, 2]):
        kept = np.flatnonzero(np.isin(strata, chosen))
        for i in range(len(LAYERS)):
            if len(kept):
                check_moments(sketched.moments(chosen, i), values[i, kept])
                check_counts(sketched.counts(chosen, i), values[i, kept], "float32")
                check_union(sketched, chosen, i, values[i, kept], kept)
    norms = np.linalg.norm(values.astype(np.float64), axis=2)
    for i in range(len(LAYERS)):
        np.testing.assert_allclose(sketched.norms(i), norms[i], rtol=1e-6)
    shutil.rmtree(folder)


def check_moments(state, part):
    """Counts and extremes as they are, the others to 1e-6 of what they are sums of."""
    count, mean, *powers, low, high, zeros, positives = reference_moments(part)
    for name, want in (
        *(("count", count), ("min", low), ("max", high)),
        *(("zeros", zeros), ("positives", positives)),
    ):
        np.testing.assert_array_equal(state[name], want, err_msg=name)
    away = np.abs(part.astype(np.float64) - mean)
    scale = np.maximum(np.abs(mean), away.mean(0))
    assert (np.abs(state["mean"] - mean) <= 1e-6 * scale).all()
    for power, want in zip((2, 3, 4), powers, strict=True):
        # An odd power's terms cancel. A constant's mean may be off by a rounding.
        terms = (away**power).sum(0) + len(part) * (1e-7 * np.abs(mean)) ** power
        # Tiles are summed in float32: fourth powers were off by up to 9e-7 in 1,350 examples.
        limit = 2e-6 if power == 4 else 1e-6
        assert (np.abs(state[f"m{power}"] - want) <= limit * terms).all(), power


def check_union(sketched, strata, i, part, tokens):
    """The largest and smallest over several strata."""
    for largest in (True, False):
        value, token = sketched.extremes(strata, i, largest)
        sign = -1 if largest else 1
        order = np.argsort(sign * part.astype(np.float64), axis=0, kind="stable")[:RANKS]
        np.testing.assert_array_equal(token[:, : len(order)], tokens[order].T)
        np.testing.assert_array_equal(value[:, : len(order)], np.take_along_axis(part, order, 0).T)
        assert (token[:, len(order) :] == -1).all()


def test_zones_add_up_to_the_totals(tmp_path):
    made = corpus([200] * 200)
    values = nasty(np.random.default_rng(2), 40_000)
    store = write(tmp_path / "a.zarr", values, made, buffer="8MiB", piece=4096)
    zones = stored(store.path, "zones")
    assert len(zones) == 3  # granules of 16,384 tokens
    np.testing.assert_array_equal(zones[:, 0].sum(0), stored(store.path, "count"))
    largest = zones[:, 6, [0, 2]].max(0)
    np.testing.assert_array_equal(largest, stored(store.path, "max")[[0, 2]])


def test_sketch_by_a_label(tmp_path):
    made = corpus([60, 80, 70])
    values = nasty(np.random.default_rng(3), 210)
    store = write(tmp_path / "a.zarr", values, made, sketch_by="kind")
    names = list(stored(store.path, "stratum"))
    assert names == [f"{n}:{v}" for v in "ab" for n in ("first", "special", "rest")]
    assert stored(store.path, "count")[:, 0, 0].tolist() == [2, 0, 128, 1, 0, 79]
    kind = store.column("kind").decode()
    rest = (kind == "b") & (store.column("position") > 0)
    want = store["mlp_post"].values[1, rest].mean(0)
    np.testing.assert_allclose(stored(store.path, "mean")[5, 1], want, rtol=1e-5, atol=1e-6)


def test_unknown_label_to_sketch_by(tmp_path):
    made = corpus([10])
    with pytest.raises(actstore.errors.UnknownNameError, match=r"did you mean 'kind'"):
        write(tmp_path / "a.zarr", np.zeros((2, 10, WIDTH), "f4"), made, sketch_by="kin")
    assert not (tmp_path / "a.zarr").exists()


def test_lost_part_is_made_again(tmp_path, monkeypatch):
    """A part that is missing or damaged at seal is scanned from its shards, to the same bytes."""
    made = corpus([90, 40, 170])
    values = nasty(np.random.default_rng(4), 300)
    write(tmp_path / "a.zarr", values, made, buffer="40KiB")
    put_parts = Writer._put_parts

    def lossy(self, place, done):
        written = put_parts(self, place, done)
        if place[1] == 1:
            self.storage.delete(journal.part_key(*place, 0))
        if place[1] == 2:
            path = self.storage.path(journal.part_key(*place, 0))
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        return written

    monkeypatch.setattr(Writer, "_put_parts", lossy)
    write(tmp_path / "b.zarr", values, made, buffer="40KiB")
    a, b = tree(tmp_path / "a.zarr"), tree(tmp_path / "b.zarr")
    sketches = {k for k in a if k.startswith("sketch/")}
    assert sketches
    assert all(a[k] == b[k] for k in sketches)


def test_damaged_sketch_is_found_and_repaired(tmp_path):
    made = corpus([90, 40, 170])
    values = nasty(np.random.default_rng(5), 300)
    path = tmp_path / "a.zarr"
    write(path, values, made)
    before = tree(path)
    victim = path / "sketch/mlp_post/counts/c/0/0/0"
    victim.write_bytes(victim.read_bytes()[::-1])
    assert [p.key for _, p in actstore.verify(path) if p] == ["sketch/mlp_post/counts/c/0/0/0"]
    write(path, values, made)
    assert tree(path) == before


def test_without_sketches(tmp_path):
    made = corpus([20])
    plan = Plan.build(made, [StageSpec("mlp_post", LAYERS, WIDTH)], sketch=False)
    with Writer(tmp_path / "a.zarr", plan) as writer:
        for layer in LAYERS:
            writer.put("mlp_post", layer, 0, np.ones((20, WIDTH), np.float32))
    assert not (tmp_path / "a.zarr/sketch").exists()
    assert "sketch" not in actstore.open(tmp_path / "a.zarr").attrs


def test_parts_that_are_all_nan_hide_nothing(tmp_path):
    """Neither a block of a neuron, in sketches and scans, nor a neuron of a layer."""
    made = corpus([320])
    values = nasty(np.random.default_rng(8), 320)
    values[:, 64:192, 7] = values[:, 100:110, 8] = values[:, :, 9] = np.nan
    values[:, 3, 7], values[:, 5, 7] = -90, 90
    stage = StageSpec("mlp_post", LAYERS, WIDTH)
    for sketch in (True, False):
        plan = Plan.build(made, [stage], buffer="40KiB", sketch=sketch)
        assert plan.n_blocks > 3
        path = tmp_path / f"{sketch}.zarr"
        with Writer(path, plan, allow_nonfinite=True) as writer:
            for i, layer in enumerate(LAYERS):
                writer.put("mlp_post", layer, 0, values[i])
        for per, axes in (("neuron", 1), ("layer", (1, 2))):
            found = actstore.moments(actstore.open(path), per=per).compute()
            np.testing.assert_array_equal(found["min"], np.fmin.reduce(values, axis=axes))
            np.testing.assert_array_equal(found["max"], np.fmax.reduce(values, axis=axes))


def test_a_column_of_nan_hides_none_of_the_others():
    x = np.full((4, 768), 5, np.float32)
    x[:, 0], x[:, 1], x[:, 2] = -3, np.nan, 9
    found = moments_of_all(x)
    assert (found["min"], found["max"]) == (-3, 9)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("what", ["nasty", "zeros", "nonfinite", "all NaN"])
def test_the_journal_does_not_depend_on_sketches(tmp_path, dtype, what):
    """Extremes and counts of a shard come from its sketch where there is one."""
    made = corpus([90, 40, 170])
    values = nasty(np.random.default_rng(7), 300)
    if what == "zeros":  # of both signs
        values = np.where(values > 0, np.float32(0), np.float32(-0.0))
    elif what == "nonfinite":
        values[0, 17, 4:7] = np.nan, np.inf, -np.inf
    elif what == "all NaN":
        values[1] = np.nan
    found = []
    for sketch in (False, True):
        stage = StageSpec(
            "mlp_post", LAYERS, WIDTH, "bfloat16" if dtype == "bfloat16" else "float32"
        )
        plan = Plan.build(made, [stage], dtype=dtype, sketch=sketch)
        path = tmp_path / f"{sketch}.zarr"
        with Writer(path, plan, allow_nonfinite=True) as writer:
            for i, layer in enumerate(LAYERS):
                writer.put("mlp_post", layer, 0, values[i])
        found.append({k: v for k, v in tree(path).items() if k.startswith("journal/p")})
        found[-1].pop("journal/plan.json")
    assert found[0] == found[1] and found[0]
    assert actstore.open(tmp_path / "True.zarr").id == actstore.open(tmp_path / "False.zarr").id


def test_sketches_made_afterwards_are_the_same(tmp_path):
    """The same bytes, whether made while writing or from the sealed store; the id stays."""
    made = corpus([90, 40, 170])
    values = nasty(np.random.default_rng(6), 300)
    write(tmp_path / "a.zarr", values, made, buffer="40KiB")
    bare = Plan.build(made, [StageSpec("mlp_post", LAYERS, WIDTH)], buffer="40KiB", sketch=False)
    with Writer(tmp_path / "b.zarr", bare) as writer:
        for i, layer in enumerate(LAYERS):
            writer.put("mlp_post", layer, 0, values[i])
    before = actstore.open(tmp_path / "b.zarr")
    assert before.sketched("mlp_post") is None
    seen = []
    after = add_sketches(tmp_path / "b.zarr", progress=lambda n, of: seen.append((n, of)))
    assert after.id == before.id
    assert seen[-1][0] == seen[-1][1] > 0
    a, b = tree(tmp_path / "a.zarr"), tree(tmp_path / "b.zarr")
    sketches = {k for k in a if k.startswith("sketch/")}
    assert sketches == {k for k in b if k.startswith("sketch/")}
    assert all(a[k] == b[k] for k in sketches)
    assert not [p for _, p in actstore.verify(tmp_path / "b.zarr") if p]
    with Writer(tmp_path / "b.zarr", bare) as writer:  # the dump again, which made none
        assert writer.sealed
    assert tree(tmp_path / "b.zarr") == b


def test_sketches_by_another_label_replace_those_there(tmp_path):
    made = corpus([60, 80, 70])
    values = nasty(np.random.default_rng(3), 210)
    store = write(tmp_path / "a.zarr", values, made)
    assert len(store.strata[0]) == 3
    store = add_sketches(tmp_path / "a.zarr", by="kind")
    assert len(store.strata[0]) == 6
    assert stored(store.path, "count")[:, 0, 0].tolist() == [2, 0, 128, 1, 0, 79]
    with pytest.raises(actstore.errors.UnknownNameError, match="did you mean 'kind'"):
        add_sketches(tmp_path / "a.zarr", by="kindd")
    with pytest.raises(actstore.errors.UsageError, match="text label"):
        add_sketches(tmp_path / "a.zarr", by="position")


def test_second_moments(tmp_path):
    made = corpus([90, 40, 170])
    values = nasty(np.random.default_rng(7), 300)
    write(tmp_path / "a.zarr", values, made, buffer="40KiB")
    store = add_sketches(tmp_path / "a.zarr", covariance=True)
    position = store.column("position")
    got = stored(store.path, "scatter")
    for s, chosen in ((0, position == 0), (2, position > 0)):
        x = values[1, chosen].astype(np.float64)
        want = (x - x.mean(0)).T @ (x - x.mean(0))
        scale = np.sqrt(np.outer(np.diag(want), np.diag(want)))
        assert (np.abs(got[s, 1] - want) <= 1e-6 * scale + 1e-9).all()
    assert not [p for _, p in actstore.verify(tmp_path / "a.zarr") if p]


def test_reading_unions_of_strata(tmp_path):
    made = corpus([70, 1, 130, 300, 11] * 4)
    values = nasty(np.random.default_rng(8), 2048)
    store = write(tmp_path / "a.zarr", values, made, buffer="200KiB")
    names, codes = store.strata
    assert union_of_strata(codes, len(names), None) == [0, 1, 2]
    assert union_of_strata(codes, len(names), store.column("position") > 0) == [2]
    assert union_of_strata(codes, len(names), store.column("position") > 1) is None
    sketched = store.sketched("mlp_post")
    everything = values[1].astype(np.float64)
    state = sketched.moments([0, 1, 2], 1)
    np.testing.assert_allclose(state["mean"], everything.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(
        state["m2"], ((everything - everything.mean(0)) ** 2).sum(0), rtol=1e-5, atol=1e-9
    )
    assert sketched.counts([0, 2], 0).sum() == values[0].size
    value, token = sketched.extremes([0, 1, 2], 1, largest=False)
    order = np.argsort(everything, axis=0, kind="stable")[:RANKS]
    np.testing.assert_array_equal(token, order.T)
    np.testing.assert_array_equal(value, np.take_along_axis(values[1], order, 0).T)
