"""Batches of stored activations for training, shuffled, read ahead, in bounded memory.

An epoch's order is a function of (seed, epoch) alone. Tokens lie on disk in runs, the rows of inner
chunks, which are what can be read and checked at once. Runs are put in random order, end to end;
that is cut into windows of as many tokens as the buffer holds; within a window, tokens are in
uniformly random order. So a place in an epoch is two numbers, and going on from it is exact.

While batches of one window are handed out, a thread reads the next.
"""

from __future__ import annotations

import os
import queue
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from crc32c import crc32c
from torch.utils.data import IterableDataset, get_worker_info

from .aliases import stage_of
from .errors import UnknownNameError, UsageError
from .places import is_url
from .plan import parse_bytes
from .schema import pick
from .select import parse

__all__ = ["Loader"]

_AHEAD = 4
"""Batches that wait to be taken, at most."""

_HELD = _AHEAD + 2
"""Batches in memory at once: those that wait, one being made, one handed out."""

_ENOUGH_RUNS = 16
_READERS = 4
_PIECE_NBYTES = 2**22
_SLICE_TOKENS = 1024

Batch = Any


@dataclass(frozen=True)
class _Part:
    """What becomes one tensor: layers of a stage."""

    name: str
    stage: str
    array: Any
    layers: tuple[int, ...]
    single: bool

    @property
    def row_nbytes(self) -> int:
        return len(self.layers) * self.array.shape[2] * self.array.dtype.itemsize

    def room(self, tokens: int) -> np.ndarray:
        return np.empty((tokens, len(self.layers), self.array.shape[2]), self.array.dtype)


