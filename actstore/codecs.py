"""Zarr's codecs with a bound: a chunk decodes to the size that its array's metadata say, or not.

Compressed bytes of a stranger can ask for any memory. Zarr's own decoders allocate what the bytes
ask for; these know what is due and refuse the rest. They read under names of their own
("actstore.zstd") and write under the standard ones, so that nothing of them shows on disk.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numcodecs.blosc
import numcodecs.zstd
import numpy as np
from numcodecs.vlen import VLenUTF8
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, BytesCodec, GzipCodec, VLenUTF8Codec, ZstdCodec
from zarr.registry import register_codec

from .errors import CorruptStoreError

__all__ = ["TEXT_NBYTES", "bounded"]

TEXT_NBYTES = 2**29
"""Most bytes of text in one chunk."""

_PREFIX = "actstore."
_AS_THEY_ARE = frozenset({"crc32c", "transpose"})


def bounded(codecs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """An array's codecs, those that decode to a size of their own choice by bounded ones.

    Raises
    ------
    CorruptStoreError
        A codec that stores do not have.

    Examples
    --------
    >>> bounded([{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd"}])[1]
    {'name': 'actstore.zstd'}
    """
    found = []
    for codec in codecs:
        name = codec["name"]
        if name == "sharding_indexed":
            inner = codec["configuration"]
            own = {**codec, "configuration": {**inner, "codecs": bounded(inner["codecs"])}}
        elif name in _BOUNDED:
            own = {**codec, "name": _PREFIX + name}
        elif name in _AS_THEY_ARE:
            own = dict(codec)
        else:
            known = ", ".join(sorted({*_BOUNDED, *_AS_THEY_ARE, "sharding_indexed"}))
            raise CorruptStoreError(f"codec {name!r} is none that stores have: {known}")
        found.append(own)
    return found


def _due(spec: Any) -> int | None:
    """Bytes that a chunk decodes to; None for text, whose length only its content says."""
    item = spec.dtype.to_native_dtype().itemsize
    return None if spec.dtype.to_native_dtype().kind in "OT" else int(np.prod(spec.shape)) * item


def _wrong(spec: Any, what: str) -> CorruptStoreError:
    shape = " × ".join(map(str, spec.shape))
    return CorruptStoreError(f"a chunk of {shape} values is damaged: {what}")


def _check(spec: Any, nbytes: int | None) -> int:
    """The size that bytes say they decode to, if it is the chunk's."""
    due = _due(spec)
    if nbytes is None or nbytes < 0 or (nbytes > TEXT_NBYTES if due is None else nbytes != due):
        says = "does not say its size" if nbytes is None else f"says {nbytes:,} bytes"
        raise _wrong(spec, f"{says} where {due or TEXT_NBYTES:,} are {'most' * (not due)} due")
    return nbytes


class _Bounded(BytesBytesCodec):
    """Decodes by `_decompress`, which is told what is due."""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Any:
        standard = data["name"].removeprefix(_PREFIX)
        return super().from_dict({**data, "name": standard})

    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        raw = np.ascontiguousarray(chunk_bytes.as_numpy_array()).view(np.uint8)
        try:
            decoded = self._decompress(raw, chunk_spec)
        except (RuntimeError, ValueError, OSError, EOFError, zlib.error) as error:
            raise _wrong(chunk_spec, f"it does not decompress ({error})") from None
        return chunk_spec.prototype.buffer.from_bytes(decoded)

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)

    def _decompress(self, raw: np.ndarray, spec: Any) -> Any:
        raise NotImplementedError


class _Zstd(_Bounded, ZstdCodec):
    def _decompress(self, raw: np.ndarray, spec: Any) -> Any:
        out = np.empty(_check(spec, zstd_nbytes(raw)), np.uint8)
        numcodecs.zstd.decompress(raw, out)
        return out


def zstd_nbytes(raw: np.ndarray) -> int | None:
    """What a Zstandard frame says it decodes to (RFC 8878); None where it does not say.

    Examples
    --------
    >>> import numcodecs
    >>> zstd_nbytes(np.frombuffer(numcodecs.Zstd().encode(b"a" * 1000), np.uint8))
    1000
    """
    data = raw[:18].tobytes()
    if data[:4] != b"\x28\xb5\x2f\xfd" or len(data) < 6:
        return None
    single, field = data[4] >> 5 & 1, data[4] >> 6
    start = 5 + (not single) + (0, 1, 2, 4)[data[4] & 3]
    size = (single, 2, 4, 8)[field]
    if not size or len(data) < start + size:
        return None
    return int.from_bytes(data[start : start + size], "little") + 256 * (field == 1)


class _Blosc(_Bounded, BloscCodec):
    def _decompress(self, raw: np.ndarray, spec: Any) -> Any:
        sizes = raw[:16].view("<u4")[[1, 3]].tolist() if len(raw) >= 16 else [None, 0]
        out = np.empty(_check(spec, sizes[0]), np.uint8)
        if sizes[1] != len(raw):
            raise ValueError(f"{len(raw)} bytes that say they are {sizes[1]}")
        numcodecs.blosc.decompress(raw, out)
        return out


class _Gzip(_Bounded, GzipCodec):
    def _decompress(self, raw: np.ndarray, spec: Any) -> Any:
        due = _due(spec)
        with gzip.open(io.BytesIO(raw.tobytes())) as stream:
            out = stream.read((TEXT_NBYTES if due is None else due) + 1)
        _check(spec, len(out))
        return out


class _Bytes(BytesCodec):
    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Any:
        return super().from_dict({**data, "name": "bytes"})

    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        _check(chunk_spec, len(chunk_bytes))
        return BytesCodec._decode_sync(self, chunk_bytes, chunk_spec)

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        _check(chunk_spec, len(chunk_bytes))
        return await super()._decode_single(chunk_bytes, chunk_spec)


class _Text(VLenUTF8Codec):
    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Any:
        return super().from_dict({**data, "name": "vlen-utf8"})

    def _decode_sync(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        raw = chunk_bytes.as_numpy_array()
        _check(chunk_spec, len(raw))
        items, due = int.from_bytes(raw[:4].tobytes(), "little"), int(np.prod(chunk_spec.shape))
        if items != due:  # numcodecs makes room for as many as the first bytes say
            raise _wrong(chunk_spec, f"it says {items:,} texts where {due:,} are due")
        try:
            texts = VLenUTF8().decode(raw)
        except ValueError as error:
            raise _wrong(chunk_spec, f"its texts cannot be read ({error})") from None
        native = chunk_spec.dtype.to_native_dtype()
        shaped = texts.reshape(chunk_spec.shape).astype(native, copy=False)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(shaped)

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        return self._decode_sync(chunk_bytes, chunk_spec)


_Text.__name__ = "VLenUTF8Codec"  # by which zarr knows the codec of texts
_BOUNDED = {"zstd": _Zstd, "blosc": _Blosc, "gzip": _Gzip, "bytes": _Bytes, "vlen-utf8": _Text}
for _name, _codec in _BOUNDED.items():
    register_codec(_PREFIX + _name, _codec)
