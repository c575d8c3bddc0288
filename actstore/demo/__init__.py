"""The embedded default: a tiny trained GPT-2, its corpus, and how both were made.

``model/`` holds the model in the layout of transformers, with ``training.json`` beside it,
written by ``python -m actstore.demo.train``. The text is not shipped: `actstore.demo.corpus`
reads it from the Python installation at run time.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODEL_DIR"]

MODEL_DIR = Path(__file__).parent / "model"
"""The folder of the packaged model, for `AutoModel.from_pretrained` and its like."""
