"""Representational similarity: RSA and CKA between stages, layers and stores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import xarray as xr

from ..errors import UnknownNameError, UsageError
from ..schema import Categorical
from ..stats import gram, products
from .engine import Output
from .joint import Answers, Grams, Rows, Streamed, View, passes_over
from .pairing import Compared, Pairs, Row, pair_up, select_second
from .registry import query
from .result import Result, provenance
from .rows import COMPAT, Compat, check, check_seed
from .selection import Data, Names, Numbers, Selection, Tokens, select
from .units import Unit, labelled, memory_nbytes, rows_of_groups, sampled

__all__ = ["cka", "rsa"]

Metric = Literal["cosine", "correlation", "sqeuclidean"]
METRICS = ("cosine", "correlation", "sqeuclidean")
Compare = Literal["pearson", "spearman"]
COMPARE = ("pearson", "spearman")

MAX_GROUPS = 100
"""Sequences, or random groups of more, that the jackknife leaves out one at a time."""


@dataclass(frozen=True)
class Rsa:
    """Asks for RSA of pairs of views; the rest of what can be asked is by Gram matrices only."""

    row: Row
    metric: str
    keep_zeros: bool
    ranks: bool = False
    jackknife: np.ndarray | None = None  # group of every token of the data
    null: int = 0
    seed: int = 0

    spectral = False

    @property
    def views(self) -> tuple[View, ...]:
        return self.row.views

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return [p for p in self.row.pairs if p is not None]

    @property
    def space(self) -> tuple[str, bool]:
        if self.metric == "sqeuclidean":
            return "linear", False
        return self.metric, self.keep_zeros

    @property
    def gram_only(self) -> bool:
        return self.ranks or self.jackknife is not None or self.null > 0

    def by_products(self, streamed: Streamed) -> Answers:
        n = len(self.row.pairs)
        values, dropped = np.full(n, np.nan), np.zeros(n, np.int64)
        for i, pair in enumerate(self.row.pairs):
            if pair is not None:
                sums = streamed.pair(*pair)
                values[i] = products.rsa(*sums, distances=self.metric == "sqeuclidean")
                dropped[i] = 0 if self.keep_zeros else streamed.dropped(*pair)
        return {"rsa": values, "dropped": dropped}

    def by_grams(self, grams: Grams) -> Answers:
        n = len(self.row.pairs)
        found = {name: np.full(n, np.nan) for name in ("rsa", "reach", "p_value")}
        found["dropped"] = np.zeros(n, np.int64)
        similar = [g.similarity(self.metric) for g in grams.grams]
        whole: dict[int, np.ndarray] = {}
        for i, pair in enumerate(self.row.pairs):
            if pair is None:
                continue
            valid = similar[pair[0]][1] & similar[pair[1]][1]
            if self.keep_zeros:
                valid[:] = True
            if valid.all():
                for view in pair:
                    if view not in whole:
                        whole[view] = self._prepared(similar[view][0])
                a, b = whole[pair[0]], whole[pair[1]]
            else:
                chosen = np.ix_(valid, valid)
                a, b = (self._prepared(similar[view][0][chosen]) for view in pair)
            found["dropped"][i] = np.count_nonzero(~valid)
            found["rsa"][i] = estimate = gram.correlate(a, b)
            if self.jackknife is not None:
                groups = self.jackknife[grams.tokens[valid]]
                found["reach"][i] = gram.jackknife(a, b, groups).reach()
            if self.null:
                found["p_value"][i] = self._p_value(a, b, estimate)
        return found

    def _prepared(self, matrix: np.ndarray) -> np.ndarray:
        return gram.standardised(gram.ranked(matrix) if self.ranks else matrix)

    def _p_value(self, a: np.ndarray, b: np.ndarray, estimate: float) -> float:
        """Share of permutations of the second's tokens that do at least as well."""
        if not np.isfinite(estimate):
            return np.nan
        random = np.random.default_rng(self.seed)
        reached = np.vdot(a, b) * (1 - 1e-12)
        above = sum(
            gram.permuted(a, b, random.permutation(len(a))) >= reached for _ in range(self.null)
        )
        return float((1 + above) / (1 + self.null))


@dataclass(frozen=True)
class Cka:
    """Asks for linear CKA of pairs of views."""

    row: Row
    debiased: bool

    spectral = False
    gram_only = False
    space = ("linear", False)

    @property
    def views(self) -> tuple[View, ...]:
        return self.row.views

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return [p for p in self.row.pairs if p is not None]

    def by_products(self, streamed: Streamed) -> Answers:
        aligned = products.debiased_cka if self.debiased else products.cka
        return {"cka": self._each(lambda a, b: aligned(*streamed.pair(a, b)))}

    def by_grams(self, grams: Grams) -> Answers:
        aligned = gram.debiased_cka if self.debiased else gram.cka
        own = [g.centred for g in grams.grams]
        return {"cka": self._each(lambda a, b: aligned(own[a], own[b]))}

    def _each(self, value: Any) -> np.ndarray:
        return np.array([np.nan if p is None else value(*p) for p in self.row.pairs])


