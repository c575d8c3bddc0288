"""Shuffled batches for training, against random rows of a memory-mapped array."""

from __future__ import annotations

from typing import Any

from ..bench_loader import loader_rows
from .rounds import Row
from .setting import Setting, fresh

__all__ = ["loading"]

TARGET = 3


def loading(setting: Setting) -> list[Row]:
    """The rows of `bench_loader`."""
    folder = fresh(setting.scratch / "loader")
    return [_row(found) for found in loader_rows(setting.rounds, folder, setting.batches)]


def _row(found: dict[str, Any]) -> Row:
    return Row(
        "loader",
        found["what"],
        found["against"],
        found["seconds"],
        found["its_seconds"],
        found["ratio"],
        found.get("low"),
        found.get("high"),
        target=TARGET,
    )
