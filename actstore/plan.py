"""The plan: token table, batches, blocks and sizes, all known before anything runs.

A plan is a function of the corpus and the arguments only, so that the same command always means
the same batches in the same order, and the same bits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from .corpus import Corpus
from .errors import PlanError, UnknownNameError
from .schema import TABLES
from .shard import Layout

__all__ = ["DTYPES", "Batch", "Plan", "StagePlan", "StageSpec", "canonical_json", "parse_bytes"]

DTYPES = ("float32", "float16", "bfloat16")
"""Element types that a store can hold; bfloat16 as float32 with a zero low half."""

CHUNK_NBYTES = 2**20
SHARD_NBYTES = 2**26
WINDOW_TOKENS = 2**16
PADDING = 1.10
SMALL_SHARD_NBYTES = 4 * 2**20

MAX_PREDICTIONS = 1024
"""Most next tokens kept of every token: beyond, the table outgrows the activations."""


@dataclass(frozen=True)
class StageSpec:
    """What is to be kept of one stage.

    Attributes
    ----------
    name : str
        Group name in the store.
    layers : tuple of int
        Layers, as the model counts them.
    width : int
        Neurons.
    source_dtype : str
        Element type of the values that come: one of `DTYPES`.
    heads : int, optional
        Number of attention heads that the width is made of.

    Examples
    --------
    >>> StageSpec("attn_z", layers=(0, 1), width=768, heads=12).source_dtype
    'float32'
    """

    name: str
    layers: tuple[int, ...]
    width: int
    source_dtype: str = "float32"
    heads: int | None = None


@dataclass(frozen=True)
class StagePlan:
    """One stage as it will lie in the store."""

    name: str
    layers: tuple[int, ...]
    layout: Layout
    heads: int | None

    @property
    def folder(self) -> str:
        return f"{self.name}/activation"

    def key(self, layer_index: int, block: int) -> str:
        return f"{self.folder}/c.{layer_index}.{block}.0"


@dataclass(frozen=True)
class Batch:
    """Sequences that go through the model together.

    Attributes
    ----------
    sequences : ndarray of int
        Rows of the batch, as indices into the corpus.
    length : int
        Padded length.
    """

    sequences: np.ndarray
    length: int


@dataclass(frozen=True)
class Plan:
    """Everything about a dump but the activations. Build one with `Plan.build`.

    Attributes
    ----------
    corpus : Corpus
        The inputs.
    stages : tuple of StagePlan
        What is kept, and how it lies on disk.
    block_tokens : int
        Tokens of a block, a power of two.
    batches : tuple of Batch
        In the order in which they run.
    passes : tuple of dict
        For each run over the corpus, the layer indices captured of each stage.
    buffer : int
        Host memory for shards being filled and written, in bytes.
    padding_side : {"right", "left"}
        Where short rows of a batch are padded.
    provenance : dict
        Where the values come from (model, tokenizer, versions), JSON only; part of the config.
    sketch : bool
        Whether statistics are made while writing.
    sketch_by : str or None
        Label whose values the sketches keep apart.
    notes : tuple of str
        What a person should know of the layout.
    predictions : int
        How many of the model's own likeliest next tokens are kept of every token.
    outcomes : bool
        Whether loss, entropy and the true next token's rank are.

    Examples
    --------
    >>> from actstore import build_corpus
    >>> corpus = build_corpus([[1, 2, 3], [4, 5]])
    >>> plan = Plan.build(corpus, [StageSpec("mlp_post", layers=(0, 1), width=32)])
    >>> plan.n_tokens, plan.n_blocks, plan.shards, plan.nbytes
    (5, 1, 2, 1280)
    """

    corpus: Corpus
    stages: tuple[StagePlan, ...]
    block_tokens: int
    batches: tuple[Batch, ...]
    passes: tuple[dict[str, tuple[int, ...]], ...]
    buffer: int
    padding_side: str
    provenance: Mapping[str, Any]
    sketch: bool = True
    sketch_by: str | None = None
    notes: tuple[str, ...] = ()
    predictions: int = 0
    outcomes: bool = False

    # -- building ----------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        corpus: Corpus,
        stages: Sequence[StageSpec],
        *,
        dtype: str | None = None,
        buffer: int | str = "1GiB",
        passes: int = 1,
        batch_tokens: int = 1024,
        padding_side: str = "right",
        provenance: Mapping[str, Any] | None = None,
        sketch: bool = True,
        sketch_by: str | None = None,
        predictions: int = 0,
        outcomes: bool = False,
    ) -> Plan:
        """Lay out blocks and batches.

        Parameters
        ----------
        corpus : Corpus
            From `actstore.corpus.build`.
        stages : sequence of StageSpec
            What is kept.
        dtype : {"float32", "float16", "bfloat16"}, optional
            Stored element type; default: each stage's own.
        buffer : int or str
            Host memory for shards in flight, in bytes or as "512MiB".
        passes : int
            Times the corpus is run, each capturing a group of layers with larger blocks.
        batch_tokens : int
            Tokens of a batch, padding included; one longer sequence is a batch of its own.
        padding_side : {"right", "left"}
            Where short rows are padded.
        provenance : mapping, optional
            JSON facts about the model, stored and compared on resume.
        sketch : bool
            Make statistics while writing, which later answer most questions at once.
        sketch_by : str, optional
            A text label of at most 64 values, which the sketches keep apart.
        predictions : int
            How many of the model's own likeliest next tokens are kept of every token, with their
            probabilities; 0 for none.
        outcomes : bool
            Keep loss, entropy and the true next token's rank of every token.

        Returns
        -------
        Plan

        Raises
        ------
        PlanError
            Nothing to keep, a buffer too small for a block of 16 tokens, more predictions than
            `MAX_PREDICTIONS`, or a label that is named like an outcome.
        """
        if dtype is not None and dtype not in DTYPES:
            raise UnknownNameError("dtype", dtype, DTYPES)
        if padding_side not in ("right", "left"):
            raise UnknownNameError("padding side", padding_side, ("right", "left"))
        if not stages:
            raise PlanError("no stages to keep: name at least one, for example mlp_post")
        if not 0 <= predictions <= MAX_PREDICTIONS:
            raise PlanError(
                f"predictions is {predictions}: it must be from 1 to {MAX_PREDICTIONS:,}, or 0 for "
                "none"
            )
        if outcomes:
            _check_labels(corpus)
        if batch_tokens < 1:
            raise PlanError(f"batch_tokens is {batch_tokens}: it must be at least 1")
        most = max(len(s.layers) for s in stages)
        if not 1 <= passes <= most:
            raise PlanError(f"passes is {passes}: it must be from 1 to {most}, the layers kept")
        buffer = parse_bytes(buffer)
        groups = tuple(_pass_layers(stages, passes, p) for p in range(passes))
        tokens = int(corpus.kept_lengths.sum())
        if tokens == 0:
            raise PlanError("no token is kept: loosen --keep, --skip-first or --skip-special")

        sources = {s.name: dtype or s.source_dtype for s in stages}
        items = {s.name: 4 if sources[s.name] == "float32" else 2 for s in stages}
        per_token = max(
            sum(len(group[s.name]) * s.width * items[s.name] for s in stages) for group in groups
        )
        block = _block_tokens(tokens, per_token, max(s.width for s in stages), buffer)
        planned = tuple(
            StagePlan(s.name, s.layers, _layout(s.width, block, tokens, sources[s.name]), s.heads)
            for s in stages
        )
        one_layer = sum(s.width * items[s.name] for s in stages)
        batches = _fitting_batches(corpus, batch_tokens, block, per_token, one_layer, buffer)
        plan = cls(
            corpus,
            planned,
            block,
            batches,
            groups,
            max(buffer, peak_buffer(corpus, batches, block, per_token, one_layer)),
            padding_side,
            dict(provenance or {}),
            sketch,
            sketch_by,
            predictions=predictions,
            outcomes=outcomes,
        )
        return plan._with_notes(per_token)

    def _with_notes(self, per_token: int) -> Plan:
        notes = []
        if self.block_tokens < 1024 and self.n_tokens > self.block_tokens:
            buffer = 2 * 1024 * per_token
            layers = max(len(s.layers) for s in self.stages)
            passes = min(layers, math.ceil(len(self.passes) * buffer / self.buffer))
            notes.append(
                f"blocks hold only {self.block_tokens} tokens, because {per_token:,} bytes a token "
                f"must fit the buffer twice: `--buffer {_ceil_gib(buffer)}GiB` or `--passes "
                f"{passes}` gives blocks of 1,024"
            )
        small = min(s.layout.rows * s.layout.width * _item(s.layout) for s in self.stages)
        if small < SMALL_SHARD_NBYTES and self.n_blocks > 16:
            notes.append(
                f"the smallest shards hold {small / 2**20:.2g} MiB, under 4 MiB: many small files"
            )
        return replace(self, notes=tuple(notes))

    # -- the token table ---------------------------------------------------------------------

    @cached_property
    def kept(self) -> np.ndarray:
        """(token,) index into the inputs of each kept token."""
        return np.flatnonzero(self.corpus.keep)

    @cached_property
    def first_token(self) -> np.ndarray:
        """(sequence + 1,) first kept token of each sequence."""
        return first_tokens(self.corpus)

    @property
    def n_tokens(self) -> int:
        """Tokens that are kept."""
        return int(self.first_token[-1])

    @property
    def n_blocks(self) -> int:
        """Blocks of `block_tokens` tokens, the last one perhaps short."""
        return -(-self.n_tokens // self.block_tokens)

    def block_rows(self, block: int) -> int:
        """Tokens of a block; the last one may be short.

        Parameters
        ----------
        block : int
            Its number.

        Returns
        -------
        int
        """
        return min(self.block_tokens, self.n_tokens - block * self.block_tokens)

    def batch_blocks(self, batch: Batch) -> np.ndarray:
        """Blocks that a batch has tokens in.

        Parameters
        ----------
        batch : Batch
            One of `batches`.

        Returns
        -------
        ndarray of int
            Ascending.
        """
        first = self.first_token[batch.sequences] // self.block_tokens
        last = (self.first_token[batch.sequences + 1] - 1) // self.block_tokens
        return np.unique(
            np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)])
        )

    def batch_places(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Where the kept tokens of a batch are, and where they go.

        Parameters
        ----------
        batch : Batch
            One of `batches`.

        Returns
        -------
        source : ndarray of int (k,)
            Index into the padded batch, flattened row by row.
        token : ndarray of int (k,)
            Index along the store's token dimension, ascending.
        """
        sources, tokens = [], []
        for row, s in sorted(enumerate(batch.sequences.tolist()), key=lambda pair: pair[1]):
            token = np.arange(self.first_token[s], self.first_token[s + 1])
            start, stop = self.corpus.starts[s : s + 2]
            shift = batch.length - (stop - start) if self.padding_side == "left" else 0
            sources.append(self.kept[token] - start + shift + row * batch.length)
            tokens.append(token)
        return np.concatenate(sources), np.concatenate(tokens)

    # -- sizes -------------------------------------------------------------------------------

    @property
    def computed_tokens(self) -> int:
        """Tokens that one pass puts through the model, padding included."""
        return sum(b.length * len(b.sequences) for b in self.batches)

    @property
    def shards(self) -> int:
        """Shards, each a file: one for each layer and block."""
        return self.n_blocks * sum(len(s.layers) for s in self.stages)

    def stage_nbytes(self, stage: StagePlan) -> int:
        """Bytes of a stage on disk, before any compression.

        Parameters
        ----------
        stage : StagePlan
            One of `stages`.

        Returns
        -------
        int
        """
        return self.n_tokens * len(stage.layers) * stage.layout.width * _item(stage.layout)

    @property
    def nbytes(self) -> int:
        """Bytes of everything on disk, before any compression."""
        return sum(self.stage_nbytes(s) for s in self.stages) + self.tables_nbytes

    # -- predictions and outcomes --------------------------------------------------------------

    @property
    def tables(self) -> list[str]:
        """Arrays of predictions and outcomes that are asked for: keys of `schema.TABLES`."""
        asked = {"predictions": self.predictions > 0, "outcomes": self.outcomes}
        return [key for key in TABLES if asked[key.partition("/")[0]]]

    @property
    def table_columns(self) -> int:
        """Numbers of 4 bytes that the tables keep of every token."""
        return sum(self.predictions if TABLES[key].ranked else 1 for key in self.tables)

    @property
    def tables_nbytes(self) -> int:
        """Bytes of predictions and outcomes, before any compression."""
        return 4 * self.n_tokens * self.table_columns

    @cached_property
    def next_token(self) -> np.ndarray:
        """(token,) id of the input after each kept token in its sequence; -1 after the last."""
        ids = np.append(self.corpus.token_ids[1:], -1).astype(np.int64)
        ids[self.corpus.starts[1:] - 1] = -1
        return ids[self.kept]

    # -- identity ----------------------------------------------------------------------------

    @cached_property
    def config(self) -> dict[str, Any]:
        """All that determines the bits of the store, JSON only."""
        shape = hashlib.sha256()
        for batch in self.batches:
            shape.update(np.asarray(batch.sequences, "<i8").tobytes())
            shape.update(batch.length.to_bytes(8, "little"))
        return {
            "capture": {
                "stages": {
                    s.name: {
                        "layers": list(s.layers),
                        "width": s.layout.width,
                        "dtype": s.layout.source_dtype,
                    }
                    for s in self.stages
                },
                "block_tokens": self.block_tokens,
                "passes": len(self.passes),
                "padding_side": self.padding_side,
                "batches": {"count": len(self.batches), "sha256": shape.hexdigest()},
                **({"predictions": self.predictions} if self.predictions else {}),
                **({"outcomes": True} if self.outcomes else {}),
            },
            "corpus": {
                "sequences": self.corpus.n_sequences,
                "inputs": len(self.corpus.token_ids),
                "tokens": self.n_tokens,
                "sha256": self.corpus.digest(),
            },
            **json.loads(canonical_json(self.provenance)),
        }

    @property
    def config_hash(self) -> str:
        """SHA-256 (hex) of `config`: runs with the same one write the same store."""
        return hashlib.sha256(canonical_json(self.config).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def parse_bytes(size: int | str) -> int:
    """Bytes of a size such as ``"1GiB"``, ``"500 MB"`` or ``4096``.

    Examples
    --------
    >>> parse_bytes("1GiB"), parse_bytes("1.5kB")
    (1073741824, 1500)
    """
    from dask.utils import parse_bytes as parse

    try:
        parsed = int(parse(size))
    except (ValueError, TypeError):
        raise PlanError(
            f"size {size!r} is not understood: write for example 512MiB or 2GB"
        ) from None
    if parsed <= 0:
        raise PlanError(f"size {size!r} must be more than nothing")
    return parsed


def first_tokens(corpus: Corpus) -> np.ndarray:
    """(sequence + 1,) kept tokens before each sequence, and of all."""
    return np.concatenate([[0], np.cumsum(corpus.kept_lengths)])


def peak_buffer(
    corpus: Corpus, batches: Sequence[Batch], block: int, per_token: int, one_layer: int
) -> int:
    """Most bytes of shards that are ever open at once while the batches run in order.

    A block stays open in all layers from the first batch that touches it to the last. Inside a
    forward pass the layer being computed holds all the blocks of the batch beside those that were
    open; the layers before it hold what is open after the batch, those behind it what was before.
    """
    token = first_tokens(corpus)
    sequences = np.concatenate([batch.sequences for batch in batches])
    which = np.repeat(np.arange(len(batches)), [len(batch.sequences) for batch in batches])
    first, last = token[sequences] // block, (token[sequences + 1] - 1) // block
    n_blocks = int(last.max()) + 1
    opened = np.full(n_blocks, len(batches))
    closed = np.zeros(n_blocks, dtype=np.int64)
    reach = int((last - first).max())
    for step in range(reach + 1):
        inside = first + step <= last
        np.minimum.at(opened, first[inside] + step, which[inside])
        np.maximum.at(closed, first[inside] + step, which[inside])
    change = np.zeros(len(batches) + 1, dtype=np.int64)
    np.add.at(change, opened, 1)
    np.add.at(change, closed, -1)
    after = np.cumsum(change[:-1])
    before = np.concatenate([[0], after[:-1]])
    change = np.zeros(len(batches) + 1, dtype=np.int64)
    np.add.at(change, opened, 1)
    np.add.at(change, closed + 1, -1)
    during = np.cumsum(change[:-1])
    one_layer = min(one_layer, per_token)
    others = per_token - one_layer
    return int((np.maximum(before, after) * others + during * one_layer).max()) * block


def _fitting_batches(
    corpus: Corpus, batch_tokens: int, block: int, per_token: int, one_layer: int, buffer: int
) -> tuple[Batch, ...]:
    """Batches whose open blocks fit the buffer, from the widest sorting window that allows it."""
    spare = max(1, buffer // (block * per_token) - 1)
    window = min(max(block * spare, batch_tokens), WINDOW_TOKENS)
    while True:
        batches = tuple(_batches(corpus, batch_tokens, window))
        fits = peak_buffer(corpus, batches, block, per_token, one_layer) <= buffer
        if fits or window <= 1:
            return batches
        window //= 2


def _batches(corpus: Corpus, batch_tokens: int, window_tokens: int) -> Iterator[Batch]:
    """Group sequences in order, sorted by length within a window, so that few pads are computed."""
    sequences = np.flatnonzero(corpus.kept_lengths)
    lengths = np.diff(corpus.starts)[sequences]
    window = (np.cumsum(lengths) - lengths) // window_tokens
    for rows in np.split(np.arange(len(sequences)), np.flatnonzero(np.diff(window)) + 1):
        order = rows[np.argsort(-lengths[rows], kind="stable")]
        start = 0
        while start < len(order):
            longest = int(lengths[order[start]])
            stop, real = start + 1, longest
            while stop < len(order):
                padded = longest * (stop + 1 - start)
                grown = real + int(lengths[order[stop]])
                if padded > batch_tokens or padded > PADDING * grown:
                    break
                stop, real = stop + 1, grown
            yield Batch(sequences[order[start:stop]], longest)
            start = stop


def _pass_layers(
    stages: Sequence[StageSpec], passes: int, index: int
) -> dict[str, tuple[int, ...]]:
    """Layer indices of each stage that one pass captures: a run of the model's own layers."""
    everything = sorted({layer for s in stages for layer in s.layers})
    low, high = (len(everything) * p // passes for p in (index, index + 1))
    mine = set(everything[low:high])
    return {s.name: tuple(i for i, n in enumerate(s.layers) if n in mine) for s in stages}


def _block_tokens(tokens: int, per_token: int, width: int, buffer: int) -> int:
    """Largest power of two of which two fit the buffer, one being written while one fills."""
    fitting = buffer // (2 * per_token)
    if fitting < 16:
        raise PlanError(
            f"a block of 16 tokens needs a buffer of {2 * 16 * per_token / 2**20:,.0f} MiB, more "
            f"than the {buffer / 2**20:,.0f} MiB given: raise --buffer, use --passes, or keep "
            "fewer stages or layers"
        )
    wanted = min(fitting, max(1024, SHARD_NBYTES // (4 * width)))
    enough = 2 * _power_below(max(1, tokens - 1))
    return min(_power_below(wanted), max(16, enough))


def _layout(width: int, block: int, tokens: int, source: str) -> Layout:
    dtype = "float16" if source == "float16" else "float32"
    item = np.dtype(dtype).itemsize
    columns = _chunk_width(width)
    rows = _power_below(CHUNK_NBYTES // (columns * item))
    # The last row of chunks is padded: in a small store chunks are small, so that this is little.
    rows = min(rows, block, max(16, _power_below(tokens) // 8))
    return Layout(block, width, rows, columns, dtype, source)


def _check_labels(corpus: Corpus) -> None:
    """Outcomes are columns of tokens as labels are, and must not be taken for one another."""
    outcomes = [key.partition("/")[2] for key in TABLES if key.startswith("outcomes/")]
    for name in outcomes:
        if name in corpus.sequence_labels or name in corpus.token_labels:
            raise PlanError(
                f"the label column {name!r} has the name of an outcome (they are "
                f"{', '.join(outcomes)}): give it another name, or leave outcomes out"
            )


def _power_below(n: int) -> int:
    """The largest power of two that is not above n (1 for n < 1)."""
    return 1 << max(0, n.bit_length() - 1)


def _chunk_width(width: int) -> int:
    """A divisor of the width, about a sixteenth of it: one neuron then reads a sixteenth."""
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    good = [d for d in divisors if 16 <= d <= max(32, width // 16)]
    return good[-1] if good else min((d for d in divisors if d >= 16), default=width)


def _item(layout: Layout) -> int:
    """Bytes of a value on disk; bfloat16 compresses to a little under its own 2 bytes."""
    return layout.memory_dtype.itemsize


def _ceil_gib(nbytes: int) -> int:
    return -(-nbytes // 2**30)
