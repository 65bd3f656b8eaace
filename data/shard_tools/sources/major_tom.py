"""Major TOM Core: parquet files of grid cells, each band a GeoTIFF in a column.

    Core-S2L2A | Core-S2L1C / *.parquet or images/*.parquet    B01 .. B12 (10, 20, 60 m), product_id, grid_cell
    Core-S1RTC / ...                                           vv, vh (linear gamma nought), product_id, grid_cell
    Core-DEM / ...                                             DEM, grid_cell

A cell is about 1068 px of 10 m a side, so tile_size_px must be given. Bands of 20, 30 or 60 m are brought to the 10 m grid
by repeating pixels. Sentinel-1 is turned into dB. The layers are joined by `grid_cell`; where a layer has several rows of a
cell the first counts. Date and pass come from the product's name, place from the GeoTIFF's CRS.

Sources: `metadata.py`, `sample.py` and `extras/thumbnail_s1rtc.py` of ESA-PhiLab/Major-TOM; Francis and Czerkawski, arXiv
2402.12095. Not checked against a genuine file: the names of the columns follow that code, and that of Core-DEM
(`DEM`) a third party's list.

Shapes: I images (cells), C bands, P tile side in pixels.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpmae.errors import SourceError
from mpmae.shard_tools.source_checks import examples
from mpmae.shard_tools.sources.foreign import UnreadableError, missing_package, said
from mpmae.shard_tools.sources.image_source import Cut, Images, ImageSource, Place, seeded_splits
from mpmae.shard_tools.sources.layers import RADAR, Layer, make_layer, orbit_of
from mpmae.shard_tools.sources.lru import ByteLru
from mpmae.shard_tools.sources.options import Options, product_level
from mpmae.shard_tools.sources.rasters import Header, read_header, read_window

CACHE_BYTES = 256 * 10**6
_LAYERS = {"Core-S1RTC": "sentinel1_rtc", "Core-DEM": "dem"}
_NOT_BANDS = {"product_id", "grid_cell", "timestamp", "thumbnail", "cloud_mask", "compressed"}
_TAKEN = re.compile(r"(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)")


@dataclass(frozen=True)
class Rows:
    """The rows of a layer's parquet files: cells and products as bytes arrays, row group and row in it by file."""

    cells: np.ndarray
    products: np.ndarray
    file: np.ndarray
    group: np.ndarray
    row: np.ndarray


