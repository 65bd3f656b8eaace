"""An MMEarth folder, checked as a whole when it is opened, read tile by tile.

    NAME.h5                 one dataset per modality, row = tile, and `metadata` with (tile_id, S2_type)
    NAME_splits.json        {"train": [row, ...], ...}
    NAME_tile_info.json     {tile_id: {"S2_type": "l1c" or "l2a", ...}}
    NAME_band_stats.json    {"aster": {"mean": [...], "std": [...], "min": [...], "max": [...]}, "sentinel2_l2a": ...}

Layout: MMEarth v001 (arXiv 2405.02771). The dtypes, the tile size and the modalities there are come from the file.

Shapes: N tiles, C bands, P tile side in pixels, K length of a tile vector.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mpmae.errors import SourceError
from mpmae.modalities import MODALITIES, NoData, no_data_rule
from mpmae.shard_format import BandStats
from mpmae.shard_tools import source_checks
from mpmae.shard_tools.tile import Tile

READ_ERRORS = (OSError, RuntimeError, KeyError, ValueError)


class MMEarthSource:
    """The tiles of an MMEarth folder; a context manager.

    `modalities` limits what is checked and read (None: every known modality of the file). With `need_band_stats` False the
    band statistics are neither needed nor read. Raises SourceError with every problem of the folder at once.

    pixels, scalars: names of the pixel and of the tile modalities, in the order of `mpmae.modalities`.
    shapes, dtypes: per modality, of one tile: (C, P, P) or (K,); dtypes are little-endian.
    tile_ids, product_levels: bytes arrays [N].
    splits: per split, its rows in ascending order, int64.
    band_stats: per continuous modality (sentinel2 by product level) that has usable statistics.
    ignored: datasets of the file that are no known modality.
    """

    def __init__(self, folder: str | Path, modalities: Sequence[str] | None = None, need_band_stats: bool = True):
        self.folder = Path(folder)
        self._file: h5py.File | None = None
        problems: list[str] = []
        self.h5_path = source_checks.find_h5(self.folder)
        self.name = self.h5_path.stem
        json_names = ["splits", "tile_info", *(["band_stats"] if need_band_stats else [])]
        self._json_bytes, trees = self._read_jsons(json_names, problems)
        try:
            self._file = h5py.File(self.h5_path, "r")
        except READ_ERRORS as error:
            problems.append(f"{self.h5_path} is not a whole HDF5 file ({error}); copy or download it again")
            raise SourceError(problems) from error
        try:
            self._open(modalities, trees, need_band_stats, problems)
        except BaseException:
            self.close()
            raise

    def _open(self, wanted: Sequence[str] | None, trees: dict[str, Any], need_band_stats: bool, problems: list[str]) -> None:
        where = self.h5_path.name
        self._datasets, self.ignored = source_checks.find_datasets(self._file, where, wanted, problems)
        self.tile_ids, self.product_levels = source_checks.read_metadata(self._file, where, problems)
        # Without metadata the rows of the first dataset keep the other checks meaningful.
        rows = [len(self.tile_ids), *(len(d) for d in self._datasets.values() if d.ndim)]
        self.num_tiles = next((num for num in rows if num), 0)
        self.tile_size_px = source_checks.check_datasets(self._datasets, where, self.num_tiles, problems)
        self.pixels = tuple(n for n in self._datasets if MODALITIES[n].scope == "pixel")
        self.scalars = tuple(n for n in self._datasets if MODALITIES[n].scope == "tile")
        self.shapes = {n: d.shape[1:] for n, d in self._datasets.items()}
        self.dtypes = {n: d.dtype.newbyteorder("<") for n, d in self._datasets.items()}
        self.splits: dict[str, np.ndarray] = {}
        self.band_stats: dict[str, BandStats] = {}
        if "splits" in trees:
            self.splits = source_checks.check_splits(
                trees["splits"], self._json_path("splits").name, self.num_tiles, problems
            )
        if "tile_info" in trees and len(self.tile_ids):
            source_checks.check_tile_info(
                trees["tile_info"], self._json_path("tile_info").name, self.tile_ids, self.product_levels, problems
            )
        if "band_stats" in trees:
            levels = {bytes(level).decode() for level in np.unique(self.product_levels)}
            self.band_stats = source_checks.check_band_stats(
                trees["band_stats"], self._json_path("band_stats").name, tuple(self._datasets), levels, problems
            )
        if problems:
            raise SourceError(problems)

    def __enter__(self) -> "MMEarthSource":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        """Close the HDF5 file."""
        if self._file is not None:
            self._file.close()

    @property
    def modalities(self) -> tuple[str, ...]:
        """All modalities: the pixel modalities, then the tile modalities."""
        return self.pixels + self.scalars

    @property
    def fingerprint(self) -> str:
        """Hex digest that changes with the source, cheap at any size.

        It covers the name and size in bytes of the HDF5 file, the name, shape and dtype of each of its datasets, the
        metadata (tile ids, product levels) and the bytes of the JSON files that were read. It does not cover the pixel
        values beyond the size of their file; `verify` with the source compares those.
        """
        shapes = {name: [list(d.shape), d.dtype.str] for name, d in self._file.items() if isinstance(d, h5py.Dataset)}
        content = {
            "h5": [self.h5_path.name, self.h5_path.stat().st_size],
            "datasets": {name: shapes[name] for name in sorted(shapes) if name != "metadata"},
            "tile_ids": hashlib.sha256(self.tile_ids.tobytes()).hexdigest(),
            "product_levels": hashlib.sha256(self.product_levels.tobytes()).hexdigest(),
            "json": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(self._json_bytes.items())},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def no_data(self, name: str) -> NoData:
        """How modality `name` writes absent values in this file."""
        return no_data_rule(name, self.dtypes[name])

    def rows(self, split: str | None) -> np.ndarray:
        """Rows of a split in ascending order, int64; all rows of the file for None. SourceError for an unknown split."""
        if split is None:
            return np.arange(self.num_tiles)
        if split not in self.splits:
            raise SourceError(f"{self.folder} has no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]

    def describe(self, row: int) -> str:
        """How messages call the tile at `row`."""
        return f"tile {self.tile_ids[row].decode(errors='replace')} (row {row})"

    def read_tile(self, row: int, names: Sequence[str] | None = None) -> Tile:
        """The tile at `row`, with the modalities `names` (None: all).

        Raises SourceError naming the tile, its row and the modality when the file cannot give it (a corrupt chunk).
        """
        values = {}
        for name in self.modalities if names is None else names:
            try:
                values[name] = self._datasets[name][row].astype(self.dtypes[name], copy=False)
            except READ_ERRORS as error:
                raise SourceError(
                    f"{self.h5_path}: {self.describe(row)}, {name}: cannot be read ({error}); "
                    "the chunk is corrupt: copy or download the file again, or take the row out of the splits"
                ) from error
        return Tile(int(row), bytes(self.tile_ids[row]), bytes(self.product_levels[row]), values)

    def tiles(self, split: str | None, names: Sequence[str] | None = None) -> Iterator[Tile]:
        """The tiles of a split (None: of the file) in the order of their rows."""
        for row in self.rows(split):
            yield self.read_tile(row, names)

    def _json_path(self, kind: str) -> Path:
        return self.folder / f"{self.name}_{kind}.json"

    def _read_jsons(self, kinds: list[str], problems: list[str]) -> tuple[dict[str, bytes], dict[str, Any]]:
        contents, trees = {}, {}
        for kind in kinds:
            path = self._json_path(kind)
            try:
                contents[kind] = path.read_bytes()
                # A set of a million tiles has over a gigabyte of tile information, of which one value per tile is kept.
                hook = source_checks.keep_product_level if kind == "tile_info" else None
                trees[kind] = json.loads(contents[kind], object_hook=hook)
            except OSError as error:
                problems.append(f"{path} cannot be read ({error.strerror}){source_checks.missing_hint(kind, self.folder)}")
            except ValueError as error:
                problems.append(f"{path} is not JSON ({error}); restore the file")
        return contents, trees
