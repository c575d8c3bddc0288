"""Shards to the letter of Zarr's codec, and the storage that they lie in."""

from __future__ import annotations

import copy
import errno
import json
import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from crc32c import crc32c
from hypothesis import example, given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec

from actstore import storage as storage_module
from actstore.errors import CorruptStoreError, WriteError
from actstore.shard import Layout, combine, digest, encode, read_shard, summarise
from actstore.storage import LocalStorage, aligned_buffer, counters

KINDS = [("float32", "float32"), ("float16", "float16"), ("float32", "bfloat16")]
SPECIAL = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-45, 6e-8, 65504.0, 1.0]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, int]:
    """Geometry of a shard, and how many of its rows hold tokens."""
    dtype, source = draw(st.sampled_from(KINDS))
    chunk_rows, chunk_width = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    tall, wide = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    layout = Layout(tall * chunk_rows, wide * chunk_width, chunk_rows, chunk_width, dtype, source)
    return layout, draw(st.integers(1, layout.rows))


def any_values(layout: Layout, rows: int, seed: int) -> np.ndarray:
    """Values of every bit pattern, special ones among them, as the store would hold them."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(layout.dtype)
    raw = rng.integers(0, 256, (rows, layout.width * dtype.itemsize), dtype=np.uint8)
    values = raw.view(dtype)
    with np.errstate(over="ignore"):
        special = np.array(SPECIAL).astype(dtype)
    where = rng.random(values.shape) < 0.3
    values[where] = rng.choice(special, int(where.sum()))
    if layout.compressed:
        values = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return values


def filled(layout: Layout, values: np.ndarray) -> np.ndarray:
    """A buffer with `values` in its image, and 0xAB wherever nothing was put."""
    buffer = aligned_buffer(layout.image_nbytes)
    buffer[:] = 0xAB
    image = layout.image(buffer)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16) if layout.compressed else values
    for row in range(len(values)):
        i, inside = divmod(row, layout.chunk_rows)
        image[i, :, inside] = bits[row].reshape(layout.grid[1], layout.chunk_width)
    return buffer


def encoded(layout: Layout, values: np.ndarray) -> bytes:
    data, nbytes, checksum = encode(layout, filled(layout, values), len(values))
    whole = data[:nbytes].tobytes()
    assert checksum == digest(layout, whole)
    return whole


def decoded(layout: Layout, folder: Path, rows: slice, columns: slice) -> np.ndarray:
    out = np.empty((rows.stop - rows.start, columns.stop - columns.start), layout.dtype)
    with LocalStorage(folder).reader("shard") as reader:
        read_shard(layout, reader, rows, columns, out)
    return out


def read_bytes(layout: Layout, data: bytes, folder: Path, rows: int) -> np.ndarray:
    (folder / "shard").write_bytes(data)
    return decoded(layout, folder, slice(0, rows), slice(0, layout.width))


def stock_array(layout: Layout, path: Path, tokens: int) -> zarr.Array:
    """An empty array of this layout, made by stock zarr alone."""
    blosc = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=4)
    return zarr.create_array(
        path,
        shape=(1, tokens, layout.width),
        shards=(1, layout.rows, layout.width),
        chunks=(1, layout.chunk_rows, layout.chunk_width),
        dtype=layout.dtype,
        compressors=[*([blosc] if layout.compressed else []), Crc32cCodec()],
        fill_value=float("nan"),
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
        overwrite=True,
    )


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def index_of(layout: Layout, data: bytes) -> np.ndarray:
    """(token chunk, neuron chunk, offset and length), read by hand."""
    table = data[len(data) - layout.index_nbytes : -4]
    return np.frombuffer(table, "<u8").reshape(*layout.grid, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property."""
    return tmp_path_factory.mktemp("shards")


# -- the codec -----------------------------------------------------------------------------


