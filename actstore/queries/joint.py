"""Statistics of several stages and layers over the same tokens: similarity, dimensionality.

The unit is a *joint reading*: one task reads the rows of some views (a stage at a layer) and
answers every question asked of them, by the cheaper of two routes: token x token Gram matrices
where tokens are few, streamed products of widths else, in as many passes over the rows as the
memory limit makes necessary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from dask.base import tokenize

from ..errors import UsageError
from ..stats.gram import Gram
from ..stats.products import Core, PairSums, Products
from .lanes import keep_memory

__all__ = [
    "Answers",
    "Grams",
    "Question",
    "Rows",
    "Streamed",
    "View",
    "fits",
    "goes_by_grams",
    "passes_over",
    "run_joint",
]

_RUN_TOKENS = 2048
_MAX_GAP = 64
_BLOCK_TOKENS = (256, 4096)
_EIGEN_COST = 8
"""Eigenvalues come at a fraction of the speed of products."""

Answers = dict[str, Any]
Space = tuple[str, bool]
"""Name, and whether rows without a direction are kept."""


@dataclass(frozen=True)
class View:
    """One stage at one layer, of one source.

    Attributes
    ----------
    token : str
        What identifies the values.
    stage : str
    layer : int
    array : array
        (layer, token, neuron), sliceable.
    layer_index : int
    neurons : ndarray of int
    """

    token: str
    stage: str
    layer: int
    array: Any
    layer_index: int
    neurons: np.ndarray

    @property
    def key(self) -> tuple[Any, ...]:
        return self.token, self.layer, self.neurons.tobytes()

    @property
    def width(self) -> int:
        return len(self.neurons)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return "view", self.stage, *self.key  # the values need not be hashed

    def read(self, tokens: np.ndarray) -> np.ndarray:
        """Values (token, neuron) of ascending token numbers, without reading wide gaps."""
        whole = self.width == self.array.shape[2]
        hull = slice(int(self.neurons.min()), int(self.neurons.max()) + 1)
        out: np.ndarray | None = None
        gaps = np.flatnonzero(np.diff(tokens) > _MAX_GAP) + 1
        for run in np.split(np.arange(len(tokens)), gaps):
            for top in range(0, len(run), _RUN_TOKENS):
                at = run[top : top + _RUN_TOKENS]
                first, last = tokens[at[0]], tokens[at[-1]]
                values = self.array[self.layer_index, slice(first, last + 1), hull]
                if not isinstance(values, np.ndarray):
                    values = values.compute(scheduler="synchronous")
                if len(values) > len(at):
                    values = values[tokens[at] - first]
                if not whole:
                    values = values[:, self.neurons - hull.start]
                if len(at) == len(tokens):
                    return values
                if out is None:
                    out = np.empty((len(tokens), self.width), values.dtype)
                out[at[0] : at[-1] + 1] = values
        assert out is not None
        return out


@dataclass(frozen=True)
class Rows:
    """The tokens of a joint reading.

    Attributes
    ----------
    n_tokens : int
        Of the data.
    mask : ndarray of bool or None
    """

    n_tokens: int
    mask: np.ndarray | None

    @cached_property
    def token(self) -> str:
        """What identifies the choice."""
        return tokenize(self.n_tokens, self.mask)

    def __dask_tokenize__(self) -> tuple[str, str]:
        return "rows", self.token

    @cached_property
    def tokens(self) -> np.ndarray:
        return np.arange(self.n_tokens) if self.mask is None else np.flatnonzero(self.mask)


class Question(Protocol):
    """What is asked of some views.

    Attributes
    ----------
    views : sequence of View
    pairs : sequence of (int, int)
        Views whose products are needed; (i, i) for products of a view with itself.
    space : tuple of str and bool
        Where rows are compared by streamed products: as in `stats.products`; and whether rows
        without a direction are kept.
    spectral : bool
        Whether eigenvalues are needed.
    gram_only : bool
        Whether there is no other route than by Gram matrices.
    """

    @property
    def views(self) -> Sequence[View]: ...

    @property
    def pairs(self) -> Sequence[tuple[int, int]]: ...

    @property
    def space(self) -> Space: ...

    @property
    def spectral(self) -> bool: ...

    @property
    def gram_only(self) -> bool: ...

    def by_grams(self, grams: Grams) -> Answers:
        """Answers from Gram matrices of its views, in their order."""
        ...

    def by_products(self, streamed: Streamed) -> Answers:
        """Answers from streamed products of its views, in their order."""
        ...


@dataclass(frozen=True)
class Grams:
    """Gram matrices of a question's views, and the tokens they are of."""

    grams: Sequence[Gram]
    tokens: np.ndarray


