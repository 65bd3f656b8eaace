"""From stored samples to a `Batch`: crop and flip, normalise by product level, class ids, valid flags.

The draws are a pure function of (seed, epoch, sample id); one crop and one flip per sample serve all pixel modalities.

Shapes: N samples, C bands, P tile side, H image side (pixels).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mpmae.counter_rng import Stream, random_bits, random_integers
from mpmae.errors import ConfigError, ShardError
from mpmae.loader.batch import Batch
from mpmae.loader.read import ShardReader
from mpmae.modalities import MODALITIES, PRODUCT_LEVELS, class_lookup, no_data_rule
from mpmae.shard_format import BandStats


@dataclass(frozen=True)
class Augmentation:
    """Which random changes training makes; evaluation uses the centre crop and no flips (`Augmentation.none()`)."""

    crop: bool = True
    hflip: bool = True
    vflip: bool = True

    @classmethod
    def none(cls) -> "Augmentation":
        """No random change."""
        return cls(crop=False, hflip=False, vflip=False)


@dataclass(frozen=True)
class Views:
    """Per sample: crop offsets int64 [N], flips bool [N]."""

    top: np.ndarray
    left: np.ndarray
    hflip: np.ndarray
    vflip: np.ndarray


def draw_views(
    augmentation: Augmentation, seed: int, epoch: int, sample_ids: np.ndarray, tile_size_px: int, img_size_px: int
) -> Views:
    """The crop offsets and flips of the samples in this epoch."""
    num, slack = len(sample_ids), tile_size_px - img_size_px
    offsets = np.full((num, 2), slack // 2)
    if augmentation.crop:
        offsets = random_integers(seed, Stream.CROP, epoch, sample_ids, slack + 1, num=2)
    flips = random_bits(seed, Stream.FLIP, epoch, sample_ids, num=2) >> np.uint64(63) == 1
    return Views(offsets[:, 0], offsets[:, 1], flips[:, 0] & augmentation.hflip, flips[:, 1] & augmentation.vflip)


@dataclass(frozen=True)
class RawBatch:
    """Samples as they are stored: no crop, no flip, no normalisation.

    pixels: per pixel modality [N, C, P, P] in the entry's dtype. records: [N] of `manifest.scalars_dtype`.
    """

    pixels: dict[str, np.ndarray]
    records: np.ndarray


class Assembler:
    """Builds the batch of given samples; holds the statistics and tables of the set.

    reference_quirks: take for data what the published code does, see `mpmae.modalities.no_data_rule`; the presence counts
    stay those of the shard index.
    Raises ConfigError when the image does not fit the tile, ShardError when the set lacks a modality or its statistics.
    """

    def __init__(self, reader: ShardReader, modalities: Sequence[str], img_size_px: int, reference_quirks: bool = False):
        reader.require(modalities)
        if img_size_px > reader.manifest.tile_size_px:
            raise ConfigError(
                f"model.img_size = {img_size_px} is larger than the tiles of {reader.folder} "
                f"({reader.manifest.tile_size_px} px); lower it or use a set of larger tiles"
            )
        self._reader, self._img_size_px = reader, img_size_px
        self._names = tuple(modalities)
        self._entries = {e.name: e for e in (*reader.manifest.pixels, *reader.manifest.scalars)}
        self._stats = {name: self._statistics(name) for name in modalities if MODALITIES[name].kind == "continuous"}
        self._no_data = {
            name: no_data_rule(name, e.dtype, reference_quirks=True) if reference_quirks else e.no_data
            for name, e in self._entries.items()
        }
        self._lookup = {
            name: class_lookup(MODALITIES[name], reference_quirks)
            for name in modalities
            if MODALITIES[name].kind == "categorical" and MODALITIES[name].scope == "pixel"
        }

    def _statistics(self, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Mean and std float32 [C] by product level."""
        table = self._reader.manifest.band_stats
        found, problems = {}, []
        for level in PRODUCT_LEVELS:
            key = f"{name}_{level}" if name == "sentinel2" else name
            if key in table:
                found[level] = np.asarray(table[key].mean, np.float32), self._checked_std(key, table[key], problems)
            elif name != "sentinel2":
                problems.append(f"{self._reader.folder}: the manifest has no statistics of {key}")
        if not found and not problems:
            problems.append(f"{self._reader.folder}: the manifest has no statistics of {name} for any product level")
        if problems:
            raise ShardError(problems)
        return found

    def _checked_std(self, key: str, stats: BandStats, problems: list[str]) -> np.ndarray:
        std = np.asarray(stats.std, np.float32)
        for band in np.flatnonzero(~(std > 0)):
            problems.append(f"{self._reader.folder}: statistics of {key}: std {std[band]} in band {band}, must be > 0")
        return std

    def batch(
        self,
        sample_ids: np.ndarray,
        views: Views,
        num_present: dict[str, int],
        global_batch_size: int,
        padding: np.ndarray | None = None,
    ) -> Batch:
        """The samples int64 [N] as tensors."""
        records = [self._reader.scalars(int(i)) for i in sample_ids]
        levels = [record["product_level"].decode() for record in records]
        values, valid = {}, {}
        for name in self._names:
            fill = self._pixel if MODALITIES[name].scope == "pixel" else self._tile
            values[name], valid[name] = map(torch.from_numpy, fill(name, sample_ids, records, levels, views))
        return Batch(
            values=values,
            valid=valid,
            sample_ids=torch.from_numpy(np.array(sample_ids, np.int64)),
            num_present=num_present,
            global_batch_size=global_batch_size,
            padding=None if padding is None else torch.from_numpy(np.array(padding)),
        )

    def raw_batch(self, sample_ids: np.ndarray) -> RawBatch:
        """The samples int64 [N] decoded, with this assembler's pixel modalities and all scalars."""
        names = [name for name in self._names if MODALITIES[name].scope == "pixel"]
        pixels = {name: np.stack([self._reader.pixels(int(i), name) for i in sample_ids]) for name in names}
        return RawBatch(pixels, np.stack([self._reader.scalars(int(i)) for i in sample_ids]))

    def tiles(self, records: np.ndarray) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Values and valid flags of this assembler's tile modalities, as in `Batch`, from records [N] of scalars."""
        levels = [level.decode() for level in records["product_level"].tolist()]
        values, valid = {}, {}
        for name in self._names:
            if MODALITIES[name].scope == "tile":
                values[name], valid[name] = map(torch.from_numpy, self._tile(name, None, records, levels, None))
        return values, valid

    def _pixel(self, name, sample_ids, records, levels, views: Views) -> tuple[np.ndarray, np.ndarray]:
        entry, size = self._entries[name], self._img_size_px
        continuous = name in self._stats
        shape = (len(sample_ids), entry.shape[0], size, size)
        values, valid = np.empty(shape, np.float32 if continuous else np.int64), np.empty(shape, bool)
        for i, sample_id in enumerate(sample_ids):
            top, left = views.top[i], views.left[i]
            raw = self._reader.pixels(int(sample_id), name)[:, top : top + size, left : left + size]
            raw = raw[:, :: -1 if views.vflip[i] else 1, :: -1 if views.hflip[i] else 1]
            if continuous:
                valid[i] = self._no_data[name].valid(raw)
                values[i] = self._normalise(name, levels[i], raw, valid[i], band_axes=(slice(None), None, None))
            else:
                in_table = (raw >= 0) & (raw < 256)
                values[i] = self._lookup[name][np.where(in_table, raw, 0).astype(np.intp)]
                valid[i] = values[i] >= 0
        return values, valid

    def _tile(self, name, sample_ids, records, levels, views: Views) -> tuple[np.ndarray, np.ndarray]:
        raw = np.stack([record[name] for record in records])
        if MODALITIES[name].kind == "categorical":
            ids = np.maximum(raw.astype(np.int64), -1)
            return ids, ids >= 0
        valid = self._no_data[name].valid(raw)
        rows = [self._normalise(name, *item, band_axes=(slice(None),)) for item in zip(levels, raw, valid, strict=True)]
        return np.stack(rows), valid

    def _normalise(self, name: str, level: str, raw: np.ndarray, valid: np.ndarray, band_axes: tuple) -> np.ndarray:
        """(raw - mean) / std in float32, 0 where not valid."""
        try:
            mean, std = self._stats[name][level]
        except KeyError:
            raise ShardError(
                f"{self._reader.folder}: a tile of level {level!r}, but no statistics of {name}_{level}"
            ) from None
        clean = np.where(valid, raw, 0).astype(np.float32)
        return np.where(valid, (clean - mean[band_axes]) / std[band_axes], np.float32(0))
