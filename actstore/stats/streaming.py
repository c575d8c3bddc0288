"""The one form of a streaming statistic: chunk, combine, finalize.

A `Statistic` makes a state of a chunk of values, merges two states, and turns the last state into
named arrays. States are dictionaries of arrays: small, picklable, and the same whatever order of
threads made them, because they are combined in the order of the data.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any, Protocol

import numpy as np

__all__ = ["LayerSketch", "Sketchable", "State", "Statistic", "fold"]

State = dict[str, np.ndarray]


class LayerSketch(Protocol):
    """A layer's sketches over the tokens asked, as a statistic's `from_sketch` gets them."""

    def moments(self) -> State:
        """Moments of the neurons asked, as `stats.moments` has them."""
        ...

    def counts(self) -> np.ndarray:
        """All the layer's values by their upper 16 bits, (65536,)."""
        ...

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """All the layer's distinct values and how often they come, where they have 16 bits."""
        ...

    def extremes(self, largest: bool) -> tuple[np.ndarray, np.ndarray]:
        """Largest or smallest values and their tokens, (neuron, rank); empty: NaN and -1."""
        ...


class Statistic(Protocol):
    """What every streaming statistic has.

    One that makes no difference between neurons may say so by a true attribute ``pooled``: its
    chunks may then hold some of the neurons only, whichever are at hand, one upon the other.
    """

    def chunk(self, values_tn: np.ndarray, tokens_t: np.ndarray) -> State:
        """State of a chunk, (token, neuron), and of its tokens' numbers."""
        ...

    def combine(self, a: State, b: State) -> State:
        """State of the values of both, `a` before `b`."""
        ...

    def finalize(self, state: State) -> dict[str, Any]:
        """Named results."""
        ...


class Sketchable(Statistic, Protocol):
    """A statistic whose state sketches can give, too."""

    def from_sketch(self, layer: LayerSketch) -> State:
        """The state of all the values asked, exactly."""
        ...


def fold(statistic: Statistic, states: Iterable[State]) -> State:
    """Combine states from left to right."""
    return reduce(statistic.combine, states)