@dataclass(frozen=True)
class Streamed:
    """Streamed products of a question's views, in its own space."""

    n: int
    _places: Sequence[int]
    _found: _Found
    _space: Space

    def pair(self, a: int, b: int) -> tuple[PairSums, PairSums, PairSums]:
        """Sums of two views, and of each with itself over the same rows."""
        i, j = self._places[a], self._places[b]
        found, space = self._found, self._space
        if i == j:
            return (found.own[space, i, i],) * 3
        if i > j:  # sums are kept for one order of a pair
            second, first = found.own[space, j, i], found.own[space, i, j]
            return found.pairs[space, j, i].swapped(), first, second
        return found.pairs[space, i, j], found.own[space, i, j], found.own[space, j, i]

    def dropped(self, a: int, b: int) -> int:
        """Rows left out of a pair."""
        i, j = sorted((self._places[a], self._places[b]))
        return self._found.dropped.get((self._space, i, j), 0)

    def own(self, a: int) -> PairSums:
        """Sums of a view with itself."""
        i = self._places[a]
        return self._found.own[self._space, i, i]

    def scatter(self, a: int) -> np.ndarray:
        """Products of neurons about their means, (neuron, neuron)."""
        return self._found.scatters[self._places[a]]


class _Found:
    """What the passes over the rows have brought."""

    def __init__(self) -> None:
        self.pairs: dict[tuple[Space, int, int], PairSums] = {}
        self.own: dict[tuple[Space, int, int], PairSums] = {}
        self.dropped: dict[tuple[Space, int, int], int] = {}
        self.scatters: dict[int, np.ndarray] = {}


# -- running -------------------------------------------------------------------------------


def run_joint(rows: Rows, memory: int, *questions: Question) -> list[Answers]:
    """Read the rows of all views once, or as often as memory demands, and answer everything."""
    keep_memory()
    views = list({v.key: v for q in questions for v in q.views}.values())
    plan = _Plan(views, len(rows.tokens), memory, questions)
    # NaN and inf in the data are NaN in the answers, without a word on the way.
    with _lease(plan.nbytes, memory), np.errstate(invalid="ignore"):
        if plan.by_grams:
            return _answer_by_grams(rows, plan)
        return _answer_by_products(rows, plan)


def passes_over(views: Sequence[View], n: int, memory: int, questions: Sequence[Question]) -> int:
    """How often the rows would be read.

    Raises
    ------
    UsageError
        The memory limit is too small by either route.
    """
    plan = _Plan(list({v.key: v for v in views}.values()), n, memory, questions)
    return 1 if plan.by_grams else len(plan.passes())


def choose_grams(flops_grams: float, flops_products: float) -> bool:
    """Whether to go by Gram matrices where both routes can be gone."""
    return flops_grams <= flops_products


def goes_by_grams(rows: Rows, memory: int, *questions: Question) -> bool:
    """Whether `run_joint` would."""
    views = list({v.key: v for q in questions for v in q.views}.values())
    return _Plan(views, len(rows.tokens), memory, questions).by_grams


def fits(rows: Rows, memory: int, *questions: Question) -> bool:
    """Whether questions can be answered together; those that can be one by one need not."""
    try:
        goes_by_grams(rows, memory, *questions)
    except UsageError:
        return False
    return True


