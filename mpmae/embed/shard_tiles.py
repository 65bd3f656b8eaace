"""The tiles of a shard set, normalised as in pretraining.

Shapes: N tiles, C channels of the encoder, S image side (pixels).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpmae.embed.shard_input import ShardInput
from mpmae.embed.source import UNKNOWN, ClassColumn, Tiles, join_tiles, presence_columns, present_modalities
from mpmae.errors import ConfigError
from mpmae.eval.config import ImageSection
from mpmae.eval.encoder_input import EncoderInput
from mpmae.eval.resizing import resized
from mpmae.loader import Augmentation, ShardReader, evaluation_ids
from mpmae.loader.folder import ShardFolder
from mpmae.loader.transform import Assembler, draw_views
from mpmae.modalities import MODALITIES
from mpmae.shard_format import Manifest

LAND_COVER = ("esa_worldcover", "dynamic_world", "lulc")


@dataclass(frozen=True)
class _Split:
    reader: ShardReader
    assembler: Assembler


class ShardTiles:
    """A `TileSource` of a shard set.

    Statistics are the checkpoint's where it has them (for Sentinel-2 of the tile's product level), else the set's
    (`image.normalise`). The image is the tile's centre, cut to a multiple of the patch size; with `image.size` it is cut or
    scaled to that. Classes: the most frequent one of each land-cover map on that image, and the biome.

    splits: names, or empty for all. max_samples: so many tiles, evenly spread. Raises ShardError and ConfigError.
    """

    def __init__(
        self,
        folder: ShardFolder,
        manifest: Manifest,
        encoder_input: EncoderInput,
        image: ImageSection,
        splits: Sequence[str] = (),
        max_samples: int | None = None,
    ):
        names = tuple(dict.fromkeys(splits)) or tuple(manifest.splits)
        self._sides = _sides(manifest, encoder_input, image)
        self._input, self._encoder_input = ShardInput(manifest, encoder_input), encoder_input
        normalised, origins = self._input.with_statistics(manifest, image)
        self._classes = [name for name in (*LAND_COVER, "biome") if name in manifest.modalities]
        maps = tuple(dict.fromkeys((*self._input.modalities, *(n for n in self._classes if n in LAND_COVER))))
        self._splits: dict[str, _Split] = {}
        for name in names:
            reader = ShardReader(folder, name, normalised)
            self._splits[name] = _Split(reader, Assembler(reader, maps, self._sides.cut_px))
        shard_sizes = [shard.num_samples for name in names for shard in manifest.shards(name)]
        self._ids = evaluation_ids(shard_sizes, max_samples)
        self._first = np.cumsum([0] + [manifest.num_samples(name) for name in names])
        ends = np.searchsorted(self._ids, self._first)
        self.num_tiles = dict(zip(names, np.diff(ends).tolist(), strict=True))
        self.title = f"shard set {folder}"
        self.fingerprint = manifest.fingerprint
        self.facts: Mapping[str, Any] = {
            "bands": self._input.told_bands(),
            "statistics": origins,
            "image": self._sides.told(manifest.tile_size_px),
        }
        self.columns = (*(_column(manifest, name) for name in self._classes), *presence_columns(encoder_input))

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
        images, valid = self._input.images(batch)
        classes = {name: _most_frequent(batch.values[name]) for name in LAND_COVER if name in batch.values}
        classes |= present_modalities(images[:, None], self._encoder_input)
        if self._sides.scaled_px != self._sides.cut_px:
            images = resized(images, self._sides.scaled_px, self._encoder_input.class_channels)
        if "biome" in self._classes:
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
