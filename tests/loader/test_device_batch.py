"""The GPU loader's path with everything but DALI's inflation and CUDA, on the CPU: equal to the cpu loader."""

import itertools

import numpy as np
import pytest
import torch

from mpmae.errors import ConfigError
from mpmae.loader import Augmentation, CpuLoader, ExactOrder, ShardReader, TrainOrder, plan_batches
from mpmae.loader.device_batch import DeviceAssembler
from mpmae.loader.requests import evaluation_requests, training_requests
from mpmae.loader.tiers import DeviceTier
from mpmae.loader.transform import Assembler, draw_views
from mpmae.modalities import MODALITIES
from mpmae.shard_codecs import decompress_into
from mpmae.shard_tools.build import build
from tests.loader.compare import assert_same_batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["lz4", "raw"])
def reader(request, shards_dir, mmearth_dir, tmp_path_factory):
    folder = shards_dir
    if request.param == "raw":
        folder = tmp_path_factory.mktemp("raw") / "synth"
        build(mmearth_dir, folder, codec="raw", progress=False)
    return ShardReader(folder, "train")


def modalities_of(reader) -> tuple[str, ...]:
    return tuple(name for name in MODALITIES if name in reader.manifest.modalities)


def batches(reader, requests, augmentation, img_size_px=56, **options):
    """What `_GpuMaker` does, with inflation by the shard codecs."""
    names, manifest = modalities_of(reader), reader.manifest
    assembler = Assembler(reader, names, img_size_px, **options)
    on_device = DeviceAssembler(assembler, manifest, names, img_size_px, CPU, torch.float32)
    tier = DeviceTier(reader, 400_000, CPU)
    for request in requests:
        views = draw_views(augmentation, 1, request.epoch, request.sample_ids, manifest.tile_size_px, img_size_px)
        prepared = on_device.prepare(request, views, tier.stage(request.sample_ids))
        packed = tier.place(prepared.staged)
        inflated = {}
        for name, places in on_device.chunks(packed).items():
            inflated[name] = torch.empty((len(places[0]), on_device.stored[name].num_bytes), dtype=torch.uint8)
            for row, start, size in zip(inflated[name], *places, strict=True):
                decompress_into(on_device.entries[name], packed.data.numpy()[start : start + size], row.numpy())
        yield on_device.batch(prepared, packed, inflated)


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation.none()])
def test_training_equals_the_cpu_loader(reader, augmentation):
    names, order, plan = modalities_of(reader), TrainOrder(ExactOrder(len(reader)), 12, 1), plan_batches(12, 6, 1)
    expected = CpuLoader(reader, names, 56, seed=1, augmentation=augmentation).training(order, plan, 0, 0)
    requests = training_requests(reader, names, order, plan, 0, 0)
    for got, (_, batch) in zip(itertools.islice(batches(reader, requests, augmentation), 10), expected, strict=False):
        assert_same_batch(got, batch)


def test_evaluation_equals_the_cpu_loader(reader):
    names, none = modalities_of(reader), Augmentation.none()
    loader = CpuLoader(reader, names, 64, seed=1, augmentation=none, reference_quirks=True)
    expected = [batch for _, batch in loader.evaluation(9, 1, 2)]
    requests = evaluation_requests(reader, names, 9, 1, 2, None)
    for got, batch in zip(batches(reader, requests, none, 64, reference_quirks=True), expected, strict=True):
        assert_same_batch(got, batch)


def test_the_set_has_the_dtypes_that_matter(reader):
    assert {np.dtype(entry.dtype).name for entry in reader.manifest.pixels} >= {
        "uint16",
        "float32",
        "int16",
        "int8",
        "uint8",
    }


def test_sets_for_the_cpu_loader_only(reader):
    changes = {"sentinel2": {"codec": "zstd"}, "aster": {"dtype": "<f8"}}
    entries = tuple(entry.model_copy(update=changes.get(entry.name, {})) for entry in reader.manifest.pixels)
    manifest, names = reader.manifest.model_copy(update={"pixels": entries}), modalities_of(reader)
    with pytest.raises(ConfigError) as caught:
        DeviceAssembler(Assembler(reader, names, 56), manifest, names, 56, CPU, torch.float32)
    assert "sentinel2 is stored with codec zstd" in str(caught.value)
    assert "aster is stored as <f8, which the kernels do not read, or use the cpu loader" in str(caught.value)