@given(layouts(), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_stock_zarr_reads_what_we_write(
    folder: Path, geometry: tuple[Layout, int], seed: int
) -> None:
    layout, rows = geometry
    values = any_values(layout, rows, seed)
    array = stock_array(layout, folder / "a.zarr", rows)
    (folder / "a.zarr/c.0.0.0").write_bytes(encoded(layout, values))
    assert same_bits(np.asarray(array[0]), values)


@given(layouts(), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_we_read_what_stock_zarr_writes(
    folder: Path, geometry: tuple[Layout, int], seed: int
) -> None:
    layout, rows = geometry
    values = any_values(layout, rows, seed)
    stock_array(layout, folder / "b.zarr", rows)[0] = values
    theirs = (folder / "b.zarr/c.0.0.0").read_bytes()
    assert same_bits(read_bytes(layout, theirs, folder, rows), values)


@given(layouts(), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_every_inner_chunk_is_what_stock_zarr_writes(
    folder: Path, geometry: tuple[Layout, int], seed: int
) -> None:
    """Only the order of the chunks is ours, and the fill value's bits after the last token."""
    layout, _ = geometry
    values = any_values(layout, layout.rows, seed)
    stock_array(layout, folder / "c.zarr", layout.rows)[0] = values
    theirs, ours = (folder / "c.zarr/c.0.0.0").read_bytes(), encoded(layout, values)
    assert len(ours) == len(theirs)
    table = index_of(layout, ours).reshape(-1, 2).tolist()
    for (a, n), (b, m) in zip(table, index_of(layout, theirs).reshape(-1, 2).tolist(), strict=True):
        assert ours[a : a + n] == theirs[b : b + m]
    assert [a for a, _ in table] == np.cumsum([0, *(n for _, n in table)])[:-1].tolist()


def test_layout_of_a_shard_byte_by_byte(tmp_path: Path) -> None:
    """Two tokens of four neurons in chunks of 2 × 2, the second row of chunks absent."""
    layout = Layout(4, 4, 2, 2, "float32", "float32")
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    data = encoded(layout, values)
    left = np.float32([0, 1, 4, 5]).tobytes()
    right = np.float32([2, 3, 6, 7]).tobytes()
    absent = 2**64 - 1
    table = np.array([0, 20, 20, 20, absent, absent, absent, absent], "<u8").tobytes()

    def summed(part: bytes) -> bytes:
        return part + crc32c(part).to_bytes(4, "little")

    assert data == summed(left) + summed(right) + summed(table)
    assert digest(layout, data) == crc32c(left + right + table)


@given(layouts(), st.integers(0, 2**32), st.data())
@settings(max_examples=80, deadline=None)
def test_partial_reads_equal_numpy(
    folder: Path, geometry: tuple[Layout, int], seed: int, data: st.DataObject
) -> None:
    layout, rows = geometry
    values = any_values(layout, rows, seed)
    (folder / "shard").write_bytes(encoded(layout, values))
    a = data.draw(st.integers(0, rows - 1))
    b = data.draw(st.integers(a + 1, rows))
    p = data.draw(st.integers(0, layout.width - 1))
    q = data.draw(st.integers(p + 1, layout.width))
    assert same_bits(decoded(layout, folder, slice(a, b), slice(p, q)), values[a:b, p:q])


@given(layouts(), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_rows_after_the_last_token_are_nan(
    folder: Path, geometry: tuple[Layout, int], seed: int
) -> None:
    layout, rows = geometry
    whole = -(-rows // layout.chunk_rows) * layout.chunk_rows
    data = encoded(layout, any_values(layout, rows, seed))
    padding = read_bytes(layout, data, folder, whole)[rows:]
    nan = np.uint16(0x7E00) if layout.dtype == "float16" else np.uint32(0x7FC00000)
    assert (padding.view(nan.dtype) == nan).all()
    assert sum(n < 2**63 for n in index_of(layout, data).ravel()) == (
        2 * whole // layout.chunk_rows * layout.grid[1]
    )


def test_a_partial_read_touches_only_the_chunks_it_needs(tmp_path: Path) -> None:
    layout = Layout(8, 12, 4, 3, "float32", "float32")
    values = any_values(layout, 8, 0)
    (tmp_path / "shard").write_bytes(encoded(layout, values))
    chunk = 4 * 3 * 4 + 4
    for rows, columns, chunks, reads in [
        (slice(0, 1), slice(0, 1), 1, 1),
        (slice(0, 4), slice(2, 4), 2, 1),
        (slice(3, 5), slice(4, 5), 2, 2),
        (slice(0, 8), slice(0, 12), 8, 2),
    ]:
        counters.reset()
        decoded(layout, tmp_path, rows, columns)
        assert (counters.reads, counters.bytes) == (
            1 + reads,
            layout.index_nbytes + chunks * chunk,
        )


@given(layouts(), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_the_same_values_give_the_same_bytes(geometry: tuple[Layout, int], seed: int) -> None:
    """Whatever lay in the buffer before: 0xAB in `filled`, zeros here."""
    layout, rows = geometry
    values = any_values(layout, rows, seed)
    first = encoded(layout, values)
    buffer = aligned_buffer(layout.image_nbytes)
    image = layout.image(buffer)
    used = -(-rows // layout.chunk_rows)
    image[:used] = layout.image(filled(layout, values))[:used]
    data, nbytes, _ = encode(layout, buffer, rows)
    assert data[:nbytes].tobytes() == first


@given(layouts(), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_summary_is_numpys(geometry: tuple[Layout, int], seed: int) -> None:
    layout, rows = geometry
    values = any_values(layout, rows, seed)
    summary = summarise(layout, filled(layout, values), rows)
    with np.errstate(invalid="ignore"):  # signalling NaN
        wide = values.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    assert summary.nonfinite == wide.size - finite.size
    assert summary.minimum == (finite.min() if finite.size else np.inf)
    assert summary.maximum == (finite.max() if finite.size else -np.inf)


@given(st.binary(max_size=300), st.binary(max_size=300))
@example(b"", b"")
@example(b"a", b"")
@example(b"", b"b")
def test_combined_checksums(first: bytes, second: bytes) -> None:
    assert combine(crc32c(first), crc32c(second), len(second)) == crc32c(first + second)


def test_combined_checksums_over_long_runs() -> None:
    block = np.random.default_rng(0).integers(0, 256, 3_000_001, dtype=np.uint8).tobytes()
    assert combine(crc32c(b"x"), crc32c(block), len(block)) == crc32c(b"x" + block)


# -- damage --------------------------------------------------------------------------------


def example_shard(dtype: str, source: str) -> tuple[Layout, np.ndarray, bytes]:
    layout = Layout(6, 4, 2, 2, dtype, source)
    values = any_values(layout, 5, 1)
    return layout, values, encoded(layout, values)


@pytest.mark.parametrize(("dtype", "source"), KINDS)
def test_every_flipped_byte_is_found(tmp_path: Path, dtype: str, source: str) -> None:
    layout, values, data = example_shard(dtype, source)
    assert same_bits(read_bytes(layout, data, tmp_path, 5), values)
    right = digest(layout, data)
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(CorruptStoreError, match="shard is damaged"):
            read_bytes(layout, bytes(damaged), tmp_path, 5)
        assert digest(layout, bytes(damaged)) != right


@pytest.mark.parametrize(("dtype", "source"), KINDS)
def test_every_truncation_is_found(tmp_path: Path, dtype: str, source: str) -> None:
    layout, _, data = example_shard(dtype, source)
    for length in range(len(data)):
        with pytest.raises(CorruptStoreError):
            read_bytes(layout, data[:length], tmp_path, 5)
        with pytest.raises(CorruptStoreError):
            read_bytes(layout, data[len(data) - length :] + b"\0", tmp_path, 5)
        assert digest(layout, data[:length]) is None


def test_the_digest_tells_shards_apart() -> None:
    """A crc32c over data and then over their own crc32c would be the same for all shards."""
    layout = Layout(4, 4, 2, 2, "float32", "float32")
    shards = [encoded(layout, any_values(layout, 4, seed)) for seed in range(50)]
    assert len({digest(layout, s) for s in shards}) == 50
    swapped = bytearray(shards[0])
    swapped[0:20], swapped[20:40] = swapped[20:40], swapped[0:20]
    assert digest(layout, bytes(swapped)) != digest(layout, shards[0])


def with_index(layout: Layout, data: bytes, spans: dict[tuple[int, int], tuple[int, int]]) -> bytes:
    """The shard with other offsets and lengths in its index, whose checksum is right."""
    index = index_of(layout, data).copy()
    for place, span in spans.items():
        index[place] = span
    table = index.tobytes()
    return data[: len(data) - layout.index_nbytes] + table + crc32c(table).to_bytes(4, "little")


HOSTILE = {
    "beyond the end": (10_000, 20),
    "into the index": (100, 20),
    "across the end of the chunks": (101, 20),
    "negative offset": (2**63, 20),
    "offset that overflows": (2**63 - 1, 20),
    "offset that overflows with its length": (2**63 - 20, 20),
    "huge length": (0, 2**62),
    "negative length": (0, 2**64 - 20),
    "no length": (0, 0),
    "only a checksum": (0, 4),
    "half absent": (2**64 - 1, 20),
    "length absent": (0, 2**64 - 1),
    "absent": (2**64 - 1, 2**64 - 1),
    "in the middle of chunks": (10, 20),
    "two chunks as one": (0, 40),
    "part of a chunk": (0, 10),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_index(tmp_path: Path, name: str) -> None:
    layout = Layout(4, 4, 2, 2, "float32", "float32")
    values = any_values(layout, 4, 0)
    data = encoded(layout, values)
    assert len(data) == 4 * 20 + layout.index_nbytes
    for place in [(0, 0), (0, 1), (1, 1)]:
        hostile = with_index(layout, data, {place: HOSTILE[name]})
        tracemalloc.start()
        with pytest.raises(CorruptStoreError, match="damaged"):
            read_bytes(layout, hostile, tmp_path, 4)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20
        assert digest(layout, hostile) != digest(layout, data)


def test_chunks_that_overlap_are_read_as_stock_zarr_reads_them(tmp_path: Path) -> None:
    layout = Layout(4, 4, 2, 2, "float32", "float32")
    values = any_values(layout, 4, 0)
    data = with_index(layout, encoded(layout, values), {(1, 1): (0, 20), (0, 1): (0, 20)})
    array = stock_array(layout, tmp_path / "a.zarr", 4)
    (tmp_path / "a.zarr/c.0.0.0").write_bytes(data)
    assert same_bits(read_bytes(layout, data, tmp_path, 4), np.asarray(array[0]))
    assert same_bits(np.asarray(array[0])[2:, 2:], values[:2, :2])


def rewrapped(layout: Layout, body: bytes) -> bytes:
    """A shard of one chunk with any body, its checksums right."""
    body += crc32c(body).to_bytes(4, "little")
    table = np.array([0, len(body)], "<u8").tobytes()
    return body + table + crc32c(table).to_bytes(4, "little")


def test_hostile_blosc_headers(tmp_path: Path) -> None:
    """Header: version, versionlz, flags, typesize, then nbytes, blocksize, cbytes (uint32)."""
    layout = Layout(16, 16, 16, 16, "float32", "bfloat16")
    values = np.zeros((16, 16), np.float32)
    data = encoded(layout, values)
    body = data[: len(data) - layout.index_nbytes - 4]
    assert same_bits(read_bytes(layout, rewrapped(layout, body), tmp_path, 16), values)

    def patched(at: int, value: int) -> bytes:
        return body[:at] + value.to_bytes(4, "little") + body[at + 4 :]

    bad = {
        "bomb": patched(4, 2**31 - 1),
        "all bits": patched(4, 2**32 - 1),
        "shorter": patched(4, 1023),
        "longer": patched(4, 1025),
        "compressed length past the chunk": patched(12, len(body) + 1),
        "compressed length far past the chunk": patched(12, 2**31 - 1),
        "compressed length cut": patched(12, len(body) - 1),
        "blocks of nothing": patched(8, 0),
        "blocks past the chunk": patched(8, 2**31 - 1),
        "truncated header": body[:7],
        "header only": body[:16],
        "one byte": body[:1],
        "truncated data": body[:-3],
    }
    for name, hostile in bad.items():
        tracemalloc.start()
        with pytest.raises(CorruptStoreError):
            read_bytes(layout, rewrapped(layout, hostile), tmp_path, 16)
            pytest.fail(name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20, name


# -- which arrays are ours -----------------------------------------------------------------


def metadata_of(layout: Layout, tokens: int = 10) -> dict[str, Any]:
    return {
        "shape": [3, tokens, layout.width],
        "data_type": layout.dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [1, layout.rows, layout.width]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": layout.codecs(),
        "attributes": {"source_dtype": layout.source_dtype},
        "node_type": "array",
    }


@given(layouts())
def test_our_own_layouts_are_known_again(geometry: tuple[Layout, int]) -> None:
    layout, _ = geometry
    assert Layout.of_array(metadata_of(layout)) == layout


def test_the_codecs_are_those_that_stock_zarr_notes(tmp_path: Path) -> None:
    for dtype, source in KINDS:
        layout = Layout(6, 4, 2, 2, dtype, source)
        stock_array(layout, tmp_path / "a.zarr", 5)
        stored = json.loads((tmp_path / "a.zarr/zarr.json").read_text())
        stored["attributes"]["source_dtype"] = source
        assert Layout.of_array(stored) == layout


def changes() -> Iterator[tuple[str, Any]]:
    sharding = ("codecs", 0, "configuration")
    yield "no shards", ("codecs", [{"name": "bytes", "configuration": {"endian": "little"}}])
    yield "no codecs", ("codecs", [])
    yield "codecs of another kind", ("codecs", None)
    yield "another codec behind", ("codecs", [*BASE["codecs"], {"name": "crc32c"}])
    yield "index first", ((*sharding, "index_location"), "start")
    yield "big endian", ((*sharding, "codecs", 0, "configuration", "endian"), "big")
    yield "no checksum", ((*sharding, "codecs"), BASE["codecs"][0]["configuration"]["codecs"][:1])
    yield (
        "no index checksum",
        ((*sharding, "index_codecs"), BASE["codecs"][0]["configuration"]["codecs"][:1]),
    )
    yield "chunks over layers", ((*sharding, "chunk_shape"), [2, 2, 2])
    yield "chunks of nothing", ((*sharding, "chunk_shape"), [1, 0, 2])
    yield "chunks of no width", ((*sharding, "chunk_shape"), [1, 2, 0])
    yield "negative chunks", ((*sharding, "chunk_shape"), [1, -2, 2])
    yield "chunks that do not divide", ((*sharding, "chunk_shape"), [1, 4, 2])
    yield "chunks as text", ((*sharding, "chunk_shape"), [1, "2", 2])
    yield "chunks as fractions", ((*sharding, "chunk_shape"), [1, 2.0, 2])
    yield "two dimensions", ((*sharding, "chunk_shape"), [2, 2])
    yield "shards over layers", (("chunk_grid", "configuration", "chunk_shape"), [2, 6, 4])
    yield (
        "shards over part of the width",
        (("chunk_grid", "configuration", "chunk_shape"), [1, 6, 2]),
    )
    yield "shards of nothing", (("chunk_grid", "configuration", "chunk_shape"), [1, 0, 4])
    yield "slashes in keys", (("chunk_key_encoding", "configuration", "separator"), "/")
    yield "keys of version 2", (("chunk_key_encoding", "name"), "v2")
    yield "float64", ("data_type", "float64")
    yield "integers", ("data_type", "int32")
    yield "source of another width", (("attributes", "source_dtype"), "float16")
    yield "unknown source", (("attributes", "source_dtype"), "float8")
    yield "no source", ("attributes", {})
    yield "four dimensions", ("shape", [1, 3, 10, 4])
    yield "no shape", ("shape", None)


BASE = metadata_of(Layout(6, 4, 2, 2, "float32", "float32"))


@pytest.mark.parametrize(("name", "change"), list(changes()), ids=[n for n, _ in changes()])
def test_other_layouts_are_not_ours(name: str, change: tuple[Any, Any]) -> None:
    metadata = copy.deepcopy(BASE)
    assert Layout.of_array(metadata) is not None
    path, value = change
    *above, last = (path,) if isinstance(path, str) else path
    node: Any = metadata
    for step in above:
        node = node[step]
    node[last] = value
    assert Layout.of_array(metadata) is None


# -- storage -------------------------------------------------------------------------------

PLACES = ["disk"] + (["/dev/shm"] if os.access("/dev/shm", os.W_OK) else [])


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalStorage]:
    if request.param == "disk":
        yield LocalStorage(tmp_path)
        return
    with tempfile.TemporaryDirectory(dir=request.param) as folder:
        yield LocalStorage(folder)


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, 3 * 4096])
def test_direct_and_buffered_writes_give_the_same_bytes(
    place: LocalStorage, nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8)
    buffer = aligned_buffer(nbytes)
    buffer[:nbytes] = data
    buffer[nbytes:] = 0xAB  # never to be seen
    buffered = []
    real = storage_module._write_buffered
    monkeypatch.setattr(
        storage_module,
        "_write_buffered",
        lambda path, view: (buffered.append(path.name), real(path, view)),
    )
    place.put("direct", buffer, nbytes)
    direct_worked = not buffered
    place.put("bytes", data.tobytes())

    def refuses(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return opened(path, flags, *rest, **more)

    opened = os.open
    monkeypatch.setattr(os, "open", refuses)
    place.put("refused", buffer, nbytes)
    assert any(name.startswith("refused") for name in buffered)
    assert place.get("direct") == place.get("bytes") == place.get("refused") == data.tobytes()
    assert sorted(os.listdir(place.root)) == ["bytes", "direct", "refused"]
    assert direct_worked or not buffered[0].startswith("bytes")


def test_direct_writes_are_used_on_an_ordinary_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        fd = os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
    except OSError:
        pytest.skip("this file system has no direct I/O")
    os.close(fd)
    monkeypatch.setattr(storage_module, "_write_buffered", lambda *_: pytest.fail("buffered"))
    LocalStorage(tmp_path).put("object", aligned_buffer(10_000), 10_000)
    assert (tmp_path / "object").stat().st_size == 10_000


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("fails", ["write", "fdatasync", "rename"])
def test_a_failed_write_leaves_no_trace(
    place: LocalStorage, fails: str, aligned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.put("object", b"before")

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space left"):
        place.put("object", aligned_buffer(8192) if aligned else b"after", 5)
    monkeypatch.undo()
    assert [p.name for p in place.root.iterdir()] == ["object"]
    assert place.get("object") == b"before"
    place.put("object", b"after")
    assert place.get("object") == b"after"


def test_objects_by_key(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "not" / "yet")
    assert storage.keys("a") == []
    assert storage.get("a/b") is None
    assert storage.size("a/b") is None
    assert storage.free_bytes() > 0
    storage.put_durable("a/b", b"12345")
    storage.put_durable("a/c", b"")
    (storage.root / "a/d.0.partial").write_bytes(b"half")
    assert storage.keys("a") == ["a/b", "a/c"]
    assert (storage.size("a/b"), storage.size("a/c")) == (5, 0)
    assert storage.get("a") is None
    assert storage.get("a/b/c") is None
    assert storage.exists("a/b")
    storage.delete("a/b")
    storage.delete("a/b")
    assert not storage.exists("a/b")
    storage.sweep("a")
    assert sorted(p.name for p in (storage.root / "a").iterdir()) == ["c"]


def test_ranged_reads(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("object", bytes(range(100)))
    counters.reset()
    with storage.reader("object") as reader:
        assert reader.nbytes == 100
        out = np.empty(10, np.uint8)
        reader.read_into(out, offset=90)
        assert out.tolist() == list(range(90, 100))
        with pytest.raises(CorruptStoreError, match="truncated at 100"):
            reader.read_into(out, offset=91)
    assert (counters.reads, counters.bytes) == (1, 10)
    with pytest.raises(CorruptStoreError, match="missing"), storage.reader("other"):
        pass


CHILD = """
import sys
from actstore.errors import WriteError
from actstore.storage import LocalStorage
try:
    with LocalStorage(sys.argv[1]).lock("journal", shared=sys.argv[2] == "shared"):
        print("locked", flush=True)
        sys.stdin.readline()
except WriteError as error:
    print("refused:", error, flush=True)
"""


def child(root: Path, kind: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(root), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_locks_hold_across_processes(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.make_folder("journal")
    with storage.lock("journal"), child(tmp_path, "alone") as other:
        assert "refused" in (line := said(other))
        assert "another process" in line
    with child(tmp_path, "alone") as other:
        assert said(other) == "locked\n"
        with pytest.raises(WriteError, match="another process"), storage.lock("journal"):
            pass
        other.kill()  # a lock dies with its process
    with storage.lock("journal", shared=True), child(tmp_path, "shared") as other:
        assert said(other) == "locked\n"
        with pytest.raises(WriteError), storage.lock("journal"):
            pass
        other.communicate("\n")
