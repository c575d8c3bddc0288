"""Answers from sketches, whatever the size of the store."""

from __future__ import annotations

from .rounds import Reference, Row, compare, seconds
from .setting import Setting

__all__ = ["sketched"]

LIMIT = 0.05


def sketched(setting: Setting) -> list[Row]:
    """Statistics of every neuron, and the tokens at a layer's extremes."""
    import actstore

    store = actstore.open(setting.store)
    limit = Reference(f"{LIMIT:g} s", lambda: LIMIT)

    def moments() -> None:
        actstore.compute(actstore.moments(store, tokens="position > 0"))

    def top() -> None:
        actstore.compute(actstore.top_tokens(store, layers=0))

    ours = {
        "sketch: moments of every neuron, position > 0": (seconds(moments), {limit.name: 1}),
        "sketch: top 20 tokens of every neuron of a layer": (seconds(top), {limit.name: 1}),
    }
    return compare("sketches", ours, [limit], setting.rounds)
