"""The one shape of every failure, which tells nothing of the machine."""

from __future__ import annotations

import logging
import os
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ActstoreError, StoreError, UnknownNameError, UsageError

__all__ = ["ServiceError", "describe", "scrub"]

log = logging.getLogger("actstore.server")

_SHOWN = 200
"""Characters of a wrong value that are repeated, and names that are listed."""


class ServiceError(Exception):
    """An answer that is an error.

    Parameters
    ----------
    status : int
        Of HTTP.
    code : str
        One of the service's codes: "unknown_name", "bad_parameter", "too_large" ...
    message : str
        One or two sentences that say what to do.
    value, allowed, nearest : optional
        What was wrong, what there is, and what was probably meant.
    headers : mapping, optional
        Beside the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        value: object = None,
        allowed: Iterable[object] | None = None,
        nearest: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.value = None if value is None else str(value)[:_SHOWN]
        self.allowed = None if allowed is None else [str(a) for a in allowed][:_SHOWN]
        self.nearest = nearest
        self.headers = dict(headers or {})

    def shape(self) -> dict[str, Any]:
        """The body of the answer."""
        fields = ("status", "code", "message", "value", "allowed", "nearest")
        return {"error": {name: getattr(self, name) for name in fields}}

    @classmethod
    def unknown(cls, status: int, kind: str, name: str, allowed: Iterable[object]) -> ServiceError:
        """Of a name that is not there."""
        return cls.of(UnknownNameError(kind, name[:_SHOWN], allowed), status)

    @classmethod
    def of(cls, error: UnknownNameError, status: int = 400) -> ServiceError:
        return cls(status, "unknown_name", str(error), error.name, error.allowed, error.nearest)


def describe(error: BaseException, names: Mapping[str, str]) -> ServiceError:
    """What a client is told of an error.

    Parameters
    ----------
    error : Exception
    names : mapping
        What to call each path that a message may hold.
    """
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, UnknownNameError):
        failure = ServiceError.of(error)
    elif isinstance(error, UsageError):
        failure = ServiceError(400, "bad_parameter", str(error))
    elif isinstance(error, StoreError):
        failure = ServiceError(500, "internal", str(error))
    elif isinstance(error, MemoryError):
        failure = ServiceError(
            413, "too_large", "this takes more memory than there is: ask for less at a time"
        )
    else:
        if not isinstance(error, ActstoreError):
            log.error("failed", exc_info=error)
        failure = ServiceError(500, "internal", "this failed; the server's own messages say why")
    failure.message = scrub(failure.message, names)
    return failure


def scrub(text: str, names: Mapping[str, str]) -> str:
    """A message without the paths of this machine: served stores by name, others not at all."""
    for path, name in sorted({**_own_paths(), **names}.items(), key=lambda p: -len(p[0])):
        text = text.replace(path, name)
    return text


def _own_paths() -> dict[str, str]:
    places = [str(Path.home()), os.getcwd(), tempfile.gettempdir(), *sysconfig.get_paths().values()]
    places += [os.path.realpath(place) for place in places]
    places.append(str(Path(__file__).parents[2]))
    return {place: "…" for place in places if len(Path(place).parts) > 1}
