"""A synthetic dataset in MMEarth's layout: the same files, dataset names, dtypes, no-data codes and chunks.

Every modality of a tile shows the same landscape (`synth_scene`), so a model can learn one from another. Each tile is a pure
function of the seed and its number. As in the real data, some tiles lack a Sentinel-1 orbit, heights, canopy or climate.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from mpmae.counter_rng import Stream, random_bits
from mpmae.errors import SourceError
from mpmae.files import TEMP_SUFFIX, write_whole
from mpmae.modalities import MODALITIES, no_data_rule
from mpmae.shard_tools import synth_scene as scenes
from mpmae.shard_tools.output import disk_errors
from mpmae.shard_tools.progress import track
from mpmae.shard_tools.source_checks import JSON_KINDS, examples
from mpmae.shard_tools.stats import StatsPass
from mpmae.shard_tools.synth_climate import Climate, draw_climate
from mpmae.shard_tools.tile import Tile

DTYPES = {
    "sentinel2": "u2",
    "sentinel2_cloudmask": "u2",
    "sentinel2_cloudprod": "u2",
    "sentinel2_scl": "u1",
    "sentinel1": "f4",
    "aster": "i2",
    "dynamic_world": "u1",
    "canopy_height_eth": "i1",
    "esa_worldcover": "u1",
    "era5": "f4",
    "lat": "f4",
    "lon": "f4",
    "month": "f4",
    "biome": "u1",
    "eco_region": "u2",
}
METADATA_DTYPE = np.dtype([("tile_id", "S100"), ("S2_type", "S10")])
SPLITS = ("train", "val", "test")
SIZE_STEP_PX = 4
PARTIAL_SUFFIX = ".partial"
GZIP_LEVEL = 4


def synth(
    output_dir: str | Path,
    *,
    num_tiles: int = 512,
    tile_size_px: int = 64,
    seed: int = 0,
    split_fractions: Sequence[float] = (0.8, 0.1, 0.1),
    progress: bool = True,
) -> Path:
    """Write a synthetic MMEarth folder; its path is returned.

    split_fractions: shares of train, val and test. The band statistics are those of train. Raises SourceError for options
    that cannot be and for a folder that is not empty, ShardError for a failed write. The folder gets its name when it is
    complete; until then it is NAME.partial beside it, of which the next call removes what an interrupted one left.
    """
    output_dir = Path(output_dir)
    target, name = output_dir.resolve(), output_dir.absolute().name
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    _check_options(output_dir, num_tiles, tile_size_px, seed, split_fractions)
    _check_partial(partial, name)
    splits = _splits(num_tiles, seed, split_fractions)
    with disk_errors(str(output_dir), partial.parent):
        _remove(partial)
        partial.mkdir(parents=True)
        try:
            tile_info, stats = _write_h5(
                partial / f"{name}.h5", num_tiles, tile_size_px, seed, set(splits["train"]), progress
            )
            for kind, content in (("splits", splits), ("tile_info", tile_info), ("band_stats", stats)):
                write_whole(partial / f"{name}_{kind}.json", json.dumps(content).encode())
            partial.replace(target)
        finally:
            _remove(partial)
    return output_dir


def _check_partial(partial: Path, name: str) -> None:
    """SourceError unless `partial` is absent or holds nothing but what an interrupted call can have left."""
    if not partial.exists():
        return
    own = {f"{name}.h5", *(f"{name}_{kind}.json{end}" for kind in JSON_KINDS for end in ("", TEMP_SUFFIX))}
    foreign = sorted({path.name for path in partial.iterdir()} - own) if partial.is_dir() else [partial.name]
    if foreign:
        raise SourceError(
            f"{partial} is where the folder is written first, but holds other files ({examples(foreign)}); "
            "move them or give another folder"
        )


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _check_options(output_dir: Path, num_tiles: int, tile_size_px: int, seed: int, fractions: Sequence[float]) -> None:
    problems = []
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        problems.append(f"{output_dir} exists and is not an empty folder; give another folder or remove it")
    elif output_dir.is_mount():
        problems.append(
            f"{output_dir} is a mount point, which cannot be replaced by the finished folder; give one inside it"
        )
    if num_tiles < 1:
        problems.append(f"num_tiles {num_tiles}; expected at least 1")
    if tile_size_px < 16 or tile_size_px % SIZE_STEP_PX:
        problems.append(f"tile_size_px {tile_size_px}; expected a multiple of {SIZE_STEP_PX}, at least 16")
    if seed < 0:
        problems.append(f"seed {seed}; expected at least 0")
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        problems.append(f"split_fractions {tuple(fractions)}; expected {len(SPLITS)} shares ({', '.join(SPLITS)}) of sum 1")
    if problems:
        raise SourceError(problems)


def _splits(num_tiles: int, seed: int, fractions: Sequence[float]) -> dict[str, list[int]]:
    order = np.argsort(random_bits(seed, Stream.SYNTH, 0, np.arange(num_tiles))[:, 0], kind="stable")
    ends = np.rint(np.cumsum(fractions) * num_tiles).astype(int)
    return {split: np.sort(rows).tolist() for split, rows in zip(SPLITS, np.split(order, ends[:-1]), strict=True)}


def _write_h5(
    path: Path, num_tiles: int, size_px: int, seed: int, train_rows: set[int], progress: bool
) -> tuple[dict[str, dict], dict[str, dict]]:
    """Writes all tiles; the contents of tile_info.json and, over `train_rows`, of band_stats.json are returned."""
    tile_info = {}
    stats = StatsPass({name: no_data_rule(name, dtype) for name, dtype in DTYPES.items()})
    with h5py.File(path, "w") as file:
        datasets = {}
        for name, dtype in DTYPES.items():
            spec = MODALITIES[name]
            shape = (spec.num_channels, size_px, size_px) if spec.scope == "pixel" else (spec.num_channels,)
            if spec.scope == "pixel" and spec.kind == "categorical":
                shape = (1, size_px, size_px)
            datasets[name] = file.create_dataset(
                name, (num_tiles, *shape), dtype, chunks=(1, *shape), compression="gzip", compression_opts=GZIP_LEVEL
            )
        records = np.zeros(num_tiles, METADATA_DTYPE)
        for tile in track(range(num_tiles), num_tiles, "synth", enabled=progress):
            rng = np.random.Generator(np.random.Philox(key=np.array([seed, tile], np.uint64)))
            climate = draw_climate(rng)
            level = "l2a" if rng.random() < 0.55 else "l1c"
            values = _tile(rng, climate, level, size_px)
            for name, dataset in datasets.items():
                dataset[tile] = values[name]
            tile_id = f"synth_{tile:08d}"
            records[tile] = (tile_id.encode(), level.encode())
            tile_info[tile_id] = _info(climate, level)
            if tile in train_rows:
                stats.add(Tile(tile, tile_id.encode(), level.encode(), values))
        file.create_dataset(
            "metadata", data=records, chunks=(min(num_tiles, 4096),), compression="gzip", compression_opts=GZIP_LEVEL
        )
    return tile_info, stats.result()


def _absent(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array without data, as MMEarth writes it in the dtype of the modality."""
    dtype = np.dtype(DTYPES[name])
    if dtype.kind == "f":
        return np.full(shape, np.nan if name == "era5" else -np.inf, dtype)
    return np.full(shape, no_data_rule(name, dtype).codes[-1], dtype)


