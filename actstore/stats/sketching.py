"""The fused kernel behind sketches: one pass over a chunk while it is in the cache.

Moments, extremes, a table of counts, the largest and smallest values, row norms: each of them
alone would read the data again.
"""

from __future__ import annotations

import numba
import numpy as np

from .moments import _in_reach, _merge_exactly, _merge_tile

__all__ = [
    "NO_TOKEN",
    "extreme_key",
    "insert_extremes",
    "merge_limits",
    "sketch_chunk",
    "split_keys",
]


NO_TOKEN = np.int64(2**62)
"""Token number of an empty place in a list of extreme values; sorts behind every token."""

_TILE_ROWS = 128


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
def sketch_chunk(x, keys, rows, top_row, left, moments, counts, norms, limits, extremes):  # type: ignore[no-untyped-def]
    """Add the values of some rows of a chunk to a sketch.

    Parameters
    ----------
    x : float32 (row, column)
        The chunk's values.
    keys : uint16 (row, column)
        Entry of the count table for each value.
    rows : int64 (k,)
        Rows that belong to the stratum, ascending.
    top_row : int
        Row of the shard at which the chunk begins.
    left : int
        Neuron of the chunk's first column.
    moments : float64 (9, neuron)
        As in `stats.moments`, updated in place.
    counts : uint64 (65536,)
        Updated in place.
    norms : float64 (row,)
        Sums of squares by row of the chunk, updated in place.
    limits : float32 (2, neuron)
        Values that the largest and smallest lists of earlier blocks already beat: nothing below
        the first or above the second can matter.
    extremes : uint64 (2, neuron, k)
        The largest and the smallest values of the shard as `extreme_key`, best first, 0 for none;
        updated in place.
    """
    columns = x.shape[1]
    shift = np.empty(columns, np.float32)
    sums = np.empty((4, columns), np.float32)
    low = np.empty(columns, np.float32)
    high = np.empty(columns, np.float32)
    zeros = np.empty(columns, np.int32)
    positives = np.empty(columns, np.int32)
    bounds = np.empty((2, columns), np.float32)
    beat = np.empty((2, columns), np.float32)
    flags = np.zeros(-(-columns // 8) * 8, np.uint8)
    words = flags.view(np.uint64)  # eight columns, none of whose values is extreme, at a glance
    last = extremes.shape[2] - 1
    for j in range(columns):
        for side in range(2):
            at, away = left + j, np.float32(-np.inf if side == 0 else np.inf)
            bounds[side, j] = np.nextafter(limits[side, at], away)
            beat[side, j] = _to_beat(bounds[side, j], extremes[side, at, last], side)
    for top in range(0, len(rows), _TILE_ROWS):
        tile = rows[top : top + _TILE_ROWS]
        n = len(tile)
        shift[:] = 0
        sums[:] = 0
        zeros[:] = 0
        positives[:] = 0
        low[:] = x[tile[0]]
        high[:] = x[tile[0]]
        for i in tile:
            row = x[i]
            square = np.float32(0)
            for j in range(columns):
                shift[j] += row[j]
                square += row[j] * row[j]
            norms[i] += square
        for j in range(columns):
            shift[j] /= np.float32(n)
        for i in tile:
            row = x[i]
            for j in range(columns):
                d = row[j] - shift[j]
                dd = d * d
                sums[0, j] += d
                sums[1, j] += dd
                sums[2, j] += dd * d
                sums[3, j] += dd * dd
                low[j] = min(low[j], row[j])
                high[j] = max(high[j], row[j])
                zeros[j] += row[j] == 0
                positives[j] += row[j] > 0
        for i in tile:
            for j in range(columns):
                counts[keys[i, j]] += 1
        for j in range(columns):
            at = left + j
            if _in_reach(shift[j], low[j], high[j]):
                _merge_tile(moments, at, n, shift[j], sums[:, j])
            else:
                _merge_exactly(moments, at, x[tile, j])
            a, b = np.float64(low[j]), np.float64(high[j])
            moments[5, at] = moments[5, at] if moments[5, at] <= a else a
            moments[6, at] = moments[6, at] if moments[6, at] >= b else b
            moments[7, at] += zeros[j]
            moments[8, at] += positives[j]
        entering = False
        for j in range(columns):
            entering |= high[j] > beat[0, j] or low[j] < beat[1, j]
        if not entering:
            continue
        for i in tile:
            row = x[i]
            for j in range(columns):
                flags[j] = np.uint8(row[j] > beat[0, j]) | np.uint8(row[j] < beat[1, j])
            for w in range(len(words)):
                if not words[w]:
                    continue
                for j in range(8 * w, min(8 * w + 8, columns)):
                    at = left + j
                    if row[j] > beat[0, j]:
                        _insert(extremes, 0, at, extreme_key(row[j], top_row + i, 0))
                        beat[0, j] = _to_beat(bounds[0, j], extremes[0, at, last], 0)
                    if row[j] < beat[1, j]:
                        _insert(extremes, 1, at, extreme_key(row[j], top_row + i, 1))
                        beat[1, j] = _to_beat(bounds[1, j], extremes[1, at, last], 1)


@numba.njit(nogil=True, cache=True)
def extreme_key(value, row, side):  # type: ignore[no-untyped-def]
    """A value and its row as one number: larger is better, ties go to the earlier row.

    Parameters
    ----------
    value : float32
    row : int
        Below 2^32 - 1.
    side : int
        0 where larger values are better, 1 where smaller are.
    """
    bits = np.uint64(np.float32(value).view(np.uint32))
    if value == 0:  # -0.0 is no less than 0.0
        bits = np.uint64(0)
    bits ^= np.uint64(0xFFFFFFFF) if bits >> np.uint64(31) else np.uint64(0x80000000)
    if side:
        bits ^= np.uint64(0xFFFFFFFF)
    return (bits << np.uint64(32)) | (np.uint64(0xFFFFFFFF) - np.uint64(row))


def split_keys(keys: np.ndarray, smallest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and rows of keys, and of which side each is.

    Examples
    --------
    >>> keys = np.array([extreme_key(np.float32(-2.5), 7, 1)], np.uint64)
    >>> split_keys(keys, np.array([True]))
    (array([-2.5], dtype=float32), array([7]))
    """
    bits = (keys >> np.uint64(32)).astype(np.uint32)
    bits = np.where(smallest, ~bits, bits)
    bits = np.where(bits >> np.uint32(31), bits & np.uint32(0x7FFFFFFF), ~bits)
    return bits.view(np.float32), 0xFFFFFFFF - (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


@numba.njit(nogil=True, cache=True)
def _value(key, side):  # type: ignore[no-untyped-def]
    bits = key >> np.uint64(32)
    if side:
        bits ^= np.uint64(0xFFFFFFFF)
    bits ^= np.uint64(0x80000000) if bits >> np.uint64(31) else np.uint64(0xFFFFFFFF)
    return np.uint32(bits).view(np.float32)


@numba.njit(nogil=True, cache=True)
def _to_beat(limit, worst, side):  # type: ignore[no-untyped-def]
    """What a value must be above (or below, for the smallest) to be listed.

    A tie with a limit may be listed, one with the last of a full list not: rows come in ascending
    order.
    """
    if side == 0:
        return limit if worst == 0 else max(limit, _value(worst, 0))
    return limit if worst == 0 else min(limit, _value(worst, 1))


@numba.njit(nogil=True, cache=True)
def _insert(extremes, side, column, key):  # type: ignore[no-untyped-def]
    """Insert a key into a list, best first, if it belongs there."""
    at = extremes.shape[2] - 1
    if key <= extremes[side, column, at]:
        return
    while at > 0 and extremes[side, column, at - 1] < key:
        extremes[side, column, at] = extremes[side, column, at - 1]
        at -= 1
    extremes[side, column, at] = key


@numba.njit(nogil=True, cache=True)
def merge_limits(running, limits, extremes):  # type: ignore[no-untyped-def]
    """Merge lists of extremes into those of earlier blocks, and take the limits from them.

    Parameters
    ----------
    running, extremes : uint64 (2, neuron, k)
        Keys, best first; `running` is updated in place, and its rows mean nothing.
    limits : float32 (2, neuron)
        Of full lists the last value; updated in place.
    """
    k = running.shape[2]
    merged = np.empty(k, np.uint64)
    for side in range(2):
        for j in range(running.shape[1]):
            old, new = running[side, j], extremes[side, j]
            if new[0] <= old[k - 1]:
                continue
            a = b = 0
            for i in range(k):
                if old[a] >= new[b]:
                    merged[i] = old[a]
                    a += 1
                else:
                    merged[i] = new[b]
                    b += 1
            old[:] = merged
            if old[k - 1] != 0:
                limits[side, j] = _value(old[k - 1], side)


@numba.njit(nogil=True, cache=True)
def insert_extremes(values, tokens, places, new_values, new_tokens):  # type: ignore[no-untyped-def]
    """Merge listed extremes into sorted lists; ties go to the earlier token.

    Parameters
    ----------
    values, tokens : float32, int64 (list, k)
        Flattened lists, the first half largest-first, the second smallest-first; in place.
    places : int64 (n,)
        List of each new entry; those of a list lie together, best first.
    new_values, new_tokens : float32, int64 (n,)
    """
    lists, k = values.shape
    merged, merged_tokens = np.empty(k, np.float32), np.empty(k, np.int64)
    n = 0
    while n < len(places):
        p = places[n]
        end = n
        while end < len(places) and places[end] == p:
            end += 1
        sign = 1 if 2 * p < lists else -1
        own, own_tokens = values[p], tokens[p]
        a = 0
        for i in range(k):
            old = own_tokens[a]
            if n < end:
                u, v = sign * own[a], sign * new_values[n]
                if old == NO_TOKEN or v > u or (v == u and new_tokens[n] < old):
                    merged[i], merged_tokens[i] = new_values[n], new_tokens[n]
                    n += 1
                    continue
            merged[i], merged_tokens[i] = own[a], old
            a += 1
        own[:] = merged
        own_tokens[:] = merged_tokens
        n = end
