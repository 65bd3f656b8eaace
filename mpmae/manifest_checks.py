"""What must hold of a manifest beyond the types of its fields."""

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from mpmae.modalities import MODALITIES, PRODUCT_LEVELS

if TYPE_CHECKING:
    from mpmae.shard_format import Manifest, PixelEntry

MAX_COUNT = 2**63 - 1
# A reader allocates a tile before it decodes one, so what a manifest may ask for is bounded. MMEarth's largest is 0.4 MB.
MAX_MEMBER_BYTES = 1 << 30
MAX_SCALAR_LENGTH = 1 << 20
MAX_ITEMSIZE = 8
_SHARD_NAME = re.compile(r"[^/\\\x00-\x1f]+\.tar")
_DTYPE_KINDS = {
    text: dtype.kind for dtype in map(np.dtype, "bhiqBHIQefd") for text in (dtype.str, "<" + dtype.str[1:], dtype.name)
}


def manifest_problems(manifest: "Manifest") -> list[str]:
    """Everything that does not fit together in a manifest, one text each, which begins with the field."""
    return [*_modality_problems(manifest), *_stats_problems(manifest), *_shard_problems(manifest)]


def _modality_problems(manifest: "Manifest") -> Iterator[str]:
    seen: set[str] = set()
    for group, entries in (("pixels", manifest.pixels), ("scalars", manifest.scalars)):
        for i, entry in enumerate(entries):
            field = f"{group}.{i} ({entry.name})"
            if entry.name not in MODALITIES:
                yield f"{field}.name: no such modality; known: {', '.join(MODALITIES)}"
            if entry.name in seen:
                yield f"{field}.name: {entry.name} is listed twice"
            seen.add(entry.name)
            kinds = "iu" if group == "scalars" and entry.encoding == "one_hot" else "iuf"
            if _DTYPE_KINDS.get(entry.dtype, "none") not in kinds:
                expected = "integers" if kinds == "iu" else "integers or floats"
                yield f"{field}.dtype: {entry.dtype!r}, expected a numpy dtype of {expected} such as '<u2', little-endian"
            for code in entry.no_data.codes:
                if not -MAX_COUNT <= code <= MAX_COUNT:
                    yield f"{field}.no_data.codes: {code}, expected a 64-bit number"
    for i, entry in enumerate(manifest.pixels):
        field, side = f"pixels.{i} ({entry.name})", manifest.tile_size_px
        if min(entry.shape) < 1:
            yield f"{field}.shape: {list(entry.shape)}, expected numbers above 0"
        elif math.prod(entry.shape) * MAX_ITEMSIZE > MAX_MEMBER_BYTES:
            yield f"{field}.shape: {list(entry.shape)}, expected at most {MAX_MEMBER_BYTES // MAX_ITEMSIZE} values"
        if entry.shape[1:] != (side, side):
            yield f"{field}.shape: {list(entry.shape)}, expected sides of tile_size_px = {side}"
        if len(entry.bands) != entry.shape[0]:
            yield f"{field}.bands: {len(entry.bands)} names, expected {entry.shape[0]} as in its shape"
        if entry.no_data.zero_row:
            yield f"{field}.no_data.zero_row: true, expected false: maps have no one-hot rows"
        yield from _quantisation_problems(field, entry)
    for i, entry in enumerate(manifest.scalars):
        if not 1 <= entry.length <= MAX_SCALAR_LENGTH:
            yield f"scalars.{i} ({entry.name}).length: {entry.length}, expected a number from 1 to {MAX_SCALAR_LENGTH}"


def _quantisation_problems(field: str, entry: "PixelEntry") -> Iterator[str]:
    if entry.quantisation is None:
        return
    if _DTYPE_KINDS.get(entry.dtype) != "f":
        yield f"{field}.quantisation: of {entry.dtype!r}, expected floats"
    for quantity, value in entry.quantisation:
        if not 0 < value < math.inf:
            yield f"{field}.quantisation.{quantity}: {value}, expected a number above 0"


def _stats_problems(manifest: "Manifest") -> Iterator[str]:
    num_bands = {entry.name: entry.shape[0] for entry in manifest.pixels}
    num_bands |= {entry.name: entry.length for entry in manifest.scalars}
    for key, stats in manifest.band_stats.items():
        name = "sentinel2" if key in [f"sentinel2_{level}" for level in PRODUCT_LEVELS] else key
        if name not in num_bands:
            yield f"band_stats.{key}: the set has no such modality; it has {', '.join(num_bands)}"
            continue
        for quantity, values in stats:
            if len(values) != num_bands[name]:
                yield f"band_stats.{key}.{quantity}: {len(values)} values, expected {num_bands[name]}, one per band"
            elif quantity in ("mean", "std") and not np.isfinite(values).all():
                yield f"band_stats.{key}.{quantity}: {list(values)}, expected finite numbers"
            elif quantity == "std" and min(values) <= 0:
                yield f"band_stats.{key}.std: {list(values)}, expected numbers above 0 (1 for a band without spread)"


def _shard_problems(manifest: "Manifest") -> Iterator[str]:
    if not 0 <= manifest.source.num_tiles <= MAX_COUNT:
        yield f"source.num_tiles: {manifest.source.num_tiles}, expected a number from 0 to {MAX_COUNT}"
    names: set[str] = set()
    for split, shards in manifest.splits.items():
        for i, shard in enumerate(shards):
            field = f"splits.{split}.{i}"
            if not _SHARD_NAME.fullmatch(shard.name):
                yield f"{field}.name: {shard.name!r}, expected a plain file name that ends in .tar"
            if shard.name in names:
                yield f"{field}.name: {shard.name!r} is listed twice"
            names.add(shard.name)
            for quantity in ("num_bytes", "num_samples"):
                value = getattr(shard, quantity)
                if not 0 <= value <= MAX_COUNT:
                    yield f"{field}.{quantity}: {value}, expected a number from 0 to {MAX_COUNT}"
