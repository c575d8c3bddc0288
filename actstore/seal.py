"""Seal a store whose blocks are all there: merge sketches, write the manifest, then the groups.

Everything here is a function of what is on disk and the plan, so whoever seals writes the same
bytes, and a seal that was cut short is simply done again. The root's metadata comes last.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from crc32c import crc32c

from . import journal, sketch
from .errors import CorruptStoreError
from .journal import Record
from .plan import Plan, StagePlan
from .shard import read_shard
from .skeleton import Skeleton
from .storage import Storage, aligned_buffer
from .tables import merge as merge_tables

__all__ = [
    "block_records",
    "put_all",
    "put_if_new",
    "put_what_is_new",
    "root_document",
    "scan_part",
    "seal",
    "sealed_objects",
    "sealed_settings",
    "sketch_objects",
    "table_objects",
]

Digest = list[int]
"""Size and crc32c of an object."""


def seal(
    storage: Storage,
    plan: Plan,
    skeleton: Skeleton,
    records: list[bytes],
    sketches: Mapping[str, Digest],
    tables: Mapping[str, Digest],
) -> None:
    """Write manifest and groups, the root last.

    Parameters
    ----------
    storage : Storage
    plan : Plan
    skeleton : Skeleton
    records : list of bytes
        All commit records in order.
    sketches : mapping
        Digests of the merged sketches' objects, by key.
    tables : mapping
        Those of predictions and outcomes.
    """
    objects = {key: [len(data), crc32c(data)] for key, data in skeleton.objects.items()}
    objects |= tables
    identity = journal.content_id(plan.config_hash, _labels(objects), records)
    groups = {key: data for key, data in skeleton.groups.items() if key != "zarr.json"}
    manifest = {
        "id": identity,
        "objects": {
            **objects,
            **{key: [len(data), crc32c(data)] for key, data in groups.items()},
            **sketches,
        },
        "records": {"count": len(records), "crc32c": crc32c(b"".join(records))},
    }
    root = json.loads(skeleton.groups["zarr.json"])
    manifest["sketch"] = root["attributes"]["actstore"].get("sketch")
    nonfinite = sum(s.summary.nonfinite for r in records for s in Record.decode(r).shards)
    root["attributes"]["actstore"] |= {"id": identity, "nonfinite": nonfinite}
    put_if_new(storage, journal.MANIFEST, journal.sealed_json(manifest))
    put_what_is_new(storage, groups)
    _tidy(storage, [*skeleton.objects, *skeleton.groups, *sketches, *tables])
    put_if_new(storage, "zarr.json", root_document(root))


def root_document(root: Mapping[str, Any]) -> bytes:
    """The root's metadata as bytes, the same for equal content."""
    return json.dumps(root, indent=1, sort_keys=True).encode()


def _labels(objects: Mapping[str, Digest]) -> dict[str, Digest]:
    """What identifies a store; sketches follow from the data and can be made later."""
    return {key: digest for key, digest in objects.items() if not key.startswith("sketch/")}


def _tidy(storage: Storage, keys: Iterable[str]) -> None:
    """Remove what only an unfinished store needs, and what killed writers left beside `keys`."""
    for key in storage.keys("journal"):
        if key.startswith("journal/rank-") or key.endswith((".sketch", ".tables")):
            storage.delete(key)
    for folder in {"journal", *(key.rpartition("/")[0] for key in keys)}:
        storage.sweep(folder)


def put_if_new(storage: Storage, key: str, data: bytes) -> None:
    """Write an object unless it is there, the same to the byte."""
    if storage.get(key) != data:
        storage.put_durable(key, data)


def put_what_is_new(storage: Storage, objects: Mapping[str, bytes]) -> None:
    """`put_if_new` of several, in no order; as many at once as the storage likes."""
    with ThreadPoolExecutor(storage.at_once) as pool:
        list(pool.map(lambda key: put_if_new(storage, key, objects[key]), objects))


def block_records(storage: Storage, plan: Plan) -> list[bytes] | None:
    """All commit records in order; None while any is missing."""
    records = []
    for index in range(len(plan.passes)):
        for block in range(plan.n_blocks):
            if Record.read(storage, index, block) is None:
                return None
            records.append(storage.get(journal.record_key(index, block)) or b"")
    return records


# -- sketches ------------------------------------------------------------------------------


