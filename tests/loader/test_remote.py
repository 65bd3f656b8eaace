"""Shard sets behind URLs: the batches of the local set, from stores that fail, with a cache that is small or lost."""

import itertools
import os
import shutil
import subprocess
import sys
import threading
import time

import boto3
import fsspec
import numpy as np
import pytest
import torch
import webdataset
from moto.server import ThreadedMotoServer

from mpmae.errors import ConfigError, ShardError
from mpmae.loader import CpuLoader, ExactOrder, ShardReader, TrainOrder, plan_batches, shard_folder
from mpmae.loader.remote import RemoteFolder
from mpmae.modalities import TARGETS
from mpmae.retries import Retries
from mpmae.shard_codecs import decode_pixels
from mpmae.shard_files import load_manifest
from mpmae.shard_format import index_name
from tests.loader.http_server import serve
from tests.loader.test_open_files import open_descriptors

QUICK = Retries(max_failures=3, timeout_s=0.5, first_pause_s=0.01, longest_pause_s=0.05, min_bytes_per_s=1e6)
LARGE = 2**30


@pytest.fixture
def server(shards_dir):
    with serve(shards_dir) as (url, faults):
        yield url, faults


@pytest.fixture
def folder(server, tmp_path):
    return RemoteFolder(server[0], tmp_path / "cache", LARGE, retries=QUICK)


def batches(reader, start=0, num=3):
    loader = CpuLoader(reader, TARGETS, 56, seed=1, num_workers=3)
    training = loader.training(TrainOrder(ExactOrder(len(reader)), 12, seed=1), plan_batches(12, 6, 1), 0, start)
    return [batch for _, batch in itertools.islice(training, 2 * num)]


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert a.num_present == b.num_present
        for name in TARGETS:
            assert torch.equal(a.values[name], b.values[name])
            assert torch.equal(a.valid[name], b.valid[name])


def test_batches_are_those_of_the_local_set(shards_dir, server, folder):
    local, remote = ShardReader(shards_dir, "train"), ShardReader(folder, "train")
    assert remote.manifest == local.manifest
    assert_equal(batches(remote, num=8), batches(local, num=8))
    assert_equal(batches(remote, start=5), batches(local, start=5))
    shards = remote.manifest.shards("train")
    assert len(shards) > 1
    assert all(server[1].num_requests(shard.name) == 1 for shard in shards)
    statistics = folder.statistics
    assert statistics.num_downloads == 2 * len(shards)
    assert 0 < statistics.num_misses < statistics.num_hits
    assert statistics.bytes_downloaded > sum(shard.num_bytes for shard in shards)
    assert statistics.wait_s > 0
    remote.close()


def test_a_second_run_downloads_the_manifest_only(server, folder, tmp_path):
    with_downloads = batches(ShardReader(folder, "train"))
    server[1].requests.clear()
    again = RemoteFolder(server[0], tmp_path / "cache", LARGE)
    assert_equal(batches(ShardReader(again, "train")), with_downloads)
    assert server[1].requests == [("manifest.json", "")]
    assert again.statistics.num_misses == 0


def test_batches_through_faults(shards_dir, server, folder):
    faults = server[1]
    shards = load_manifest(shards_dir).shards("train")
    faults.add("manifest.json", 503)
    faults.add(index_name(shards[0].name), "wrong", 500)
    faults.add(shards[0].name, "reset", 500, "truncate")
    faults.add(shards[1].name, "wrong")
    assert_equal(batches(ShardReader(folder, "train")), batches(ShardReader(shards_dir, "train")))
    assert folder.statistics.num_retries == 7


def test_a_cache_of_one_shard(shards_dir, server, tmp_path, caplog):
    """Every read may find its shard gone; the batches are the same, only slower."""
    largest = max(shard.num_bytes for shard in load_manifest(shards_dir).shards("train"))
    folder = RemoteFolder(server[0], tmp_path / "cache", largest)
    reader = ShardReader(folder, "train")
    assert "every epoch downloads them again" in caplog.text
    assert_equal(batches(reader, num=2), batches(ShardReader(shards_dir, "train"), num=2))
    assert folder.statistics.num_evictions > 0
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= largest
    with pytest.raises(ConfigError, match=rf"may hold {largest - 1} bytes .*tar alone has {largest} .*data.cache_size_gb"):
        ShardReader(RemoteFolder(server[0], tmp_path / "cache", largest - 1), "train")


