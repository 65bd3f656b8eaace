"""The labelled set that a configuration names, whatever its format, with its splits checked."""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mpmae.errors import DatasetError
from mpmae.eval.config import DatasetSection
from mpmae.eval.dataset import LabelledSet
from mpmae.eval.geobench import SPECS, GeoBenchSet
from mpmae.eval.geotiff_table import GeoTiffTable
from mpmae.eval.labelled_h5 import LabelledH5
from mpmae.eval.reading import few
from mpmae.in_order import in_order
from mpmae.shard_tools.progress import track

_LOG = logging.getLogger(__name__)
_Readable = GeoBenchSet | LabelledH5 | GeoTiffTable
_H5 = (".h5", ".hdf5", ".hdf")


def open_set(section: DatasetSection, progress: bool = True) -> LabelledSet:
    """The set at `section.path`, in the format that lies there or that `section.format` says.

    A folder with task_specs.pkl is a GEO-Bench task; an HDF5 file, or a folder with one, is read by
    `mpmae.eval.labelled_h5`; a CSV file, or a folder with one, by `mpmae.eval.geotiff_table`. Raises DatasetError when there
    is none or more than one, when splits are missing that `section.num_folds` does not replace, and when a class of a
    single-label set has no training sample. Classes that other splits lack, and what is known of the set, are logged.
    """
    form, path = _found(Path(section.path), section.format)
    if form == "geobench":
        labelled = GeoBenchSet(path, section.partition, section.band_names, section.product_level)
    elif form == "h5":
        labelled = LabelledH5(path, section.product_level, progress)
    else:
        labelled = GeoTiffTable(path, section.product_level, progress)
    task = labelled.task
    _LOG.info(
        "%s (%s): %s with %d classes, %d bands, product level %s, samples %s",
        task.name,
        form,
        task.kind,
        task.num_classes,
        len(task.bands),
        task.product_level or "not known",
        ", ".join(f"{split} {len(indices)}" for split, indices in labelled.splits.items()) or len(labelled),
    )
    if section.num_folds is None:
        lacking = [split for split in ("train", "val", "test") if split not in labelled.splits]
        if lacking:
            raise DatasetError(
                f"{path}: no samples in {', '.join(lacking)}; give the set these splits, or cross-validate with "
                "dataset.num_folds=5"
            )
        _check_classes(labelled, progress)
    return labelled


def _check_classes(labelled: _Readable, progress: bool) -> None:
    """Log the classes that a split lacks; DatasetError where train lacks one of a single-label set.

    Of several labels or a label map, a class without training samples is a warning: a subset may lack rare ones.
    """
    problems = []
    for split, present in _present(labelled, progress).items():
        lacking = [name for name, there in zip(labelled.task.class_names, present, strict=True) if not there]
        if not lacking:
            continue
        message = f"{labelled.task.name}: split {split} has no sample of {few(lacking)}"
        if split == "train" and labelled.task.kind == "multiclass":
            problems.append(f"{message}; a classifier cannot learn what it never sees: add samples, or drop the class")
        else:
            _LOG.warning("%s", message)
    if problems:
        raise DatasetError(problems)


def _present(labelled: _Readable, progress: bool) -> Mapping[str, np.ndarray]:
    """Split -> whether each class appears in it, bool [K]."""
    known = labelled.present_classes()
    if known is not None:
        return known
    task, present = labelled.task, {}
    for split, indices in labelled.splits.items():
        present[split] = np.zeros(task.num_classes, bool)
        labels = track(in_order(labelled.label, indices.tolist()), len(indices), f"labels of {split}", "samples", progress)
        for label in labels:
            if task.kind == "multilabel":
                present[split] |= label
            else:
                classes = np.unique(label)
                present[split][classes[classes >= 0]] = True
    return present


def _found(path: Path, form: str) -> tuple[str, Path]:
    """The format and the folder or file that its reader takes."""
    if not path.exists():
        raise DatasetError(
            f"dataset.path: nothing at {path}; expected a GEO-Bench task's folder, an HDF5 file, or a CSV table"
        )
    if path.is_file():
        by_suffix = {**dict.fromkeys(_H5, "h5"), ".csv": "geotiff"}
        there = [(by_suffix[path.suffix.lower()], path)] if path.suffix.lower() in by_suffix else []
    elif (path / SPECS).is_file():
        there = [("geobench", path)]
    else:
        there = [("h5", p) for suffix in _H5 for p in sorted(path.glob(f"*{suffix}"))]
        there += [("geotiff", p) for p in sorted(path.glob("*.csv"))]
    there = [found for found in there if form in ("auto", found[0])]
    if len(there) == 1:
        return there[0]
    if not there and form in ("h5", "geotiff") and path.is_file():
        return form, path
    tasks = sorted(p.parent.name for p in path.glob(f"*/{SPECS}")) if path.is_dir() else []
    if tasks:
        raise DatasetError(f"dataset.path: {path} holds GEO-Bench tasks; name one of them: {few(tasks, 12)}")
    raise DatasetError(
        f"dataset.path: {path} holds {few([p.name for _, p in there]) or 'no labelled set'} (dataset.format={form}); "
        f"expected one GEO-Bench task ({SPECS}), one HDF5 file ({', '.join(_H5)}) or one CSV table"
    )
