"""Labelled images in one HDF5 file, with their splits in a JSON file beside it.

Shapes: N samples, B bands, H x W pixels, K classes.

    NAME.h5     image [N, B, H, W]; label [N] (class), [N, K] (0 or 1 each) or [N, H, W] (label map, -1: no label);
                optional latlon [N, 2] in degrees and name [N]
                attributes: bands, classes; optional product_level ("l1c", "l2a"), scale (to reflectance x 10,000), no_data
                beside `image` or instead of it, as in MMEarth: sentinel2, sentinel1, aster, esa_worldcover, ...
                [N, B, H, W], each with MMEarth's no-data codes and bands (or those of its own attribute `bands`)
    NAME.json   {"splits": {"train": [0, 4, ...], "val": [...], "test": [...]}}; bands and classes may stand here instead
"""

import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mpmae.errors import DatasetError
from mpmae.eval.bands import SENTINEL2_UM, plain_band
from mpmae.eval.dataset import StoredBand, Task
from mpmae.eval.reading import (
    METRICS,
    checked_class,
    checked_classes,
    checked_map,
    checked_splits,
    few,
    same_size,
    with_statistics,
)
from mpmae.modalities import MODALITIES, ModalitySpec, no_data_rule

_CHECKS = {"multiclass": checked_class, "multilabel": checked_classes, "segmentation": checked_map}
_IMAGE = "image"
_KIND_OF_NDIM = {1: "multiclass", 2: "multilabel", 3: "segmentation"}


class LabelledH5:
    """An HDF5 file of labelled images, see this module and `mpmae.eval.dataset.LabelledSet`.

    product_level: "auto" (the file's attribute), "l1c", "l2a" or "none". Band statistics are of the training split, else of
    all samples. Raises DatasetError with every problem at once.
    """

    def __init__(self, path: Path, product_level: str = "auto", progress: bool = True):
        self.path, self._lock, self._owner, self._handle = Path(path), threading.Lock(), None, None
        facts = self._facts()
        problems, kind = self._problems(facts)
        if problems:
            raise DatasetError(problems)
        file = self._file()
        self._layers = _layers(file)
        self._num = len(file[self._layers[0]])
        classes = facts.get("classes")
        if classes is None:
            num = file["label"].shape[1] if kind == "multilabel" else int(np.max(file["label"][()])) + 1
            classes = [f"class {i}" for i in range(num)]
        level = facts.get("product_level") if product_level == "auto" else product_level
        self._no_data = facts.get("no_data")
        self.splits = checked_splits(facts.get("splits", {}), self._num, str(self.path))
        bands = [band for name in self._layers for band in _bands(file, name, facts)]
        self.task = Task(
            name=self.path.stem,
            kind=kind,
            class_names=tuple(map(str, classes)),
            bands=tuple(bands),
            metric=METRICS[kind],
            product_level=level if level in ("l1c", "l2a") else None,
            scale=float(facts.get("scale", 1)),
        )
        self.task = with_statistics(self, self.splits.get("train", np.arange(self._num)), progress)

    def __len__(self) -> int:
        return self._num

    def sample_id(self, index: int) -> str:
        """The name of a sample, or its index."""
        file = self._file()
        return str(_text(file["name"][index])) if "name" in file else str(index)

    def image(self, index: int) -> np.ndarray:
        """float32 [B, H, W], NaN where there is no data; bands of a coarser resolution are brought to the largest size."""
        parts = [self._layer(name, index) for name in self._layers]
        return parts[0] if len(parts) == 1 else same_size([band for part in parts for band in part])

    def _layer(self, name: str, index: int) -> np.ndarray:
        stored = self._read(name, index)
        image = stored.astype(np.float32)
        if name != _IMAGE:
            image[~no_data_rule(name, stored.dtype).valid(stored)] = np.nan
        elif self._no_data is not None:
            image[stored == self._no_data] = np.nan
        return image

    def label(self, index: int) -> np.ndarray:
        """The label of a sample, see `LabelledSet.label`."""
        return _CHECKS[self.task.kind](self._read("label", index), self.task, f"{self.path}: label[{index}]")

    def location(self, index: int) -> tuple[float, float] | None:
        """(latitude, longitude) as stored, or None."""
        if "latlon" not in self._file():
            return None
        latitude, longitude = (float(value) for value in self._read("latlon", index))
        return (latitude, longitude) if np.isfinite([latitude, longitude]).all() else None

    def present_classes(self) -> None:
        """None: the labels have to be read."""

    def _read(self, name: str, index: int) -> np.ndarray:
        try:
            return self._file()[name][index]
        except OSError as error:
            raise DatasetError(f"{self.path}: {name}[{index}] cannot be read ({error}); is the file whole?") from error

    def _file(self) -> h5py.File:
        """The open file; one handle in each process, since a fork must not share one."""
        with self._lock:
            if self._owner != os.getpid():
                try:
                    self._handle = h5py.File(self.path, "r")
                except OSError as error:
                    raise DatasetError(f"{self.path}: not a readable HDF5 file ({error})") from error
                self._owner = os.getpid()
            return self._handle

    def _facts(self) -> dict[str, Any]:
        """What the JSON file says, and the attributes over it."""
        facts: dict[str, Any] = {}
        beside = self.path.with_suffix(".json")
        candidates = [beside] if beside.is_file() else sorted(self.path.parent.glob("*.json"))
        for path in candidates:
            try:
                content = json.loads(path.read_text())
            except (OSError, ValueError) as error:
                raise DatasetError(f"{path} is not readable JSON ({error})") from error
            if isinstance(content, dict) and isinstance(content.get("splits"), dict):
                facts = content
                break
        for key, value in self._file().attrs.items():
            facts[key] = [_text(v) for v in value] if np.ndim(value) else _text(value)
        return facts

    def _problems(self, facts: dict[str, Any]) -> tuple[list[str], str]:
        file, problems = self._file(), []
        layers = _layers(file)
        lacking = [name for name, there in ((_IMAGE, layers), ("label", "label" in file)) if not there]
        if lacking:
            return [f"{self.path}: no dataset {', '.join(lacking)}; it has {few(list(file)) or 'none'}"], ""
        label, classes = file["label"].shape, facts.get("classes")
        kind = _KIND_OF_NDIM.get(len(label), "")
        for name in layers:
            problems += [f"{self.path}: {problem}" for problem in _layer_problems(file, name, facts)]
        shapes = [file[name].shape for name in layers if file[name].ndim == 4]
        image = (len(file[layers[0]]), 0, *(max([shape[axis] for shape in shapes], default=0) for axis in (2, 3)))
        if {len(file[name]) for name in layers} != {image[0]}:
            counts = ", ".join(f"{name} {len(file[name])}" for name in layers)
            problems.append(f"{self.path}: {counts} samples; expected as many of each")
        num_classes = len(classes) if classes is not None else None
        fits = {
            "multiclass": label == image[:1],
            "multilabel": label[:1] == image[:1] and num_classes in (None, *label[1:]),
            "segmentation": label == (*image[:1], *image[2:]),
        }
        if not fits.get(kind, False):
            problems.append(
                f"{self.path}: label of shape {list(label)} for {layers[0]} {list(file[layers[0]].shape)} and {num_classes} "
                "classes; expected [N], [N, K] or [N, H, W]"
            )
        elif file["label"].dtype.kind not in ("iub" if kind == "multiclass" else "iubf"):
            problems.append(f"{self.path}: label of type {file['label'].dtype}; expected whole numbers")
        elif classes is None and kind == "multiclass" and np.max(file["label"][()]) < 1:
            problems.append(f"{self.path}: no label above 0 and no `classes`; expected at least two classes")
        scale = facts.get("scale", 1)
        if not isinstance(scale, int | float) or not 0 < scale < math.inf:
            problems.append(f"{self.path}: scale = {scale!r}; expected a number above 0")
        names = file["name"][()].tolist() if "name" in file else []
        if len(set(names)) < len(names) or ("name" in file and len(names) != image[0]):
            problems.append(f"{self.path}: {len(set(names))} different names of {image[0]} samples; expected one for each")
        if facts.get("product_level", "none") not in ("l1c", "l2a", "none"):
            problems.append(f"{self.path}: product_level = {facts['product_level']!r}; expected l1c, l2a or none")
        return problems, kind


