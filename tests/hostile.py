"""Stores as a malicious or unlucky stranger would make them: hand-written bombs and mutations."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
from crc32c import crc32c
from helpers import STAGES, VOCABULARY, plan_of, put_all, random_tables, random_values, small_corpus

from actstore.journal import sealed_json
from actstore.plan import canonical_json
from actstore.writer import Writer

MANIFEST = "journal/manifest.json"
FACTS = ("capture", "corpus", "model", "head", "tokenizer", "machine", "versions")


def make(path: Path) -> None:
    """The sound store that everything here is a perversion of."""
    plan = plan_of(
        small_corpus(),
        STAGES,
        64,
        predictions=3,
        outcomes=True,
        provenance={"model": {"name": "tiny <model>"}},
    )
    with Writer(path, plan, vocabulary=VOCABULARY) as writer:
        put_all(writer, random_values(plan))
        writer.put_tables(0, random_tables(plan))


# -- a store whose digests fit whatever was put into it ----------------------------------------


def read(path: Path, key: str) -> Any:
    return json.loads((path / key).read_text())


def write(path: Path, key: str, value: Any) -> None:
    (path / key).write_text(json.dumps(value))


def reseal(path: Path) -> None:
    """Make manifest, config hash and checksums fit what lies there, as its author would."""
    try:
        root = read(path, "zarr.json")
        facts = root["attributes"]["actstore"]
        own = {k: facts[k] for k in FACTS if k in facts}
        facts["config_hash"] = hashlib.sha256(canonical_json(own).encode()).hexdigest()
        write(path, "zarr.json", root)
        manifest = read(path, MANIFEST)
        for key in manifest["objects"]:
            if (path / key).is_file():
                data = (path / key).read_bytes()
                manifest["objects"][key] = [len(data), crc32c(data)]
        manifest.pop("crc32c")
        (path / MANIFEST).write_bytes(sealed_json(manifest))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OSError):
        pass  # too broken to be made to fit


def edit_node(path: Path, key: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change an array's metadata in all the places that have them."""
    root = read(path, "zarr.json")
    node = root["consolidated_metadata"]["metadata"][key]
    change(node)
    write(path, "zarr.json", root)
    write(path, f"{key}/zarr.json", node)
    reseal(path)


