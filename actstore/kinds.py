"""What parsed JSON has to be: each function gives the value back, or says what it is instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import CorruptStoreError

__all__ = ["mapping", "need", "numbers", "shown", "text", "whole"]


def need(sound: bool, what: str) -> None:
    if not sound:
        raise CorruptStoreError(what)


def shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, list | dict) else type(value).__name__
    return text if len(text) <= 80 else f"{text[:80]}..."


def whole(value: Any, what: str, least: int = 0, most: int = 2**53) -> int:
    need(
        type(value) is int and least <= value <= most,
        f"{what} is {shown(value)}, not a whole number from {least} to {most}",
    )
    return int(value)


def text(value: Any, what: str) -> str:
    need(isinstance(value, str), f"{what} is {shown(value)}, not text")
    return str(value)


def mapping(value: Any, what: str) -> dict[str, Any]:
    need(isinstance(value, dict), f"{what} is {shown(value)}, not an object")
    return value


def numbers(value: Any, what: str, least: int = 0, count: int | None = None) -> Sequence[int]:
    need(
        isinstance(value, list)
        and all(type(n) is int and least <= n <= 2**53 for n in value)
        and count in (None, len(value)),
        f"{what} is {shown(value)}, not a list of whole numbers",
    )
    return value
