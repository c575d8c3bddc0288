"""Commit records: what of a store is durable, and what its bytes should be.

A block's record is written after all its shards are synced; resuming trusts records, never the
mere existence of a shard. Records hold no time and no host, so that the same dump gives the same
bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from crc32c import crc32c

from .errors import CorruptStoreError
from .kinds import mapping, need, text, whole
from .plan import canonical_json
from .schema import BLOCKS, METADATA_NBYTES
from .shard import ShardSummary
from .storage import Storage, check_key

__all__ = ["Record", "ShardRecord", "content_id", "differences", "read_plan", "record_key"]

PLAN = "journal/plan.json"
MANIFEST = "journal/manifest.json"


@dataclass(frozen=True)
class ShardRecord:
    """Size, digest and extremes of one shard."""

    key: str
    nbytes: int
    checksum: int
    summary: ShardSummary


@dataclass(frozen=True)
class Record:
    """The commit record of one block in one pass.

    Attributes
    ----------
    index, block : int
        Of the pass, and of the block.
    shards : tuple of ShardRecord
    tables : dict
        crc32c of the block's rows of predictions and outcomes, by array; of the first pass only.
    """

    index: int
    block: int
    shards: tuple[ShardRecord, ...]
    tables: Mapping[str, int] = field(default_factory=dict)

    def encode(self) -> bytes:
        body: dict[str, Any] = {
            "block": self.block,
            "pass": self.index,
            "shards": [
                [
                    s.key,
                    s.nbytes,
                    s.checksum,
                    _json_float(s.summary.minimum),
                    _json_float(s.summary.maximum),
                    s.summary.nonfinite,
                ]
                for s in sorted(self.shards, key=lambda s: s.key)
            ],
        }
        if self.tables:
            body["tables"] = dict(self.tables)
        return sealed_json(body)

    @classmethod
    def decode(cls, data: bytes) -> Record:
        body = opened_json(data)
        need(isinstance(body.get("shards"), list), "its shards are no list")
        for row in body["shards"]:
            need(isinstance(row, list) and len(row) == 6, "a shard is not of six values")
            check_key(text(row[0], "the key of a shard"))
            for number in (row[1], row[2], row[5]):
                whole(number, f"a number of {row[0][:200]}")
            need(all(type(n) in (int, float, type(None)) for n in row[3:5]), "extremes are odd")
        shards = tuple(
            ShardRecord(
                key,
                size,
                crc,
                ShardSummary(
                    math.inf if low is None else low, -math.inf if high is None else high, bad
                ),
            )
            for key, size, crc, low, high, bad in body["shards"]
        )
        index, block = (whole(body.get(name), name) for name in ("pass", "block"))
        return cls(index, block, shards, dict(mapping(body.get("tables", {}), "tables")))

    @classmethod
    def read(cls, storage: Storage, index: int, block: int) -> Record | None:
        """The record of a block; None where there is none or it is damaged."""
        try:
            data = storage.get(record_key(index, block), METADATA_NBYTES)
            if data is None:
                return None
            record = cls.decode(data)
        except (CorruptStoreError, KeyError, TypeError, ValueError):
            return None
        return record if (record.index, record.block) == (index, block) else None


def record_key(index: int, block: int) -> str:
    return f"journal/p{index}.b{block:08d}.json"


def is_record(key: str) -> bool:
    return re.fullmatch(r"journal/p\d+\.b\d+\.json", key) is not None


def part_key(index: int, block: int, stage: int) -> str:
    return f"journal/p{index}.b{block:08d}.s{stage}.sketch"


def table_key(block: int) -> str:
    """A block's predictions and outcomes, until they are merged; the first pass makes them."""
    return f"journal/p0.b{block:08d}.tables"


def _json_float(value: float) -> float | None:
    return value if math.isfinite(value) else None


def sealed_json(body: Mapping[str, Any]) -> bytes:
    """Canonical JSON that carries its own crc32c."""
    text = canonical_json(body)
    return canonical_json({**body, "crc32c": crc32c(text.encode())}).encode() + b"\n"


def opened_json(data: bytes) -> dict[str, Any]:
    """Check and decode `sealed_json`."""
    try:
        body = json.loads(data)
        checksum = body.pop("crc32c")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CorruptStoreError("not a JSON object with a checksum") from None
    if crc32c(canonical_json(body).encode()) != checksum:
        raise CorruptStoreError("its checksum does not match")
    return body


def read_plan(storage: Storage) -> dict[str, Any] | None:
    """The stored plan: configuration, blocks, passes. None where there is none."""
    data = storage.get(PLAN, METADATA_NBYTES)
    if data is None:
        return None
    try:
        stored = opened_json(data)
        mapping(stored.get("config"), "config")
        text(stored.get("config_hash"), "config_hash")
        for name, most in {"tokens": 2**53, "blocks": BLOCKS, "passes": 2**16}.items():
            whole(stored.get(name), name, 0, most)
        need({"format", "sketch"} <= stored.keys(), "it has no format")
        return stored
    except CorruptStoreError as error:
        raise CorruptStoreError(
            f"{PLAN} in {storage.root} is damaged: {error}. Where the store is sealed, the "
            "same dump again writes it anew; else restore that one file from a copy, or delete the "
            "store and dump again"
        ) from None


def content_id(config_hash: str, objects: Mapping[str, Any], records: list[bytes]) -> str:
    """What a store is called: the digest of all that it holds."""
    digest = hashlib.sha256(config_hash.encode())
    digest.update(canonical_json(objects).encode())
    for record in records:
        digest.update(record)
    return digest.hexdigest()[:32]


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Human sentences on where two configurations differ."""
    a, b = _flatten(stored), _flatten(asked)
    lines = []
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) != b.get(name):
            if name.endswith("sha256"):
                what = _DIGESTS.get(name, name.removesuffix(".sha256"))
                lines.append(f"{what} (its digest differs)")
            else:
                lines.append(f"{name}: {a.get(name, 'absent')} there, {b.get(name, 'absent')} here")
    return lines


_DIGESTS = {
    "corpus.sha256": "the input text, its labels or its selection",
    "capture.batches.sha256": "the batches",
    "model.sha256": "the model's weights",
    "head.sha256": "the weights of the model's head",
}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