def test_errors_name_shard_and_url(shards_dir, server, folder):
    url, faults = server
    name = load_manifest(shards_dir).shards("train")[0].name
    reader = ShardReader(folder, "train")
    faults.add(name, 404)
    with pytest.raises(ShardError, match=rf"{url}/{name}: cannot be fetched, after 1 attempt: HTTP 404"):
        reader.pixels(0, "sentinel2")
    assert reader.pixels(0, "sentinel2").shape == (13, 64, 64)
    with pytest.raises(ShardError, match=rf"{url} has no nothing"):
        reader.require(["nothing"])
    faults.add("manifest.json", *[403] * 3)
    for load in (lambda: load_manifest(url), lambda: ShardReader(url, "train")):
        with pytest.raises(ShardError, match=rf"{url}/manifest\.json: .*HTTP 403 Forbidden; check the credentials"):
            load()


def test_a_changed_index(shards_dir, tmp_path):
    own = shutil.copytree(shards_dir, tmp_path / "set")
    path = own / index_name(load_manifest(own).shards("train")[0].name)
    path.write_bytes(path.read_bytes() + b"x")
    with serve(own) as (url, _), pytest.raises(ShardError, match=rf"{url}/{path.name}: .*after 2 attempts: its sha256"):
        ShardReader(RemoteFolder(url, tmp_path / "cache", LARGE, retries=QUICK), "train")


def test_a_cached_index_that_was_damaged(server, folder, tmp_path, caplog):
    reader = ShardReader(folder, "train")
    key = reader.manifest.shards("train")[0].index_sha256
    path = tmp_path / "cache" / key
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert np.array_equal(ShardReader(folder, "train").index, reader.index)
    assert "its bytes were changed" in caplog.text


def test_the_cache_vanishes_between_reads(shards_dir, folder, tmp_path):
    local, remote = ShardReader(shards_dir, "train"), ShardReader(folder, "train")
    remote.pixels(0, "sentinel2")
    shutil.rmtree(tmp_path / "cache")
    for sample_id in range(len(local)):
        assert np.array_equal(remote.pixels(sample_id, "sentinel2"), local.pixels(sample_id, "sentinel2"))


def test_shards_that_are_gone_from_the_cache_are_not_kept_open(shards_dir, folder, tmp_path, monkeypatch):
    """Their bytes would take room on the disk beyond the limit."""
    monkeypatch.setattr("mpmae.loader.remote.TOUCH_S", 0)
    reader = ShardReader(folder, "train")
    reader.pixels(0, "sentinel2")
    reader.pixels(len(reader) - 1, "sentinel2")
    assert len(open_descriptors(tmp_path)) == 2
    (tmp_path / "cache" / reader.manifest.shards("train")[0].sha256).unlink()
    reader.pixels(len(reader) - 1, "sentinel2")
    assert len(open_descriptors(tmp_path)) == 1
    reader.close()
    assert open_descriptors(tmp_path) == []


def test_reading_counts_as_use(folder, tmp_path):
    reader = ShardReader(folder, "train")
    reader.pixels(0, "sentinel2")
    path = tmp_path / "cache" / reader.manifest.shards("train")[0].sha256
    os.utime(path, ns=(0, 0))
    reader.pixels(0, "sentinel2")
    assert path.stat().st_mtime_ns == 0  # not at every read
    reader._files._touched_s[0] -= 60
    reader.pixels(0, "sentinel2")
    assert time.time() - path.stat().st_mtime < 10


def test_a_damaged_shard_in_the_cache(folder, tmp_path):
    reader = ShardReader(folder, "train")
    reader.pixels(0, "sentinel2")
    path = tmp_path / "cache" / reader.manifest.shards("train")[0].sha256
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(
        ShardError, match=r"train-00000\.tar: sample 0 .*; remove the shard cache .*cache; if it happens again"
    ):
        reader.pixels(0, "sentinel2")


def test_prefetching(server, folder, tmp_path):
    faults = server[1]
    reader = ShardReader(folder, "train")
    shards = reader.manifest.shards("train")
    reader.prefetch(range(len(shards)))
    wait_until(lambda: all((tmp_path / "cache" / shard.sha256).exists() for shard in shards))
    batches(reader)
    assert folder.statistics.num_misses == 0
    assert all(faults.num_requests(shard.name) == 1 for shard in shards)
    reader.close()


