"""Fill and seal: values in any order into whole shards, committed block by block.

    with Writer("run.zarr", plan) as writer:
        writer.put("mlp_post", layer=3, token=0, values=acts_tn)

Values are copied into shard images (each a file in the making); a full shard is checked, summed
and written by other threads while the caller computes on; when all shards of a block are durable
its journal record is committed. A killed writer loses the blocks in flight and nothing
else. `dump` stands on this; people with their own loops use it directly.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import TracebackType
from typing import Any

import numpy as np

from . import journal, skeleton
from .errors import (
    CorruptStoreError,
    HalfOverflowError,
    NonFiniteError,
    PlanError,
    UnknownNameError,
    UsageError,
    WriteError,
)
from .journal import Record, ShardRecord
from .places import check_writable, is_url, storage_at
from .plan import Plan, StagePlan
from .pool import BufferPool
from .scaling import check_one_store
from .schema import FORMAT, TABLES
from .seal import (
    block_records,
    put_what_is_new,
    seal,
    sealed_objects,
    sealed_settings,
    sketch_objects,
    table_objects,
)
from .shard import ShardSummary, digest, encode, summarise
from .sketch import Sketcher, pack, plan_strata
from .tables import RowsMissing, TableRows, digests, join

__all__ = ["Writer"]

_HALF_LIMIT = 65520.0  # the smallest magnitude that rounds to infinity in float16
_TABLES = ("", 0)  # beside stages and layer indices: predictions and outcomes


@dataclass
class _OpenShard:
    stage: StagePlan
    layer_index: int
    index: int  # of the pass
    block: int
    buffer: np.ndarray
    image: np.ndarray
    filled: np.ndarray  # bool (rows,)


@dataclass(frozen=True)
class _Whole:
    """What is made of a full shard before it is written."""

    sketch: dict[str, np.ndarray]
    summary: ShardSummary
    encoded: tuple[np.ndarray, int, int] | None  # None: not yet


@dataclass
class _OpenTable:
    """A block's rows of predictions and outcomes."""

    rows: np.ndarray  # int32 (rows, columns)
    filled: np.ndarray  # bool (rows,)


@dataclass
class _Durable:
    """What of a block is on disk already."""

    shards: list[ShardRecord] = field(default_factory=list)
    sketches: list[dict[str, np.ndarray]] = field(default_factory=list)
    tables: dict[str, int] = field(default_factory=dict)


