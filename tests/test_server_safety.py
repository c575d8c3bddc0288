"""Who is answered, what is refused, and in which shape."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from serving import assert_error, client, folder
from starlette.testclient import TestClient

from actstore.errors import NotAStoreError, UnfinishedStoreError
from actstore.queries import QUERIES
from actstore.server.app import LOOPBACK
from actstore.server.failures import scrub
from actstore.server.shelf import Shelf


@pytest.fixture(scope="module")
def http() -> Iterator[TestClient]:
    with client(jobs=1, seconds=20.0) as made:
        yield made


# -- who asks ------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [*LOOPBACK, "127.0.0.1:8000", "LOCALHOST:1", "[::1]:8000"])
def test_hosts_of_this_machine(host: str, http: TestClient) -> None:
    assert http.get("/api/stores", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost:x", "::1"],
)
def test_forged_hosts(host: str, http: TestClient) -> None:
    for path in ("/", "/api/stores", "/static/plotly.min.js", "/nowhere"):
        assert_error(http.get(path, headers={"host": host}), 421, "bad_host")


def test_hosts_that_are_allowed() -> None:
    with client(hosts=["box.example"]) as http:
        assert http.get("/api/stores", headers={"host": "box.example:9"}).status_code == 200
        assert_error(http.get("/", headers={"host": "other.example"}), 421, "bad_host")


def test_every_answer_has_the_headers(http: TestClient) -> None:
    for response in (
        http.get("/api/stores"),
        http.get("/api/stores/book/moments?per=layer&stages=hidden"),
        http.get("/nowhere"),
        http.get("/static/plotly.min.js"),
        http.get("/api/stores", headers={"host": "evil.example"}),
        http.post("/api/stores"),
    ):
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; ")
        assert "http:" not in policy and "*" not in policy and "unsafe-eval" not in policy
        assert "frame-ancestors 'none'" in policy and "form-action 'none'" in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in response.headers


def test_token() -> None:
    with client(token="s€cret") as http:
        for path in ("/", "/api/stores", "/static/plotly.min.js", "/?token=wrong", "/?token="):
            response = http.get(path, follow_redirects=False)
            assert_error(response, 401, "unauthorized")
            assert "set-cookie" not in response.headers
        bearer = {"authorization": "Bearer s€cret".encode()}
        assert http.get("/api/stores", headers=bearer).status_code == 200
        for wrong in (b"Bearer", b"Bearer x", b"Basic s", "s€cret".encode(), b"Bearer \xff\xfe"):
            assert_error(
                http.get("/api/stores", headers={"authorization": wrong}), 401, "unauthorized"
            )
        shown = http.get("/", params={"token": "s€cret"}, follow_redirects=False)
        assert shown.status_code == 303 and shown.headers["location"] == "/"
        cookie = shown.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "s€cret" not in cookie
        assert http.get("/api/stores").status_code == 200  # the client keeps the cookie
        http.cookies.clear()
        for bad in ("actstore=x", "a=b; ;;;", "\x7f"):
            assert_error(http.get("/api/stores", headers={"cookie": bad}), 401, "unauthorized")
        assert_error(http.get("/api/stores?token=s%E2%82%ACcret"), 401, "unauthorized")


# -- what is asked -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/nowhere",
        "/api",
        "/api/",
        "/api/stores/",
        "/api/stores/../../etc/passwd",
        "/api/stores/%2e%2e/%2e%2e/etc/passwd",
        "/api/stores/%2fetc%2fpasswd",
        "/api/stores/book.zarr",
        "/api/stores/book/",
        "/api/stores/book/hidden/activation",
        "/api/stores/book/zarr.json",
        "/api/stores/bo%00ok",
        "/api/stores/%ff%fe",
        "/static/../routes.py",
        "/static/%2e%2e/routes.py",
        "/static/..%5croutes.py",
        "/static/%00",
        "/static//etc/passwd",
        "//etc/passwd",
        "/api/stores/" + "x" * 5000,
    ],
)
def test_nothing_else_is_reached(path: str, http: TestClient) -> None:
    response = _raw(http, path.encode())
    code = response.json()["error"]["code"]
    assert code in ("not_found", "unknown_name")
    assert len(json.dumps(assert_error(response, 404, code))) < 3000


def _raw(http: TestClient, path: bytes) -> httpx.Response:
    """A GET of a path as it is: a client would tidy it up before it asks."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": unquote(path.decode()),
        "raw_path": path,
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        "client": None,
        "server": ("localhost", 80),
    }
    assert http.portal is not None
    http.portal.call(http.app, scope, receive, send)
    body = b"".join(m.get("body", b"") for m in sent[1:])
    return httpx.Response(sent[0]["status"], headers=sent[0]["headers"], content=body)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_stores_are_only_read(method: str, http: TestClient) -> None:
    for path in ("/", "/api/stores", "/api/stores/book", "/api/stores/book/moments"):
        error = assert_error(http.request(method, path), 405, "method_not_allowed")
        assert error["value"] == method


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        ("stages=hiden", 400, "unknown_name"),
        ("layers=99", 400, "unknown_name"),
        ("layers=one", 400, "bad_parameter"),
        ("neurons=5-2", 400, "bad_parameter"),
        ("neurons=0-9999999", 413, "too_large"),
        ("layers=" + "0-999999," * 20 + "1", 413, "too_large"),
        ("neurons=0-99999", 400, "unknown_name"),
        ("tokens=positoin+>+0", 400, "unknown_name"),
        ("tokens=position+>", 400, "bad_parameter"),
        ("tokens=__import__('os')", 400, "bad_parameter"),
        ("tokens=position+<+0", 400, "bad_parameter"),
        ("tokens=" + "(" * 500, 400, "bad_parameter"),
        ("tokens=" + "x" * 9000, 413, "too_large"),
        ("tokens=a%00b", 400, "bad_parameter"),
        ("tokens=%ff", 400, "bad_parameter"),
        ("by=nothing", 400, "unknown_name"),
        ("per=neurons", 400, "unknown_name"),
        ("perr=layer", 400, "unknown_name"),
        ("per=layer&per=layer", 400, "bad_parameter"),
        ("format=pickle", 400, "unknown_name"),
        ("wait=31", 400, "bad_parameter"),
        ("wait=nan", 400, "bad_parameter"),
        ("wait=-1", 400, "bad_parameter"),
        ("wait=1e1", 400, "bad_parameter"),
        ("exclude_sinks=/etc", 400, "unknown_name"),
        ("data=/etc/passwd", 400, "unknown_name"),
        ("&".join(f"x{i}=1" for i in range(200)), 400, "bad_parameter"),
        ("stages=" + "a" * 40_000, 413, "too_large"),
    ],
)
def test_wrong_questions(asked: str, status: int, code: str, http: TestClient) -> None:
    error = assert_error(http.get(f"/api/stores/book/moments?{asked}"), status, code)
    if code == "unknown_name":
        assert error["value"] and error["allowed"]
    assert len(error["message"]) < 3000


