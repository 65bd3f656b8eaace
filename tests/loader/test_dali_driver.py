"""What the GPU loader asks of DALI and CUDA, and when, with stand-ins for both: no GPU is needed, none is tested."""

import contextlib
import itertools
from functools import partial

import numpy as np
import pytest
import torch

from mpmae.errors import ConfigError, ShardError
from mpmae.loader import CpuLoader, ExactOrder, ShardReader, TrainOrder, plan_batches
from mpmae.loader.device_batch import DeviceAssembler
from mpmae.loader.tiers import DeviceTier
from mpmae.loader.transform import Assembler
from mpmae.modalities import TARGETS
from mpmae.shard_codecs import decompress_into
from tests.loader.compare import assert_same_batch

pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI (`pip install mpmae[dali]`)")

from mpmae.loader import dali

CPU = torch.device("cpu")


class Output:
    """A TensorList [1, N, bytes]."""

    def __init__(self, members: np.ndarray):
        self._members = members

    def as_tensor(self):
        return self._members[None]


class InflatePipeline:
    """Inflates as `inflate_pipeline` should, and checks its inputs."""

    def __init__(self, entries: dict):
        self._entries = entries

    def run(self, stream, **inputs):
        packed = inputs.pop("packed")
        assert (packed.dtype, packed.ndim, len(packed)) == (torch.uint8, 2, 1)
        outputs = []
        for name, entry in self._entries.items():
            (offsets,), (sizes,) = inputs.pop(f"offsets_{name}"), inputs.pop(f"sizes_{name}")
            assert offsets.dtype == sizes.dtype == np.int32
            members = np.empty((len(offsets), entry.stored_bytes), np.uint8)
            for member, start, size in zip(members, offsets, sizes, strict=True):
                decompress_into(entry, packed[0, start : start + size].numpy(), member)
            outputs.append(Output(members))
        assert not inputs
        return outputs


class Event:
    """Counts those that were recorded and waited for."""

    recorded = waited = 0

    def record(self, stream):
        Event.recorded += 1

    def synchronize(self):
        Event.waited += 1


class Stream:
    device = CPU
    num_waits = 0

    def wait_event(self, event):
        Stream.num_waits += 1


@pytest.fixture
def loader(shards_dir, monkeypatch):
    reader = ShardReader(shards_dir, "train")
    on_cpu = DeviceAssembler(Assembler(reader, TARGETS, 56), reader.manifest, TARGETS, 56, CPU, torch.float32)
    monkeypatch.setattr(dali, "inflate_pipeline", lambda device, sizes: InflatePipeline(on_cpu.entries))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(Stream, "num_waits", 0)
    monkeypatch.setattr(Event, "recorded", 0)
    monkeypatch.setattr(Event, "waited", 0)
    loader = dali.DaliLoader(reader, TARGETS, 56, seed=1)
    loader._maker = partial(dali._GpuMaker, on_cpu, DeviceTier(reader, 500_000, CPU), Stream())
    return loader


def test_batches_waits_and_release(loader):
    order, plan = TrainOrder(ExactOrder(len(loader.reader)), 8, seed=1), plan_batches(8, None, 1)
    expected = CpuLoader(loader.reader, TARGETS, 56, seed=1).training(order, plan, 0, 0)
    batches = loader.training(order, plan, 0, 0)
    for (_, got), (_, batch) in itertools.islice(zip(batches, expected, strict=False), 12):
        assert_same_batch(got, batch)
    assert Stream.num_waits in (12, 13)
    assert Event.recorded - Event.waited <= dali.MAX_IN_FLIGHT + 1
    batches.close()
    assert Event.recorded == Event.waited >= 12


def test_evaluation_ends(loader):
    loader._augmentation = loader._augmentation.none()
    expected = CpuLoader(loader.reader, TARGETS, 56, seed=1, augmentation=loader._augmentation).evaluation(9, 0, 2)
    for (_, got), (_, batch) in zip(loader.evaluation(9, 0, 2), expected, strict=True):
        assert_same_batch(got, batch)
    assert Event.recorded == Event.waited


def test_a_batch_too_large_for_dali(loader, monkeypatch):
    monkeypatch.setattr(dali, "MAX_PACKED_BYTES", 100_000)
    with pytest.raises(ConfigError, match=r"micro batch of 5 samples has \d+ stored bytes.*lower train.micro_batch_size"):
        loader.batch_of(np.arange(5))


class RefusingPipeline:
    """As DALI when a block gives more bytes than its member has."""

    def run(self, stream, **inputs):
        raise RuntimeError("the output buffer is too small")


def test_a_block_that_dali_refuses_is_named(loader, monkeypatch):
    monkeypatch.setattr(dali, "inflate_pipeline", lambda device, sizes: RefusingPipeline())
    with pytest.raises(RuntimeError, match="too small"):  # of sound samples it is DALI's own fault
        loader.batch_of(np.arange(5))
    sound = loader.reader.spans

    def broken(sample_ids):
        spans = [span.copy() for span in sound(sample_ids)]
        for sample_id, span in zip(sample_ids, spans, strict=True):
            span[:64] = 255 if sample_id == 2 else span[:64]
        return spans

    monkeypatch.setattr(loader.reader, "spans", broken)
    with pytest.raises(ShardError, match=r"tar: sample 2 .*sentinel2: corrupt LZ4 block"):
        loader.batch_of(np.arange(5))


def test_inflation_checks_the_size_of_what_it_writes(monkeypatch):
    asked, inflate = [], dali.fn.decoders.inflate
    monkeypatch.setattr(dali.fn.decoders, "inflate", lambda *a, **k: asked.append(k) or inflate(*a, **k))
    dali.inflate_pipeline(0, {"sentinel2": 100, "aster": 50})
    assert [(k["check_output_size"], k["shape"]) for k in asked] == [(True, [100]), (True, [50])]
