"""The arithmetic of a run."""

import pytest

from mpmae.config import load_config
from mpmae.errors import ConfigError
from mpmae.loader import ExactOrder, TrainOrder, WindowOrder
from mpmae.shard_files import load_manifest
from mpmae.train.plan import make_plan, state_bytes_per_rank


@pytest.fixture(scope="module")
def manifest(shards_dir):
    return load_manifest(shards_dir)


def plan(manifest, world_size, *overrides):
    return make_plan(load_config(None, overrides), manifest, world_size)


def test_steps_and_rates(manifest):
    made = plan(
        manifest, 2, "train.global_batch_size=16", "train.epochs=10", "optim.warmup_epochs=2", "train.micro_batch_size=4"
    )
    assert (made.order.steps_per_epoch, made.total_steps, made.warmup_steps) == (3, 30, 6)
    assert made.batch.num_micro_steps == 2
    assert made.learning_rate(6) == pytest.approx(1.5e-4 * 16 / 256)
    assert made.notes == ()


def test_notes_on_what_surprises(manifest):
    made = plan(manifest, 1, "train.global_batch_size=20", "train.epochs=3", "train.max_steps=100", "optim.warmup_steps=50")
    assert len(made.notes) == 3
    assert all(any(word in note for note in made.notes) for word in ("warm-up of 50", "ends the run before", "8 of 48"))


def test_an_unknown_split(manifest):
    with pytest.raises(Exception, match="no split 'training'"):
        plan(manifest, 1, "data.train_split=training", "train.global_batch_size=4")


def test_sizes_that_do_not_divide(manifest):
    with pytest.raises(ConfigError, match="does not divide among 3 ranks"):
        plan(manifest, 3, "train.global_batch_size=16")


@pytest.mark.parametrize("keys", [(), ("data.order=window", "data.window_shards=2")])
def test_the_order_that_the_configuration_asks_for(manifest, keys):
    made = plan(manifest, 1, "train.global_batch_size=16", "train.seed=4", *keys).order
    sizes = tuple(shard.num_samples for shard in manifest.shards("train"))
    assert made == TrainOrder(WindowOrder(sizes, 2) if keys else ExactOrder(sum(sizes)), 16, 4)


def test_a_cache_too_small_for_two_windows(manifest):
    keys = ("train.global_batch_size=16", "train.epochs=99", "data.shards=s3://b/x", "data.order=window")
    shard_gb = max(shard.num_bytes for shard in manifest.shards("train")) / 1e9
    small = plan(manifest, 1, *keys, "data.window_shards=1", f"data.cache_size_gb={1.1 * shard_gb}").notes
    assert any("two windows of 1 shards have up to" in note and "raise data.cache_size_gb" in note for note in small)
    for enough in (("data.window_shards=1", f"data.cache_size_gb={2.1 * shard_gb}"), ("data.window_shards=2",)):
        assert not any("cache" in note for note in plan(manifest, 1, *keys, *enough).notes)


@pytest.mark.parametrize(("stage", "num_bytes"), [(0, 1600), (1, 1200), (2, 1000), (3, 800)])
def test_memory_by_stage(stage, num_bytes):
    assert state_bytes_per_rank(100, 2, stage) == num_bytes
