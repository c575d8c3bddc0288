"""Dimensionality and RSA of every layer and stage, against the plain route and rsatoolbox."""

from __future__ import annotations

import statistics
from itertools import combinations
from typing import Any

from ..bench_similarity import STAGES, make_stages, profile
from .rounds import Row, compare, peer, seconds
from .setting import Setting, fresh

__all__ = ["similarity"]

LAYERS, TOKENS = 12, 500
WHAT = f"dimensionality + RSA, {LAYERS} layers x {len(STAGES)} stages, {TOKENS} tokens"


def similarity(setting: Setting) -> list[Row]:
    """Of all six pairs of stages of a layer; rsatoolbox has correlation distance and no spectra."""
    return [_plain(setting), *_rsatoolbox(setting)]


def _plain(setting: Setting) -> Row:
    took, plain = profile(fresh(setting.scratch / "profile"), setting.rounds)
    ratios = [b / a for a, b in zip(took["ours"], took["plain"], strict=True)]
    return Row(
        "similarity",
        WHAT,
        plain,
        statistics.median(took["ours"]),
        statistics.median(took["plain"]),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        20,
        setting.rounds,
    )


def _rsatoolbox(setting: Setting) -> list[Row]:
    import actstore

    path = fresh(setting.scratch / "profile") / "profile.zarr"
    make_stages(path, LAYERS, TOKENS)
    store = actstore.open(path)
    arrays = {name: store[name].values for name in STAGES}

    def ours() -> None:
        actstore.compute(actstore.rsa(store, metric="correlation"))

    def theirs() -> None:
        for layer in range(LAYERS):
            _compare_dissimilarities([arrays[name][layer] for name in STAGES])

    named = "rsatoolbox, calc_rdm and compare"
    return compare(
        "similarity",
        {
            f"RSA by correlation distance, {LAYERS} x {len(STAGES)} x {TOKENS}": (
                seconds(ours),
                {named: 3},
            )
        },
        [peer("rsatoolbox", "rsatoolbox", named, seconds(theirs))],
        setting.rounds,
    )


def _compare_dissimilarities(stages: list[Any]) -> None:
    from rsatoolbox.data import Dataset
    from rsatoolbox.rdm import calc_rdm, compare

    found: list[Any] = [calc_rdm(Dataset(x), method="correlation") for x in stages]
    for a, b in combinations(found, 2):
        compare(a, b, method="corr")
