"""What each neuron tells about a label: which of them know a comma from a full stop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import UsageError
from ..schema import Categorical
from ..stats.labels import LabelCounts, bin_ends, shuffled_information, table_information
from ..stats.moments import Moments
from ..stats.streaming import State
from .engine import Output, Pass, stream
from .registry import query
from .result import Result, assemble
from .rows import check, check_seed
from .selection import Data, Names, Numbers, Selection, Source, Tokens, select

__all__ = ["label_information"]

MAX_BINS = 255
MAX_CELLS = 2**23
"""Counts of a layer: neurons x bins x labels."""

MAX_LABELS = 1_000


@query("--stages hidden --label condition --k 20")
def label_information(
    data: Data,
    *,
    stages: Names = None,
    layers: Numbers = None,
    tokens: Tokens = None,
    neurons: Numbers = None,
    by: str | None = None,
    exclude_sinks: str | None = None,
    label: str = "condition",
    bins: int = 15,
    outlier_threshold: float = 5.0,
    correction: Literal["miller-madow"] | None = None,
    null: int = 0,
    seed: int = 0,
    k: int | None = None,
) -> Result:
    """Information that each neuron carries about a label of the tokens: which neurons tell it.

    The samples are tokens. A neuron's values are counted in equal bins between their ends, label
    by label. A value that is far out is counted in the first or last bin rather than left out
    (as `mutual_information` does): a neuron may be large at one label only, and tells it by that.

    Parameters
    ----------
    label : str
        Column of the tokens, as "condition"; or "token_text", "position", ...
    bins : int
        Bins of each neuron, at most 255.
    outlier_threshold : float
        The bins go no further than so many standard deviations (ddof 1) from the neuron's mean;
        0 to let them reach all values.
    correction : {"miller-madow"}, optional
        Of the bias of the plug-in estimate, which is above 0 for neurons that tell nothing.
    null : int
        Shuffles of the labels (at least 2) whose mean and standard deviation are given beside, and
        how many of the latter the neuron is above the former.
    seed : int
        Of the shuffles.
    k : int, optional
        Give the k neurons of a layer that tell most, best first, instead of all in their order.

    Returns
    -------
    Dataset
        information in bits and rank, 1 for the neuron that tells most (layer, neuron), with
        `null` null_mean, null_std and z. With `k` (layer, rank), and neuron among the variables.
        Beside them label_entropy (layer,): what there is to be told.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> acts = xr.DataArray(np.float32([[1, 5], [1, 6], [2, 5], [2, 6]]), dims=("token", "neuron"))
    >>> acts = acts.assign_coords(mark=("token", [",", ",", ".", "."]))
    >>> result = label_information(acts, label="mark").compute()
    >>> result["information"].values.tolist(), result["rank"].values.tolist()
    ([[1.0, 0.0]], [[1, 2]])
    """
    selection = select(data, stages, layers, tokens, neurons, by, exclude_sinks)
    check("correction", correction, ("miller-madow", None))
    check_seed(seed)
    if not 1 <= bins <= MAX_BINS:
        raise UsageError(f"bins is {bins}: it must be from 1 to {MAX_BINS}")
    if null < 0 or null == 1:
        raise UsageError(f"null is {null}: give 0, or at least 2 shuffles")
    if k is not None and k < 1:
        raise UsageError(f"k is {k}: ask for at least one neuron, or leave it out for all")
    codes, count = _codes(selection, label)

    def passes(source: Source, chosen: np.ndarray) -> list[Pass]:
        of = _Asked(bins, codes, count, chosen, outlier_threshold, bool(correction), null, seed, k)
        return [Pass(Moments(np.arange(len(chosen))), sketch=True), Pass(of)]

    def outputs(source: Source, chosen: np.ndarray) -> dict[str, Output]:
        cells = len(chosen) * bins * count
        if cells > MAX_CELLS:
            raise UsageError(
                f"{len(chosen):,} neurons x {bins} bins x {count:,} values of {label} are "
                f"{cells:,} counts a layer, over {MAX_CELLS:,}: ask for fewer neurons or bins, or "
                "with tokens= for fewer values"
            )
        return _outputs(len(chosen), label, null, k)

    parameters = {
        "label": label,
        "bins": bins,
        "outlier_threshold": outlier_threshold,
        "correction": correction,
        "null": null,
        "seed": seed,
        "k": k,
    }
    results = stream(selection, passes, outputs)
    if k is not None:
        results = {s: d.assign_coords(rank=np.arange(1, k + 1)) for s, d in results.items()}
    return assemble("label_information", selection, results, parameters)


def _codes(selection: Selection, label: str) -> tuple[np.ndarray, int]:
    """The label of every token as a number, and how many there are among those asked."""
    column = selection.column(label)
    codes = column.codes if isinstance(column, Categorical) else column
    asked = slice(None) if selection.mask is None else selection.mask
    values, own = np.unique(codes[asked], return_inverse=True)
    if len(values) < 2:
        only = column.values[values[0]] if isinstance(column, Categorical) else values[0]
        raise UsageError(
            f"{label} is {only!r} for every token asked: there is nothing to tell. Choose another "
            "label, or more tokens"
        )
    if len(values) > MAX_LABELS:
        raise UsageError(
            f"{label} has {len(values):,} values among the tokens asked: a label has at most "
            f"{MAX_LABELS:,}"
        )
    found = np.full(len(codes), -1, np.int32)
    found[asked] = own
    return found, len(values)


@dataclass(frozen=True)
class _Asked:
    """Makes the counting of a layer from its moments."""

    bins: int
    labels: np.ndarray
    n_labels: int
    neurons: np.ndarray
    threshold: float
    correct: bool
    null: int
    seed: int
    k: int | None

    def __call__(self, moments: dict[str, Any]) -> _Informed:
        mean, std, low, high = (moments[name] for name in ("mean", "std", "min", "max"))
        ends = bin_ends(mean, std, low, high, self.threshold)
        return _Informed(*ends, self.bins, self.labels, self.n_labels, self)


@dataclass(frozen=True)
class _Informed(LabelCounts):
    """Counts by bin and label, and what they tell in the end."""

    asked: _Asked

    def finalize(self, state: State) -> dict[str, Any]:
        counts, asked = state["counts"], self.asked
        found: dict[str, Any] = {"information": table_information(counts, asked.correct)}
        if asked.null:
            given = asked.null, asked.seed, asked.correct
            found["null_mean"], found["null_std"] = shuffled_information(counts, *given)
            above = found["information"] - found["null_mean"]
            with np.errstate(invalid="ignore", divide="ignore"):
                found["z"] = above / found["null_std"]
        order = np.argsort(-found["information"], kind="stable")  # NaN last
        entropy = _entropy(counts)
        if asked.k is None:
            rank = np.empty(len(order), np.int64)
            rank[order] = np.arange(1, len(order) + 1)
            return {**found, "rank": rank, "label_entropy": entropy}
        best = order[: asked.k]
        padded = {name: np.full(asked.k, np.nan) for name in found}
        for name, values in found.items():
            padded[name][: len(best)] = values[best]
        neuron = np.full(asked.k, -1)
        neuron[: len(best)] = asked.neurons[best]
        return {**padded, "neuron": neuron, "label_entropy": entropy}


def _entropy(counts: np.ndarray) -> np.ndarray:
    """Of the label, in bits, over the tokens of most neurons; some may be NaN at some tokens."""
    labels = counts.sum(1)
    p = labels[labels.sum(1).argmax()]
    p = p[p > 0] / max(1, p.sum())
    return np.array(-(p * np.log2(p)).sum() if len(p) else np.nan)


def _outputs(width: int, label: str, null: int, k: int | None) -> dict[str, Output]:
    dims, shape = (("neuron",), (width,)) if k is None else (("rank",), (k,))
    described = {"information": (f"information about {label}", "bit")}
    if null:
        described["null_mean"] = f"mean information about {label} shuffled", "bit"
        described["null_std"] = f"standard deviation of that about {label} shuffled", "bit"
        described["z"] = "standard deviations above the mean of the shuffled", "1"
    outputs = {}
    if k is not None:
        which = {"long_name": "neuron", "units": "1"}
        outputs["neuron"] = Output(dims, shape, np.int64, which, blank=-1)
    for name, (text, units) in described.items():
        attrs = {"long_name": text, "units": units}
        outputs[name] = Output(dims, shape, np.float64, attrs)
    if k is None:
        rank = {"long_name": "place among the neurons, 1 tells most", "units": "1"}
        outputs["rank"] = Output(dims, shape, np.int64, rank)
    entropy = {"long_name": f"entropy of {label}", "units": "bit"}
    outputs["label_entropy"] = Output((), (), np.float64, entropy)
    return outputs
