"""Batches for training: what is in them, their order, where they go on, what they cost."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import bare_corpus, flip, plan_of, prose, random_values, stored, write_store
from hypothesis import given, settings
from hypothesis import strategies as st
from test_zip_http import web, zipped
from torch.utils.data import DataLoader

import actstore
from actstore.errors import CorruptStoreError, UnknownNameError, UsageError
from actstore.plan import StageSpec
from actstore.storage import counters

N, LENGTH, RUN = 16_384, 128, 256
pytestmark = pytest.mark.filterwarnings("ignore:a window of")

STAGES = (
    StageSpec("resid_post", (0, 1, 2), 16),
    StageSpec("mlp_post", (1, 2), 48, "float16"),
    StageSpec("mlp_out", (0,), 32, "bfloat16"),
)
KINDS = {stage.name: stage.source_dtype for stage in STAGES}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[actstore.Store, dict[str, np.ndarray]]:
    """128 sequences of 128 tokens, in 64 runs."""
    path = tmp_path_factory.mktemp("loader") / "run.zarr"
    plan = plan_of(bare_corpus([LENGTH] * (N // LENGTH)), STAGES, RUN, sketch=False)
    values = random_values(plan)
    write_store(path, plan, values)
    store = actstore.open(path)
    assert store.array("resid_post").layout.chunk_rows == RUN
    return store, {name: stored(v, KINDS[name]) for name, v in values.items()}


def order_of(loader: Any) -> np.ndarray:
    """Token numbers of an epoch, in the order in which they come."""
    return np.concatenate([tokens.numpy() for _, tokens in loader])


def buffer_of(window: int, batch: int, nbytes: int = 64) -> int:
    """The buffer in which windows of so many tokens of `nbytes` fit."""
    return 2 * window * nbytes + 6 * batch * nbytes


def loader_of(store: actstore.Store, window: int = 2048, batch: int = 256, **options: Any) -> Any:
    options = {"with_tokens": True, "buffer": buffer_of(window, batch), **options}
    return store.loader("resid_post", 1, batch, **options)


# -- what is in them -----------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_every_token_comes_once_with_its_values(made, data) -> None:
    store, values = made
    batch = data.draw(st.integers(100, 3000))
    window = data.draw(st.integers(batch, 20_000))
    rare = data.draw(st.sampled_from([None, 0.003, 0.4]))
    mask = None if rare is None else np.random.default_rng(1).random(N) < rare
    world = data.draw(st.integers(1, 3))
    options = {
        "shuffle": data.draw(st.booleans()),
        "drop_last": data.draw(st.booleans()),
        "tokens": mask,
        "seed": data.draw(st.integers(0, 5)),
        "world_size": world,
    }
    due = np.arange(N) if mask is None else np.flatnonzero(mask)
    whole = -(-len(due) // batch)
    if options["drop_last"]:
        whole = len(due) // batch // world * world
    seen = []
    for rank in range(world):
        mine = whole * (rank + 1) // world - whole * rank // world
        if not mine:
            with pytest.raises(UsageError, match="make no batch of"):
                loader_of(store, window, batch, rank=rank, **options)
            continue
        loader = loader_of(store, window, batch, rank=rank, **options)
        batches = list(loader)
        assert len(batches) == len(loader) == mine
        for x, tokens in batches:
            assert x.shape == (len(tokens), 16) and x.dtype == torch.float32
            np.testing.assert_array_equal(x, values["resid_post"][1, tokens.numpy()])
            seen.append(tokens.numpy())
    sizes = {len(tokens) for tokens in seen}
    assert sizes <= ({batch} if options["drop_last"] else {batch, len(due) % batch})
    seen = np.concatenate(seen) if seen else np.array([], int)
    assert len(np.unique(seen)) == len(seen) == min(len(due), whole * batch)
    assert np.isin(seen, due).all()
    if not options["shuffle"]:
        np.testing.assert_array_equal(seen, due[: len(seen)])


def test_several_stages_and_layers_are_aligned(made) -> None:
    store, values = made
    names = ["blocks.1.mlp.hook_post", "mlp_out", "blocks.0.hook_resid_post"]
    loader = store.loader(names, batch_size=300, with_tokens=True, buffer="2MB")
    for x, tokens in loader:
        assert list(x) == names
        np.testing.assert_array_equal(x[names[0]], values["mlp_post"][0, tokens])
        np.testing.assert_array_equal(x[names[1]], values["mlp_out"][0, tokens])
        np.testing.assert_array_equal(x[names[2]], values["resid_post"][0, tokens])
    for layers, rows in (([0, 2], [0, 2]), ("0-2", [0, 1, 2]), ([1], [1])):
        x, tokens = next(iter(store.loader("resid_post", layers, 64, with_tokens=True)))
        assert x.shape == (64, len(rows), 16)
        np.testing.assert_array_equal(x, values["resid_post"][rows][:, tokens].swapaxes(0, 1))
    for dtype in ("bfloat16", torch.float16, "torch.float64"):
        x, tokens = next(iter(store.loader("mlp_out", None, 64, dtype=dtype, with_tokens=True)))
        assert str(x.dtype).endswith(str(dtype).rpartition(".")[2])
        own = torch.from_numpy(values["mlp_out"][0, tokens])
        assert torch.equal(x, own.to(x.dtype))


def test_labels_by_token_numbers_and_expressions(made) -> None:
    store, _ = made
    loader = store.loader("mlp_out", 0, 500, tokens="position > 100", with_tokens=True)
    order = order_of(loader)
    assert len(order) == loader.n_tokens == N // LENGTH * (LENGTH - 101)
    assert (store.tokens["position"].values[order] > 100).all()


# -- the order -----------------------------------------------------------------------------


def test_order_follows_from_seed_and_epoch(made) -> None:
    store, _ = made
    loader = loader_of(store)
    epochs = [order_of(loader) for _ in range(3)]
    assert loader.epoch == 3
    assert not any(np.array_equal(epochs[0], other) for other in epochs[1:])
    again = loader_of(store)
    again.set_epoch(2)
    np.testing.assert_array_equal(order_of(again), epochs[2])
    assert not np.array_equal(order_of(loader_of(store, seed=1)), epochs[0])
    half = iter(loader)
    next(half)
    half.close()  # who breaks off begins another epoch
    assert loader.epoch == 4


def test_a_window_that_holds_everything_is_a_uniform_shuffle(made) -> None:
    """Over many epochs, where each token comes is uniform: chi square over a 16 x 16 table."""
    store, _ = made
    loader = loader_of(store, window=2 * N, batch=4096)
    assert loader.window_tokens == N
    table = np.zeros((16, 16))
    for _ in range(20):
        order = order_of(loader)
        np.add.at(table, (np.arange(N) * 16 // N, order * 16 // N), 1)
    expected = 20 * N / 256
    chi = ((table - expected) ** 2 / expected).sum()
    # 225 degrees of freedom: mean 225, standard deviation 21.
    assert 130 < chi < 330


def test_mixing_against_a_uniform_shuffle(made) -> None:
    """Windows of 8 runs out of 64: what is lost against a full shuffle, and what is not."""
    store, _ = made
    window, batch, epochs = 2048, 256, 30
    loader = loader_of(store, window, batch)
    assert loader.window_tokens == window
    orders = np.stack([order_of(loader) for _ in range(epochs)])
    rng = np.random.default_rng(0)
    uniform = np.stack([rng.permutation(N) for _ in range(epochs)])
    # Early and late tokens come early and late alike: runs are drawn without regard to place.
    place = np.arange(N)
    correlations = [np.corrcoef(place, order)[0, 1] for order in orders]
    assert abs(np.mean(correlations)) < 4 / np.sqrt(64 * epochs)
    assert np.std(correlations) < 2 / np.sqrt(64)  # as of 64 runs in random order
    # A batch has tokens of all runs of its window, as many as chance gives it.
    runs = orders.reshape(epochs, -1, batch) // RUN
    per_batch = np.array([[len(np.unique(r)) for r in epoch] for epoch in runs])
    assert per_batch.min() >= 8 and per_batch.max() <= 9
    # It has fewer sequences than with a uniform shuffle (16 of the 128 are in its window).
    ours = _sequences(orders, batch)
    assert 15.5 < ours < 18.5 < 100 < _sequences(uniform, batch) < 120
    # What comes next is as far off as chance has it within a window: no run shows.
    steps = np.abs(np.diff(orders.reshape(epochs, -1, window), axis=2))
    assert (steps == 1).mean() < 3 / window
    same = (np.diff(orders.reshape(epochs, -1, window) // RUN, axis=2) == 0).mean()
    assert abs(same - 1 / 8) < 0.01
    # Half a gibibyte of a 768-wide stage is 85 such runs: then a batch is as mixed as it can be.
    mean = _batch_means(orders, batch, made)
    assert mean < 1.6 * _batch_means(uniform, batch, made)


def _sequences(orders: np.ndarray, batch: int) -> float:
    """Mean number of sequences that a batch has tokens of."""
    batches = orders.reshape(-1, batch) // LENGTH
    return float(np.mean([len(np.unique(b)) for b in batches]))


def _batch_means(orders: np.ndarray, batch: int, made: Any) -> float:
    """Spread of the batches' mean activations."""
    own = made[1]["resid_post"][1]
    return float(own[orders].reshape(-1, batch, 16).mean(1).std(0).mean())


