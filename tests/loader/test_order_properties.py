"""Both orders by their properties: complete, the same at any cut, resumable at any step, windows kept apart."""

from itertools import accumulate, islice, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmae.loader import (
    CpuLoader,
    ExactOrder,
    ShardReader,
    TrainOrder,
    WindowOrder,
    evaluation_batches,
    evaluation_ids,
    plan_batches,
)

WORLD_SIZES = (1, 2, 3, 4, 8)
seeds, epochs = st.integers(0, 2**63 - 1), st.integers(0, 10_000)
shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum).map(tuple)
window_orders = st.builds(WindowOrder, shard_sizes, st.integers(1, 15))
orders = window_orders | st.builds(ExactOrder, st.integers(1, 300))


@st.composite
def train_orders(draw):
    """A `TrainOrder` of at least one step."""
    order = draw(orders)
    return TrainOrder(order, draw(st.integers(1, order.num_samples)), draw(seeds))


def shard_of(order: WindowOrder, ids: np.ndarray) -> np.ndarray:
    return np.searchsorted(list(accumulate(order.shard_sizes)), ids, side="right")


@given(orders, seeds, epochs)
def test_an_epoch_is_a_permutation(order, seed, epoch):
    ids = order.epoch(seed, epoch)
    assert ids.dtype == np.int32
    assert np.array_equal(np.sort(ids), np.arange(order.num_samples))


@given(window_orders, seeds, epochs)
def test_windows_partition_the_shards_and_never_mix(order, seed, epoch):
    windows = order.windows(seed, epoch)
    assert sorted(shard for window in windows for shard in window.shards) == list(range(len(order.shard_sizes)))
    assert {len(window.shards) for window in windows[:-1]} <= {order.window_shards}
    parts = np.split(shard_of(order, order.epoch(seed, epoch)), list(accumulate(w.num_samples for w in windows))[:-1])
    for window, part in zip(windows, parts, strict=True):
        assert set(part.tolist()) == {shard for shard in window.shards if order.shard_sizes[shard]}


@given(shard_sizes, st.integers(0, 5), seeds, epochs)
def test_a_window_of_all_shards_is_the_exact_order(sizes, more, seed, epoch):
    window = WindowOrder(sizes, len(sizes) + more)
    assert np.array_equal(window.epoch(seed, epoch), ExactOrder(sum(sizes)).epoch(seed, epoch))


@given(train_orders(), st.data())
def test_every_sample_at_most_once_and_the_rest_dropped(order, data):
    """In any epoch, over any ranks and micro steps: each sample once, but for fewer than a global batch."""
    world_size = data.draw(st.sampled_from([w for w in WORLD_SIZES if order.global_batch_size % w == 0]))
    per_rank = order.global_batch_size // world_size
    micro = data.draw(st.sampled_from([m for m in range(1, per_rank + 1) if per_rank % m == 0]))
    plan, epoch = plan_batches(order.global_batch_size, micro, world_size), data.draw(st.integers(0, 3))
    seen = []
    for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
        found, batch = order.global_batch(step)
        assert found == epoch
        shares = [plan.share(batch, r, m) for r, m in product(range(world_size), range(plan.num_micro_steps))]
        assert {len(share) for share in shares} == {micro}
        assert np.array_equal(np.concatenate(shares), batch)  # the same global batch, however it is cut
        seen.append(batch)
    whole = np.concatenate(seen)
    assert len(np.unique(whole)) == len(whole) == order.num_samples // order.global_batch_size * order.global_batch_size


@given(train_orders(), st.integers(0, 500), st.integers(1, 5))
def test_resuming_at_any_step_continues_the_sequence(order, start, num):
    """A new object asked for a step in the middle gives what one gives that has run from the step before."""
    fresh = TrainOrder(order.order, order.global_batch_size, order.seed)
    uninterrupted = [order.global_batch(step) for step in range(max(0, start - 3), start + num)][-num:]
    for step, (epoch, ids) in zip(range(start, start + num), uninterrupted, strict=True):
        assert fresh.global_batch(step)[0] == epoch == step // order.steps_per_epoch
        assert np.array_equal(fresh.global_batch(step)[1], ids)
        place = step % order.steps_per_epoch * order.global_batch_size
        assert np.array_equal(order.order.epoch(order.seed, epoch)[place : place + len(ids)], ids)


