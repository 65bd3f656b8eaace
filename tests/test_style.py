"""Lint and format are part of the tests."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff(repo, command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=repo, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_stay_short(repo):
    long = {
        str(path.relative_to(repo)): count
        for folder in ("mpmae", "kernels", "data", "launch", "benchmarks", "tests")
        for path in (repo / folder).rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 420
    }
    assert not long
