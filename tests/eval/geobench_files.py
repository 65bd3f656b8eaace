"""GEO-Bench tasks as published, small: pickles whose bytes name geobench's classes, HDF5 samples and JSON files."""

import json
import pickle
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

UTM = 'PROJCS["WGS 84 / UTM zone 35N",GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563]],'
UTM += 'PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]],PROJECTION["Transverse_Mercator"],'
UTM += 'PARAMETER["latitude_of_origin",0],PARAMETER["central_meridian",27],PARAMETER["scale_factor",0.9996],'
UTM += 'PARAMETER["false_easting",500000],PARAMETER["false_northing",0],UNIT["metre",1]]'

_S2 = {
    "01 - Coastal aerosol": 0.443,
    "02 - Blue": 0.49,
    "03 - Green": 0.56,
    "04 - Red": 0.665,
    "05 - Vegetation Red Edge": 0.705,
    "06 - Vegetation Red Edge": 0.74,
    "07 - Vegetation Red Edge": 0.783,
    "08 - NIR": 0.842,
    "08A - Vegetation Red Edge": 0.865,
    "09 - Water vapour": 0.945,
    "10 - SWIR - Cirrus": 1.375,
    "11 - SWIR": 1.61,
    "12 - SWIR": 2.19,
}
S2_13 = [("Sentinel2", name, um) for name, um in _S2.items()]
S2_12 = [band for band in S2_13 if "Cirrus" not in band[1]]
CLOUD = [("CloudProbability", "Cloud Probability", None)]
RADAR = [
    ("Sentinel1", name, None)
    for name in (
        "01 - VH.Real",
        "02 - VH.Imaginary",
        "03 - VV.Real",
        "04 - VV.Imaginary",
        "05 - VH.LEE Filtered",
        "06 - VV.LEE Filtered",
        "07 - VH.LEE Filtered.Real",
        "08 - VV.LEE Filtered.Imaginary",
    )
]
LANDSAT = [
    ("Landsat8", "04 - Red", 0.6546),
    ("Landsat8", "03 - Green", 0.5614),
    ("Landsat8", "02 - Blue", 0.482),
    ("Landsat8", "05 - NIR", 0.8647),
    ("Landsat8", "06 - SWIR1", 1.6089),
    ("Landsat8", "07 - SWIR2", 2.2007),
]
RGB = [("SpectralBand", "Red", 0.665), ("SpectralBand", "Green", 0.56), ("SpectralBand", "Blue", 0.49)]
NEON = [*RGB, ("ElevationBand", "Canopy Height Model", None), ("HyperSpectralBands", "Neon", None)]
SO2SAT = [*RADAR, *S2_13[1:9], *S2_13[-2:]]
# task -> bands as its converter writes them, label class, number of classes
TWELVE = {
    "m-bigearthnet": (S2_12, "MultiLabelClassification", 43),
    "m-brick-kiln": (S2_13, "Classification", 2),
    "m-eurosat": (S2_13, "Classification", 10),
    "m-forestnet": (LANDSAT, "Classification", 12),
    "m-pv4ger": (RGB, "Classification", 2),
    "m-so2sat": (SO2SAT, "Classification", 17),
    "m-cashew-plant": ([*S2_12, *CLOUD], "SegmentationClasses", 7),
    "m-chesapeake": ([*RGB, ("SpectralBand", "NearInfrared", 0.876)], "SegmentationClasses", 7),
    "m-NeonTree": (NEON, "SegmentationClasses", 2),
    "m-nz-cattle": (RGB, "SegmentationClasses", 2),
    "m-pv4ger-seg": (RGB, "SegmentationClasses", 2),
    "m-SA-crop-type": ([*S2_12, *CLOUD], "SegmentationClasses", 10),
}


class _Plain:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class _Affine:
    def __new__(cls, *numbers):
        self = super().__new__(cls)
        self.numbers = numbers
        return self

    def __getnewargs__(self):
        return self.numbers

    def __getstate__(self):
        return None


class _CRS:
    def __init__(self, text: str):
        self.text = text

    def __getstate__(self):
        return self.text


