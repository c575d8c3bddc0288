"""Stores to serve, and a client of the application over them."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from helpers import prose, write_small
from starlette.testclient import TestClient

import actstore
from actstore.schema import MLP_STAGES
from actstore.server.app import create_app
from actstore.server.cache import Cache
from actstore.server.shelf import Shelf

BASE = "http://127.0.0.1:8000"

CODES = {
    "unknown_name": (400, 404),
    "bad_parameter": (400,),
    "not_found": (404,),
    "bad_host": (421,),
    "unauthorized": (401,),
    "method_not_allowed": (405,),
    "too_large": (413,),
    "busy": (503,),
    "timeout": (504,),
    "internal": (500,),
}


@cache
def folder() -> Path:
    """A folder with two stores over the same tokens, "book" and "twin", and a small one."""
    made = tempfile.TemporaryDirectory(prefix="actstore-serving-")
    folder.made = made  # type: ignore[attr-defined]  # kept until the end
    root = Path(made.name)
    model, tokenizer = actstore.load_model("demo", device="cpu", head=True)
    stages = ["hidden", "attn_z", *MLP_STAGES]
    for name, own in (("book", stages), ("twin", ["hidden", "mlp_in", "mlp_out"])):
        actstore.dump(
            model,
            tokenizer,
            [prose(6_000)],
            root / f"{name}.zarr",
            stages=own,
            buffer="4MiB",
            windows={"internal": ",", "terminal": "."},
            limit=6,
            name="demo",
            predictions=3 if name == "twin" else 0,
            outcomes=name == "twin",
        )
    write_small(root / "small.zarr")
    return root


@contextmanager
def client(*paths: Path, cache_size: int = 2**28, **options: Any) -> Iterator[TestClient]:
    """A client of the application, started and stopped."""
    answers = tempfile.mkdtemp(prefix="actstore-answers-")
    app = create_app(Shelf(paths or [folder()]), Cache(answers, cache_size), **options)
    try:
        with TestClient(app, base_url=BASE, raise_server_exceptions=True) as made:
            yield made
    finally:
        shutil.rmtree(answers)


def finished(http: Any, url: str, **options: Any) -> httpx.Response:
    """The answer at an address, once it is there."""
    for _ in range(600):
        response = http.get(url, **options)
        if response.status_code != 202:
            return response
        job = response.json()["job"]["id"]
        while http.get(f"/api/jobs/{job}").json()["job"]["state"] in ("queued", "running"):
            time.sleep(0.05)
    raise AssertionError(f"no answer at {url}")


def assert_error(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """That a response has the one shape of errors, and tells nothing of this machine."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"status", "code", "message", "value", "allowed", "nearest"}
    assert (error["status"], error["code"]) == (status, code)
    assert status in CODES[code]
    assert error["message"]
    for secret in (str(folder()), tempfile.gettempdir(), "Traceback", ".py", str(Path.home())):
        assert secret not in response.text
    return error