# -- going on ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_going_on_is_exact(made, data) -> None:
    store, _ = made
    batch = data.draw(st.integers(100, 2000))
    options = {
        "window": data.draw(st.integers(batch, 6000)),
        "batch": batch,
        "seed": data.draw(st.integers(0, 3)),
        "drop_last": data.draw(st.booleans()),
        "tokens": data.draw(st.sampled_from([None, "position < 40"])),
    }
    first = loader_of(store, **options)
    whole = [t.numpy() for loader in (first, first) for _, t in loader]
    taken = data.draw(st.integers(0, len(whole) - 1))
    loader, seen = loader_of(store, **options), []
    while len(seen) < taken:
        for _, tokens in loader:
            seen.append(tokens.numpy())
            if len(seen) == taken:
                break
    state = json.loads(json.dumps(loader.state_dict()))
    other = loader_of(store, **options)
    other.load_state_dict(state)
    assert other.state_dict() == state
    rest = [t.numpy() for loader in (other, other) for _, t in loader]
    for found, own in zip(seen + rest, whole, strict=False):
        np.testing.assert_array_equal(found, own)
    assert len(seen + rest) >= len(whole)


def test_a_position_of_another_order_is_refused(made) -> None:
    store, _ = made
    state = loader_of(store).state_dict()
    for name, other in {
        "seed": loader_of(store, seed=1),
        "window": loader_of(store, window=4096),
        "batch_size": store.loader("resid_post", 1, 128),
        "tokens": loader_of(store, tokens="position > 1"),
        "parts": store.loader("resid_post", 2, 256, buffer=buffer_of(2048, 256)),
    }.items():
        with pytest.raises(UsageError, match=f"another order: its {name} is"):
            other.load_state_dict(state)
    with pytest.raises(UsageError, match="is no position"):
        loader_of(store).load_state_dict({**state, "batch": 10**6})