class MajorTomSource(ImageSource):
    """Tiles of Major TOM Core. SourceError with every problem of the files at once.

    Options: tile_size_px (needed), modalities, sentinel2 (l2a or l1c), orbit (time, asc or desc, as in `ZarrOptions`),
    val_fraction and split_seed: cells are drawn for val, so all tiles of one land in one split.
    """

    def __init__(self, path: Path, given: Mapping[str, str]):
        options = Options("major_tom", given)
        tile_size_px, wanted = options.whole("tile_size_px", 0, 1), options.names("modalities")
        level, self._orbit = product_level(options), options.choice("orbit", ("time", "asc", "desc"))
        val_fraction, seed = options.fraction("val_fraction", 0.1), options.whole("split_seed", 0, 0)
        if not tile_size_px:
            options.problems.append("option tile_size_px is missing; a cell of 1068 px is no tile: give for example 128")
        options.check()
        self._files: list[Path] = []
        self._columns: dict[str, tuple[str, ...]] = {}
        rows = {name: self._list(name, files) for name, files in _find(path, level, wanted).items()}
        main = rows["sentinel2"]
        cells = np.unique(main.cells)
        repeated = len(main.cells) - len(cells)
        notes = [f"sentinel2: {repeated} rows of cells that came before; they are left out"] if repeated else []
        self._at = {name: _match(cells, layer) for name, layer in rows.items()}
        self._rows = rows
        for name, at in self._at.items():
            lacking = cells[at < 0]
            if len(lacking):
                told = examples(cell.decode(errors="replace") for cell in lacking[:4])
                notes.append(f"{name}: {len(lacking)} cells have none ({told}); their tiles lack it")
        self._cache = ByteLru(CACHE_BYTES)
        self._size_px, layers = self._probe()
        splits, split_of = seeded_splits(cells, val_fraction, seed)
        super().__init__(
            path,
            images=Images(cells, np.array([self._size_px], np.int64), 1, splits, split_of),
            layers=layers,
            tile_size_px=tile_size_px,
            product_level=level,
            content=[sorted(given.items()), [[str(f.relative_to(path)), f.stat().st_size] for f in self._files]],
            has_place=True,
            notes=notes,
        )

    def close(self) -> None:
        """Let go of what was read last."""
        self._cache.clear()

    def _list(self, name: str, files: list[Path]) -> Rows:
        """The rows of a layer; its band columns go into `_columns`."""
        parts, problems = [], []
        for file in files:
            try:
                parts.append(self._list_file(name, file))
                self._files.append(file)
            except UnreadableError as error:
                problems.append(f"{file}: {error}; download the file again")
        if problems:
            raise SourceError(problems)
        return Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _list_file(self, name: str, file: Path) -> tuple[np.ndarray, ...]:
        with _parquet(file) as table:
            names = table.schema_arrow.names
            columns = tuple(n for n in names if n not in _NOT_BANDS)
            if "grid_cell" not in names:
                raise UnreadableError(f"no column grid_cell; it has {', '.join(names)}")
            known = self._columns.setdefault(name, columns)
            if columns != known:
                raise UnreadableError(f"columns {', '.join(columns)}, expected {', '.join(known)} as in the first file")
            wanted = [n for n in ("grid_cell", "product_id") if n in names]
            listed = table.read(columns=wanted).to_pydict()
            sizes = [table.metadata.row_group(i).num_rows for i in range(table.metadata.num_row_groups)]
        cells = np.array([str(cell).encode() for cell in listed["grid_cell"]])
        products = np.array([str(p).encode() for p in listed.get("product_id", [""] * len(cells))])
        rows = np.concatenate([np.arange(size) for size in sizes])
        groups = np.repeat(np.arange(len(sizes)), sizes)
        return cells, products, np.full(len(cells), len(self._files)), groups, rows

    def _probe(self) -> tuple[tuple[int, int], dict[str, Layer]]:
        """(H, W) on the 10 m grid, and the layer of every modality that some cell has, from the first cell that has it."""
        size_px, layers = (0, 0), {}
        for name, at in self._at.items():
            has = np.flatnonzero(at >= 0)
            if not len(has):
                continue
            orbit = "" if self._orbit == "time" else self._orbit
            try:
                images = self._images_of(name, int(has[0]))
                headers = {column: read_header(data) for column, data in images.items()}
                dtypes = [header.dtype for header in headers.values()]
                # Bands are stacked, so one dtype has to hold them all.
                dtype = np.dtype("f4") if name in RADAR else np.result_type(*dtypes)
                layers[name] = make_layer(name, list(headers), len(headers), dtype, orbit)
            except ValueError as error:
                raise SourceError(f"{self._where(name, int(has[0]))}, {name}: {error}") from error
            if name == "sentinel2":
                size_px = max(header.size_px for header in headers.values())
        return size_px, layers

    def _read(self, name: str, cut: Cut) -> np.ndarray | None:
        if self._at[name][cut.image] < 0:
            return None
        layer, images = self._layers[name], self._images_of(name, cut.image)
        orbit = self._pass_of(cut) if name in RADAR and self._orbit == "time" else ""
        planes, fills = [], []
        for data in images.values():
            values, fill = read_window(data, cut.top, cut.left, cut.side, self._size_px)
            planes.append(_decibels(values[0], fill[0]) if name in RADAR else values[0])
            fills.append(fill[0])
        try:
            return layer.convert(np.stack(planes), [None] * len(fills) if name in RADAR else fills, orbit)
        except ValueError as error:
            raise UnreadableError(str(error)) from error

    def _place(self, cut: Cut) -> Place:
        lat, lon = self._header(cut.image).place(cut.top + cut.side / 2, cut.left + cut.side / 2, *self._size_px)
        taken = self._taken("sentinel2", cut.image)
        return Place(lat, lon, int(taken[2]) if taken else None)

    def _pass_of(self, cut: Cut) -> str:
        taken = self._taken("sentinel1_rtc", cut.image)
        _, lon = self._header(cut.image).place(0, 0, *self._size_px)
        if not taken or not np.isfinite(lon):
            raise UnreadableError("no time or place, so its pass is not known; give the option orbit=asc or orbit=desc")
        return orbit_of(int(taken[4]) + int(taken[5]) / 60, lon)

    def _taken(self, name: str, image: int) -> re.Match | None:
        product = self._rows[name].products[self._at[name][image]]
        return _TAKEN.search(product.decode(errors="replace"))

    def _header(self, image: int) -> Header:
        return read_header(next(iter(self._images_of("sentinel2", image).values())))

    def _images_of(self, name: str, image: int) -> dict[str, bytes]:
        """The GeoTIFFs of a cell by column."""
        rows, at = self._rows[name], self._at[name][image]
        file, group, row = int(rows.file[at]), int(rows.group[at]), int(rows.row[at])

        def load() -> tuple[dict[str, bytes], int]:
            with _parquet(self._files[file]) as table:
                columns = table.read_row_group(group, columns=list(self._columns[name])).slice(row, 1).to_pydict()
            images = {column: values[0] for column, values in columns.items()}
            empty = [column for column, data in images.items() if not isinstance(data, bytes)]
            if empty:
                raise UnreadableError(f"columns {', '.join(empty)} hold no GeoTIFF")
            return images, sum(map(len, images.values()))

        return self._cache.get((name, image), load)

    def _where(self, name: str, image: int) -> str:
        rows, at = self._rows[name], self._at[name][image]
        return f"{self._files[int(rows.file[at])]}, cell {rows.cells[at].decode(errors='replace')}"


