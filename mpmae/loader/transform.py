"""From stored samples to a `Batch`: crop and flip, normalise by product level, class ids, valid flags.

The draws are a pure function of (seed, epoch, sample id); one crop and one flip per sample serve all pixel modalities.

Shapes: N samples, C bands, P tile side, H image side (pixels).
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mpmae.counter_rng import Stream, random_bits, random_integers
from mpmae.errors import ConfigError, ShardError
from mpmae.loader.batch import Batch
from mpmae.loader.maps import CategoricalMaps, ContinuousMaps, Views
from mpmae.loader.read import ShardReader
from mpmae.loader.slabs import Slabs
from mpmae.loader.stored import StoredSamples
from mpmae.modalities import MODALITIES, PRODUCT_LEVELS, class_lookup, no_data_rule
from mpmae.shard_codecs import unpack_stored
from mpmae.shard_format import BandStats, PixelEntry

CHUNK_SIZE = 16  # samples decompressed at a time: their bytes stay in the core's cache until they are in the batch


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
    """Builds the batch of given samples; holds the statistics and tables of the set. Safe to use from many threads.

    reference_quirks: take for data what the published code does, see `mpmae.modalities.no_data_rule`; the presence counts
    stay those of the shard index. max_kept: memory of how many batches is kept for the next ones.
    Raises ConfigError when the image does not fit the tile, ShardError when the set lacks a modality or its statistics.
    """

    def __init__(
        self,
        reader: ShardReader,
        modalities: Sequence[str],
        img_size_px: int,
        reference_quirks: bool = False,
        max_kept: int = 2,
    ):
        reader.require(modalities)
        if img_size_px > reader.manifest.tile_size_px:
            raise ConfigError(
                f"model.img_size = {img_size_px} is larger than the tiles of {reader.folder} "
                f"({reader.manifest.tile_size_px} px); lower it or use a set of larger tiles"
            )
        self._reader, self._img_size_px = reader, img_size_px
        self._names = tuple(modalities)
        self._entries = {e.name: e for e in (*reader.manifest.pixels, *reader.manifest.scalars)}
        self.statistics = {name: self._statistics(name) for name in modalities if MODALITIES[name].kind == "continuous"}
        self.no_data = {
            name: no_data_rule(name, e.dtype, reference_quirks=True) if reference_quirks else e.no_data
            for name, e in self._entries.items()
        }
        self.maps = {name: self._maps_of(name, reference_quirks) for name in modalities if MODALITIES[name].scope == "pixel"}
        self._slabs = Slabs(max_kept)
        self._local = threading.local()

    def _maps_of(self, name: str, reference_quirks: bool) -> ContinuousMaps | CategoricalMaps:
        entry = self._entries[name]
        if MODALITIES[name].kind == "categorical":
            return CategoricalMaps(entry, class_lookup(MODALITIES[name], reference_quirks))
        mean, std = self.statistics[name].mean, self.statistics[name].std
        return ContinuousMaps(entry, self.no_data[name], mean, std)

    def _statistics(self, name: str) -> "_Statistics":
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
        mean, std = (np.stack(rows) for rows in zip(*found.values(), strict=True))
        return _Statistics(tuple(level.encode() for level in found), mean, std)

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
        stored = StoredSamples(self._reader, sample_ids)
        records = stored.records()
        levels = self.levels(sample_ids, records)
        values, valid = self._room(len(sample_ids))
        self._fill_maps(stored, views.table(), levels, values, valid)
        tile_values, tile_valid = self.tiles(sample_ids, records)
        return Batch(
            values={name: values[name] if name in values else tile_values[name] for name in self._names},
            valid={name: valid[name] if name in valid else tile_valid[name] for name in self._names},
            sample_ids=torch.from_numpy(np.array(sample_ids, np.int64)),
            num_present=num_present,
            global_batch_size=global_batch_size,
            padding=None if padding is None else torch.from_numpy(np.array(padding)),
        )

    def raw_batch(self, sample_ids: np.ndarray) -> RawBatch:
        """The samples int64 [N] decoded, with this assembler's pixel modalities and all scalars."""
        stored = StoredSamples(self._reader, sample_ids)
        pixels = {}
        for name in self.maps:
            entry = self._entries[name]
            members = np.empty((len(sample_ids), entry.stored_bytes), np.uint8)
            stored.decompress(entry, 0, members)
            pixels[name] = unpack_stored(entry, members)
        return RawBatch(pixels, stored.records())

    def tiles(self, sample_ids: np.ndarray, records: np.ndarray) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Values and valid flags of this assembler's tile modalities, as in `Batch`, from the samples' records [N]."""
        levels = self.levels(sample_ids, records)
        values, valid = {}, {}
        for name in self._names:
            if MODALITIES[name].scope == "tile":
                values[name], valid[name] = map(torch.from_numpy, self._tile(name, records[name], levels))
        return values, valid

    def levels(self, sample_ids: np.ndarray, records: np.ndarray) -> dict[str, np.ndarray]:
        """Each sample's row in the statistics of the continuous modalities: int64 [N]."""
        stored_levels = records["product_level"]
        rows = {}
        for known in {stats.levels for stats in self.statistics.values()}:
            rows[known] = np.full(len(records), -1)
            for row, level in enumerate(known):
                rows[known][stored_levels == level] = row
        for name, stats in self.statistics.items():
            unknown = np.flatnonzero(rows[stats.levels] < 0)
            if len(unknown):
                level = stored_levels[unknown[0]].decode(errors="replace")
                raise self._reader.error(
                    int(sample_ids[unknown[0]]), f"a tile of level {level!r}, but no statistics of {name}_{level}"
                )
        return {name: rows[stats.levels] for name, stats in self.statistics.items()}

    def _room(self, num: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Tensors [N, C, H, H] for the values and the valid flags of the pixel modalities, in memory of their own."""
        size, forms = self._img_size_px, []
        for name in self.maps:
            shape = (num, self._entries[name].shape[0], size, size)
            forms += [(shape, np.float32 if name in self.statistics else np.int64), (shape, np.bool_)]
        tensors = self._slabs.take(forms)
        return dict(zip(self.maps, tensors[::2], strict=True)), dict(zip(self.maps, tensors[1::2], strict=True))

    def _fill_maps(self, stored: StoredSamples, views: np.ndarray, levels, values, valid) -> None:
        values, valid = ({name: tensor.numpy() for name, tensor in part.items()} for part in (values, valid))
        for first in range(0, len(views), CHUNK_SIZE):
            part = slice(first, min(first + CHUNK_SIZE, len(views)))
            for name, maps in self.maps.items():
                members = self._members(self._entries[name], part.stop - first)
                stored.decompress(self._entries[name], first, members)
                rows = levels.get(name)
                maps.fill(members, views[part], None if rows is None else rows[part], values[name][part], valid[name][part])

    def _members(self, entry: PixelEntry, num: int) -> np.ndarray:
        """This thread's room for `num` decompressed members of a modality: uint8 [num, B]."""
        if not hasattr(self._local, "bytes"):
            self._local.bytes = np.empty(CHUNK_SIZE * max(self._entries[name].stored_bytes for name in self.maps), np.uint8)
        return self._local.bytes[: num * entry.stored_bytes].reshape(num, entry.stored_bytes)

    def _tile(self, name: str, raw: np.ndarray, levels: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        if MODALITIES[name].kind == "categorical":
            ids = np.maximum(raw.astype(np.int64), -1)
            return ids, ids >= 0
        valid = self.no_data[name].valid(raw)
        mean, std = self.statistics[name].mean[levels[name]], self.statistics[name].std[levels[name]]
        clean = np.where(valid, raw, 0).astype(np.float32)
        return np.where(valid, (clean - mean) / std, np.float32(0)), valid


@dataclass(frozen=True)
class _Statistics:
    """Mean and std of a modality by product level: float32 [L, C], rows as `levels`."""

    levels: tuple[bytes, ...]
    mean: np.ndarray
    std: np.ndarray
