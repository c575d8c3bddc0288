"""Moments and extremes per neuron in one pass, stable and mergeable."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from .streaming import LayerSketch, State

__all__ = ["MOMENT_NAMES", "Moments", "add_moments", "merge_moments", "moments_of"]

_TILE_ROWS = 256
_TILE_COLUMNS = 256
MOMENT_NAMES = ("count", "mean", "m2", "m3", "m4", "min", "max", "zeros", "positives")


@dataclass(frozen=True)
class Moments:
    """Count, mean, central moments, extremes, zeros and positives.

    Parameters
    ----------
    groups : ndarray of int (neuron,), optional
        Group of each neuron, whose values are pooled: all 0 for a layer, heads for heads.
        Default: every neuron by itself.
    """

    groups: np.ndarray | None = None

    @property
    def pooled(self) -> bool:
        return self.groups is not None and not self.groups.any()

    def chunk(self, values_tn: np.ndarray, tokens_t: np.ndarray | None = None) -> State:
        if self.pooled:
            return moments_of_all(values_tn)
        return self._pooled(moments_of(values_tn))

    def combine(self, a: State, b: State) -> State:
        return merge_moments(a, b)

    def from_sketch(self, layer: LayerSketch) -> State:
        return self._pooled(layer.moments())

    def finalize(self, state: State) -> dict[str, np.ndarray]:
        return describe(state)

    def _pooled(self, state: State) -> State:
        return state if self.groups is None else pool(state, self.groups)


def moments_of(values_tn: np.ndarray) -> State:
    """Moments of each column.

    Parameters
    ----------
    values_tn : ndarray (token, neuron)
        float32 (others are cast).

    Returns
    -------
    dict of ndarray (neuron,)
        count, mean, m2, m3, m4 (sums of powers about the mean), min, max, zeros, positives.
        Where there are no tokens: count 0, extremes NaN.

    Notes
    -----
    Tiles of 256 rows are summed in float32 about the tile's own mean, which loses nothing to a
    large common offset, then merged in float64.

    Examples
    --------
    >>> state = moments_of(np.array([[1.0], [2.0], [3.0]], "float32"))
    >>> state["mean"], state["m2"]
    (array([2.]), array([2.]))
    """
    return _named(_moments(np.ascontiguousarray(values_tn, np.float32)))


def moments_of_all(values_tn: np.ndarray) -> State:
    """Moments of all values together, as `moments_of` of one column, but as fast.

    Examples
    --------
    >>> moments_of_all(np.array([[1.0, 2.0], [3.0, 6.0]], "float32"))["mean"]
    array([3.])
    """
    flat = np.ascontiguousarray(values_tn, np.float32).reshape(-1)
    whole = len(flat) // _TILE_COLUMNS * _TILE_COLUMNS
    columns = _moments(flat[:whole].reshape(-1, _TILE_COLUMNS))
    if whole < len(flat):
        columns = np.append(columns, _moments(flat[whole:, np.newaxis]), axis=1)
    return _named(_merge_columns(columns))


def _named(sums: np.ndarray) -> State:
    return dict(zip(MOMENT_NAMES, sums, strict=True))


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
def _moments(x):  # type: ignore[no-untyped-def]
    """Four rows at a time, each as an array of its own: so the sums are loaded and stored less."""
    tokens, width = x.shape
    out = np.zeros((9, width))
    out[5:7] = np.nan
    shift = np.empty(_TILE_COLUMNS, np.float32)
    a = np.empty((4, _TILE_COLUMNS), np.float32)
    ends = np.empty((2, _TILE_COLUMNS), np.float32)
    signs = np.empty((2, _TILE_COLUMNS), np.int32)
    for left in range(0, width, _TILE_COLUMNS):
        columns = min(_TILE_COLUMNS, width - left)
        right = left + columns
        for top in range(0, tokens, _TILE_ROWS):
            bottom = min(tokens, top + _TILE_ROWS)
            n = bottom - top
            fours = top + n // 4 * 4
            shift[:] = 0
            a[:] = 0
            signs[:] = 0
            ends[0] = np.inf
            ends[1] = -np.inf
            for i in range(top, fours, 4):
                p, q = x[i, left:right], x[i + 1, left:right]
                r, s = x[i + 2, left:right], x[i + 3, left:right]
                for j in range(columns):
                    shift[j] += (p[j] + q[j]) + (r[j] + s[j])
            for i in range(fours, bottom):
                p = x[i, left:right]
                for j in range(columns):
                    shift[j] += p[j]
            for j in range(columns):
                shift[j] /= np.float32(n)
            for i in range(top, fours, 4):
                p, q = x[i, left:right], x[i + 1, left:right]
                r, s = x[i + 2, left:right], x[i + 3, left:right]
                for j in range(columns):
                    t, u, v, w = p[j], q[j], r[j], s[j]
                    d, e, f, g = t - shift[j], u - shift[j], v - shift[j], w - shift[j]
                    dd, ee, ff, gg = d * d, e * e, f * f, g * g
                    a[0, j] += (d + e) + (f + g)
                    a[1, j] += (dd + ee) + (ff + gg)
                    a[2, j] += (dd * d + ee * e) + (ff * f + gg * g)
                    a[3, j] += (dd * dd + ee * ee) + (ff * ff + gg * gg)
                    # In this order, which leaves out NaN.
                    ends[0, j] = min(min(min(min(ends[0, j], t), u), v), w)
                    ends[1, j] = max(max(max(max(ends[1, j], t), u), v), w)
                    signs[0, j] += (
                        np.int32(t == 0) + np.int32(u == 0) + np.int32(v == 0) + np.int32(w == 0)
                    )
                    signs[1, j] += (
                        np.int32(t > 0) + np.int32(u > 0) + np.int32(v > 0) + np.int32(w > 0)
                    )
            for i in range(fours, bottom):
                p = x[i, left:right]
                for j in range(columns):
                    d = p[j] - shift[j]
                    dd = d * d
                    a[0, j] += d
                    a[1, j] += dd
                    a[2, j] += dd * d
                    a[3, j] += dd * dd
                    ends[0, j] = min(ends[0, j], p[j])
                    ends[1, j] = max(ends[1, j], p[j])
                    signs[0, j] += p[j] == 0
                    signs[1, j] += p[j] > 0
            for j in range(columns):
                if _in_reach(shift[j], ends[0, j], ends[1, j]):
                    _merge_tile(out, left + j, n, shift[j], a[:, j])
                else:
                    _merge_exactly(out, left + j, x[top:bottom, left + j])
                low, high = np.float64(ends[0, j]), np.float64(ends[1, j])
                at = left + j
                if low <= high:
                    out[5, at] = low if not out[5, at] <= low else out[5, at]
                    out[6, at] = high if not out[6, at] >= high else out[6, at]
                out[7, at] += signs[0, j]
                out[8, at] += signs[1, j]
    return out


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _in_reach(shift, low, high):  # type: ignore[no-untyped-def]
    """Whether fourth powers about `shift` fit float32; all values the same are in reach."""
    reach = max(high - shift, shift - low)
    return reach == 0 or (reach >= 1e-8 and reach <= 1e9) or low == high


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _merge_exactly(out, j, values):  # type: ignore[no-untyped-def]
    """`_merge_tile` for values whose powers do not fit float32, from the values themselves."""
    mean = 0.0
    for v in values:
        mean += np.float64(v)
    mean /= len(values)
    sums = np.zeros(4)
    for v in values:
        d = np.float64(v) - mean
        sums[0] += d
        sums[1] += d * d
        sums[2] += d * d * d
        sums[3] += d * d * d * d
    _merge_tile(out, j, len(values), mean, sums)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _merge_columns(columns):  # type: ignore[no-untyped-def]
    """Moments of all columns as one."""
    out = np.zeros((9, 1))
    out[5:7] = np.nan
    sums = np.zeros(4)
    for j in range(columns.shape[1]):
        if columns[0, j] == 0:
            continue
        sums[1:] = columns[2:5, j]
        _merge_tile(out, 0, columns[0, j], columns[1, j], sums)
        low, high = columns[5, j], columns[6, j]
        if low <= high:  # else all were NaN
            out[5, 0] = low if not out[5, 0] <= low else out[5, 0]
            out[6, 0] = high if not out[6, 0] >= high else out[6, 0]
        out[7:, 0] += columns[7:, j]
    return out


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _merge_tile(out, j, count, shift, sums):  # type: ignore[no-untyped-def]
    """Turn a tile's sums about `shift` into central moments and merge them into column j."""
    n = np.float64(count)
    e = np.float64(sums[0]) / n
    s2, s3, s4 = np.float64(sums[1]), np.float64(sums[2]), np.float64(sums[3])
    mean = np.float64(shift) + e
    m2 = s2 - n * e * e
    m3 = s3 - 3 * e * s2 + 2 * n * e**3
    m4 = s4 - 4 * e * s3 + 6 * e * e * s2 - 3 * n * e**4
    na = out[0, j]
    total = na + n
    d = mean - out[1, j]
    a2, a3 = out[2, j], out[3, j]
    out[4, j] += (
        m4
        + d**4 * na * n * (na * na - na * n + n * n) / total**3
        + 6 * d * d * (na * na * m2 + n * n * a2) / total**2
        + 4 * d * (na * m3 - n * a3) / total
    )
    out[3, j] += m3 + d**3 * na * n * (na - n) / total**2 + 3 * d * (na * m2 - n * a2) / total
    out[2, j] += m2 + d * d * na * n / total
    out[1, j] += d * n / total
    out[0, j] = total


