"""Readers and loaders as the configuration asks for them: local or remote, cpu or dali, with tiers or without."""

from itertools import islice

import fsspec
import numpy as np
import pytest
import torch

from mpmae.config import load_config
from mpmae.errors import ConfigError
from mpmae.loader import CpuLoader
from mpmae.loader.tiers import num_fitting
from mpmae.train.data import _with_host_tier, cpu_loader, open_loader, open_reader
from mpmae.train.setup import set_up

COMMON = ("train.global_batch_size=12", "train.seed=5", "model.modalities_out=[sentinel2, biome]", "data.num_workers=2")
WINDOW = ("data.order=window", "data.window_shards=2")


def batches(config, num=5, start=0):
    setup = set_up(config, world_size=1)
    training = setup.training.training(setup.plan.order, setup.plan.batch, 0, start)
    found = [batch for _, batch in islice(training, num)]
    training.close()
    return setup, found


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert all(torch.equal(a.values[name], b.values[name]) for name in a.values)


@pytest.fixture
def memory_url(shards_dir):
    """The shard set behind a URL, in fsspec's own memory."""
    store = fsspec.filesystem("memory")
    store.put(f"{shards_dir}/", "/tiles", recursive=True)
    yield "memory://tiles"
    store.rm("/tiles", recursive=True)


@pytest.mark.parametrize("order", [(), WINDOW])
def test_a_url_gives_the_batches_of_the_folder(shards_dir, memory_url, tmp_path, order):
    remote = (f"data.shards={memory_url}", f"data.cache_dir={tmp_path / 'cache'}", "data.cache_size_gb=0.5")
    _, local = batches(load_config(None, [f"data.shards={shards_dir}", *COMMON, *order]))
    setup, found = batches(load_config(None, [*remote, *COMMON, *order]))
    assert_equal(found, local)
    kept = {path.name for path in (tmp_path / "cache").iterdir()}
    assert {shard.sha256 for shard in setup.manifest.shards("train")} <= kept
    assert setup.training.reader.folder is setup.validation.reader.folder, "one cache and one set of counts"


def test_a_window_asks_ahead_for_its_shards_and_an_exact_order_for_none(shards_dir, monkeypatch):
    asked = []
    monkeypatch.setattr("mpmae.loader.ShardReader.prefetch", lambda self, shards: asked.append(tuple(shards)))
    batches(load_config(None, [f"data.shards={shards_dir}", *COMMON]))
    assert asked == []
    setup, _ = batches(load_config(None, [f"data.shards={shards_dir}", *COMMON, *WINDOW]), num=2)
    assert asked[:3] == [setup.plan.order.shards_ahead(step) for step in range(3)]


def test_dali_gives_the_batches_of_the_cpu_loader(shards_dir):
    pytest.importorskip("nvidia.dali")
    _, expected = batches(load_config(None, [f"data.shards={shards_dir}", *COMMON, *WINDOW]))
    setup, found = batches(load_config(None, [f"data.shards={shards_dir}", *COMMON, *WINDOW, "data.loader=dali"]))
    assert not isinstance(setup.training, CpuLoader)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.sample_ids.cpu(), b.sample_ids)
        assert torch.equal(a.values["biome"].cpu(), b.values["biome"])
        torch.testing.assert_close(a.values["sentinel2"].cpu(), b.values["sentinel2"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loader", ["cpu", "dali"])
def test_a_host_tier_changes_no_batch_and_says_what_does_not_fit(shards_dir, caplog, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    keys = (f"data.shards={shards_dir}", *COMMON, f"data.loader={loader}")
    _, expected = batches(load_config(None, keys), num=9)
    assert "host tier" not in caplog.text
    setup, found = batches(load_config(None, [*keys, "data.host_cache_gb=0.003"]), num=9)
    assert_equal(found, expected)
    report = setup.training.reader.report
    assert 0 < report.num_kept < report.num_samples == 48
    assert f"host tier: keeps {report.num_kept} of 48 samples" in caplog.text
    assert not hasattr(setup.validation.reader, "report")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_cache_without_a_device(shards_dir):
    pytest.importorskip("nvidia.dali")
    config = load_config(None, [f"data.shards={shards_dir}", *COMMON, "data.loader=dali", "data.device_cache_gb=1"])
    with pytest.raises(ConfigError, match=r"data.device_cache_gb = 1.0: there is no GPU here; set it to 0"):
        open_loader(config, open_reader(config, "train"), training=True)


def test_training_changes_its_samples_and_the_rest_does_not(shards_dir):
    config = load_config(None, [f"data.shards={shards_dir}", *COMMON, "data.vflip=false"])
    reader = open_reader(config, "train")
    ids = np.arange(8)
    once, still = (cpu_loader(config, reader, training=t).batch_of(ids).values["sentinel2"] for t in (True, False))
    assert not torch.equal(once, still)
    assert torch.equal(still, cpu_loader(config, reader, training=False).batch_of(ids).values["sentinel2"])
    assert list(cpu_loader(config, reader, training=False, modalities=("biome",)).batch_of(ids).values) == ["biome"]


def test_the_host_tier_keeps_what_the_device_tier_does_not(shards_dir):
    reader = open_reader(load_config(None, [f"data.shards={shards_dir}", *COMMON]), "train")
    tier = _with_host_tier(reader, 10**9, 300_000)
    on_device = num_fitting(reader.index, 300_000)
    assert 0 < on_device < len(reader)
    assert tier._slots.kept.tolist() == list(range(on_device, len(reader)))
