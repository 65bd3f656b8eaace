"""What must hold of an MMEarth folder before a tile is read: each check adds its findings to one list of problems.

Shapes: N tiles, P tile side in pixels.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mpmae.errors import SourceError
from mpmae.modalities import MODALITIES, PRODUCT_LEVELS, ModalitySpec
from mpmae.shard_format import BandStats

JSON_KINDS = ("splits", "tile_info", "band_stats")
METADATA_WIDTHS = {"tile_id": 100, "S2_type": 10}
MAX_VALUE_BYTES = 4
NUM_EXAMPLES = 3
# Level 2A has no cirrus band, so MMEarth's own statistics of it are 0 / 0.
BANDS_WITHOUT_DATA = {("sentinel2_l2a", "B10")}


def find_h5(folder: Path) -> Path:
    """The one HDF5 file of a folder; SourceError saying what the folder holds instead."""
    if not folder.is_dir():
        what = "is a file: give the MMEarth folder that holds it" if folder.exists() else "does not exist"
        raise SourceError(f"{folder} {what}")
    found = sorted(folder.glob("*.h5"))
    if len(found) > 1:
        raise SourceError(f"{folder} has several HDF5 files ({examples(p.name for p in found)}); expected one NAME.h5")
    if not found:
        jsons = [f"{p.name.removesuffix(f'_{kind}.json')}.h5" for kind in JSON_KINDS for p in folder.glob(f"*_{kind}.json")]
        if jsons:
            raise SourceError(f"{folder} lacks {jsons[0]}; copy or download it into the folder")
        names = sorted(p.name for p in folder.iterdir())
        raise SourceError(
            f"{folder} is not an MMEarth folder: it has no NAME.h5 with NAME_splits.json, NAME_tile_info.json and "
            f"NAME_band_stats.json, but {examples(names) if names else 'nothing'}"
        )
    return found[0]


def missing_hint(kind: str, folder: Path) -> str:
    """What to do about an absent JSON file."""
    return f"; `mpmae-shards stats {folder} --output FILE` computes it" if kind == "band_stats" else ""


def find_datasets(
    file: h5py.File, where: str, wanted: Sequence[str] | None, problems: list[str]
) -> tuple[dict[str, h5py.Dataset], tuple[str, ...]]:
    """The datasets of the known modalities (only those `wanted`), in table order, and the names of unknown datasets."""
    known = [name for name in MODALITIES if name in file]
    if "sentinel2" not in file:
        problems.append(f"{where}: no dataset sentinel2, which every tile must have; it has {examples(file) or 'nothing'}")
    if wanted is not None:
        problems += [
            f"modality {name!r} is not in {where}; it has {', '.join(known) or 'none'}"
            for name in wanted
            if name not in known
        ]
        if "sentinel2" not in wanted:
            problems.append(f"the modalities {', '.join(wanted)} lack sentinel2, which every tile must have")
        known = [name for name in known if name in wanted]
    datasets = {}
    for name in known:
        try:
            item = file[name]
        except (KeyError, OSError, RuntimeError) as error:
            problems.append(f"{where}: dataset {name} cannot be opened ({error}); copy or download the file again")
            continue
        if isinstance(item, h5py.Dataset):
            datasets[name] = item
        else:
            problems.append(f"{where}: {name} is a {type(item).__name__.lower()}, expected a dataset")
    ignored = tuple(name for name in file if name not in MODALITIES and name != "metadata")
    return datasets, ignored


def read_metadata(file: h5py.File, where: str, problems: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tile ids and product levels, bytes arrays [N]; empty ones when `metadata` is not as it must be."""
    empty = np.zeros(0, "S100"), np.zeros(0, "S10")
    metadata = file.get("metadata")
    if not isinstance(metadata, h5py.Dataset):
        problems.append(f"{where}: no dataset metadata with the fields tile_id and S2_type")
        return empty
    fields = metadata.dtype.fields or {}
    if metadata.ndim != 1 or not all(f in fields and fields[f][0].kind == "S" for f in METADATA_WIDTHS):
        problems.append(
            f"{where}: metadata is {metadata.shape} of {metadata.dtype}, expected N records with the byte strings "
            "tile_id and S2_type"
        )
        return empty
    try:
        records = metadata[:]
    except (OSError, RuntimeError) as error:
        problems.append(f"{where}: metadata cannot be read ({error}); copy or download the file again")
        return empty
    if not len(records):
        problems.append(f"{where}: metadata has no rows")
    for name, width in METADATA_WIDTHS.items():
        long = np.flatnonzero(np.char.str_len(records[name]) > width)
        if len(long):
            problems.append(f"{where}: metadata {name} of row {long[0]} is longer than {width} bytes")
    levels = records["S2_type"].astype("S10")
    bad = np.flatnonzero(~np.isin(levels, [level.encode() for level in PRODUCT_LEVELS]))
    if len(bad):
        found = examples(f"row {row}: {levels[row].decode(errors='replace')!r}" for row in bad[:NUM_EXAMPLES])
        problems.append(f"{where}: metadata S2_type is neither l1c nor l2a in {len(bad)} rows ({found})")
    return records["tile_id"].astype("S100"), levels


