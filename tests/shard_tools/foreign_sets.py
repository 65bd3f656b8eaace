"""Small sets in other people's formats, written with the real libraries."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import zarr

S2_NAMES = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"]
# 2020-05-03 06:10 UTC: at longitude 10 a local morning, so a descending Sentinel-1 pass.
MORNING_NS = int(np.datetime64("2020-05-03T06:10:00", "ns").astype(np.int64))
EVENING_NS = MORNING_NS + 11 * 3_600 * 10**9


def zarr_zip(path: Path, arrays: Mapping[str, np.ndarray], zarr_format: int = 2, attributes=None, chunks=None) -> bytes:
    """Write a zipped group of `arrays`; its bytes. attributes, chunks: by array."""
    store = zarr.storage.ZipStore(path, mode="w")
    group = zarr.open_group(store, mode="w", zarr_format=zarr_format)
    for name, values in arrays.items():
        values = np.asarray(values)
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(chunks or {}).get(name, values.shape or "auto"),
            attributes=(attributes or {}).get(name, {}),
        )
        array[...] = values
    store.close()
    return path.read_bytes()


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def smooth(rng: np.random.Generator, *shape: int, high: int = 3000) -> np.ndarray:
    return rng.integers(1, high, shape)


def sample_arrays(bands: np.ndarray, names: list[str] | None, time_ns, lat: float = 45.0, lon: float = 10.0) -> dict:
    arrays = {"bands": bands, "center_lat": np.float64(lat), "center_lon": np.float64(lon)}
    arrays["time"] = np.atleast_1d(np.asarray(time_ns, np.int64))
    if names:
        arrays["band"] = np.array(names)
    return arrays


class TarSet:
    """A TerraMesh-like set under `root`: what went in, by (key, layer), and the tars."""

    def __init__(self, root: Path, scratch: Path, size_px: int = 24, times: int = 1, zarr_format: int = 2):
        self.root, self.scratch, self.size_px, self.times, self.zarr_format = root, scratch, size_px, times, zarr_format
        self.rng = np.random.default_rng(0)
        self.values: dict[tuple[str, str], np.ndarray] = {}

    def bands(self, layer: str) -> tuple[np.ndarray, list[str]]:
        t, p, rng = self.times, self.size_px, self.rng
        if layer == "S2L2A":
            return smooth(rng, t, 12, p, p).astype(np.int16), S2_NAMES
        if layer == "S2L1C":
            return smooth(rng, t, 13, p, p).astype(np.int16), [*S2_NAMES[:10], "B10", *S2_NAMES[10:]]
        if layer in ("S1GRD", "S1RTC"):
            return rng.normal(-15, 4, (t, 2, p, p)).astype(np.float16), ["vv", "vh"]
        if layer == "DEM":
            return smooth(rng, 1, 1, p, p).astype(np.int16), ["DEM"]
        if layer == "NDVI":
            return rng.uniform(-1, 1, (t, 1, p, p)).astype(np.float32), ["NDVI"]
        if layer == "LULC":
            return rng.integers(0, 10, (1, 1, p, p)).astype(np.uint8), ["lulc"]
        return smooth(rng, t, 3, p, p, high=255).astype(np.uint8), ["red", "green", "blue"]

    def shard(self, split: str, shard: str, layers: Mapping[str, list[str]], time_ns=None, **attributes) -> None:
        """One tar per layer with the given keys."""
        times = np.full(self.times, MORNING_NS) if time_ns is None else np.asarray(time_ns)
        for layer, keys in layers.items():
            members = {}
            for key in keys:
                bands, names = self.bands(layer)
                self.values[key, layer] = bands
                arrays = sample_arrays(bands, names, [0] if layer == "DEM" else times)
                data = zarr_zip(self.scratch / "one.zarr.zip", arrays, self.zarr_format, {"bands": attributes})
                members[f"{key}.zarr.zip"] = data
            write_tar(self.root / split / layer / f"{shard}.tar", members)


def rows_by_id(source) -> dict[str, int]:
    return {source.read_tile(row, ["sentinel2"]).tile_id.decode(): row for row in range(source.num_tiles)}


def geotiff(
    path: Path | None,
    values: np.ndarray,
    descriptions=(),
    nodata: float | None = None,
    taken: str = "",
    pixel_m: float = 10.0,
    crs: str | None = "EPSG:32632",
) -> bytes:
    """A GeoTIFF of `values` [F, H, W] in UTM zone 32, upper left corner at longitude 9, latitude 45.15."""
    import rasterio
    from rasterio.io import MemoryFile
    from rasterio.transform import from_origin

    profile = {
        "driver": "GTiff",
        "height": values.shape[1],
        "width": values.shape[2],
        "count": len(values),
        "dtype": values.dtype.name,
        "nodata": nodata,
        "compress": "deflate",
        "crs": rasterio.crs.CRS.from_string(crs) if crs else None,
        "transform": from_origin(500_000, 5_000_000, pixel_m, pixel_m),
    }
    with MemoryFile() as memory:
        with memory.open(**profile) as file:
            file.write(values)
            for i, text in enumerate(descriptions, 1):
                file.set_band_description(i, text)
            if taken:
                file.update_tags(TIFFTAG_DATETIME=taken)
        data = bytes(memory.getbuffer())
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return data
