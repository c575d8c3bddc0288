"""Stores in an object store: a real S3 server on loopback, and what goes wrong between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import actstore_cli
import numpy as np
import pytest
from helpers import (
    VOCABULARY,
    plan_of,
    prose,
    random_values,
    small_corpus,
    tree_bytes,
    write_store,
)
from s3_faults import Faults, free_port, objects, s3, s3_server

import actstore
from actstore import remote
from actstore.errors import (
    ActstoreError,
    CorruptStoreError,
    NotAStoreError,
    StoreError,
    UnfinishedStoreError,
    UsageError,
    WriteError,
)
from actstore.plan import Plan, StageSpec
from actstore.remote import RemoteStorage, object_store

QUICK = {"max_retries": 8, "backoff": {"init_backoff": timedelta(milliseconds=5), "base": 2}}


@pytest.fixture(scope="module")
def faults() -> Iterator[type[Faults]]:
    """A server of S3, and before it a proxy that can be told to fail."""
    patient, remote._RETRIES = remote._RETRIES, QUICK
    try:
        with s3_server() as made:
            yield made
    finally:
        object_store.cache_clear()
        remote._RETRIES = patient


@pytest.fixture
def bucket(faults: type[Faults]) -> Iterator[str]:
    """A place of its own in a bucket."""
    faults.kind = "none"
    yield f"s3://runs/{uuid4().hex}"
    faults.kind = "none"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("local") / "run.zarr"
    write(path)
    return path


def small_plan() -> Plan:
    """Three blocks of 64 tokens in each of two layers."""
    return plan_of(small_corpus(), [StageSpec("mlp_post", (0, 1), 32)], 64)


def write(place: str | Path, **options: Any) -> None:
    plan = small_plan()
    write_store(place, plan, random_values(plan), vocabulary=VOCABULARY, **options)  # type: ignore[arg-type]


def answers(place: str | Path) -> list[Any]:
    store = actstore.open(place)
    queries = (
        actstore.moments(store),
        actstore.quantiles(store, tokens="position > 1"),
        actstore.rsa(store, pairs="layers"),
        actstore.top_tokens(store, k=3),
    )
    return [store.decode(17), *actstore.compute(*queries)]


def same_answers(place: str, expected: list[Any]) -> None:
    text, *results = answers(place)
    assert text == expected[0]
    for found, right in zip(results, expected[1:], strict=True):
        for name in right.data_vars:
            assert found[name].equals(right[name]), name


@pytest.mark.slow
def test_the_whole_cycle(bucket: str, local: Path) -> None:
    """Dump, open, ask, verify, dump again: as in a folder, to the byte."""
    url = f"{bucket}/run.zarr"
    write(url)
    assert objects(url) == tree_bytes(local)
    same_answers(url, answers(local))
    store = actstore.open(url + "/")
    assert store.name == "run.zarr"
    assert store.path == url
    assert np.array_equal(store["mlp_post"].values, actstore.open(local)["mlp_post"].values)
    assert not [problem for _, problem in actstore.verify(url) if problem]
    write(url)
    assert objects(url) == tree_bytes(local)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("500", marks=pytest.mark.slow),
        "dropped",
        pytest.param("slow", marks=pytest.mark.slow),
    ],
)
def test_requests_that_fail(kind: str, bucket: str, local: Path, faults: type[Faults]) -> None:
    url = f"{bucket}/run.zarr"
    faults.kind = kind
    faults.every = 12 if kind == "slow" else 4
    before = faults.injected[kind]
    write(url)
    same_answers(url, answers(local))
    assert faults.injected[kind] - before > 10
    faults.kind = "none"
    assert objects(url) == tree_bytes(local)


WRITE = """
import sys, time
from helpers import put_all, random_values, VOCABULARY
from test_remote import small_plan
import actstore.writer
plan = small_plan()
encode = actstore.writer.encode
def slowly(*args):
    time.sleep(0.05)
    return encode(*args)
actstore.writer.encode = slowly
with actstore.writer.Writer(sys.argv[1], plan, vocabulary=VOCABULARY) as writer:
    print("ready", flush=True)
    put_all(writer, random_values(plan))