def _find(path: Path, level: str, wanted: tuple[str, ...] | None) -> dict[str, list[Path]]:
    """The parquet files of every layer; `path` holds the Core folders or is the Sentinel-2 one."""
    if not path.is_dir():
        raise SourceError(f"{path} {'is a file' if path.exists() else 'does not exist'}; give the folder of Major TOM Core")
    main = f"Core-S2{level.upper()}"
    folders = {name: path / sub for sub, name in ({main: "sentinel2"} | _LAYERS).items() if (path / sub).is_dir()}
    if not folders:
        folders = {"sentinel2": path}
    files = {}
    for name, folder in folders.items():
        listed = [*folder.glob("*.parquet"), *folder.glob("images/*.parquet")]
        files[name] = sorted(file for file in listed if file.name != "metadata.parquet")
    there = [name for name, listed in files.items() if listed]
    if "sentinel2" not in there:
        found = examples(sorted(p.name for p in path.iterdir())) or "nothing"
        raise SourceError(f"{path}: expected {main}/images/part_*.parquet (or those of {main} themselves), found {found}")
    problems = [f"{path}: no layer for {name!r}; it has {', '.join(there)}" for name in wanted or () if name not in there]
    if wanted is not None and "sentinel2" not in wanted:
        problems.append(f"option modalities={','.join(wanted)} lacks sentinel2, which every tile must have")
    if problems:
        raise SourceError(problems)
    return {name: files[name] for name in there if wanted is None or name in wanted}


def _match(cells: np.ndarray, rows: Rows) -> np.ndarray:
    """Per cell the first row of the layer that has it, -1 where none does."""
    known, first = np.unique(rows.cells, return_index=True)
    at = np.minimum(np.searchsorted(known, cells), len(known) - 1)
    return np.where(known[at] == cells, first[at], -1)


def _decibels(values: np.ndarray, fill: float | None) -> np.ndarray:
    """10 log10 of linear power, float32; NaN where there is none."""
    absent = ~(values > 0) if fill is None else ~(values > 0) | (values == fill)
    return np.where(absent, np.nan, 10 * np.log10(np.where(absent, 1, values))).astype(np.float32)


@contextmanager
def _parquet(file: Path) -> Iterator:
    """An open parquet file; its errors, and those inside the context, come out as UnreadableError."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise missing_package("pyarrow", "reading parquet files", error) from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            yield table
    except UnreadableError:
        raise
    except Exception as error:  # damaged metadata and pages fail in pyarrow in many ways
        raise UnreadableError(f"not a readable parquet file ({said(error)})") from error
