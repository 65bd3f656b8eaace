"""GEO-Bench v1 tasks as published: a folder with one HDF5 file per sample.

Shapes: B stored bands, H x W pixels, K classes.
Source: ServiceNow/geo-bench, `geobench/dataset.py` (the layout), arXiv 2306.03831.
"""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mpmae.errors import DatasetError, SourceError
from mpmae.eval.bands import SENTINEL2_UM, sentinel2_name
from mpmae.eval.dataset import StoredBand, Task
from mpmae.eval.geobench_tasks import TASKS, PublishedTask, names_are_wrong
from mpmae.eval.plain_pickle import Record, loads, loads_text
from mpmae.eval.reading import METRICS, checked_class, checked_classes, checked_map, checked_splits, few, same_size
from mpmae.shard_tools.sources.foreign import UnreadableError
from mpmae.shard_tools.sources.rasters import Header

_LOG = logging.getLogger(__name__)

SPECS = "task_specs.pkl"
_KINDS = {
    "Classification": "multiclass",
    "MultiLabelClassification": "multilabel",
    "SegmentationClasses": "segmentation",
    "SemanticSegmentation": "segmentation",
}
_SEVERAL_CHANNELS = ("MultiBand", "HyperSpectralBands")
_DATE = re.compile(r"_\d{4}-\d{2}-\d{2}(_.*)?")
_REFLECTANCE_MOST = 2.0  # no mean reflectance of a set is brighter


