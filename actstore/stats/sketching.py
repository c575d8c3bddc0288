"""The fused kernel behind sketches: one pass over a chunk while it is in the cache.

Moments, extremes, a table of counts, the largest and smallest values, row norms: each of them
alone would read the data again.
"""

from __future__ import annotations

import numba
import numpy as np

from .moments import _in_reach, _merge_exactly, _merge_tile

__all__ = [
    "compact_lists",
    "extreme_key",
    "insert_extremes",
    "merge_limits",
    "sketch_chunk",
]


_TILE_ROWS = 256
_GROUP_ROWS = 16
"""Rows of a tile whose largest and smallest values are kept until the chunk's are listed."""


@numba.njit(nogil=True, cache=True, error_model="numpy")
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
        updated in place. NaN is in neither, -inf not among the largest, inf not among the smallest.
    """
    columns, ranks = x.shape[1], extremes.shape[2]
    groups = -(-len(rows) // _GROUP_ROWS)
    ends = np.empty((groups, 2, columns), np.float32)
    sums = np.empty((5, columns), np.float32)
    signs = np.empty((2, columns), np.int32)
    for top in range(0, len(rows), _TILE_ROWS):
        tile = rows[top : top + _TILE_ROWS]
        tile_ends = ends[top // _GROUP_ROWS : -(-(top + len(tile)) // _GROUP_ROWS)]
        _sum_tile(x, tile, sums, signs, tile_ends, norms)
        _merge_sums(x, tile, sums, signs, tile_ends, left, moments)
        for i in tile:
            for j in range(columns):
                counts[keys[i, j]] += 1
    bounds = np.empty((2, columns), np.float32)
    beat = np.empty((2, columns), np.float32)
    for side in range(2):
        known = limits[side, left : left + columns].copy()
        if groups >= ranks and 2 * np.isinf(known).sum() > columns:  # else earlier blocks know
            _reach(ends, side, ranks, known)
        away = np.float32(-np.inf if side == 0 else np.inf)
        for j in range(columns):
            bounds[side, j] = np.nextafter(known[j], away)
            beat[side, j] = _to_beat(bounds[side, j], extremes[side, left + j, ranks - 1], side)
    _list_extremes(x, rows, top_row, left, ends, bounds, beat, extremes)


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
def _sum_tile(x, tile, sums, signs, ends, norms):  # type: ignore[no-untyped-def]
    """Sums of powers about the tile's mean (and that), zeros and positives, groups' ends, norms.

    Four rows at a time, each as an array of its own: so the sums are loaded and stored less.
    """
    n, columns = len(tile), x.shape[1]
    fours = n // 4 * 4
    sums[:] = 0
    signs[:] = 0
    shift = sums[4]
    for i in range(0, fours, 4):
        p, q, r, s = x[tile[i]], x[tile[i + 1]], x[tile[i + 2]], x[tile[i + 3]]
        a = b = c = d = np.float32(0)
        for j in range(columns):
            shift[j] += (p[j] + q[j]) + (r[j] + s[j])
            a += p[j] * p[j]
            b += q[j] * q[j]
            c += r[j] * r[j]
            d += s[j] * s[j]
        norms[tile[i]] += a
        norms[tile[i + 1]] += b
        norms[tile[i + 2]] += c
        norms[tile[i + 3]] += d
    for i in tile[fours:]:
        p, a = x[i], np.float32(0)
        for j in range(columns):
            shift[j] += p[j]
            a += p[j] * p[j]
        norms[i] += a
    for j in range(columns):
        shift[j] /= np.float32(n)
    for i in range(0, fours, 4):
        p, q, r, s = x[tile[i]], x[tile[i + 1]], x[tile[i + 2]], x[tile[i + 3]]
        high, low = ends[i // _GROUP_ROWS, 0], ends[i // _GROUP_ROWS, 1]
        if i % _GROUP_ROWS == 0:
            high[:] = -np.inf
            low[:] = np.inf
        for j in range(columns):
            t, u, v, w = p[j], q[j], r[j], s[j]
            d, e, f, g = t - shift[j], u - shift[j], v - shift[j], w - shift[j]
            dd, ee, ff, gg = d * d, e * e, f * f, g * g
            sums[0, j] += (d + e) + (f + g)
            sums[1, j] += (dd + ee) + (ff + gg)
            sums[2, j] += (dd * d + ee * e) + (ff * f + gg * g)
            sums[3, j] += (dd * dd + ee * ee) + (ff * ff + gg * gg)
            high[j] = max(max(max(max(high[j], t), u), v), w)  # in this order, which leaves out NaN
            low[j] = min(min(min(min(low[j], t), u), v), w)
            signs[0, j] += np.int32(t == 0) + np.int32(u == 0) + np.int32(v == 0) + np.int32(w == 0)
            signs[1, j] += np.int32(t > 0) + np.int32(u > 0) + np.int32(v > 0) + np.int32(w > 0)
    for i in range(fours, n):
        p = x[tile[i]]
        high, low = ends[i // _GROUP_ROWS, 0], ends[i // _GROUP_ROWS, 1]
        if i % _GROUP_ROWS == 0:
            high[:] = -np.inf
            low[:] = np.inf
        for j in range(columns):
            d = p[j] - shift[j]
            dd = d * d
            sums[0, j] += d
            sums[1, j] += dd
            sums[2, j] += dd * d
            sums[3, j] += dd * dd
            high[j] = max(high[j], p[j])
            low[j] = min(low[j], p[j])
            signs[0, j] += p[j] == 0
            signs[1, j] += p[j] > 0


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _merge_sums(x, tile, sums, signs, ends, left, moments):  # type: ignore[no-untyped-def]
    """Merge what `_sum_tile` found into the moments."""
    high, low = ends[0, 0].copy(), ends[0, 1].copy()
    for g in range(1, len(ends)):
        for j in range(len(high)):
            high[j] = max(high[j], ends[g, 0, j])
            low[j] = min(low[j], ends[g, 1, j])
    for j in range(len(high)):
        at, shift = left + j, sums[4, j]
        if _in_reach(shift, low[j], high[j]):
            _merge_tile(moments, at, len(tile), shift, sums[:4, j])
        else:
            _merge_exactly(moments, at, x[tile, j])
        if low[j] <= high[j]:
            a, b = np.float64(low[j]), np.float64(high[j])
            moments[5, at] = moments[5, at] if moments[5, at] <= a else a
            moments[6, at] = moments[6, at] if moments[6, at] >= b else b
        moments[7, at] += signs[0, j]
        moments[8, at] += signs[1, j]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _reach(ends, side, k, known):  # type: ignore[no-untyped-def]
    """Tighten limits to the k-th best of the groups' ends: k values at least are as good.

    Without this, of a first block's values five times as many as are kept would be listed for a
    while. All columns at a time, so that the k best of each are kept sorted without a branch.
    """
    sign = np.float32(1 if side == 0 else -1)
    columns = len(known)
    best = np.full((k, columns), -np.inf, np.float32)
    new = np.empty(columns, np.float32)
    for g in range(len(ends)):
        for j in range(columns):
            new[j] = sign * ends[g, side, j]
        for r in range(k):
            own = best[r]
            for j in range(columns):
                a, b = own[j], new[j]
                own[j] = b if b > a else a
                new[j] = a if b > a else b
    for j in range(columns):
        known[j] = sign * max(sign * known[j], best[k - 1, j])


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _list_extremes(x, rows, top_row, left, ends, bounds, beat, extremes):  # type: ignore[no-untyped-def]
    """List values that beat what is to be beaten, row by row; that rises as lists fill up."""
    columns, last = x.shape[1], extremes.shape[2] - 1
    flags = np.zeros(-(-columns // 8) * 8, np.uint8)
    words = flags.view(np.uint64)  # eight columns, none of whose values is extreme, at a glance
    found = np.empty(len(flags), np.int64)
    for group in range(len(ends)):
        entering = False
        for j in range(columns):
            entering |= ends[group, 0, j] > beat[0, j] or ends[group, 1, j] < beat[1, j]
        if not entering:
            continue
        for i in rows[group * _GROUP_ROWS : (group + 1) * _GROUP_ROWS]:
            row = x[i]
            for j in range(columns):
                flags[j] = np.uint8(row[j] > beat[0, j]) | np.uint8(row[j] < beat[1, j])
            n = 0
            for w in range(len(words)):
                if words[w]:
                    for j in range(8 * w, 8 * w + 8):
                        found[n] = j  # overwritten unless it counts: cheaper than a branch
                        n += flags[j]
            for j in found[:n]:
                value, at = row[j], left + j
                if value > beat[0, j]:
                    _insert(extremes[0, at], extreme_key(value, top_row + i, 0))
                    beat[0, j] = _to_beat(bounds[0, j], extremes[0, at, last], 0)
                if value < beat[1, j]:
                    _insert(extremes[1, at], extreme_key(value, top_row + i, 1))
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


@numba.njit(nogil=True, cache=True)
def compact_lists(extremes, strata):  # type: ignore[no-untyped-def]
    """Lists of extremes without their empty places.

    Parameters
    ----------
    extremes : uint64 (stratum, 2, neuron, k)
        Keys, best first.
    strata : int64 (n,)
        Of which.

    Returns
    -------
    lengths : uint8 (n, 2, neuron)
    values : float32 (entry,)
        List after list, the largest of each stratum before its smallest.
    rows : uint32 (entry,)

    Examples
    --------
    >>> keys = np.zeros((1, 2, 1, 3), np.uint64)
    >>> keys[0, 1, 0, :2] = extreme_key(np.float32(-2.5), 7, 1), extreme_key(np.float32(1), 3, 1)
    >>> [part.tolist() for part in compact_lists(keys, np.array([0]))]
    [[[[0], [2]]], [-2.5, 1.0], [7, 3]]
    """
    _, _, width, k = extremes.shape
    lengths = np.zeros((len(strata), 2, width), np.uint8)
    for i, s in enumerate(strata):
        for side in range(2):
            for j in range(width):
                n = 0
                while n < k and extremes[s, side, j, n] != 0:
                    n += 1
                lengths[i, side, j] = n
    values = np.empty(lengths.sum(), np.float32)
    rows = np.empty(len(values), np.uint32)
    at = 0
    for i, s in enumerate(strata):
        for side in range(2):
            for j in range(width):
                for key in extremes[s, side, j, : lengths[i, side, j]]:
                    values[at] = _value(key, side)
                    rows[at] = np.uint32(0xFFFFFFFF) - np.uint32(key & np.uint64(0xFFFFFFFF))
                    at += 1
    return lengths, values, rows


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
def _insert(listed, key):  # type: ignore[no-untyped-def]
    """Insert a key into a list, best first; the last falls out. Faster without a branch."""
    for r in range(len(listed) - 1, 0, -1):
        listed[r] = max(listed[r], min(listed[r - 1], key))
    listed[0] = max(listed[0], key)


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
def insert_extremes(values, tokens, strata, lengths, new_values, new_rows, first):  # type: ignore[no-untyped-def]
    """Merge the lists of a block into those of all blocks before it; ties go to those.

    Parameters
    ----------
    values, tokens : float32, int64 (stratum, 2, neuron, k)
        The largest and the smallest, best first, -1 for the token of none; updated in place.
    strata, lengths, new_values, new_rows
        From `compact_lists`.
    first : int
        Token number of the block's first row.
    """
    _, _, width, k = values.shape
    merged, merged_tokens = np.empty(k, np.float32), np.empty(k, np.int64)
    n = 0
    for i, s in enumerate(strata):
        for side in range(2):
            sign = 1 if side == 0 else -1
            for j in range(width):
                end = n + lengths[i, side, j]
                if n == end:
                    continue
                own, own_tokens = values[s, side, j], tokens[s, side, j]
                a = 0
                for r in range(k):
                    old = own_tokens[a] >= 0
                    if n < end and not (old and sign * new_values[n] <= sign * own[a]):
                        merged[r], merged_tokens[r] = new_values[n], first + new_rows[n]
                        n += 1
                    else:
                        merged[r], merged_tokens[r] = own[a], own_tokens[a]
                        a += 1
                own[:] = merged
                own_tokens[:] = merged_tokens
                n = end