def check_datasets(datasets: dict[str, h5py.Dataset], where: str, num_tiles: int, problems: list[str]) -> int:
    """The tile side P in pixels; checks dtype and shape of every dataset."""
    sizes: dict[str, int] = {}
    for name, dataset in datasets.items():
        spec, label = MODALITIES[name], f"{where}: {name}"
        problem = _dtype_problem(spec, dataset.dtype)
        if problem:
            problems.append(f"{label} has dtype {dataset.dtype}, expected {problem}")
        expected_ndim = 4 if spec.scope == "pixel" else 2
        if dataset.ndim != expected_ndim:
            form = "(tiles, bands, P, P)" if spec.scope == "pixel" else "(tiles, values)"
            problems.append(f"{label} has shape {dataset.shape}, expected {expected_ndim} dimensions {form}")
            continue
        if dataset.shape[0] != num_tiles:
            problems.append(f"{label} has {dataset.shape[0]} rows, but metadata has {num_tiles}")
        if dataset.shape[1] != spec.num_channels:
            names = f" ({' '.join(spec.bands)})" if spec.bands else ""
            problems.append(f"{label} has {dataset.shape[1]} bands, expected {spec.num_channels}{names}")
        if spec.scope == "pixel":
            if dataset.shape[2] != dataset.shape[3] or dataset.shape[2] == 0:
                problems.append(f"{label} has tiles of {dataset.shape[2]} x {dataset.shape[3]} px, expected squares")
            sizes[name] = dataset.shape[2]
    if len(set(sizes.values())) > 1:
        listing = ", ".join(f"{name} {size}" for name, size in sizes.items())
        problems.append(f"{where}: the pixel modalities have different tile sizes in px: {listing}; expected one size")
    return next(iter(sizes.values()), 0)


def _dtype_problem(spec: ModalitySpec, dtype: np.dtype) -> str:
    integers_only = spec.kind == "categorical"
    if dtype.kind in ("ui" if integers_only else "uif") and dtype.itemsize <= MAX_VALUE_BYTES:
        return ""
    return f"{'integers' if integers_only else 'integers or floats'} of at most {MAX_VALUE_BYTES} bytes"


def check_splits(tree: Any, where: str, num_tiles: int, problems: list[str]) -> dict[str, np.ndarray]:
    """Rows of each split, int64 ascending; finds rows out of range, twice in a split or in two splits."""
    if not isinstance(tree, dict) or not tree:
        problems.append(f'{where}: expected an object such as {{"train": [rows], "val": [rows]}}')
        return {}
    splits: dict[str, np.ndarray] = {}
    for split, rows in tree.items():
        if not split.replace("_", "").isalnum() or not split.isascii():
            problems.append(f"{where}: split name {split!r}: expected letters, digits and _ (it becomes part of file names)")
        if not isinstance(rows, list) or not all(type(row) is int for row in rows):
            problems.append(f"{where}: split {split}: expected a list of whole row numbers")
            continue
        out = [row for row in rows if not 0 <= row < num_tiles]
        if out:
            problems.append(f"{where}: split {split}: {len(out)} rows are not in 0..{num_tiles - 1} ({examples(out)})")
            continue
        unique, counts = np.unique(np.array(rows, np.int64), return_counts=True)
        if (counts > 1).any():
            problems.append(f"{where}: split {split}: {(counts > 1).sum()} rows twice ({examples(unique[counts > 1])})")
        for other, other_rows in splits.items():
            shared = np.intersect1d(unique, other_rows)
            if len(shared):
                problems.append(f"{where}: {len(shared)} rows are in both {other} and {split} ({examples(shared)})")
        splits[split] = unique
    return splits


