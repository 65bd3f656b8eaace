"""What readers of labelled sets have in common: checks of labels and splits, bands of several sizes, statistics.

Shapes: B bands, H x W pixels, K classes.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from mpmae.errors import DatasetError
from mpmae.eval.dataset import IGNORED, SPLITS, LabelledSet, Task
from mpmae.in_order import in_order
from mpmae.shard_tools.progress import track

_LOG = logging.getLogger(__name__)

METRICS = {"multiclass": "accuracy", "multilabel": "map_macro", "segmentation": "miou"}
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_MAX_IMAGES = 10_000  # statistics of more change in digits that do not matter


def checked_class(value: object, task: Task, where: str) -> np.ndarray:
    """A class index [] int64. Raises DatasetError for what is no integer in [0, K)."""
    label = np.asarray(value)
    if label.shape != () or label.dtype.kind not in "iub" or not 0 <= label < task.num_classes:
        raise DatasetError(
            f"{where}: label {label}; expected one of the classes 0..{task.num_classes - 1} of {task.name} "
            f"({few(task.class_names)})"
        )
    return label.astype(np.int64)


def checked_classes(value: object, task: Task, where: str) -> np.ndarray:
    """Classes [K] bool. Raises DatasetError for what is not K times 0 or 1."""
    label = np.asarray(value)
    if label.shape != (task.num_classes,) or label.dtype.kind not in "iubf" or not np.isin(label, (0, 1)).all():
        raise DatasetError(
            f"{where}: labels of shape {list(label.shape)} with values {few(np.unique(label))}; expected 0 or 1 for each "
            f"of the {task.num_classes} classes of {task.name}"
        )
    return label.astype(bool)


def checked_map(value: np.ndarray, task: Task, where: str) -> np.ndarray:
    """A label map [H, W] int64. Raises DatasetError for a value that is neither a class nor IGNORED."""
    if value.ndim != 2 or value.dtype.kind not in "iubf":
        raise DatasetError(
            f"{where}: a label map of shape {list(value.shape)}, {value.dtype}; expected whole numbers [H, W]"
        )
    label = value.astype(np.int64)
    wrong = np.unique(value[(label != value) | (((label < 0) | (label >= task.num_classes)) & (label != IGNORED))])
    if wrong.size:
        raise DatasetError(
            f"{where}: the label map holds {few(wrong)}; expected the classes 0..{task.num_classes - 1} of {task.name}, or "
            f"{IGNORED} where there is no label"
        )
    return label


def same_size(bands: Sequence[np.ndarray]) -> np.ndarray:
    """Bands [H_b, W_b] of several sizes as one float32 [B, H, W] of the largest, by repeating pixels (nearest neighbour)."""
    height, width = (max(band.shape[axis] for band in bands) for axis in (0, 1))
    image = np.empty((len(bands), height, width), np.float32)
    for target, band in zip(image, bands, strict=True):
        rows = np.arange(height) * band.shape[0] // height
        columns = np.arange(width) * band.shape[1] // width
        target[:] = band if band.shape == (height, width) else band[rows[:, None], columns]
    return image


def checked_splits(named: Mapping[str, Sequence[int]], num_samples: int, where: str) -> dict[str, np.ndarray]:
    """Indices by split, with "valid" as "val". Raises DatasetError: unknown names, samples out of range, twice or shared."""
    problems, splits, owner = [], {}, {}
    for name, indices in named.items():
        split = SPLIT_NAMES.get(str(name).strip().lower())
        if split is None or split in splits:
            problems.append(f"{where}: a split {name!r}; expected each of {', '.join(SPLITS)} once")
            continue
        if not isinstance(indices, Sequence | np.ndarray) or isinstance(indices, str | bytes):
            problems.append(f"{where}: split {name} is of type {type(indices).__name__}; expected a list of sample indices")
            continue
        wrong = [i for i in indices if isinstance(i, bool) or not isinstance(i, int | np.integer)]
        if wrong:
            problems.append(f"{where}: split {name} holds {few([repr(i) for i in wrong])}; expected indices of samples")
            continue
        array = np.asarray(indices, np.int64).reshape(-1)
        outside = array[(array < 0) | (array >= num_samples)]
        if outside.size:
            problems.append(f"{where}: split {name} names {few(outside)}; the set has the samples 0..{num_samples - 1}")
        shared = {owner[i] for i in array.tolist() if i in owner} | (
            {split} if len(set(array.tolist())) < len(array) else set()
        )
        if shared:
            problems.append(f"{where}: split {name} has samples that are also in {', '.join(sorted(shared))}, or twice")
        owner.update(dict.fromkeys(array.tolist(), split))
        splits[split] = array
    if problems:
        raise DatasetError(problems)
    return {split: splits[split] for split in SPLITS if split in splits and splits[split].size}


def with_statistics(labelled: LabelledSet, indices: np.ndarray, progress: bool = True) -> Task:
    """The set's task with mean and spread of each band over the images `indices`, no data left out.

    Of more than 10,000 images every n-th is read. A band without any valid value keeps mean 0 and std 1 if the set says its
    modality, which may lack bands (a radar's polarisations); else DatasetError is raised.
    """
    step = -(-len(indices) // _MAX_IMAGES)
    chosen = np.asarray(indices)[::step]
    count, total, squares = (np.zeros(len(labelled.task.bands)) for _ in range(3))
    shift = None  # of the first image: keeps the sum of squares from cancelling
    for image in track(in_order(labelled.image, chosen.tolist()), len(chosen), "band statistics", "images", progress):
        values, valid = image.astype(np.float64), np.isfinite(image)
        if shift is None:
            shift = np.array([band[ok].mean() if ok.any() else 0.0 for band, ok in zip(values, valid, strict=True)])
        values = np.where(valid, values - shift[:, None, None], 0)
        count += valid.sum((1, 2))
        total += values.sum((1, 2))
        squares += np.square(values).sum((1, 2))
    without = [band for band, num in zip(labelled.task.bands, count, strict=True) if not num]
    empty = [band.name for band in without if band.modality is None]
    if empty:
        raise DatasetError(f"{labelled.task.name}: the bands {', '.join(empty)} have no valid value in {len(chosen)} images")
    if without:
        _LOG.info("%s: no valid value of %s", labelled.task.name, ", ".join(band.name for band in without))
    mean = total / np.maximum(count, 1)
    std = np.where(count > 0, np.sqrt(np.maximum(squares / np.maximum(count, 1) - mean**2, 0)), 1.0)
    _LOG.info("%s: band statistics over %d of %d images", labelled.task.name, len(chosen), len(indices))
    bands = [
        replace(band, mean=float(m), std=float(s)) for band, m, s in zip(labelled.task.bands, mean + shift, std, strict=True)
    ]
    return replace(labelled.task, bands=tuple(bands))


def few(values: Sequence[object], most: int = 5) -> str:
    """The first values as text, and how many there are in all."""
    shown = [str(value) for value in list(values)[:most]]
    return ", ".join(shown) + (f", ... ({len(values)} in all)" if len(values) > most else "")
