"""Labelled sets in memory whose answer is known: a class is a band that is brighter than the others."""

import threading
from collections import Counter

import numpy as np

from mpmae.eval.dataset import StoredBand, Task

BANDS = (("B2", 0.49), ("B3", 0.56), ("B4", 0.665), ("B8", 0.842))
METRIC = {"multiclass": "accuracy", "multilabel": "map_macro", "segmentation": "miou"}


class MemorySet:
    """See `mpmae.eval.dataset.LabelledSet`. reads: how often each image was read."""

    def __init__(self, kind, images, labels, splits, num_classes):
        bands = [StoredBand(*band, float(images[:, i].mean()), float(images[:, i].std())) for i, band in enumerate(BANDS)]
        names = tuple(f"class {i}" for i in range(num_classes))
        self.task = Task(f"synthetic {kind}", kind, names, tuple(bands), METRIC[kind])
        self.splits = splits
        self.reads = Counter()
        self._images, self._labels, self._lock = images, labels, threading.Lock()

    def __len__(self):
        return len(self._images)

    def sample_id(self, index):
        return f"sample-{index}"

    def image(self, index):
        with self._lock:
            self.reads[index] += 1
        return self._images[index].copy()

    def label(self, index):
        return self._labels[index]

    def location(self, index):
        return None


def bright_bands(kind="multiclass", sizes=(24, 12, 12), side=16, contrast=4.0, seed=0):
    """A set of noise in which the band of each class that an image (or a pixel) has is brighter by `contrast` spreads.

    sizes: samples of train, val and test.
    """
    rng = np.random.default_rng(seed)
    num, num_classes = sum(sizes), 3
    images = rng.normal(size=(num, len(BANDS), side, side)).astype(np.float32)
    if kind == "multilabel":
        labels = rng.random((num, num_classes)) < 0.5
        images[:, :num_classes] += contrast * labels[:, :, None, None]
    elif kind == "segmentation":
        labels = np.repeat(np.repeat(rng.integers(num_classes, size=(num, 2, 2)), side // 2, 1), side // 2, 2)
        images[:, :num_classes] += contrast * (labels[:, None] == np.arange(num_classes)[:, None, None])
    else:
        labels = np.arange(num) % num_classes
        images[np.arange(num), labels] += contrast
    ends = np.cumsum((0, *sizes))
    splits = {name: np.arange(a, b) for name, a, b in zip(("train", "val", "test"), ends[:-1], ends[1:], strict=True)}
    return MemorySet(kind, images, labels, splits, num_classes)
