"""Fixtures for the whole suite."""

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


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