class Writer:
    """Writes one store, or one rank's share of it.

    Parameters
    ----------
    path : path
        Where the store is or will be.
    plan : Plan
        From `Plan.build`.
    vocabulary : ndarray of str, optional
        Text of every token id, so that tokens can be read without the tokenizer.
    rank, world_size : int
        This process's number among those that write the store together, each a run of blocks.
    threads : int, optional
        Writer threads. Default: half the cores and at least 2, so that one computes checksums
        while another waits for the disk; 1 with `hold`, unless shards are compressed.
    allow_nonfinite : bool
        Store NaN and inf instead of refusing them.

    Attributes
    ----------
    hold : bool
        Hold full shards until `catch_up` sketches and sums them by all cores, instead of a writer
        thread meanwhile. Better where the values are computed on the same cores: a thread that
        takes one of them from a model keeps the others waiting.
    sealed : bool
        Whether the store is whole.

    Raises
    ------
    PlanError
        The path holds something else, or a store from other arguments.
    WriteError
        Another process writes there, or the disk is too small.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from actstore import Plan, StageSpec, Writer, build_corpus
    >>> acts_tn = np.random.default_rng(0).normal(size=(5, 32)).astype("float32")
    >>> corpus = build_corpus([[1, 2, 3], [4, 5]])
    >>> plan = Plan.build(corpus, [StageSpec("mlp_post", layers=(0,), width=32)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Writer(f"{folder}/run.zarr", plan) as writer:
    ...         writer.put("mlp_post", layer=0, token=0, values=acts_tn)
    ...     writer.sealed
    True
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        plan: Plan,
        *,
        vocabulary: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
        threads: int | None = None,
        allow_nonfinite: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} is not below the world size {world_size}")
        check_writable(path)
        check_one_store(plan)
        self.storage = storage_at(path, tag=str(rank))
        self.plan = plan
        self.rank, self.world_size = rank, world_size
        self.allow_nonfinite = allow_nonfinite
        self.sealed = False
        self.repaired: list[str] = []
        self.bytes_written = 0
        self.hold = False
        self.missing: list[np.ndarray] = []
        self._sketcher: Sketcher | None = None
        self._held: list[_OpenShard] = []
        self._vocabulary = vocabulary
        self._compressed = any(s.layout.compressed for s in plan.stages)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._cores = cores or 1
        self._threads = threads
        self._pool = BufferPool(_pool_nbytes(plan))
        self._stages = {s.name: s for s in plan.stages}
        self._pass_of = {
            (name, i): p
            for p, group in enumerate(plan.passes)
            for name, indices in group.items()
            for i in indices
        }
        self._shards_per_block = [sum(len(v) for v in group.values()) for group in plan.passes]
        self._open_tables: dict[int, _OpenTable] = {}
        self._open: dict[tuple[str, int, int], _OpenShard] = {}
        self._sent: dict[tuple[int, int], set[tuple[str, int]]] = {}
        self._done: dict[tuple[int, int], _Durable] = {}
        self._lock = threading.Lock()

    # -- life --------------------------------------------------------------------------------

    def __enter__(self) -> Writer:
        with ExitStack() as stack, self._disk_errors(str(self.storage.root)):
            self._prepare(stack)
            self._all_cores = stack.enter_context(ThreadPoolExecutor(self._cores))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # What is queued is written even after an error: a block nearly done is worth keeping.
        try:
            try:
                self.catch_up()
            finally:
                self._all_cores.shutdown()
                self._executor.shutdown()
            if error is None:
                self._pool.check()
                if all(not m.any() for m in self.missing):
                    self._pool.drop_free()  # merging the sketches takes memory of its own
                    self._sketcher = None
                    with self._disk_errors(str(self.storage.root)):
                        self._seal()
        finally:
            self._open.clear()
            self._open_tables.clear()
            self._stack.close()

    def _prepare(self, stack: ExitStack) -> None:
        storage, plan = self.storage, self.plan
        self._was_sealed = storage.exists("zarr.json")
        stored = self._stored_plan()
        self._check_room(self._was_sealed or bool(stored))
        self._settings = self._sketch_settings(stored)
        self._strata = plan_strata(plan, self._settings["by"]) if self._settings else None
        # A sealed store's sketches are kept: redone blocks have the same values.
        self._sketcher = Sketcher(self._strata) if self._strata and not self._was_sealed else None
        try:
            storage.make_folder("journal")
        except OSError as error:
            raise WriteError(f"cannot write to {storage.root}: {error.strerror}") from None
        stack.enter_context(storage.lock("journal", shared=self.world_size > 1))
        if self.world_size > 1:
            stack.enter_context(storage.lock(f"journal/rank-{self.rank}-of-{self.world_size}"))
            for key in storage.keys("journal"):
                if "/rank-" in key and not key.endswith(f"-of-{self.world_size}"):
                    with storage.lock(key):  # ranks of another division have other blocks
                        pass
        if stored is None:
            storage.put_durable(journal.PLAN, journal.sealed_json(self._plan_record()))
        names = self._strata.names if self._strata else None
        self._skeleton = skeleton.build(plan, self._vocabulary, self._attributes(), names)
        put_what_is_new(storage, self._skeleton.objects)
        self.missing = self._find_missing()

    def _sketch_settings(self, stored: dict[str, Any] | None) -> dict[str, Any] | None:
        """How to sketch: as the store was begun; a sealed one may have got its sketches later."""
        asked = self._sketch_asked()
        if self._was_sealed:
            try:
                return sealed_settings(self.storage)
            except CorruptStoreError:
                return asked
        if stored is not None and stored["sketch"] != asked:
            raise PlanError(
                f"{self.storage.root} was begun with sketches {_sketching(stored['sketch'])}, and "
                f"this is {_sketching(asked)}: give the same options, or choose another output"
            )
        return asked

    def _sketch_asked(self) -> dict[str, Any] | None:
        return {"by": self.plan.sketch_by} if self.plan.sketch else None

    def _stored_plan(self) -> dict[str, Any] | None:
        root = self.storage.root
        if not is_url(root) and root.is_file():
            raise PlanError(f"{root} is a file: choose another output")
        try:
            stored = journal.read_plan(self.storage)
        except CorruptStoreError:
            if not self._is_of_this_plan():
                raise
            stored = None  # it is written anew
        if stored is None:
            if not self.storage.is_vacant() and not self._is_of_this_plan():
                raise PlanError(
                    f"{root} exists and is not a store of actstore's: choose another output"
                )
            return None
        if stored["config_hash"] != self.plan.config_hash:
            lines = journal.differences(stored["config"], self.plan.config)
            raise PlanError(
                f"{root} was begun with other arguments:\n  "
                + "\n  ".join(lines)
                + "\nGive the same ones to go on with it, or choose another output"
            )
        return stored

    def _is_of_this_plan(self) -> bool:
        """Whether the root of a sealed store, whose plan is lost, says that it was made by this."""
        try:
            root = json.loads(self.storage.get("zarr.json") or b"")
            return root["attributes"]["actstore"]["config_hash"] == self.plan.config_hash
        except (ValueError, LookupError, TypeError, RecursionError):
            return False

    def _plan_record(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "config": self.plan.config,
            "config_hash": self.plan.config_hash,
            "tokens": self.plan.n_tokens,
            "blocks": self.plan.n_blocks,
            "passes": len(self.plan.passes),
            "sketch": self._sketch_asked(),
        }

    def _attributes(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "format": FORMAT,
            "state": "complete",
            "config_hash": plan.config_hash,
            **plan.config,
            "notes": plan.corpus.notes,
            **({"sketch": self._settings} if self._settings else {}),
        }

    def _check_room(self, resuming: bool) -> None:
        needed, free = self.plan.nbytes, self.storage.free_bytes()
        if resuming:  # counted by blocks, since compressed ones are smaller than planned
            total = self.plan.n_blocks * len(self.plan.passes)
            needed -= needed * self.committed() // total
        if needed > free:
            raise WriteError(
                f"the dump needs {needed / 1e9:,.2f} GB more and {free / 1e9:,.2f} GB are free at "
                f"{self.storage.root}: free some, choose another disk, or keep fewer stages, "
                "layers or tokens"
            )

    # -- what is there already ---------------------------------------------------------------

    def mine(self) -> range:
        """This rank's run of blocks.

        Returns
        -------
        range
        """
        n, r, w = self.plan.n_blocks, self.rank, self.world_size
        return range(n * r // w, n * (r + 1) // w)

    def committed(self) -> int:
        """Blocks with a commit record, by whichever rank, over all passes.

        Returns
        -------
        int
            How many.
        """
        return sum(
            self.storage.exists(journal.record_key(index, block))
            for index in range(len(self.plan.passes))
            for block in range(self.plan.n_blocks)
        )

    def _find_missing(self) -> list[np.ndarray]:
        """For each pass, a mask over blocks: those that this rank still has to write.

        A sealed store is read whole and checked, since rerunning its dump is how it is repaired;
        an unfinished one is believed where a record stands and its shards have the right size.
        """
        was_sealed = self._was_sealed
        # The root goes when damage is found; what was sealed can be told by the manifest still.
        thorough = was_sealed or self.storage.exists(journal.MANIFEST)
        tables = TableRows(self.storage, self.plan)
        missing = []
        for index in range(len(self.plan.passes)):
            mask = np.zeros(self.plan.n_blocks, bool)
            for block in self.mine():
                record = Record.read(self.storage, index, block)
                mask[block] = record is None or not self._intact(record, thorough, tables)
                if mask[block] and was_sealed:
                    self.repaired.append(f"block {block} of pass {index}")
            missing.append(mask)
        for index, mask in enumerate(missing):
            for damaged in np.flatnonzero(mask):
                self.storage.delete(journal.record_key(index, int(damaged)))
        if was_sealed and self.repaired:
            # After the records: a run killed in between must not take the damage for sound.
            self.storage.sync_folder("journal")
            self.storage.delete("zarr.json")
        self.sealed = was_sealed and not self.repaired
        return missing

    def _intact(self, record: Record, thorough: bool, tables: TableRows) -> bool:
        expected = {
            self._stages[name].key(i, record.block): self._stages[name].layout
            for name, layers in self.plan.passes[record.index].items()
            for i in layers
        }
        if {shard.key for shard in record.shards} != expected.keys():
            return False
        for shard in record.shards:
            if self.storage.size(shard.key) != shard.nbytes:
                return False
            if thorough:
                data = self.storage.get(shard.key) or b""
                if digest(expected[shard.key], data) != shard.checksum:
                    return False
        if record.tables.keys() != set(self._tables_of(record.index)):
            return False
        # Read in any case: there is little of it, and at seal it would be too late to be redone.
        return not record.tables or tables.read(record.block, record.tables) is not None

    def _tables_of(self, index: int) -> list[str]:
        """What a pass makes of predictions and outcomes: the first all, the others none."""
        return self.plan.tables if index == 0 else []

    # -- filling -----------------------------------------------------------------------------

    def wants(self, blocks: np.ndarray, index: int = 0) -> bool:
        """Whether any of these blocks is still to be written in a pass.

        Parameters
        ----------
        blocks : ndarray of int
            Numbers of blocks.
        index : int
            Of the pass.

        Returns
        -------
        bool
        """
        return bool(self.missing[index][blocks].any())

    def put(self, stage: str, layer: int, token: int, values: np.ndarray) -> None:
        """Write values of consecutive tokens.

        Parameters
        ----------
        stage : str
            A stage of the plan.
        layer : int
            As the model counts.
        token : int
            Index of the first token along the store's token dimension.
        values : ndarray (tokens, width)
            float32, float16, or for bfloat16 stages also the raw bits as uint16. Cast to the
            stage's element type. Values of blocks that are already durable are passed over.

        Raises
        ------
        UsageError
            A stage or layer that is not in the plan, a wrong shape, a token written twice.
        HalfOverflowError
            A finite value that float16 cannot hold.
        NonFiniteError
            NaN or inf in a shard completed earlier.
        WriteError
            The disk is full or the buffer cannot hold all open shards.
        """
        self._pool.check()
        plan = self._stages.get(stage)
        if plan is None:
            raise UnknownNameError("stage", stage, self._stages)
        if layer not in plan.layers:
            raise UnknownNameError(f"layer of {stage}", layer, plan.layers)
        if values.ndim != 2 or values.shape[1] != plan.layout.width:
            raise UsageError(
                f"values of {stage} have shape {values.shape}: (tokens, {plan.layout.width}) is "
                "what the plan says"
            )
        if values.dtype.kind not in "fV" and not (plan.layout.compressed and values.dtype == "u2"):
            raise UsageError(
                f"values of {stage} are {values.dtype}: give floats; only of a bfloat16 stage the "
                "bits, as uint16"
            )
        if token < 0 or token + len(values) > self.plan.n_tokens:
            raise UsageError(
                f"tokens {token} to {token + len(values)} are not within the plan's "
                f"{self.plan.n_tokens}"
            )
        layer_index = plan.layers.index(layer)
        index = self._pass_of[stage, layer_index]
        rows = self.plan.block_tokens
        done = 0
        while done < len(values):
            block, row = divmod(token + done, rows)
            count = min(rows - row, len(values) - done)
            if self.missing[index][block]:
                shard = self._shard(plan, layer_index, index, block)
                self._copy(shard, row, values[done : done + count])
                if shard.filled.all():
                    self._finish(shard)
            done += count

    def put_tables(self, token: int, values: Mapping[str, np.ndarray]) -> None:
        """Write predictions and outcomes of consecutive tokens.

        Parameters
        ----------
        token : int
            Index of the first token along the store's token dimension.
        values : mapping of str to ndarray (tokens,) or (tokens, rank)
            All that the plan asks for, by key: ``predictions/token_id`` and
            ``predictions/probability`` best first; ``outcomes/loss``, ``outcomes/entropy`` and
            ``outcomes/rank``, NaN and -1 where a token is the last of its sequence. Rows of
            blocks that are already durable are passed over.

        Raises
        ------
        UsageError
            Others than the plan's, a wrong shape, a token written twice.
        NonFiniteError
            A probability or an entropy that is NaN or inf.
        """
        self._pool.check()
        count = self._check_tables(token, values)
        if not self.allow_nonfinite:
            self._check_finite(token, values)
        rows = join(self.plan, values)
        done = 0
        while done < count:
            block, row = divmod(token + done, self.plan.block_tokens)
            size = self.plan.block_rows(block)
            here = slice(row, min(size, row + count - done))
            if self.missing[0][block]:
                self._fill_table(block, here, rows[done : done + here.stop - row])
            done += here.stop - row

    def _check_tables(self, token: int, values: Mapping[str, np.ndarray]) -> int:
        """Number of tokens, of values that fit the plan."""
        asked = self.plan.tables
        if values.keys() != set(asked):
            raise UsageError(
                f"tables {', '.join(values) or 'none'} are given, and the plan asks for "
                f"{', '.join(asked) or 'none (see predictions and outcomes of Plan.build)'}"
            )
        count = len(next(iter(values.values())))
        for key, own in values.items():
            shape = (count, self.plan.predictions) if TABLES[key].ranked else (count,)
            kind = "iu" if TABLES[key].dtype == "int32" else "f"
            if own.shape != shape or own.dtype.kind not in kind:
                raise UsageError(
                    f"{key} is {own.dtype} of shape {own.shape}: {TABLES[key].dtype} of shape "
                    f"{shape} is what the plan says"
                )
        if token < 0 or token + count > self.plan.n_tokens:
            raise UsageError(
                f"tokens {token} to {token + count} are not within the plan's {self.plan.n_tokens}"
            )
        return count

    @staticmethod
    def _check_finite(token: int, values: Mapping[str, np.ndarray]) -> None:
        # The loss is left out: it is NaN at the last tokens of sequences.
        for key in ("predictions/probability", "outcomes/entropy"):
            if key in values and not np.isfinite(values[key]).all():
                bad = np.flatnonzero(~np.isfinite(values[key]).reshape(len(values[key]), -1).all(1))
                raise NonFiniteError(
                    f"{key} is NaN or inf for {len(bad):,} tokens, the first of them token "
                    f"{token + bad[0]}: look at the model there, or run again with "
                    "--allow-nonfinite to store them"
                )

    def _fill_table(self, block: int, here: slice, rows: np.ndarray) -> None:
        table = self._open_tables.get(block)
        if table is None:
            if _TABLES in self._sent.setdefault((0, block), set()):
                raise UsageError(f"predictions of tokens of block {block} were written twice")
            size = self.plan.block_rows(block)
            table = _OpenTable(np.empty((size, rows.shape[1]), np.int32), np.zeros(size, bool))
            self._open_tables[block] = table
        if table.filled[here].any():
            raise UsageError(f"predictions of tokens of block {block} were written twice")
        table.rows[here], table.filled[here] = rows, True
        if table.filled.all():
            del self._open_tables[block]
            self._sent[0, block].add(_TABLES)
            self._pool.send()
            self._executor.submit(self._write_tables, block, table.rows)

    def _shard(self, stage: StagePlan, layer_index: int, index: int, block: int) -> _OpenShard:
        key = (stage.name, layer_index, block)
        shard = self._open.get(key)
        if shard is None:
            sent = self._sent.setdefault((index, block), set())
            if (stage.name, layer_index) in sent:
                raise self._twice(stage, layer_index, block)
            if self._held and not self._pool.has(stage.layout.image_nbytes):
                self.catch_up()
            buffer = self._pool.acquire(stage.layout.image_nbytes)
            image = stage.layout.image(buffer)
            filled = np.zeros(self.plan.block_rows(block), bool)
            shard = _OpenShard(stage, layer_index, index, block, buffer, image, filled)
            self._open[key] = shard
        return shard

    def _twice(self, stage: StagePlan, layer_index: int, block: int) -> UsageError:
        return UsageError(
            f"tokens of block {block} of {stage.name}, layer {stage.layers[layer_index]}, were "
            "written twice"
        )

    def _copy(self, shard: _OpenShard, row: int, values: np.ndarray) -> None:
        layout = shard.stage.layout
        rows = slice(row, row + len(values))
        if shard.filled[rows].any():
            raise self._twice(shard.stage, shard.layer_index, shard.block)
        if layout.compressed and values.dtype != np.uint16:
            values = to_bfloat16(values)
        elif layout.dtype == "float16" and values.dtype != np.float16:
            self._check_half(shard, values)
        done = 0
        while done < len(values):
            chunk, inside = divmod(row + done, layout.chunk_rows)
            count = min(layout.chunk_rows - inside, len(values) - done)
            part = values[done : done + count].reshape(count, layout.grid[1], layout.chunk_width)
            shard.image[chunk, :, inside : inside + count] = part.transpose(1, 0, 2)
            done += count
        shard.filled[rows] = True

    def _check_half(self, shard: _OpenShard, values: np.ndarray) -> None:
        if values.min() > -_HALF_LIMIT and values.max() < _HALF_LIMIT:
            return
        large = values[np.isfinite(values) & (np.abs(values) >= _HALF_LIMIT)]
        if large.size:
            raise half_overflow(shard.stage, shard.layer_index, float(large[0]), large.size)

    # -- finishing: from here on in other threads, but for `catch_up` --------------------------

    @cached_property
    def _executor(self) -> ThreadPoolExecutor:
        """Writer threads, begun when there is something to write: by then `hold` is set."""
        alone = self.hold and not self._compressed
        threads = self._threads or (1 if alone else max(2, self._cores // 2))
        return ThreadPoolExecutor(threads, thread_name_prefix="actstore")

    def _finish(self, shard: _OpenShard) -> None:
        del self._open[shard.stage.name, shard.layer_index, shard.block]
        self._sent[shard.index, shard.block].add((shard.stage.name, shard.layer_index))
        if self.hold:
            self._held.append(shard)
        else:
            self._pool.send()
            self._executor.submit(self._write_shard, shard, partial(self._finished, shard))

    def catch_up(self) -> None:
        """Finish the shards that are held, by all cores, and send them to the writer threads."""
        held, self._held = self._held, []
        coming = [self._all_cores.submit(self._finished, shard) for shard in held]
        for shard, future in zip(held, coming, strict=True):  # in order: the first error is told
            self._pool.send()
            self._executor.submit(self._write_shard, shard, future.result)
        wait(coming)

    def _finished(self, shard: _OpenShard) -> _Whole:
        """All that takes computing and no disk, but for compression: that takes memory."""
        layout, rows = shard.stage.layout, len(shard.filled)
        made = None
        if self._sketcher is not None:
            first = shard.block * self.plan.block_tokens
            made = self._sketcher.sketch(
                shard.stage.name, shard.layer_index, layout, shard.image, first, rows
            )
        summary = made.summary() if made is not None else None
        return _Whole(
            # The compact tensors: in full a sketch takes more memory than the shard itself.
            made.tensors(f"{shard.stage.name}/{shard.layer_index}") if made is not None else {},
            summary or summarise(layout, shard.buffer, rows),
            None if layout.compressed else encode(layout, shard.buffer, rows),
        )

    def _write_shard(self, shard: _OpenShard, finish: Callable[[], _Whole]) -> None:
        try:
            whole = finish()
            if self._pool.failed:
                raise WriteError("not written, because an earlier shard failed")
            with self._disk_errors(shard.stage.key(shard.layer_index, shard.block)):
                record = self._put(shard, whole)
                self._note(shard.index, shard.block, shard=record, sketch=whole.sketch)
            self._pool.release(shard.buffer, shard.stage.layout.image_nbytes)
        except BaseException as error:
            self._pool.fail(error)

    def _write_tables(self, block: int, rows: np.ndarray) -> None:
        try:
            if self._pool.failed:
                raise WriteError("not written, because an earlier shard failed")
            key, data = journal.table_key(block), rows.astype("<i4").tobytes()
            with self._disk_errors(key):
                self.storage.put(key, data)
                with self._lock:
                    self.bytes_written += len(data)
                self._note(0, block, tables=digests(self.plan, rows))
            self._pool.arrived()
        except BaseException as error:
            self._pool.fail(error)

    @staticmethod
    @contextmanager
    def _disk_errors(what: str) -> Iterator[None]:
        """Say what to do where the disk is full or fails."""
        try:
            yield
        except OSError as error:
            raise WriteError(
                f"writing {what} failed: {error.strerror or error}. What is committed is safe: "
                "make room or mend the disk, then run the same dump again to go on"
            ) from error

    def _put(self, shard: _OpenShard, whole: _Whole) -> ShardRecord:
        stage, rows, summary = shard.stage, len(shard.filled), whole.summary
        if summary.nonfinite and not self.allow_nonfinite:
            raise NonFiniteError(
                f"{summary.nonfinite:,} of {rows * stage.layout.width:,} values are NaN or inf in "
                f"stage {stage.name}, layer {stage.layers[shard.layer_index]}, tokens "
                f"{shard.block * self.plan.block_tokens} to "
                f"{shard.block * self.plan.block_tokens + rows - 1}: look at the model there, or "
                "run again with --allow-nonfinite to store them"
            )
        data, nbytes, checksum = whole.encoded or encode(stage.layout, shard.buffer, rows)
        key = stage.key(shard.layer_index, shard.block)
        self.storage.put(key, data, nbytes)
        with self._lock:
            self.bytes_written += nbytes
        return ShardRecord(key, nbytes, checksum, summary)

    def _note(
        self,
        index: int,
        block: int,
        *,
        shard: ShardRecord | None = None,
        sketch: dict[str, np.ndarray] | None = None,
        tables: Mapping[str, int] | None = None,
    ) -> None:
        """Note what has become durable; the last of its block commits the block."""
        with self._lock:
            done = self._done.setdefault((index, block), _Durable())
            if shard is not None:
                done.shards.append(shard)
                done.sketches.append(sketch or {})
            done.tables |= tables or {}
            whole = len(done.shards) == self._shards_per_block[index]
            if not whole or done.tables.keys() != set(self._tables_of(index)):
                return
            del self._done[index, block]
        self._commit((index, block), done)

    def _commit(self, place: tuple[int, int], done: _Durable) -> None:
        index, block = place
        for name, layers in self.plan.passes[index].items():
            if layers:
                self.storage.sync_folder(self._stages[name].folder)
        if self._sketcher:
            self._put_parts(place, done.sketches)
        # Writing the record syncs the folder that it and the block's other parts are in.
        record = Record(index, block, tuple(done.shards), done.tables)
        self.storage.put_once(journal.record_key(*place), record.encode())
        self.missing[index][block] = False
        self._sent.pop(place, None)

    def _put_parts(self, place: tuple[int, int], parts: list[dict[str, np.ndarray]]) -> None:
        """Write a block's sketches beside its record, by stage, until they are merged at seal."""
        tensors = {name: tensor for part in parts for name, tensor in part.items()}
        for number, stage in enumerate(self._stages):
            own = {k: t for k, t in tensors.items() if k.partition("/")[0] == stage}
            if own:
                self.storage.put(journal.part_key(*place, number), pack(own))

    # -- sealing -----------------------------------------------------------------------------

    def _seal(self) -> None:
        """Seal once every rank's blocks are there; whoever is last does it.

        Two ranks that finish together write the same bytes.
        """
        records = block_records(self.storage, self.plan)
        if records is None:
            return
        with self.storage.lock("", wait=True):
            if not self._was_sealed and self.storage.exists("zarr.json"):
                self.sealed = True  # by another rank, just now
                return
            sketches: dict[str, list[int]] = {}
            if self._strata is not None:
                sketches = self._kept("sketch") or sketch_objects(
                    self.storage, self.plan, self._skeleton, self._strata
                )
            tables = self._kept("predictions", "outcomes")
            if self.plan.tables and not tables:
                try:
                    tables = table_objects(self.storage, self.plan, self._skeleton, records)
                except RowsMissing:  # another rank's: running that again redoes the block
                    self.sealed = False
                    return
            seal(self.storage, self.plan, self._skeleton, records, sketches, tables)
        self.sealed = True

    def _kept(self, *groups: str) -> dict[str, list[int]]:
        """Digests of what a sealed store has merged, where that is sound."""
        return (sealed_objects(self.storage, groups) or {}) if self._was_sealed else {}


def _sketching(settings: dict[str, Any] | None) -> str:
    if settings is None:
        return "off"
    return f"by {settings['by']}" if settings["by"] else "on"


def _pool_nbytes(plan: Plan) -> int:
    """The plan's buffer and the room that checksums take beside the values in a shard's image."""
    layouts = [s.layout for s in plan.stages]
    values = [lay.rows * lay.width * lay.memory_dtype.itemsize for lay in layouts]
    images = [lay.image_nbytes for lay in layouts]
    return math.ceil(plan.buffer * max(i / v for i, v in zip(images, values, strict=True)))


def half_overflow(stage: StagePlan, layer_index: int, value: float, count: int) -> Exception:
    return HalfOverflowError(
        f"{count:,} values of stage {stage.name}, layer {stage.layers[layer_index]}, do not fit "
        f"float16 (one is {value:g}, the largest it holds is 65,504): use --dtype bfloat16 or "
        "float32"
    )


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even; NaN stays NaN.

    Examples
    --------
    >>> hex(to_bfloat16(np.array([1.0], "float32"))[0])
    '0x3f80'
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = np.isnan(values)
    if nan.any():
        rounded = np.where(nan, (bits >> 16) | 0x40, rounded)
    return rounded.astype(np.uint16)
