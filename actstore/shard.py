"""Whole shards, encoded and decoded to the letter of Zarr's `sharding_indexed` codec.

A shard is one layer × one block of tokens × the stage's width. Its inner chunks lie in C order
(token chunk, then neuron chunk), each followed by its crc32c; then the index (offset and length
of every chunk, little-endian uint64) and the index's crc32c. Chunks wholly past the last token
are absent from the index, as the codec allows.

Stock zarr writes chunks in the order in which its threads finish and truncates files in place;
what is written here is the same bytes every time, and every checksum is checked on reading.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numcodecs.blosc as blosc
import numpy as np
from crc32c import crc32c
from numpy.lib.stride_tricks import as_strided

from .errors import CorruptStoreError
from .storage import Reader, aligned_buffer

__all__ = [
    "Layout",
    "ShardSummary",
    "combine",
    "digest",
    "encode",
    "read_pieces",
    "read_shard",
    "summarise",
]

_CRC = 4
_ABSENT = np.uint64(2**64 - 1)
_MOST_CHUNKS = 256  # in one read: two buffers each, of which the system takes 1,024
# Blosc's own thread pool would fight with the writer threads, and is not re-entrant.
blosc.use_threads = False


@dataclass(frozen=True)
class Layout:
    """Geometry of the shards of one stage.

    Attributes
    ----------
    rows, width : int
        Tokens and neurons of a shard.
    chunk_rows, chunk_width : int
        Tokens and neurons of an inner chunk; divisors of `rows` and `width`.
    dtype : {"float32", "float16"}
        Stored element type.
    source_dtype : {"float32", "float16", "bfloat16"}
        What the values are; bfloat16 is stored as float32 whose low half is zero, compressed.
    """

    rows: int
    width: int
    chunk_rows: int
    chunk_width: int
    dtype: str
    source_dtype: str

    @property
    def compressed(self) -> bool:
        return self.source_dtype == "bfloat16"

    @property
    def memory_dtype(self) -> np.dtype[Any]:
        """Element type of the shard image in memory (bfloat16 as its 16 bits)."""
        return np.dtype(np.uint16 if self.compressed else self.dtype)

    @property
    def grid(self) -> tuple[int, int]:
        """Inner chunks along tokens and along neurons."""
        return self.rows // self.chunk_rows, self.width // self.chunk_width

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of an inner chunk, decoded."""
        return self.chunk_rows * self.chunk_width * np.dtype(self.dtype).itemsize

    @property
    def index_nbytes(self) -> int:
        return 16 * self.grid[0] * self.grid[1] + _CRC

    @property
    def image_nbytes(self) -> int:
        """Bytes of memory that a shard takes while it is filled."""
        chunks = self.grid[0] * self.grid[1]
        if self.compressed:
            return self.rows * self.width * 2
        return chunks * (self.chunk_nbytes + _CRC) + self.index_nbytes

    def image(self, buffer: np.ndarray) -> np.ndarray:
        """View a buffer as (token chunk, neuron chunk, token, neuron), room left for checksums.

        Uncompressed shards are filled in place: the image is the file, but for the checksums.
        """
        item = self.memory_dtype.itemsize
        gap = 0 if self.compressed else _CRC
        chunk = self.chunk_rows * self.chunk_width * item + gap
        tall, wide = self.grid
        return as_strided(
            buffer.view(self.memory_dtype),
            (tall, wide, self.chunk_rows, self.chunk_width),
            (wide * chunk, chunk, self.chunk_width * item, item),
        )

    def codecs(self) -> list[dict[str, Any]]:
        """Zarr metadata of the sharding codec that this layout is."""
        inner: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
        index = [*inner, {"name": "crc32c"}]
        if self.compressed:
            inner.append({"name": "blosc", "configuration": _BLOSC})
        inner.append({"name": "crc32c"})
        return [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [1, self.chunk_rows, self.chunk_width],
                    "codecs": inner,
                    "index_codecs": index,
                    "index_location": "end",
                },
            }
        ]

    @classmethod
    def of_array(cls, metadata: Mapping[str, Any]) -> Layout | None:
        """The layout of an array from its `zarr.json`; None where it is not one of ours."""
        try:
            _, _, neurons = shape = metadata["shape"]
            _, rows, width = shard = metadata["chunk_grid"]["configuration"]["chunk_shape"]
            sharding = metadata["codecs"][0]["configuration"]
            _, chunk_rows, chunk_width = chunk = sharding["chunk_shape"]
            kind = metadata["data_type"], metadata["attributes"]["source_dtype"]
            keys = metadata["chunk_key_encoding"]
            sane = (
                all(type(n) is int and n > 0 for n in (*shape, *shard, *chunk))
                and (rows % chunk_rows, width % chunk_width) == (0, 0)
                and (shard[0], width) == (1, neurons)
                and kind in _KINDS
                and keys == {"name": "default", "configuration": {"separator": "."}}
            )
            layout = cls(rows, width, chunk_rows, chunk_width, *kind) if sane else None
        except (KeyError, IndexError, TypeError, ValueError):
            return None
        return layout if layout and layout.codecs() == metadata["codecs"] else None


