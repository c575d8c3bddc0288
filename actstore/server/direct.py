"""An answer without a server: the application called as one would call it."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import unquote, urlsplit

from starlette.types import ASGIApp

from ..errors import UsageError

__all__ = ["get"]

_EVERY = 0.2


async def get(app: ASGIApp, address: str, token: str | None = None) -> tuple[int, bytes]:
    """The status and the body of the answer at an address; of a job, when it is done.

    Parameters
    ----------
    app : ASGI application
    address : str
        From the root, as ``/api/stores``.
    token : str, optional
        To be shown.
    """
    if not address.startswith("/"):
        raise UsageError(f"{address!r} is not an address: write it from the root, as /api/stores")
    async with _running(app):
        while True:
            status, body = await _call(app, address, token)
            if status != 202:
                return status, body
            job = json.loads(body)["job"]
            while job["state"] in ("queued", "running"):
                await asyncio.sleep(_EVERY)
                _, body = await _call(app, f"/api/jobs/{job['id']}", token)
                job = json.loads(body)["job"]
            if job["error"] is not None:
                return job["error"]["status"], json.dumps({"error": job["error"]}).encode()


class _running:  # noqa: N801 - a context
    """The application from its start to its end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._said: asyncio.Queue[Any] = asyncio.Queue()

    async def __aenter__(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        self._task = asyncio.ensure_future(self._app(scope, self._events.get, self._said.put))
        await self._events.put({"type": "lifespan.startup"})
        await self._said.get()

    async def __aexit__(self, *_: object) -> None:
        await self._events.put({"type": "lifespan.shutdown"})
        await self._said.get()
        await self._task


async def _call(app: ASGIApp, address: str, token: str | None) -> tuple[int, bytes]:
    parts = urlsplit(address)
    headers = [(b"host", b"localhost")]
    if token is not None:
        headers.append((b"authorization", b"Bearer " + token.encode()))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": unquote(parts.path),
        "raw_path": parts.path.encode(),
        "root_path": "",
        "query_string": parts.query.encode(),
        "headers": headers,
        "client": None,
        "server": ("localhost", 80),
    }
    status, body = 0, []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)
        body.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(body)
