"""The DALI loader on a GPU: the batches of the cpu loader, from every codec and tier, and its rate."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch

from mpmae.errors import ShardError
from mpmae.loader import Augmentation, CpuLoader, ExactOrder, ShardReader, TrainOrder, plan_batches
from mpmae.loader.tiers import DeviceTier, HostTier
from mpmae.modalities import MODALITIES
from mpmae.shard_tools.build import build
from tests.loader.compare import assert_same_batch

pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI (`pip install mpmae[dali]`)")

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["lz4", "raw"])
def reader(request, shards_dir, mmearth_dir, tmp_path_factory):
    folder = shards_dir
    if request.param == "raw":
        folder = tmp_path_factory.mktemp("raw") / "synth"
        build(mmearth_dir, folder, codec="raw", progress=False)
    return ShardReader(folder, "train")


def gpu_loader(reader, **options):
    from mpmae.loader.dali import DaliLoader

    return DaliLoader(reader, modalities_of(reader), 56, seed=1, device_id=0, **options)


def cpu_loader(reader, **options):
    return CpuLoader(reader, modalities_of(reader), 56, seed=1, **options)


def modalities_of(reader) -> tuple[str, ...]:
    return tuple(name for name in MODALITIES if name in reader.manifest.modalities)


def training(loader, num=12, batch_size=8, start=0):
    order, plan = TrainOrder(ExactOrder(len(loader.reader)), batch_size, seed=1), plan_batches(batch_size, None, 1)
    return itertools.islice(loader.training(order, plan, 0, start), num)


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation.none()])
@pytest.mark.parametrize("device_budget_bytes", [0, 1_000_000, 10**9])
def test_training_equals_the_cpu_loader(reader, augmentation, device_budget_bytes):
    """Over several epochs, so that samples come from the device tier too; batches are kept, so that memory is not reused."""
    ours = list(training(gpu_loader(reader, augmentation=augmentation, device_budget_bytes=device_budget_bytes)))
    for (epoch, got), (expected_epoch, expected) in zip(
        ours, training(cpu_loader(reader, augmentation=augmentation)), strict=True
    ):
        assert epoch == expected_epoch
        assert got.values["sentinel2"].is_cuda
        assert_same_batch(got, expected)


def test_on_a_host_tier(reader):
    tier = HostTier(reader, 10**9)
    for (_, got), (_, expected) in zip(training(gpu_loader(tier)), training(cpu_loader(reader)), strict=True):
        assert_same_batch(got, expected)


def test_evaluation_equals_the_cpu_loader(reader):
    expected = list(cpu_loader(reader, augmentation=Augmentation.none()).evaluation(9, 1, 2))
    got = gpu_loader(reader, augmentation=Augmentation.none()).evaluation(9, 1, 2)
    for (_, ours), (_, theirs) in zip(got, expected, strict=True):
        assert_same_batch(ours, theirs)


def test_starting_later_continues_the_sequence(reader):
    loader = gpu_loader(reader)
    whole = list(training(loader))[5:]
    for (_, got), (_, expected) in zip(training(loader, num=7, start=5), whole, strict=True):
        assert_same_batch(got, expected.to("cpu"))


def test_a_busy_stream_sees_whole_batches(reader):
    """The caller's stream is slow and memory is scarce: a missing wait or an early reuse of memory shows as other values."""
    ours, stream = [], torch.cuda.Stream()
    loader = gpu_loader(reader, prefetch=6)
    with torch.cuda.stream(stream):
        for _, batch in training(loader, num=20):
            torch.cuda._sleep(20_000_000)
            ours.append({name: values.double().sum() for name, values in batch.values.items()})
            del batch
    stream.synchronize()
    for sums, (_, expected) in zip(ours, training(cpu_loader(reader), num=20), strict=True):
        for name, values in expected.values.items():
            assert torch.allclose(sums[name].cpu(), values.double().sum()), name


def test_closing_early_ends_the_threads(reader):
    before = threading.active_count()
    for num in (0, 1, 3):
        batches = gpu_loader(reader).training(TrainOrder(ExactOrder(len(reader)), 8, seed=1), plan_batches(8, None, 1), 0, 0)
        for _ in range(num):
            next(batches)
        batches.close()
        assert threading.active_count() <= before


def test_a_corrupt_block_that_gives_too_much_is_refused(reader, monkeypatch):
    if reader.manifest.codec != "lz4":
        pytest.skip("needs LZ4 members")
    sound, size = reader.spans, int(reader.index["size"][2, 0])

    def broken(sample_ids):
        found = [span.copy() for span in sound(sample_ids)]
        found[2][:size] = 255
        found[2][:4] = (0x1F, 7, 1, 0)  # one literal, a match at distance 1 whose length goes on for all that follows
        return found

    monkeypatch.setattr(reader, "spans", broken)
    with pytest.raises(ShardError, match=r"tar: sample 2 .*corrupt LZ4 block"):
        gpu_loader(reader).batch_of(np.arange(5))


def test_device_tier_on_the_gpu(reader):
    tier = DeviceTier(reader, 1_000_000, "cuda")
    for ids in (np.arange(len(reader)), np.arange(len(reader))[::-1].copy(), np.array([3, 3, 0])):
        packed = tier.place(tier.stage(ids))
        data = packed.data.cpu().numpy()
        for span, start in zip(reader.spans(ids), packed.offsets[:, 0], strict=True):
            assert np.array_equal(data[start : start + len(span)], span)


def test_the_rate_is_told(reader, capsys):
    batch_size, num = 32, 60
    for budget in (0, 10**9):
        batches = training(gpu_loader(reader, num_workers=4, device_budget_bytes=budget), num + 10, batch_size)
        for _ in range(10):
            next(batches)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in batches:
            pass
        torch.cuda.synchronize()
        rate = num * batch_size / (time.perf_counter() - start)
        with capsys.disabled():
            print(f"\n{reader.manifest.codec}, device tier {budget:,} bytes: {rate:,.0f} samples/s")
        assert rate > 0