_KINDS = (("float32", "float32"), ("float16", "float16"), ("float32", "bfloat16"))
_BLOSC = {
    "cname": "lz4",
    "clevel": 5,
    "shuffle": "bitshuffle",
    "typesize": 4,
    "blocksize": 0,
}


@dataclass(frozen=True)
class ShardSummary:
    """What the journal keeps of a shard's values."""

    minimum: float
    maximum: float
    nonfinite: int


# -- writing -------------------------------------------------------------------------------


def summarise(layout: Layout, buffer: np.ndarray, rows: int) -> ShardSummary:
    """Extremes of the finite values, and the count of the others, over the first `rows` tokens."""
    low, high, nonfinite = np.inf, -np.inf, 0
    for _, chunk in _used_chunks(layout, layout.image(buffer), rows):
        values = chunk_values(layout, chunk)
        a, b = float(values.min()), float(values.max())
        if not (np.isfinite(a) and np.isfinite(b)):
            finite = values[np.isfinite(values)]
            nonfinite += values.size - finite.size
            if not finite.size:
                continue
            a, b = float(finite.min()), float(finite.max())
        low, high = min(low, a), max(high, b)
    return ShardSummary(low + 0.0, high + 0.0, nonfinite)  # never -0.0, which is no less than 0.0


def encode(layout: Layout, buffer: np.ndarray, rows: int) -> tuple[np.ndarray, int, int]:
    """Finish a shard whose first `rows` tokens are filled.

    Returns
    -------
    data : ndarray of uint8
        An aligned buffer that begins with the encoded shard (for uncompressed data: `buffer`).
    nbytes : int
        The encoded length.
    checksum : int
        The shard's `digest`.
    """
    image = layout.image(buffer)
    _pad(layout, image, rows)
    if layout.compressed:
        data, offset, index, checksum = _compress_chunks(layout, image, rows)
    else:
        data, offset, index, checksum = _seal_chunks(layout, buffer, rows)
    table = index.astype("<u8").tobytes()
    tail = crc32c(table).to_bytes(4, "little")
    data[offset : offset + layout.index_nbytes] = np.frombuffer(table + tail, np.uint8)
    return data, offset + layout.index_nbytes, crc32c(table, checksum)


def digest(layout: Layout, data: bytes) -> int | None:
    """What tells an encoded shard from every other: crc32c of its chunks in order and its index.

    The checksums in between are checked but left out: a crc32c over data and then their own
    crc32c is the same for all data.

    Returns
    -------
    int or None
        None where a checksum in the shard does not match.
    """
    view = memoryview(data)
    table = view[-layout.index_nbytes : -_CRC]
    if len(view) < layout.index_nbytes or not _sound(table, view[-_CRC:]):
        return None
    checksum = 0
    for offset, nbytes in np.frombuffer(table, "<u8").reshape(-1, 2).tolist():
        if offset == _ABSENT:
            continue
        chunk = view[offset : offset + nbytes]
        if not _sound(chunk[:-_CRC], chunk[-_CRC:]):
            return None
        checksum = crc32c(chunk[:-_CRC], checksum)
    return crc32c(table, checksum)


def _sound(body: memoryview | np.ndarray, tail: memoryview | np.ndarray) -> bool:
    return crc32c(body) == int.from_bytes(tail, "little")