def edit_facts(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    root = read(path, "zarr.json")
    change(root["attributes"]["actstore"])
    write(path, "zarr.json", root)
    reseal(path)


def edit_sealed(path: Path, key: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a journal object and give it a fitting checksum."""
    body = read(path, key)
    body.pop("crc32c")
    change(body)
    (path / key).write_bytes(sealed_json(body))


def replace_chunk(path: Path, key: str, data: bytes) -> None:
    (path / key).write_bytes(data)
    reseal(path)


# -- bombs -------------------------------------------------------------------------------------


def zstd_of_zeros(nbytes: int) -> bytes:
    """A frame of few bytes that says truly that it decodes to `nbytes` zeros."""
    head = b"\x28\xb5\x2f\xfd" + bytes([0b11000000, 0x38]) + struct.pack("<Q", nbytes)
    block, last = (((2**17 << 3) | 0b10 | end).to_bytes(3, "little") + b"\0" for end in (0, 1))
    return head + block * (nbytes // 2**17 - 1) + last  # of run-length blocks


def gzip_of_zeros(nbytes: int) -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    piece = bytes(2**24)
    parts = [packer.compress(piece) for _ in range(nbytes // len(piece))]
    return b"".join([*parts, packer.flush()])


def _to_gzip(node: dict[str, Any]) -> None:
    node["codecs"] = [node["codecs"][0], {"name": "gzip", "configuration": {"level": 5}}]


def _gzip_bomb(path: Path) -> None:
    edit_node(path, "hidden/position", _to_gzip)
    replace_chunk(path, "hidden/position/c/0", gzip_of_zeros(2**28))


def _blosc_bomb(path: Path) -> None:
    blosc = {"cname": "lz4", "clevel": 5, "shuffle": "noshuffle", "typesize": 4, "blocksize": 0}
    edit_node(
        path,
        "hidden/position",
        lambda n: n.update(codecs=[n["codecs"][0], {"name": "blosc", "configuration": blosc}]),
    )
    chunk = bytearray(numcodecs.Blosc("lz4", 5, 0).encode(np.zeros(147, np.int32)))
    chunk[4:8] = struct.pack("<I", 2**31 - 2**12)
    replace_chunk(path, "hidden/position/c/0", bytes(chunk))


def _shape(value: list[Any]) -> Callable[[dict[str, Any]], None]:
    return lambda node: node.update(shape=value)


def _chunks(value: list[Any]) -> Callable[[dict[str, Any]], None]:
    return lambda node: node["chunk_grid"]["configuration"].update(chunk_shape=value)


def _every_token(n: int) -> Callable[[Path], None]:
    """All that is said of tokens says there are `n`, and nothing backs it."""

    def change(path: Path) -> None:
        root = read(path, "zarr.json")
        root["attributes"]["actstore"]["corpus"]["tokens"] = n
        for key, node in root["consolidated_metadata"]["metadata"].items():
            for i, dim in enumerate(node.get("dimension_names") or []):
                if dim == "token":
                    node["shape"][i] = n
                    write(path, f"{key}/zarr.json", node)
        write(path, "zarr.json", root)
        reseal(path)

    return change


def _codec(name: str, configuration: Any = None) -> Callable[[Path], None]:
    added = {"name": name, "configuration": configuration or {}}
    return lambda p: edit_node(p, "hidden/position", lambda n: n["codecs"].append(added))


def _attributes(key: str, **added: Any) -> Callable[[Path], None]:
    return lambda p: edit_node(p, key, lambda n: n["attributes"].update(added))


def _link(key: str, target: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / key).unlink()
        (path / key).symlink_to(target)

    return change


def _pipe(path: Path) -> None:
    (path / "hidden/position/c/0").unlink()
    os.mkfifo(path / "hidden/position/c/0")


def _shard(change: Callable[[bytearray, np.ndarray], Any]) -> Callable[[Path], None]:
    """Change a shard and its index, which is given a fitting checksum."""

    def apply(path: Path) -> None:
        key = path / "mlp_post/activation/c.0.0.0"
        data = bytearray(key.read_bytes())
        node = read(path, "mlp_post/activation/zarr.json")
        shard = node["chunk_grid"]["configuration"]["chunk_shape"]
        chunk = node["codecs"][0]["configuration"]["chunk_shape"]
        size = 16 * (shard[1] // chunk[1]) * (shard[2] // chunk[2])
        index = np.frombuffer(bytes(data[-size - 4 : -4]), "<u8").reshape(-1, 2).copy()
        body = data[: -size - 4]
        change(body, index)
        table = index.tobytes()
        key.write_bytes(bytes(body) + table + crc32c(table).to_bytes(4, "little"))

    return apply


def _blosc_shard(path: Path) -> None:
    """Chunks of a compressed stage that say they decode to 2 GB."""
    key = path / "mlp_out/activation/c.0.0.0"
    data = bytearray(key.read_bytes())
    data[4:8] = struct.pack("<I", 2**31 - 2**12)
    node = read(path, "mlp_out/activation/zarr.json")
    shard = node["chunk_grid"]["configuration"]["chunk_shape"]
    chunk = node["codecs"][0]["configuration"]["chunk_shape"]
    size = 16 * (shard[1] // chunk[1]) * (shard[2] // chunk[2])
    start, length = struct.unpack("<QQ", data[-size - 4 : -size + 12])
    body = bytes(data[start : start + length - 4])
    data[start + length - 4 : start + length] = crc32c(body).to_bytes(4, "little")
    key.write_bytes(bytes(data))


def _nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def _nest(node: dict[str, Any]) -> None:
    """Shards in shards, 300 deep."""
    for _ in range(300):
        node["codecs"] = [{"name": "sharding_indexed", "configuration": {"codecs": node["codecs"]}}]


def _circle(path: Path) -> None:
    """A folder that holds itself, among the groups."""
    shutil.rmtree(path / "outcomes")
    (path / "outcomes").symlink_to(path, target_is_directory=True)


def _rename(old: str, new: str) -> Callable[[Path], None]:
    """A stage under another name, wherever it is said."""

    def change(path: Path) -> None:
        root = read(path, "zarr.json")
        stages = root["attributes"]["actstore"]["capture"]["stages"]
        stages[new] = stages.pop(old)
        nodes = root["consolidated_metadata"]["metadata"]
        for key in [k for k in nodes if k == old or k.startswith(f"{old}/")]:
            nodes[new + key[len(old) :]] = nodes.pop(key)
        write(path, "zarr.json", root)
        reseal(path)

    return change


BOMBS: dict[str, Callable[[Path], Any]] = {
    "a negative shape": lambda p: edit_node(p, "mlp_post/activation", _shape([2, -147, 48])),
    "a shape of fractions": lambda p: edit_node(p, "mlp_post/activation", _shape([2, 147.0, 48])),
    "a shape of 2^62": lambda p: edit_node(p, "mlp_post/activation", _shape([2, 2**62, 48])),
    "a shape of 10^400": lambda p: edit_node(p, "hidden/position", _shape([10**400])),
    "a chunk of a terabyte": lambda p: edit_node(p, "hidden/position", _chunks([2**38])),
    "a chunk of nothing": lambda p: edit_node(p, "hidden/position", _chunks([0])),
    "shards of a terabyte": lambda p: edit_node(p, "mlp_post/activation", _chunks([1, 2**30, 48])),
    "10^12 tokens": _every_token(10**12),
    "10^9 tokens": _every_token(10**9),
    "zstd, 64 GiB in 2 MB": lambda p: replace_chunk(p, "hidden/position/c/0", zstd_of_zeros(2**36)),
    "zstd of texts, 64 GiB": lambda p: replace_chunk(p, "sequences/text/c/0", zstd_of_zeros(2**36)),
    "zstd that lies of its size": lambda p: replace_chunk(
        p,
        "hidden/position/c/0",
        b"\x28\xb5\x2f\xfd"
        + bytes([0b11000000, 0x38])
        + struct.pack("<Q", 147 * 4)
        + zstd_of_zeros(2**33)[14:],
    ),
    "gzip, 256 MiB in 256 kB": _gzip_bomb,
    "blosc, 2 GiB": _blosc_bomb,
    "blosc in a shard, 2 GiB": _blosc_shard,
    "4 billion texts": lambda p: replace_chunk(
        p, "sequences/text/c/0", numcodecs.Zstd().encode(b"\xff" * 8 + bytes(64))
    ),
    "a text of 4 GB": lambda p: replace_chunk(
        p,
        "sequences/text/c/0",
        numcodecs.Zstd().encode(struct.pack("<II", 24, 2**32 - 1) + bytes(200)),
    ),
    "texts that are no UTF-8": lambda p: replace_chunk(
        p,
        "sequences/text/c/0",
        numcodecs.Zstd().encode(struct.pack("<I", 24) + (struct.pack("<I", 2) + b"\xff\xfe") * 24),
    ),
    "an unknown codec": _codec("numcodecs.pickle"),
    "a codec of no name": _codec(""),
    "a codec that nests": lambda p: edit_node(p, "hidden/position", _nest),
    "an unknown type": lambda p: edit_node(
        p, "hidden/position", lambda n: n.update(data_type="complex128")
    ),
    "a type of 2 GB an element": lambda p: edit_node(
        p,
        "hidden/position",
        lambda n: n.update(
            data_type={"name": "fixed_length_utf32", "configuration": {"length_bytes": 2**31}}
        ),
    ),
    "a structured type": lambda p: edit_node(
        p,
        "hidden/position",
        lambda n: n.update(data_type={"name": "structured", "configuration": {"fields": []}}),
    ),
    "a stage that leads out": _rename("mlp_post", "../elsewhere"),
    "a stage from the root": _rename("mlp_post", "/etc"),
    "a stage at an address": _rename("mlp_post", "file:///etc/passwd"),
    "a stage within another": _rename("mlp_post", "hidden/mlp_post"),
    "a manifest that leads out": lambda p: edit_sealed(
        p, MANIFEST, lambda m: m["objects"].update({"../../../etc/passwd": [1, 2]})
    ),
    "a record that leads out": lambda p: edit_sealed(
        p,
        "journal/p0.b00000000.json",
        lambda r: r["shards"][0].__setitem__(0, "../../../etc/passwd"),
    ),
    "a link out of the store": _link("hidden/position/c/0", "/etc/passwd"),
    "a shard that is a link": _link("mlp_post/activation/c.0.0.0", "/etc/passwd"),
    "a link to itself": _link("hidden/position/c/0", "0"),
    "a device": _link("hidden/position/c/0", "/dev/zero"),
    "a shard that is a device": _link("mlp_post/activation/c.0.0.0", "/dev/zero"),
    "a root that is a device": _link("zarr.json", "/dev/zero"),
    "a pipe": _pipe,
    "a folder that holds itself": _circle,
    "attributes of 100 MB": lambda p: (p / "zarr.json").write_text(
        (p / "zarr.json").read_text()[:-1] + ',"x":"' + "x" * 10**8 + '"}'
    ),
    "attributes of 33 million lists": lambda p: (p / "zarr.json").write_text(
        (p / "zarr.json").read_text()[:-1] + ',"x":[' + "[]," * (33 * 10**6) + "0]}"
    ),
    "a manifest of 100 MB": lambda p: (p / MANIFEST).write_bytes(b'{"id":"' + b"x" * 10**8),
    "deep nesting": lambda p: (p / "zarr.json").write_text(
        (p / "zarr.json").read_text()[:-1] + ',"x":' + _nested(100_000) + "}"
    ),
    "deep nesting in an array": lambda p: (p / "hidden/position/zarr.json").write_text(
        _nested(10**6)
    ),
    "attributes that scale": _attributes("hidden/position", scale_factor=2.0),
    "attributes that make dates": _attributes("hidden/position", units="days since 2000-01-01"),
    "labels that are numbers": _attributes("mlp_post/play", label_values=[1, 2, 3, 4]),
    "labels that are too few": lambda p: [
        edit_node(p, f"{s.name}/play", lambda n: n["attributes"].update(label_values=["one"]))
        for s in STAGES
    ],
    "facts of NaN": lambda p: edit_facts(p, lambda f: f["corpus"].update(tokens=float("nan"))),
    "facts of 10^30": lambda p: edit_facts(p, lambda f: f["corpus"].update(tokens=10**30)),
    "facts that are lists": lambda p: edit_facts(p, lambda f: f.update(capture=[], corpus=[])),
    "blocks of nothing": lambda p: edit_facts(p, lambda f: f["capture"].update(block_tokens=0)),
    "a layer that repeats": lambda p: edit_facts(
        p, lambda f: f["capture"]["stages"]["mlp_post"].update(layers=[1, 1])
    ),
    "10^15 blocks in the plan": lambda p: edit_sealed(
        p, "journal/plan.json", lambda b: b.update(blocks=10**15, passes=10**9)
    ),
    "a plan of words": lambda p: edit_sealed(
        p, "journal/plan.json", lambda b: b.update(blocks="many", config=None)
    ),
    "records of words": lambda p: edit_sealed(
        p, "journal/p0.b00000000.json", lambda b: b.update(shards=[["a", "b"], 7, None])
    ),
    "an index that points far": _shard(lambda body, index: index.__setitem__((0, 0), 2**63)),
    "an index of huge chunks": _shard(lambda body, index: index.__setitem__((0, 1), 2**62)),
    "an index whose sums wrap": _shard(lambda body, index: index.__setitem__(0, (2**64 - 8, 16))),
    "tokens of no input": lambda p: replace_chunk(
        p, "hidden/input/c/0", numcodecs.Zstd().encode(np.full(147, 10**9, np.int64))
    ),
    "tokens of no sequence": lambda p: replace_chunk(
        p, "hidden/sequence/c/0", numcodecs.Zstd().encode(np.full(147, -5, np.int32))
    ),
    "words of no vocabulary": lambda p: [
        replace_chunk(p, key, numcodecs.Zstd().encode(np.full(n, 10**6, np.int32)))
        for key, n in (("hidden/token_id/c/0", 147), ("inputs/token_id/c/0", 180))
    ],
    "sequences that overlap nothing": lambda p: replace_chunk(
        p, "sequences/start/c/0", numcodecs.Zstd().encode(np.full(24, -(10**12), np.int64))
    ),
    "spans far outside the text": lambda p: [
        replace_chunk(
            p,
            f"inputs/char_{end}/c/0",
            numcodecs.Zstd().encode(np.full(180, n, np.int32)),
        )
        for end, n in (("start", -5), ("end", 2**30))
    ],
    "sketches of other tokens": lambda p: [
        replace_chunk(
            p,
            f"sketch/{s.name}/{side}_token/c/0/{i}/0/0",
            numcodecs.Zstd().encode(np.full((3, 1, s.width, 20), 10**12, np.int64)),
        )
        for s in STAGES
        for side in ("largest", "smallest")
        for i in range(len(s.layers))
    ],
    "strata of other names": lambda p: edit_facts(p, lambda f: f["sketch"].update(by="play")),
    "a chunk that is lost": lambda p: (p / "hidden/position/c/0").unlink(),
    "a chunk of other values": lambda p: (p / "hidden/position/c/0").write_bytes(
        numcodecs.Zstd().encode(np.zeros(147, np.int32))
    ),
    "a sketch of other values": lambda p: (p / "sketch/hidden/moments/c/0/0/0/0").write_bytes(
        numcodecs.Zstd().encode(np.ones((9, 3, 3, 24)))
    ),
}


# -- mutations ---------------------------------------------------------------------------------

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 147, 2**31, 2**53, 2**63, 2**64, 10**30, 1.5),
    *(float("nan"), float("inf"), "", "x", "..", "../..", "/etc/passwd", "\0", "é\n", "position"),
    *([], {}, [[]], [1], [-1], [2**40], ["a"], {"a": 1}, {"name": "zstd"}, {"name": "bytes"}),
    *("float32", "int64", "string", "group", "array", "regular", "NaN", "0" * 5000),
]


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at]
    if isinstance(value, dict):
        for k, v in value.items():
            found += _places(v, (*at, k))
    elif isinstance(value, list):
        for i, v in enumerate(value[:20]):
            found += _places(v, (*at, i))
    return found


def mutate_json(rng: random.Random, value: Any) -> Any:
    """One to three odd values, lost, doubled or renamed members somewhere inside."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = [p for p in _places(value) if p]
        if not places:
            return rng.choice(ODD)
        *way, last = rng.choice(places)
        parent = value
        for step in way:
            parent = parent[step]
        act = rng.randrange(5)
        if act == 0:
            del parent[last]
        elif act == 1 and isinstance(parent, dict):
            parent[str(rng.choice(ODD))] = parent.pop(last)
        elif act == 2 and isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[last]))
        elif act == 3 and type(parent[last]) in (int, float):
            old = parent[last]
            parent[last] = rng.choice([-old, old + 1, old - 1, old * 2, old * 10**6, old / 2])
        else:
            parent[last] = copy.deepcopy(rng.choice(ODD))
    return value


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes flipped, cut, doubled, zeroed or put in."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 4, 30])):
        at = rng.randrange(len(out) + 1)
        act = rng.randrange(6)
        if act <= 1 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif act == 2:
            del out[at : at + rng.choice([1, 4, 100, 10**6])]
        elif act == 3:
            out[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 4, 16])))
        elif act == 4:
            end = at + rng.choice([4, 8, 64])
            out[at:end] = bytes(len(out[at:end]))
        else:
            odd = struct.pack("<q", rng.choice([0, -1, 2**31, 2**40, 2**62]))
            out[at : at + 8] = odd[: len(out[at : at + 8])]
    return bytes(out)


