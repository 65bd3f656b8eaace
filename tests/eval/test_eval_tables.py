"""What tables say of seeds and images, against hand-made scores."""

import math

import numpy as np
import pytest
from rich.console import Console

from mpmae.eval.encoders import RANDOM_INIT
from mpmae.eval.intervals import bootstrap, by_image, paired_bootstrap
from mpmae.eval.scores import Score
from mpmae.eval.tables import markdown, results_table, standings, terminal


def score(encoder: str, seed: int, right: list[int], fold: int | None = None, **options) -> Score:
    per_sample = {f"{fold}-{i}": float(value) for i, value in enumerate(right)}
    accuracy = sum(right) / len(right)
    metrics = {"accuracy": accuracy, "f1_macro": accuracy / 2}
    options = {"metric": "accuracy", "num_train": 10, "per_sample": per_sample, **options}
    return Score(encoder, "knn-5", "t", "test", metrics=metrics, seed=seed, fold=fold, **options)


def test_runs_are_averaged_by_image():
    scores = [score("a", 0, [1, 0]), score("a", 1, [1, 1]), score("a", 1, [0, 0], fold=1)]
    assert by_image(scores) == {"None-0": 1.0, "None-1": 0.5, "1-0": 0.0, "1-1": 0.0}


def test_the_bootstrap_interval_is_that_of_a_proportion():
    values = {str(i): float(i < 300) for i in range(400)}
    mean, low, high = bootstrap(values)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert mean == 0.75
    np.testing.assert_allclose([low, high], [0.75 - half, 0.75 + half], atol=0.004)
    assert bootstrap(values) == bootstrap(dict(reversed(values.items())))
    assert bootstrap(values) != bootstrap(values, seed=1)
    assert all(math.isnan(bound) for bound in bootstrap({"a": 1.0})[1:])


def test_the_paired_difference_is_surer_than_two_intervals():
    ours = {str(i): float(i % 2 or i % 10 == 0) for i in range(400)}
    other = {str(i): float(i % 2) for i in range(400)} | {"elsewhere": 1.0}
    mean, low, high = paired_bootstrap(ours, other)
    assert mean == pytest.approx(0.1)
    assert 0.06 < low < 0.1 < high < 0.14


def test_a_table_says_what_is_known():
    scores = [score("ours", seed, [1, 1, 1, min(seed, 1)]) for seed in range(3)]
    scores += [score("stats", seed, [1, 0, 1, 1]) for seed in range(3)]
    scores += [score(RANDOM_INIT, seed, [0, 1, 1, 0]) for seed in range(3)]
    table = results_table(scores)
    assert table.header[:6] == ("encoder", "method", "train images", "accuracy %", "over seeds", "over images")
    ours, stats, random = table.rows
    assert ours[3] == "91.7"  # of 3/4, 1, 1
    assert ours[4] == "[55.8, 127.5]"  # 91.67 +- 4.303 * 14.43 / sqrt(3)
    assert stats[4] == random[4] == "all equal"
    assert ours[6].startswith("+41.7 [")
    assert random[6] == "–"
    assert stats[7] == "37.5"
    assert any("All equal" in note for note in table.notes)
    assert not standings(scores)[0].seeds_agree
    assert not standings([score("a", 0, [1, 0]), score("a", 1, [0, 1])])[0].seeds_agree  # as many, but others


def test_one_seed_and_other_metrics_are_named_as_such():
    table = results_table([score("a|b", 0, [1, 0], metric="f1_macro", per_sample={})])
    assert table.rows[0][3:5] == ("25.0", "one seed")
    assert "over images" not in table.header
    text = markdown(table)
    assert "a&#124;b" in text
    assert "not known" in text
    console = Console(record=True, width=120)
    console.print(terminal(table))
    assert "F1 macro %" in console.export_text()


def test_fractions_get_a_column_and_gains_of_their_own():
    scores = [
        score(name, 0, [int(i < num) for i in range(4)], label_fraction=share)
        for share, name, num in ((0.1, "a", 1), (0.1, RANDOM_INIT, 0), (1.0, "a", 3), (1.0, RANDOM_INIT, 2))
    ]
    table = results_table(scores)
    at = table.header.index("gain on random init")
    assert [row[2] for row in table.rows] == ["10 %", "10 %", "100 %", "100 %"]
    assert [row[at].split()[0] for row in table.rows] == ["+25.0", "–", "+25.0", "–"]
