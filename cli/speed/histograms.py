"""Histograms of every neuron, against xhistogram on dask and boost-histogram."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from .reading import STAGE
from .rounds import Row, compare, peer, seconds
from .setting import CORES, Setting

__all__ = ["histograms"]

TOKENS, BINS, RANGE = 8192, 50, (-8.0, 8.0)


def histograms(setting: Setting) -> list[Row]:
    """All read the same tokens of one layer from the same store."""
    import numpy as np

    import actstore

    store = actstore.open(setting.store)
    tokens = min(TOKENS, store.n_tokens)
    edges = np.linspace(*RANGE, BINS + 1)
    mask = np.arange(store.n_tokens) < tokens
    layer = store[STAGE].isel(layer=0, token=slice(0, tokens))

    def ours() -> None:
        asked = actstore.histogram(store, layers=0, tokens=mask, bins=edges.tolist(), per="neuron")
        actstore.compute(asked)

    def xhistogram() -> None:
        from xhistogram.core import histogram

        histogram(layer.data, bins=[edges], axis=[0])[0].compute()

    def boost() -> None:
        """Neuron by neuron, by as many threads as there are cores: faster than a second axis."""
        import boost_histogram as bh

        values = np.ascontiguousarray(layer.values.T)

        def one(row: np.ndarray) -> np.ndarray:
            return bh.Histogram(bh.axis.Regular(BINS, *RANGE)).fill(row).view()

        with ThreadPoolExecutor(CORES) as pool:
            list(pool.map(one, values, chunksize=64))

    peers = [
        peer("xhistogram", "xhistogram", "xhistogram on dask", seconds(xhistogram)),
        peer("boost_histogram", "boost-histogram", "boost-histogram", seconds(boost)),
    ]
    what = f"{BINS} bins of each of {layer.shape[1]:,} neurons, {tokens:,} tokens"
    asked = {what: (seconds(ours), {"xhistogram on dask": 8, "boost-histogram": 2})}
    return compare("histograms", asked, peers, setting.rounds, layer.size / 1e6, "M values")
