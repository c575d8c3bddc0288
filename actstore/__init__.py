"""actstore: run a model once, keep its activations, ask any number of questions later.

    store = actstore.open("run.zarr")
    store["mlp_post"]                                  # xarray: layer, token, neuron; lazy
    actstore.moments(store, tokens="position > 0")     # xarray.Dataset; lazy

Names are loaded when first used, so that importing the package loads neither torch nor a server.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Corpus": "corpus",
    "Plan": "plan",
    "StageSpec": "plan",
    "Store": "store",
    "Writer": "writer",
    "build_corpus": "corpus",
    "compute": "queries.result",
    "dump": "fill",
    "histogram": "queries",
    "load_model": "models",
    "mean_activation": "queries",
    "moments": "queries",
    "normality": "queries",
    "open": "store",
    "peaks": "queries",
    "quantiles": "queries",
    "read_records": "records",
    "sample": "queries",
    "top_tokens": "queries",
    "verify": "store",
    "zeroness": "queries",
}
_ALIAS = {"open": "open_store", "build_corpus": "build"}

__all__ = [
    "Corpus",
    "Plan",
    "StageSpec",
    "Store",
    "Writer",
    "__version__",
    "build_corpus",
    "compute",
    "dump",
    "histogram",
    "load_model",
    "mean_activation",
    "moments",
    "normality",
    "open",
    "peaks",
    "quantiles",
    "read_records",
    "sample",
    "top_tokens",
    "verify",
    "zeroness",
]

if TYPE_CHECKING:
    from .corpus import Corpus
    from .corpus import build as build_corpus
    from .fill import dump
    from .models import load_model
    from .plan import Plan, StageSpec
    from .queries import (
        histogram,
        mean_activation,
        moments,
        normality,
        peaks,
        quantiles,
        sample,
        top_tokens,
        zeroness,
    )
    from .queries.result import compute
    from .records import read_records
    from .store import Store, verify
    from .store import open_store as open
    from .writer import Writer


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'actstore' has no attribute {name!r}")
    value = getattr(import_module(f".{home}", __name__), _ALIAS.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
