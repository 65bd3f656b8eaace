"""The tests of `interpreted/` in a process where Triton interprets its kernels."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed")


NAMES = sorted(path.stem for path in FOLDER.glob("test_*.py"))
NO_TESTS = 5  # pytest's status when everything is deselected


@pytest.mark.parametrize("name", NAMES)
def test_in_the_interpreter(name):
    run(name, "not slow")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_slow_ones_in_the_interpreter(name):
    run(name, "slow")


def run(name: str, which: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-m", which, str(FOLDER / f"{name}.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == NO_TESTS:
        pytest.skip(f"no test of it is {which}")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