def check_tile_info(
    entries: Iterable[tuple[str, Any]], where: str, tile_ids: np.ndarray, levels: np.ndarray, problems: list[str]
) -> None:
    """Every tile id must be a key of `entries` (id, information) whose S2_type is the level of the metadata."""
    number: dict[str, int] = {}
    numbers = np.array([number.setdefault(i.decode(errors="replace"), len(number)) for i in tile_ids.tolist()], np.int64)
    found = np.zeros(len(number), levels.dtype)
    is_there = np.zeros(len(number), bool)
    for key, info in entries:
        i = number.get(key)
        if i is not None:
            level = info.get("S2_type") if isinstance(info, dict) else None
            found[i] = level.encode(errors="replace") if isinstance(level, str) else b"none"
            is_there[i] = True
    absent = np.flatnonzero(~is_there[numbers])
    known = np.isin(levels, [level.encode() for level in PRODUCT_LEVELS])
    different = np.flatnonzero(is_there[numbers] & known & (found[numbers] != levels))

    def listing(rows: np.ndarray, name: Callable[[int, str], str]) -> str:
        return examples(name(row, tile_ids[row].decode(errors="replace")) for row in rows[: NUM_EXAMPLES + 1])

    if len(absent):
        which = listing(absent, lambda row, key: key)
        problems.append(f"{where}: {len(absent)} of {len(tile_ids)} tiles of metadata are missing ({which})")
    if len(different):
        which = listing(
            different,
            lambda row, key: f"{key}: {found[numbers[row]].decode(errors='replace')}, metadata {levels[row].decode()}",
        )
        problems.append(f"{where}: S2_type of {len(different)} tiles differs from metadata ({which})")


def check_band_stats(
    tree: Any, where: str, names: Sequence[str], levels: set[str], problems: list[str]
) -> dict[str, BandStats]:
    """Usable statistics of the continuous modalities, sentinel2 by the product levels that occur."""
    if not isinstance(tree, dict):
        problems.append(f"{where}: expected an object keyed by modality")
        return {}
    checked = {}
    for name in names:
        spec = MODALITIES[name]
        if spec.kind != "continuous":
            continue
        keys = [f"{name}_{level}" for level in PRODUCT_LEVELS] if name == "sentinel2" else [name]
        for key in keys:
            needed = spec.is_target and (name != "sentinel2" or key.removeprefix("sentinel2_") in levels)
            found: list[str] = []
            stats = _one_stats(tree.get(key), f"{where}: {key}", key, spec.bands, found)
            if stats is not None and not found:
                checked[key] = stats
            elif needed:
                problems += found
    return checked


def _one_stats(tree: Any, label: str, key: str, bands: tuple[str, ...], problems: list[str]) -> BandStats | None:
    if not isinstance(tree, dict):
        problems.append(f"{label}: missing; `mpmae-shards stats SOURCE --output FILE` computes the statistics")
        return None
    columns: dict[str, tuple[float, ...]] = {}
    for quantity, fallback in (("mean", 0.0), ("std", 1.0), ("min", 0.0), ("max", 0.0)):
        values = tree.get(quantity)
        if not isinstance(values, list) or not all(isinstance(v, int | float | None) for v in values):
            problems.append(f"{label}: {quantity} is not a list of numbers")
            continue
        if len(values) != len(bands):
            problems.append(f"{label}: {quantity} has {len(values)} values, expected {len(bands)} ({' '.join(bands)})")
            continue
        column = np.array([_to_float(value) for value in values])
        unusable = ~np.isfinite(column) | ((column <= 0) if quantity == "std" else False)
        for i in np.flatnonzero(unusable):
            if (key, bands[i]) in BANDS_WITHOUT_DATA:
                column[i] = fallback
            else:
                expected = "a finite number above 0 (1 for a band without data)" if quantity == "std" else "a finite number"
                problems.append(f"{label}: {quantity} of band {bands[i]} is {column[i]:g}, expected {expected}")
        columns[quantity] = tuple(column.tolist())
    return BandStats(**columns) if len(columns) == 4 else None


def _to_float(value: float | None) -> float:
    """`value` as a float: None is NaN, an integer beyond the floats is infinite."""
    if value is None:
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def examples(items) -> str:
    """The first few of `items`, comma-separated, with an ellipsis for the rest."""
    items = [str(item) for item in items]
    return ", ".join(items[:NUM_EXAMPLES]) + (", ..." if len(items) > NUM_EXAMPLES else "")