@query('--stages mlp_in,mlp_out --tokens "position > 0"')
def rsa(
    data: Data,
    *,
    stages: Names = None,
    layers: Numbers = None,
    tokens: Tokens = None,
    neurons: Numbers = None,
    by: str | None = None,
    exclude_sinks: str | None = None,
    pairs: Pairs = None,
    data_b: Data | None = None,
    metric: Metric = "cosine",
    compare: Compare = "pearson",
    interval: bool = False,
    null: int = 0,
    sample: int = 4000,
    seed: int = 0,
    compat: Compat = "textbook",
    memory: int | str = "2GiB",
) -> Result:
    """Representational similarity: do two stages find the same tokens alike?

    The correlation, over all pairs of different tokens, of their similarity at one stage and at
    another. Exact for any number of tokens in one pass, without a matrix of tokens by tokens.

    Parameters
    ----------
    pairs : str or sequence of str, optional
        "a:b" each, with stages, or with stages at layers as "hidden@3:mlp_out@2"; "layers" for
        all pairs of layers within each stage. Default all pairs of stages within a layer, hidden
        left out (it is a block's input); with data_b, every stage with itself.
    data_b : Store, path or DataArray, optional
        Where the second of every pair is taken from: another model's store over the same tokens.
    metric : {"cosine", "correlation", "sqeuclidean"}
        Similarity of two tokens; the last is the squared Euclidean distance.
    compare : {"pearson", "spearman"}
        Correlation of the similarities, or of their ranks. Ranks are exact up to as many tokens as
        `sample`, and of a sample of them beyond.
    interval : bool
        Also give a 95% confidence interval, by a jackknife that leaves out one sequence at a time
        (or one of 100 random groups of sequences).
    null : int
        Permutations of the second's tokens; the p-value is the share of them, the estimate
        counted, that come to the same correlation or more.
    sample : int
        Tokens, drawn once by `seed`, over which interval, p-value and ranks are computed.
    seed : int
        Of sample and permutations.
    compat : {"textbook", "notebook"}
        A token whose values are all 0 has no cosine: it is left out of the pair and counted in
        ``dropped``. "notebook" takes its cosines for 0, as scikit-learn does.
    memory : int or str
        What the query may take, as "2GiB"; where products do not fit, the data are read in
        several passes.

    Returns
    -------
    Dataset
        rsa and dropped (layer, pair), with coordinates stage_a and stage_b; between layers
        (stage, pair) with layer_a and layer_b. On request rsa_low, rsa_high, p_value.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> acts = np.random.default_rng(0).normal(size=(2, 30, 5)).astype("float32")
    >>> acts[1] = 2 * acts[0]
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> rsa(data, pairs="layers").compute()["rsa"].values.round(6).tolist()
    [1.0]
    """
    selection = select(data, stages, layers, tokens, neurons, by, exclude_sinks)
    check("metric", metric, METRICS)
    check("compare", compare, COMPARE)
    check_seed(seed)
    check("compat", compat, COMPAT)
    if null < 0 or sample < 3:
        raise UsageError(f"null is {null} and sample {sample}: give at least 0 and 3")
    second = None if data_b is None else select_second(data_b, selection, stages, neurons)
    compared = pair_up(selection, second, pairs)
    limit = memory_nbytes(memory)
    groups = _sequence_groups(selection, seed) if interval else None
    keep, ranks = compat == "notebook" and metric != "sqeuclidean", compare == "spearman"
    plain = partial(Rsa, metric=metric, keep_zeros=keep, ranks=ranks)
    uncertain = partial(plain, jackknife=groups, null=null, seed=seed)

    def questions(row: Row, rows: Rows) -> list[tuple[Rows, Any]]:
        some = sampled(rows, sample, seed)
        if not (interval or null):
            return [(some if ranks else rows, plain(row))]
        if some is rows or ranks:
            return [(some, uncertain(row))]
        return [(rows, plain(row)), (some, uncertain(row))]

    outputs = {"rsa": _output(compared, "correlation of similarities")}
    if interval:
        outputs["rsa_low"] = _output(compared, "lower end of the 95% interval")
        outputs["rsa_high"] = _output(compared, "upper end of the 95% interval")
    if null:
        outputs["p_value"] = _output(compared, "share of permutations that do as well")
    outputs["dropped"] = _output(compared, "tokens left out, without a direction", np.int64)
    parameters = {
        "pairs": pairs,
        "metric": metric,
        "compare": compare,
        "interval": interval,
        "null": null,
        "sample": sample,
        "seed": seed,
        "compat": compat,
    }
    result = _compared("rsa", selection, second, compared, questions, outputs, parameters, limit)
    most = max(len(r.tokens) for r in rows_of_groups(selection))
    if (ranks or interval or null) and most > sample:
        result.attrs["sampled"] = f"{sample} tokens, for " + ", ".join(
            what
            for what, asked in (("ranks", ranks), ("interval", interval), ("null", null))
            if asked
        )
    return result


