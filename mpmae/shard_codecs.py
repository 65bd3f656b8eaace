"""Between arrays and the bytes of a shard's members: the lossless filter, the codecs and the packed scalars.

Format: `mpmae.shard_format`. Shapes: C bands, P tile side in pixels, K length of a tile vector.
"""

import lz4.block
import numpy as np

from mpmae.errors import ShardError
from mpmae.shard_format import SCALARS_MEMBER, Manifest, PixelEntry


def encode_pixels(entry: PixelEntry, values: np.ndarray) -> bytes:
    """The bytes of a member for `values` [C, P, P] of the entry's dtype (lossless, bit patterns kept)."""
    values = np.ascontiguousarray(values, entry.dtype)
    data = _delta_planes(values) if entry.filter == "delta-planes" else values
    return data.tobytes() if entry.codec == "raw" else lz4.block.compress(data.tobytes(), store_size=False)


def decode_pixels(entry: PixelEntry, data: bytes | memoryview) -> np.ndarray:
    """The array [C, P, P] of a member; ShardError when the bytes do not give exactly that array."""
    dtype = np.dtype(entry.dtype)
    num_bytes = int(np.prod(entry.shape)) * dtype.itemsize
    if entry.codec == "lz4":
        try:
            data = lz4.block.decompress(data, uncompressed_size=num_bytes)
        except lz4.block.LZ4BlockError as error:
            raise ShardError(f"{entry.name}: corrupt LZ4 block of {len(data)} bytes ({error})") from error
    if len(data) != num_bytes:
        raise ShardError(f"{entry.name}: {len(data)} bytes, expected {num_bytes} for {entry.shape} {entry.dtype}")
    if entry.filter == "delta-planes":
        return _undo_delta_planes(np.frombuffer(data, np.uint8), dtype, entry.shape)
    return np.frombuffer(data, dtype).reshape(entry.shape)


def _delta_planes(values: np.ndarray) -> np.ndarray:
    """Horizontal difference, zigzag, then one plane per byte of the word: uint8 [itemsize, C*P*P]."""
    bits = values.view(f"<u{values.itemsize}")
    delta = bits.copy()
    delta[..., 1:] -= bits[..., :-1]
    signed = delta.view(f"<i{values.itemsize}")
    zigzag = (signed << 1) ^ (signed >> (8 * values.itemsize - 1))
    return np.ascontiguousarray(zigzag.view(np.uint8).reshape(-1, values.itemsize).T)


def _undo_delta_planes(planes: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    unsigned = np.dtype(f"<u{dtype.itemsize}")
    words = np.ascontiguousarray(planes.reshape(dtype.itemsize, -1).T).view(unsigned).reshape(shape)
    delta = (words >> unsigned.type(1)) ^ (~(words & unsigned.type(1)) + unsigned.type(1))
    return np.cumsum(delta, axis=-1, dtype=unsigned).view(dtype)


ALL_ZERO, ALL_NO_DATA = -1, -2


def pack_one_hot(row: np.ndarray) -> int:
    """Class id of a one-hot row [K]; ALL_ZERO or ALL_NO_DATA (every value the dtype's maximum) for rows without a class.

    Raises ValueError for any other row.
    """
    hot = row.nonzero()[0]
    if len(hot) == 1 and row[hot[0]] == 1:
        return int(hot[0])
    if not len(hot):
        return ALL_ZERO
    if (row == np.iinfo(row.dtype).max).all():
        return ALL_NO_DATA
    raise ValueError(f"{len(hot)} non-zero values, expected one 1")


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
