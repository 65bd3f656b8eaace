"""The order is a pure function: complete, the same at any world size, and resumable at any step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmae.errors import ConfigError
from mpmae.loader import ExactOrder, TrainOrder, evaluation_batches, evaluation_ids, plan_batches, possible_world_sizes

sizes = st.integers(1, 500)


@given(sizes, st.integers(0, 2**32), st.integers(0, 1000))
def test_an_epoch_is_a_permutation(num_samples, seed, epoch):
    assert np.array_equal(np.sort(ExactOrder(num_samples).epoch(seed, epoch)), np.arange(num_samples))


def test_epochs_and_seeds_differ():
    orders = [ExactOrder(1000).epoch(seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_never_changes():
    """Pinned: a change would silently break resuming of every run."""
    assert ExactOrder(10).epoch(0, 0).tolist() == PINNED


def test_shuffling_is_thorough():
    """Neighbours in the split end up as far apart as in a true permutation: mean distance n/3."""
    num = 20_000
    place = np.argsort(ExactOrder(num).epoch(0, 0))
    assert np.abs(np.diff(place)).mean() == pytest.approx(num / 3, rel=0.03)


@settings(max_examples=60)
@given(
    num_micro_steps=st.integers(1, 4),
    micro=st.integers(1, 5),
    world=st.sampled_from([1, 2, 3, 4, 8]),
    seed=st.integers(0, 99),
)
def test_shares_partition_the_global_batch(num_micro_steps, micro, world, seed):
    size = num_micro_steps * micro * world
    plan = plan_batches(size, micro, world)
    _, batch = TrainOrder(ExactOrder(size * 3 + 1), size, seed).global_batch(2)
    shares = [plan.share(batch, rank, step) for rank in range(world) for step in range(num_micro_steps)]
    assert np.array_equal(np.concatenate(shares), batch)
    assert {len(share) for share in shares} == {micro}


def test_every_sample_once_per_epoch():
    order = TrainOrder(ExactOrder(64), 16, seed=5)
    assert order.steps_per_epoch == 4
    for epoch in range(2):
        batches = [order.global_batch(epoch * 4 + i) for i in range(4)]
        assert {e for e, _ in batches} == {epoch}
        assert np.array_equal(np.sort(np.concatenate([ids for _, ids in batches])), np.arange(64))


def test_the_last_partial_batch_is_dropped():
    order = TrainOrder(ExactOrder(70), 16, seed=5)
    assert order.steps_per_epoch == 4
    assert order.global_batch(4)[0] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((16, None, 3), ["16", "3 ranks", "15 or 18"]),
        ((16, 3, 2), ["micro_batch_size = 3", "= 8); use 2 or 4"]),
        ((16, 9, 2), ["micro_batch_size = 9", "= 8); use 8"]),
        ((10**12, 7, 1), ["micro_batch_size = 7", "use 5 or 8"]),
        ((10**12, 10**12 - 1, 1), ["use 500000000000 or 1000000000000"]),
    ],
)
def test_sizes_that_do_not_divide(arguments, words):
    with pytest.raises(ConfigError) as caught:
        plan_batches(*arguments)
    assert all(word in str(caught.value) for word in words)


@given(st.integers(1, 40), st.integers(1, 5), st.booleans())
def test_world_sizes_that_are_possible(num_micro_batches, micro, accumulates):
    """Exactly those that `plan_batches` takes."""
    size, micro = num_micro_batches * micro, micro if accumulates else None
    taken = []
    for world in range(1, size + 1):
        try:
            taken.append(plan_batches(size, micro, world).world_size)
        except ConfigError:
            continue
    assert possible_world_sizes(size, micro) == taken


def test_a_batch_larger_than_the_split():
    with pytest.raises(ConfigError, match=r"global_batch_size = 100.*only 60 samples"):
        TrainOrder(ExactOrder(60), 100, 0)


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 4))
def test_evaluation_covers_everything_once(num_samples, batch_size, world):
    ranks = [evaluation_batches(np.arange(num_samples), batch_size, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    real = np.concatenate([ids[~padding] for batches in ranks for ids, padding in batches])
    assert np.array_equal(np.sort(real), np.arange(num_samples))


def test_evaluation_of_a_part_is_spread_evenly():
    assert evaluation_ids([100], 5).tolist() == evaluation_ids([30, 0, 70], 5).tolist() == [0, 25, 50, 74, 99]
    assert evaluation_ids([3], 5).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("max_samples", "num_shards"), [(5, 5), (160, 16), (1600, 16), (4096, 41)])
def test_an_evaluation_of_a_part_reads_few_of_many_shards(max_samples, num_shards):
    """Whole shards of a remote set are downloaded: a sample of each would bring all of it."""
    shards = np.unique(evaluation_ids([100] * 1200, max_samples) // 100)
    assert len(shards) == num_shards
    assert (shards[0], shards[-1]) == (0, 1199)
    assert np.diff(shards).max() <= 1200 / (num_shards - 1) + 80


PINNED = [4, 2, 3, 7, 8, 5, 1, 0, 6, 9]
