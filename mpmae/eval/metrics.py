"""Metrics by name, from torchmetrics: the one door to it.

Shapes: N images, K classes, H x W pixels.
"""

import torch
from torch import Tensor

from mpmae.errors import ConfigError
from mpmae.eval.dataset import IGNORED
from mpmae.eval.torchvision_import import let_torchvision_import

let_torchvision_import()

import torchmetrics.classification as tm  # noqa: E402
from torchmetrics import MetricCollection  # noqa: E402
from torchmetrics.utilities.data import dim_zero_cat  # noqa: E402


def metric_names(kind: str) -> tuple[str, ...]:
    """The metrics that a task of this kind is reported in."""
    return tuple(_metrics(kind, 2))


class Metrics:
    """Collects predictions batch by batch and gives every metric of the task's kind, as fractions in [0, 1].

    Classes that neither appear nor are predicted do not count in macro averages, and in map_macro no class that does not
    appear. map_* rank by score; the others decide: the best class, or for several labels each score above 0.5. over_ranks:
    `compute` is collective, and of what all ranks have added.
    """

    def __init__(self, kind: str, num_classes: int, device: torch.device | str = "cpu", *, over_ranks: bool = False):
        self._metrics = MetricCollection(_metrics(kind, num_classes, over_ranks), compute_groups=True).to(device)

    def update(self, scores: Tensor, target: Tensor) -> None:
        """Add a batch.

        multiclass: scores [N, K] (logits, probabilities or votes), target [N]. multilabel: scores [N, K] as probabilities,
        target [N, K] bool. segmentation: scores [N, K, H, W], or classes [N, H, W]; target [N, H, W], IGNORED where there is
        no label.
        """
        target = target.long()
        self._metrics.update(scores.float() if scores.is_floating_point() else scores, target)

    def compute(self) -> dict[str, float]:
        """Each metric of all that was added."""
        return {name: float(value) for name, value in self._metrics.compute().items()}


class OneMetric:
    """One metric of many sets of predictions, each for itself: much faster than all of them where a grid is searched."""

    def __init__(self, kind: str, num_classes: int, name: str, device: torch.device | str = "cpu"):
        self._metric = _metrics(kind, num_classes)[name].to(device)

    def __call__(self, scores: Tensor, target: Tensor) -> float:
        """The metric; shapes as for `Metrics.update`."""
        self._metric.reset()
        self._metric.update(scores, target.long())
        return float(self._metric.compute())


def evaluate(kind: str, num_classes: int, scores: Tensor, target: Tensor) -> dict[str, float]:
    """Every metric of one set of predictions; shapes as for `Metrics.update`."""
    metrics = Metrics(kind, num_classes, scores.device)
    metrics.update(scores, target)
    return metrics.compute()


class _MeanF1(tm.MultilabelF1Score):
    """Over the labels that appear or are predicted; torchmetrics' own macro average takes 0 for the others."""

    def compute(self) -> Tensor:
        tp, fp, _, fn = self._final_state()
        return super().compute()[tp + fp + fn > 0].mean()


class _MeanAveragePrecision(tm.MultilabelAveragePrecision):
    """Over the labels that appear; torchmetrics' own macro average takes 0 for the others."""

    def compute(self) -> Tensor:
        return super().compute()[dim_zero_cat(self.target).sum(0) > 0].mean()


def _metrics(kind: str, num_classes: int, over_ranks: bool = False) -> dict[str, tm.MulticlassAccuracy]:
    # without it torchmetrics waits for the other ranks, also where one alone computes
    common = {"validate_args": False, "sync_on_compute": over_ranks}
    if kind == "multiclass":
        options = {"num_classes": num_classes, **common}
        return {
            "accuracy": tm.MulticlassAccuracy(average="micro", **options),
            "accuracy_macro": tm.MulticlassAccuracy(average="macro", **options),
            "f1_macro": tm.MulticlassF1Score(average="macro", **options),
        }
    if kind == "multilabel":
        options = {"num_labels": num_classes, **common}
        return {
            "f1_micro": tm.MultilabelF1Score(average="micro", **options),
            "f1_macro": _MeanF1(average="none", **options),
            "map_micro": tm.MultilabelAveragePrecision(average="micro", **options),
            "map_macro": _MeanAveragePrecision(average="none", **options),
        }
    if kind == "segmentation":
        options = {"num_classes": num_classes, **common, "ignore_index": IGNORED}
        return {
            "miou": tm.MulticlassJaccardIndex(average="macro", **options),
            "accuracy": tm.MulticlassAccuracy(average="micro", **options),
            "f1_macro": tm.MulticlassF1Score(average="macro", **options),
        }
    raise ConfigError(f"no metrics for a task of kind {kind!r}")