class _Plan:
    """The route of a joint reading and what it takes."""

    def __init__(
        self, views: list[View], n: int, memory: int, questions: Sequence[Question]
    ) -> None:
        self.views, self.n, self.memory, self.questions = views, n, memory, questions
        self.places = {v.key: i for i, v in enumerate(views)}
        widths = [v.width for v in views]
        gram_nbytes = 8 * n * n * (len(views) + 3) + 16 * n * max(widths)
        flops_grams = sum(n * n * d for d in widths)
        flops_products = sum(
            (1 if i == j else 2) * n * widths[i] * widths[j]
            for own in self.needed().values()
            for i, j in own
        )
        for i in self.spectral():
            flops_grams += _EIGEN_COST * n**3
            flops_products += _EIGEN_COST * widths[i] ** 3
        fits = gram_nbytes <= memory or n <= 64
        only = any(q.gram_only for q in questions)
        if only and not fits:
            raise UsageError(
                f"similarities of {n:,} x {n:,} tokens for {len(views)} stages and layers take "
                f"{gram_nbytes / 1e9:,.1f} GB, and memory is {memory / 1e9:,.1f} GB: raise "
                "memory, or lower sample"
            )
        self.by_grams = only or (fits and choose_grams(flops_grams, flops_products))
        self.nbytes = min(gram_nbytes if self.by_grams else memory, memory)
        if not self.by_grams:
            self._check_spectral(widths)

    def of(self, question: Question) -> list[int]:
        """Places of a question's views."""
        return [self.places[v.key] for v in question.views]

    def needed(self) -> dict[Space, set[tuple[int, int]]]:
        """Products needed in each space, each view's with itself among them."""
        needed: dict[Space, set[tuple[int, int]]] = {}
        for q in self.questions:
            places, own = self.of(q), needed.setdefault(q.space, set())
            for a, b in q.pairs:
                i, j = sorted((places[a], places[b]))
                own |= {(i, j), (i, i), (j, j)}
        return needed

    def spectral(self) -> set[int]:
        """Views whose eigenvalues are asked."""
        return {i for q in self.questions if q.spectral for i in self.of(q)}

    def _check_spectral(self, widths: Sequence[int]) -> None:
        for i in self.spectral():
            nbytes = 24 * widths[i] ** 2
            if nbytes > self.memory:
                raise UsageError(
                    f"the covariance of {self.views[i].stage}, {widths[i]:,} neurons wide, takes "
                    f"{nbytes / 1e9:,.1f} GB with its eigenvalues, and memory is "
                    f"{self.memory / 1e9:,.1f} GB: raise memory, or choose neurons or fewer tokens"
                )

    @property
    def block_tokens(self) -> int:
        """Rows in memory at a time, as they are and about the shift."""
        fit = self.memory // 8 // (8 * sum(v.width for v in self.views))
        return int(np.clip(fit, *_BLOCK_TOKENS))

    def passes(self) -> list[list[tuple[Space, Core]]]:
        """Products in portions that fit half the memory; a wide one is cut."""
        room = self.memory // 2
        portions: list[list[tuple[Space, Core]]] = [[]]
        used = 0
        spectral = self.spectral()
        for space, pairs in self.needed().items():
            for i, j in sorted(pairs):
                width, row = self.views[i].width, 8 * self.views[j].width
                whole = i == j and i in spectral and space[0] == "linear"
                step = width if whole else max(1, min(width, room // 2 // row))
                for top in range(0, width, step):
                    core = Core(i, j, slice(top, min(top + step, width)))
                    nbytes = row * (core.rows.stop - top)
                    if used and used + nbytes > room:
                        portions.append([])
                        used = 0
                    portions[-1].append((space, core))
                    used += nbytes
        return portions


def _answer_by_grams(rows: Rows, plan: _Plan) -> list[Answers]:
    grams = [Gram.of(view.read(rows.tokens)) for view in plan.views]
    return [q.by_grams(Grams([grams[i] for i in plan.of(q)], rows.tokens)) for q in plan.questions]


def _answer_by_products(rows: Rows, plan: _Plan) -> list[Answers]:
    found, needed, spectral = _Found(), plan.needed(), plan.spectral()
    for portion in plan.passes():
        running = {
            space: Products(space[0], [c for s, c in portion if s == space], pairs, space[1])
            for space, pairs in needed.items()
        }
        running = {space: p for space, p in running.items() if any(s == space for s, _ in portion)}
        for top in range(0, len(rows.tokens), plan.block_tokens):
            tokens = rows.tokens[top : top + plan.block_tokens]
            blocks = [view.read(tokens) for view in plan.views]
            for products in running.values():
                products.add(blocks)
            del blocks
        for space, products in running.items():
            _note(found, space, products, portion, needed[space], spectral)
        del running
    n = len(rows.tokens)
    return [q.by_products(Streamed(n, plan.of(q), found, q.space)) for q in plan.questions]


def _note(
    found: _Found,
    space: Space,
    products: Products,
    portion: Sequence[tuple[Space, Core]],
    pairs: set[tuple[int, int]],
    spectral: set[int],
) -> None:
    """Keep of a pass the sums, which are small, and the covariances that are asked for."""
    for i, j in {(c.a, c.b) for s, c in portion if s == space}:
        if i != j:
            _add(found.pairs, (space, i, j), products.pair(i, j))
            found.dropped[space, i, j] = products.dropped[i, j]
            continue
        _add(found.own, (space, i, i), products.own(i, i))
        for a, b in pairs:
            if i in (a, b) and a != b:
                other = b if i == a else a
                _add(found.own, (space, i, other), products.own(i, other))
        if i in spectral and space[0] == "linear":
            found.scatters[i] = products.whole(i)


def _add(into: dict[Any, PairSums], key: Any, sums: PairSums) -> None:
    into[key] = into[key] + sums if key in into else sums


class _Leases:
    """Bytes lent to the joint readings of this process, which wait for one another."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._lent = 0

    @contextmanager
    def __call__(self, nbytes: int, most: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._lent or self._lent + nbytes <= most)
            self._lent += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._lent -= nbytes
                self._changed.notify_all()


_lease: Callable[[int, int], Any] = _Leases()
