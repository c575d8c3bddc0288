"""What a sealed store says of itself, believed as far as it holds together.

A store may come from anyone. Its root and its manifest are read here, in bounds, and what they
say is checked for kind, size and agreement before anything is made of it; so that nonsense is an
error that says what is wrong, where, and not a crash or wrong numbers later.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from . import journal
from .codecs import bounded
from .errors import CorruptStoreError, NewerFormatError, NotAStoreError
from .kinds import mapping, need, numbers, shown, text, whole
from .plan import DTYPES, MAX_PREDICTIONS, canonical_json
from .schema import BLOCKS, CHUNK_NBYTES, DIMS, FORMAT, METADATA_NBYTES, TOKEN_COORDS
from .shard import Layout
from .storage import Storage, check_key

__all__ = ["AGAIN", "check_hash", "read_manifest", "read_root"]

AGAIN = (
    "Run `actstore verify` to see what else is wrong, and the same dump again to redo just that; "
    "of a store that is not yours, ask for a sound copy"
)

_SIZES = {
    **dict.fromkeys(("bool", "int8", "uint8"), 1),
    **dict.fromkeys(("int16", "uint16", "float16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "string"), 8),
}
_CHANGING = ("scale_factor", "add_offset", "missing_value", "_Unsigned")
_FACTS = {"capture", "corpus", "model", "head", "tokenizer", "machine", "versions"}
_OTHERS = {"format", "state", "id", "config_hash", "notes", "nonfinite", "sketch"}
_COLUMNS = {
    "inputs": ("token_id", "sequence", "position", "special", "kept"),
    "sequences": ("start", "length"),
}


def read_root(storage: Storage, data: bytes, shown: str) -> dict[str, Any]:
    """Parse and check a store's root ``zarr.json``.

    Parameters
    ----------
    storage : Storage
        Where it is, for messages.
    data : bytes
        The object.
    shown : str
        What the user calls the store.

    Raises
    ------
    NotAStoreError
        It is no store of actstore's.
    NewerFormatError
        It needs a newer actstore.
    CorruptStoreError
        It does not hold together; the message says where.
    """
    try:
        root = json.loads(data)
        attributes = root["attributes"]["actstore"]
        newer = int(attributes["format"]) > FORMAT
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        raise NotAStoreError(
            f"{shown} is not a store of actstore's: its zarr.json has no such attribute. If a dump "
            "wrote it, run that dump again to mend it; else open it with xarray.open_zarr"
        ) from None
    if newer:
        raise NewerFormatError(
            f"{shown} has format {attributes['format']} and this version reads up to {FORMAT}: "
            "pip install -U actstore"
        )
    try:
        nodes = root["consolidated_metadata"]["metadata"]
        outside = [k for k in nodes if {"", ".", ".."} & set(k.split("/"))]
    except (KeyError, TypeError, AttributeError):
        raise CorruptStoreError(f"zarr.json in {shown} lacks the metadata of the arrays") from None
    if outside:
        raise CorruptStoreError(
            f"zarr.json in {shown} names {outside[0][:200]!r}, outside the store"
        )
    try:
        _check_facts(attributes)
        _check_nodes(nodes, attributes)
    except CorruptStoreError as error:
        raise CorruptStoreError(f"zarr.json in {shown} is damaged: {error}. {AGAIN}") from None
    return root


def read_manifest(storage: Storage) -> dict[str, Any]:
    """The manifest, checked: one small read, whatever the number of shards."""
    data = storage.get(journal.MANIFEST, METADATA_NBYTES)
    if data is None:
        raise CorruptStoreError(
            f"{journal.MANIFEST} is missing from {storage.root}: run the same dump again to seal it"
        )
    try:
        manifest = journal.opened_json(data)
        text(manifest.get("id"), "id")
        for key, digest in mapping(manifest.get("objects"), "objects").items():
            check_key(key)
            numbers(digest, f"objects: {key[:200]}", count=2)
        records = mapping(manifest.get("records"), "records")
        whole(records.get("count"), "records: count", 0)
        whole(records.get("crc32c"), "records: crc32c", 0)
    except CorruptStoreError as error:
        raise CorruptStoreError(f"{journal.MANIFEST} in {storage.root}: {error}") from None
    return manifest


# -- the root's attribute --------------------------------------------------------------------


def _check_facts(facts: Any) -> None:
    """What FORMAT.md says of the root's attribute."""
    text(mapping(facts, "actstore").get("id"), "id")
    text(facts.get("config_hash"), "config_hash")
    corpus = mapping(facts.get("corpus"), "corpus")
    for name in ("sequences", "inputs", "tokens"):
        whole(corpus.get(name), f"corpus: {name}", 1)
    capture = mapping(facts.get("capture"), "capture")
    whole(capture.get("block_tokens"), "capture: block_tokens", 1)
    whole(capture.get("passes"), "capture: passes", 1, 2**16)
    whole(capture.get("predictions", 0), "capture: predictions", 0, MAX_PREDICTIONS)
    stages = mapping(capture.get("stages"), "capture: stages")
    need(bool(stages), "capture: stages is empty")
    for name, stage in stages.items():
        at = f"capture: stages: {name[:200]}"
        numbers(mapping(stage, at).get("layers"), f"{at}: layers")
        need(len(set(stage["layers"])) == len(stage["layers"]) > 0, f"{at}: layers repeat")
        whole(stage.get("width"), f"{at}: width", 1)
        need(stage.get("dtype") in DTYPES, f"{at}: dtype is none of {', '.join(DTYPES)}")
    for name in ("notes", "versions", "machine", "head", "tokenizer", "model", "sketch"):
        mapping(facts.get(name, {}), name)
    if "model" in facts:
        for name in ("name", "class"):
            text(facts["model"].get(name, ""), f"model: {name}")
    need("by" in facts.get("sketch", {"by": None}), "sketch: by is not there")
    by = facts.get("sketch", {}).get("by")
    need(by is None or isinstance(by, str), f"sketch: by is {shown(by)}, not a label")
    whole(facts.get("nonfinite", 0), "nonfinite", 0)


