"""Questions on a cluster: what goes through the client, how large graphs grow, workers that die."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import distributed
import numpy as np
import psutil
import pytest
from helpers import bare_corpus, plan_of, unwritten_store, write_store

import actstore
from actstore.errors import CorruptStoreError
from actstore.plan import StageSpec
from actstore.storage import counters

LAYERS, TOKENS, WIDTH = 6, 20_000, 256
ODD = np.arange(TOKENS) % 3 != 1  # no union of strata, so that data are read


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> actstore.Store:
    """120 MB in 240 shards."""
    path = tmp_path_factory.mktemp("cluster") / "run.zarr"
    values = np.random.default_rng(0).normal(2, 3, (LAYERS, TOKENS, WIDTH)).astype(np.float32)
    stages = [StageSpec("mlp_post", tuple(range(LAYERS)), WIDTH)]
    plan = plan_of(bare_corpus([500] * (TOKENS // 500)), stages, 512, sketch=False)
    write_store(path, plan, {"mlp_post": values})
    return actstore.open(path)


@pytest.fixture
def client() -> Iterator[distributed.Client]:
    """Of two processes of one thread each."""
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster) as made,
    ):
        yield made


def heavy(store: actstore.Store) -> list[Any]:
    return [
        actstore.quantiles(store, tokens=ODD, per="neuron"),
        actstore.moments(store, tokens=ODD),
        actstore.dimensionality(store, tokens=ODD),
    ]


def test_a_worker_killed_in_the_middle(store: actstore.Store, client: distributed.Client) -> None:
    expected = actstore.compute(*heavy(store), scheduler="sync")
    pids = client.run(os.getpid)
    killed: list[int] = []

    def kill() -> None:
        while not any(client.processing().values()):
            time.sleep(0.01)
        time.sleep(0.3)
        busy = next(worker for worker, tasks in client.processing().items() if tasks)
        killed.append(pids[busy])
        os.kill(pids[busy], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    found = actstore.compute(*heavy(store))
    killer.join()
    assert killed
    for a, b in zip(found, expected, strict=True):
        for name in b.data_vars:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-7, err_msg=name)


def test_progress_is_told(store: actstore.Store, client: distributed.Client) -> None:
    told: list[tuple[int, int]] = []
    query = actstore.quantiles(store, tokens=ODD, per="neuron")
    found = actstore.compute(query, progress=lambda *at: told.append(at))
    done, totals = zip(*told, strict=True)
    assert list(done) == sorted(done) and len(set(totals)) == 1
    assert done[-1] == totals[0] >= LAYERS
    expected = actstore.compute(query, scheduler="sync")
    np.testing.assert_allclose(found["quantile"], expected["quantile"], rtol=1e-7)


def test_progress_does_not_hide_a_failure(
    store: actstore.Store, client: distributed.Client, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(store.path, tmp_path / "damaged.zarr"))
    shard = next(path.glob("mlp_post/activation/c.1.*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    query = actstore.moments(actstore.open(path), tokens=ODD)
    with pytest.raises(CorruptStoreError, match=shard.name):
        actstore.compute(query, progress=lambda *_: None)


@pytest.mark.slow
def test_no_activations_come_to_the_client(
    store: actstore.Store, client: distributed.Client
) -> None:
    process = psutil.Process()
    actstore.compute(actstore.moments(store, tokens=ODD, layers=0))  # imports, compilation
    before, counters.reads = process.memory_info().rss, 0
    most = before
    for _ in range(3):
        actstore.compute(*heavy(store))
        most = max(most, process.memory_info().rss)
    assert counters.reads == 0
    # A layer of the store has 20 MB: three times the whole store went through the workers.
    assert most - before < 20e6


def graph_of(*results: Any) -> dict[Any, Any]:
    graph: dict[Any, Any] = {}
    for result in results:
        graph |= dict(result.__dask_graph__())
    return graph


def test_graphs_of_ten_thousand_blocks_are_small(tmp_path: Path) -> None:
    plan = plan_of(bare_corpus([1000] * 640), [StageSpec("mlp_post", (0, 1), 64)], 64, sketch=False)
    assert plan.n_blocks == 10_000
    large = unwritten_store(tmp_path / "large.zarr", plan)
    for query in (
        actstore.moments(large, tokens="position > 0"),
        actstore.quantiles(large, tokens="position > 0", per="neuron"),
        actstore.histogram(large, tokens="position > 0", bins=50),
        actstore.dimensionality(large, tokens="position > 0"),
        actstore.rsa(large, pairs="layers"),
    ):
        graph = graph_of(query)
        assert len(graph) < 200  # 20,000 shards
        # What there is to say of a token is eight bytes at most, of all layers together.
        sent = sum(len(cloudpickle.dumps(task)) for task in graph.values())
        assert sent < 10 * plan.n_tokens, query.attrs["query"]
