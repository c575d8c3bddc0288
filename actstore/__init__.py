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
    "card": "travel.card",
    "cka": "queries",
    "compute": "queries.result",
    "concat": "concatenation",
    "cosine_matrix": "queries",
    "cosine_pairs": "queries",
    "dimensionality": "queries",
    "dump": "fill",
    "export": "travel.export",
    "gaussian_baseline": "queries",
    "histogram": "queries",
    "import_from": "travel.imports",
    "intrinsic_dimension": "queries",
    "label_information": "queries",
    "layer_covariance": "queries",
    "load_model": "models",
    "mean_activation": "queries",
    "moments": "queries",
    "mutual_information": "queries",
    "normality": "queries",
    "open": "store",
    "pairs": "queries",
    "pairwise_covariance": "queries",
    "peaks": "queries",
    "pull": "hub",
    "push": "hub",
    "quantiles": "queries",
    "read_records": "records",
    "rsa": "queries",
    "sample": "queries",
    "save": "wire",
    "spectrum": "queries",
    "top_tokens": "queries",
    "verify": "verifying",
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
    "card",
    "cka",
    "compute",
    "concat",
    "cosine_matrix",
    "cosine_pairs",
    "dimensionality",
    "dump",
    "export",
    "gaussian_baseline",
    "histogram",
    "import_from",
    "intrinsic_dimension",
    "label_information",
    "layer_covariance",
    "load_model",
    "mean_activation",
    "moments",
    "mutual_information",
    "normality",
    "open",
    "pairs",
    "pairwise_covariance",
    "peaks",
    "plot",
    "pull",
    "push",
    "quantiles",
    "read_records",
    "rsa",
    "sample",
    "save",
    "spectrum",
    "top_tokens",
    "verify",
    "zeroness",
]

if TYPE_CHECKING:
    from . import plot
    from .concatenation import concat
    from .corpus import Corpus
    from .corpus import build as build_corpus
    from .fill import dump
    from .hub import pull, push
    from .models import load_model
    from .plan import Plan, StageSpec
    from .queries import (
        cka,
        cosine_matrix,
        cosine_pairs,
        dimensionality,
        gaussian_baseline,
        histogram,
        intrinsic_dimension,
        label_information,
        layer_covariance,
        mean_activation,
        moments,
        mutual_information,
        normality,
        pairs,
        pairwise_covariance,
        peaks,
        quantiles,
        rsa,
        sample,
        spectrum,
        top_tokens,
        zeroness,
    )
    from .queries.result import compute
    from .records import read_records
    from .store import Store
    from .store import open_store as open
    from .travel.card import card
    from .travel.export import export
    from .travel.imports import import_from
    from .verifying import verify
    from .wire import save
    from .writer import Writer


def __getattr__(name: str) -> Any:
    if name == "plot":  # a package, which importing makes an attribute
        return import_module(".plot", __name__)
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'actstore' has no attribute {name!r}")
    value = getattr(import_module(f".{home}", __name__), _ALIAS.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
