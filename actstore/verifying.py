"""Every object of a sealed store against its digest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from crc32c import crc32c

from . import journal
from .errors import CorruptStoreError, StoreError
from .journal import Record, ShardRecord
from .places import storage_at
from .root import read_manifest
from .schema import METADATA_NBYTES
from .shard import Layout, digest, read_shard
from .storage import Storage
from .store import Store, opened

__all__ = ["Problem", "object_count", "verify"]


@dataclass(frozen=True)
class Problem:
    """One thing that `verify` found wrong."""

    key: str
    what: str

    def __str__(self) -> str:
        return f"{self.key}: {self.what}"


def verify(path: str | os.PathLike[str]) -> Iterator[tuple[str, Problem | None]]:
    """Read every object of a sealed store against its digest.

    Parameters
    ----------
    path : path
        The store.

    Yields
    ------
    key : str
        Each object, as it is checked.
    problem : Problem or None
        What is wrong with it. Rerunning the dump redoes just what is damaged.

    Examples
    --------
    >>> import actstore, tempfile
    >>> corpus = actstore.build_corpus([[1, 2, 3], [4, 5]])
    >>> plan = actstore.Plan.build(corpus, [actstore.StageSpec("mlp_post", (0, 1), width=32)])
    >>> folder = tempfile.TemporaryDirectory()
    >>> with actstore.Writer(f"{folder.name}/run.zarr", plan) as writer:
    ...     for layer in (0, 1):
    ...         writer.put("mlp_post", layer, token=0, values=np.ones((5, 32), "float32"))
    >>> [key for key, problem in actstore.verify(f"{folder.name}/run.zarr") if problem]
    []
    """
    storage = storage_at(path)
    _, store = opened(path)
    manifest = read_manifest(storage)
    for key, (size, checksum) in manifest["objects"].items():
        yield key, _check_object(storage, key, size, checksum)
    stored = journal.read_plan(storage)
    if stored is None:
        yield journal.PLAN, Problem(journal.PLAN, "missing")
        return
    yield "zarr.json", _check_root(storage, store, manifest["objects"], stored)
    blocks = -(-store.n_tokens // store.attrs["capture"]["block_tokens"])
    due = {
        "tokens": store.n_tokens,
        "blocks": blocks,
        "passes": store.attrs["capture"]["passes"],
    }
    wrong = [name for name, value in due.items() if stored[name] != value]
    if wrong:
        yield journal.PLAN, Problem(journal.PLAN, f"its {', '.join(wrong)} are not the root's")
        return
    records = []
    for index in range(stored["passes"]):
        for block in range(stored["blocks"]):
            key = journal.record_key(index, block)
            record = Record.read(storage, index, block)
            records.append(storage.get(key) or b"")
            if record is None:
                yield key, Problem(key, "the journal record is missing or damaged")
                continue
            yield key, None
            for shard in record.shards:
                yield shard.key, _check_shard(storage, store, shard, block, stored["tokens"])
    if crc32c(b"".join(records)) != manifest["records"]["crc32c"]:
        yield (
            journal.MANIFEST,
            Problem(journal.MANIFEST, "the journal is not the one that was sealed"),
        )


def object_count(path: str | os.PathLike[str]) -> int:
    """How many objects `verify` will check."""
    storage = storage_at(path)
    _, store = opened(path)
    manifest = read_manifest(storage)
    blocks = -(-store.n_tokens // store.attrs["capture"]["block_tokens"])
    layers = sum(len(s["layers"]) for s in store.attrs["capture"]["stages"].values())
    return 1 + len(manifest["objects"]) + manifest["records"]["count"] + blocks * layers


def _check_root(
    storage: Storage, store: Store, objects: Mapping[str, Any], stored: Mapping[str, Any]
) -> Problem | None:
    """Compare the root, which no digest covers, with what it repeats: metadata and plan."""
    members = {key.removesuffix("/zarr.json") for key in objects if key.endswith("/zarr.json")}
    if store._nodes.keys() != members:
        return Problem("zarr.json", "does not name the arrays and groups that the manifest does")
    for name, node in store._nodes.items():
        try:
            own = json.loads(storage.get(f"{name}/zarr.json", METADATA_NBYTES) or b"null")
        except (ValueError, RecursionError, CorruptStoreError):
            own = None
        own, repeated = ({**(n or {}), "consolidated_metadata": None} for n in (own, node))
        if own != repeated:
            return Problem("zarr.json", f"its metadata of {name} is not {name}/zarr.json's")
    facts = {**stored["config"], "config_hash": stored["config_hash"], "format": stored["format"]}
    for fact, value in facts.items():
        if store.attrs.get(fact) != value:
            return Problem("zarr.json", f"its {fact} is not the plan's")
    return None


def _check_object(
    storage: Storage, key: str, size: int, checksum: int, layout: Layout | None = None
) -> Problem | None:
    try:
        data = storage.get(key, size)
    except StoreError as error:
        return Problem(key, str(error))
    if data is None:
        return Problem(key, "missing")
    if len(data) != size:
        return Problem(key, f"has {len(data):,} bytes instead of {size:,}")
    if (crc32c(data) if layout is None else digest(layout, data)) != checksum:
        return Problem(key, "its checksum does not match")
    return None


def _check_shard(
    storage: Storage, store: Store, shard: ShardRecord, block: int, tokens: int
) -> Problem | None:
    folder = shard.key.rpartition("/")[0]
    if folder not in store._nodes:
        return Problem(shard.key, "is in no array of the store")
    layout = Layout.of_array(store._nodes[folder])
    problem = _check_object(storage, shard.key, shard.nbytes, shard.checksum, layout)
    if problem is not None or layout is None:
        return problem
    rows = min(layout.rows, tokens - block * layout.rows)
    values = np.empty((rows, layout.width), layout.dtype)
    try:
        with storage.reader(shard.key) as reader:
            read_shard(layout, reader, slice(0, rows), slice(0, layout.width), values)
    except CorruptStoreError as error:
        return Problem(shard.key, str(error))
    finite = values[np.isfinite(values)]
    same = values.size - finite.size == shard.summary.nonfinite and (
        not finite.size
        or (float(finite.min()), float(finite.max()))
        == (shard.summary.minimum, shard.summary.maximum)
    )
    return None if same else Problem(shard.key, "its values are not those that were summed up")
