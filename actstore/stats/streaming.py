"""The one form of a streaming statistic: chunk, combine, finalize.

A `Statistic` makes a state of a chunk of values, merges two states, and turns the last state into
named arrays. States are dictionaries of arrays: small, picklable, and the same whatever order of
threads made them, because they are combined in the order of the data.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Protocol

import numpy as np

__all__ = ["State", "Statistic", "fold"]

State = dict[str, np.ndarray]


class Statistic(Protocol):
    """What every streaming statistic has."""

    def chunk(self, values_tn: np.ndarray) -> State:
        """State of a chunk, (token, neuron)."""
        ...

    def combine(self, a: State, b: State) -> State:
        """State of the values of both, `a` before `b`."""
        ...

    def finalize(self, state: State) -> dict[str, np.ndarray]:
        """Named results."""
        ...


def fold(statistic: Statistic, states: Iterable[State]) -> State:
    """Combine states from left to right."""
    return reduce(statistic.combine, states)
