"""The application: routes behind a guard that checks who asks and how."""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import ActstoreError
from .cache import Cache
from .desk import Desk
from .failures import ServiceError, describe
from .jobs import Jobs
from .routes import routes
from .shelf import Shelf

__all__ = ["create_app"]

log = logging.getLogger("actstore.server")

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


def create_app(
    shelf: Shelf,
    cache: Cache,
    *,
    token: str | None = None,
    hosts: Iterable[str] = (),
    jobs: int = 2,
    waiting: int = 32,
    seconds: float = 3600,
    warm: bool = False,
) -> ASGIApp:
    """The ASGI application over some stores.

    Parameters
    ----------
    shelf : Shelf
    cache : Cache
    token : str, optional
        What every request must show.
    hosts : iterable of str
        Names that it may be called by, beside those of this machine's own loopback.
    jobs : int
        Long questions that are answered at once.
    waiting : int
        Long questions that may wait.
    seconds : float
        Most that one of them may take.
    warm : bool
        Whether to have a process ready for pictures and long questions.
    """
    desk = Desk(shelf, cache, Jobs(jobs, waiting, seconds))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        if warm:
            desk.jobs.warm()
        yield
        await desk.close()

    def fail(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = _of_router(error, request.method)
        failure = describe(error, shelf.path_names())
        return JSONResponse(failure.shape(), failure.status, failure.headers)

    kinds: tuple[type[Exception], ...] = (HTTPException, ServiceError, ActstoreError, Exception)
    app = Starlette(
        routes=routes(), exception_handlers=dict.fromkeys(kinds, fail), lifespan=lifespan
    )
    app.router.redirect_slashes = False
    app.state.desk = desk
    return Guard(app, token, {*LOOPBACK, *hosts})


def _of_router(error: HTTPException, method: str) -> ServiceError:
    if error.status_code == 405:
        return ServiceError(
            405,
            "method_not_allowed",
            f"{method[:20]} is not possible here: stores are only read, with GET",
            method[:20],
            headers=dict(error.headers or {}),
        )
    return ServiceError(
        404, "not_found", "there is nothing at this address; /api/openapi.json lists what there is"
    )


class Guard:
    """Checks host and token, and puts the headers of safety on every answer.

    A page of another origin cannot read answers (there are no CORS headers), and a name that
    somebody makes point to this machine (DNS rebinding) is not among the hosts.
    """

    def __init__(self, app: ASGIApp, token: str | None, hosts: Iterable[str]) -> None:
        self._app = app
        self._token = token
        self._hosts = {h.lower() for h in hosts}
        if token is not None:
            # Cookies are shared by all ports of a host: each token has one of its own.
            digest = hashlib.sha256(b"actstore\0" + token.encode()).hexdigest()
            self._cookie, self._secret = f"actstore-{digest[:8]}", digest[8:]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def sends(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                own = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        request = Request(scope)
        try:
            answer = self._refusal(request)
            await (answer or self._app)(scope, receive, sends)
        except Exception as error:  # the handlers have answered; this is for the log
            log.debug("request failed", exc_info=error)
            if not started:
                failure = describe(error, {})
                await JSONResponse(failure.shape(), failure.status)(scope, receive, sends)

    def _refusal(self, request: Request) -> Response | None:
        """The answer to whom nothing is told, or who shows the token for the first time."""
        named = request.headers.getlist("host")
        if len(named) != 1 or _without_port(named[0]).lower() not in self._hosts:
            return _refused(
                421, "bad_host", "this server does not go by that name: --allow-host adds names"
            )
        if self._token is None:
            return None
        if request.url.path == "/" and request.method == "GET":
            given = dict(parse_qsl(request.url.query)).get("token")
            if given is not None and _same(given.encode(), self._token.encode()):
                answer = RedirectResponse("/", 303)
                answer.set_cookie(self._cookie, self._secret, httponly=True, samesite="strict")
                return answer
        scheme, _, shown = request.headers.get("authorization", "").partition(" ")
        # Headers are bytes, which Starlette gives as if they were Latin-1.
        if scheme.lower() == "bearer" and _same(shown.encode("latin-1"), self._token.encode()):
            return None
        if _same(_cookie(request, self._cookie).encode(), self._secret.encode()):
            return None
        return _refused(
            401,
            "unauthorized",
            "show the token: open /?token=..., or send the header Authorization: Bearer ...",
            {"www-authenticate": "Bearer"},
        )


def _same(given: bytes, expected: bytes) -> bool:
    """Compared in a time that does not depend on where they differ."""
    return secrets.compare_digest(given, expected)


def _refused(status: int, code: str, message: str, headers: Any = None) -> Response:
    failure = ServiceError(status, code, message, headers=headers)
    return JSONResponse(failure.shape(), status, failure.headers)


def _without_port(host: str) -> str:
    name, _, port = host.rpartition(":")
    return name if name and port.isdigit() else host


def _cookie(request: Request, name: str) -> str:
    try:
        found = SimpleCookie(request.headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return found.value if found is not None else ""