def _tile(rng: np.random.Generator, climate: Climate, level: str, size_px: int) -> dict[str, np.ndarray]:
    scene = scenes.draw_scene(rng, climate, size_px)
    cover, square = scene.land_cover, (size_px, size_px)
    values: dict[str, np.ndarray] = {"sentinel2": scenes.reflectance(rng, scene, climate, level)}
    values["sentinel1"] = _sentinel1(rng, scene, climate, size_px)
    values["aster"] = np.stack([np.rint(scene.height_m), np.rint(scene.slope_deg)]).astype(np.int16)
    values["dynamic_world"] = scenes.DYNAMIC_WORLD_OF[cover][None]
    values["esa_worldcover"] = cover[None].astype(np.uint8)
    height_std_m = 1 + 0.22 * scene.canopy_m + 0.4 * np.abs(scene.texture)
    values["canopy_height_eth"] = np.rint(np.stack([scene.canopy_m, height_std_m])).astype(np.int8)
    # As in the product, built-up areas, snow and water have no canopy height.
    no_canopy = np.isin(cover, (scenes.BUILT, scenes.SNOW, scenes.WATER))
    values["canopy_height_eth"][:, no_canopy] = 127
    values["sentinel2_cloudmask"] = np.zeros((1, *square), np.uint16)
    if level == "l2a":
        bright = np.clip(scene.snow * 8 + np.maximum(scene.texture - 1, 0), 0, 100)
        values["sentinel2_cloudprod"] = np.rint(bright)[None].astype(np.uint16)
        values["sentinel2_scl"] = _scene_classes(scene)[None]

    if rng.random() < 0.05:  # the edge of the swath crosses the tile
        y, x = np.mgrid[:size_px, :size_px] / size_px
        values["sentinel2"][:, x + 0.25 * y < rng.uniform(0.15, 0.5)] = 0
    for name, probability in (
        ("aster", 0.03),
        ("canopy_height_eth", 0.06),
        ("dynamic_world", 0.02),
        ("esa_worldcover", 0.01),
    ):
        if rng.random() < probability:
            values[name] = _absent(name, values[name].shape)
    for name in ("sentinel2_cloudprod", "sentinel2_scl"):
        values.setdefault(name, _absent(name, (1, *square)))

    values["era5"] = climate.era5 if rng.random() >= 0.04 else _absent("era5", climate.era5.shape)
    for name, angle in (
        ("lat", np.radians(climate.lat_deg)),
        ("lon", np.radians(climate.lon_deg)),
        ("month", 2 * np.pi * climate.month / 12),
    ):
        values[name] = np.array([np.sin(angle), np.cos(angle)], np.float32)
    for name, class_id in (("biome", climate.biome), ("eco_region", climate.eco_region)):
        values[name] = (np.arange(MODALITIES[name].num_channels) == class_id).astype(DTYPES[name])
    return values


