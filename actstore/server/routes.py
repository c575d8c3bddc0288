"""The service's addresses."""

from __future__ import annotations

import mimetypes
import re
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .. import wire
from ..plot import PLOTS
from ..queries import QUERIES
from .answers import check_format
from .desk import Desk, key_of
from .failures import ServiceError
from .jobs import Job
from .openapi import describe_api
from .parameters import Asked, parameters_of, parse_query, whole_number
from .shelf import Served, Shelf

__all__ = ["routes"]

STATIC = Path(__file__).parent / "static"
MAX_PAGE = 1000
MAX_TOKENS = 5000
MAX_CONTEXTS = 200
MAX_WAIT = 30


def routes() -> list[Route]:
    store = "/api/stores/{name}"
    return [
        Route("/", index),
        Route("/static/{path:path}", static),
        Route("/api/queries", queries),
        Route("/api/stores", stores),
        Route(store, card),
        Route(store + "/tokens", tokens),
        Route(store + "/sequences", sequences),
        Route(store + "/sequences/{number}", sequence),
        Route(store + "/sequences/{number}/values", values),
        Route(store + "/predictions", predictions),
        Route(store + "/contexts", contexts),
        Route(store + "/{query}", ask),
        Route(store + "/{query}/estimate", estimate),
        Route("/api/openapi.json", openapi),
        Route("/api/jobs", jobs),
        Route("/api/jobs/{job}", job, methods=["GET", "DELETE"]),
    ]


# -- the page ------------------------------------------------------------------------------


def index(request: Request) -> Response:
    return _file(request, "index.html")


def static(request: Request) -> Response:
    return _file(request, request.path_params["path"])


def _file(request: Request, wanted: str) -> Response:
    # A name out of those that there are: what is asked for never becomes a path.
    there = {p.relative_to(STATIC).as_posix(): p for p in STATIC.rglob("*") if p.is_file()}
    if wanted == "plotly.min.js":
        found = find_spec("plotly")  # the file is wanted, not the module
        if found is not None and found.origin is not None:
            there[wanted] = Path(found.origin).parent / "package_data" / wanted
    if wanted not in there:
        raise ServiceError(404, "not_found", "there is no such file")
    kind = mimetypes.guess_type(wanted)[0] or "application/octet-stream"
    if wanted.endswith((".js", ".mjs")):
        kind = "text/javascript"
    status = there[wanted].stat()
    headers = {
        "etag": f'"{status.st_mtime_ns:x}-{status.st_size:x}"',
        "cache-control": "no-cache",
    }
    if _has(request, headers["etag"]):
        return Response(status_code=304, headers=headers)
    return FileResponse(there[wanted], media_type=kind, headers=headers)


# -- stores --------------------------------------------------------------------------------


def queries(request: Request) -> Response:
    found = [
        {
            "name": query.name,
            "summary": query.summary,
            "example": query.example,
            "plot": query.name in PLOTS,
            "parameters": parameters_of(query),
        }
        for query in QUERIES.values()
    ]
    return _json({"queries": found})


def stores(request: Request) -> Response:
    _given(request)
    shelf: Shelf = request.app.state.desk.shelf
    return _json({"stores": [shelf[n].browser.summary(n) for n in shelf.scan()]})


def card(request: Request) -> Response:
    _given(request)
    served = _served(request)
    return _json(served.browser.card(served.name))


def tokens(request: Request) -> Response:
    given = _given(request, "offset", "limit", "where", "search")
    offset, limit = _page(given, 100, MAX_PAGE)
    where, search = given.get("where", ""), given.get("search", "")
    return _json(_served(request).browser.tokens(offset, limit, where, search))


def sequences(request: Request) -> Response:
    offset, limit = _page(_given(request, "offset", "limit"), 50, MAX_PAGE)
    return _json(_served(request).browser.sequences(offset, limit))


def sequence(request: Request) -> Response:
    offset, limit = _page(_given(request, "offset", "limit"), 2000, MAX_TOKENS)
    return _json(_served(request).browser.sequence(_number(request), offset, limit))


def values(request: Request) -> Response:
    given = _given(request, "stage", "layer", "neuron", "offset", "limit")
    offset, limit = _page(given, 2000, MAX_TOKENS)
    layer = whole_number(given, "layer", None, 0, 10**6)
    neuron = whole_number(given, "neuron", None, 0, 10**9)
    browser, stage = _served(request).browser, given.get("stage", "")
    return _json(browser.values(_number(request), stage, layer, neuron, offset, limit))


def predictions(request: Request) -> Response:
    token = whole_number(_given(request, "token"), "token", None, 0, 10**12)
    return _json(_served(request).browser.predictions(token))


