"""The tiles that every case of the loader benchmark loads, and the one transform that all other projects' loaders share.

The real tiles are repeated, whole set after whole set, as an MMEarth folder of its own: repeat 7 of tile X has the id `X-7`.
Chunks are copied as they are, so nothing is compressed anew. Equal tiles lie a whole set (about 100 MB) apart, farther than
any codec here looks back.

Shapes: C bands, P tile side and H image side in pixels.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mpmae.loader import Augmentation
from mpmae.loader.transform import draw_views
from mpmae.modalities import MODALITIES, PRODUCT_LEVELS, TARGETS, NoData, class_lookup
from mpmae.shard_codecs import pack_one_hot
from mpmae.shard_format import BandStats, Manifest
from mpmae.shard_tools.source import MMEarthSource

PIXELS = tuple(name for name in TARGETS if MODALITIES[name].scope == "pixel")
VECTORS = tuple(n for n in TARGETS if MODALITIES[n].scope == "tile" and MODALITIES[n].kind == "continuous")
ONE_HOT = tuple(name for name in TARGETS if MODALITIES[name].one_hot)

Tile = dict[str, np.ndarray]


def replicate(source: Path, folder: Path, repeats: int, name: str = "tiles") -> None:
    """Write `source` `repeats` times over as the MMEarth folder `folder`: targets only, all tiles in the split `train`."""
    folder.mkdir(parents=True)
    info = json.loads((source / f"{source.name}_tile_info.json").read_text())
    with h5py.File(source / f"{source.name}.h5") as old, h5py.File(folder / f"{name}.h5", "w", libver="latest") as new:
        num_tiles = len(old["metadata"])
        for key in TARGETS:
            _repeat_chunks(old[key], new, key, repeats)
        metadata = np.tile(old["metadata"][:], repeats)
        ids = [f"{row['tile_id'].decode()}-{i // num_tiles}" for i, row in enumerate(metadata)]
        metadata["tile_id"] = ids
        new.create_dataset("metadata", data=metadata, chunks=(1,), compression="gzip", compression_opts=4)
    side_files: dict[str, Any] = {
        "splits": {"train": list(range(len(ids)))},
        "tile_info": {tile_id: info[tile_id.rpartition("-")[0]] for tile_id in ids},
        "band_stats": json.loads((source / f"{source.name}_band_stats.json").read_text()),
    }
    for kind, content in side_files.items():
        (folder / f"{name}_{kind}.json").write_text(json.dumps(content))


def _repeat_chunks(old: h5py.Dataset, new: h5py.File, key: str, repeats: int) -> None:
    copy = new.create_dataset(
        key,
        shape=(len(old) * repeats, *old.shape[1:]),
        dtype=old.dtype,
        chunks=old.chunks,
        compression=old.compression,
        compression_opts=old.compression_opts,
        shuffle=old.shuffle,
    )
    zeros = (0,) * (old.ndim - 1)
    for row in range(len(old)):
        filters, data = old.id.read_direct_chunk((row, *zeros))
        for i in range(repeats):
            copy.id.write_direct_chunk((i * len(old) + row, *zeros), data, filters)


def peer_tile(values: Tile, product_level: str, row: int) -> Tile:
    """A tile as the other formats store it: pixel arrays, `vectors` float32 [18] and `ids` int64 [4] (biome, eco-region,
    product level, row).
    """
    classes = [pack_one_hot(values[name]) for name in ONE_HOT]
    return {
        **{name: values[name] for name in PIXELS},
        "vectors": np.concatenate([values[name] for name in VECTORS]),
        "ids": np.array([*classes, PRODUCT_LEVELS.index(product_level), row], np.int64),
    }


def peer_tiles(source: Path, repeats: int) -> Iterator[Tile]:
    """Every tile of the repeated set by row, decoded once."""
    with MMEarthSource(source, TARGETS) as opened:
        tiles = [
            peer_tile(tile.values, tile.product_level.decode(), tile.row)
            for tile in map(opened.read_tile, range(opened.num_tiles))
        ]
    for i in range(repeats):
        for tile in tiles:
            ids = tile["ids"].copy()
            ids[3] += i * len(tiles)
            yield {**tile, "ids": ids}


def decoded_bytes(source: Path) -> int:
    """Bytes of the twelve modalities of one tile as stored without a codec (one-hot rows as class ids)."""
    tile = next(peer_tiles(source, 1))
    return sum(array.nbytes for array in tile.values())


def epoch_zero_views(seed: int, num_samples: int, tile_size_px: int, img_size_px: int) -> np.ndarray:
    """What our loaders draw for each sample in epoch 0: int64 [num_samples, 4], top, left, hflip, vflip."""
    views = draw_views(Augmentation(), seed, 0, np.arange(num_samples), tile_size_px, img_size_px)
    return np.stack([views.top, views.left, views.hflip, views.vflip], axis=1)


class Transform:
    """Crop, flips, normalisation and class ids of one tile, in numpy: what every other loader's worker calls per sample.

    manifest: of the same tiles, for statistics and no-data rules. views: per row, crop offsets and flips to use instead of
    random ones, int64 [num_tiles, 4] (see `epoch_zero_views`).
    """

    def __init__(self, manifest: Manifest, img_size_px: int, views: np.ndarray | None = None):
        entries = {entry.name: entry for entry in (*manifest.pixels, *manifest.scalars)}
        self._rules = {name: entry.no_data for name, entry in entries.items()}
        self._lengths = [entries[name].length for name in VECTORS]
        self._slack = manifest.tile_size_px - img_size_px
        self._size, self._views = img_size_px, views
        self._stats, self._lookup = {}, {}
        for name in PIXELS:
            if MODALITIES[name].kind == "categorical":
                self._lookup[name] = class_lookup(MODALITIES[name]).astype(np.int64)
                continue
            for level in range(len(PRODUCT_LEVELS)):
                self._stats[name, level] = self._mean_std(manifest.band_stats, [name], level, (-1, 1, 1))
        self._vector_stats = self._mean_std(manifest.band_stats, VECTORS, 0, (-1,))

    @staticmethod
    def _mean_std(
        stats: Mapping[str, BandStats], names: Sequence[str], level: int, shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and std float32 of the names' bands one after the other; None where the set has none for the level."""
        keys = [f"{name}_{PRODUCT_LEVELS[level]}" if name == "sentinel2" else name for name in names]
        if any(key not in stats for key in keys):
            return None
        mean, std = (np.concatenate([getattr(stats[key], part) for key in keys]) for part in ("mean", "std"))
        return mean.astype(np.float32).reshape(shape), std.astype(np.float32).reshape(shape)

    def __call__(self, tile: Tile) -> dict[str, Any]:
        """{"row": int, "values": {modality: array}, "valid": {modality: bool array}}, as in `mpmae.loader.Batch`."""
        biome, eco_region, level, row = tile["ids"].tolist()
        top, left, hflip, vflip = self._draw() if self._views is None else self._views[row]
        rows, columns = slice(top, top + self._size), slice(left, left + self._size)
        values, valid = {}, {}
        for name in PIXELS:
            # A contiguous copy first: the arithmetic on a flipped view costs more than the copy.
            raw = np.ascontiguousarray(tile[name][:, rows, columns][:, :: -1 if vflip else 1, :: -1 if hflip else 1])
            if name in self._lookup:
                values[name] = np.take(self._lookup[name], raw)
                valid[name] = values[name] >= 0
            else:
                values[name], valid[name] = self._normalised(raw, self._rules[name], self._stats[name, level])
        vectors, is_valid = self._normalised(tile["vectors"], self._rules[VECTORS[0]], self._vector_stats)
        start = 0
        for name, length in zip(VECTORS, self._lengths, strict=True):
            values[name], valid[name] = vectors[start : start + length], is_valid[start : start + length]
            start += length
        for name, class_id in zip(ONE_HOT, (biome, eco_region), strict=True):
            values[name], valid[name] = np.int64(max(class_id, -1)), np.bool_(class_id >= 0)
        return {"row": row, "values": values, "valid": valid}

    def _draw(self) -> tuple[int, int, int, int]:
        draw = random.randrange
        return draw(self._slack + 1), draw(self._slack + 1), draw(2), draw(2)

    @staticmethod
    def _normalised(raw: np.ndarray, rule: NoData, stats: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        valid = rule.valid(raw)
        values = raw.astype(np.float32)
        values -= stats[0]
        values /= stats[1]
        values[~valid] = 0
        return values, valid
