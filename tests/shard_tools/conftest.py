"""Small synthetic MMEarth folders, made once, and the real ones where they are present."""

import shutil
from pathlib import Path

import pytest

from mpmae.shard_tools.build import build
from mpmae.shard_tools.synth import synth

REAL_NAMES = ("data_real_v001", "data_real128_v001")


@pytest.fixture(scope="session", params=REAL_NAMES)
def real_source(request, shared_dir) -> Path:
    folder = shared_dir / "data" / request.param
    if not folder.is_dir():
        pytest.skip(f"no real tiles at {folder}")
    return folder


@pytest.fixture(scope="session")
def source_64(tmp_path_factory) -> Path:
    return synth(tmp_path_factory.mktemp("synth") / "synth64", num_tiles=48, progress=False)


@pytest.fixture(scope="session")
def source_32(tmp_path_factory) -> Path:
    return synth(tmp_path_factory.mktemp("synth") / "tiny", num_tiles=10, tile_size_px=32, seed=5, progress=False)


@pytest.fixture(scope="session")
def source_128(tmp_path_factory) -> Path:
    return synth(tmp_path_factory.mktemp("synth") / "synth128", num_tiles=10, tile_size_px=128, progress=False)


@pytest.fixture
def own_source(source_32, tmp_path) -> Path:
    """A copy of the 32-px folder that a test may damage."""
    return Path(shutil.copytree(source_32, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def built_32(source_32, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "set"
    build(source_32, folder, max_samples_per_shard=3, progress=False)
    return folder


@pytest.fixture
def own_shards(built_32, tmp_path) -> Path:
    """A copy of the 32-px shard set that a test may damage."""
    return Path(shutil.copytree(built_32, tmp_path / "set"))
