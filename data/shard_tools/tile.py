"""One tile in memory, and its members in a shard.

Shapes: C bands, P tile side in pixels, K length of a tile vector.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mpmae.errors import ShardError
from mpmae.shard_codecs import ALL_NO_DATA, decode_pixels, decode_scalars, encode_pixels, pack_one_hot, unpack_one_hot
from mpmae.shard_format import Manifest


@dataclass(frozen=True)
class Tile:
    """All that is known of a tile: its row in the source, id, Sentinel-2 product level, and raw values per modality.

    values: pixel modalities [C, P, P], tile modalities [K] (one-hot rows too), in the dtype of the source.
    """

    row: int
    tile_id: bytes
    product_level: bytes
    values: dict[str, np.ndarray]


def presence_bits(manifest: Manifest, values: Mapping[str, np.ndarray]) -> int:
    """Bit i is set if the i-th of `manifest.modalities` has at least one valid value."""
    bits = 0
    for i, entry in enumerate((*manifest.pixels, *manifest.scalars)):
        bits |= int(entry.no_data.valid(values[entry.name]).any()) << i
    return bits


def encode_members(manifest: Manifest, tile: Tile) -> list[bytes]:
    """The bytes of each of `manifest.members`; ValueError naming the modality for a row that is not one-hot."""
    members = [encode_pixels(entry, tile.values[entry.name]) for entry in manifest.pixels]
    record = np.zeros((), manifest.scalars_dtype)
    record["tile_id"], record["product_level"] = tile.tile_id, tile.product_level
    for entry in manifest.scalars:
        value = tile.values[entry.name]
        if entry.encoding == "one_hot":
            try:
                value = pack_one_hot(value)
            except ValueError as error:
                raise ValueError(f"{entry.name} is not one-hot: {error}") from error
        record[entry.name] = value
    return [*members, record.tobytes()]


def decode_members(manifest: Manifest, row: int, members: Sequence[bytes], names: Collection[str] | None = None) -> Tile:
    """The tile that `encode_members` was given, with the modalities `names` (None: all).

    Raises ShardError with the problem of every member that does not decode.
    """
    problems, values = [], {}
    for entry, data in zip(manifest.pixels, members[:-1], strict=True):
        if names is not None and entry.name not in names:
            continue
        try:
            values[entry.name] = decode_pixels(entry, data)
        except ShardError as error:
            problems += error.problems
    try:
        record = decode_scalars(manifest, members[-1])
    except ShardError as error:
        raise ShardError([*problems, *error.problems]) from error
    for entry in manifest.scalars:
        if names is not None and entry.name not in names:
            continue
        value = record[entry.name]
        if entry.encoding == "one_hot":
            if not ALL_NO_DATA <= value < entry.length:
                problems.append(f"{entry.name}: class id {value}, expected {ALL_NO_DATA} to {entry.length - 1}")
                continue
            value = unpack_one_hot(int(value), entry.dtype, entry.length)
        values[entry.name] = value
    if problems:
        raise ShardError(problems)
    return Tile(row, bytes(record["tile_id"]), bytes(record["product_level"]), values)
