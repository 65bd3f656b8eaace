"""Metrics of several labels where a split lacks one of them."""

import pytest
import torch

from mpmae.eval.metrics import Metrics, OneMetric, evaluate, tm


def some_predictions(num_labels: int, absent: int):
    """Scores and labels of 60 images, none of which has the label `absent`."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.rand(60, num_labels, generator=draw)
    target = (torch.rand(60, num_labels, generator=draw) < 0.4).long()
    target[:, absent] = 0
    return scores, target


def test_a_label_that_a_split_lacks_does_not_count():
    scores, target = some_predictions(4, absent=2)
    there = [0, 1, 3]
    found = evaluate("multilabel", 4, scores, target)
    assert found["map_macro"] == pytest.approx(float(tm.MultilabelAveragePrecision(3)(scores[:, there], target[:, there])))
    with_false_alarms = float(tm.MultilabelF1Score(4)(scores, target))
    assert found["f1_macro"] == pytest.approx(with_false_alarms), "it was predicted, so it counts as 0"
    scores[:, 2] *= 0.4
    found = evaluate("multilabel", 4, scores, target)
    assert found["f1_macro"] == pytest.approx(float(tm.MultilabelF1Score(3)(scores[:, there], target[:, there])))
    assert evaluate("multilabel", 4, 0.9 * target, target) == pytest.approx(
        {"f1_micro": 1.0, "f1_macro": 1.0, "map_micro": 1.0, "map_macro": 1.0}
    )


@pytest.mark.parametrize("name", ["f1_micro", "f1_macro", "map_micro", "map_macro"])
def test_batches_give_what_all_at_once_gives(name):
    scores, target = some_predictions(4, absent=1)
    metrics = Metrics("multilabel", 4)
    for part in range(0, 60, 25):
        metrics.update(scores[part : part + 25], target[part : part + 25])
    assert metrics.compute()[name] == pytest.approx(evaluate("multilabel", 4, scores, target)[name])
    assert OneMetric("multilabel", 4, name)(scores, target) == pytest.approx(evaluate("multilabel", 4, scores, target)[name])