def contexts(request: Request) -> Response:
    given = _given(request, "at", "before", "after")
    parts = given.get("at", "").split(",") if given.get("at") else []
    if len(parts) > MAX_CONTEXTS:
        raise ServiceError(
            413, "too_large", f"at names {len(parts):,} tokens: {MAX_CONTEXTS} at most"
        )
    at = [whole_number({"at": p.strip()}, "at", None, 0, 10**12) for p in parts]
    before = whole_number(given, "before", 10, 0, 1000)
    after = whole_number(given, "after", 5, 0, 1000)
    return _json(_served(request).browser.contexts(at, before, after))


# -- questions -----------------------------------------------------------------------------


async def ask(request: Request) -> Response:
    served, name = _asked_of(request)
    given = _given(request, *_names(name), "format", "wait")
    wanted = given.pop("format", "json")
    wait = _seconds(given.pop("wait", None))
    check_format(name, wanted)
    asked = Asked(name, given)
    desk: Desk = request.app.state.desk
    etag = f'"{key_of(desk.shelf, served, asked, wanted)}"'
    if _has(request, etag):
        return Response(status_code=304, headers={"etag": etag, "cache-control": "no-cache"})
    found = await desk.ask(served, asked, wanted, wait)
    if isinstance(found, Job):
        return JSONResponse(
            {"job": found.shape()},
            202,
            {"location": f"/api/jobs/{found.id}", "cache-control": "no-store"},
        )
    entry = found.entry
    headers = {
        "etag": etag,
        "cache-control": "no-cache",
        "x-actstore-seconds": f"{entry.meta['seconds']:.6f}",
        "x-actstore-cache": found.source,
        "content-length": str(entry.size),
    }
    if wanted in ("csv", "nc"):
        file = quote(f"{served.name}-{name}.{wanted}", safe="")
        headers["content-disposition"] = f"attachment; filename*=UTF-8''{file}"
    kind = entry.meta["type"]
    if entry.body is not None:
        return Response(entry.body, media_type=kind, headers=headers)
    return StreamingResponse(entry.chunks(), media_type=kind, headers=headers)


async def estimate(request: Request) -> Response:
    served, name = _asked_of(request)
    given = _given(request, *_names(name), "format", "wait")
    check_format(name, given.pop("format", "json"))
    given.pop("wait", None)
    found = await request.app.state.desk.estimate(served, Asked(name, given))
    return _json({"estimate": asdict(found)})


def openapi(request: Request) -> Response:
    return _json(describe_api(request.app.state.desk.shelf))


# -- jobs: on the event loop, which owns them ----------------------------------------------


async def jobs(request: Request) -> Response:
    return _json({"jobs": [job.shape() for job in request.app.state.desk.jobs]})


async def job(request: Request) -> Response:
    wanted: Job = request.app.state.desk.jobs[request.path_params["job"]]
    if request.method == "DELETE":
        request.app.state.desk.jobs.cancel(wanted)
    return _json({"job": wanted.shape()})


# -- shared --------------------------------------------------------------------------------


def _given(request: Request, *allowed: str) -> dict[str, str]:
    return parse_query(request.scope["query_string"], list(allowed))


def _served(request: Request) -> Served:
    return request.app.state.desk.shelf[request.path_params["name"]]


def _asked_of(request: Request) -> tuple[Served, str]:
    """The store and the query that are asked."""
    served = _served(request)
    name = request.path_params["query"]
    if name not in QUERIES:
        raise ServiceError.unknown(404, "query", name, QUERIES)
    return served, name


def _names(query: str) -> list[str]:
    return [p.name for p in QUERIES[query].parameters]


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,2}(\.\d{1,6})?", text, re.ASCII) or float(text) > MAX_WAIT:
        raise ServiceError(400, "bad_parameter", f"wait goes from 0 to {MAX_WAIT} seconds", text)
    return float(text)


def _has(request: Request, etag: str) -> bool:
    """Whether the client has an answer already."""
    known = [part.strip() for part in request.headers.get("if-none-match", "").split(",")]
    return etag in [part.removeprefix("W/") for part in known]


def _number(request: Request) -> int:
    return whole_number(request.path_params, "number", None, 0, 10**12)


def _page(given: dict[str, str], default: int, most: int) -> tuple[int, int]:
    offset = whole_number(given, "offset", 0, 0, 10**12)
    return offset, whole_number(given, "limit", default, 1, most)


def _json(value: Any) -> Response:
    return Response(wire.dumps(value).encode(), media_type="application/json")
