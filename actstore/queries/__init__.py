"""Labelled, lazy queries over stores; `registry.QUERIES` lists them all."""

from __future__ import annotations

from .distributions import histogram, moments
from .registry import QUERIES
from .result import compute

__all__ = ["QUERIES", "compute", "histogram", "moments"]