def _sentinel1(rng: np.random.Generator, scene: scenes.Scene, climate: Climate, size_px: int) -> np.ndarray:
    """Both orbits or one of them, at times none; near the poles some passes are in HH and HV."""
    bands = np.full((8, size_px, size_px), -np.inf, np.float32)
    orbits = rng.choice(4, p=[0.06, 0.2, 0.2, 0.54])
    for i, ascending in enumerate((True, False)):
        if orbits >> i & 1:
            polar = abs(climate.lat_deg) > 58 and rng.random() < 0.4
            first = 4 * i + (2 if polar else 0)
            bands[first : first + 2] = scenes.backscatter(rng, scene, ascending)
    return bands


def _scene_classes(scene: scenes.Scene) -> np.ndarray:
    """Classes of the Sentinel-2 scene classification: 4 plants, 5 bare, 6 water, 11 snow."""
    bare = np.isin(scene.land_cover, (scenes.BARE, scenes.BUILT)) | (scene.dry > 0.7)
    classes = np.where(bare, 5, np.where(scene.land_cover == scenes.WATER, 6, 4))
    return np.where(scene.snow > 0.5, 11, classes).astype(np.uint8)


def _info(climate: Climate, level: str) -> dict:
    era5 = [round(float(value), 4) for value in climate.era5]
    return {
        "S2_type": level,
        "S2_DATE": f"{climate.year}-{climate.month:02d}-{climate.day:02d}",
        "CRS": f"EPSG:{(32600 if climate.lat_deg >= 0 else 32700) + int((climate.lon_deg + 180) // 6) % 60 + 1}",
        "lat": climate.lat_deg,
        "lon": climate.lon_deg,
        "biome": climate.biome,
        "eco_region": climate.eco_region,
        "BANDS": {name: list(MODALITIES[name].bands) for name in ("sentinel2", "sentinel1", "aster", "era5")},
        "era5": {"month1": era5[:4], "month2": era5[4:8], "year": era5[8:]},
    }
