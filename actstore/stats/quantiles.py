"""Exact quantiles of any amount of data, by counting.

Floating-point numbers are mapped to whole numbers in the same order. Each pass counts one digit
of those that agree with the digits found so far, so that the value of any rank is known after a
few passes over the data, in memory that does not grow with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numba
import numpy as np

from .streaming import LayerSketch, State

__all__ = ["Quantiles", "following", "from_keys", "interpolate", "to_keys"]

_TABLE_NBYTES = 32 * 2**20
_COLUMNS = 64
_HINT_BITS = 10


def to_keys(values: np.ndarray) -> np.ndarray:
    """Whole numbers (uint64) in the order of floating-point ones; NaN is outside the infinities.

    Examples
    --------
    >>> bool((np.diff(to_keys(np.array([-np.inf, -1, 0, 1e-30, 1, np.inf]))) > 0).all())
    True
    """
    bits = _bits(values)
    sign, full = _sign_and_full(bits.dtype.itemsize * 8)
    wide = bits.astype(np.uint64)
    return np.where(wide >= sign, full - wide, wide + sign)


def from_keys(keys: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """The floating-point numbers of keys."""
    bits = np.dtype(dtype).itemsize * 8
    sign, full = _sign_and_full(bits)
    wide = np.where(keys < sign, full - keys, keys - sign)
    return wide.astype(f"u{bits // 8}").view(dtype)


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.dtype.itemsize}")


def _sign_and_full(bits: int) -> tuple[np.uint64, np.uint64]:
    return np.uint64(2 ** (bits - 1)), np.uint64(2**bits - 1)


@dataclass(frozen=True)
class Quantiles:
    """One pass of the search for the values at given fractions of the sorted data.

    Results of the last pass are count, quantile (row, q), interpolated linearly, the sorted values
    on either side, lower and upper, and how far between them, fraction. Those of the others are
    ``next``, the statistic of the next pass. Rows with NaN among the values have NaN.

    Parameters
    ----------
    q : tuple of float
        From 0 to 1.
    groups : ndarray of int (neuron,)
        Row of the result that each neuron goes to.
    dtype : dtype
        Of the values: float16, float32 or float64.
    significant : int
        Leading bits of the values that are not always zero: 16 of the 32 of bfloat16 data.
    most : int
        Upper limit of the number of values in a row.
    limits : tuple of float
        Only values from the first to the second are looked at; NaN inside them is left out too.
    extra : dict
        More results, passed on as they are. ``transform`` among them is applied to the values.
    """

    q: tuple[float, ...]
    groups: np.ndarray
    dtype: np.dtype[Any]
    significant: int
    most: int
    limits: tuple[float, float] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    # How far the search is: leading bits known, and for each row and rank what they are and the
    # rank among the values that share them.
    known: int = 0
    count: np.ndarray | None = None
    prefix: np.ndarray | None = None
    rest: np.ndarray | None = None

    @property
    def rows(self) -> int:
        return int(self.groups.max(initial=0)) + 1

    @property
    def pooled(self) -> bool:
        return self.rows == 1 and "transform" not in self.extra

    @property
    def _kind(self) -> type[np.unsignedinteger[Any]]:
        return np.uint32 if self.most < 2**32 else np.uint64

    @property
    def digit(self) -> int:
        """Bits found in one pass: as many as a bounded table allows, at most 16."""
        cells = _TABLE_NBYTES // (np.dtype(self._kind).itemsize * self.rows * 2 * len(self.q))
        fits = min(16, max(4, cells.bit_length() - 1))
        return -(-self.significant // -(-self.significant // fits))

    @property
    def passes(self) -> int:
        """How often the data are read."""
        return -(-self.significant // self.digit)

    @property
    def _now(self) -> int:
        """Bits found in this pass."""
        return min(self.digit, self.significant - self.known)

    def chunk(self, values_tn: np.ndarray, tokens_t: np.ndarray | None = None) -> State:
        transform = self.extra.get("transform")
        values = values_tn if transform is None else transform(values_tn)
        values = np.ascontiguousarray(values, self.dtype)
        ends = (-np.inf, np.inf) if self.limits is None else self.limits
        low, high = to_keys(np.array(ends, self.dtype))
        prefix, hint = self._looked_for
        table = np.zeros((*prefix.shape, 2**self._now), self._kind)
        shift = 8 * self.dtype.itemsize - self.known - self._now
        outside = _count_digits(
            _bits(values), self.groups, prefix, hint, table, shift, self._now, low, high
        )
        return {"table": table, "outside": outside}

    def from_sketch(self, layer: LayerSketch) -> State:
        """The first pass, of one row: sketches count just this digit."""
        counts = layer.counts().astype(self._kind)
        # Negative numbers first, from the largest magnitude down.
        ordered = np.concatenate([counts[:0x7FFF:-1], counts[:0x8000]])
        return {"table": ordered[None, None], "outside": np.zeros(1, np.int64)}

    @cached_property
    def _looked_for(self) -> tuple[np.ndarray, np.ndarray]:
        """Prefixes in ascending order, and where the first is that ends in given bits."""
        if self.prefix is None:
            return np.zeros((self.rows, 1), np.uint64), np.zeros((self.rows, 1), np.int16)
        prefixes = np.sort(self.prefix, axis=1)
        hint = np.full((self.rows, 2 ** min(self.known, _HINT_BITS)), -1, np.int16)
        ends = (prefixes & np.uint64(hint.shape[1] - 1)).astype(np.int64)
        for k in reversed(range(prefixes.shape[1])):
            hint[np.arange(self.rows), ends[:, k]] = k
        return prefixes, hint

    def combine(self, a: State, b: State) -> State:
        return {name: a[name] + b[name] for name in a}

    def finalize(self, state: State) -> dict[str, Any]:
        if self.prefix is None:
            found = self._begin(state)
        else:
            found = self._narrow(state["table"])
        if found.known < self.significant:
            return {"next": found}
        return found._results()

    def _begin(self, state: State) -> Quantiles:
        table = state["table"]
        count = table.sum(axis=(1, 2), dtype=np.int64)
        if self.limits is None:  # what is outside the infinities is NaN
            count[state["outside"] > 0] = 0
        below, above, _ = _ranks(self.q, count)
        start = replace(
            self,
            count=count,
            prefix=np.zeros((self.rows, 2 * len(self.q)), np.uint64),
            rest=np.concatenate([below, above], axis=1),
        )
        return start._narrow(np.broadcast_to(table, (*start.prefix.shape, table.shape[2])))  # type: ignore[union-attr]

    def _narrow(self, table: np.ndarray) -> Quantiles:
        """Find the next digit of every rank."""
        assert self.prefix is not None and self.rest is not None
        ordered = np.sort(self.prefix, axis=1)
        prefix, rest = np.empty_like(self.prefix), np.empty_like(self.rest)
        for k in range(self.prefix.shape[1]):
            first = (ordered < self.prefix[:, k, None]).sum(axis=1)
            own = np.take_along_axis(table, first[:, None, None], 1)[:, 0].astype(np.int64)
            sums = own.cumsum(axis=1)
            digit = (sums <= self.rest[:, k, None]).sum(axis=1).clip(max=sums.shape[1] - 1)
            before = np.take_along_axis(sums - own, digit[:, None], 1)[:, 0]
            rest[:, k] = self.rest[:, k] - before
            prefix[:, k] = (self.prefix[:, k] << np.uint64(self._now)) | digit.astype(np.uint64)
        return replace(self, known=self.known + self._now, prefix=prefix, rest=rest)

    def _results(self) -> dict[str, Any]:
        assert self.prefix is not None and self.count is not None
        bits = 8 * self.dtype.itemsize
        low = np.uint64(bits - self.significant)
        keys = self.prefix << low
        # The keys of negative numbers are their bits turned over.
        keys |= np.where(keys < _sign_and_full(bits)[0], (np.uint64(1) << low) - np.uint64(1), 0)
        values = from_keys(keys, self.dtype)
        values[self.count == 0] = np.nan
        lower, upper = np.split(values, 2, axis=1)
        fraction = _ranks(self.q, self.count)[2]
        return {
            **self.extra,
            "count": self.count,
            "quantile": interpolate(lower.astype(float), upper.astype(float), fraction),
            "lower": lower,
            "upper": upper,
            "fraction": fraction,
        }


def following(results: dict[str, Any]) -> Quantiles:
    """The statistic of the next pass."""
    return results["next"]


def _ranks(q: tuple[float, ...], count: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks on either side of fractions q, and how far between them (row, q)."""
    last = np.maximum(count, 1)[:, None] - 1
    at = last * np.asarray(q)
    below = np.floor(at)
    above = np.minimum(below + 1, last)
    return below.astype(np.int64), above.astype(np.int64), at - below


