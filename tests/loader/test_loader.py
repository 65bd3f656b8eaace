"""Batches against the stored arrays: crop, flips, normalisation by product level, valid flags, presence counts."""

import itertools

import numpy as np
import pytest
import torch

from mpmae.errors import ConfigError, ShardError
from mpmae.loader import Augmentation, CpuLoader, ExactOrder, ShardReader, TrainOrder, plan_batches
from mpmae.loader.transform import draw_views
from mpmae.modalities import MODALITIES, TARGETS, class_lookup
from mpmae.shard_format import index_name


@pytest.fixture(scope="module")
def reader(shards_dir):
    return ShardReader(shards_dir, "train")


def training_batches(reader, world_size=1, micro=None, rank=0, start=0, num=4, global_batch=12, **options):
    loader = CpuLoader(reader, TARGETS, 56, seed=1, **options)
    plan = plan_batches(global_batch, micro, world_size)
    batches = loader.training(TrainOrder(ExactOrder(len(reader)), global_batch, seed=1), plan, rank, start)
    return [batch for _, batch in itertools.islice(batches, num * plan.num_micro_steps)]


def test_values_against_the_stored_sample(reader):
    batch = training_batches(reader, num=1)[0]
    for i, sample_id in enumerate(batch.sample_ids.tolist()):
        stored = reader.sample(sample_id)
        level = stored["product_level"].decode()
        view = draw_views(Augmentation(), 1, 0, np.array([sample_id]), 64, 56)
        rows = slice(int(view.top[0]), int(view.top[0]) + 56)
        columns = slice(int(view.left[0]), int(view.left[0]) + 56)
        for name in TARGETS:
            spec, raw = MODALITIES[name], stored[name]
            got, valid = batch.values[name][i].numpy(), batch.valid[name][i].numpy()
            if spec.scope == "pixel":
                raw = raw[:, rows, columns]
                raw = raw[:, ::-1] if view.vflip[0] else raw
                raw = raw[:, :, ::-1] if view.hflip[0] else raw
            if spec.kind == "categorical" and spec.scope == "pixel":
                assert np.array_equal(got, class_lookup(spec)[raw])
                assert np.array_equal(valid, got >= 0)
            elif spec.kind == "categorical":
                assert got == (raw.argmax() if raw.max() == 1 else -1)
                assert valid == (got >= 0)
            else:
                stats = reader.manifest.band_stats[f"{name}_{level}" if name == "sentinel2" else name]
                shape = (-1, 1, 1) if spec.scope == "pixel" else (-1,)
                with np.errstate(invalid="ignore"):
                    expected = (raw - np.reshape(stats.mean, shape)) / np.reshape(stats.std, shape)
                rule = next(e for e in (*reader.manifest.pixels, *reader.manifest.scalars) if e.name == name).no_data
                assert np.array_equal(valid, rule.valid(raw))
                np.testing.assert_allclose(got[valid], expected[valid], rtol=2e-5, atol=2e-5)
                assert (got[~valid] == 0).all()


def test_the_set_has_what_the_tests_need(reader):
    """Both product levels, absent modalities and no-data pixels occur; otherwise the test above shows little."""
    batches = training_batches(reader, num=4)
    valid = {name: torch.cat([b.valid[name].flatten() for b in batches]) for name in TARGETS}
    assert not valid["sentinel1"].all()
    assert not valid["sentinel2"].all()
    assert {reader.sample(i)["product_level"] for i in range(len(reader))} == {b"l1c", b"l2a"}


@pytest.mark.parametrize(("world_size", "micro"), [(1, None), (1, 3), (2, None), (3, 2), (4, 1)])
def test_content_is_independent_of_the_cut(reader, world_size, micro):
    whole = training_batches(reader, num=3)
    parts = [training_batches(reader, world_size, micro, rank, num=3, num_workers=3) for rank in range(world_size)]
    num_micro_steps = len(parts[0]) // 3
    for step in range(3):
        cut = [batch for rank in parts for batch in rank[step * num_micro_steps : (step + 1) * num_micro_steps]]
        assert torch.equal(torch.cat([b.sample_ids for b in cut]), whole[step].sample_ids)
        for name in TARGETS:
            assert torch.equal(torch.cat([b.values[name] for b in cut]), whole[step].values[name])
        assert all(b.num_present == whole[step].num_present and b.global_batch_size == 12 for b in cut)


