"""The groups of measurements, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from .covariance import covariance
from .dumping import dumping, other_ways
from .growth import growth
from .histograms import histograms
from .information import information
from .loading import loading
from .machine import machine
from .opening import opening
from .reading import reading
from .rounds import Row
from .setting import Setting
from .similarity import similarity
from .sketched import sketched
from .writing import writing

__all__ = ["GROUPS", "measure"]

GROUPS: dict[str, Callable[[Setting], Iterable[Row]]] = {
    "machine": machine,
    "dump": dumping,
    "ways": other_ways,
    "writer": writing,
    "reading": reading,
    "sketches": sketched,
    "histograms": histograms,
    "information": information,
    "similarity": similarity,
    "covariance": covariance,
    "loader": loading,
    "open": opening,
    "growth": growth,
}


def measure(setting: Setting, names: Iterable[str]) -> Iterator[Row]:
    """Rows of some groups, as they come."""
    for name in names:
        yield from GROUPS[name](setting)