def interpolate(lower: np.ndarray, upper: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    """Values between two, from whichever is nearer, as numpy does."""
    with np.errstate(invalid="ignore"):
        step = upper - lower
        return np.where(fraction < 0.5, lower + step * fraction, upper - step * (1 - fraction))


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _count_digits(bits, groups, prefixes, hint, table, shift, width, low, high):  # type: ignore[no-untyped-def]
    """Count one digit of the values that begin with a prefix; gives the count outside limits.

    Ranks that share a prefix are counted once, in the place of the first.
    """
    tokens, columns = bits.shape
    n = prefixes.shape[1]
    size = np.uint64(8 * bits.itemsize)
    sign = np.uint64(1) << (size - np.uint64(1))
    full = sign - np.uint64(1) + sign
    down, digit = np.uint64(shift), np.uint64(width)
    mask = (np.uint64(1) << digit) - np.uint64(1)
    end = np.uint64(hint.shape[1] - 1)
    begins = down + digit == size  # nothing is known yet
    outside = np.zeros(len(prefixes), np.int64)
    for left in range(0, columns, _COLUMNS):
        right = min(columns, left + _COLUMNS)
        for i in range(tokens):
            for j in range(left, right):
                b = np.uint64(bits[i, j])
                key = full - b if b >= sign else b + sign
                g = groups[j]
                if key < low or key > high:
                    outside[g] += 1
                    continue
                place = np.int64(0)
                if not begins:
                    prefix = key >> down >> digit
                    place = np.int64(hint[g, np.int64(prefix & end)])
                    if place < 0:
                        continue
                    while place < n and prefixes[g, place] < prefix:
                        place += 1
                    if place == n or prefixes[g, place] != prefix:
                        continue
                table[g, place, np.int64((key >> down) & mask)] += 1
    return outside