@numba.njit(nogil=True, cache=True, error_model="numpy")
def add_moments(total, part):  # type: ignore[no-untyped-def]
    """`merge_moments` of arrays (9, neuron), the first updated in place."""
    for j in range(total.shape[1]):
        na, nb = total[0, j], part[0, j]
        if nb == 0:
            continue
        if na == 0:
            total[:, j] = part[:, j]
            continue
        n = na + nb
        d = part[1, j] - total[1, j]
        a2, a3, b2, b3 = total[2, j], total[3, j], part[2, j], part[3, j]
        total[4, j] += (
            part[4, j]
            + d * d * d * d * na * nb * (na * na - na * nb + nb * nb) / (n * n * n)
            + 6 * d * d * (na * na * b2 + nb * nb * a2) / (n * n)
            + 4 * d * (na * b3 - nb * a3) / n
        )
        total[3, j] += (
            b3 + d * d * d * na * nb * (na - nb) / (n * n) + 3 * d * (na * b2 - nb * a2) / n
        )
        total[2, j] += b2 + d * d * na * nb / n
        total[1, j] += d * nb / n
        total[0, j] = n
        low, high = part[5, j], part[6, j]
        if low <= high:  # else all were NaN
            total[5, j] = low if not total[5, j] <= low else total[5, j]
            total[6, j] = high if not total[6, j] >= high else total[6, j]
        total[7, j] += part[7, j]
        total[8, j] += part[8, j]