@pytest.mark.parametrize("order", [ExactOrder(200), WindowOrder((20,) * 10, 1), WindowOrder((20,) * 10, 3)])
def test_epochs_and_seeds_differ(order):
    assert len({tuple(order.epoch(seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)}) == 4
    if isinstance(order, WindowOrder):
        assert len({tuple(order.windows(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_the_window_order_never_changes():
    """Pinned: a change would silently break resuming of every run."""
    order = WindowOrder((3, 2, 3, 2), 2)
    assert [w.shards for w in order.windows(0, 0)] == PINNED_WINDOWS
    assert order.epoch(0, 0).tolist() == PINNED


@given(train_orders(), st.integers(0, 60), st.integers(0, 3))
def test_the_shards_ahead_are_those_of_the_step_and_the_windows_after_it(order, step, num_windows):
    ahead = order.shards_ahead(step, num_windows)
    if isinstance(order.order, ExactOrder):
        assert ahead == ()
        return
    epoch, ids = order.global_batch(step)
    assert len(set(ahead)) == len(ahead)
    assert set(shard_of(order.order, ids).tolist()) <= set(ahead)
    windows = [set(w.shards) for e in (epoch, epoch + 1) for w in order.order.windows(order.seed, e)]
    own = [i for i, shards in enumerate(windows[: len(windows) // 2]) if shards & set(shard_of(order.order, ids).tolist())]
    expected = set().union(*windows[own[0] : own[-1] + 1 + num_windows])
    assert set(ahead) == expected


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any),
    st.none() | st.integers(1, 300),
    st.integers(1, 40),
    st.sampled_from(WORLD_SIZES),
)
def test_an_evaluation_sees_its_samples_once(shard_sizes, max_samples, batch_size, world_size):
    wanted, num_samples = evaluation_ids(shard_sizes, max_samples), sum(shard_sizes)
    assert len(np.unique(wanted)) == len(wanted) == min(num_samples, max_samples or num_samples)
    assert wanted[-1] < num_samples
    ranks = [evaluation_batches(wanted, batch_size, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(ids) == len(padding) == batch_size for batches in ranks for ids, padding in batches)
    in_turn = [batches[i] for i in range(len(ranks[0])) for batches in ranks]
    assert np.array_equal(np.concatenate([ids[~padding] for ids, padding in in_turn]), wanted)


@pytest.fixture(scope="module")
def reader(shards_dir):
    return ShardReader(shards_dir, "train")


@pytest.fixture(scope="module", params=["exact", "window"])
def order(request, reader):
    sizes = tuple(shard.num_samples for shard in reader.manifest.shards("train"))
    assert len(sizes) >= 3
    return TrainOrder(ExactOrder(len(reader)) if request.param == "exact" else WindowOrder(sizes, 2), 12, seed=3)


def delivered(reader, order, world_size, micro, rank, num_workers, start, num_steps):
    """The (epoch, sample ids) that a real loader hands to one rank, by step."""
    loader = CpuLoader(reader, ("biome",), 56, seed=3, num_workers=num_workers, prefetch=3)
    plan = plan_batches(order.global_batch_size, micro, world_size)
    batches = loader.training(order, plan, rank, start)
    got = [(epoch, batch.sample_ids.numpy()) for epoch, batch in islice(batches, num_steps * plan.num_micro_steps)]
    batches.close()
    cut = [got[i : i + plan.num_micro_steps] for i in range(0, len(got), plan.num_micro_steps)]
    assert all(epoch == parts[0][0] for parts in cut for epoch, _ in parts)
    return [(parts[0][0], np.concatenate([ids for _, ids in parts])) for parts in cut]


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
@pytest.mark.parametrize(("world_size", "micro"), [(1, 4), (2, None), (3, 2), (4, 1)])
def test_a_real_loader_delivers_the_order(reader, order, world_size, micro, num_workers):
    """Two epochs over ranks x workers x micro batches: step by step the global batches, each sample once an epoch."""
    num_steps = 2 * order.steps_per_epoch
    ranks = [delivered(reader, order, world_size, micro, rank, num_workers, 0, num_steps) for rank in range(world_size)]
    for step in range(num_steps):
        epoch, ids = order.global_batch(step)
        assert {rank[step][0] for rank in ranks} == {epoch}
        assert np.array_equal(np.concatenate([rank[step][1] for rank in ranks]), ids)
    for epoch in range(2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        ids = np.concatenate([rank[step][1] for rank in ranks for step in steps])
        assert len(np.unique(ids)) == len(ids) == len(reader) // 12 * 12


@settings(max_examples=10, deadline=None)
@given(start=st.integers(0, 11), world_size=st.sampled_from([1, 2, 3, 4]), num_workers=st.integers(1, 4))
def test_a_real_loader_resumes_anywhere(reader, order, start, world_size, num_workers):
    for rank in range(world_size):
        whole = delivered(reader, order, world_size, None, rank, 2, 0, 12)
        rest = delivered(reader, order, world_size, None, rank, num_workers, start, 12 - start)
        for (epoch, ids), (epoch_again, ids_again) in zip(whole[start:], rest, strict=True):
            assert epoch == epoch_again
            assert np.array_equal(ids, ids_again)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_real_loader_evaluates_everything_once(reader, world_size, num_workers):
    loader = CpuLoader(reader, ("biome",), 56, seed=3, num_workers=num_workers)
    ranks = [[batch for _, batch in loader.evaluation(5, rank, world_size)] for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    ids = np.concatenate([batch.sample_ids[~batch.padding].numpy() for batches in ranks for batch in batches])
    assert np.array_equal(np.sort(ids), np.arange(len(reader)))


PINNED_WINDOWS = [(1, 2), (0, 3)]
PINNED = [4, 3, 7, 5, 6, 2, 8, 1, 0, 9]
