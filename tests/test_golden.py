"""MP-MAE against the golden numbers of the published code."""

import os
from pathlib import Path

import pytest
import torch

from tests.golden_check import CASES, check

HERE = Path(__file__).resolve().parent
OWN = ("fcmae_p8_56", "fcmae_p16_112")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", OWN)
def test_case_holds(name, dtype):
    assert check(HERE / "golden", name, dtype).failures == []


@pytest.mark.parametrize("name", [name for name in CASES if name not in OWN])
def test_further_case_holds(name):
    shared = Path(os.environ.get("MPMAE_SHARED_DIR", HERE.parent.parent / "shared")) / "golden"
    if not (shared / f"{name}.safetensors").is_file():
        pytest.skip(f"no golden case {name} in {shared}")
    assert check(shared, name, torch.float64, trajectory=False).failures == []


def test_a_wrong_epsilon_is_found(monkeypatch):
    """The check can fail: GRN's epsilon of the decoder is the smallest known mistake."""
    monkeypatch.setattr("mpmae.models.decoder.DECODER_GRN_EPS", 1e-6)
    failures = check(HERE / "golden", "fcmae_p8_56", torch.float64, trajectory=False).failures
    assert any("total loss" in failure for failure in failures)