@query('--stages mlp_in,mlp_pre,mlp_post,mlp_out --debiased --tokens "position > 0"')
def cka(
    data: Data,
    *,
    stages: Names = None,
    layers: Numbers = None,
    tokens: Tokens = None,
    neurons: Numbers = None,
    by: str | None = None,
    exclude_sinks: str | None = None,
    pairs: Pairs = None,
    data_b: Data | None = None,
    debiased: bool = False,
    memory: int | str = "2GiB",
) -> Result:
    """Linear centred kernel alignment between stages, layers or stores.

    Parameters
    ----------
    pairs : str or sequence of str, optional
        "a:b" each, with stages, or with stages at layers as "hidden@3:mlp_out@2"; "layers" for
        all pairs of layers within each stage. Default all pairs of stages within a layer, hidden
        left out (it is a block's input); with data_b, every stage with itself.
    data_b : Store, path or DataArray, optional
        Where the second of every pair is taken from: another model's store over the same tokens.
    debiased : bool
        Use the unbiased estimator: the plain one of unrelated data is well above 0 unless tokens
        are many times the neurons. May come out negative.
    memory : int or str
        What the query may take, as "2GiB"; where products do not fit, the data are read in
        several passes.

    Returns
    -------
    Dataset
        cka (layer, pair), with coordinates stage_a and stage_b; between layers (stage, pair) with
        layer_a and layer_b.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> acts = np.random.default_rng(0).normal(size=(2, 30, 5)).astype("float32")
    >>> acts[1] = acts[0] + 7
    >>> data = xr.DataArray(acts, dims=("layer", "token", "neuron"), name="mlp_out")
    >>> cka(data, pairs="layers").compute()["cka"].values.round(6).tolist()
    [1.0]
    """
    selection = select(data, stages, layers, tokens, neurons, by, exclude_sinks)
    second = None if data_b is None else select_second(data_b, selection, stages, neurons)
    compared = pair_up(selection, second, pairs)

    def questions(row: Row, rows: Rows) -> list[tuple[Rows, Any]]:
        return [(rows, Cka(row, debiased))]

    outputs = {"cka": _output(compared, "linear CKA" + (", debiased" if debiased else ""))}
    parameters = {"pairs": pairs, "debiased": debiased}
    limit = memory_nbytes(memory)
    return _compared("cka", selection, second, compared, questions, outputs, parameters, limit)


def _output(compared: Compared, long_name: str, dtype: Any = np.float64) -> Output:
    n = len(compared.rows[0].pairs)
    return Output(("pair",), (n,), dtype, {"long_name": long_name, "units": "1"})


def _compared(
    name: str,
    selection: Selection,
    second: Selection | None,
    compared: Compared,
    questions: Any,
    outputs: dict[str, Output],
    parameters: dict[str, Any],
    memory: int,
) -> xr.Dataset:
    """Lay the comparisons out and label them."""
    rows_of = rows_of_groups(selection)
    finish = _with_sample if {"rsa_low", "p_value"} & outputs.keys() else None
    units, passes = [], 1
    for row in compared.rows:
        asked = [questions(row, rows) if len(rows.tokens) else [] for rows in rows_of]
        units.append(Unit(row.place, asked, finish))
        for rows, question in (one for own in asked for one in own):
            needed = passes_over(question.views, len(rows.tokens), memory, [question])
            passes = max(passes, needed)
    made = labelled(selection, units, compared.dim, compared.labels, outputs, memory)
    made = made.assign_coords(compared.coords)
    if compared.dim == "stage" and len(compared.labels) == 1:
        made = made.isel(stage=0)
    attrs = provenance(name, selection, parameters, passes)
    if second is not None:
        attrs |= {
            f"{k}_b": v for k, v in second.attrs.items() if k in ("store", "store_id", "model")
        }
    return made.assign_attrs(attrs)


def _with_sample(first: Answers, second: Answers | None = None) -> Answers:
    """The estimate over all tokens, with what a sample says of its uncertainty."""
    own = second or first
    centre = np.arctanh(np.clip(first["rsa"], -1 + 1e-15, 1 - 1e-15))
    low, high = np.tanh(centre - own["reach"]), np.tanh(centre + own["reach"])
    return {**first, "rsa_low": low, "rsa_high": high, "p_value": own["p_value"]}


def _sequence_groups(selection: Selection, seed: int) -> np.ndarray:
    """The group of every token that the jackknife leaves out together: its sequence, or more."""
    try:
        column = selection.column("sequence")
    except UnknownNameError:
        raise UsageError(
            "interval needs to know which tokens belong together: give the data a coordinate "
            "'sequence' along token"
        ) from None
    values = column.codes if isinstance(column, Categorical) else column
    codes = np.unique(values, return_inverse=True)[1]
    chosen = np.unique(codes if selection.mask is None else codes[selection.mask])
    if len(chosen) < 2:
        raise UsageError(
            "interval leaves out one sequence at a time, and the tokens asked are of a single "
            "one: ask over more sequences"
        )
    if len(chosen) <= MAX_GROUPS:
        return codes
    groups = np.zeros(codes.max() + 1, np.int64)
    groups[np.random.default_rng(seed).permutation(chosen)] = np.arange(len(chosen)) % MAX_GROUPS
    return groups[codes]