def stand_in(module: str, name: str, base: type = _Plain) -> type:
    """A class that pickles under another module's name."""
    return type(name, (base,), {"__module__": module, "__qualname__": name})


@contextmanager
def importable(*classes: type):
    """Modules that hold the classes, as pickling looks them up there."""
    names = {cls.__module__ for cls in classes}
    parts = [name.split(".") for name in names]
    parents = {".".join(part[:n]) for part in parts for n in range(1, len(part))}
    names |= {parent for parent in parents if parent not in sys.modules}
    saved = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    for cls in classes:
        setattr(sys.modules[cls.__module__], cls.__name__, cls)
    try:
        yield
    finally:
        for name, module in saved.items():
            sys.modules.pop(name) if module is None else sys.modules.__setitem__(name, module)


def dumps(value, *classes: type, protocol: int = 4) -> bytes:
    with importable(*classes):
        return pickle.dumps(value, protocol)


def write_task(
    folder: Path,
    bands: list[tuple[str, str, float | None]],
    samples: dict[str, tuple[dict[str, np.ndarray] | np.ndarray, object]],
    partition: dict[str, list[str]],
    label: str,
    num_classes: int,
    class_names: list[str] | None = None,
    date=None,
    stats: dict[str, dict[str, float]] | None = None,
    transform: tuple[float, ...] | None = None,
    crs: str | None = None,
    root: str = "geobench",
) -> Path:
    """A task's folder. An image is [B, H, W], or by band name; a label map lies in the dataset `label`."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {name: stand_in(f"{root}.dataset", name) for name in {kind for kind, _, _ in bands}}
    label_module = "dataset" if label == "SegmentationClasses" else "label"
    label_class = stand_in(f"{root}.{label_module}", label)
    specs_class, affine, crs_class = (
        stand_in(f"{root}.task", "TaskSpecifications"),
        stand_in("affine", "Affine", _Affine),
        stand_in("rasterio.crs", "CRS", _CRS),
    )
    classes = (*kinds.values(), label_class, specs_class, affine, crs_class)
    infos = [kinds[kind](name=name, alt_names=(), wavelength=um) for kind, name, um in bands]
    names_key = "class_name" if label == "MultiLabelClassification" else "_class_names"
    label_type = label_class(n_classes=num_classes, **{names_key: class_names})
    specs = specs_class(dataset_name=folder.name, n_time_steps=1, bands_info=infos, label_type=label_type)
    (folder / "task_specs.pkl").write_bytes(dumps(specs, *classes))
    if stats is None:
        stats = {name: {"mean": 1000.0 + i, "std": 100.0 + i, "max": 9000.0} for i, (_, name, _) in enumerate(bands)}
    (folder / "band_stats.json").write_text(json.dumps(stats))
    (folder / "default_partition.json").write_text(json.dumps(partition))
    for sample, (image, value) in samples.items():
        if not isinstance(image, dict):
            image = {name: band for (_, name, _), band in zip(bands, image, strict=True)}
        record = {"bands_order": []}
        with h5py.File(folder / f"{sample}.hdf5", "w") as file:
            by_name = dict(zip([name for _, name, _ in bands], infos, strict=True))
            for name, values in image.items():
                for day in date if isinstance(date, list) else [date]:
                    key = name if day is None else f"{name}_{day:%Y-%m-%d}"
                    file[key] = values
                    record["bands_order"].append(key)
                    record[key] = {
                        "date": day,
                        "band_info": by_name[name],
                        "transform": None if transform is None else affine(*transform),
                        "crs": None if crs is None else crs_class(crs) if crs.startswith("PROJCS") else crs,
                    }
            if label == "SegmentationClasses":
                file["label"] = value
                record["label"] = {"band_info": label_type}
            else:
                record["label"] = value
            file.attrs["pickle"] = str(dumps(record, *classes))
    return folder


def label_of(kind: str, num_classes: int, index: int, side: int = 8) -> object:
    """A label of sample `index`, such that all classes appear over num_classes samples."""
    if kind == "Classification":
        return index % num_classes
    if kind == "MultiLabelClassification":
        return (np.arange(num_classes) % 3 == index % 3).astype(np.int64)
    return (np.arange(side * side).reshape(side, side) % num_classes).astype(np.uint8)