def check_hash(root: Mapping[str, Any], shown: str) -> None:
    """The facts that decide the bits have a digest beside them, which must be theirs.

    Raises
    ------
    CorruptStoreError
        It is not.
    """
    facts = root["attributes"]["actstore"]
    candidates = [{k: v for k, v in facts.items() if k in _FACTS}]
    if unknown := facts.keys() - _FACTS - _OTHERS:  # a later version's, or of one's own loop
        candidates.append({k: v for k, v in facts.items() if k not in _OTHERS})
    try:
        found = [hashlib.sha256(canonical_json(c).encode()).hexdigest() for c in candidates]
    except (ValueError, RecursionError):
        raise CorruptStoreError(f"zarr.json in {shown} holds what is no JSON") from None
    if facts["config_hash"] not in found and not unknown:
        raise CorruptStoreError(
            f"zarr.json in {shown} is damaged: its facts ({', '.join(sorted(candidates[0]))}) were "
            f"changed since its config_hash was made of them. {AGAIN}"
        )


# -- metadata of arrays and groups -----------------------------------------------------------


def _check_nodes(nodes: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Arrays of the kinds that stores have, of sizes that agree with each other and the facts."""
    corpus, stages = facts["corpus"], facts["capture"]["stages"]
    every = {"token": corpus["tokens"], "input": corpus["inputs"], "sequence": corpus["sequences"]}
    groups: dict[str, dict[str, int]] = {}
    for key, node in nodes.items():
        check_key(key)
        kind = mapping(node, f"metadata of {key[:200]}").get("node_type")
        mapping(node.get("attributes", {}), f"{key}: attributes")
        need(kind in ("array", "group"), f"{key}: node_type is {shown(kind)}")
        need(node.get("zarr_format") == 3, f"{key}: zarr_format is not 3")
        if kind == "group":
            groups.setdefault(key, {})
    for key, node in nodes.items():
        parent, _, name = key.rpartition("/")
        need(parent == "" or parent in groups, f"{key}: {parent} is no group")
        if node["node_type"] == "array":
            _check_array(key, node)
            stage = parent.removeprefix("sketch/")
            sizes = {**every, **_stage_sizes(stages.get(stage))}
            _check_dims(key, node, sizes, groups.setdefault(parent, {}))
            need(name != "activation" or parent in stages, f"{key}: {parent} is no stage")
    for group, names in _COLUMNS.items():
        for name in names:
            need(f"{group}/{name}" in nodes, f"{group}/{name} is not there")
    for name, stage in stages.items():
        need("/" not in name, f"stage {name[:200]!r} has a '/' in its name")
        for column in ("activation", "layer", "neuron", *TOKEN_COORDS):
            need(f"{name}/{column}" in nodes, f"{name}/{column} is not there")
        _check_activation(name, nodes[f"{name}/activation"], stage, facts)


def _stage_sizes(stage: Mapping[str, Any] | None) -> dict[str, int]:
    if stage is None:
        return {}
    width = stage["width"]
    return {"layer": len(stage["layers"]), "neuron": width, "neuron_b": width}


def _check_array(key: str, node: Mapping[str, Any]) -> None:
    shape = numbers(node.get("shape"), f"{key}: shape", 0)
    grid = mapping(node.get("chunk_grid"), f"{key}: chunk_grid")
    chunk = numbers(
        mapping(grid.get("configuration"), f"{key}: chunk_grid").get("chunk_shape"),
        f"{key}: chunk_shape",
        1,
        len(shape),
    )
    kind = node.get("data_type")
    need(isinstance(kind, str) and kind in _SIZES, f"{key}: data_type is {shown(kind)}")
    need(math.prod(shape) < 2**56, f"{key}: shape is {shape}")
    chunks = math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True))
    activation = key.endswith("/activation")
    most = BLOCKS * (shape[0] if activation and shape else 1)
    need(chunks <= most, f"{key}: {chunks:,} chunks are more than {most:,}")
    nbytes = math.prod(chunk) * _SIZES[str(kind)]
    room = 4 * CHUNK_NBYTES if activation else CHUNK_NBYTES
    need(nbytes <= room, f"{key}: chunks of {nbytes:,} bytes, where {room:,} are most")
    codecs = node.get("codecs")
    try:
        need(isinstance(codecs, list) and bool(codecs), f"{key}: codecs is no list")
        bounded(codecs or ())
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise CorruptStoreError(f"{key}: codecs are not as Zarr has them") from None
    except CorruptStoreError as error:
        raise CorruptStoreError(f"{key}: {error}") from None
    need(not node.get("storage_transformers"), f"{key}: it has storage_transformers")
    _check_attributes(key, node.get("attributes", {}))


def _check_attributes(key: str, attributes: Mapping[str, Any]) -> None:
    """Nothing by which xarray would take values for others than they are; labels that are text."""
    for name in _CHANGING:
        need(name not in attributes, f"{key}: the attribute {name} changes its values")
    units = attributes.get("units", "")
    need(isinstance(units, str) and " since " not in units, f"{key}: units are {shown(units)}")
    for name in ("coordinates", "long_name", "description", "source_dtype"):
        text(attributes.get(name, ""), f"{key}: {name}")
    labels = attributes.get("label_values", [])
    sound = isinstance(labels, list) and all(isinstance(v, str) for v in labels)
    need(sound, f"{key}: label_values is no list of texts")


def _check_dims(
    key: str, node: Mapping[str, Any], sizes: Mapping[str, int], seen: dict[str, int]
) -> None:
    """Equal dims of a group have one size, and some the size that the facts say."""
    names = node.get("dimension_names") or []
    sound = isinstance(names, list) and all(isinstance(n, str) for n in names)
    need(sound and len(set(names)) == len(names) == len(node["shape"]), f"{key}: dimension_names")
    for dim, size in zip(names, node["shape"], strict=True):
        due = sizes.get(dim, seen.setdefault(dim, size))
        need(size == due, f"{key}: {size:,} along {dim}, where {due:,} are due")


def _check_activation(
    name: str, node: Mapping[str, Any], stage: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    key = f"{name}/activation"
    need(node.get("dimension_names") == list(DIMS), f"{key}: its dims are not {DIMS}")
    need(node["data_type"] in ("float32", "float16"), f"{key}: {node['data_type']}")
    kind = node["attributes"].get("source_dtype", stage["dtype"])
    need(kind == stage["dtype"], f"{key}: source_dtype is {shown(kind)}")
    layout = Layout.of_array(node)
    if layout is None:  # another layout, read through zarr
        return
    need(layout.rows == facts["capture"]["block_tokens"], f"{key}: blocks of {layout.rows} tokens")
    need(layout.chunk_nbytes <= CHUNK_NBYTES // 8, f"{key}: chunks of {layout.chunk_nbytes:,}")
    need(layout.index_nbytes <= 2**26, f"{key}: an index of {layout.index_nbytes:,} bytes")