def merge_moments(a: State, b: State) -> State:
    """Moments of the values of two states together (Pébay, Sandia report SAND2008-6212)."""
    total, part = (np.stack([state[name] for name in MOMENT_NAMES]) for state in (a, b))
    add_moments(total, part)
    return _named(total)


def pool(state: State, groups: np.ndarray) -> State:
    """Moments of the values of groups of neurons together, one for each group number."""
    order = np.argsort(groups, kind="stable")
    edges = np.flatnonzero(np.diff(groups[order], prepend=-1))
    count = np.add.reduceat(state["count"][order], edges)
    n = np.maximum(count, 1)

    def total(x: np.ndarray) -> np.ndarray:
        return np.add.reduceat(x[order], edges)

    mean = total(state["count"] * state["mean"]) / n
    own = np.empty(len(groups))
    own[order] = np.repeat(mean, np.diff(np.append(edges, len(groups))))
    d, k = state["mean"] - own, state["count"]
    m2, m3, m4 = state["m2"], state["m3"], state["m4"]
    return {
        "count": count,
        "mean": mean,
        "m2": total(m2 + k * d**2),
        "m3": total(m3 + 3 * d * m2 + k * d**3),
        "m4": total(m4 + 4 * d * m3 + 6 * d**2 * m2 + k * d**4),
        "min": np.fmin.reduceat(state["min"][order], edges),
        "max": np.fmax.reduceat(state["max"][order], edges),
        "zeros": total(state["zeros"]),
        "positives": total(state["positives"]),
    }


def describe(state: State) -> dict[str, np.ndarray]:
    """Mean, variance (ddof 1), skewness, kurtosis (Fisher) ... from a state.

    Undefined values (the variance of one token, the skewness of a constant) are NaN.
    """
    n = state["count"]
    # A constant's m2 is rounding, not spread: no skewness to speak of.
    m2 = np.where(state["min"] == state["max"], 0, state["m2"])
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.where(n > 1, m2 / (n - 1), np.nan)
        spread = np.where(m2 > 0, m2, np.nan)
        return {
            "count": n.astype(np.int64),
            "mean": np.where(n > 0, state["mean"], np.nan),
            "variance": variance,
            "std": np.sqrt(variance),
            "skewness": np.sqrt(n) * state["m3"] / spread**1.5,
            "kurtosis": n * state["m4"] / spread**2 - 3,
            "min": state["min"],
            "max": state["max"],
            "zero_fraction": state["zeros"] / n,
            "positive_fraction": state["positives"] / n,
        }
