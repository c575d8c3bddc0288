"""Answers from sketches: where the tokens asked are a union of strata, nothing need be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..sketched import Sketches, union_of_strata
from ..stats.streaming import Sketchable, State
from ..store import Store

__all__ = ["SketchedLayer", "from_sketch", "strata_of_groups"]


@dataclass(frozen=True)
class SketchedLayer:
    """One layer's sketches over a union of strata, as statistics ask for them.

    Attributes
    ----------
    sketched : Sketches
    layer_index : int
    strata : tuple of int
    neurons : ndarray of int
    dtype : str
        Of the values: "float32", "float16" or "bfloat16".
    """

    sketched: Sketches
    layer_index: int
    strata: tuple[int, ...]
    neurons: np.ndarray
    dtype: str

    def moments(self) -> State:
        """Moments of the neurons asked."""
        whole = self.sketched.moments(self.strata, self.layer_index)
        return {name: values[self.neurons] for name, values in whole.items()}

    def counts(self) -> np.ndarray:
        """The layer's values by their upper 16 bits, (65536,)."""
        return self.sketched.counts(self.strata, self.layer_index)

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """The layer's distinct 16-bit values and how often they come."""
        counts = self.counts()
        used = np.flatnonzero(counts)
        if self.dtype == "float16":
            return used.astype(np.uint16).view(np.float16).astype(np.float64), counts[used]
        return (used.astype(np.uint32) << 16).view(np.float32).astype(np.float64), counts[used]

    def extremes(self, largest: bool) -> tuple[np.ndarray, np.ndarray]:
        """Values and tokens (neuron, rank), best first; empty places NaN and -1."""
        values, tokens = self.sketched.extremes(self.strata, self.layer_index, largest)
        return values[self.neurons], tokens[self.neurons]


def strata_of_groups(
    store: Store, mask: np.ndarray | None, codes: np.ndarray | None, n_groups: int
) -> list[tuple[int, ...]] | None:
    """The strata that make up each group of a selection.

    Returns
    -------
    list of tuple of int, or None
        None where a group cuts through a stratum, or where the store has no sketches or holds
        NaN or inf, of which sketches know too little.
    """
    if store.strata is None or store.attrs.get("nonfinite", 0):
        return None
    names, classes = store.strata
    chosen = []
    for group in range(n_groups):
        own = mask
        if codes is not None:
            own = codes == group if mask is None else mask & (codes == group)
        strata = union_of_strata(classes, len(names), own)
        if strata is None:
            return None
        chosen.append(tuple(strata))
    return chosen


def from_sketch(
    layers: Sequence[SketchedLayer], statistics: Sequence[Sketchable | None]
) -> list[list[State | None]]:
    """What `run_lane` gives for one statistic a group, from sketches."""
    return [
        [
            None if not layer.strata or statistic is None else statistic.from_sketch(layer)
            for layer, statistic in zip(layers, statistics, strict=True)
        ]
    ]
