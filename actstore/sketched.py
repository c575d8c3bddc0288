"""Read a sealed store's sketches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any, Protocol

import numpy as np

from .errors import CorruptStoreError
from .guard import guard_at
from .root import AGAIN
from .schema import MOMENTS, STRATA, Categorical
from .stats.moments import merge_moments
from .stats.streaming import State

__all__ = ["Sketched", "Sketches", "strata_codes", "union_of_strata"]


class Sketches(Protocol):
    """What is known of a stage without its values: see `Sketched`, which reads it of a store."""

    def moments(self, strata: Sequence[int], layer_index: int) -> State: ...
    def counts(self, strata: Sequence[int], layer_index: int) -> np.ndarray: ...
    def extremes(
        self, strata: Sequence[int], layer_index: int, largest: bool
    ) -> tuple[np.ndarray, np.ndarray]: ...
    def norms(self, layer_index: int) -> np.ndarray: ...


def strata_codes(
    position: np.ndarray, special: np.ndarray, label: Categorical | None = None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Sort tokens into strata by position, special tokens and one label.

    Returns
    -------
    names : tuple of str
        "first", "special", "rest"; with a label "first:VALUE" ...
    codes : ndarray of uint16 (token,)

    Examples
    --------
    >>> strata_codes(np.array([0, 1, 2]), np.array([True, False, True]))[1].tolist()
    [0, 2, 1]
    """
    codes = np.where(position == 0, 0, np.where(special, 1, 2)).astype(np.uint16)
    if label is None:
        return STRATA, codes
    names = tuple(f"{name}:{value}" for value in label.values for name in STRATA)
    return names, (codes + len(STRATA) * label.codes).astype(np.uint16)


def union_of_strata(codes: np.ndarray, n_strata: int, mask: np.ndarray | None) -> list[int] | None:
    """The strata that a selection of tokens is the union of; None where it cuts through one.

    Examples
    --------
    >>> union_of_strata(np.array([0, 2, 2, 0]), 3, np.array([False, True, True, False]))
    [2]
    """
    if mask is None:
        return list(range(n_strata))
    chosen = np.bincount(codes[mask], minlength=n_strata)
    whole = np.bincount(codes, minlength=n_strata)
    if ((chosen > 0) & (chosen < whole)).any():
        return None
    return np.flatnonzero(chosen).tolist()


@dataclass(frozen=True)
class Sketched:
    """One stage's sketches. Holds a path, so it can be sent to workers.

    Attributes
    ----------
    path, stamp, stage : str
        Where the store is, and what its root was, so that nothing of another store that lay there
        before is taken for its.
    """

    path: str
    stamp: str
    stage: str

    def moments(self, strata: Sequence[int], layer_index: int) -> State:
        """Moments of a union of strata, each (neuron,)."""
        table = _read(self.path, self.stamp, f"sketch/{self.stage}/moments")[:, :, layer_index]
        return reduce(merge_moments, (dict(zip(MOMENTS, table[:, s], strict=True)) for s in strata))

    def counts(self, strata: Sequence[int], layer_index: int) -> np.ndarray:
        """Values by their upper 16 bits, (65536,)."""
        tables = _read(self.path, self.stamp, f"sketch/{self.stage}/counts")
        return tables[list(strata), layer_index].sum(0)

    def extremes(
        self, strata: Sequence[int], layer_index: int, largest: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """The largest or smallest values and their tokens, (neuron, rank), best first.

        Empty places are NaN and -1.
        """
        side = "largest" if largest else "smallest"
        chosen = list(strata)
        values, tokens = (
            np.asarray(self._array(f"{side}_{what}")[:, layer_index])[chosen]
            for what in ("value", "token")
        )
        if tokens.size and not -1 <= tokens.min() <= tokens.max() < self._array("norm").shape[1]:
            raise CorruptStoreError(
                f"sketch/{self.stage}/{side}_token of {self.path} names tokens that the store does "
                f"not have. {AGAIN}"
            )
        ranks = values.shape[-1]
        values = values.swapaxes(0, 1).reshape(values.shape[1], -1)
        tokens = tokens.swapaxes(0, 1).reshape(tokens.shape[1], -1)
        # Empty places last, then by value, then the earlier token.
        order = np.lexsort((tokens, -values if largest else values, tokens < 0), axis=1)[:, :ranks]
        return np.take_along_axis(values, order, 1), np.take_along_axis(tokens, order, 1)

    def norms(self, layer_index: int) -> np.ndarray:
        """Euclidean norm of each token, (token,)."""
        return np.asarray(self._array("norm")[layer_index])

    def _array(self, name: str) -> Any:
        return guard_at(self.path, self.stamp).array(f"sketch/{self.stage}/{name}")


@lru_cache(maxsize=16)
def _read(path: str, stamp: str, key: str) -> np.ndarray:
    """A small array, whole; a sealed store does not change."""
    return np.asarray(guard_at(path, stamp).array(key)[:])
