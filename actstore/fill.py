"""Run the model over a plan's batches and write what its hooks see: `dump`.

On the CPU a hook copies the kept tokens straight into their shards. On a GPU it gathers and casts
them there, and a side stream brings them to pinned host memory while the model computes on.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from crc32c import crc32c
from torch import Tensor, nn

from .capture import base_model, batch_inputs, capture, probe
from .corpus import Corpus, build
from .errors import ModelError, PlanError
from .head import Head, digest_of, last_hidden, predict
from .hookpoints import HookPoint, head_count, resolve
from .plan import Batch, Plan, StageSpec
from .schema import MLP_STAGES
from .tables import split
from .tokenise import token_texts
from .writer import Writer

if TYPE_CHECKING:
    from .store import Store

__all__ = ["Progress", "dump", "model_corpus", "plan_model", "vocabulary"]

_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
_STAGING_SLOTS = 4


@dataclass(frozen=True)
class Progress:
    """How far a dump is, as `dump(progress=...)` is told after every batch.

    Attributes
    ----------
    tokens, tokens_total : int
        Kept tokens that have gone through the model in all passes, and that will.
    nbytes : int
        Bytes written so far by this process.
    """

    tokens: int
    tokens_total: int
    nbytes: int


class _Enough(Exception):  # noqa: N818 - not an error: nothing after the last hook is needed
    pass


def dump(
    model: nn.Module,
    tokenizer: Any,
    sequences: Corpus | Iterable[Any],
    path: str | os.PathLike[str],
    *,
    stages: Sequence[str] = MLP_STAGES,
    layers: str | Sequence[int] | None = None,
    dtype: str | None = None,
    buffer: int | str = "1GiB",
    passes: int = 1,
    batch_tokens: int | None = None,
    padding_side: str = "right",
    sketch: bool = True,
    sketch_by: str | None = None,
    predictions: int = 0,
    outcomes: bool = False,
    rank: int = 0,
    world_size: int = 1,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    name: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    **corpus_options: Any,
) -> Store | None:
    """Run a model over sequences and keep its activations in a store.

    Rerunning the same call goes on where a stopped one left off, checks a finished store and
    redoes what is damaged, and gives the same bytes either way.

    Parameters
    ----------
    model : Module
        A transformers model, loaded, on its device, with or without a head; with it for
        `predictions` and `outcomes`.
    tokenizer : tokenizer or None
        None where `sequences` are token ids.
    sequences : Corpus or iterable
        A corpus from `actstore.corpus.build`, or texts, token id lists, or mappings with a
        "text" or "input_ids" key whose other keys become label columns.
    path : path
        The store to write, by custom ``NAME.zarr``.
    stages : sequence of str
        Stage names, or ``name=path.with.{layer}.in.it[:input|:output]``.
    layers : str or sequence of int, optional
        For example ``"0,3-5"`` or ``"-1"``; default all.
    dtype : {"float32", "float16", "bfloat16"}, optional
        Stored element type; default the model's own.
    buffer : int or str
        Host memory for shards being filled and written.
    passes : int
        Times to run the corpus, each capturing a group of layers with larger blocks.
    batch_tokens : int, optional
        Tokens of a batch, padding included. Default: 1,024 on the CPU, 8,192 on a GPU.
    padding_side : {"right", "left"}
        Where short rows of a batch are padded.
    sketch : bool
        Make statistics while writing, which later answer most questions at once.
    sketch_by : str, optional
        A text label of at most 64 values, which the sketches keep apart.
    predictions : int
        Keep this many of the model's own likeliest next tokens of every token, with their
        probabilities.
    outcomes : bool
        Keep of every token how its prediction comes out: loss, entropy, and the rank of the true
        next token. Expressions know them: ``"loss > 5"``.
    rank, world_size : int
        This process's share where several write the same store.
    threads : int, optional
        Writer threads.
    allow_nonfinite : bool
        Store NaN and inf instead of refusing them.
    name : str, optional
        What to call the model in the store; default: its configuration's name.
    progress : callable, optional
        Called with a `Progress` after every batch.
    **corpus_options
        Passed to `actstore.corpus.build`: ``context``, ``bos``, ``windows``, ``keep`` ...

    Returns
    -------
    Store or None
        The sealed store; None where other ranks still have blocks to write.

    Raises
    ------
    UsageError, ModelError, CaptureError, WriteError
        Each says what to do. What is committed stays, and the same call goes on from there.

    Examples
    --------
    >>> import tempfile, torch, transformers
    >>> config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50)
    >>> model = transformers.GPT2Model(config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = dump(model, None, [[1, 2, 3], [4, 5]], f"{folder}/run.zarr")
    ...     dict(store["mlp_post"].sizes)
    {'layer': 2, 'token': 5, 'neuron': 128}
    """
    if _device(model).type == "meta":
        raise ModelError("the model has no weights (it is on the meta device): load it with them")
    corpus = model_corpus(model, tokenizer, sequences, **corpus_options)
    plan, points = plan_model(
        model,
        tokenizer,
        corpus,
        stages=stages,
        layers=layers,
        dtype=dtype,
        buffer=buffer,
        passes=passes,
        batch_tokens=batch_tokens,
        padding_side=padding_side,
        name=name,
        sketch=sketch,
        sketch_by=sketch_by,
        predictions=predictions,
        outcomes=outcomes,
    )
    words = vocabulary(tokenizer, vocab_size(model)) if tokenizer is not None else None
    with Writer(
        path,
        plan,
        vocabulary=words,
        rank=rank,
        world_size=world_size,
        threads=threads,
        allow_nonfinite=allow_nonfinite,
    ) as writer:
        fill(model, points, writer, progress)
    if not writer.sealed:
        return None
    from .store import open_store

    return open_store(path)


def model_corpus(
    model: nn.Module, tokenizer: Any, sequences: Corpus | Iterable[Any], /, **options: Any
) -> Corpus:
    """Sequences as a corpus that fits the model: its context length and vocabulary."""
    if isinstance(sequences, Corpus):
        if options:
            raise PlanError(f"{', '.join(options)}: give these when you build the corpus")
        return sequences
    limit = _context(model)
    context = options.pop("context", None)
    if context is not None and limit is not None and context > limit:
        raise PlanError(f"context {context} is more than the model's {limit} positions")
    return build(
        sequences,
        tokenizer,
        context=context or limit,
        vocab_size=vocab_size(model),
        **options,
    )


def plan_model(
    model: nn.Module,
    tokenizer: Any,
    corpus: Corpus,
    *,
    stages: Sequence[str] = MLP_STAGES,
    layers: str | Sequence[int] | None = None,
    dtype: str | None = None,
    buffer: int | str = "1GiB",
    passes: int = 1,
    batch_tokens: int | None = None,
    padding_side: str = "right",
    name: str | None = None,
    sketch: bool = True,
    sketch_by: str | None = None,
    predictions: int = 0,
    outcomes: bool = False,
) -> tuple[Plan, list[HookPoint]]:
    """Plan a dump; see `dump` for the parameters. Works on a model on the meta device, too."""
    head = _head(model, predictions) if predictions or outcomes else None
    model = base_model(model)
    config = _config(model)
    points = resolve(config, stages, layers)
    found = probe(model, points)
    device = _device(model)
    specs = []
    for stage in dict.fromkeys(p.stage for p in points):
        members = [(p.layer, *found[i]) for i, p in enumerate(points) if p.stage == stage]
        widths = {width for _, width, _ in members}
        kinds = {str(kind).removeprefix("torch.") for _, _, kind in members}
        if len(widths) > 1 or len(kinds) > 1:
            raise PlanError(
                f"stage {stage} has widths {sorted(widths)} and types {sorted(kinds)} over its "
                "layers: an array needs one, so capture those layers as stages of their own"
            )
        specs.append(
            StageSpec(
                stage,
                tuple(layer for layer, _, _ in members),
                widths.pop(),
                _storable(kinds.pop()),
                head_count(config) if stage == "attn_z" else None,
            )
        )
    plan = Plan.build(
        corpus,
        specs,
        dtype=dtype,
        buffer=buffer,
        passes=passes,
        batch_tokens=batch_tokens or _BATCH_TOKENS.get(device.type, 1024),
        padding_side=padding_side,
        provenance=_provenance(model, tokenizer, device, name, head),
        sketch=sketch,
        sketch_by=sketch_by,
        predictions=predictions,
        outcomes=outcomes,
    )
    return plan, points


def _head(model: nn.Module, predictions: int) -> Head:
    """The head of a model that is to predict, looked at closely where it has weights."""
    head = Head(model)
    if predictions > head.vocab_size:
        raise PlanError(
            f"predictions is {predictions}, more than the {head.vocab_size} tokens that "
            f"{type(head.model).__name__} tells apart: ask for fewer"
        )
    if _device(model).type != "meta":
        head.check()
    return head


# -- filling -------------------------------------------------------------------------------


def fill(
    model: nn.Module,
    points: Sequence[HookPoint],
    writer: Writer,
    progress: Callable[[Progress], None] | None = None,
    staged: bool | None = None,
) -> None:
    """Run every batch that touches a missing block, and put what the hooks see.

    Parameters
    ----------
    model : Module
        With its head where the plan asks for predictions or outcomes.
    points : sequence of HookPoint
        What to capture.
    writer : Writer
        Entered.
    progress : callable, optional
        Called after every batch.
    staged : bool, optional
        Whether values go through staging buffers. Default: yes on a GPU. On the CPU only tests
        ask for it.
    """
    plan, device, base = writer.plan, _device(model), base_model(model)
    staged = device.type != "cpu" if staged is None else staged
    writer.hold = not staged  # staged values are put by a thread of their own
    layer_index = {s.name: {n: i for i, n in enumerate(s.layers)} for s in plan.stages}
    for index, group in enumerate(plan.passes):
        mine = [p for p in points if layer_index[p.stage][p.layer] in group[p.stage]]
        head = Head(model) if plan.tables and index == 0 else None  # one pass is enough
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(_evaluating(head.model if head else base))
            staging = None
            if staged:
                staging = stack.enter_context(_Staging(device, _largest_rows(plan)))
            sink = _Sink(writer, mine, staging, head)
            watch = stack.enter_context(capture(base, mine, sink))
            for seen, batch in zip(_running_tokens(plan), plan.batches, strict=True):
                if writer.wants(plan.batch_blocks(batch), index):
                    source, token = plan.batch_places(batch)
                    sink.pieces = _pieces(source, token, device)
                    with suppress(_Enough):
                        output = base(**batch_kwargs(plan, batch, base))
                        if head is not None:
                            sink.predict(last_hidden(output), source, token)
                    watch.done()
                    writer.catch_up()
                if progress is not None:
                    done = seen + index * plan.n_tokens
                    progress(Progress(done, plan.n_tokens * len(plan.passes), writer.bytes_written))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout: a model in training mode gives other values every time."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Sink:
    """Takes what the hooks see to the writer, for the batch whose `pieces` are set."""

    def __init__(
        self,
        writer: Writer,
        points: Sequence[HookPoint],
        staging: _Staging | None,
        head: Head | None,
    ) -> None:
        layouts = {s.name: s.layout for s in writer.plan.stages}
        self._targets = [getattr(torch, layouts[p.stage].source_dtype) for p in points]
        self._writer, self._points, self._staging, self._head = writer, points, staging, head
        self._received = 0
        self.pieces: list[tuple[slice | Tensor, int]] = []

    def __call__(self, i: int, values: Tensor) -> None:
        point = self._points[i]
        rows = values.reshape(-1, values.shape[-1])
        for source, token in self.pieces:
            put = partial(self._writer.put, point.stage, point.layer, token)
            self._send(_cast(rows[source], self._targets[i]), put)
        self._received += 1
        if self._received == len(self._points):
            self._received = 0
            if self._head is None:
                raise _Enough  # the rest is not needed; `probe` has run a whole pass

    def _send(self, values: Tensor, put: Callable[[np.ndarray], None]) -> None:
        if self._staging is None:
            put(_numpy(values))
        else:
            self._staging.send(values, put)

    def predict(self, hidden: Tensor, source: np.ndarray, token: np.ndarray) -> None:
        """Have the head predict what comes after each kept token, from the last hidden state."""
        if self._head is None:
            return
        plan, device = self._writer.plan, hidden.device
        rows = hidden.reshape(-1, hidden.shape[-1])[torch.from_numpy(source).to(device)]
        following = torch.from_numpy(plan.next_token[token]).to(device)
        made = predict(self._head, rows, following, plan.predictions, plan.outcomes)
        self._send(made, partial(_put_tables, self._writer, token))


def _put_tables(writer: Writer, token: np.ndarray, rows: np.ndarray) -> None:
    for run in _runs(token):
        writer.put_tables(int(token[run[0]]), split(writer.plan, rows[run]))


def _runs(token: np.ndarray) -> list[np.ndarray]:
    """Places of consecutive tokens."""
    return np.split(np.arange(len(token)), np.flatnonzero(np.diff(token) != 1) + 1)


def _running_tokens(plan: Plan) -> np.ndarray:
    """Kept tokens of the batches up to and with each."""
    per_sequence = np.diff(plan.first_token)
    return np.cumsum([per_sequence[b.sequences].sum() for b in plan.batches])


def batch_kwargs(plan: Plan, batch: Batch, model: nn.Module) -> dict[str, Any]:
    """What the model is called with for one batch."""
    starts, ids = plan.corpus.starts, plan.corpus.token_ids
    rows = [ids[starts[s] : starts[s + 1]] for s in batch.sequences]
    return batch_inputs(model, rows, plan.padding_side)


def _pieces(
    source: np.ndarray, token: np.ndarray, device: torch.device
) -> list[tuple[slice | Tensor, int]]:
    """Cut a batch's places into runs of consecutive tokens, each a slice where it can be one."""
    pieces: list[tuple[slice | Tensor, int]] = []
    for run in _runs(token):
        rows = source[run]
        if (np.diff(rows) == 1).all():
            pieces.append((slice(int(rows[0]), int(rows[-1]) + 1), int(token[run[0]])))
        else:
            pieces.append((torch.from_numpy(rows).to(device), int(token[run[0]])))
    return pieces


def _cast(rows: Tensor, target: torch.dtype) -> Tensor:
    """Round to bfloat16 where that is stored; float16 is cast by the writer, which checks."""
    if target == torch.bfloat16:
        return rows.to(torch.bfloat16)
    return rows.float() if rows.dtype == torch.bfloat16 else rows


def _numpy(rows: Tensor) -> np.ndarray:
    bits = rows.contiguous().view(torch.uint16) if rows.dtype == torch.bfloat16 else rows
    return bits.numpy()


class _Staging:
    """Pinned host buffers, filled by a side stream and emptied by a thread in order.

    The model's stream never waits for the disk or the bus, until all slots are full.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for _ in range(_STAGING_SLOTS):
            self._free.put(torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._cuda))
        self._filled: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._empty, name="actstore-staging", daemon=True)
        self._thread.start()

    def send(self, rows: Tensor, put: Callable[[np.ndarray], None]) -> None:
        if self._error is not None:
            raise self._error
        slot = self._free.get()
        rows = rows.contiguous()
        host = slot[: rows.numel() * rows.element_size()].view(rows.dtype).view(rows.shape)
        event = None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(rows.device))
            with torch.cuda.stream(self._stream):
                host.copy_(rows, non_blocking=True)
                event = self._stream.record_event()
            rows.record_stream(self._stream)
        else:
            host.copy_(rows)
        self._filled.put((slot, host, event, put))

    def _empty(self) -> None:
        while (item := self._filled.get()) is not None:
            slot, host, event, put = item
            try:
                if event is not None:
                    event.synchronize()
                if self._error is None:
                    put(_numpy(host))
            except BaseException as error:
                self._error = error
            self._free.put(slot)

    def __enter__(self) -> _Staging:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._filled.put(None)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error


def _largest_rows(plan: Plan) -> int:
    """Bytes of the largest piece that a hook can send."""
    rows = max(b.length * len(b.sequences) for b in plan.batches)
    return rows * max(plan.table_columns, *(s.layout.width for s in plan.stages)) * 4


# -- facts about models --------------------------------------------------------------------


def vocabulary(tokenizer: Any, size: int | None = None) -> np.ndarray:
    """Text of every token id.

    Parameters
    ----------
    tokenizer : tokenizer
        Of transformers.
    size : int, optional
        Number of ids, where the model has more of them than the tokenizer.

    Returns
    -------
    ndarray of str (vocab,)
        Ids without a token are "".
    """
    known = len(tokenizer)
    texts = np.full(max(size or 0, known), "", dtype=object)
    texts[:known] = token_texts(tokenizer, range(known))
    return texts


def _config(model: nn.Module) -> Mapping[str, Any]:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise ModelError(
            f"{type(model).__name__} has no transformers configuration; for other models use "
            "actstore.Writer with activations from your own loop"
        )
    return config.to_dict()


def vocab_size(model: nn.Module) -> int | None:
    """How many token ids the model embeds."""
    embeddings = getattr(base_model(model), "get_input_embeddings", lambda: None)()
    return getattr(embeddings, "num_embeddings", None)


def _context(model: nn.Module) -> int | None:
    config = getattr(base_model(model), "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    # RoBERTa's and MPNet's positions start behind the padding id's.
    if limit and getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "mpnet"):
        limit -= getattr(config, "pad_token_id", 1) + 1
    return limit


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _storable(kind: str) -> str:
    return kind if kind in ("float16", "bfloat16") else "float32"


def _provenance(
    model: nn.Module,
    tokenizer: Any,
    device: torch.device,
    name: str | None,
    head: Head | None,
) -> dict[str, Any]:
    config = dict(_config(model))
    given = name or config.get("_name_or_path") or type(model).__name__
    for private in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(private, None)
    facts: dict[str, Any] = {
        "model": {
            "name": Path(given).name if os.path.isabs(given) else given,
            "class": type(model).__name__,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "revision": getattr(model.config, "_commit_hash", None),
            "sha256": _weights_digest(model),
            "config": _plain(config),
        },
        "machine": {
            "device": device.type,
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "attention": getattr(model.config, "_attn_implementation", None),
        },
        "versions": {p: _version(p) for p in ("actstore", "torch", "transformers")},
    }
    if head is not None:
        facts["head"] = {"class": type(head.model).__name__, "sha256": digest_of(head)}
    if tokenizer is not None:
        facts["tokenizer"] = {
            "class": type(tokenizer).__name__,
            "size": len(tokenizer),
            "sha256": hashlib.sha256(
                repr(sorted(tokenizer.get_vocab().items())).encode()
            ).hexdigest(),
        }
    return facts


def _weights_digest(model: nn.Module) -> str | None:
    """sha256 over every tensor's name, shape and crc32c; None on the meta device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.device.type == "meta":
            return None
        raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {crc32c(raw)}\n".encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """JSON-able form of a configuration value."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