def sketch_objects(
    storage: Storage, plan: Plan, skeleton: Skeleton, strata: sketch.Strata
) -> dict[str, Digest]:
    """Merge the blocks' sketches into the store; a part that is missing is made again.

    Returns
    -------
    dict
        Digests of the objects written, by key.
    """

    def load(stage: StagePlan, block: int) -> sketch.Part:
        part: dict[str, np.ndarray] = {}
        for index, group in enumerate(plan.passes):
            layers = group[stage.name]
            if layers:
                key = journal.part_key(index, block, plan.stages.index(stage))
                part |= _read_part(storage, key) or scan_part(
                    storage, stage, layers, block, plan.block_rows(block), strata
                )
        return part

    metadata = {k: v for k, v in skeleton.objects.items() if k.startswith("sketch/")}

    def merged(stage: StagePlan) -> dict[str, Digest]:
        objects = sketch.merge([stage], plan.n_tokens, len(strata.names), metadata, load)
        return put_all(storage, objects)

    largest = max(sketch.merge_nbytes(stage, len(strata.names)) for stage in plan.stages)
    digests: dict[str, Digest] = {}
    with ThreadPoolExecutor(2 if 2 * largest <= plan.buffer else 1) as pool:
        for own in pool.map(merged, plan.stages):
            digests |= own
    return digests


def table_objects(
    storage: Storage, plan: Plan, skeleton: Skeleton, records: list[bytes]
) -> dict[str, Digest]:
    """Merge the blocks' predictions and outcomes into the store.

    Raises
    ------
    tables.RowsMissing
        Some are neither beside the journal nor in the store: their block has to be redone.
    """
    metadata = {f"{key}/zarr.json": skeleton.objects[f"{key}/zarr.json"] for key in plan.tables}
    # The first pass made them, and its records come first.
    expected = {b: Record.decode(records[b]).tables for b in range(plan.n_blocks)}
    return put_all(storage, merge_tables(storage, plan, metadata, expected))


def put_all(storage: Storage, objects: Iterable[tuple[str, bytes]]) -> dict[str, Digest]:
    """Write objects and then make their names durable; gives their digests."""
    digests: dict[str, Digest] = {}
    folders = set()
    for key, data in objects:
        folder = key.rpartition("/")[0]
        if folder not in folders:
            storage.make_folder(folder)
            folders.add(folder)
        storage.put(key, data)
        digests[key] = [len(data), crc32c(data)]
    for folder in folders:
        storage.sync_folder(folder)
    return digests


def _read_part(storage: Storage, key: str) -> dict[str, np.ndarray] | None:
    data = storage.get(key)
    return sketch.unpack(data) if data is not None else None


def scan_part(
    storage: Storage,
    stage: StagePlan,
    layers: tuple[int, ...],
    block: int,
    rows: int,
    strata: sketch.Strata,
) -> dict[str, np.ndarray]:
    """The sketches of a stage's block from its shards, to the bit as while they were written."""
    layout = stage.layout
    first = block * layout.rows
    codes = strata.codes[first : first + rows]
    image = layout.image(aligned_buffer(layout.image_nbytes))
    values = np.empty((rows, layout.width), layout.dtype)
    limits = sketch.no_limits(len(strata.names), layout.width)
    tensors: dict[str, np.ndarray] = {}
    for i in layers:
        with storage.reader(stage.key(i, block)) as reader:
            read_shard(layout, reader, slice(0, rows), slice(0, layout.width), values)
        bits = (values.view(np.uint32) >> 16).astype(np.uint16) if layout.compressed else values
        for top in range(0, rows, layout.chunk_rows):
            part = bits[top : top + layout.chunk_rows]
            shaped = part.reshape(len(part), layout.grid[1], layout.chunk_width)
            image[top // layout.chunk_rows, :, : len(part)] = shaped.transpose(1, 0, 2)
        made = sketch.sketch_image(layout, image, codes, len(strata.names), first, limits)
        tensors |= made.tensors(f"{stage.name}/{i}")
    return tensors


def sealed_objects(storage: Storage, groups: tuple[str, ...]) -> dict[str, Digest] | None:
    """Digests of what a sealed store has merged in some groups; None if any is damaged.

    The manifest has them; metadata are not among them.
    """
    try:
        manifest = journal.opened_json(storage.get(journal.MANIFEST) or b"")
    except CorruptStoreError:
        return None
    mine = {
        key: digest
        for key, digest in manifest["objects"].items()
        if key.partition("/")[0] in groups and not key.endswith("zarr.json")
    }
    for key, (size, checksum) in mine.items():
        data = storage.get(key)
        if data is None or len(data) != size or crc32c(data) != checksum:
            return None
    return mine


def sealed_settings(storage: Storage) -> dict[str, Any] | None:
    """How a sealed store was sketched, from its manifest or its root; None where it was not.

    Raises
    ------
    CorruptStoreError
        Neither can be read.
    """
    try:
        manifest = journal.opened_json(storage.get(journal.MANIFEST) or b"")
        if "sketch" in manifest:
            return manifest["sketch"]
    except CorruptStoreError:
        pass
    try:
        root = json.loads(storage.get("zarr.json") or b"")
        return root["attributes"]["actstore"].get("sketch")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise CorruptStoreError("neither manifest nor zarr.json can be read") from None
