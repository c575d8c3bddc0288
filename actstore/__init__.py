"""actstore: run a model once, keep its activations, ask any number of questions later."""

from __future__ import annotations

__version__ = "0.1.0"
