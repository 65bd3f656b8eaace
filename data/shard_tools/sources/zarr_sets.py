"""Sets of zipped zarr samples under SPLIT/LAYER/: what TerraMesh and SSL4EO-S12 share.

A sample has `bands` [T, F, H, W] (or [F, H, W]), names in `band`, one place in `center_lat` and `center_lon` (degrees) and T
times in `time` (DEM: 0). Sentinel-1 comes in dB, one pass per time; whether it ascends follows from its time.

Shapes: T times of a sample, F bands of the file, H x W image in pixels.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mpmae.errors import SourceError
from mpmae.shard_tools.source_checks import examples
from mpmae.shard_tools.sources.foreign import UnreadableError
from mpmae.shard_tools.sources.image_source import Cut, Images, ImageSource, Place, offset_place, seeded_splits
from mpmae.shard_tools.sources.layers import RADAR, Layer, make_layer, orbit_of
from mpmae.shard_tools.sources.lru import ByteLru
from mpmae.shard_tools.sources.options import Options, product_level
from mpmae.shard_tools.sources.zarr_zip import ZarrZip

CACHE_BYTES = 256 * 10**6
_HOUR_NS = 3_600 * 10**9
# DEM layers have the time 0; no real one is within a second of 1970.
_NO_TIME_NS = 10**9
_FOLDERS = {
    "S1GRD": "sentinel1",
    "S1RTC": "sentinel1_rtc",
    "DEM": "dem",
    "NDVI": "ndvi",
    "LULC": "lulc",
    "S2RGB": "sentinel2_rgb",
}


@dataclass(frozen=True)
class ZarrOptions:
    """What a user may say of such a set; every format of this kind takes the same options.

    tile_size_px: None cuts nothing. modalities: None takes all there are. orbit: "time" finds the pass of each radar image
    from its time; "asc" or "desc" puts all of them into that pass. join: "inner" keeps the samples that every layer of their
    shard has, "sentinel2" keeps all that have Sentinel-2.
    """

    tile_size_px: int | None
    modalities: tuple[str, ...] | None
    sentinel2: str
    orbit: str
    join: str
    val_fraction: float
    split_seed: int

    @classmethod
    def read(cls, format_name: str, given: Mapping[str, str]) -> "ZarrOptions":
        """Checked options; SourceError with every problem."""
        options = Options(format_name, given)
        read = cls(
            tile_size_px=options.whole("tile_size_px", None, 1),
            modalities=options.names("modalities"),
            sentinel2=product_level(options),
            orbit=options.choice("orbit", ("time", "asc", "desc")),
            join=options.choice("join", ("inner", "sentinel2")),
            val_fraction=options.fraction("val_fraction", 0.1),
            split_seed=options.whole("split_seed", 0, 0),
        )
        options.check()
        return read


@dataclass(frozen=True)
class Folders:
    """The layer folders of a set: per split, the folder of each modality. A set without split folders has the split ""."""

    by_split: dict[str, dict[str, Path]]
    modalities: tuple[str, ...]


def find_folders(path: Path, options: ZarrOptions, what: str) -> Folders:
    """The folders that `path` holds; SourceError saying what is there instead."""
    names = _FOLDERS | {f"S2{options.sentinel2.upper()}": "sentinel2"}
    if not path.is_dir():
        raise SourceError(f"{path} {'is a file' if path.exists() else 'does not exist'}; give the folder of {what}")

    def layers(folder: Path) -> dict[str, Path]:
        return {name: folder / sub for sub, name in names.items() if (folder / sub).is_dir()}

    splits = {sub.name: layers(sub) for sub in sorted(path.iterdir()) if sub.is_dir()}
    splits = {split: found for split, found in splits.items() if found}
    if layers(path):
        splits = {"": layers(path)}
    if not splits:
        raise SourceError(
            f"{path} is not {what}: expected SPLIT/LAYER folders such as train/S2{options.sentinel2.upper()}, found "
            f"{examples(sorted(p.name for p in path.iterdir())) or 'nothing'}"
        )
    there = {name for found in splits.values() for name in found}
    wanted = there if options.modalities is None else set(options.modalities)
    problems = [f"{path}: no layer for {name!r}; it has {', '.join(sorted(there))}" for name in sorted(wanted - there)]
    problems += [
        f"{path / split} has no S2{options.sentinel2.upper()}, which every tile must have"
        for split, found in splits.items()
        if "sentinel2" not in found
    ]
    if "sentinel2" not in wanted:
        problems.append(f"option modalities={','.join(sorted(wanted))} lacks sentinel2, which every tile must have")
    if problems:
        raise SourceError(problems)
    kept = {split: {n: p for n, p in found.items() if n in wanted} for split, found in splits.items()}
    return Folders(kept, tuple(sorted(wanted)))


@dataclass(frozen=True)
class Sample:
    """One layer of one place: values [T, F, H, W], the file's absent value, place in degrees, times int64 [T] in ns."""

    values: np.ndarray
    fill: float | None
    lat_deg: float
    lon_deg: float
    times_ns: np.ndarray

    @property
    def size_px(self) -> tuple[int, int]:
        """(H, W)."""
        return self.values.shape[2], self.values.shape[3]

    def time_ns(self, moment: int) -> int | None:
        """When it was taken; None where the file does not say. A layer of one time has that at every moment."""
        if not len(self.times_ns):
            return None
        time = int(self.times_ns[min(moment, len(self.times_ns) - 1)])
        return time if time >= _NO_TIME_NS else None

    def at(self, moment: int) -> np.ndarray:
        """The values [F, H, W] of a moment."""
        if len(self.values) != 1 and moment >= len(self.values):
            raise UnreadableError(f"{len(self.values)} times, expected more than {moment}")
        return self.values[min(moment, len(self.values) - 1)]


