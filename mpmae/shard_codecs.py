"""Between arrays and the bytes of a shard's members: the filter, the codecs, quantisation and the packed scalars.

Format: `mpmae.shard_format`. An LZ4 member is one plain LZ4 block without its size, which nvCOMP reads as it is; a zstd
member is one frame. Shapes: C bands, P tile side in pixels, K length of a tile vector.
"""

import cramjam
import numpy as np

from mpmae import pixel_loops
from mpmae.errors import ShardError
from mpmae.shard_format import (
    QUANTISED_DTYPE,
    QUANTISED_MAX_COUNT,
    QUANTISED_MINUS_INF,
    QUANTISED_NAN,
    QUANTISED_PLUS_INF,
    SCALARS_MEMBER,
    Manifest,
    PixelEntry,
)

ZSTD_LEVEL = 3


def encode_pixels(entry: PixelEntry, values: np.ndarray) -> bytes:
    """The bytes of a member for `values` [C, P, P] of the entry's dtype (lossless, bit patterns kept).

    With `entry.quantisation` finite values change by at most its `max_error`, and a NaN loses its payload. Raises ValueError
    naming the entry and a finite value that the stored int16 cannot hold.
    """
    values = np.ascontiguousarray(values, entry.dtype)
    stored = _quantise(entry, values) if entry.quantisation else values
    if entry.filter == "delta-planes":
        stored = pixel_loops.delta_planes(stored)
    data = stored.tobytes()
    if entry.codec == "lz4":
        return bytes(cramjam.lz4.compress_block(data, store_size=False))
    if entry.codec == "zstd":
        return bytes(cramjam.zstd.compress(data, ZSTD_LEVEL))
    return data


def decode_pixels(entry: PixelEntry, data: bytes | memoryview) -> np.ndarray:
    """The array [C, P, P] of a member; ShardError when the bytes do not give exactly that array."""
    stored = np.empty(entry.stored_bytes, np.uint8)
    decompress_into(entry, data, stored)
    return unpack_stored(entry, stored)


def decompress_into(entry: PixelEntry, data: bytes | memoryview, out: np.ndarray) -> None:
    """Fill `out`, uint8 [entry.stored_bytes], with the still filtered bytes of a member.

    Raises ShardError when the bytes do not give exactly that many.
    """
    if entry.codec == "raw":
        size = len(data)
        if size == len(out):
            out[:] = np.frombuffer(data, np.uint8)
    else:
        try:
            size = _lz4_into(data, out) if entry.codec == "lz4" else cramjam.zstd.decompress_into(data, out)
        except cramjam.DecompressionError as error:
            name = "LZ4 block" if entry.codec == "lz4" else "zstd frame"
            raise ShardError(f"{entry.name}: corrupt {name} of {len(data)} bytes ({error})") from error
    if size != len(out):
        raise ShardError(f"{entry.name}: {size} bytes, expected {len(out)} for {entry.shape} {entry.dtype}")


def _lz4_into(data: bytes | memoryview, out: np.ndarray) -> int:
    """How many bytes of `out` a plain LZ4 block fills.

    cramjam takes a block that is not one for a block with its size in front. It fills `out` only if that size is len(out);
    then a call decides that knows plain blocks alone but does not tell how much it wrote: all, if one byte less is too
    little.
    """
    size = len(out)
    if int.from_bytes(data[:4], "little") != size:
        return cramjam.lz4.decompress_block_into(data, out, output_len=size)
    out[:] = np.frombuffer(cramjam.lz4.decompress_block(data, output_len=size), np.uint8)
    try:
        cramjam.lz4.decompress_block(data, output_len=size - 1)
    except cramjam.DecompressionError:
        return size
    raise cramjam.DecompressionError(f"it gives fewer than {size} bytes")


def unpack_stored(entry: PixelEntry, stored: np.ndarray) -> np.ndarray:
    """Arrays [..., C, P, P] of the entry's dtype from the decompressed bytes, uint8 [..., entry.stored_bytes]."""
    dtype, shape = entry.stored_dtype, (*stored.shape[:-1], *entry.shape)
    if entry.filter == "delta-planes":
        words = pixel_loops.undo_delta_planes(stored, dtype.itemsize, entry.shape[-1]).view(dtype).reshape(shape)
    else:
        words = stored.view(dtype).reshape(shape)
    return _dequantise(entry, words) if entry.quantisation else words


def _quantise(entry: PixelEntry, values: np.ndarray) -> np.ndarray:
    finite = np.isfinite(values)
    with np.errstate(over="ignore"):  # told below
        counts = np.rint(np.where(finite, values, 0).astype(np.float64) / entry.quantisation.step)
    outside = np.abs(counts) > QUANTISED_MAX_COUNT
    if outside.any():
        limit = QUANTISED_MAX_COUNT * entry.quantisation.step
        raise ValueError(
            f"{entry.name}: {outside.sum()} values outside -{limit:g} to {limit:g}, such as {values[outside][0]:g}, "
            f"cannot be quantised in steps of {entry.quantisation.step:g}; build without quantisation"
        )
    codes = counts.astype(QUANTISED_DTYPE)
    codes[np.isnan(values)] = QUANTISED_NAN
    codes[values == -np.inf], codes[values == np.inf] = QUANTISED_MINUS_INF, QUANTISED_PLUS_INF
    return codes


def _dequantise(entry: PixelEntry, codes: np.ndarray) -> np.ndarray:
    values = codes * entry.quantisation.step
    for code, value in ((QUANTISED_MINUS_INF, -np.inf), (QUANTISED_NAN, np.nan), (QUANTISED_PLUS_INF, np.inf)):
        values[codes == code] = value
    return values.astype(entry.dtype)


ALL_ZERO, ALL_NO_DATA = -1, -2


def pack_one_hot(row: np.ndarray) -> int:
    """Class id of a one-hot row [K]; ALL_ZERO or ALL_NO_DATA (every value the dtype's maximum) for rows without a class.

    Raises ValueError for any other row.
    """
    if (row == 0).all():
        return ALL_ZERO
    if (row == np.iinfo(row.dtype).max).all():
        return ALL_NO_DATA
    hot = np.flatnonzero(row)
    if len(hot) != 1 or row[hot[0]] != 1:
        raise ValueError(f"{len(hot)} non-zero values, expected one 1")
    return int(hot[0])


def unpack_one_hot(class_id: int, dtype: np.dtype | str, length: int) -> np.ndarray:
    """The row [K] that `pack_one_hot` was given."""
    if class_id == ALL_NO_DATA:
        return np.full(length, np.iinfo(dtype).max, dtype)
    row = np.zeros(length, dtype)
    if class_id >= 0:
        row[class_id] = 1
    return row


def decode_scalars(manifest: Manifest, data: bytes | memoryview) -> np.void:
    """The record of a `scalars` member (`manifest.scalars_dtype`); ShardError for a wrong size."""
    dtype = manifest.scalars_dtype
    if len(data) != dtype.itemsize:
        raise ShardError(f"{SCALARS_MEMBER}: {len(data)} bytes, expected {dtype.itemsize}")
    return np.frombuffer(data, dtype)[0]