class GeoBenchSet:
    """One task of GEO-Bench, see `mpmae.eval.dataset.LabelledSet`.

    folder: such as classification_v1.0/m-eurosat. partition: of NAME_partition.json. band_names: "corrected", or "published"
    as the files say. product_level: "auto" (what is known of the task), "l1c", "l2a" or "none". Bands of several channels
    (hyperspectral) are left out. Raises DatasetError with every problem of the folder's own files; samples are looked at
    when they are read.
    """

    def __init__(self, folder: Path, partition: str = "default", band_names: str = "corrected", product_level: str = "auto"):
        self.folder, self._sizes_said = Path(folder), False
        self._known = TASKS.get(self.folder.name)
        specs = self._specs()
        label_type = specs.get("label_type")
        infos = [info for info in specs.get("bands_info", ()) if isinstance(info, Record)]
        left_out = [str(info.get("name")) for info in infos if info.kind in _SEVERAL_CHANNELS]
        if left_out:
            _LOG.info("%s: left out %s, bands of several channels without wavelengths", self.folder.name, few(left_out))
        infos = [info for info in infos if info.kind not in _SEVERAL_CHANNELS]
        self._stored_names = tuple(str(info.get("name")) for info in infos)
        if not infos or not isinstance(label_type, Record) or label_type.kind not in _KINDS:
            found = getattr(label_type, "kind", label_type)
            raise DatasetError(
                f"{self.folder / SPECS}: {len(infos)} bands and a label of type {found!r}; expected bands and one of "
                f"{', '.join(_KINDS)}"
            )
        kind = _KINDS[label_type.kind]
        known = self._known or PublishedTask(kind)
        if band_names == "published" and known.true_bands and product_level == "auto":
            product_level = "none"  # statistics of a product would be those of other bands
        self.task = Task(
            name=self.folder.name,
            kind=kind,
            class_names=_class_names(label_type, known, self.folder),
            bands=self._bands(infos, known, band_names),
            metric=known.metric or METRICS[kind],
            product_level={"auto": known.product_level, "none": None}.get(product_level, product_level),
            scale=known.scale,
        )
        self._ids, self.splits = self._partition(partition)

    def __len__(self) -> int:
        return len(self._ids)

    def sample_id(self, index: int) -> str:
        """The sample's name in the partition."""
        return self._ids[index]

    def image(self, index: int) -> np.ndarray:
        """float32 [B, H, W]; bands of a coarser resolution are brought to the largest size."""
        path = self._path(index)
        with _opened(path) as file:
            keys = list(file)
            bands = [self._band(file[_key_of(keys, name, path)], name, path) for name in self._stored_names]
        if len({band.shape for band in bands}) > 1:
            self._say_sizes(bands)
        return same_size(bands)

    def label(self, index: int) -> np.ndarray:
        """The label of a sample, see `LabelledSet.label`."""
        path = self._path(index)
        with _opened(path) as file:
            if self.task.kind == "segmentation":
                keys = [key for key in file if key.startswith("label")]
                if len(keys) != 1:
                    raise DatasetError(f"{path}: the label datasets {keys}; expected one")
                return checked_map(np.squeeze(file[keys[0]][()]), self.task, str(path))
            record = _record(file, path)
        if "label" not in record:
            raise DatasetError(f"{path}: no label in its attribute `pickle`")
        check = checked_class if self.task.kind == "multiclass" else checked_classes
        return check(record["label"], self.task, str(path))

    def location(self, index: int) -> tuple[float, float] | None:
        """(latitude, longitude) of the centre, from the first band's transform and reference system."""
        if self._known is not None and not self._known.is_located:
            return None
        path = self._path(index)
        with _opened(path) as file:
            key = _key_of(list(file), self._stored_names[0], path)
            attributes, shape = _record(file, path).get(key), file[key].shape[:2]
        transform, crs = (attributes or {}).get("transform"), (attributes or {}).get("crs")
        if not isinstance(transform, Record) or len(transform.args) < 6 or crs is None:
            return None
        return _centre(tuple(float(v) for v in transform.args[:6]), _crs_text(crs), shape, path)

    def present_classes(self) -> dict[str, np.ndarray] | None:
        """Split -> whether each class appears in it, bool [K], as label_map.json or label_stats.json tell; None without."""
        present = {split: np.zeros(self.task.num_classes, bool) for split in self.splits}
        split_of = {self._ids[i]: split for split, indices in self.splits.items() for i in indices}
        by_class, by_sample = self.folder / "label_map.json", self.folder / "label_stats.json"
        class_map = _name_lists(by_class) if self.task.kind == "multiclass" and by_class.is_file() else {}
        if set(split_of) <= {name for names in class_map.values() for name in names}:
            for label, names in class_map.items():
                index = checked_class(int(label) if label.isdecimal() else label, self.task, str(by_class))
                for split in {split_of[name] for name in names if name in split_of}:
                    present[split][index] = True
            return present
        stats = _json(by_sample) if by_sample.is_file() else {}
        if not set(split_of) <= set(stats):
            return None
        for name, split in split_of.items():
            try:
                present[split] |= np.asarray(stats[name], np.float64).reshape(present[split].shape) > 0
            except (TypeError, ValueError) as error:
                raise DatasetError(
                    f"{by_sample}: {name} has {str(stats[name])[:60]}; expected {self.task.num_classes} numbers, one a class"
                ) from error
        return present

    def _path(self, index: int) -> Path:
        return self.folder / f"{self._ids[index]}.hdf5"

    def _specs(self) -> Record:
        path = self.folder / SPECS
        specs = loads(_read(path), str(path))
        if not isinstance(specs, Record) or specs.kind != "TaskSpecifications":
            raise DatasetError(f"{path}: holds {getattr(specs, 'kind', type(specs).__name__)}; expected TaskSpecifications")
        return specs

    def _bands(self, infos: list[Record], known: PublishedTask, band_names: str) -> tuple[StoredBand, ...]:
        stats = _json(self.folder / "band_stats.json")
        lacking = [name for name in self._stored_names if not {"mean", "std"} <= set(stats.get(name, ()))]
        if lacking:
            raise DatasetError(f"{self.folder / 'band_stats.json'}: no mean and std of {few(lacking)}; get the file again")
        renamed = {}
        if known.true_bands and not names_are_wrong(self.folder.name, stats):
            _LOG.warning("%s: its statistics fit its band names, which are taken as they are", self.folder.name)
        elif known.true_bands and band_names == "published":
            _LOG.warning(
                "%s: band names as published, which are known to be wrong (%s); dataset.band_names=corrected mends them",
                self.folder.name,
                _shown(known.true_bands),
            )
        elif known.true_bands:
            renamed = known.true_bands
            _LOG.info("%s: wrong band names corrected: %s", self.folder.name, _shown(renamed))
        return tuple(self._stored_band(info, stats[str(info.get("name"))], known, renamed) for info in infos)

    def _stored_band(self, info: Record, stats: dict, known: PublishedTask, renamed: dict[str, str]) -> StoredBand:
        published = str(info.get("name"))
        if published in renamed:
            name, wavelength = renamed[published], SENTINEL2_UM.get(renamed[published])
        else:
            is_sentinel2 = info.kind == "Sentinel2"
            name = (sentinel2_name(published) if is_sentinel2 else None) or published
            wavelength = SENTINEL2_UM.get(name) if is_sentinel2 else info.get("wavelength")
        mean, std = float(stats["mean"]), float(stats["std"])
        if known.scale != 1 and info.kind == "Sentinel2" and mean > _REFLECTANCE_MOST:
            _LOG.info("%s: statistics of %s divided by %g, the unit of its values", self.folder.name, name, known.scale)
            mean, std = mean / known.scale, std / known.scale
        return StoredBand(name, None if wavelength is None else float(wavelength), mean, std)

    def _partition(self, partition: str) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
        path = self.folder / f"{partition}_partition.json"
        if not path.is_file():
            there = sorted(p.name.removesuffix("_partition.json") for p in self.folder.glob("*_partition.json"))
            raise DatasetError(f"no partition file {path}; dataset.partition can be {few(there) or '(there is none)'}")
        named = _name_lists(path)
        ids = tuple(dict.fromkeys(name for names in named.values() for name in names))
        present = {p.stem for p in self.folder.glob("*.hdf5")}
        absent = [name for name in ids if name not in present]
        if absent:
            raise DatasetError(
                f"{path} names {len(absent):,} samples of {len(ids):,} that are not in the folder: {few(absent)}; get the "
                "missing files, or write a partition of what is there"
            )
        index = {name: position for position, name in enumerate(ids)}
        return ids, checked_splits({s: [index[n] for n in names] for s, names in named.items()}, len(ids), str(path))

    def _say_sizes(self, bands: Sequence[np.ndarray]) -> None:
        """Log once which bands are stored coarser than others."""
        if not self._sizes_said:
            self._sizes_said = True
            sizes = {name: "x".join(map(str, band.shape)) for name, band in zip(self._stored_names, bands, strict=True)}
            _LOG.info(
                "%s: bands of several sizes are brought to the largest by repeating pixels: %s",
                self.task.name,
                ", ".join(f"{name} {size}" for name, size in sizes.items()),
            )

    def _band(self, dataset: h5py.Dataset, name: str, path: Path) -> np.ndarray:
        values = dataset[()]
        values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
        if values.ndim != 2 or values.dtype.kind not in "iufb":
            raise DatasetError(f"{path}: band {name} of shape {list(values.shape)}, {values.dtype}; expected numbers [H, W]")
        return values