def _seal_chunks(
    layout: Layout, buffer: np.ndarray, rows: int
) -> tuple[np.ndarray, int, np.ndarray, int]:
    size, step = layout.chunk_nbytes, layout.chunk_nbytes + _CRC
    index = np.full((*layout.grid, 2), _ABSENT, np.uint64)
    used = -(-rows // layout.chunk_rows) * layout.grid[1]
    checksum = 0
    for i in range(used):
        start = i * step
        own = crc32c(buffer[start : start + size])
        buffer[start + size : start + step] = np.frombuffer(own.to_bytes(4, "little"), np.uint8)
        checksum = combine(checksum, own, size)
    index.reshape(-1, 2)[:used, 0] = np.arange(used) * step
    index.reshape(-1, 2)[:used, 1] = step
    return buffer, used * step, index, checksum


def _compress_chunks(
    layout: Layout, image: np.ndarray, rows: int
) -> tuple[np.ndarray, int, np.ndarray, int]:
    tall, wide = layout.grid
    worst = layout.chunk_nbytes + blosc.MAX_OVERHEAD + _CRC
    data = aligned_buffer(tall * wide * worst + layout.index_nbytes)
    index = np.full((tall, wide, 2), _ABSENT, np.uint64)
    offset = checksum = 0
    for i in range(-(-rows // layout.chunk_rows)):
        for j in range(wide):
            packed = blosc.compress(_widen(image[i, j]), b"lz4", 5, blosc.BITSHUFFLE, 0, 4)
            checksum = crc32c(packed, checksum)
            packed += crc32c(packed).to_bytes(4, "little")
            data[offset : offset + len(packed)] = np.frombuffer(packed, np.uint8)
            index[i, j] = offset, len(packed)
            offset += len(packed)
    return data, offset, index, checksum


def _pad(layout: Layout, image: np.ndarray, rows: int) -> None:
    """Fill the rest of the last used chunk row with the fill value, NaN."""
    last, inside = divmod(rows, layout.chunk_rows)
    if inside:
        image[last, :, inside:] = 0x7FC0 if layout.compressed else np.nan


def _used_chunks(
    layout: Layout, image: np.ndarray, rows: int
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """Yield ((i, j), chunk) for the inner chunks that hold tokens, cut to those tokens."""
    for i in range(-(-rows // layout.chunk_rows)):
        inside = min(layout.chunk_rows, rows - i * layout.chunk_rows)
        for j in range(layout.grid[1]):
            yield (i, j), image[i, j, :inside]


def chunk_values(layout: Layout, chunk: np.ndarray) -> np.ndarray:
    """The chunk's values in float32, in which min and max are fast."""
    if layout.compressed:
        return _widen(chunk)
    return chunk.astype(np.float32) if layout.dtype == "float16" else chunk


def _widen(bits: np.ndarray) -> np.ndarray:
    """Bfloat16 bits as the float32 of the same value."""
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


# -- reading -------------------------------------------------------------------------------


def read_shard(
    layout: Layout, reader: Reader, rows: slice, columns: slice, out: np.ndarray
) -> None:
    """Decode part of a shard, checking the checksum of all that is read.

    Parameters
    ----------
    layout : Layout
        The array's geometry.
    reader : Reader
        The open object.
    rows, columns : slice
        Contiguous, with step 1, inside the shard.
    out : ndarray (rows, columns)
        Where the values go.

    Raises
    ------
    CorruptStoreError
        A checksum or an offset is wrong, or a chunk is absent.
    """
    index = _read_index(layout, reader)
    r, c = layout.chunk_rows, layout.chunk_width
    first, last = columns.start // c, -(-columns.stop // c)
    raw = _room(layout, min(last - first, _at_once(layout, reader)))
    for i in range(rows.start // r, -(-rows.stop // r)):
        for j, chunk in _read_chunk_row(layout, reader, index, i, first, last, raw):
            top, left = i * r, j * c
            a, b = max(rows.start, top), min(rows.stop, top + r)
            p, q = max(columns.start, left), min(columns.stop, left + c)
            out[a - rows.start : b - rows.start, p - columns.start : q - columns.start] = chunk[
                a - top : b - top, p - left : q - left
            ]


def _read_index(layout: Layout, reader: Reader) -> np.ndarray:
    size = layout.index_nbytes
    if reader.nbytes < size:
        raise _corrupt(reader, f"it has {reader.nbytes} bytes, fewer than its index")
    raw = np.empty(size, np.uint8)
    reader.read_into(raw, offset=reader.nbytes - size)
    if crc32c(raw[:-_CRC]) != int.from_bytes(raw[-_CRC:].tobytes(), "little"):
        raise _corrupt(reader, "the checksum of its index does not match")
    return raw[:-_CRC].view("<u8").reshape(*layout.grid, 2)


def read_pieces(
    layout: Layout, reader: Reader, chunk_rows: Iterable[int], nbytes: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Decode whole rows of inner chunks, a few chunks at a time, checking every checksum.

    Faster than `read_shard`, since chunks need not be laid side by side: those that are stored as
    they are come straight from the file.

    Parameters
    ----------
    layout : Layout
    reader : Reader
        The open object.
    chunk_rows : iterable of int
        Which.
    nbytes : int
        About how much to hold at a time.

    Yields
    ------
    chunk_row : int
    values : ndarray (chunk, token, neuron)
        Chunks side by side along neurons. Overwritten by the next ones.

    Raises
    ------
    CorruptStoreError
        As `read_shard`.
    """
    index = _read_index(layout, reader)
    wide = layout.grid[1]
    most = min(wide, max(1, nbytes // layout.chunk_nbytes), _MOST_CHUNKS)
    dtype = np.dtype(layout.dtype)
    held = np.empty((most, layout.chunk_rows, layout.chunk_width), dtype)
    raw: np.ndarray | None = None
    for i in chunk_rows:
        for first in range(0, wide, most):
            last = min(first + most, wide)
            values = held[: last - first]
            if not _read_in_place(layout, reader, index, i, first, values):
                raw = _room(layout, most) if raw is None else raw
                for j, chunk in _read_chunk_row(layout, reader, index, i, first, last, raw):
                    values[j - first] = chunk
            yield i, values


def _read_in_place(
    layout: Layout, reader: Reader, index: np.ndarray, i: int, first: int, values: np.ndarray
) -> bool:
    """Read plain chunks that lie one after another into `values`; False where they do not."""
    offsets, sizes = _spans(layout, reader, index, i, first, first + len(values))
    plain = layout.chunk_nbytes + _CRC
    follow = (np.diff(offsets) == plain).all() and (sizes == plain).all()
    if layout.compressed or not follow or sys.byteorder != "little":
        return False
    bodies = values.view(np.uint8).reshape(len(values), -1)
    tails = np.empty((len(values), _CRC), np.uint8)
    pairs = list(zip(bodies, tails, strict=True))
    reader.read_into(*(part for pair in pairs for part in pair), offset=int(offsets[0]))
    for j, (body, tail) in enumerate(pairs, first):
        if not _sound(body, tail):
            raise _wrong_sum(reader, i, j)
    return True


def _spans(
    layout: Layout, reader: Reader, index: np.ndarray, i: int, first: int, last: int
) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and sizes of the chunks first..last of one chunk row, which are inside the shard."""
    spans = index[i, first:last]
    if (spans == _ABSENT).any():
        raise _corrupt(reader, "a chunk that should hold tokens is absent")
    limit = layout.chunk_nbytes + blosc.MAX_OVERHEAD + _CRC
    room = reader.nbytes - layout.index_nbytes
    offsets, sizes = spans[:, 0].astype(np.int64), spans[:, 1].astype(np.int64)
    bounded = (offsets >= 0) & (sizes > _CRC) & (sizes <= limit)
    if not (bounded & (offsets <= room - sizes)).all():  # written so that nothing overflows
        raise _corrupt(reader, "its index points outside the shard")
    return offsets, sizes


def _room(layout: Layout, chunks: int) -> np.ndarray:
    """Where stored chunks of a row go, whatever their size, to be used again for other rows."""
    return np.empty(chunks * (layout.chunk_nbytes + blosc.MAX_OVERHEAD + _CRC), np.uint8)


def _read_chunk_row(
    layout: Layout,
    reader: Reader,
    index: np.ndarray,
    i: int,
    first: int,
    last: int,
    room: np.ndarray,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (j, values) for the chunks first..last of one chunk row, in as few reads as may be.

    Values may lie in `room`, and are written over by the next ones.
    """
    spans = _spans(layout, reader, index, i, first, last)
    offsets, sizes = (own.tolist() for own in spans)
    for run in _runs(offsets, sizes, _at_once(layout, reader)):
        start = offsets[run.start]
        raw = room[: offsets[run.stop - 1] + sizes[run.stop - 1] - start]
        reader.read_into(raw, offset=start)
        for k in run:
            a = offsets[k] - start
            b = a + sizes[k] - _CRC
            if not _sound(raw[a:b], raw[b : b + _CRC]):
                raise _wrong_sum(reader, i, first + k)
            yield first + k, _decode_chunk(layout, reader, raw[a:b])


def _at_once(layout: Layout, reader: Reader) -> int:
    """Chunks that are read at a time."""
    return max(1, reader.piece // layout.chunk_nbytes)


def _runs(offsets: list[int], sizes: list[int], most: int) -> Iterator[range]:
    """Chunks that lie one after another, at most so many: ours do, stock zarr may order them."""
    begin = 0
    for k in range(1, len(offsets) + 1):
        ends = k == len(offsets) or offsets[k] != offsets[k - 1] + sizes[k - 1]
        if ends or k - begin == most:
            yield range(begin, k)
            begin = k


def _wrong_sum(reader: Reader, i: int, j: int) -> CorruptStoreError:
    return _corrupt(reader, f"the checksum of chunk ({i}, {j}) does not match")


def _decode_chunk(layout: Layout, reader: Reader, body: np.ndarray) -> np.ndarray:
    if layout.compressed:
        # The lengths in the header are checked first: crafted ones could ask for any memory, or
        # have bytes read from beyond the chunk.
        right = [layout.chunk_nbytes, len(body)]
        if len(body) < 16 or body[:16].view("<u4")[[1, 3]].tolist() != right:
            raise _corrupt(reader, "a compressed chunk has the wrong length")
        decoded = np.empty(layout.chunk_nbytes, np.uint8)
        try:
            blosc.decompress(body, decoded)
        except RuntimeError as error:
            raise _corrupt(reader, f"a chunk does not decompress ({error})") from None
        body = decoded
    elif len(body) != layout.chunk_nbytes:
        raise _corrupt(reader, "a chunk has the wrong length")
    dtype = np.dtype(layout.dtype).newbyteorder("<")
    return np.frombuffer(body, dtype).reshape(layout.chunk_rows, layout.chunk_width)


def _corrupt(reader: Reader, what: str) -> CorruptStoreError:
    return CorruptStoreError(
        f"{reader.key} is damaged: {what}. Run `actstore verify` to see what else is, and the "
        "same dump again to redo just the damaged blocks"
    )


# -- checksums -----------------------------------------------------------------------------


def combine(first: int, second: int, second_nbytes: int) -> int:
    """crc32c of two runs of bytes from the crc32c of each, as in zlib's `crc32_combine`.

    Spares the file's digest a second pass over data whose chunks have been summed already.

    Examples
    --------
    >>> combine(crc32c(b"run the "), crc32c(b"model once"), 10) == crc32c(b"run the model once")
    True
    """
    shifted = 0
    for bit, column in enumerate(_shift_operator(second_nbytes)):
        if first >> bit & 1:
            shifted ^= column
    return shifted ^ second


@lru_cache(maxsize=64)
def _shift_operator(nbytes: int) -> tuple[int, ...]:
    """The GF(2) matrix, by columns, that appends `nbytes` zero bytes to a crc32c state."""
    power = (0x82F63B78, *(1 << i for i in range(31)))  # append one zero bit
    for _ in range(3):
        power = _product(power, power)  # one zero byte
    result = tuple(1 << i for i in range(32))
    while nbytes:
        if nbytes & 1:
            result = _product(power, result)
        power = _product(power, power)
        nbytes >>= 1
    return result


def _product(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    def apply(vector: int) -> int:
        total = 0
        for bit, column in enumerate(a):
            if vector >> bit & 1:
                total ^= column
        return total

    return tuple(apply(column) for column in b)
