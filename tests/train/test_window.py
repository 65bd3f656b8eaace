"""A run in window order from a store, on two ranks, goes on from a folder on one rank: the same loss curve."""

import pytest

from mpmae.shard_files import load_manifest
from tests.loader.http_server import serve
from tests.train.launches import kill_after_step, launch_ok, metrics

SETTINGS = (
    "train.global_batch_size=16",
    "train.max_steps=9",
    "checkpoint.every_steps=2",
    "optim.warmup_steps=1",
    "data.num_workers=1",
    "data.order=window",
    "data.window_shards=2",
    "model.modalities_out=[sentinel2, biome]",
)


@pytest.mark.slow
def test_a_killed_remote_run_goes_on_anywhere(shards_dir, tmp_path):
    expected = launch_ok("python", 1, tmp_path / "local", f"data.shards={shards_dir}", *SETTINGS)
    shards = load_manifest(shards_dir).shards("train")
    cache_gb = 2.5 * max(shard.num_bytes for shard in shards) / 1e9  # less than the set
    with serve(shards_dir) as (url, _):
        remote = (f"data.shards={url}", f"data.cache_dir={tmp_path / 'cache'}", f"data.cache_size_gb={cache_gb}")
        kill_after_step(5, "torchrun", 2, tmp_path / "run", *remote, *SETTINGS)
    found = launch_ok("python", 1, tmp_path / "run", f"data.shards={shards_dir}", *SETTINGS, "--resume", "auto")
    assert [line["step"] for line in found] == list(range(1, 10)) == [line["step"] for line in metrics(tmp_path / "run")]
    for line, other in zip(found, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
