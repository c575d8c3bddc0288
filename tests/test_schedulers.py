"""Threads, this thread alone, processes and clusters: the same values from each."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import actstore_cli
import distributed
import numpy as np
import pytest
import xarray as xr
from helpers import write_small

import actstore
from actstore.errors import UnknownNameError, UsageError
from actstore.queries.registry import QUERIES
from actstore.storage import counters

PRODUCTS = {
    *("cka", "cosine_matrix", "cosine_pairs", "dimensionality", "gaussian_baseline"),
    *("intrinsic_dimension", "rsa", "spectrum"),
}
"""Queries of matrix products, which a library sums in an order of its own; others are exact."""

CUT = np.arange(147) != 5  # through a stratum of the sketches, so that data are read


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> actstore.Store:
    path = tmp_path_factory.mktemp("schedulers") / "small.zarr"
    write_small(path)
    return actstore.open(path)


@pytest.fixture(scope="module")
def cluster() -> Iterator[distributed.LocalCluster]:
    """Two processes of one thread each."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
    ) as made:
        yield made


@pytest.fixture(scope="module")
def expected(store: actstore.Store) -> list[Any]:
    return actstore.compute(*everything(store), scheduler="sync")


def everything(store: actstore.Store) -> list[Any]:
    """Every query, scanned; one of stages of several widths; one of an array of dask's."""
    more = {"rsa": {"pairs": "layers"}, "cka": {"pairs": "layers"}}
    return [
        *(
            q.function(store, stages="mlp_post", tokens=CUT, **more.get(name, {}))
            for name, q in QUERIES.items()
        ),
        actstore.moments(store, tokens=CUT),
        actstore.histogram(store["mlp_post"], bins=7, by="condition"),
        actstore.top_tokens(store, k=3, by="play"),
    ]


def same(found: Any, expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.attrs["query"] == b.attrs["query"]
        if isinstance(b, xr.DataTree):
            assert list(a.children) == list(b.children)
            for stage in b.children:
                assert a[stage].to_dataset().identical(b[stage].to_dataset())
        else:
            xr.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-8)
            assert a.identical(b) or b.attrs["query"] in PRODUCTS, b.attrs["query"]


def elsewhere(compute: Callable[[], Any]) -> Any:
    """What is computed; all of it outside of this process."""
    counters.reset()
    found = compute()
    assert counters.reads == 0
    return found


def test_threads_and_processes(store: actstore.Store, expected: list[Any]) -> None:
    queries = everything(store)
    same(actstore.compute(*queries), expected)
    same(actstore.compute(*queries, scheduler="threads"), expected)
    assert counters.reads > 0
    same(elsewhere(lambda: actstore.compute(*queries, scheduler="processes")), expected)


def test_progress_is_told(store: actstore.Store) -> None:
    told: list[tuple[int, int]] = []
    actstore.compute(actstore.moments(store), progress=lambda *at: told.append(at))
    done, totals = zip(*told, strict=True)
    assert list(done) == list(range(1, len(done) + 1)) and done[-1] <= totals[0]


def test_a_cluster_by_its_address(
    store: actstore.Store, cluster: distributed.LocalCluster, expected: list[Any]
) -> None:
    address = cluster.scheduler_address
    assert address.startswith("tcp://")
    same(elsewhere(lambda: actstore.compute(*everything(store), scheduler=address)), expected)
    with pytest.raises(ValueError, match="No clients found"):
        distributed.default_client()  # the one that was opened is closed


def test_the_active_client_of_a_cluster(
    store: actstore.Store, cluster: distributed.LocalCluster, expected: list[Any]
) -> None:
    queries = everything(store)
    with distributed.Client(cluster):
        same(elsewhere(lambda: actstore.compute(*queries)), expected)
        counters.reset()
        same(actstore.compute(*queries, scheduler="threads"), expected)
        assert counters.reads > 0
    with distributed.Client(cluster, set_as_default=False) as client:
        same(elsewhere(lambda: actstore.compute(*queries, scheduler=client)), expected)


def test_arrays_of_ones_own(cluster: distributed.LocalCluster) -> None:
    values = np.random.default_rng(0).normal(size=(2, 90, 6)).astype(np.float32)
    plain = xr.DataArray(values, dims=("layer", "token", "neuron"))
    for data in (plain, plain.chunk(token=20)):
        queries = [actstore.moments(data), actstore.quantiles(data)]
        expected = actstore.compute(*queries, scheduler="sync")
        for scheduler in ("processes", cluster.scheduler_address):
            same(actstore.compute(*queries, scheduler=scheduler), list(expected))


def test_schedulers_that_are_not_there(
    store: actstore.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = actstore.moments(store)
    with pytest.raises(UnknownNameError, match=r"'thread': did you mean 'threads'.*tcp://HOST"):
        actstore.compute(query, scheduler="thread")
    monkeypatch.setattr("actstore.queries.result._CONNECT_SECONDS", 0.5)
    for address in ("tcp://127.0.0.1:9", "tcp://127.0.0.1:nine", "tcp://"):
        with pytest.raises(UsageError, match=r"answers at 'tcp://.*Start one with `dask"):
            actstore.compute(query, scheduler=address)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UsageError, match=r"pip install 'actstore\[distributed\]'"):
        actstore.compute(query, scheduler="tcp://127.0.0.1:9")


def test_the_command_line_has_schedulers(
    store: actstore.Store,
    cluster: distributed.LocalCluster,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["actstore", *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            actstore_cli.main()
        return stop.value.code or 0, *capfd.readouterr()  # type: ignore[return-value]

    ask = ("query", "quantiles", store.path, "--stages", "hidden", "--json")
    status, expected, _ = run(*ask)
    assert status == 0
    for scheduler in ("threads", "sync", "processes", cluster.scheduler_address):
        status, stdout, stderr = run(*ask, "--scheduler", scheduler)
        assert status == 0, stderr
        assert json.loads(stdout) == json.loads(expected)
    status, stdout, stderr = run(*ask, "--scheduler", "procesess")
    assert (status, stdout) == (2, "")
    assert "did you mean 'processes'" in " ".join(stderr.split())
    out = tmp_path / "a.png"
    draw = ("plot", "quantiles", store.path, "--stages", "hidden", "--out", out)
    assert run(*draw, "--scheduler", "nothing")[0] == 2
    assert not out.exists()
    assert run(*draw, "--scheduler", "sync")[0] == 0
    assert out.exists()
