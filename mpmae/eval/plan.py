"""Which runs an evaluation has: label fractions x seeds x folds, and the samples of each.

Shapes: N samples, K classes.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mpmae.eval.config import DatasetSection
from mpmae.eval.dataset import IGNORED, LabelledSet
from mpmae.eval.folds import folds, fraction
from mpmae.in_order import in_order


@dataclass(frozen=True)
class Run:
    """One division of a set. fold: None without cross-validation.

    splits: indices into the set; "train" has the run's part of the labels. unlabelled: all images of the training split,
    for what needs no labels.
    """

    seed: int
    label_fraction: float
    fold: int | None
    splits: Mapping[str, np.ndarray]
    unlabelled: np.ndarray


def plan_runs(labelled: LabelledSet, labels: np.ndarray, section: DatasetSection, seeds: Sequence[int]) -> Iterator[Run]:
    """The runs: label fractions within folds within seeds. Each seed draws its own folds and fractions.

    labels: of `class_labels`. Fractions of one seed and fold are nested.
    """
    for seed in dict.fromkeys(seeds):
        cuts = [labelled.splits] if section.num_folds is None else folds(labels, section.num_folds, seed)
        for number, cut in enumerate(cuts):
            for share in dict.fromkeys(section.label_fractions):
                train = np.asarray(cut["train"])
                part = train if share == 1 else fraction(labels, train, share, seed)
                yield Run(seed, share, None if section.num_folds is None else number, {**cut, "train": part}, train)


def labels_identity(labelled: LabelledSet, labels: np.ndarray) -> str:
    """A hash of what runs are planned from: `class_labels` and the set's own splits."""
    digest = hashlib.sha256(labels.tobytes())
    for split, rows in sorted(labelled.splits.items()):
        digest.update(split.encode() + np.asarray(rows, np.int64).tobytes())
    return digest.hexdigest()


def class_labels(labelled: LabelledSet, num_workers: int = 2) -> np.ndarray:
    """The class of each sample [N] int64, or bool [N, K]: which classes it has, also in a label map."""
    labels = list(in_order(labelled.label, range(len(labelled)), max(1, num_workers)))
    if labelled.task.kind != "segmentation":
        return np.stack(labels)
    present = np.zeros((len(labels), labelled.task.num_classes), bool)
    for row, label in zip(present, labels, strict=True):
        classes = np.unique(label)
        row[classes[classes != IGNORED]] = True
    return present
