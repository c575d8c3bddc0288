"""Long questions: estimates, progress, cancelling, limits; and the cache of answers."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import xarray as xr
from serving import assert_error, client, finished, folder
from starlette.testclient import TestClient

import actstore
from actstore.server.answers import freeze, thaw
from actstore.server.cache import Cache
from actstore.server.desk import Desk
from actstore.server.jobs import Jobs

FOREVER = "/api/stores/book/rsa?stages=mlp_in,mlp_pre&layers=1&null=1000000000"


@pytest.fixture(scope="module")
def http() -> Iterator[TestClient]:
    with client(warm=True, jobs=1, waiting=2) as made:
        yield made


def state(http: TestClient, job: str) -> dict[str, Any]:
    found: dict[str, Any] = http.get(f"/api/jobs/{job}").json()["job"]
    return found


def wait_until(http: TestClient, job: str, *states: str) -> dict[str, Any]:
    for _ in range(600):
        if (found := state(http, job))["state"] in states:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{job} is {found['state']}")


def workers() -> set[int]:
    """Processes that answer, of this one."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ends as we look
            if "actstore.server.worker" in " ".join(process.cmdline()):
                found.add(process.pid)
    return found


# -- jobs ----------------------------------------------------------------------------------


def test_a_job_from_start_to_end(http: TestClient) -> None:
    url = "/api/stores/book/histogram?stages=mlp_pre&bins=17"
    response = http.get(url, params={"stages": "mlp_pre", "bins": "17", "wait": "0"})
    assert response.status_code == 202
    job = response.json()["job"]
    assert response.headers["location"] == f"/api/jobs/{job['id']}"
    assert job["state"] in ("queued", "running") and job["error"] is None
    assert (job["query"], job["store"]) == ("histogram", "book")
    assert job["estimate"]["nbytes"] > 0 and job["estimate"]["seconds"] > 0
    done = wait_until(http, job["id"], "done")
    assert done["progress"] == 1 and done["elapsed"] > 0
    at_once = http.get("/api/stores/book/histogram", params={"stages": "mlp_pre", "bins": "17"})
    assert at_once.status_code == 200 and at_once.headers["x-actstore-cache"] == "hit"
    assert job["id"] in [j["id"] for j in http.get("/api/jobs").json()["jobs"]]


def test_cancelling_stops_the_work(http: TestClient) -> None:
    job = http.get(FOREVER, params=None).json()["job"]["id"]
    wait_until(http, job, "running")
    waiting = http.get(FOREVER + "&seed=1&wait=0").json()["job"]
    assert waiting["state"] == "queued"
    stopped = http.delete(f"/api/jobs/{waiting['id']}")
    assert stopped.status_code == 200 and stopped.json()["job"]["state"] == "cancelled"
    busy, began = workers(), time.monotonic()
    assert http.delete(f"/api/jobs/{job}").json()["job"]["state"] == "cancelled"
    while len(busy & workers()) == len(busy):
        assert time.monotonic() - began < 2
        time.sleep(0.02)
    # Cancelling again changes nothing, and the next question is answered.
    assert http.delete(f"/api/jobs/{job}").json()["job"]["state"] == "cancelled"
    quick = finished(http, "/api/stores/book/rsa?stages=mlp_in,mlp_pre&layers=1")
    assert quick.status_code == 200


def test_who_waits_for_a_cancelled_job_is_told(http: TestClient) -> None:
    url = FOREVER + "&seed=5"
    job = http.get(url + "&wait=0").json()["job"]["id"]
    timer = threading.Timer(0.5, lambda: http.delete(f"/api/jobs/{job}"))
    timer.start()
    told = http.get(url + "&wait=20")
    assert told.status_code == 202 and told.json()["job"]["state"] == "cancelled"
    timer.join()


def test_too_many(http: TestClient) -> None:
    jobs = []
    for seed in range(10, 13):
        response = http.get(f"{FOREVER}&seed={seed}&wait=0.5")
        assert response.status_code == 202
        jobs.append(response.json()["job"]["id"])
    busy = http.get(f"{FOREVER}&seed=99&wait=0")
    assert_error(busy, 503, "busy")
    assert int(busy.headers["retry-after"]) > 0
    # What is being answered already, and what sketches know, is not refused.
    assert http.get(f"{FOREVER}&seed=10&wait=0").json()["job"]["id"] == jobs[0]
    assert http.get("/api/stores/book/moments?per=layer").status_code == 200
    for job in jobs:
        http.delete(f"/api/jobs/{job}")


def test_a_picture_does_not_wait_for_long_ones(http: TestClient) -> None:
    job = http.get(FOREVER + "&seed=7&wait=0").json()["job"]["id"]
    drawn = http.get("/api/stores/book/moments?stages=hidden&per=layer&format=png&wait=30")
    assert drawn.status_code == 200 and state(http, job)["state"] == "running"
    http.delete(f"/api/jobs/{job}")