def read_sample(archive: ZarrZip) -> Sample:
    """The sample of a zip that holds one place. Raises UnreadableError."""
    values = archive.read("bands")
    if values.ndim == 3:
        values = values[None]
    if values.ndim != 4:
        raise UnreadableError(f"bands of shape {values.shape}, expected (times, bands, height, width)")
    lat, lon = (float(archive.read(n).ravel()[0]) if n in archive else np.nan for n in ("center_lat", "center_lon"))
    times = archive.times_ns("time").ravel() if "time" in archive else np.zeros(0, np.int64)
    return Sample(values, archive.fill("bands"), lat, lon, times)


class ZarrSource(ImageSource):
    """Tiles of zipped zarr samples; subclasses give `_load`, the layer of a place as a `Sample`."""

    def __init__(
        self,
        path: Path,
        images: Images,
        layers: Mapping[str, Layer],
        options: ZarrOptions,
        content: object,
        has_place: bool,
        notes: Sequence[str],
    ):
        self._orbit = options.orbit
        self._cache = ByteLru(CACHE_BYTES)
        height, width = map(int, images.sizes_px[0])
        super().__init__(
            path,
            images=images,
            layers=layers,
            tile_size_px=options.tile_size_px or _whole_image(path, height, width),
            product_level=options.sentinel2,
            content=[asdict(options), content],
            has_place=has_place,
            notes=notes,
        )
        self._size_px = height, width

    def close(self) -> None:
        """Let go of what was read last."""
        self._cache.clear()

    def _read(self, name: str, cut: Cut) -> np.ndarray | None:
        sample = self._sample(name, cut)
        if sample is None:
            return None
        rows, columns = slice(cut.top, cut.top + cut.side), slice(cut.left, cut.left + cut.side)
        orbit = self._pass_of(sample, cut.moment) if name in RADAR and self._orbit == "time" else ""
        try:
            return self._layers[name].convert(sample.at(cut.moment)[:, rows, columns], (sample.fill,), orbit)
        except ValueError as error:
            raise UnreadableError(str(error)) from error

    def _place(self, cut: Cut) -> Place:
        sample = self._sample("sentinel2", cut)
        time = sample.time_ns(cut.moment)
        month = None if time is None else np.datetime64(time, "ns").astype("datetime64[M]").astype(int) % 12 + 1
        return offset_place(Place(sample.lat_deg, sample.lon_deg, month), cut, *sample.size_px)

    def _pass_of(self, sample: Sample, moment: int) -> str:
        time = sample.time_ns(moment)
        if time is None or not np.isfinite(sample.lon_deg):
            raise UnreadableError("no time or place, so its pass is not known; give the option orbit=asc or orbit=desc")
        return orbit_of(time / _HOUR_NS % 24, sample.lon_deg)

    def _sample(self, name: str, cut: Cut) -> Sample | None:
        sample = self._load(name, cut)
        if sample is not None and sample.size_px != self._size_px:
            sizes = [f"{h} x {w}" for h, w in (sample.size_px, self._size_px)]
            raise UnreadableError(f"an image of {sizes[0]} px, expected {sizes[1]} as in the set's first")
        return sample

    @abstractmethod
    def _load(self, name: str, cut: Cut) -> Sample | None:
        """The image of modality `name` that a tile is cut from; None where the set has none. Raises UnreadableError."""


def probe_layer(
    where: str, name: str, file_bands: Sequence[str] | None, num_file_bands: int, dtype: np.dtype, options: ZarrOptions
) -> Layer:
    """The layer of a modality from its first file; SourceError for bands or a dtype that are not known."""
    orbit = "" if options.orbit == "time" else options.orbit
    try:
        return make_layer(name, file_bands, num_file_bands, dtype, orbit)
    except ValueError as error:
        raise SourceError(f"{where}, {name}: {error}") from error


def splits_of(names: Sequence[str], keys: np.ndarray, split_of: np.ndarray, options: ZarrOptions):
    """Split names and, per image, its index there: the set's own folders, or a seeded share of the places."""
    if list(names) != [""]:
        return tuple(names), split_of
    return seeded_splits(keys, options.val_fraction, options.split_seed)


def _whole_image(path: Path, height: int, width: int) -> int:
    if height != width:
        raise SourceError(f"{path}: images of {height} x {width} px are not square; give the option tile_size_px")
    return height