def test_prefetching_stays_within_the_limit(shards_dir, server, tmp_path):
    """Room for two shards: the one in use stays, one more is fetched, the third is not."""
    shards = load_manifest(shards_dir).shards("train")
    indices = sum((shards_dir / index_name(shard.name)).stat().st_size for shard in shards)
    folder = RemoteFolder(server[0], tmp_path / "cache", shards[0].num_bytes + shards[1].num_bytes + indices)
    reader = ShardReader(folder, "train")
    reader.pixels(0, "sentinel2")
    reader.prefetch([0, 1, 2])
    wait_until(lambda: (tmp_path / "cache" / shards[1].sha256).exists())
    time.sleep(0.1)
    kept = [(tmp_path / "cache" / shard.sha256).exists() for shard in shards[:3]]
    reader.close()
    assert kept == [True, True, False]


def test_prefetching_that_fails_is_left_to_the_read(server, folder, caplog):
    faults = server[1]
    reader = ShardReader(folder, "train")
    name = reader.manifest.shards("train")[0].name
    faults.add(name, 404)
    reader.prefetch([0])
    wait_until(lambda: "fetching ahead failed" in caplog.text)
    assert reader.pixels(0, "sentinel2").shape == (13, 64, 64)
    reader.close()


def test_closing_stops_prefetching(server, tmp_path):
    url, faults = server
    before = threading.enumerate()
    reader = ShardReader(RemoteFolder(url, tmp_path / "cache", LARGE), "train")
    faults.pause_s = 30
    reader.prefetch([0, 1])
    wait_until(lambda: len(list((tmp_path / "cache").glob("*.part"))) == 2)
    started = time.monotonic()
    reader.close()
    assert time.monotonic() - started < 4
    assert not list((tmp_path / "cache").glob("*.part"))
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch" and thread not in before]


def wait_until(condition, limit_s=30.0):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_s3_store(shards_dir, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="tiles")
        for path in shards_dir.iterdir():
            client.upload_file(str(path), "tiles", f"sets/one/{path.name}")
        options = {"endpoint_url": endpoint}
        folder = shard_folder("s3://tiles/sets/one", tmp_path / "cache", LARGE, options)
        assert_equal(batches(ShardReader(folder, "train")), batches(ShardReader(shards_dir, "train")))
        assert load_manifest("s3://tiles/sets/one/", options) == load_manifest(shards_dir)
        with pytest.raises(ShardError, match=r"s3://tiles/sets/two/manifest\.json: .*after 1 attempt: it does not exist"):
            load_manifest("s3://tiles/sets/two", options)
    finally:
        server.stop()


def test_a_memory_store_and_a_file_url(shards_dir, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(shards_dir), "/remote-set", recursive=True)
    try:
        expected = batches(ShardReader(shards_dir, "train"))
        folder = shard_folder("memory://remote-set", tmp_path / "cache", LARGE)
        assert_equal(batches(ShardReader(folder, "train")), expected)
        assert_equal(batches(ShardReader(f"file://{shards_dir}", "train")), expected)
        assert load_manifest(f"file://{shards_dir}") == load_manifest("memory://remote-set")
    finally:
        memory.rm("/remote-set", recursive=True)


def test_local_sets_need_no_remote_code(shards_dir, repo):
    code = (
        "import sys; from mpmae.loader import ShardReader; ShardReader(sys.argv[1], 'train').pixels(0, 'sentinel2');"
        "sys.exit(bool({'fsspec', 'mpmae.loader.remote', 'aiohttp'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code, str(shards_dir)], check=True, timeout=60)


def test_plain_webdataset_reads_the_shards(shards_dir, server):
    """Over HTTP through curl, as its `pipe:` does."""
    local = ShardReader(shards_dir, "train")
    entry = next(entry for entry in local.manifest.pixels if entry.name == "sentinel2")
    urls = [f"{server[0]}/{shard.name}" for shard in local.manifest.shards("train")]
    dataset = webdataset.WebDataset([f"pipe:curl -s -f {url}" for url in urls], shardshuffle=False)
    count = 0
    for sample_id, sample in enumerate(dataset):
        assert sample["__key__"] == f"{sample_id:08d}"
        values = decode_pixels(entry, sample[f"sentinel2.{entry.codec}"])
        assert np.array_equal(values, local.pixels(sample_id, "sentinel2"))
        count += 1
    assert count == len(local)