def test_progress_is_told(http: TestClient) -> None:
    url = "/api/stores/book/mutual_information?reduce=mean&stages=hidden,mlp_in,mlp_out&wait=0"
    job = http.get(url).json()["job"]["id"]
    seen = [0.0]
    while (found := state(http, job))["state"] in ("queued", "running"):
        seen.append(found["progress"])
        if sum(0 < p < 1 for p in seen) > 3:
            http.delete(f"/api/jobs/{job}")
            break
        time.sleep(0.02)
    assert seen == sorted(seen) and any(0 < p < 1 for p in seen)


def test_a_failing_job_says_why(tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder() / "small.zarr", tmp_path / "torn.zarr")
    next((tmp_path / "torn.zarr" / "mlp_post" / "activation").glob("c.*")).unlink()
    with client(tmp_path) as http:
        url = "/api/stores/torn/histogram?stages=mlp_post&bins=5"
        error = assert_error(http.get(url + "&wait=30"), 500, "internal")
        assert "torn" in error["message"] and "missing" in error["message"]
        (job,) = http.get("/api/jobs").json()["jobs"]
        assert job["state"] == "failed" and job["error"] == error
        # A failure is not kept.
        assert_error(http.get(url + "&wait=30"), 500, "internal")
        assert len(http.get("/api/jobs").json()["jobs"]) == 2


def test_a_worker_that_dies(tmp_path: Path) -> None:
    with client() as http:
        job = http.get(FOREVER + "&wait=0").json()["job"]["id"]
        wait_until(http, job, "running")
        while not workers():
            time.sleep(0.05)
        for pid in workers():
            psutil.Process(pid).kill()
        found = wait_until(http, job, "failed")
        assert found["error"]["code"] == "internal" and "memory" in found["error"]["message"]
        again = finished(http, "/api/stores/book/histogram?stages=hidden&layers=1&bins=3")
        assert again.status_code == 200
    assert not workers()


def test_what_takes_too_long_is_stopped() -> None:
    with client(seconds=0.5) as http:
        assert_error(http.get(FOREVER + "&wait=30"), 504, "timeout")


def test_unknown_jobs(http: TestClient) -> None:
    assert_error(http.get("/api/jobs/nothing"), 404, "unknown_name")
    assert_error(http.delete("/api/jobs/nothing"), 404, "unknown_name")
    assert_error(http.delete("/api/jobs"), 405, "method_not_allowed")


# -- sharing -------------------------------------------------------------------------------


def test_the_same_question_at_once_is_answered_once(
    http: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    quick = Desk._quick

    def counted(*args: Any) -> Any:
        calls.append(args)
        time.sleep(0.3)
        return quick(*args)

    monkeypatch.setattr(Desk, "_quick", counted)
    url = "/api/stores/book/moments?per=layer&stages=hidden&tokens=position+>+-7"
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: http.get(url), range(8)))
    assert len(calls) == 1 and len({a.content for a in answers}) == 1
    sources = sorted(a.headers["x-actstore-cache"] for a in answers)
    assert sources.count("miss") == 1 and set(sources) <= {"miss", "shared", "hit"}


def test_the_same_long_question_is_one_job_whatever_the_format(http: TestClient) -> None:
    url = "/api/stores/book/histogram?stages=mlp_post&bins=23&wait=30"
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda f: http.get(url + f), ["", "", "&format=csv", ""]))
    assert [a.status_code for a in answers] == [200] * 4
    jobs = [j for j in http.get("/api/jobs").json()["jobs"] if j["query"] == "histogram"][-2:]
    assert sum(j["estimate"]["nbytes"] > 0 for j in jobs) == 1


def test_many_at_once(http: TestClient) -> None:
    urls = [
        f"/api/stores/{name}/moments?per=layer&stages=hidden&tokens=position+>+-{i % 40 + 1}"
        for i in range(100)
        for name in ("book", "twin")
    ]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(http.get, urls))
    assert {a.status_code for a in answers} == {200}
    assert len({a.headers["etag"] for a in answers}) == 80


# -- the cache -----------------------------------------------------------------------------


def test_cache_keeps_the_latest(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10_000)
    for i in range(8):
        cache.put(f"{i:040x}", bytes([i]) * 3000, {"seconds": i})
        assert cache.get(f"{0:040x}") is not None  # used again and again
    left = [i for i in range(8) if cache.get(f"{i:040x}") is not None]
    assert left == [0, 6, 7]
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) <= 10_000
    # Another process finds them, in the same order.
    again = Cache(tmp_path, 10_000)
    found = again.get(f"{7:040x}")
    assert found is not None and found.read() == bytes([7]) * 3000 and found.meta["seconds"] == 7
    again.put("f" * 40, b"x" * 20_000, {})
    assert [p.name for p in tmp_path.rglob("??/*")] == ["f" * 40]


