"""The published model's numbers in float32 through the Triton kernels."""

from pathlib import Path

import pytest
import torch

from mpmae.kernels import backends
from tests.golden_check import check

FOLDER = Path(__file__).resolve().parents[2] / "golden"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_case_holds(monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "triton")
    assert check(FOLDER, "fcmae_p8_56", torch.float32, trajectory=False).failures == []
