"""Stores on the Hub: real processes against a stand-in for its HTTP endpoint."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    assert_same_tree,
    flip,
    plan_of,
    random_values,
    small_corpus,
    write_small,
    write_store,
)
from hub_server import TOKEN, Hub, hub_server

import actstore
from actstore.errors import UsageError
from actstore.plan import StageSpec

NAME = "me/run-activations"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "run.zarr"
    write_small(path)
    return path


class Client:
    """The command line, with its own home and the stand-in for the Hub."""

    def __init__(self, hub: Hub, address: str, home: Path) -> None:
        self.hub, self.home = hub, home
        self._env = {
            **os.environ,
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",  # its storage is another protocol, of the real Hub only
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def __call__(self, *words: object, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "actstore_cli", *map(str, words)],
            env=self._env | env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def python(self, code: str) -> Any:
        """What Python code puts into `result`."""
        run = subprocess.run(
            [sys.executable, "-c", f"import json, actstore\n{code}\nprint(json.dumps(result))"],
            env=self._env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with hub_server() as (hub, address):
        yield Client(hub, address, tmp_path / "home")


def test_push_and_pull_give_the_same_store(client: Client, store: Path, tmp_path: Path) -> None:
    pushed = client("push", store, NAME)
    assert pushed.returncode == 0, pushed.stderr
    assert f"datasets/{NAME}" in pushed.stderr
    hub = client.hub
    assert hub.repos[NAME]["private"]
    assert {k for k in hub.files(NAME) if k != ".gitattributes"} == {
        str(p.relative_to(store)) for p in store.rglob("*") if p.is_file()
    }
    # What the store is called came first, its root last.
    trees = [set(files) for _, files, _ in hub.repos[NAME]["commits"]]
    assert "journal/manifest.json" in trees[1] and len(trees[1]) == 2
    assert ["zarr.json" in tree for tree in trees] == [False, False, False, True]
    out = tmp_path / "pulled.zarr"
    pulled = client("pull", NAME, out, "--json")
    assert pulled.returncode == 0, pulled.stderr
    assert json.loads(pulled.stdout)["store"] == str(out)
    assert_same_tree(out, store)
    a, b = actstore.open(store), actstore.open(out)
    assert a.id == b.id
    np.testing.assert_array_equal(a["mlp_post"].values, b["mlp_post"].values)


@pytest.mark.slow
def test_again_goes_on_and_changes_nothing(client: Client, store: Path, tmp_path: Path) -> None:
    """An upload that is refused half way leaves no store; the same call sends only the rest."""
    client.hub.refuse_upload = lambda n: n > 5
    failed = client("push", store, NAME, "--public")
    assert failed.returncode == 1
    assert "actstore: pushing to me/run-activations failed" in failed.stderr
    assert "goes on" in failed.stderr and "Traceback" not in failed.stderr
    assert not client.hub.repos[NAME]["private"]
    nothing = client("pull", NAME, tmp_path / "early.zarr")
    assert nothing.returncode == 1 and "only part of a store: push it again" in nothing.stderr
    assert not (tmp_path / "early.zarr").exists()
    client.hub.refuse_upload = lambda _: False
    sent = set(client.hub.blobs)
    assert sent
    asked = client.hub.asked["upload"]
    out = tmp_path / "run.zarr"
    result = client.python(
        f"""
actstore.push({str(store)!r}, {NAME!r})
first = actstore.pull({NAME!r}, {str(out)!r}).id
result = [first, actstore.push(actstore.open({str(out)!r}), {NAME!r})]
actstore.pull({NAME!r}, {str(out)!r})
"""
    )
    assert result == [actstore.open(store).id, f"{client._env['HF_ENDPOINT']}/datasets/{NAME}"]
    large = [p.read_bytes() for p in store.rglob("*") if p.is_file() and p.stat().st_size > 1000]
    left = [own for d in large if (own := hashlib.sha256(d).hexdigest()) not in sent]
    # Of files that are the same (of one granule, its moments are the totals), one is enough.
    assert len(set(left)) <= client.hub.asked["upload"] - asked <= len(left) < len(large)
    assert len(client.hub.messages(NAME)) == 4  # pushing what is there makes no commit
    assert_same_tree(out, store)


@pytest.mark.slow
def test_what_comes_damaged_is_no_store_and_comes_again(
    client: Client, store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run.zarr"
    assert client("push", store, NAME).returncode == 0
    client.hub.damage = lambda path: path == "mlp_post/activation/c.1.0.0"
    damaged = client("pull", NAME, out)
    assert damaged.returncode == 1
    assert "mlp_post/activation/c.1.0.0: its checksum does not match" in damaged.stderr
    assert not (out / "zarr.json").exists()
    with pytest.raises(actstore.errors.UnfinishedStoreError):
        actstore.open(out)
    client.hub.damage = lambda _: False
    asked = client.hub.asked["resolve"]
    assert client("pull", NAME, out).returncode == 0
    assert client.hub.asked["resolve"] - asked < 10  # the rest was there
    assert_same_tree(out, store)


@pytest.mark.slow
def test_nothing_is_written_over(client: Client, store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.zarr"
    plan = plan_of(small_corpus(), [StageSpec("mlp_out", (0,), 16)], 64)
    write_store(other, plan, random_values(plan))
    assert client("push", store, NAME).returncode == 0
    before = client.hub.files(NAME)
    refused = client("push", other, NAME)
    assert refused.returncode == 2
    assert f"{NAME} holds another store, {actstore.open(store).id}" in refused.stderr
    assert client.hub.files(NAME) == before
    for name, place in (("another store in it", other), ("something else in it", tmp_path)):
        refused = client("pull", NAME, place)
        assert refused.returncode == 2 and name in refused.stderr
    assert actstore.open(other).id != actstore.open(store).id


@pytest.mark.slow
def test_errors_say_what_to_do(client: Client, store: Path, tmp_path: Path) -> None:
    missing = client("pull", "me/nothing")
    assert missing.returncode == 1 and "there is no such dataset, or you may not" in missing.stderr
    stranger = client("push", store, NAME, HF_TOKEN="hf_another")
    assert stranger.returncode == 1 and "Traceback" not in stranger.stderr
    client.hub.create("me/pictures", private=False)
    other = client("pull", "me/pictures", tmp_path / "pictures.zarr")
    assert other.returncode == 1 and "no store of actstore's" in other.stderr
    unknown = client("pull", "me/pictures", "--revision", "v9")
    assert unknown.returncode == 1 and "no such revision" in unknown.stderr
    away = client("push", store, NAME, HF_ENDPOINT="http://127.0.0.1:9")
    assert away.returncode == 1 and "HF_ENDPOINT" in away.stderr


@pytest.mark.parametrize("name", ["run", "a/b/c", "me/a b", "", "me/..", "../me"])
def test_names_that_cannot_be(name: str, store: Path) -> None:
    with pytest.raises(UsageError, match="write 'user/name'"):
        actstore.push(store, name)
    with pytest.raises(UsageError, match="write 'user/name'"):
        actstore.pull(name)


def test_only_folders_are_pushed(store: Path, tmp_path: Path) -> None:
    for place in ("http://localhost:1/run.zarr", str(tmp_path / "run.zarr.zip")):
        with pytest.raises(UsageError, match="in no folder"):
            actstore.push(place, NAME)
    damaged = tmp_path / "run.zarr"
    write_small(damaged)
    flip(damaged / "zarr.json", 40)
    with pytest.raises(actstore.errors.StoreError):
        actstore.push(damaged, NAME)
