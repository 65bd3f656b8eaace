"""The demo set is made once, and an attempt that was killed does not hinder the next."""

import pytest

from mpmae.config import DataSection
from mpmae.shard_files import load_manifest
from mpmae.train import demo_data
from mpmae.train.demo_data import ensure_demo_shards


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_data, "NUM_TILES", 20)
    return DataSection().shards


def test_killed_attempts_are_made_up_for(shards, monkeypatch):
    source = shards.parent / "synthetic_mmearth"
    partial = source.with_name(f"{source.name}.partial")
    partial.mkdir(parents=True)
    (partial / f"{source.name}_splits.json").write_text("{}")  # killed in synth
    with monkeypatch.context() as patch:
        patch.setattr(demo_data, "build", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ensure_demo_shards(shards)
    made = (source / f"{source.name}.h5").stat().st_mtime_ns
    ensure_demo_shards(shards)
    assert (source / f"{source.name}.h5").stat().st_mtime_ns == made
    assert load_manifest(shards).source.num_tiles == 20


def test_other_folders_are_left_alone(shards, tmp_path):
    ensure_demo_shards(tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []
