"""Labelled, lazy queries over stores; `registry.QUERIES` lists them all."""

from __future__ import annotations

from .between import layer_covariance
from .cosines import cosine_pairs, gaussian_baseline
from .dimensions import dimensionality, intrinsic_dimension, spectrum
from .examples import sample, top_tokens
from .flat import pairs
from .histograms import histogram
from .information import mutual_information, pairwise_covariance
from .labels import label_information
from .matrices import cosine_matrix
from .registry import QUERIES
from .result import compute
from .shapes import peaks, zeroness
from .similarity import cka, rsa
from .summaries import mean_activation, moments, normality, quantiles

__all__ = [
    "QUERIES",
    "cka",
    "compute",
    "cosine_matrix",
    "cosine_pairs",
    "dimensionality",
    "gaussian_baseline",
    "histogram",
    "intrinsic_dimension",
    "label_information",
    "layer_covariance",
    "mean_activation",
    "moments",
    "mutual_information",
    "normality",
    "pairs",
    "pairwise_covariance",
    "peaks",
    "quantiles",
    "rsa",
    "sample",
    "spectrum",
    "top_tokens",
    "zeroness",
]