# -- workers and ranks ---------------------------------------------------------------------


def test_forked_workers_share_the_tokens(made) -> None:
    store, values = made
    loader = loader_of(store, window=4096)
    seen = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        workers = DataLoader(loader, batch_size=None, num_workers=2)
        assert len(workers) == len(loader)
        batches = list(workers)
        assert len(batches) == len(loader)
        for x, tokens in batches:
            np.testing.assert_array_equal(x, values["resid_post"][1, tokens])
        seen.append(np.concatenate([t.numpy() for _, t in batches]))
        assert len(np.unique(seen[-1])) == len(seen[-1]) == N
    assert not np.array_equal(*seen)


@pytest.mark.slow
def test_spawned_workers_share_the_tokens(made, tmp_path: Path) -> None:
    """Also of a zip archive and over HTTP, where forked ones cannot read."""
    store, _ = made
    folder = Path(store.path)
    with web(folder.parent, True) as (url, _):
        for place in (zipped(folder, tmp_path / "run.zarr.zip"), f"{url}/run.zarr"):
            loader = actstore.open(place).loader("mlp_out", 0, 1000, with_tokens=True)
            assert pickle.loads(pickle.dumps(loader)).n_tokens == N
            workers = DataLoader(
                loader, batch_size=None, num_workers=2, multiprocessing_context="spawn"
            )
            order = np.concatenate([t.numpy() for _, t in workers])
            assert len(np.unique(order)) == len(order) == N


def test_a_forked_worker_refuses_a_url(made) -> None:
    folder = Path(made[0].path)
    with web(folder.parent, True) as (url, _):
        loader = actstore.open(f"{url}/run.zarr").loader("mlp_out", 0, 4096)
        assert next(iter(loader)).shape == (4096, 32)
        workers = DataLoader(loader, batch_size=None, num_workers=1)
        with pytest.raises(UsageError, match="multiprocessing_context='spawn'"):
            next(iter(workers))