def files(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def damage(rng: random.Random, path: Path) -> str:
    """What befalls a store: no digest is made to fit. Says what was done."""
    key = rng.choice(files(path))
    target = path / key
    data = target.read_bytes()
    act = rng.randrange(6)
    if act == 0:
        target.unlink()
        return f"{key} deleted"
    if act == 1:
        other = rng.choice(files(path))
        target.write_bytes((path / other).read_bytes())
        return f"{key} is {other}"
    if act == 2 and key.endswith(".json"):
        with contextlib.suppress(RecursionError, TypeError, ValueError):
            target.write_text(json.dumps(mutate_json(rng, json.loads(data))))
        return f"{key} has other members"
    target.write_bytes(mutate_bytes(rng, data))
    return f"{key} has other bytes"


def craft(rng: random.Random, path: Path) -> str:
    """What an author does: metadata, chunks, shards or records, with digests that fit."""
    act = rng.randrange(6)
    root = read(path, "zarr.json")
    nodes = root["consolidated_metadata"]["metadata"]
    if act <= 1:
        key = rng.choice(sorted(nodes))
        node = mutate_json(rng, nodes[key])
        nodes[key] = node
        write(path, "zarr.json", root)
        write(path, f"{key}/zarr.json", node)
        done = f"metadata of {key}"
    elif act == 2:
        root["attributes"]["actstore"] = mutate_json(rng, root["attributes"]["actstore"])
        write(path, "zarr.json", root)
        done = "facts"
    elif act == 3:
        key = rng.choice([k for k in files(path) if k.startswith("journal/")])
        body = mutate_json(rng, {k: v for k, v in read(path, key).items() if k != "crc32c"})
        try:
            (path / key).write_bytes(sealed_json(body))
        except (ValueError, TypeError):
            write(path, key, body)
        return key
    elif act == 4:
        key = rng.choice([k for k in files(path) if k.endswith(("/c/0", "/0/0", "c/0/0/0/0"))])
        raw = (path / key).read_bytes()
        try:
            plain = numcodecs.Zstd().decode(raw)
            raw = numcodecs.Zstd().encode(mutate_bytes(rng, plain) or b"\0")
        except (RuntimeError, ValueError):
            raw = mutate_bytes(rng, raw)
        (path / key).write_bytes(raw)
        done = f"values of {key}"
    else:

        def change(body: bytearray, index: np.ndarray) -> None:
            row, column = rng.randrange(len(index)), rng.randrange(2)
            odd = [0, 1, 2**20, 2**31, 2**63, 2**64 - 1, int(index[row, column]) + 4]
            index[row, column] = rng.choice(odd)

        _shard(change)(path)
        return "an index of a shard"
    reseal(path)
    return done