def test_cache_of_a_large_answer_is_read_in_pieces(tmp_path: Path) -> None:
    body = np.random.default_rng(0).bytes(3 * 2**20)
    Cache(tmp_path, 10**8).put("a" * 40, body, {})
    entry = Cache(tmp_path, 10**8).get("a" * 40)
    assert entry is not None and entry.body is None
    pieces = entry.chunks()
    (tmp_path / "aa" / ("a" * 40)).unlink()
    assert b"".join(pieces) == body


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "text", "longer"])
def test_damaged_entries_are_ignored(how: str, tmp_path: Path) -> None:
    cache, key = Cache(tmp_path, 10**6), "b" * 40
    cache.put(key, b"some answer", {"seconds": 1.0})
    path = cache.path(key)
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[-3] ^= 1
    damaged = {"cut": data[:-2], "empty": b"", "text": b"{}", "longer": data + b"x"}
    path.write_bytes(damaged.get(how, data))
    assert Cache(tmp_path, 10**6).get(key) is None
    cache.put(key, b"some answer", {"seconds": 1.0})
    entry = Cache(tmp_path, 10**6).get(key)
    assert entry is not None and entry.read() == b"some answer"


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from actstore.server import cache as module

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    cache = Cache(tmp_path, 10**6)
    monkeypatch.setattr(module, "write_entry", full)
    assert cache.put("c" * 40, b"answer", {"seconds": 1.0}).read() == b"answer"
    assert cache.get("c" * 40) is None and not list(tmp_path.iterdir())


def test_answers_outlive_the_server(tmp_path: Path) -> None:
    from actstore.server.app import create_app
    from actstore.server.shelf import Shelf

    url = "/api/stores/book/moments?stages=mlp_in&per=layer"
    bodies = []
    for expected in ("miss", "hit"):
        app = create_app(Shelf([folder()]), Cache(tmp_path, 10**7))
        with TestClient(app, base_url="http://localhost") as http:
            found = http.get(url)
            assert found.headers["x-actstore-cache"] == expected
            bodies.append(found.content)
    assert bodies[0] == bodies[1]
    for path in tmp_path.glob("??/*"):
        path.write_bytes(b"nonsense")
    app = create_app(Shelf([folder()]), Cache(tmp_path, 10**7))
    with TestClient(app, base_url="http://localhost") as http:
        assert http.get(url).content == bodies[0]
    assert not list(tmp_path.glob(".*"))


# -- results kept whole --------------------------------------------------------------------


def test_results_are_kept_whole() -> None:
    odd = xr.Dataset(
        {
            "mean": (("layer", "pair"), [[1.5, np.nan], [-np.inf, 0.1]], {"units": "1"}),
            "half": ("layer", np.array([1, 2], np.float16)),
            "zeroed": ("layer", [True, False]),
            "count": ("layer", np.array([7, 2**60])),
        },
        {"layer": [0, 3], "pair": np.array(["a:b", "<é>"], object), "stage": "mlp_post"},
        {"query": "moments", "nothing": None, "many": [1, 2], "nan": float("nan")},
    )
    found = thaw(freeze(odd))
    xr.testing.assert_identical(found.drop_attrs(), odd.drop_attrs())
    assert {n: v.dtype for n, v in found.variables.items()} == {
        **{n: v.dtype for n, v in odd.variables.items()},
        "stage": np.dtype("<U8"),
    }
    assert found.attrs["nothing"] is None and found["mean"].attrs == {"units": "1"}
    tree = xr.DataTree.from_dict({"/": xr.Dataset(attrs={"query": "x"}), "a": odd, "b": odd})
    thawed = thaw(freeze(tree))
    assert list(thawed.children) == ["a", "b"] and thawed.attrs == {"query": "x"}
    xr.testing.assert_identical(thawed["a"].to_dataset().drop_attrs(), odd.drop_attrs())
    store = actstore.open(folder() / "small.zarr")
    sample = actstore.compute(actstore.sample(store, stages="hidden", n=3))
    assert json.dumps(thaw(freeze(sample)).attrs) == json.dumps(sample.attrs)


def test_jobs_are_forgotten_in_the_end() -> None:
    from actstore.server import jobs as module
    from actstore.server.jobs import Job
    from actstore.server.look import Estimate

    async def run() -> None:
        jobs = Jobs(1, 10**6, 1.0)
        jobs._queue = lambda job: job.end("done")  # type: ignore[method-assign]
        estimate = Estimate(0, 0.0, "scan")
        for _ in range(module._KEPT + 50):
            jobs.submit(Job("q", "s", {}, estimate, lambda done: None, [], False))
        assert len(list(jobs)) <= module._KEPT + 1

    asyncio.run(run())
