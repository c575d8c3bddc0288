"""Labelled, lazy queries over stores; `registry.QUERIES` lists them all."""

from __future__ import annotations

from .examples import sample, top_tokens
from .histograms import histogram
from .registry import QUERIES
from .result import compute
from .shapes import peaks, zeroness
from .summaries import mean_activation, moments, normality, quantiles

__all__ = [
    "QUERIES",
    "compute",
    "histogram",
    "mean_activation",
    "moments",
    "normality",
    "peaks",
    "quantiles",
    "sample",
    "top_tokens",
    "zeroness",
]
