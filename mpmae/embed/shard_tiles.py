"""The tiles of a shard set, normalised as in pretraining.

Shapes: N tiles, B bands of the encoder, P tile side, S image side (pixels), L product levels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mpmae.embed.source import UNKNOWN, ClassColumn, Tiles, join_tiles
from mpmae.errors import ConfigError, ShardError
from mpmae.eval.config import ImageSection
from mpmae.eval.encoder_input import EncoderInput
from mpmae.loader import Augmentation, ShardReader, evaluation_ids, shard_folder
from mpmae.loader.transform import Assembler, draw_views
from mpmae.modalities import MODALITIES, PRODUCT_LEVELS, band_indices
from mpmae.shard_format import BandStats, Manifest

LAND_COVER = ("esa_worldcover", "dynamic_world", "lulc")
_SENTINEL2 = "sentinel2"


@dataclass(frozen=True)
class _Split:
    reader: ShardReader
    assembler: Assembler


class ShardTiles:
    """A `TileSource` of a shard set's folder or URL.

    Statistics are the checkpoint's for the tile's product level where it has them, else the set's (`image.normalise`). The
    image is the tile's centre, cut to a multiple of the patch size; with `image.size` it is cut or scaled to that.
    Classes: the most frequent one of each land-cover map on that image, and the biome.

    splits: names, or empty for all. max_samples: so many tiles, evenly spread. Raises ShardError and ConfigError.
    """

    def __init__(
        self,
        where: str | Path,
        encoder_input: EncoderInput,
        image: ImageSection,
        splits: Sequence[str] = (),
        max_samples: int | None = None,
    ):
        folder = shard_folder(where)
        manifest = folder.manifest()
        names = tuple(dict.fromkeys(splits)) or tuple(manifest.splits)
        self._sides = _sides(manifest, encoder_input, image)
        normalised, origins = _with_statistics(manifest, encoder_input, image)
        self._band_rows = band_indices(_SENTINEL2, encoder_input.bands, _stored_bands(manifest))
        self._modalities = tuple(n for n in (_SENTINEL2, *LAND_COVER, "lat", "lon", "biome") if n in manifest.modalities)
        self._splits: dict[str, _Split] = {}
        for name in names:
            reader = ShardReader(folder, name, normalised)
            maps = tuple(n for n in self._modalities if MODALITIES[n].scope == "pixel")
            self._splits[name] = _Split(reader, Assembler(reader, maps, self._sides.cut_px))
        shard_sizes = [shard.num_samples for name in names for shard in manifest.shards(name)]
        self._ids = evaluation_ids(shard_sizes, max_samples)
        self._first = np.cumsum([0] + [manifest.num_samples(name) for name in names])
        ends = np.searchsorted(self._ids, self._first)
        self.num_tiles = dict(zip(names, np.diff(ends).tolist(), strict=True))
        self.title = f"shard set {folder}"
        self.fingerprint = manifest.fingerprint
        self.facts: Mapping[str, Any] = {
            "bands": list(encoder_input.bands),
            "statistics": origins,
            "image": self._sides.told(manifest.tile_size_px),
        }
        self.columns = tuple(_column(manifest, n) for n in self._modalities if MODALITIES[n].kind == "categorical")

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, positions: np.ndarray) -> Tiles:
        """The tiles at these positions, int64 [N]. Raises ShardError naming shard and sample."""
        return join_tiles([self._read(name, ids) for name, ids in self._by_split(positions)])

    def prefetch(self, positions: np.ndarray) -> None:
        """Fetch the shards of these positions, if they are remote."""
        for name, ids in self._by_split(positions):
            reader = self._splits[name].reader
            ends = np.cumsum([shard.num_samples for shard in reader.manifest.shards(name)])
            reader.prefetch(np.unique(np.searchsorted(ends, ids, side="right")).tolist())

    def close(self) -> None:
        """Close the shards."""
        for split in self._splits.values():
            split.reader.close()

    def _by_split(self, positions: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """(split, its sample ids) for neighbouring positions of one split."""
        ids = self._ids[positions]
        number = np.searchsorted(self._first, ids, side="right") - 1
        names, cuts = list(self._splits), np.flatnonzero(np.diff(number)) + 1
        return [
            (names[part_number[0]], part - self._first[part_number[0]])
            for part, part_number in zip(np.split(ids, cuts), np.split(number, cuts), strict=True)
        ]

    def _read(self, split: str, sample_ids: np.ndarray) -> Tiles:
        reader, assembler = self._splits[split].reader, self._splits[split].assembler
        num, tile_px = len(sample_ids), reader.manifest.tile_size_px
        views = draw_views(Augmentation.none(), 0, 0, sample_ids, tile_px, self._sides.cut_px)
        batch = assembler.batch(sample_ids, views, {}, num)
        records = np.array([reader.scalars(i) for i in sample_ids.tolist()], reader.manifest.scalars_dtype)
        images = batch.values[_SENTINEL2][:, self._band_rows]
        valid = batch.valid[_SENTINEL2][:, self._band_rows]
        if self._sides.scaled_px != self._sides.cut_px:
            images = functional.interpolate(images, (self._sides.scaled_px,) * 2, mode="bilinear", antialias=True)
        classes = {n: _most_frequent(batch.values[n]) for n in batch.values if n != _SENTINEL2}
        if "biome" in self._modalities:
            classes["biome"] = np.maximum(records["biome"].astype(np.int64), UNKNOWN)
        return Tiles(
            ids=[tile_id.decode(errors="replace") for tile_id in records["tile_id"].tolist()],
            splits=[split] * num,
            product_levels=[level.decode(errors="replace") for level in records["product_level"].tolist()],
            locations=np.stack([_degrees(reader.manifest, records, name) for name in ("lat", "lon")], axis=1),
            images=images[:, None],
            valid_fraction=valid.float().mean((1, 2, 3)).numpy(),
            classes=classes,
        )


@dataclass(frozen=True)
class _Sides:
    """Sides in pixels: of the tile's centre that is cut out, and of the image that it is scaled to."""

    cut_px: int
    scaled_px: int

    def told(self, tile_size_px: int) -> str:
        cut = "the whole tile" if self.cut_px == tile_size_px else f"its centre of {self.cut_px} px"
        scaled = "" if self.scaled_px == self.cut_px else f", scaled to {self.scaled_px} px"
        return f"{cut} of {tile_size_px} px{scaled}"


