"""The benchmark scripts, importable as they import each other."""

import sys

import pytest


@pytest.fixture(autouse=True)
def benchmarks(repo, monkeypatch):
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    yield
    for path in (repo / "benchmarks").glob("*.py"):
        sys.modules.pop(path.stem, None)
