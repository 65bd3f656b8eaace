"""From features and labels to a score: one method on one division of the samples, the test labels read once.

Shapes: N samples of the set, D features, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mpmae.errors import ConfigError
from mpmae.eval.knn import knn_shares
from mpmae.eval.linear import Examples, Fit, Judge, Standardise, best_fit, logistic, ridge
from mpmae.eval.linear_steps import Schedule, gradient_steps
from mpmae.eval.metrics import evaluate
from mpmae.eval.probe_config import ProbeSection

_KNN = "knn-"
_LINEAR = "linear-"


class SealedLabels:
    """Labels of the test split, handed out once: whatever is chosen must have been chosen by then."""

    def __init__(self, labels: np.ndarray):
        self._labels: np.ndarray | None = labels

    def __len__(self) -> int:
        return 0 if self._labels is None else len(self._labels)

    def open(self) -> np.ndarray:
        """The labels; AssertionError the second time."""
        if self._labels is None:
            raise AssertionError("the test labels of this run have been read already")
        labels, self._labels = self._labels, None
        return labels


@dataclass(frozen=True)
class Division:
    """Features and labels of one run: labels are classes [n], or [n, K] bool for several labels per sample.

    features: split -> [n, D]. labels: split -> labels of train and val. test: those of the test split, sealed.
    """

    features: Mapping[str, Tensor]
    labels: Mapping[str, np.ndarray]
    test: SealedLabels
    kind: str
    num_classes: int

    @classmethod
    def of(
        cls, features: Tensor, labels: np.ndarray, splits: Mapping[str, np.ndarray], kind: str, num_classes: int
    ) -> "Division":
        """That of a set's features [N, D] and labels by a run's splits."""
        return cls(
            {split: features[torch.from_numpy(np.asarray(rows))] for split, rows in splits.items()},
            {split: labels[rows] for split, rows in splits.items() if split != "test"},
            SealedLabels(labels[splits["test"]]),
            kind,
            num_classes,
        )


@dataclass(frozen=True)
class Outcome:
    """metrics: all of the task's kind, of the test split. correct: per test sample 1 or 0; None for several labels."""

    metrics: dict[str, float]
    correct: np.ndarray | None
    settings: dict[str, Any] = field(default_factory=dict)


def method_names(section: ProbeSection) -> list[str]:
    """ "knn-5", "linear-ridge", ...: what `run_method` takes."""
    names = []
    for method in dict.fromkeys(section.methods):
        names += [f"{_KNN}{k}" for k in dict.fromkeys(section.ks)] if method == "knn" else [_LINEAR + method]
    return names


def run_method(
    name: str, division: Division, section: ProbeSection, metric: str, seed: int, device: torch.device | str = "cpu"
) -> Outcome:
    """What a method reaches on the test split, whose labels are read once, when the predictions are there.

    metric: decides on the validation split. seed: of mini-batches. Raises ConfigError for splits that are empty.
    """
    empty = [split for split, rows in division.features.items() if not len(rows)]
    if empty:
        raise ConfigError(f"{name}: no samples in {', '.join(empty)}; use larger splits, or fewer dataset.num_folds")
    train = _examples(division, "train", device)
    test = division.features["test"].to(device)
    if name.startswith(_KNN):
        k = min(int(name.removeprefix(_KNN)), len(train))
        scores, settings = knn_shares(train.features, train.classes, test, k), {"k": k}
    else:
        val = _examples(division, "val", device)
        standardise = Standardise.to(train.features)
        judge = Judge(replace(val, features=standardise(val.features)), metric)
        solver = _Solver(name.removeprefix(_LINEAR), section, seed)
        fit = solver.search(replace(train, features=standardise(train.features)), judge)
        settings = {**fit.settings, "val": judge(fit), "fit_with_val": section.fit_with_val}
        if section.fit_with_val:
            both = train.joined(val)
            standardise = Standardise.to(both.features)
            fit = solver.again(replace(both, features=standardise(both.features)), fit)
        scores = fit.scores(standardise(test), division.kind)
    return _outcome(division, scores, settings)


@dataclass(frozen=True)
class _Solver:
    """A solver of the linear probe, over its grid or once more with what was chosen from it."""

    name: str
    section: ProbeSection
    seed: int

    def search(self, train: Examples, judge: Judge) -> Fit:
        if self.name in ("ridge", "lbfgs"):
            return best_fit(self._closed(train, self.section.strengths), judge)
        return gradient_steps(train, self._schedule(), judge)

    def again(self, train: Examples, chosen: Fit) -> Fit:
        if self.name in ("ridge", "lbfgs"):
            return next(self._closed(train, [chosen.settings["strength"]]))
        point = {"lrs": [chosen.settings["lr"]], "weight_decays": [chosen.settings["weight_decay"]]}
        return gradient_steps(train, replace(self._schedule(), **point, stop_after=chosen.settings["epochs"]), None)

    def _closed(self, train: Examples, strengths: Any) -> Any:
        return (ridge if self.name == "ridge" else logistic)(train, strengths)

    def _schedule(self) -> Schedule:
        section = self.section
        lrs = section.sgd_lrs if self.name == "sgd" else section.lrs
        return Schedule(self.name, lrs, section.weight_decays, section.epochs, section.batch_size, self.seed)


def _examples(division: Division, split: str, device: torch.device | str) -> Examples:
    labels = torch.from_numpy(np.asarray(division.labels[split])).to(device)
    classes = F.one_hot(labels.long(), division.num_classes) if division.kind == "multiclass" else labels
    return Examples(division.features[split].to(device), classes.float(), division.kind)


def _outcome(division: Division, scores: Tensor, settings: dict[str, Any]) -> Outcome:
    target = torch.from_numpy(np.asarray(division.test.open())).to(scores.device)
    metrics = evaluate(division.kind, division.num_classes, scores, target)
    correct = (scores.argmax(1) == target).cpu().numpy() if division.kind == "multiclass" else None
    return Outcome(metrics, correct, settings)
