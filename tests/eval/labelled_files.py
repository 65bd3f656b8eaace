"""Small labelled sets: HDF5 files and GeoTIFFs with a table."""

import csv
import json
from pathlib import Path

import h5py
import numpy as np

BANDS = ["B2", "B3", "B4"]
CLASSES = ["water", "trees", "built"]
SPLITS = {"train": list(range(6)), "val": [6, 7, 8], "test": [9, 10, 11]}


def images(num: int = 12, num_bands: int = 3, side: int = 8, seed: int = 0) -> np.ndarray:
    """uint16 [N, B, H, W], reflectance x 10,000."""
    return np.random.default_rng(seed).integers(1, 4000, (num, num_bands, side, side)).astype(np.uint16)


def write_h5(path: Path, image: np.ndarray, label: np.ndarray, splits=SPLITS, beside: bool = True, **attributes) -> Path:
    """An HDF5 file and its JSON; attributes of None are left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    attributes = {"bands": BANDS, "classes": CLASSES} | attributes
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = image, label
        for key, value in attributes.items():
            if value is not None:
                file.attrs[key] = value
    if beside:
        path.with_suffix(".json").write_text(json.dumps({"splits": splits}))
    return path


def write_tif(path: Path, values: np.ndarray, bands=None, no_data=None, corner=(500_000.0, 5_000_000.0), crs="EPSG:32633"):
    """A GeoTIFF of [F, H, W] with 10 m pixels."""
    import rasterio
    from rasterio.transform import from_origin

    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "count": len(values), "height": values.shape[1], "width": values.shape[2]}
    profile |= {"dtype": values.dtype, "nodata": no_data, "crs": crs}
    with rasterio.open(path, "w", transform=from_origin(*corner, 10, 10), **profile) as file:
        file.write(values)
        for i, name in enumerate(bands or ()):
            file.set_band_description(i + 1, name)


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_tifs(folder: Path, labels: list[str], splits: list[str] | None = None, column: str = "label", **options) -> Path:
    """A folder of GeoTIFFs, one per label, with labels.csv."""
    options.setdefault("bands", BANDS)
    rows = []
    for i, (image, label) in enumerate(zip(images(len(labels)), labels, strict=True)):
        write_tif(folder / "images" / f"{i}.tif", image, **options)
        rows.append({"file": f"images/{i}.tif", column: label} | ({"split": splits[i]} if splits else {}))
    return write_table(folder / "labels.csv", rows)