def _sides(manifest: Manifest, encoder_input: EncoderInput, image: ImageSection) -> _Sides:
    patch, tile = encoder_input.patch_size, manifest.tile_size_px
    if image.size is None:
        if tile < patch:
            raise ConfigError(
                f"tiles of {tile} px are smaller than a patch of the encoder ({patch} px); give --size {patch}"
            )
        return _Sides(tile // patch * patch, tile // patch * patch)
    if image.size % patch:
        raise ConfigError(f"--size {image.size}: the encoder takes multiples of its patch size, {patch} px")
    if image.fit == "resize":
        return _Sides(tile, image.size)
    if image.fit == "crop" and image.size <= tile:
        return _Sides(image.size, image.size)
    raise ConfigError(
        f"--size {image.size} --fit {image.fit}: a shard set's tiles of {tile} px are cropped to at most their side or "
        "resized; give --fit resize or another size"
    )


def _stored_bands(manifest: Manifest) -> tuple[str, ...]:
    return next((entry.bands for entry in manifest.pixels if entry.name == _SENTINEL2), ())


def _with_statistics(
    manifest: Manifest, encoder_input: EncoderInput, image: ImageSection
) -> tuple[Manifest, dict[str, str]]:
    """The manifest with the statistics to normalise by, and whose they are by product level."""
    if _SENTINEL2 not in manifest.modalities:
        raise ShardError(
            f"the shard set has no {_SENTINEL2}, which the encoder reads; it has {', '.join(manifest.modalities)}"
        )
    rows = band_indices(_SENTINEL2, encoder_input.bands, _stored_bands(manifest))
    table, origins = dict(manifest.band_stats), {}
    for level in PRODUCT_LEVELS:
        key, ours = f"{_SENTINEL2}_{level}", encoder_input.statistics.get(level)
        if ours is not None and image.normalise != "dataset":
            table[key] = _replaced(table.get(key), rows, ours, len(_stored_bands(manifest)))
            origins[level] = "the checkpoint's"
        elif image.normalise == "pretraining":
            table.pop(key, None)
        elif key in table:
            origins[level] = "the shard set's"
    if not origins:
        raise ConfigError("--normalise pretraining: the checkpoint has no statistics; give --normalise dataset")
    return manifest.model_copy(update={"band_stats": table}), origins


def _replaced(stats: BandStats | None, rows: list[int], ours: Mapping[str, Sequence[float]], num_bands: int) -> BandStats:
    """Statistics of all stored bands, those at `rows` replaced by the checkpoint's."""
    values = {
        quantity: list(getattr(stats, quantity)) if stats else [start] * num_bands
        for quantity, start in (("mean", 0.0), ("std", 1.0), ("min", 0.0), ("max", 0.0))
    }
    for quantity in ("mean", "std"):
        for row, value in zip(rows, ours[quantity], strict=True):
            values[quantity][row] = value
    return BandStats(**{quantity: tuple(numbers) for quantity, numbers in values.items()})


def _column(manifest: Manifest, name: str) -> ClassColumn:
    spec = MODALITIES[name]
    if spec.scope == "pixel":
        names, colours = zip(*((c.name, c.colour) for c in spec.classes), strict=True)
        return ClassColumn(name, f"{spec.title}, most frequent class", names, colours)
    length = next(entry.length for entry in manifest.scalars if entry.name == name)
    return ClassColumn(name, spec.title, tuple(f"{spec.title.lower()} {i}" for i in range(length)))


def _most_frequent(class_ids: torch.Tensor) -> np.ndarray:
    """The most frequent class of each map [N, 1, S, S], int64 [N]; the lowest of equals, UNKNOWN without any data."""
    flat = class_ids.flatten(1)
    counts = torch.stack([(flat == c).sum(1) for c in range(max(int(flat.max()), 0) + 1)], 1)
    return torch.where(counts.sum(1) > 0, counts.argmax(1), UNKNOWN).numpy()


def _degrees(manifest: Manifest, records: np.ndarray, name: str) -> np.ndarray:
    """The angle that a (sin, cos) field holds, float64 [N] in degrees; NaN where there is none."""
    if name not in records.dtype.names:
        return np.full(len(records), np.nan)
    raw = records[name]
    entry = next(entry for entry in manifest.scalars if entry.name == name)
    valid = entry.no_data.valid(raw).all(axis=1) & (raw != 0).any(axis=1)
    sine, cosine = np.where(valid[:, None], raw, np.nan).astype(np.float64).T
    return np.degrees(np.arctan2(sine, cosine))