@pytest.mark.slow
def test_ranks_of_torch_distributed(made, tmp_path: Path) -> None:
    code = f"""
import sys, numpy as np, torch, torch.distributed as dist, actstore
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=rank, world_size=2)
loader = actstore.open({made[0].path!r}).loader(
    "mlp_out", 0, 1000, with_tokens=True, drop_last=True)
order = np.concatenate([t.numpy() for _, t in loader])
np.save(f"{tmp_path}/{{rank}}.npy", order)
dist.barrier()
"""
    runs = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in range(2)]
    assert [run.wait(120) for run in runs] == [0, 0]
    orders = [np.load(tmp_path / f"{rank}.npy") for rank in range(2)]
    assert [len(order) for order in orders] == [8000, 8000]
    assert len(np.unique(np.concatenate(orders))) == 16_000


# -- the thread ----------------------------------------------------------------------------


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("actstore-loader")]


def until(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_it_reads_ahead_and_no_further(made) -> None:
    """While somebody trains on a batch, the next ones wait, and the next window is read."""
    store, _ = made
    loader = loader_of(store, window=2048, batch=256, with_tokens=False)
    window_nbytes = 2048 * 64
    counters.reset()
    batches = iter(loader)
    next(batches)
    until(lambda: counters.bytes >= 2 * window_nbytes)
    time.sleep(0.3)
    assert counters.bytes < 2.5 * window_nbytes  # not the third: its room is not free
    batches.close()
    assert not threads()


@pytest.mark.slow
def test_threads_end_with_the_iteration(made) -> None:
    store, _ = made
    assert not threads()
    for _ in loader_of(store):
        assert threads()
        break
    until(lambda: not threads())
    list(loader_of(store))
    assert not threads()
    started = iter(loader_of(store))  # nothing begins before it is asked for
    assert not threads()
    del started


def test_damage_is_raised_where_batches_are_taken(made, tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    plan = plan_of(bare_corpus([64] * 16), [StageSpec("mlp_out", (0,), 16)], 256, sketch=False)
    write_store(path, plan, random_values(plan))
    flip(path / "mlp_out/activation/c.0.2.0", 100)
    loader = actstore.open(path).loader("mlp_out", 0, 32, buffer=buffer_of(64, 32), shuffle=False)
    seen = 0
    with pytest.raises(CorruptStoreError, match=r"c\.0\.2\.0 is damaged"):
        for batch in loader:
            seen += len(batch)
    assert 0 < seen <= 512
    assert not threads()


@pytest.mark.slow
def test_memory_stays_within_the_buffer(tmp_path: Path) -> None:
    """Peak memory above that of the same process before: 0.3 GB of data through 48 MB."""
    path = tmp_path / "run.zarr"
    plan = plan_of(bare_corpus([1024] * 96), [StageSpec("mlp_out", (0,), 768)], 4096, sketch=False)
    write_store(path, plan, random_values(plan))
    code = f"""
import torch, actstore
loader = actstore.open({str(path)!r}).loader("mlp_out", 0, 512, buffer="48MB")
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(s for s in lines if s.startswith("VmHWM")).split()[1]) * 1024
import actstore.loader
small = actstore.open({str(path)!r}).loader("mlp_out", 0, 16, tokens="input < 64", buffer="1MB")
next(iter(small))
before, n = peak(), 0
for batch in loader:
    n += len(batch)
print(n, peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tokens, grown = map(int, out.stdout.split())
    assert tokens == 96 * 1024
    # Besides the buffer: each of four readers holds 4 MiB, and what the C library keeps.
    assert grown < 48e6 + 4 * 2**22 + 40e6


# -- what cannot be ------------------------------------------------------------------------


def test_errors_say_what_to_do(made) -> None:
    store, _ = made
    for kind, message, arguments in [
        (UnknownNameError, "did you mean 'mlp_out'", {"stage": "mlp_ot"}),
        (UnknownNameError, "unknown layer 7", {"stage": "resid_post", "layer": 7}),
        (UsageError, "say which layer of resid_post, as layer=2", {"stage": "resid_post"}),
        (UsageError, "names its layer", {"stage": "blocks.0.hook_mlp_out", "layer": 0}),
        (UsageError, "several different ones", {"stage": ["mlp_out", "mlp_out"]}),
        (UsageError, "several different ones", {"stage": []}),
        (UsageError, "1 token or more", {"stage": "mlp_out", "batch_size": 0}),
        (UsageError, "seeds are 0 or more", {"stage": "mlp_out", "seed": -1}),
        (
            UsageError,
            "buffer of 1,000 bytes is too small: .* need",
            {"stage": "mlp_out", "buffer": 1000},
        ),
        (UsageError, "no token satisfies", {"stage": "mlp_out", "tokens": "position > 999"}),
        (UsageError, "boolean mask of shape", {"stage": "mlp_out", "tokens": np.ones(3, bool)}),
        (UnknownNameError, "unknown dtype 'int8'", {"stage": "mlp_out", "dtype": torch.int8}),
        (UsageError, "not below the world size", {"stage": "mlp_out", "rank": 2, "world_size": 2}),
        (UsageError, "together, or neither", {"stage": "mlp_out", "rank": 0}),
        (
            UsageError,
            "make no batch",
            {"stage": "mlp_out", "batch_size": 20_000, "drop_last": True},
        ),
    ]:
        with pytest.raises(kind, match=message):
            store.loader(**arguments)
    with pytest.raises(UsageError, match="epochs are 0 or more"):
        store.loader("mlp_out").set_epoch(-1)


def test_several_stores_as_one(made, tmp_path: Path) -> None:
    store, values = made
    both = actstore.concat({"a": store, "b": store})
    loader = both.loader("resid_post", 1, 1000, with_tokens=True, buffer="1MB")
    order = []
    for x, tokens in loader:
        np.testing.assert_array_equal(x, values["resid_post"][1, tokens.numpy() % N])
        order.append(tokens.numpy())
    assert len(np.unique(np.concatenate(order))) == 2 * N


# -- training ------------------------------------------------------------------------------


class SparseAutoencoder(torch.nn.Module):
    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        self.encode = torch.nn.Linear(width, latents)
        self.decode = torch.nn.Linear(latents, width)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.encode(x))
        error = (self.decode(hidden) - x).square().sum(-1)
        return (error + 0.3 * hidden.sum(-1)).mean()


def _train(epochs: Iterator[Any], every: torch.Tensor) -> float:
    """Loss over all data of an autoencoder trained on batches; data scaled to unit variance."""
    torch.manual_seed(0)
    model = SparseAutoencoder(every.shape[1], 256)
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    scale = every.std()
    for batches in epochs:
        for batch in batches:
            optimiser.zero_grad()
            model.loss(batch / scale).backward()
            optimiser.step()
    with torch.no_grad():
        return float(model.loss(every / scale))


@pytest.mark.slow
def test_a_sparse_autoencoder_learns_as_from_data_shuffled_in_memory(tmp_path: Path) -> None:
    """On real activations, eight windows an epoch: within 5 % of the loss of a full shuffle.

    Without shuffling it is a fifth worse.
    """
    model, tokenizer = actstore.load_model("demo")
    path = tmp_path / "run.zarr"
    texts = [prose(50_000)]
    # Blocks of 256 tokens, so that a window has runs enough of so little data.
    options = {"stages": ["mlp_out"], "layers": "3", "buffer": 2 * 256 * 512}
    store = actstore.dump(model, tokenizer, texts, path, **options)
    every = torch.from_numpy(store["mlp_out"].sel(layer=3).values)
    n, width = every.shape
    batch, epochs, losses = 128, 4, {}
    window = -(-n // 8)
    loader = store.loader("mlp_out", 3, batch, buffer=buffer_of(window, batch, 4 * width))
    assert -(-n // loader.window_tokens) in (8, 9)
    assert store.array("mlp_out").layout.chunk_rows == 256
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of so small a model, more only wait for one another
    losses["loader"] = _train((loader for _ in range(epochs)), every)
    rng = np.random.default_rng(0)
    shuffles = (every[torch.from_numpy(rng.permutation(n))].split(batch) for _ in range(epochs))
    losses["memory"] = _train(shuffles, every)
    untrained = _train(iter(()), every)
    in_order = store.loader("mlp_out", 3, batch, shuffle=False)
    losses["in order"] = _train((in_order for _ in range(epochs)), every)
    torch.set_num_threads(threads)
    print(n, losses, untrained)
    assert losses["memory"] < 0.6 * untrained
    assert losses["loader"] < 1.05 * losses["memory"]
    assert losses["in order"] > 1.1 * losses["memory"]  # so order matters here


def test_a_window_of_few_runs_is_warned_of(made) -> None:
    store, _ = made
    with pytest.warns(UserWarning, match="holds 8 runs .* raise the buffer to 0.0006 GB"):
        loader_of(store)