@pytest.mark.parametrize(
    "asked",
    [
        "histogram?bins=nan",
        "histogram?bins=0,nan,1",
        "histogram?bins=inf",
        "histogram?bins=1e999",
        "histogram?bins=-5",
        "histogram?bins=0",
        "histogram?bins=0:1:99999999999",
        "histogram?bins=0:nan:5",
        "histogram?bins=" + "9" * 5000,
        "histogram?range=nan,1",
        "histogram?range=1",
        "histogram?range=-inf,inf",
        "quantiles?q=nan",
        "quantiles?q=2",
        "peaks?height=nan",
        "peaks?bins=" + "9" * 40,
        "zeroness?threshold=inf",
        "dimensionality?threshold=nan",
        "dimensionality?null=perhaps",
        "top_tokens?k=1.5",
        "top_tokens?k=-1",
        "rsa?memory=nan",
        "rsa?memory=1e999",
        "rsa?memory=-5",
        "rsa?pairs=::::",
        "rsa?sample=-1",
        "sample?seed=-1",
        "cosine_pairs?quantiles=",
        "mutual_information?bins=0",
    ],
)
def test_numbers_that_are_none(asked: str, http: TestClient) -> None:
    response = http.get(f"/api/stores/book/{asked}&wait=20&stages=hidden&layers=1")
    if response.status_code == 200:  # left out is not wrong, and some take what is odd
        assert asked.endswith("=") or "threshold" in asked
        return
    error = response.json()["error"]
    assert error["code"] in ("bad_parameter", "unknown_name", "too_large"), error
    assert_error(response, response.status_code, error["code"])


