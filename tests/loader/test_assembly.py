"""Whole batches against the samples as stored: sizes, codecs, threads, kept memory, damaged sets."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mpmae.errors import ShardError
from mpmae.loader import Augmentation, CpuLoader, ExactOrder, ShardReader, TrainOrder, plan_batches
from mpmae.loader.slabs import Slabs
from mpmae.loader.transform import Assembler, draw_views
from mpmae.modalities import MODALITIES, TARGETS, class_lookup, no_data_rule
from mpmae.shard_tools.build import build
from mpmae.shard_tools.synth import synth
from tests.loader.test_maps import classes, crop, normalised

CODECS = ("raw", "lz4", "zstd")


@pytest.fixture(scope="module", params=[32, 64, 128])
def sets(request, tmp_path_factory):
    """The same tiles of one size by each codec."""
    folder = tmp_path_factory.mktemp(f"sets{request.param}")
    num_tiles = 6 if request.param == 128 else 16
    source = synth(
        folder / "source", num_tiles=num_tiles, tile_size_px=request.param, split_fractions=(1, 0, 0), seed=2, progress=False
    )
    return {codec: ShardReader(_built(source, folder / codec, codec), "train") for codec in CODECS}


def _built(source, folder, codec):
    build(source, folder, codec=codec, max_samples_per_shard=5, progress=False)
    return folder


def views_of(reader, ids, size, epoch=0):
    return draw_views(Augmentation(), 3, epoch, ids, reader.manifest.tile_size_px, size)


def reference(reader, name, sample_id, view, size, quirks) -> tuple[np.ndarray, np.ndarray]:
    """Values and valid flags of one sample by the plain formula."""
    sample, spec = reader.sample(sample_id), MODALITIES[name]
    entry = next(e for e in (*reader.manifest.pixels, *reader.manifest.scalars) if e.name == name)
    raw = sample[name]
    if spec.kind == "categorical":
        if spec.scope == "tile":
            ids = np.int64(raw.argmax() if raw.max() == 1 else -1)
            return ids, ids >= 0
        return classes(crop(raw, view, size), class_lookup(spec, quirks))
    no_data = no_data_rule(name, entry.dtype, reference_quirks=True) if quirks else entry.no_data
    level = sample["product_level"].decode()
    stats = reader.manifest.band_stats[f"{name}_{level}" if name == "sentinel2" else name]
    mean, std = np.asarray(stats.mean, np.float32), np.asarray(stats.std, np.float32)
    if spec.scope == "pixel":
        return normalised(crop(raw, view, size), no_data, mean, std)
    valid = no_data.valid(raw)
    return np.where(valid, (np.where(valid, raw, 0).astype(np.float32) - mean) / std, np.float32(0)), valid


@pytest.mark.parametrize("quirks", [False, True])
def test_batches_are_the_formula_bit_for_bit(sets, quirks):
    for codec, reader in sets.items():
        side = reader.manifest.tile_size_px
        for size in (side, side - 8, side - 5):
            ids = np.array([len(reader) - 1, 0, 3, 3, 1])
            views = views_of(reader, ids, size)
            batch = Assembler(reader, TARGETS, size, quirks).batch(ids, views, {}, 5)
            assert batch.sample_ids.tolist() == ids.tolist()
            for name in TARGETS:
                got = batch.values[name].numpy(), batch.valid[name].numpy()
                expected = [
                    reference(reader, name, int(i), v, size, quirks) for i, v in zip(ids, views.table(), strict=True)
                ]
                for part, arrays in zip(got, zip(*expected, strict=True), strict=True):
                    assert part.dtype == arrays[0].dtype
                    assert part.tobytes() == np.stack(arrays).tobytes(), (codec, size, name)
        if codec == "raw" and quirks:
            return


def test_raw_batches_are_what_is_stored(sets):
    for reader in sets.values():
        ids = np.array([2, 0, 2])
        raw = Assembler(reader, TARGETS, 16).raw_batch(ids)
        assert set(raw.pixels) == {name for name in TARGETS if MODALITIES[name].scope == "pixel"}
        for i, sample_id in enumerate(ids.tolist()):
            for name, values in raw.pixels.items():
                stored = reader.pixels(sample_id, name)
                assert values.dtype == stored.dtype
                assert values[i].tobytes() == stored.tobytes()
            assert raw.records[i].tobytes() == reader.scalars(sample_id).tobytes()


@pytest.fixture(scope="module")
def reader(shards_dir):
    return ShardReader(shards_dir, "train")


def test_tiles_alone_are_those_of_the_batch(reader):
    ids = np.arange(9)
    assembler = Assembler(reader, TARGETS, 48)
    batch = assembler.batch(ids, views_of(reader, ids, 48), {}, 9)
    values, valid = assembler.tiles(ids, assembler.raw_batch(ids).records)
    assert set(values) == {name for name in TARGETS if MODALITIES[name].scope == "tile"}
    for name in values:
        assert torch.equal(values[name], batch.values[name])
        assert torch.equal(valid[name], batch.valid[name])


def test_neither_threads_nor_kept_memory_change_a_batch(reader):
    """All batches are kept to the end: memory taken again too early would show in the first ones."""
    plan, order = plan_batches(8, 4, 1), TrainOrder(ExactOrder(len(reader)), 8, seed=1)
    runs = []
    for num_workers, prefetch in ((1, 0), (2, 4), (4, 8)):
        loader = CpuLoader(reader, TARGETS, 56, seed=1, num_workers=num_workers, prefetch=prefetch)
        runs.append([batch for _, batch in itertools.islice(loader.training(order, plan, 0, 0), 30)])
    for one, *others in zip(*runs, strict=True):
        for other in others:
            assert torch.equal(one.sample_ids, other.sample_ids)
            for name in TARGETS:
                assert torch.equal(one.values[name], other.values[name])
                assert torch.equal(one.valid[name], other.valid[name])


def test_one_assembler_serves_many_threads(reader):
    assembler = Assembler(reader, TARGETS, 40, max_kept=3)

    def digest(i: int) -> tuple:
        ids = np.random.default_rng(i % 5).integers(0, len(reader), 1 + i % 7)
        batch = assembler.batch(ids, views_of(reader, ids, 40), {}, len(ids))
        return tuple(batch.values[name].double().sum().item() for name in TARGETS)

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(digest, range(140))) == [digest(i) for i in range(140)]


FORMS = [((3, 5), np.float32), ((7,), np.bool_), ((2, 2), np.int64)]


def test_memory_is_taken_again_only_when_nothing_refers_to_it():
    slabs = Slabs(max_kept=2)
    first = slabs.take(FORMS)
    assert [(tuple(t.shape), t.numpy().dtype) for t in first] == [(shape, np.dtype(dtype)) for shape, dtype in FORMS]
    for number, tensor in enumerate(first):
        tensor.fill_(number)
    place, view = first[0].data_ptr(), first[2][1:].view(-1)
    del first, tensor
    second = slabs.take(FORMS)
    assert second[0].data_ptr() != place
    assert view.tolist() == [2, 2]
    array = view.numpy()
    del view, second
    assert slabs.take(FORMS)[0].data_ptr() != place
    assert array.tolist() == [2, 2]
    del array
    held = [slabs.take(FORMS) for _ in range(2)]
    assert place in {tensors[0].data_ptr() for tensors in held}


def test_no_more_memory_is_kept_than_asked_for():
    slabs = Slabs(max_kept=2)
    held = [slabs.take(FORMS) for _ in range(5)]
    assert len({tensors[0].data_ptr() for tensors in held}) == 5
    assert len(slabs._kept) == 2
    del held
    slabs.take([((100,), np.float32)])
    assert sum(len(slab) for slab in slabs._kept) < 1000


def damaged(reader, tmp_path, change) -> ShardReader:
    """The set with `change(index rows)` made in memory, as if the index files said so."""
    for path in (reader.folder / "manifest.json").parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    again = ShardReader(tmp_path, "train")
    again.index = again.index.copy()
    change(again.index)
    return again


def swap_members(index):
    index["offset"][3, [0, -1]] = index["offset"][3, [-1, 0]]


def point_into_the_next_sample(index):
    index["offset"][3, 1] = index["offset"][4, 1]


def lengthen_the_scalars(index):
    index["size"][3, -1] += 1


def shorten_sentinel2(index):
    index["size"][3, 0] -= 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (swap_members, r"the sample: cannot be read|members out of order"),
        (point_into_the_next_sample, r"members out of order in the index"),
        (lengthen_the_scalars, r"scalars: \d+ bytes, expected \d+"),
        (shorten_sentinel2, r"sentinel2: (corrupt LZ4 block|\d+ bytes)"),
    ],
)
def test_an_index_that_does_not_fit_names_shard_and_sample(reader, tmp_path, change, problem):
    broken = damaged(reader, tmp_path, change)
    assembler, ids = Assembler(broken, TARGETS, 48), np.array([5, 3, 0])
    for build_batch in (lambda: assembler.batch(ids, views_of(broken, ids, 48), {}, 3), lambda: assembler.raw_batch(ids)):
        with pytest.raises(ShardError, match=rf"train-00000\.tar: sample 3 .*({problem})"):
            build_batch()


def test_a_level_without_statistics_names_shard_and_sample(reader):
    stats = {key: value for key, value in reader.manifest.band_stats.items() if key != "sentinel2_l1c"}
    broken = ShardReader(reader.folder, "train", reader.manifest.model_copy(update={"band_stats": stats}))
    loader = CpuLoader(broken, ("sentinel2",), 48, seed=0)
    with pytest.raises(ShardError, match=r"train-0000\d\.tar: sample .*level 'l1c', but no statistics of sentinel2_l1c"):
        loader.batch_of(np.arange(len(broken)))
