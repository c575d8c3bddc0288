"""The fused kernel behind sketches: one pass over a chunk while it is in the cache.

Moments, extremes, a table of counts, the largest and smallest values, row norms: each of them
alone would read the data again.
"""

from __future__ import annotations

import numba
import numpy as np

from .moments import _in_reach, _merge_exactly, _merge_tile

__all__ = ["NO_TOKEN", "insert_extremes", "merge_limits", "sketch_chunk"]

NO_TOKEN = np.int64(2**62)
"""Token number of an empty place in a list of extreme values; sorts behind every token."""

_TILE_ROWS = 128


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
def sketch_chunk(x, keys, rows, first_token, left, moments, counts, norms, limits, values, tokens):  # type: ignore[no-untyped-def]
    """Add the values of some rows of a chunk to a sketch.

    Parameters
    ----------
    x : float32 (row, column)
        The chunk's values.
    keys : uint16 (row, column)
        Entry of the count table for each value.
    rows : int64 (k,)
        Rows that belong to the stratum, ascending.
    first_token : int
        Token number of the chunk's first row.
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
    values, tokens : float32, int64 (2, neuron, k)
        The largest and smallest values and their tokens, best first, ties to the earlier token;
        updated in place. Empty places hold ∓inf and `NO_TOKEN`.
    """
    columns = x.shape[1]
    shift = np.empty(columns, np.float32)
    sums = np.empty((4, columns), np.float32)
    low = np.empty(columns, np.float32)
    high = np.empty(columns, np.float32)
    zeros = np.empty(columns, np.int32)
    positives = np.empty(columns, np.int32)
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
            begin = first_token + tile[0]
            if _may_enter(high[j], begin, limits[0, at], values[0, at, -1], tokens[0, at, -1], 1):
                _enter(x, tile, j, first_token, limits[0, at], values[0, at], tokens[0, at], 1)
            if _may_enter(low[j], begin, limits[1, at], values[1, at, -1], tokens[1, at, -1], -1):
                _enter(x, tile, j, first_token, limits[1, at], values[1, at], tokens[1, at], -1)


@numba.njit(nogil=True, cache=True)
def _may_enter(best, token, limit, worst, worst_token, sign):  # type: ignore[no-untyped-def]
    """Whether the best value of a tile could be listed; ties go to the earlier token."""
    b, w = sign * best, sign * worst
    return b >= sign * limit and (b > w or (b == w and token < worst_token))


@numba.njit(nogil=True, cache=True)
def _enter(x, tile, j, first_token, limit, values, tokens, sign):  # type: ignore[no-untyped-def]
    """Insert what belongs into one sorted list."""
    k = len(values)
    for i in tile:
        v = sign * x[i, j]
        token = first_token + i
        w = sign * values[k - 1]
        if not (v >= sign * limit and (v > w or (v == w and token < tokens[k - 1]))):
            continue
        at = k - 1
        while at > 0:
            u = sign * values[at - 1]
            if u > v or (u == v and tokens[at - 1] < token):
                break
            values[at] = values[at - 1]
            tokens[at] = tokens[at - 1]
            at -= 1
        values[at] = x[i, j]
        tokens[at] = token


@numba.njit(nogil=True, cache=True)
def merge_limits(running, values):  # type: ignore[no-untyped-def]
    """Merge lists of extreme values, largest and smallest, into those of earlier blocks.

    Parameters
    ----------
    running, values : float32 (2, neuron, k)
        Best first; `running` is updated in place.
    """
    k = running.shape[2]
    merged = np.empty(k, np.float32)
    for side in range(2):
        sign = 1 if side == 0 else -1
        for j in range(running.shape[1]):
            old, new = running[side, j], values[side, j]
            if not sign * new[0] > sign * old[k - 1]:
                continue
            a = b = 0
            for i in range(k):
                if sign * old[a] >= sign * new[b]:
                    merged[i] = old[a]
                    a += 1
                else:
                    merged[i] = new[b]
                    b += 1
            old[:] = merged


@numba.njit(nogil=True, cache=True)
def insert_extremes(values, tokens, places, new_values, new_tokens):  # type: ignore[no-untyped-def]
    """Insert listed extremes into sorted lists; ties go to the earlier token.

    Parameters
    ----------
    values, tokens : float32, int64 (list, k)
        Flattened lists, the first half largest-first, the second smallest-first; in place.
    places : int64 (n,)
        List of each new entry.
    new_values, new_tokens : float32, int64 (n,)
    """
    lists, k = values.shape
    for n in range(len(places)):
        p = places[n]
        sign = 1 if 2 * p < lists else -1
        v, token = sign * new_values[n], new_tokens[n]
        own, own_tokens = values[p], tokens[p]
        at = k
        while at > 0:
            u = sign * own[at - 1]
            if u > v or (u == v and own_tokens[at - 1] < token):
                break
            at -= 1
            if at < k - 1:
                own[at + 1] = own[at]
                own_tokens[at + 1] = own_tokens[at]
        if at < k:
            own[at] = new_values[n]
            own_tokens[at] = token