def test_resuming_continues_the_sequence(reader):
    whole, rest = training_batches(reader, num=8), training_batches(reader, start=5, num=3)
    for a, b in zip(whole[5:], rest, strict=True):
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert all(torch.equal(a.values[name], b.values[name]) for name in TARGETS)


def test_presence_counts_match_the_tiles(reader):
    for batch in training_batches(reader, num=4):
        for name in TARGETS:
            entry = next(e for e in (*reader.manifest.pixels, *reader.manifest.scalars) if e.name == name)
            stored = [reader.sample(i)[name] for i in batch.sample_ids.tolist()]
            assert batch.num_present[name] == sum(bool(entry.no_data.valid(raw).any()) for raw in stored)


def test_views_change_by_epoch_and_cover_their_range():
    ids = np.arange(4000)
    views = [draw_views(Augmentation(), 0, epoch, ids, 64, 56) for epoch in (0, 1)]
    assert set(views[0].top) == set(views[0].left) == set(range(9))
    assert 0.45 < views[0].hflip.mean() < 0.55
    assert (views[0].top != views[1].top).mean() > 0.8
    assert abs(np.corrcoef(views[0].top, views[0].left)[0, 1]) < 0.05


def test_evaluation_is_centred_and_marks_its_padding(reader):
    loader = CpuLoader(reader, ("sentinel2",), 56, seed=1, augmentation=Augmentation.none())
    batches = [b for rank in range(2) for _, b in loader.evaluation(5, rank, 2)]
    real = torch.cat([b.sample_ids[~b.padding] for b in batches])
    assert sorted(real.tolist()) == list(range(len(reader)))
    assert all(b.global_batch_size == len(reader) for b in batches)
    first = batches[0]
    centre = reader.sample(int(first.sample_ids[0]))["sentinel2"][:, 4:60, 4:60] != 0
    assert np.array_equal(first.valid["sentinel2"][0].numpy(), centre)


def test_a_modality_the_set_lacks(reader, shards_dir):
    small = ShardReader(shards_dir, "val", reader.manifest.model_copy(update={"scalars": reader.manifest.scalars[1:]}))
    with pytest.raises(ShardError, match=rf"has no {reader.manifest.scalars[0].name}; it has .*sentinel2.*Leave what reads"):
        small.require([reader.manifest.scalars[0].name])


def test_an_image_larger_than_the_tile(reader):
    with pytest.raises(ConfigError, match=r"img_size = 112 is larger than the tiles.*64 px"):
        CpuLoader(reader, TARGETS, 112, seed=0)


def test_statistics_with_std_zero(reader, shards_dir):
    stats = dict(reader.manifest.band_stats)
    stats["aster"] = stats["aster"].model_copy(update={"std": (1.0, 0.0)})
    broken = ShardReader(shards_dir, "train", reader.manifest.model_copy(update={"band_stats": stats}))
    with pytest.raises(ShardError, match=r"aster: std 0.0 in band 1"):
        CpuLoader(broken, TARGETS, 56, seed=0)


def test_absent_and_shortened_shards(reader, shards_dir, tmp_path):
    shards = reader.manifest.shards("train")
    for path in shards_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / shards[0].name).unlink()
    (tmp_path / shards[1].name).write_bytes(b"short")
    with pytest.raises(ShardError) as caught:
        ShardReader(tmp_path, "train")
    assert f"{shards[0].name} is missing" in str(caught.value)
    assert f"{shards[1].name} has 5 bytes" in str(caught.value)


def test_a_corrupt_member_names_shard_and_sample(reader, shards_dir, tmp_path):
    for path in shards_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    row, member = reader.index[3], reader.manifest.members.index("sentinel2")
    path = tmp_path / reader.manifest.shards("train")[0].name
    data = bytearray(path.read_bytes())
    start = int(row["offset"][member])
    data[start : start + 64] = bytes(64)  # a match at distance 0, which LZ4 cannot mean
    path.write_bytes(data)
    with pytest.raises(ShardError, match=rf"{path.name}: sample 3 .*corrupt LZ4"):
        ShardReader(tmp_path, "train").pixels(3, "sentinel2")


def test_an_index_that_changed(shards_dir, reader, tmp_path):
    for path in shards_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / index_name(reader.manifest.shards("train")[0].name)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=rf"{path.name}: its sha256 is not the manifest's"):
        ShardReader(tmp_path, "train")


def test_an_unknown_split(shards_dir):
    with pytest.raises(ShardError, match=r"no split 'training'; it has .*train"):
        ShardReader(shards_dir, "training")
