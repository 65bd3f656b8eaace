"""Fixtures for the whole suite."""

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

# Two workers and the processes that they start share the cores: threads that wait for each other take longer than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    """The longest file first, so that no worker is left alone with it in the end."""
    items.sort(key=lambda item: item.path.name != "test_parity.py")


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with real tiles and golden numbers, which does not travel with the repository."""
    folder = Path(os.environ.get("MPMAE_SHARED_DIR", REPO.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs the shared data folder, which is not at {folder}")
    return folder


@pytest.fixture(scope="session")
def mmearth_dir(tmp_path_factory) -> Path:
    """A synthetic set in MMEarth's layout: 60 tiles of 64 px."""
    from mpmae.shard_tools.synth import synth

    folder = tmp_path_factory.mktemp("source") / "synth"
    synth(folder, num_tiles=60, tile_size_px=64, seed=3)
    return folder


@pytest.fixture(scope="session")
def shards_dir(mmearth_dir, tmp_path_factory) -> Path:
    """The same tiles as LZ4 shards, several per split."""
    from mpmae.shard_tools.build import build

    folder = tmp_path_factory.mktemp("shards") / "synth"
    build(mmearth_dir, folder, codec="lz4", max_samples_per_shard=20, progress=False)
    return folder
