"""`actstore serve` as it is run: a process, a port, messages, an end; and answers without one."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import actstore_cli
import psutil
import pytest
from serving import folder

import actstore
from actstore.wire import dumps, to_csv, to_json

COMMAND = [sys.executable, "-m", "actstore_cli", "serve"]


@contextmanager
def serving(*argv: object) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """The server, its port, and what it has said by then."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, argv), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = ""
    try:
        for line in process.stderr:
            said += line
            if match := re.search(r"http://[^/]+:(\d+)/", line):
                break
        else:
            raise AssertionError(said)
        yield process, int(match[1]), said
    finally:
        process.kill()
        process.communicate()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    return response.status, response.headers, response.read()


def test_serve(tmp_path: Path) -> None:
    with serving(folder(), "--cache-dir", tmp_path / "answers") as (process, port, said):
        assert "3 stores: book, small, twin" in said
        status, headers, body = ask(port, "/api/stores/book/moments?per=layer")
        assert status == 200 and headers["x-actstore-cache"] == "miss"
        assert "server" not in headers
        store = actstore.open(folder() / "book.zarr")
        expected = actstore.compute(actstore.moments(store, per="layer"))
        assert json.loads(body) == json.loads(dumps(to_json(expected)))
        assert any((tmp_path / "answers").glob("??/*"))
        assert ask(port, "/api/stores", host="evil.example")[0] == 421
        # A long question is stopped with the server.
        long = "/api/stores/book/rsa?stages=mlp_in,mlp_pre&layers=1&null=1000000000&wait=0"
        assert ask(port, long)[0] == 202
        children = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0 and out == "" and "Traceback" not in err, err
        assert psutil.wait_procs(children, timeout=5)[1] == []
    assert not list((tmp_path / "answers").glob(".*"))


def test_workers_end_with_a_server_that_is_killed(tmp_path: Path) -> None:
    with serving(folder(), "--cache-dir", tmp_path) as (process, port, _):
        long = "/api/stores/book/rsa?stages=mlp_in,mlp_pre&layers=1&null=1000000000&wait=0"
        assert ask(port, long)[0] == 202
        time.sleep(2)
        children = psutil.Process(process.pid).children()
        assert children
        process.kill()
        assert psutil.wait_procs(children, timeout=10)[1] == []


def test_with_a_token_and_what_is_not_http(tmp_path: Path) -> None:
    argv = [folder() / "small.zarr", "--cache-dir", tmp_path, "--token", "abc"]
    with serving(*argv) as (process, port, said):
        assert "/?token=abc" in said
        assert ask(port, "/api/stores")[0] == 401
        for sent in (b"nonsense\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as link:
                link.sendall(sent)
                answer = link.recv(10_000)
            assert re.match(rb"HTTP/1.1 4\d\d ", answer), answer
            body = answer.partition(b"\r\n\r\n")[2]
            assert set(json.loads(body)["error"]) >= {"status", "code", "message"}
        long = b"GET /?" + b"x" * 200_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=10) as link:
            link.sendall(long)
            assert re.match(rb"HTTP/1.1 4\d\d ", link.recv(10_000))
        assert ask(port, "/api/stores", authorization="Bearer abc")[0] == 200
        process.terminate()
        assert process.wait(20) == 0


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Run]:
    """The command in this process: what it leaves as status, output and messages."""
    before = signal.getsignal(signal.SIGTERM)

    def ran(*argv: object) -> tuple[int, str, str]:
        words = ["serve", "--cache-dir", str(tmp_path), *map(str, argv)]
        monkeypatch.setattr(sys, "argv", ["actstore", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            actstore_cli.main()
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), out, err

    yield ran
    signal.signal(signal.SIGTERM, before)


def test_get(run: Run) -> None:
    book = folder() / "book.zarr"
    status, out, err = run(book, "--get", "/api/stores/book/moments?per=layer&format=csv")
    store = actstore.open(book)
    assert out == to_csv(actstore.compute(actstore.moments(store, per="layer")))
    assert (status, err) == (0, "")
    scanned = run(book, "--get", "/api/stores/book/histogram?stages=hidden&bins=7")
    assert json.loads(scanned[1])["attrs"]["source"] == "scan"
    wrong = run(book, "--token", "abc", "--get", "/api/stores/book/momnets")
    assert wrong[0] == 2 and json.loads(wrong[1])["error"]["nearest"] == "moments"


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["nothing.zarr"], 1, "nothing.zarr does not exist"),
        ([folder, "--cache-size", "much"], 2, "write a size"),
        ([folder, "--token", " "], 2, "--token is empty"),
        ([folder, "--cache-dir", "/dev/null/x"], 2, "name a folder with --cache-dir"),
        ([folder, "--get", "api/stores"], 2, "from the root"),
    ],
)
def test_messages(argv: list[Any], status: int, message: str, run: Run) -> None:
    found = run(*(a() if callable(a) else a for a in argv))
    assert found[0] == status and found[1] == ""
    assert message in found[2] and "Traceback" not in found[2]


def test_a_port_that_is_taken(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, _, err = run(folder(), "--port", taken.getsockname()[1])
    assert status == 2 and "--port 0" in err


@pytest.mark.slow
def test_bench(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from actstore_cli.bench_serve import serve

    serve(gigabytes=0.02, repeats=2, requests=20, folder=tmp_path, as_json=True)
    found = json.loads(capfd.readouterr().out)
    assert {row["store"] for row in found["rows"]} == {"demo", "large"}
    assert all(row["median_ms"] > 0 for row in found["rows"])
    assert found["peak_bytes"]["server"] > 10**7
    assert not list(tmp_path.iterdir())
