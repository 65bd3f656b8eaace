"""GeoTIFFs from files or bytes: header, windows on the 10 m grid, places: the one module that imports rasterio.

GDAL does not compare the checksums of compressed blocks: a file that is cut off is found, bytes changed within may not be.

Shapes: F bands of the file, H x W its image in pixels.
"""

from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpmae.shard_tools.sources.foreign import UnreadableError, missing_package, said


@dataclass(frozen=True)
class Header:
    """What a GeoTIFF says of itself.

    bands: descriptions, "" where it has none. fills: per band the no-data value. crs: as WKT, None without georeference.
    transform: (a, b, c, d, e, f) with x = a column + b row + c and y = d column + e row + f. taken: TIFFTAG_DATETIME, such
    as "2020:05:03 06:10:00".
    """

    size_px: tuple[int, int]
    dtype: np.dtype
    bands: tuple[str, ...]
    fills: tuple[float | None, ...]
    crs: str | None
    transform: tuple[float, ...]
    taken: str

    def place(self, row: float, column: float, height_px: int, width_px: int) -> tuple[float, float]:
        """Latitude and longitude (degrees) of a point in pixels of a grid of height_px x width_px; NaN without a CRS."""
        if self.crs is None:
            return np.nan, np.nan
        row, column = row * self.size_px[0] / height_px, column * self.size_px[1] / width_px
        a, b, c, d, e, f = self.transform
        x, y = a * column + b * row + c, d * column + e * row + f
        rasterio = _rasterio()
        try:
            lon, lat = rasterio.warp.transform(self.crs, "EPSG:4326", [x], [y])
        except Exception as error:  # a CRS that PROJ does not know fails inside GDAL
            raise UnreadableError(f"its place cannot be found ({said(error)})") from error
        return lat[0], lon[0]


def read_header(data: Path | bytes) -> Header:
    """The header of a GeoTIFF. Raises UnreadableError."""
    with _opened(data) as file:
        return Header(
            size_px=(file.height, file.width),
            dtype=np.dtype(file.dtypes[0]),
            bands=tuple(text or "" for text in file.descriptions),
            fills=tuple(file.nodatavals),
            crs=file.crs.to_wkt() if file.crs is not None else None,
            transform=tuple(file.transform)[:6],
            taken=file.tags().get("TIFFTAG_DATETIME", ""),
        )


def read_window(
    data: Path | bytes, top: int, left: int, side: int, grid_px: tuple[int, int], bands: Sequence[int] | None = None
) -> tuple[np.ndarray, tuple[float | None, ...]]:
    """A square [F, side, side] of an image on a grid of `grid_px`, and the no-data value of each band.

    bands: positions to read (None: all). An image of fewer pixels is brought to the grid by repeating them (nearest
    neighbour), which its size must divide. Only the window's blocks are decoded. Raises UnreadableError.
    """
    with _opened(data) as file:
        (height, width), ratio = (file.height, file.width), grid_px[0] // max(file.height, 1)
        if not ratio or (height * ratio, width * ratio) != tuple(grid_px):
            raise UnreadableError(
                f"an image of {height} x {width} px, expected {grid_px[0]} x {grid_px[1]} or that divided by a whole number"
            )
        first_row, first_column = top // ratio, left // ratio
        num_rows = -(-(top + side) // ratio) - first_row
        num_columns = -(-(left + side) // ratio) - first_column
        window = _rasterio().windows.Window(first_column, first_row, num_columns, num_rows)
        indexes = list(range(1, file.count + 1)) if bands is None else [band + 1 for band in bands]
        values = file.read(indexes=indexes, window=window)
        fills = tuple(file.nodatavals[index - 1] for index in indexes)
    values = values.repeat(ratio, axis=1).repeat(ratio, axis=2) if ratio > 1 else values
    row, column = top - first_row * ratio, left - first_column * ratio
    return values[:, row : row + side, column : column + side], fills


def read_image(data: Path | bytes) -> tuple[np.ndarray, tuple[float | None, ...]]:
    """All bands [F, H, W] at their own size, and the no-data value of each. Raises UnreadableError."""
    with _opened(data) as file:
        return file.read(), tuple(file.nodatavals)


@contextmanager
def _opened(data: Path | bytes):
    rasterio = _rasterio()
    with ExitStack() as stack:
        try:
            if isinstance(data, Path):
                file = stack.enter_context(rasterio.open(data, driver="GTiff"))
            else:
                file = stack.enter_context(rasterio.io.MemoryFile(data)).open(driver="GTiff")
                stack.enter_context(file)
            yield file
        except UnreadableError:
            raise
        except Exception as error:  # GDAL's errors have no common base but this
            raise UnreadableError(f"not a readable GeoTIFF ({said(error)})") from error


def _rasterio():
    try:
        import rasterio
        import rasterio.io
        import rasterio.warp
        import rasterio.windows
    except ImportError as error:
        raise missing_package("rasterio", "reading GeoTIFFs", error) from error
    return rasterio
