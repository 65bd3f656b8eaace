"""How well the orders mix sorted input, beside true permutations, and what an epoch of 1.2M samples costs."""

import sys

import numpy as np
import pytest

NUM_SHARDS, SHARD_SIZE, NUM_CLASSES, BATCH_SIZE, NUM_EPOCHS = 64, 250, 8, 256, 6


@pytest.fixture(scope="module")
def bench(repo):
    """benchmarks/order.py."""
    sys.path.insert(0, str(repo / "benchmarks"))
    try:
        import order

        yield order
    finally:
        sys.path.remove(str(repo / "benchmarks"))
        for name in ("order", "record", "results_order", "page"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def quality(bench):
    """{labels or "met_again": {order: mean over epochs}}."""
    runs = [bench.quality(NUM_SHARDS, SHARD_SIZE, NUM_CLASSES, BATCH_SIZE, epoch) for epoch in range(NUM_EPOCHS)]
    mix = {
        (labels, order, key): np.mean([run["mix"][labels][order][key] for run in runs])
        for labels, by_order in runs[0]["mix"].items()
        for order, row in by_order.items()
        for key in row
    }
    return mix, {order: np.mean([run["met_again"][order] for run in runs]) for order in runs[0]["met_again"]}


def test_the_statistics_on_cases_known_by_hand(bench):
    labels = np.array([0, 0, 1, 1])
    split = bench.class_mix(np.arange(4), labels, 2)
    assert (split["total_variation"], split["distinct_classes"]) == (0.5, 1.0)
    assert split["chi_square"] == pytest.approx(2 * 3 / 2)
    even = bench.class_mix(np.array([0, 2, 1, 3]), labels, 2)
    assert even == {"total_variation": 0.0, "chi_square": 0.0, "distinct_classes": 2.0}
    assert bench.met_again(np.arange(4), np.array([1, 0, 3, 2]), 2) == 1.0
    assert bench.met_again(np.arange(4), np.array([0, 2, 1, 3]), 2) == 0.0


def test_buffer_shuffle_keeps_every_sample_and_moves_none_far_ahead(bench):
    shuffled = bench.buffer_shuffle(np.arange(1000), 50, seed=1)
    assert np.array_equal(np.sort(shuffled), np.arange(1000))
    assert (shuffled - np.arange(1000)).max() <= 50


@pytest.mark.parametrize("labels", ["as built", "sorted"])
def test_exact_mixes_as_a_true_permutation(quality, labels):
    """Chi-square per degree of freedom is 1 within 10 %, the distance that of a true permutation within 5 %."""
    mix, _ = quality
    assert mix[labels, "exact", "chi_square"] == pytest.approx(1, abs=0.1)
    expected = mix[labels, "true permutation", "total_variation"]
    assert mix[labels, "exact", "total_variation"] == pytest.approx(expected, rel=0.05)
    assert mix[labels, "exact", "distinct_classes"] == NUM_CLASSES


@pytest.mark.parametrize("window", [1, 4, 16])
def test_a_window_over_built_shards_mixes_as_a_true_permutation(quality, window):
    mix, _ = quality
    name = f"window, {window} shard{'s' * (window > 1)}"
    assert mix["as built", name, "chi_square"] == pytest.approx(1, abs=0.1)
    expected = mix["as built", "true permutation", "total_variation"]
    assert mix["as built", name, "total_variation"] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("window", [4, 16])
def test_a_window_over_sorted_shards_is_as_far_off_as_so_few_draws(quality, window):
    """The worst case, a class per shard: a batch is a draw of B from a draw of w shards.

    By Cauchy-Schwarz the distance of k draws over C classes is at most sqrt((C - 1) / k) / 2 in the mean.
    """
    mix, _ = quality
    bound = sum(np.sqrt((NUM_CLASSES - 1) / draws) / 2 for draws in (window, BATCH_SIZE))
    off = mix["sorted", f"window, {window} shards", "total_variation"]
    assert 3 * mix["sorted", "true permutation", "total_variation"] < off < bound


def test_more_shards_mix_better(quality):
    mix, again = quality
    off = [mix["sorted", f"window, {w} shard{'s' * (w > 1)}", "total_variation"] for w in (1, 4, 16)]
    assert off[0] > off[1] > off[2] > mix["sorted", "exact", "total_variation"]
    repeats = [again[f"window, {w} shard{'s' * (w > 1)}"] for w in (1, 4, 16)]
    assert repeats[0] > repeats[1] > repeats[2] > again["exact"]


def test_pairs_meet_again_as_seldom_as_by_chance(quality):
    _, again = quality
    chance = (BATCH_SIZE - 1) / (NUM_SHARDS * SHARD_SIZE - 1)
    assert again["exact"] == pytest.approx(chance, rel=0.02)
    assert again["true permutation"] == pytest.approx(chance, rel=0.02)


@pytest.mark.parametrize("mode", ["exact", "window"])
def test_an_epoch_of_1200000_samples_takes_under_2_s_and_500_mb(bench, mode, tmp_path):
    """From the manifest (300 shards, no pixels) to the first global batch, in a process of its own."""
    bench.write_manifest(tmp_path, 300, 4000)
    cost = bench.measured(mode, str(tmp_path))
    assert cost["manifest_s"] + cost["order_s"] < 2
    assert cost["added_bytes"] < 500e6


def test_the_page_holds_the_records_numbers(bench, quality):
    import results_order

    cost = {"manifest_s": {"median": 0.001}, "order_s": {"median": 0.25}, "added_bytes": 34e6, "peak_bytes": 345e6}
    case = {"num_shards": 64, "shard_size": 250, "num_classes": 8, "batch_size": 256, "repeats": 3, "cost_window_shards": 16}
    machine = {"gpu": None, "cores": 2, "python": "3.11", "packages": {"torch": "2.13.0"}}
    results = bench.quality(64, 250, 8, 256) | {"cost": {"exact": cost, "window": cost}}
    record = {"date": "2026-01-02T03", "commit": "0" * 16, "environment": machine, "case": case, "results": results}
    section = results_order.section(record)
    exact = results["mix"]["as built"]["exact"]
    assert f"| exact | {exact['total_variation']:.3f} | {exact['chi_square']:.2f} | 8.0 |" in section
    assert "| window, 16 shards | 0.001 | 0.250 | 34 | 345 |" in section
    assert f"{exact['total_variation']:.3f}" in results_order.plot(record)