"""


@pytest.mark.slow
def test_killed_and_run_again(bucket: str, local: Path) -> None:
    url = f"{bucket}/run.zarr"
    rng = np.random.default_rng(0)
    for _ in range(4):
        dump = subprocess.Popen(
            [sys.executable, "-c", WRITE, url],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        )
        assert dump.stdout is not None
        assert dump.stdout.readline()
        time.sleep(rng.uniform(0, 0.8))
        dump.kill()
        dump.wait()
    if "zarr.json" not in objects(url):
        with pytest.raises(UnfinishedStoreError, match=r"of 3 blocks are complete"):
            actstore.open(url)
    write(url)
    assert objects(url) == tree_bytes(local)


@pytest.mark.slow
def test_damage_is_found_and_repaired(bucket: str, local: Path) -> None:
    url = f"{bucket}/run.zarr"
    write(url)
    name, _, prefix = url.removeprefix("s3://").partition("/")
    shards = sorted(k for k in objects(url) if k.startswith("mlp_post/activation/c."))
    damaged, missing = shards[0], shards[1]
    data = bytearray(objects(url)[damaged])
    data[100] ^= 1
    s3().put_object(Bucket=name, Key=f"{prefix}/{damaged}", Body=bytes(data))
    s3().delete_object(Bucket=name, Key=f"{prefix}/{missing}")
    store = actstore.open(url)
    with pytest.raises(CorruptStoreError, match="checksum of chunk"):
        np.asarray(store.array("mlp_post")[0, :64])
    with pytest.raises(CorruptStoreError, match=f"{missing} is missing from {url}"):
        np.asarray(store.array("mlp_post")[0, 64:128])
    assert {p.key for _, p in actstore.verify(url) if p} == {damaged, missing}
    write(url)
    assert objects(url) == tree_bytes(local)


def test_a_bucket_that_is_not_there(bucket: str) -> None:
    nowhere = "s3://nowhere-at-all/run.zarr"
    with pytest.raises(StoreError, match="no such bucket"):
        actstore.open(nowhere)
    with pytest.raises(ActstoreError, match=r"nowhere-at-all.*bucket"):
        write(nowhere)


@pytest.mark.slow
def test_a_bucket_that_vanishes(faults: type[Faults]) -> None:
    s3().create_bucket(Bucket="short")
    url = "s3://short/run.zarr"
    write(url)
    store = actstore.open(url)
    for key in objects(url):
        s3().delete_object(Bucket="short", Key=f"run.zarr/{key}")
    s3().delete_bucket(Bucket="short")
    with pytest.raises(StoreError, match="no such bucket"):
        actstore.compute(actstore.moments(store, tokens="position > 1"))
    with pytest.raises(WriteError, match="bucket"):
        RemoteStorage(url).put("key", b"data")


def test_nothing_there(bucket: str) -> None:
    with pytest.raises(NotAStoreError, match="there is nothing at s3://"):
        actstore.open(f"{bucket}/other.zarr")
    with pytest.raises(UsageError, match="Unable to recognise URL"):
        actstore.open("nonsense://bucket/run.zarr")


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr("actstore.remote._RETRIES", {"max_retries": 1})
    with pytest.raises(StoreError, match=r"reading from s3://silent/run.zarr failed"):
        actstore.open("s3://silent/run.zarr")


def test_commit_records_are_put_once(bucket: str) -> None:
    storage = RemoteStorage(bucket)
    storage.put_once("journal/0", b"a record")
    storage.put_once("journal/0", b"a record")
    with pytest.raises(WriteError, match="another process writes there"):
        storage.put_once("journal/0", b"another record")
    assert storage.get("journal/0") == b"a record"
    assert storage.keys("journal") == ["journal/0"]
    storage.delete("journal/0")
    storage.delete("journal/0")
    assert not storage.exists("journal/0")


def test_two_ranks_at_once(bucket: str, local: Path) -> None:
    url = f"{bucket}/run.zarr"
    errors: list[BaseException] = []

    def rank(number: int) -> None:
        try:
            write(url, rank=number, world_size=2)
        except BaseException as error:
            errors.append(error)

    ranks = [threading.Thread(target=rank, args=(i,)) for i in range(2)]
    for r in ranks:
        r.start()
    for r in ranks:
        r.join()
    assert not errors
    assert objects(url) == tree_bytes(local)


@pytest.mark.slow
def test_on_the_command_line(
    bucket: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    object_store.cache_clear()
    (tmp_path / "text.txt").write_text(prose(2000))

    def run(*argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["actstore", "--endpoint", endpoint, *argv])
        with pytest.raises(SystemExit) as stop:
            actstore_cli.main()
        out, err = capfd.readouterr()
        assert not stop.value.code, err
        return out

    try:
        url = f"{bucket}/run.zarr"
        run("dump", "demo", str(tmp_path / "text.txt"), url, "--stages", "hidden")
        assert "hidden state" in run("info", url)
        assert json.loads(run("query", "moments", url, "--layers", "0", "--json"))
        assert not json.loads(run("verify", url, "--json"))["problems"]
        (served,) = json.loads(run("serve", url, "--get", "/api/stores"))["stores"]
        assert served["name"] == "run"
        asked = "/api/stores/run/moments?layers=0&per=layer"
        assert json.loads(run("serve", url, "--get", asked))["attrs"]["source"] == "sketch"
    finally:
        monkeypatch.undo()
        object_store.cache_clear()
