"""Covariance between layers, neuron by neuron, streamed."""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np

__all__ = ["LayerProducts"]

_TILE_ROWS = 128


class LayerProducts:
    """Sums of products of the same neuron at every two layers.

    Examples
    --------
    >>> x = np.float32([[[1], [2], [4]], [[2], [4], [8]]])  # layer, token, neuron
    >>> products = LayerProducts()
    >>> products.add(list(x[:, :2])); products.add(list(x[:, 2:]))
    >>> products.flattened().round(6).tolist()
    [[2.333333, 4.666667], [4.666667, 9.333333]]
    """

    def __init__(self) -> None:
        self._n = 0
        self._shift: np.ndarray
        self._sums: np.ndarray
        self._products: np.ndarray

    def add(self, layers: Sequence[np.ndarray]) -> None:
        """Add the next rows of every layer, (token, neuron) each."""
        x = np.stack([np.asarray(a, np.float64) for a in layers])
        if not self._n:
            count, _, width = x.shape
            self._shift = x.mean(1, keepdims=True)
            self._sums = np.zeros((count, width))
            self._products = np.zeros((count, count, width))
        about = (x - self._shift).astype(np.float32)
        self._sums += about.sum(1, dtype=np.float64)
        _add_products(about, self._products)
        self._n += x.shape[1]

    def by_neuron(self) -> np.ndarray:
        """Covariance (ddof 1) of every two layers, for each neuron: (layer, layer, neuron)."""
        if self._n < 2:
            return np.full_like(self._products, np.nan)
        return self._scatter() / (self._n - 1)

    def flattened(self) -> np.ndarray:
        """Covariance (ddof 1) of every two layers, each (token, neuron) a sample of its own."""
        width = self._sums.shape[1]
        samples = self._n * width
        if samples < 2:
            return np.full(self._products.shape[:2], np.nan)
        means = self._shift[:, 0] + self._sums / self._n
        means -= means.mean(1, keepdims=True)
        return (self._scatter().sum(2) + self._n * (means @ means.T)) / (samples - 1)

    def _scatter(self) -> np.ndarray:
        lower = np.tril_indices(len(self._products), -1)
        whole = self._products.copy()
        whole[lower] = whole.swapaxes(0, 1)[lower]
        return whole - self._sums[:, None] * self._sums[None] / self._n


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})
def _add_products(x, products):  # type: ignore[no-untyped-def]
    """Products of every layer with itself and those after it, in tiles that sum in float32."""
    layers, tokens, width = x.shape
    tile = np.empty(width, np.float32)
    for a in range(layers):
        for b in range(a, layers):
            for top in range(0, tokens, _TILE_ROWS):
                tile[:] = 0
                for t in range(top, min(top + _TILE_ROWS, tokens)):
                    u, v = x[a, t], x[b, t]
                    for j in range(width):
                        tile[j] += u[j] * v[j]
                for j in range(width):
                    products[a, b, j] += tile[j]
