"""The DALI loader on the CPU (`device_id=None`): the batches of the cpu loader."""

import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from mpmae.errors import ConfigError, ShardError
from mpmae.loader import Augmentation, CpuLoader, ExactOrder, ShardReader, TrainOrder, plan_batches
from mpmae.loader.tiers import HostTier
from mpmae.modalities import MODALITIES
from mpmae.shard_tools.build import build
from mpmae.shard_tools.synth import synth
from tests.loader.compare import assert_same_batch

pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI (`pip install mpmae[dali]`)")

from mpmae.loader.dali import DaliLoader, inflate_pipeline


@pytest.fixture(scope="module")
def readers(shards_dir, tmp_path_factory):
    """Splits by tile size in pixels: 64 px LZ4, 128 px raw."""
    folder = tmp_path_factory.mktemp("large")
    synth(folder / "source", num_tiles=14, tile_size_px=128, seed=4)
    build(folder / "source", folder / "shards", codec="raw", progress=False)
    return {64: ShardReader(shards_dir, "train"), 128: ShardReader(folder / "shards", "train")}


def modalities_of(reader) -> tuple[str, ...]:
    return tuple(name for name in MODALITIES if name in reader.manifest.modalities)


def loaders(reader, img_size_px, **options):
    names = modalities_of(reader)
    return tuple(kind(reader, names, img_size_px, seed=1, **options) for kind in (DaliLoader, CpuLoader))


def training(loader, start=0, num=3, batch_size=6):
    order, plan = (
        TrainOrder(ExactOrder(len(loader.reader)), batch_size, seed=1),
        plan_batches(batch_size, batch_size // 2, 1),
    )
    batches = loader.training(order, plan, 0, start)
    try:
        return list(itertools.islice(batches, 2 * num))
    finally:
        batches.close()


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation.none(), Augmentation(crop=False)])
@pytest.mark.parametrize(("tile_size_px", "img_size_px"), [(64, 56), (128, 112)])
def test_training_equals_the_cpu_loader(readers, tile_size_px, img_size_px, augmentation):
    ours, theirs = loaders(readers[tile_size_px], img_size_px, augmentation=augmentation)
    for (epoch, got), (expected_epoch, expected) in zip(training(ours), training(theirs), strict=True):
        assert epoch == expected_epoch
        assert_same_batch(got, expected)


@pytest.mark.parametrize("reference_quirks", [False, True])
def test_evaluation_equals_the_cpu_loader(readers, reference_quirks):
    ours, theirs = loaders(readers[64], 64, augmentation=Augmentation.none(), reference_quirks=reference_quirks)
    expected = list(theirs.evaluation(9, 1, 2, max_samples=30))
    for (_, got), (_, batch) in zip(ours.evaluation(9, 1, 2, max_samples=30), expected, strict=True):
        assert_same_batch(got, batch)


def test_the_tiles_have_what_the_comparison_needs(readers):
    reader = readers[64]
    levels = {reader.scalars(i)["product_level"] for i in range(len(reader))}
    assert levels == {b"l1c", b"l2a"}
    assert not np.isfinite(np.stack([reader.pixels(i, "sentinel1") for i in range(len(reader))])).all()
    assert {np.dtype(e.dtype).name for e in reader.manifest.pixels} >= {"uint16", "float32", "int16", "int8", "uint8"}


def test_real_tiles(shared_dir, tmp_path):
    build(shared_dir / "data/data_real128_v001", tmp_path / "shards", codec="lz4", progress=False)
    ours, theirs = loaders(ShardReader(tmp_path / "shards", "val"), 112)
    assert_same_batch(ours.batch_of(np.arange(4)), theirs.batch_of(np.arange(4)))


def test_starting_later_continues_the_sequence(readers):
    ours, _ = loaders(readers[64], 56)
    for (_, whole), (_, rest) in zip(training(ours, num=4)[4:], training(ours, start=2, num=2), strict=True):
        assert_same_batch(rest, whole)


def test_earlier_batches_keep_their_values(readers):
    ours, theirs = loaders(readers[64], 56, prefetch=1)
    for (_, got), (_, expected) in zip(training(ours, num=8), training(theirs, num=8), strict=True):
        assert_same_batch(got, expected)


def test_closing_early_ends_the_threads(readers):
    before = threading.active_count()
    for num in (0, 1, 3):
        ours, _ = loaders(readers[64], 56)
        batches = ours.training(TrainOrder(ExactOrder(len(ours.reader)), 6, seed=1), plan_batches(6, 6, 1), 0, 0)
        for _ in range(num):
            next(batches)
        batches.close()
        assert threading.active_count() <= before


def test_other_output_dtypes(readers):
    loader, _ = loaders(readers[64], 56)
    half = DaliLoader(readers[64], loader.modalities, 56, seed=1, dtype=torch.bfloat16).batch_of(np.arange(2))
    whole = loader.batch_of(np.arange(2))
    assert torch.equal(half.values["sentinel2"], whole.values["sentinel2"].bfloat16())
    assert half.values["dynamic_world"].dtype == torch.int64
    assert half.values["era5"].dtype == torch.float32


def test_on_a_host_tier(readers):
    _, theirs = loaders(readers[64], 56)
    tier = HostTier(readers[64], 2_000_000)
    ours = DaliLoader(tier, theirs.modalities, 56, seed=1)
    for (_, got), (_, expected) in zip(training(ours), training(theirs), strict=True):
        assert_same_batch(got, expected)


def test_a_corrupt_member_names_shard_and_sample(readers, shards_dir, tmp_path):
    for path in shards_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    reader = readers[64]
    name, row = reader.manifest.shards("train")[0].name, reader.index[3]
    with (tmp_path / name).open("r+b") as file:
        file.seek(int(row["offset"][0]))
        file.write(b"\xff" * int(row["size"][0]))
    ours = DaliLoader(ShardReader(tmp_path, "train"), ("sentinel2",), 56, seed=1)
    with pytest.raises(ShardError, match=rf"{name}: sample 3 .*sentinel2.*mpmae-shards verify"):
        ours.batch_of(np.arange(6))


def test_a_gpu_that_is_not_there(readers):
    with pytest.raises(ConfigError, match=r"device_id = 99, but PyTorch sees \d+ CUDA devices"):
        DaliLoader(readers[64], ("sentinel2",), 56, seed=1, device_id=99)
    with pytest.raises(ConfigError, match="device_budget_bytes = 7 needs a GPU"):
        DaliLoader(readers[64], ("sentinel2",), 56, seed=1, device_budget_bytes=7)


def test_dali_takes_the_arguments_of_the_inflate_pipeline():
    """The graph is defined, which checks operator and argument names; to build it takes a GPU."""
    inflate_pipeline(0, {"sentinel2": 100, "aster": 50})


def test_without_dali():
    code = "import sys; sys.modules['nvidia.dali'] = None; import mpmae.loader.dali"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode
    assert "ConfigError" in done.stderr
    assert "pip install mpmae[dali]" in done.stderr
