"""Streaming covariance of a wide stage, against the machine's float32 matrix product."""

from __future__ import annotations

from .rounds import Reference, Row, compare, seconds
from .setting import Setting

__all__ = ["covariance"]

TOKENS, BLOCK = 16_384, 4096
PRODUCT, OWN = "float32 matrix product of the same shapes", "x.T @ x in one piece, half computed"


def covariance(setting: Setting) -> list[Row]:
    """Blocks of 4,096 tokens in memory, about a shift, float64 between blocks.

    A general product of the same shapes does all of the symmetric result, of which ours, as
    `x.T @ x`, computes a half; the table has both.
    """
    import numpy as np

    from actstore.stats.products import Core, Products

    tokens, width = min(TOKENS, 8 * setting.tokens), 4 * setting.width
    x = np.random.default_rng(0).standard_normal((tokens, width), dtype=np.float32)
    y = x.copy()
    out = np.empty((width, width), np.float32)

    def ours() -> None:
        products = Products("linear", [Core(0, 0, slice(0, width))], [])
        for top in range(0, tokens, BLOCK):
            products.add([x[top : top + BLOCK]])
        products.whole(0)

    references = [
        Reference(PRODUCT, seconds(lambda: np.matmul(x.T, y, out=out))),
        Reference(OWN, seconds(lambda: np.matmul(x.T, x, out=out))),
    ]
    what = f"covariance, {tokens:,} tokens x {width:,}, streamed"
    flop = 2 * tokens * width**2 / 1e9
    asked = {what: (seconds(ours), {PRODUCT: 0.7, OWN: None})}
    return compare("covariance", asked, references, setting.rounds, flop, "GFLOP")
