"""The service's description as OpenAPI 3.1, from the registry of queries."""

from __future__ import annotations

from typing import Any

from .. import __version__
from ..plot import PLOTS
from ..queries import QUERIES
from .answers import DRAWN, FORMATS
from .parameters import MAX_VALUE, parameters_of
from .shelf import Shelf

__all__ = ["describe_api"]

_CODES = [
    "unknown_name",
    "bad_parameter",
    "not_found",
    "bad_host",
    "unauthorized",
    "method_not_allowed",
    "too_large",
    "busy",
    "timeout",
    "internal",
]

_TEXT = {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["status", "code", "message", "value", "allowed", "nearest"],
            "properties": {
                "status": {"type": "integer"},
                "code": {"enum": _CODES},
                "message": {"type": "string"},
                "value": _TEXT,
                "allowed": {"type": ["array", "null"], "items": {"type": "string"}},
                "nearest": _TEXT,
            },
        }
    },
}
_ESTIMATE = {
    "type": "object",
    "required": ["nbytes", "seconds"],
    "properties": {"nbytes": {"type": "integer"}, "seconds": {"type": "number"}},
}
_JOB = {
    "type": "object",
    "required": ["id", "query", "store", "state", "estimate", "progress", "elapsed", "error"],
    "properties": {
        "id": {"type": "string"},
        "query": {"type": "string"},
        "store": {"type": "string"},
        "state": {"enum": ["queued", "running", "done", "failed", "cancelled"]},
        "estimate": _ESTIMATE,
        "progress": {"type": "number", "minimum": 0, "maximum": 1},
        "elapsed": {"type": "number"},
        "error": {"type": ["object", "null"]},
    },
}
_OPEN = {"type": "object"}


def describe_api(shelf: Shelf) -> dict[str, Any]:
    """The description, with the names of the stores that are served now."""
    store = {
        "name": "name",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "enum": shelf.scan()},
    }
    under = "/api/stores/{name}"
    number = _path("number", {"type": "integer", "minimum": 0})
    paths = {
        "/api/queries": _get("queries", "All queries and their parameters."),
        "/api/stores": _get("stores", "All stores."),
        under: _get("card", "What a store holds.", [store]),
        f"{under}/tokens": _get(
            "tokens",
            "Kept tokens that satisfy an expression, and whose text holds a text.",
            [store, *_page(1000), _text("where", "position > 0"), _text("search", "the")],
        ),
        f"{under}/sequences": _get("sequences", "Sequences.", [store, *_page(1000)]),
        f"{under}/sequences/{{number}}": _get(
            "sequence", "A sequence's input tokens.", [store, number, *_page(5000)]
        ),
        f"{under}/sequences/{{number}}/values": _get(
            "values",
            "A neuron's value at each input token of a sequence.",
            [
                store,
                number,
                _text("stage", "mlp_post", required=True),
                _whole("layer", required=True),
                _whole("neuron", required=True),
                *_page(5000),
            ],
        ),
        f"{under}/predictions": _get(
            "predictions",
            "The model's own next tokens after one.",
            [store, _whole("token", required=True)],
        ),
        f"{under}/contexts": _get(
            "contexts",
            "The texts around some tokens.",
            [store, _text("at", "3,77"), _whole("before", 1000), _whole("after", 1000)],
        ),
        "/api/jobs": _get("jobs", "All jobs.", schema=_listed("jobs", _JOB)),
        "/api/jobs/{job}": {
            **_get(
                "job", "A job.", [_path("job", {"type": "string"})], _listed("job", _JOB, one=True)
            ),
            "delete": _operation(
                "cancel",
                "Stop a job.",
                [_path("job", {"type": "string"})],
                _listed("job", _JOB, one=True),
            ),
        },
    }
    for query in QUERIES.values():
        own = [store, *map(_of_query, parameters_of(query))]
        formats = [f for f in FORMATS if f not in DRAWN or query.name in PLOTS]
        ask = _get(query.name, query.summary, [*own, _choice("format", formats), _wait()])
        answers = ask["get"]["responses"]
        answers["200"]["content"] = {
            FORMATS[f].partition(";")[0]: {"schema": _OPEN if f == "json" else {}} for f in formats
        }
        answers["202"] = _response("It takes long.", _listed("job", _JOB, one=True))
        answers["304"] = {"description": "The client has this answer already."}
        paths[f"{under}/{query.name}"] = ask
        paths[f"{under}/{query.name}/estimate"] = _get(
            f"{query.name}_estimate",
            f"What the answer would take: {query.summary}",
            own,
            _listed("estimate", _ESTIMATE, one=True),
        )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "actstore",
            "version": __version__,
            "description": "Stored activations of transformers, and queries over them.",
        },
        "paths": paths,
    }


def _get(
    name: str, summary: str, parameters: list[Any] | None = None, schema: Any = None
) -> dict[str, Any]:
    return {"get": _operation(name, summary, parameters, schema)}


def _operation(
    name: str, summary: str, parameters: list[Any] | None, schema: Any = None
) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        "parameters": parameters or [],
        "responses": {
            "200": _response("The answer.", schema or _OPEN),
            "default": _response("What went wrong.", _ERROR),
        },
    }


def _response(text: str, schema: Any) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _listed(name: str, schema: Any, *, one: bool = False) -> dict[str, Any]:
    inner = schema if one else {"type": "array", "items": schema}
    return {"type": "object", "required": [name], "properties": {name: inner}}


def _of_query(described: dict[str, Any]) -> dict[str, Any]:
    """A parameter as text, in the spelling of the command line."""
    kind, choices = described["type"], described["choices"]
    schema: dict[str, Any] = {"type": "string", "maxLength": MAX_VALUE}
    if choices:
        schema = {"type": "string", "enum": choices}
    elif kind in ("integer", "number", "boolean"):
        schema = {"type": kind}
    elif kind == "array":
        schema["examples"] = ["5", "0,0.5", "-1:1:5"]
    if described["default"] is not None and kind != "array":
        schema["default"] = described["default"]
    made = {"name": described["name"], "in": "query", "schema": schema}
    return {**made, "description": described["description"]}


def _path(name: str, schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _text(name: str, example: str, *, required: bool = False) -> dict[str, Any]:
    schema = {"type": "string", "maxLength": MAX_VALUE, "examples": [example]}
    return {"name": name, "in": "query", "required": required, "schema": schema}


def _whole(name: str, most: int = 10**9, *, required: bool = False) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": 0, "maximum": most}
    return {"name": name, "in": "query", "required": required, "schema": schema}


def _page(most: int) -> list[dict[str, Any]]:
    limit = {"type": "integer", "minimum": 1, "maximum": most}
    return [_whole("offset"), {"name": "limit", "in": "query", "schema": limit}]


def _choice(name: str, choices: list[str]) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": {"type": "string", "enum": choices}}


def _wait() -> dict[str, Any]:
    schema = {"type": "number", "minimum": 0, "maximum": 30}
    text = "Seconds to wait for a long answer, which is a job after that."
    return {"name": "wait", "in": "query", "schema": schema, "description": text}