class Loader(IterableDataset):
    """Shuffled batches of a store's activations; see `Store.loader`, which makes it.

    Attributes
    ----------
    n_tokens : int
        Tokens asked.
    window_tokens : int
        Tokens that are shuffled together.
    epoch : int
        Of the next iteration.
    """

    def __init__(
        self,
        store: Any,
        stage: str | Sequence[str],
        layer: int | str | Sequence[int] | None = None,
        batch_size: int = 4096,
        *,
        shuffle: bool = True,
        seed: int = 0,
        tokens: str | np.ndarray | None = None,
        with_tokens: bool = False,
        device: Any = None,
        dtype: Any = "float32",
        buffer: int | str = "1GiB",
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size {batch_size}: a batch has 1 token or more")
        if seed < 0:
            raise UsageError(f"seed {seed}: seeds are 0 or more")
        self._alone = isinstance(stage, str)
        names = [stage] if isinstance(stage, str) else list(stage)
        if not names or len(set(names)) < len(names):
            raise UsageError(f"stage is {stage!r}: name a stage, or several different ones")
        self._parts = [_part(store, name, layer) for name in names]
        self._path, self._id = str(store.path), store.id
        self._mask = _mask(store, tokens)
        self.batch_size, self._shuffle, self._seed = int(batch_size), shuffle, int(seed)
        self._with_tokens, self._drop_last = with_tokens, drop_last
        self._device = None if device is None else torch.device(device)
        self._dtype = _dtype(dtype)
        self._rank, self._world_size = _place(rank, world_size)
        self._runs = _runs([part.array for part in self._parts], self._mask)
        self.n_tokens = int(self._runs[:, 2].sum())
        self._buffer = parse_bytes(buffer)
        self.window_tokens = self._window(1)
        first, last = self._share(self._rank, self._world_size, 0, self._batches)
        if first == last:
            raise UsageError(
                f"{self.n_tokens:,} tokens make no batch of {batch_size:,} for each of "
                f"{self._world_size} rank(s): make batches smaller, or leave drop_last out"
            )
        self._warn_of_few_runs()
        self._next = self._at = (0, 0)
        self._pid = os.getpid()

    # -- how an epoch is cut up ----------------------------------------------------------------

    @property
    def _batches(self) -> int:
        """Batches of an epoch, over all ranks."""
        if not self._drop_last:
            return -(-self.n_tokens // self.batch_size)
        return self.n_tokens // self.batch_size // self._world_size * self._world_size

    @staticmethod
    def _share(index: int, of: int, first: int, last: int) -> tuple[int, int]:
        """One of `of` equal shares of the batches from first to last."""
        count = last - first
        return first + count * index // of, first + count * (index + 1) // of

    def _window(self, workers: int) -> int:
        """Tokens of a window: whole batches, of which two windows fit the buffer."""
        row = sum(part.row_nbytes for part in self._parts)
        out = sum(len(part.layers) * part.array.shape[2] for part in self._parts)
        held = _HELD * self.batch_size * out * torch.empty(0, dtype=self._dtype).element_size()
        least = held + 2 * self.batch_size * row
        room = self._buffer // workers
        if room < least:
            raise UsageError(
                f"the buffer of {self._buffer:,} bytes is too small: batches of "
                f"{self.batch_size:,} tokens need {least * workers:,}"
                + (f" for {workers} workers" if workers > 1 else "")
            )
        fitting = (room - held) // (2 * row) // self.batch_size
        return self.batch_size * min(fitting, -(-self.n_tokens // self.batch_size))

    def _warn_of_few_runs(self) -> None:
        """Batches out of few runs are of few texts, from which training learns worse."""
        run = self.n_tokens / len(self._runs)
        if self._shuffle and self.window_tokens < min(self.n_tokens, _ENOUGH_RUNS * run):
            row = sum(part.row_nbytes for part in self._parts)
            enough = self._buffer + 2 * row * (_ENOUGH_RUNS * run - self.window_tokens)
            warnings.warn(
                f"a window of {self.window_tokens:,} tokens holds {self.window_tokens / run:.0f} "
                f"runs of neighbouring tokens, and batches are no more mixed than that: raise the "
                f"buffer to {enough / 1e9:.1g} GB for {_ENOUGH_RUNS}",
                stacklevel=4,
            )

    def __len__(self) -> int:
        """Batches of an epoch, for this rank."""
        first, last = self._share(self._rank, self._world_size, 0, self._batches)
        return last - first

    # -- the position --------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        return self._next[0]

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is.

        Iterating counts epochs by itself, but not where workers of a `DataLoader` do it: they
        work on copies.
        """
        if epoch < 0:
            raise UsageError(f"epoch {epoch}: epochs are 0 or more")
        self._next = self._at = (int(epoch), 0)

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is: after the last batch that was handed out in this process.

        Returns
        -------
        dict
            Numbers, strings and lists only; what the order follows from is in it, too.
        """
        return {"epoch": self._at[0], "batch": self._at[1], **self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken: the next iteration begins with the batch after it.

        Raises
        ------
        UsageError
            It was taken of a loader with another order.
        """
        own = self._settings()
        for name, value in own.items():
            if state.get(name) != value:
                raise UsageError(
                    f"this position is of another order: its {name} is {state.get(name)!r}, and "
                    f"this loader's {value!r}. Make the loader with the same arguments"
                )
        epoch, batch = int(state["epoch"]), int(state["batch"])
        if epoch < 0 or not 0 <= batch <= self._batches:
            raise UsageError(f"epoch {epoch}, batch {batch} is no position in this order")
        self._next = self._at = (epoch, batch)

    def _settings(self) -> dict[str, Any]:
        """What the order follows from."""
        mask = b"" if self._mask is None else np.packbits(self._mask).tobytes()
        worker = get_worker_info()
        return {
            "store": self._id,
            "parts": [[part.stage, list(part.layers)] for part in self._parts],
            "batch_size": self.batch_size,
            "shuffle": self._shuffle,
            "seed": self._seed,
            "tokens": crc32c(mask),
            "drop_last": self._drop_last,
            "window": self._window(worker.num_workers if worker else 1),
            "share": [self._rank, self._world_size]
            + ([worker.id, worker.num_workers] if worker else []),
        }

    # -- iterating -----------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        if os.getpid() != self._pid and is_url(self._path):
            raise UsageError(
                "a store at a URL cannot be read in a forked worker: give the DataLoader "
                "multiprocessing_context='spawn', or num_workers=0 (a thread reads ahead anyway)"
            )
        worker = get_worker_info()
        workers = worker.num_workers if worker else 1
        first, last = self._share(self._rank, self._world_size, 0, self._batches)
        if worker:
            first, last = self._share(worker.id, workers, first, last)
        epoch, done = self._next
        if done >= last - first:  # of a position after the last batch
            epoch, done = epoch + 1, 0
        self._at, self._next = (epoch, done), (epoch + 1, 0)
        return self._batches_of(epoch, first, done, last, self._window(workers))

    def _batches_of(
        self, epoch: int, first: int, done: int, last: int, window: int
    ) -> Iterator[Batch]:
        feed = _Feed(self, _Order(self, epoch), first, first + done, last, window)
        try:
            for batch in feed:
                done += 1
                self._at = (epoch, done)
                yield batch
        finally:
            feed.close()
        self._at = (epoch + 1, 0)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_pid"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _pid=os.getpid())


class _Order:
    """The order of one epoch's tokens."""

    def __init__(self, loader: Loader, epoch: int) -> None:
        self._loader, self._epoch = loader, epoch
        self._runs = loader._runs
        if loader._shuffle:
            rng = np.random.default_rng([loader._seed, epoch])
            self._runs = rng.permutation(self._runs)
        self._starts = np.concatenate([[0], np.cumsum(self._runs[:, 2])])

    def reads(self, first: int, last: int) -> Iterator[np.ndarray]:
        """Tokens at the places first to last of the runs end to end: those of each run."""
        run = int(np.searchsorted(self._starts, first, "right")) - 1
        while run < len(self._runs) and self._starts[run] < last:
            start, stop, _ = self._runs[run].tolist()
            mask = self._loader._mask
            tokens = (
                np.arange(start, stop) if mask is None else start + np.flatnonzero(mask[start:stop])
            )
            top = int(self._starts[run])
            yield tokens[max(0, first - top) : last - top]
            run += 1

    def within(self, first: int, last: int) -> np.ndarray:
        """The order of a window's tokens."""
        if not self._loader._shuffle:
            return np.arange(last - first)
        # Not [..., 0], which numpy takes for [...], the seed of the runs.
        rng = np.random.default_rng([self._loader._seed, self._epoch, first + 1])
        return rng.permutation(last - first)


class _Feed:
    """Batches from first to last of an order, made in a thread."""

    def __init__(
        self, loader: Loader, order: _Order, origin: int, first: int, last: int, window: int
    ) -> None:
        self._loader, self._order = loader, order
        self._first, self._window = first * loader.batch_size, window
        self._last = min(last * loader.batch_size, loader.n_tokens)
        self._origin = origin * loader.batch_size  # where windows are counted from
        self._ready: queue.Queue[Any] = queue.Queue(_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="actstore-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        while (item := self._ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Stop the thread, and wait for it."""
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _run(self) -> None:
        try:
            self._make()
            self._put(None)
        except BaseException as error:  # handed to who iterates
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _make(self) -> None:
        loader, size = self._loader, self._window
        top = self._first - (self._first - self._origin) % size
        windows = [(a, min(a + size, self._last)) for a in range(top, self._last, size)]
        room = max((b - a for a, b in windows), default=0)
        rooms = [[part.room(room) for part in loader._parts] for _ in windows[:2]]
        with ThreadPoolExecutor(_READERS, "actstore-loader") as pool:
            coming = self._read(pool, windows[0], rooms[0]) if windows else []
            for i, (first, last) in enumerate(windows):
                for future in coming:
                    future.result()
                    if self._stopped.is_set():
                        pool.shutdown(cancel_futures=True)
                        return
                if i + 1 < len(windows):
                    coming = self._read(pool, windows[i + 1], rooms[(i + 1) % 2])
                self._hand_out(first, last, rooms[i % 2])
                if self._stopped.is_set():
                    pool.shutdown(cancel_futures=True)
                    return

    def _read(
        self, pool: ThreadPoolExecutor, window: tuple[int, int], rooms: list[np.ndarray]
    ) -> list[Future[None]]:
        """Begin to read a window's tokens, in the order of its runs."""
        futures, at = [], 0
        for tokens in self._order.reads(*window):
            for part, room in zip(self._loader._parts, rooms, strict=True):
                for k, layer in enumerate(part.layers):
                    out = room[at : at + len(tokens), k]
                    futures.append(pool.submit(_read_rows, part.array, layer, tokens, out))
            at += len(tokens)
        return futures

    def _hand_out(self, first: int, last: int, rooms: list[np.ndarray]) -> None:
        loader = self._loader
        rows = self._order.within(first, last)
        numbers = (
            np.concatenate(list(self._order.reads(first, last))) if loader._with_tokens else None
        )
        for start in range(max(first, self._first), last, loader.batch_size):
            chosen = rows[start - first : start - first + loader.batch_size]
            tensors = [
                self._tensor(part, room, chosen)
                for part, room in zip(loader._parts, rooms, strict=True)
            ]
            batch: Any = tensors[0]
            if not loader._alone:
                names = (part.name for part in loader._parts)
                batch = dict(zip(names, tensors, strict=True))
            if numbers is not None:
                batch = batch, torch.from_numpy(numbers[chosen])
            self._put(batch)
            if self._stopped.is_set():
                return

    def _tensor(self, part: _Part, room: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        made = np.empty((len(rows), *room.shape[1:]), room.dtype)
        np.take(room, rows, axis=0, out=made, mode="clip")  # "raise" would copy through a buffer
        tensor = torch.from_numpy(made[:, 0] if part.single else made)
        device = self._loader._device
        if device is None or device.type == "cpu":
            return tensor.to(self._loader._dtype)
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True).to(self._loader._dtype)


def _read_rows(array: Any, layer: int, tokens: np.ndarray, out: np.ndarray) -> None:
    """Values of some ascending tokens of a layer, row by row."""
    layout = getattr(array, "layout", None)
    if layout is None:
        first = int(tokens[0])
        out[:] = np.asarray(array[layer, first : int(tokens[-1]) + 1])[tokens - first]
        return
    height, per_block = layout.chunk_rows, layout.rows // layout.chunk_rows
    numbers = tokens // height
    for block in np.unique(numbers // per_block).tolist():
        asked = np.unique(numbers[numbers // per_block == block])
        left, before = 0, -1
        for i, values in array.pieces(layer, block, asked % per_block, _PIECE_NBYTES):
            left, before = (left if i == before else 0), i
            number = block * per_block + i
            a, b = np.searchsorted(numbers, (number, number + 1)).tolist()
            rows: Any = tokens[a:b] - number * height
            if b - a == rows[-1] - rows[0] + 1:
                rows = slice(int(rows[0]), int(rows[-1]) + 1)
            for chunk in values:
                out[a:b, left : left + layout.chunk_width] = chunk[rows]
                left += layout.chunk_width


def _part(store: Any, name: str, layer: int | str | Sequence[int] | None) -> _Part:
    config = store.attrs.get("model", {}).get("config")
    stage, own = stage_of(name, store.stages, config)
    layers = store.attrs["capture"]["stages"][stage]["layers"]
    if own is not None:
        if layer is not None:
            raise UsageError(f"{name!r} names its layer: leave layer={layer!r} out")
        layer = own
    if layer is None and len(layers) == 1:
        layer = int(layers[0])
    if layer is None:
        raise UsageError(
            f"say which layer of {stage}, as layer={layers[-1]}; it has {layers[0]} to {layers[-1]}"
        )
    chosen = pick(layer, layers, "layer")
    single = isinstance(layer, (int, np.integer))
    return _Part(name, stage, store.array(stage), tuple(layers.index(n) for n in chosen), single)


def _mask(store: Any, tokens: str | np.ndarray | None) -> np.ndarray | None:
    if tokens is None:
        return None
    if isinstance(tokens, str):
        expression = parse(tokens)
        mask = expression.evaluate({n: store.column(n) for n in expression.columns})
    else:
        mask = np.asarray(tokens)
    if mask.dtype != bool or mask.shape != (store.n_tokens,):
        raise UsageError(
            f"tokens is an array of {mask.dtype} with shape {mask.shape}: give a boolean mask of "
            f"shape ({store.n_tokens},), or an expression such as 'position > 0'"
        )
    if not mask.any():
        raise UsageError(f"no token satisfies {tokens!r}: loosen the selection")
    return mask


def _dtype(dtype: Any) -> torch.dtype:
    names = ("float32", "float16", "bfloat16", "float64")
    name = str(dtype).removeprefix("torch.")
    if name not in names:
        raise UnknownNameError("dtype", name, names)
    return getattr(torch, name)


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """This process among those that share the tokens, as torch.distributed has it unless said."""
    if (rank is None) != (world_size is None):
        raise UsageError("give rank and world_size together, or neither")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1
    if not 0 <= rank < world_size:
        raise UsageError(f"rank {rank} is not below the world size {world_size}")
    return rank, world_size


def _runs(arrays: Sequence[Any], mask: np.ndarray | None) -> np.ndarray:
    """Runs of tokens that have some asked (run, 3): first, end, how many are asked.

    Those of the array with the longest, so that what is read of it is used at once.
    """
    bounds = min((_bounds(array) for array in arrays), key=len)
    counts = np.diff(bounds)
    if mask is not None:
        counts = np.add.reduceat(mask, bounds[:-1], dtype=np.int64)
    runs = np.stack([bounds[:-1], bounds[1:], counts], axis=1)
    return runs[counts > 0]


def _bounds(array: Any) -> np.ndarray:
    """Token numbers at which runs begin, and the end."""
    if hasattr(array, "parts"):  # several stores end to end
        ends = zip(array.starts, array.parts, strict=False)
        return np.concatenate(
            [*(start + _bounds(part)[:-1] for start, part in ends), array.starts[-1:]]
        )
    layout = getattr(array, "layout", None)
    step = _SLICE_TOKENS if layout is None else layout.chunk_rows
    return np.append(np.arange(0, array.shape[1], step), array.shape[1])