def _class_names(label_type: Record, known: PublishedTask, folder: Path) -> tuple[str, ...]:
    num = label_type.get("n_classes")
    if not isinstance(num, int | np.integer) or num < 2:
        raise DatasetError(f"{folder / SPECS}: {num!r} classes; expected 2 or more")
    names = label_type.get("_class_names") or label_type.get("class_name") or known.class_names
    return tuple(map(str, names)) if len(names) == num else tuple(f"class {i}" for i in range(num))


def _opened(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DatasetError(f"{path}: not a readable HDF5 file ({error}); get it again") from error


def _record(file: h5py.File, path: Path) -> dict[str, Any]:
    record = loads_text(file.attrs.get("pickle"), str(path))
    if not isinstance(record, dict):
        raise DatasetError(f"{path}: the attribute `pickle` holds a {type(record).__name__}; expected a dict")
    return record


def _key_of(there: Sequence[str], band: str, path: Path) -> str:
    """The dataset of a band, whose name ends with a date where the set has dates."""
    keys = [key for key in there if key == band or (key.startswith(band) and _DATE.fullmatch(key[len(band) :]))]
    if len(keys) == 1:
        return keys[0]
    if keys:
        raise DatasetError(
            f"{path}: band {band} at {len(keys)} dates ({few(keys)}); expected one: write each date as a sample of its own, "
            "as GEO-Bench v1 does"
        )
    raise DatasetError(f"{path}: no band {band}; it has {few(there)}")


def _crs_text(crs: Any) -> str | None:
    value = (crs.state or (crs.args[0] if crs.args else None)) if isinstance(crs, Record) else crs
    return value if isinstance(value, str) and value else None


def _centre(transform: tuple[float, ...], crs: str | None, shape: tuple[int, int], path: Path) -> tuple[float, float] | None:
    header = Header((shape[0], shape[1]), np.dtype(np.float32), (), (), crs, transform, "")
    try:
        latitude, longitude = header.place(shape[0] / 2, shape[1] / 2, shape[0], shape[1])
    except UnreadableError as error:
        raise DatasetError(f"{path}: {error}") from error
    except SourceError as error:
        raise DatasetError(f"{path}: its place needs the package rasterio; pip install mpmae[eval]") from error
    inside = np.isfinite([latitude, longitude]).all() and abs(latitude) <= 90 and abs(longitude) <= 180
    return (float(latitude), float(longitude)) if inside else None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror or error}; expected a GEO-Bench task's folder as published") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise DatasetError(f"{path} is not JSON ({error}); get it again") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: the top level is a {type(content).__name__}; expected names with their content")
    return content


def _name_lists(path: Path) -> dict[str, list[str]]:
    content = _json(path)
    wrong = [f"{key}: {str(names)[:60]}" for key, names in content.items() if not isinstance(names, list)]
    if wrong:
        raise DatasetError(f"{path}: {few(wrong)}; expected lists of names; get it again")
    return {key: [str(name) for name in names] for key, names in content.items()}


def _shown(renamed: dict[str, str]) -> str:
    return ", ".join(f"{published!r} is {name}" for published, name in renamed.items())