@pytest.mark.parametrize(
    "asked",
    [
        "cosine_matrix?stages=mlp_pre",
        "histogram?stages=mlp_pre&bins=900000&per=neuron",
        "histogram?stages=mlp_pre&bins=9999999",
        "top_tokens?stages=mlp_pre&k=9000",
        "sample?n=5000&unit=token",
    ],
)
def test_answers_that_are_too_large(
    asked: str, http: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actstore.server import answers

    monkeypatch.setattr(answers, "MAX_NBYTES", 1_000_000)
    response = http.get(f"/api/stores/book/{asked}&wait=0")
    if "bins=9" in asked and response.json()["error"]["code"] == "bad_parameter":
        return  # refused for another reason
    error = assert_error(response, 413, "too_large")
    assert "reduce=" in error["message"] and "neurons=" in error["message"]


@pytest.mark.parametrize(
    "asked",
    [
        "histogram?bins=1000000000",
        "histogram?bins=3e9&range=0,1",
        "histogram?bins=90000&per=neuron",
        "cosine_pairs?bins=2000000000",
        "mutual_information?reduce=joint&reduce_bins=100000",
        "peaks?bins=999999999999",
        "spectrum?k=900000000000",
    ],
)
def test_what_is_large_is_not_even_laid_out(asked: str, http: TestClient) -> None:
    before = psutil.Process().memory_info().rss
    assert_error(http.get(f"/api/stores/book/{asked}&wait=0"), 413, "too_large")
    assert psutil.Process().memory_info().rss - before < 2**28


def test_a_table_may_be_larger_than_its_values(
    http: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actstore.server import answers

    url = "/api/stores/book/histogram?stages=hidden&layers=1&wait=20"
    monkeypatch.setattr(answers, "MAX_NBYTES", 4000)
    assert http.get(url).status_code == 200
    assert_error(http.get(url + "&format=csv"), 413, "too_large")


def test_nothing_unforeseen_is_told(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    from actstore.server.desk import Desk

    def fail(*_: Any) -> None:
        raise RuntimeError(f"at {folder()}/book.zarr/secret")

    monkeypatch.setattr(Desk, "_quick", fail)
    response = http.get("/api/stores/book/moments?per=layer&tokens=position+>+-99")
    error = assert_error(response, 500, "internal")
    assert "secret" not in error["message"]


def test_paths_are_scrubbed() -> None:
    shelf = Shelf([folder()])
    text = f"zarr.json in {folder()}/book.zarr; {folder()}/x, {Path.home()}/y, {__file__}"
    shown = scrub(text, shelf.path_names())
    assert shown.startswith("zarr.json in book; ") and str(folder()) not in shown
    assert str(Path.home()) not in shown


def test_what_is_no_store(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.zarr"):
        with pytest.raises(NotAStoreError):
            Shelf([path])
    from helpers import STAGES, bare_corpus, plan_of

    from actstore.writer import Writer

    plan = plan_of(bare_corpus([64, 64, 64]), STAGES, 64)
    with pytest.raises(RuntimeError), Writer(tmp_path / "half.zarr", plan):
        raise RuntimeError
    with pytest.raises(UnfinishedStoreError):
        Shelf([tmp_path / "half.zarr"])
    assert Shelf([tmp_path, folder()]).scan() == ["book", "small", "twin"]


# -- the description -----------------------------------------------------------------------


def test_description(http: TestClient) -> None:
    described = http.get("/api/openapi.json").json()
    assert described["openapi"].startswith("3.1")
    for query in QUERIES.values():
        operation = described["paths"][f"/api/stores/{{name}}/{query.name}"]["get"]
        names = [p["name"] for p in operation["parameters"]]
        assert names == ["name", *(p.name for p in query.parameters), "format", "wait"]
        assert operation["summary"] == query.summary
    codes = described["paths"]["/api/stores"]["get"]["responses"]["default"]
    assert "internal" in json.dumps(codes)
    served = {re.sub(r"\{\w+\}", "{}", p) for p in described["paths"]}
    from actstore.server.routes import routes

    for route in routes():
        path = re.sub(r"\{\w+(:path)?\}", "{}", route.path)
        if path.startswith("/api") and path not in ("/api/openapi.json", "/api/stores/{}/{}"):
            assert path in served or path.startswith("/api/stores/{}/{}")


def test_nothing_that_the_description_allows_breaks_it(http: TestClient) -> None:
    schema = schemathesis.openapi.from_dict(http.get("/api/openapi.json").json())
    calm = settings(
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    seen: set[int] = set()
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(calm, max_examples=1 if operation.path.endswith("/estimate") else 6)
        @schemathesis_given(operation)
        def check(case: Any) -> None:
            path = case.formatted_path
            params = dict(case.query or {})
            if path.rpartition("/")[2] in QUERIES:
                params["wait"] = 0
            response = http.request(case.method, path, params=params)
            seen.add(response.status_code)
            assert response.status_code < 500 or response.status_code == 503, (
                f"{case.method} {path} {params}: {response.text}"
            )
            if response.status_code >= 400:
                assert_error(response, response.status_code, response.json()["error"]["code"])

        check()
        for job in http.get("/api/jobs").json()["jobs"]:
            if job["state"] in ("queued", "running"):
                http.delete(f"/api/jobs/{job['id']}")
    assert 200 in seen and 400 in seen


def schemathesis_given(operation: Any) -> Any:
    from hypothesis import given

    return given(case=operation.as_strategy())