def _layers(file: h5py.File) -> list[str]:
    """The datasets with pixels: `image`, then those that are named as modalities."""
    maps = [spec.name for spec in MODALITIES.values() if spec.scope == "pixel"]
    return [name for name in (_IMAGE, *maps) if name in file]


def _layer_problems(file: h5py.File, name: str, facts: dict[str, Any]) -> list[str]:
    shape, bands = file[name].shape, _band_names(file, name, facts)
    if len(shape) != 4 or not shape[0]:
        return [f"{name} of shape {list(shape)}; expected [N, B, H, W]"]
    if not isinstance(bands, list) or len(bands) != shape[1] or len(set(bands)) != len(bands):
        where = "the attribute `bands`" if name == _IMAGE else f"the attribute `bands` of {name}"
        return [f"bands {bands}; expected {shape[1]} names, each once, in {where}"]
    unknown = [] if name == _IMAGE else [band for band in bands if band not in MODALITIES[name].bands]
    return [f"{name} has no band {', '.join(unknown)}; expected {', '.join(MODALITIES[name].bands)}"] if unknown else []


def _band_names(file: h5py.File, name: str, facts: dict[str, Any]) -> Any:
    if name == _IMAGE:
        return facts.get("bands")
    own = file[name].attrs.get("bands")
    return list(MODALITIES[name].bands) if own is None else [_text(band) for band in own]


def _bands(file: h5py.File, name: str, facts: dict[str, Any]) -> list[StoredBand]:
    names = _band_names(file, name, facts)
    if name == _IMAGE:
        return [StoredBand(*plain_band(band), 0.0, 1.0) for band in names]
    return [_band_of(MODALITIES[name], band) for band in names]


def _band_of(spec: ModalitySpec, band: str) -> StoredBand:
    name = spec.name if spec.kind == "categorical" else band
    return StoredBand(name, SENTINEL2_UM.get(band) if spec.name == "sentinel2" else None, 0.0, 1.0, spec.name)


def _text(value: Any) -> Any:
    value = value.decode() if isinstance(value, bytes) else value
    return value.item() if isinstance(value, np.generic) else value
