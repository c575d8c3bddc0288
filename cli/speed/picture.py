"""Results as a picture: ratios beside their targets, and growth with tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw"]

MET, MISSED, FREE, MARK = "#1b7f79", "#c4512d", "#7a8793", "#222222"
KINDS = ("#3a5ba0", "#a0783a", "#7b3aa0")


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Write a PNG or SVG of a document of `actstore bench all`.

    Parameters
    ----------
    document : mapping
        What ``--json`` prints.
    path : Path
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grown = [r for r in document["rows"] if r["group"] == "growth"]
    held = [r for r in document["rows"] if r["ratio"] is not None and r["group"] != "growth"]
    tall = max(3.2, 0.3 * len(held) + 1.4)
    figure = Figure(figsize=(12.5, tall), layout="constrained")
    FigureCanvasAgg(figure)
    if grown and held:
        grid = figure.add_gridspec(2, 2, width_ratios=(3, 1.3))
        _ratios(figure.add_subplot(grid[:, 0]), held)
        _growth(figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1]), grown)
    elif held:
        _ratios(figure.add_subplot(), held)
    elif grown:
        time, memory = figure.subplots(1, 2)
        _growth(time, memory, grown)
    facts = document["machine"]
    gpu = facts["gpu"] or "no GPU"
    figure.suptitle(
        f"actstore bench all: {facts['cores']} cores of {facts['processor']}, {gpu}", fontsize=11
    )
    figure.savefig(path, dpi=130)


def _ratios(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """A dot for each median, a line from least to greatest, a tick where it is to be."""
    for y, row in enumerate(rows):
        colour = {True: MET, False: MISSED, None: FREE}[row["met"]]
        low, high = row["low"] or row["ratio"], row["high"] or row["ratio"]
        axes.plot([low, high], [y, y], color=colour, lw=2, alpha=0.5, solid_capstyle="round")
        axes.plot(row["ratio"], y, "o", color=colour, ms=6)
        if row["target"] is not None:
            axes.plot(row["target"], y, "|", color=MARK, ms=13, mew=2)
    axes.axvline(1, color="#bbbbbb", lw=1, zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("times as fast (tick: at least; line: least to greatest of the rounds)")
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['what']}\n  vs {row['against']}"


def _growth(time: Any, memory: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    for kind, colour in zip(kinds, KINDS, strict=False):
        own = [row for row in rows if _kind(row) == kind]
        tokens = [row["amount"] for row in own]
        took = [row["seconds"] for row in own]
        time.plot(tokens, took, "o-", color=colour, label=kind)
        time.plot(tokens, [took[0] * n / tokens[0] for n in tokens], ":", color=colour, lw=1)
        memory.plot(tokens, [row["peak_bytes"] / 1e9 for row in own], "o-", color=colour)
    for axes, name in ((time, "seconds"), (memory, "peak memory, GB")):
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e3:g}k")
        axes.grid(color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
    time.legend(frameon=False, fontsize=8, title="dotted: in proportion", title_fontsize=8)
    memory.set_xlabel("tokens")


def _kind(row: Mapping[str, Any]) -> str:
    return row["what"].rpartition(", ")[0]
