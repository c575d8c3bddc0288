"""HTTP that tells of its errors in the service's shape, too."""

from __future__ import annotations

import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import HEADERS
from .failures import ServiceError

__all__ = ["Protocol"]


class Protocol(H11Protocol):
    """For uvicorn; what is not HTTP, or too long for it, never reaches the application."""

    def send_400_response(self, msg: str) -> None:
        error = ServiceError(400, "bad_parameter", "this is not HTTP, or its head is too long")
        body = json.dumps(error.shape()).encode()
        facts = {"content-type": "application/json", "content-length": str(len(body))}
        headers = {**facts, "connection": "close", **HEADERS}
        events = [
            h11.Response(status_code=400, headers=list(headers.items())),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ]
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()
