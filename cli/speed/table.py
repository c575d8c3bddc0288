"""Results as a table: Markdown for the docs, cells for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["HEADER", "cells", "markdown", "quantity"]

HEADER = ["what", "ours", "against", "its", "ratio", "low to high", "at least", "note"]


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row's document, in words."""
    ratio, low, high, target = (row[key] for key in ("ratio", "low", "high", "target"))
    reached = {True: "", False: " (missed)", None: ""}[row["met"]]
    return [
        row["what"],
        quantity(row, row["seconds"]),
        row["against"],
        quantity(row, row["its_seconds"]),
        _ratio(ratio),
        "" if low is None or low == high else f"{_ratio(low)} to {_ratio(high)}",
        "" if target is None else f"{target:g}{reached}",
        row["note"],
    ]


def quantity(row: Mapping[str, Any], seconds: float | None) -> str:
    """Seconds, or what was done in one where the row says how much it was."""
    if seconds is None:
        return ""
    if row["amount"] is None:
        return f"{_number(seconds)} s" if seconds >= 0.1 else f"{_number(seconds * 1e3)} ms"
    return f"{_number(row['amount'] / seconds)} {row['unit']}/s"


def _ratio(value: float | None) -> str:
    return "" if value is None else _number(value)


def _number(value: float) -> str:
    """Three digits, no exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def markdown(document: Mapping[str, Any]) -> str:
    """The whole document: the machine, its rows, how often they were measured."""
    rows: Iterable[Mapping[str, Any]] = document["rows"]
    lines = [_machine(document["machine"]), ""]
    lines += [f"| {' | '.join(HEADER)} |", f"|{' --- |' * len(HEADER)}"]
    lines += [f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells(r))} |" for r in rows]
    return "\n".join(
        [*lines, "", f"`{document['command']}`, {document['seconds'] / 60:.0f} min.", ""]
    )


def _machine(facts: Mapping[str, Any]) -> str:
    gpu = f", {facts['gpu']}" if facts["gpu"] else ", no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{facts['cores']} cores of {facts['processor']}, {facts['memory_bytes'] / 1e9:.0f} GB"
        f"{gpu}; Python {facts['python']}, {versions}. Medians of rounds in which ours and what it "
        "is held against follow one another; ratios are of speeds within a round."
    )
