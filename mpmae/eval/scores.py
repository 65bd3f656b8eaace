"""Results of evaluations: one score per run, and what several runs say together."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpmae.errors import DatasetError
from mpmae.files import write_whole

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """What one run reached on one split.

    encoder: its label. method: such as "knn-5", "linear", "finetune". metrics: name -> fraction in [0, 1]; `metric` is the
    one that decides. fold: None without cross-validation. settings: what was chosen on the validation split, and facts of
    the input. per_sample: for accuracies 1 or 0 by sample id, from which intervals over images are drawn; may be empty.
    """

    encoder: str
    method: str
    task: str
    split: str
    metric: str
    metrics: Mapping[str, float]
    seed: int
    num_train: int
    fold: int | None = None
    label_fraction: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    per_sample: Mapping[str, float] = field(default_factory=dict, repr=False)

    @property
    def value(self) -> float:
        """The deciding metric."""
        return self.metrics[self.metric]


@dataclass(frozen=True)
class Summary:
    """What the runs of one encoder, method and label fraction say together.

    values: one per seed, the mean over its folds. mean, low, high: of the seeds, with the interval that holds the mean with
    a probability of 95 % if seeds scatter normally (Student's t); low and high are NaN for a single seed.
    """

    encoder: str
    method: str
    task: str
    split: str
    metric: str
    label_fraction: float
    num_train: int
    values: tuple[float, ...]
    mean: float
    low: float
    high: float


def summarise(scores: Iterable[Score], metric: str | None = None) -> list[Summary]:
    """One row per encoder, method, task, split and label fraction, in the order of first appearance.

    metric: None takes the one that decides.
    """
    groups: dict[tuple, dict[int, list[Score]]] = {}
    for score in scores:
        key = (score.encoder, score.method, score.task, score.split, metric or score.metric, score.label_fraction)
        groups.setdefault(key, {}).setdefault(score.seed, []).append(score)
    rows = []
    for key, by_seed in groups.items():
        values = tuple(float(np.mean([s.metrics[key[4]] for s in folds])) for folds in by_seed.values())
        num_train = round(float(np.mean([s.num_train for folds in by_seed.values() for s in folds])))
        rows.append(Summary(*key, num_train, values, *t_interval(values)))
    return rows


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of independent values: Student's t at 95 %; low and high are NaN for fewer than two values."""
    mean, num = float(np.mean(values)), len(values)
    if num < 2:
        return mean, math.nan, math.nan
    half = _t_quantile(num - 1) * float(np.std(values, ddof=1)) / math.sqrt(num)
    return mean, mean - half, mean + half


def write_scores(path: Path, scores: Sequence[Score], facts: Mapping[str, Any]) -> None:
    """Write scores and the facts of their evaluation as JSON, whole or not at all."""
    tree = {"format_version": 1, "facts": dict(facts), "scores": [dataclasses.asdict(score) for score in scores]}
    write_whole(path, json.dumps(tree, indent=1))


def read_scores(path: Path) -> tuple[list[Score], dict[str, Any]]:
    """Scores and facts of a file of `write_scores`. Raises DatasetError if it is none."""
    try:
        tree = json.loads(path.read_text())
        return [Score(**entry) for entry in tree["scores"]], tree["facts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path} holds no scores ({type(error).__name__}: {error}); run the evaluation again") from error


def _t_quantile(degrees_of_freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t, by bisection on its distribution function."""
    low, high = 0.0, 20.0
    target = 1 - (1 - CONFIDENCE) / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, degrees_of_freedom) < target else (low, middle)
    return (low + high) / 2


def _t_cdf(x: float, degrees_of_freedom: int) -> float:
    """Closed form for whole degrees of freedom. Source: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    n, angle = degrees_of_freedom, math.atan(x / math.sqrt(degrees_of_freedom))
    cos = math.cos(angle)
    if n % 2:
        total, term = 0.0, cos
        for j in range(3, n + 1, 2):
            total += term
            term *= cos * cos * (j - 1) / j
        share = 2 / math.pi * (angle + math.sin(angle) * total)
    else:
        total, term = 0.0, 1.0
        for j in range(2, n + 1, 2):
            total += term
            term *= cos * cos * (j - 1) / j
        share = math.sin(angle) * total
    return 0.5 + share / 2
