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
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mpmae.errors import SourceError
from mpmae.modalities import MODALITIES, NoData, no_data_rule
from mpmae.shard_format import BandStats
from mpmae.shard_tools import source_checks
from mpmae.shard_tools.json_stream import ObjectStream
from mpmae.shard_tools.raw_chunks import READ_ERRORS, ChunkError, DatasetReader
from mpmae.shard_tools.tile import Tile, TileError


class MMEarthSource:
    """The tiles of an MMEarth folder; a context manager.

    `modalities` limits what is checked and read (None: every known modality of the file). With `need_band_stats` False the
    band statistics are neither needed nor read. Raises SourceError with every problem of the folder at once.

    Memory: at most 0.6 KB a tile, chunk addresses among it (1.2 million tiles: 0.7 GB).

    pixels, scalars: names of the pixel and of the tile modalities, in the order of `mpmae.modalities`.
    bands: per pixel modality its C band names.
    shapes, dtypes: per modality, of one tile: (C, P, P) or (K,); dtypes are little-endian.
    tile_ids, product_levels: bytes arrays [N].
    splits: per split, its rows in ascending order, int64.
    band_stats: per continuous modality (sentinel2 by product level) that has usable statistics.
    ignored: datasets of the file that are no known modality.
    """

    def __init__(self, folder: str | Path, modalities: Sequence[str] | None = None, need_band_stats: bool = True):
        self.folder = Path(folder)
        self._file: h5py.File | None = None
        self._descriptor = -1
        problems: list[str] = []
        self.h5_path = self.where = source_checks.find_h5(self.folder)
        self.name = self.h5_path.stem
        self._json_hashes: dict[str, str] = {}
        trees = self._read_jsons(["splits", *(["band_stats"] if need_band_stats else [])], problems)
        try:
            self._file = h5py.File(self.h5_path, "r")
            self._descriptor = os.open(self.h5_path, os.O_RDONLY)
        except READ_ERRORS as error:
            self.close()
            problems.append(f"{self.h5_path} is not a whole HDF5 file ({error}); copy or download it again")
            raise SourceError(problems) from error
        try:
            self._open(modalities, trees, problems)
        except READ_ERRORS as error:
            self.close()
            problems.append(f"{self.h5_path} is damaged ({error}); copy or download it again")
            raise SourceError(problems) from error
        except BaseException:
            self.close()
            raise

    def _open(self, wanted: Sequence[str] | None, trees: dict[str, Any], problems: list[str]) -> None:
        where = self.h5_path.name
        datasets, self.ignored = source_checks.find_datasets(self._file, where, wanted, problems)
        self.tile_ids, self.product_levels = source_checks.read_metadata(self._file, where, problems)
        # Without metadata the rows of the first dataset keep the other checks meaningful.
        rows = [len(self.tile_ids), *(len(d) for d in datasets.values() if d.ndim)]
        self.num_tiles = next((num for num in rows if num), 0)
        self.tile_size_px = source_checks.check_datasets(datasets, where, self.num_tiles, problems)
        self.pixels = tuple(n for n in datasets if MODALITIES[n].scope == "pixel")
        self.scalars = tuple(n for n in datasets if MODALITIES[n].scope == "tile")
        self.shapes = {n: d.shape[1:] for n, d in datasets.items()}
        self.dtypes = {n: d.dtype.newbyteorder("<") for n, d in datasets.items()}
        self.splits: dict[str, np.ndarray] = {}
        self.band_stats: dict[str, BandStats] = {}
        if "splits" in trees:
            self.splits = source_checks.check_splits(
                trees["splits"], self._json_path("splits").name, self.num_tiles, problems
            )
        self._check_tile_info(problems)
        if "band_stats" in trees:
            levels = {bytes(level).decode() for level in np.unique(self.product_levels)}
            self.band_stats = source_checks.check_band_stats(
                trees["band_stats"], self._json_path("band_stats").name, tuple(datasets), levels, problems
            )
        if problems:
            raise SourceError(problems)
        self.bands = {name: MODALITIES[name].bands for name in self.pixels}
        shapes = {str(name): item for name, item in self._file.items() if isinstance(item, h5py.Dataset)}
        self._h5_datasets = {name: [list(d.shape), d.dtype.str] for name, d in sorted(shapes.items()) if name != "metadata"}
        self._readers = {n: DatasetReader(d, self._descriptor, self._file.userblock_size) for n, d in datasets.items()}

    def __enter__(self) -> "MMEarthSource":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        """Close the HDF5 file."""
        if self._file is not None:
            self._file.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

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
        content = {
            "h5": [self.h5_path.name, self.h5_path.stat().st_size],
            "datasets": self._h5_datasets,
            "tile_ids": hashlib.sha256(self.tile_ids.tobytes()).hexdigest(),
            "product_levels": hashlib.sha256(self.product_levels.tobytes()).hexdigest(),
            "json": dict(sorted(self._json_hashes.items())),
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
        """The tile at `row`, with the modalities `names` (None: all); arrays may be read-only. Safe from many threads.

        Raises TileError naming the tile, its row and the modality when the file cannot give it (a corrupt chunk).
        """
        row = int(row)
        values = {}
        for name in self.modalities if names is None else names:
            try:
                values[name] = self._readers[name][row]
            except (ChunkError, *READ_ERRORS) as error:
                raise TileError(
                    f"{self.h5_path}: {self.describe(row)}, {name}: cannot be read ({error}); "
                    "the chunk is corrupt: copy or download the file again, or take the row out of the splits",
                    modality=name,
                ) from error
        return Tile(row, bytes(self.tile_ids[row]), bytes(self.product_levels[row]), values)

    def notes(self) -> list[str]:
        """What a user should know before a long build: datasets that are left out, that only HDF5 itself can read, one
        thread at a time, and that lack rows.

        Raises SourceError for datasets whose chunk index is damaged.
        """
        problems = []
        for name, reader in self._readers.items():
            try:
                reader.load()
            except ChunkError as error:
                hint = "copy or download the file again, or leave the modality out"
                problems.append(f"{self.h5_path}: {name}: {error}; {hint}")
        if problems:
            raise SourceError(problems)
        slow = [f"{name} ({reader.why_hdf5})" for name, reader in self._readers.items() if reader.why_hdf5]
        lacking = [
            f"{name} ({reader.num_unwritten:,} of {self.num_tiles:,} rows)"
            for name, reader in self._readers.items()
            if reader.num_unwritten
        ]
        found = {
            "left out, since they are no known modality": list(self.ignored),
            "read through HDF5's lock, by one thread at a time": slow,
            "never written, or lost, and taken as the dataset's fill value": lacking,
        }
        return [f"{self.h5_path}: {what}: {', '.join(names)}" for what, names in found.items() if names]

    def tiles(self, split: str | None, names: Sequence[str] | None = None) -> Iterator[Tile]:
        """The tiles of a split (None: of the file) in the order of their rows."""
        for row in self.rows(split):
            yield self.read_tile(row, names)

    def _json_path(self, kind: str) -> Path:
        return self.folder / f"{self.name}_{kind}.json"

    def _read_jsons(self, kinds: list[str], problems: list[str]) -> dict[str, Any]:
        trees = {}
        for kind in kinds:
            path = self._json_path(kind)
            try:
                data = path.read_bytes()
                self._json_hashes[kind] = hashlib.sha256(data).hexdigest()
                trees[kind] = json.loads(data)
            except OSError as error:
                problems.append(f"{path} cannot be read ({error.strerror}){source_checks.missing_hint(kind, self.folder)}")
            except ValueError as error:
                problems.append(f"{path} is not JSON ({error}); restore the file")
        return trees

    def _check_tile_info(self, problems: list[str]) -> None:
        """Check tile_info.json entry by entry: a million tiles have over a gigabyte of it, one value each counts."""
        path = self._json_path("tile_info")
        stream = ObjectStream(path)
        try:
            source_checks.check_tile_info(stream, path.name, self.tile_ids, self.product_levels, problems)
            self._json_hashes["tile_info"] = stream.sha256
        except OSError as error:
            problems.append(f"{path} cannot be read ({error.strerror or error})")
        except ValueError as error:
            problems.append(f"{path} is not JSON, an object keyed by tile id ({error}); restore the file")
