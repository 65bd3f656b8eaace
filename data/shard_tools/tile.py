"""One tile in memory, and its members in a shard.

Shapes: C bands, P tile side in pixels, K length of a tile vector.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mpmae.errors import ShardError, SourceError
from mpmae.modalities import NoData
from mpmae.shard_codecs import ALL_NO_DATA, decode_pixels, decode_scalars, encode_pixels, pack_one_hot, unpack_one_hot
from mpmae.shard_format import Manifest, PixelEntry


@dataclass(frozen=True)
class Tile:
    """All that is known of a tile: its row in the source, id, Sentinel-2 product level, and raw values per modality.

    values: pixel modalities [C, P, P], tile modalities [K] (one-hot rows too), in the dtype of the source.
    """

    row: int
    tile_id: bytes
    product_level: bytes
    values: dict[str, np.ndarray]


class TileError(SourceError):
    """A tile that its source cannot give, or that no shard can hold, where others may be fine; `modality` is at fault."""

    def __init__(self, problems: str | Sequence[str], modality: str | None = None):
        super().__init__(problems)
        self.modality = modality

    def __reduce__(self):
        return type(self), (self.problems, self.modality)


class ModalityError(ValueError):
    """Values that a shard cannot hold; `modality` is whose they are."""

    def __init__(self, modality: str, problem: str):
        super().__init__(problem)
        self.modality = modality


def presence_bits(manifest: Manifest, values: Mapping[str, np.ndarray]) -> int:
    """Bit i is set if the i-th of `manifest.modalities` has at least one valid value."""
    bits = 0
    for i, entry in enumerate((*manifest.pixels, *manifest.scalars)):
        bits |= int(_has_valid(entry.no_data, values[entry.name])) << i
    return bits


def _has_valid(rule: NoData, values: np.ndarray) -> bool:
    """Whether any of `values` [C, P, P] or [K] is valid; one value seldom leaves it open."""
    value = values.item(values.size // 2)
    if not rule.zero_row and value not in rule.codes and (not rule.non_finite or math.isfinite(value)):
        return True
    return bool(rule.valid(values).any())


class SampleEncoder:
    """Turns tiles into the samples of a shard set; what the manifest says is looked up once. Safe from many threads."""

    def __init__(self, manifest: Manifest):
        self._pixels, self._scalars = manifest.pixels, manifest.scalars
        self._record_dtype = manifest.scalars_dtype
        self._last: dict[str, tuple[np.ndarray, bytes, bool]] = {}

    def encode(self, tile: Tile) -> tuple[int, list[bytes]]:
        """The presence bits and the bytes of each of `manifest.members`; ModalityError for what a shard cannot hold."""
        members, present = [], []
        for entry in self._pixels:
            member, is_present = self._pixels_of(entry, tile.values[entry.name])
            members.append(member)
            present.append(is_present)
        values = [tile.tile_id, tile.product_level]
        for entry in self._scalars:
            value = tile.values[entry.name]
            if entry.encoding == "one_hot":
                try:
                    value = pack_one_hot(value)
                except ValueError as error:
                    raise ModalityError(entry.name, f"{entry.name} is not one-hot: {error}") from error
                present.append(value >= 0)
            else:
                present.append(_has_valid(entry.no_data, value))
            values.append(value)
        members.append(np.array(tuple(values), self._record_dtype).tobytes())
        return sum(1 << i for i, is_present in enumerate(present) if is_present), members

    def _pixels_of(self, entry: PixelEntry, values: np.ndarray) -> tuple[bytes, bool]:
        # A source may give one read-only array for all tiles that lack a modality.
        last = self._last.get(entry.name)
        if last is not None and last[0] is values:
            return last[1:]
        try:
            member = encode_pixels(entry, values)
        except ValueError as error:
            raise ModalityError(entry.name, str(error)) from error
        is_present = _has_valid(entry.no_data, values)
        if not values.flags.writeable:
            self._last[entry.name] = values, member, is_present
        return member, is_present


def encode_members(manifest: Manifest, tile: Tile) -> list[bytes]:
    """The bytes of each of `manifest.members`; ModalityError for values that a shard cannot hold."""
    return SampleEncoder(manifest).encode(tile)[1]


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
