"""A real S3 server on loopback, and a proxy before it that can be told to fail."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import boto3

PORT_SECONDS = 60
_GONE = b"<Error><Code>NoSuchBucket</Code><Message>no such bucket</Message></Error>"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for_port(port: int) -> None:
    until = time.monotonic() + PORT_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < until, "the server does not answer"
            time.sleep(0.05)


class Faults(BaseHTTPRequestHandler):
    """Hands requests on to the real server, but for those that it answers badly.

    `kind` is what it does to each request whose number `every` divides: "500", "dropped", "slow",
    or "gone", as if the bucket were; "none" for nothing.
    """

    protocol_version = "HTTP/1.1"
    target = 0
    kind = "none"
    every = 4
    seen = 0
    injected: ClassVar[Counter[str]] = Counter()

    def log_message(self, *_: object) -> None:
        pass

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        cls = type(self)
        cls.seen += 1
        if cls.kind != "none" and cls.seen % cls.every == 0:
            cls.injected[cls.kind] += 1
            if cls.kind in ("500", "gone"):
                answer = b"" if cls.kind == "500" or self.command == "HEAD" else _GONE
                self.send_response(500 if cls.kind == "500" else 404)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)
                return
            if cls.kind == "dropped":
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            time.sleep(0.2)
        onward = http.client.HTTPConnection("127.0.0.1", cls.target, timeout=60)
        try:
            onward.request(self.command, self.path, body, dict(self.headers))
            answer = onward.getresponse()
            data = answer.read()
        finally:
            onward.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        size = answer.getheader("Content-Length") if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(size or 0))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one  # noqa: N815


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Say nothing: clients that were killed in the middle of a request are what is tested."""


@contextmanager
def s3_server() -> Iterator[type[Faults]]:
    """Server and proxy, where the environment says; with one bucket, "runs"."""
    port, front = free_port(), free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, **quiet)
    Faults.target, Faults.kind = port, "none"
    proxy = _Proxy(("127.0.0.1", front), Faults)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    settings = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{front}",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        wait_for_port(port)
        thread.start()
        s3().create_bucket(Bucket="runs")
        yield Faults
    finally:
        if thread.is_alive():
            proxy.shutdown()
        proxy.server_close()
        server.kill()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def s3_settings() -> dict[str, str]:
    """The part of the environment that says where the server is."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def s3() -> Any:
    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])


def objects(url: str) -> dict[str, bytes]:
    """Every object under a URL by its key."""
    name, _, prefix = url.removeprefix("s3://").partition("/")
    found = {}
    for page in s3().get_paginator("list_objects_v2").paginate(Bucket=name, Prefix=prefix + "/"):
        for entry in page.get("Contents", ()):
            data = s3().get_object(Bucket=name, Key=entry["Key"])["Body"].read()
            found[entry["Key"].removeprefix(prefix + "/")] = data
    return found
