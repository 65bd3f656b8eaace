"""Our models against the golden numbers of the published code."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.golden_cases import read_manifest
from tests.golden_check import cases, check, kind_of, main

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden"
SHARED = Path(os.environ.get("MPMAE_SHARED_DIR", HERE.parent.parent / "shared")) / "golden"
OWN = cases(GOLDEN)


def further_cases():
    if not (SHARED / "manifest.json").is_file():
        return []
    entries = read_manifest(SHARED)["cases"]
    return [name for name in cases(SHARED) if name not in OWN and kind_of(entries[name])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", OWN)
def test_case_holds(name, dtype):
    trajectory = dtype == torch.float32 or name == "fcmae_p8_56"  # in float64 one is enough of what takes longest
    assert check(GOLDEN, name, dtype, trajectory).failures == []


@pytest.mark.parametrize("name", further_cases())
def test_further_case_holds(name):
    assert check(SHARED, name, torch.float64, trajectory=False).failures == []


@pytest.mark.parametrize(
    ("name", "epsilon", "what"),
    [
        ("fcmae_p8_56", "mpmae.models.decoder.DECODER_GRN_EPS", "total loss"),
        ("dense_p8_56", "tests.golden_dense.REFERENCE_GRN_EPS", "logits"),
        ("unet_p8_56", "tests.golden_dense.REFERENCE_GRN_EPS", "logits"),
    ],
)
def test_a_wrong_epsilon_is_found(monkeypatch, name, epsilon, what):
    """The check can fail: GRN's epsilon is the smallest known mistake."""
    monkeypatch.setattr(epsilon, 1e-6)
    failures = check(GOLDEN, name, torch.float64, trajectory=False).failures
    assert any(what in failure for failure in failures)


def test_command(tmp_path, capsys, monkeypatch):
    """One line per case and precision; other kinds are skipped, a failure shows in the exit status."""
    for name in ("manifest.json", "dense_p8_56.safetensors"):
        shutil.copy(GOLDEN / name, tmp_path)
    shutil.copy(GOLDEN / "dense_p8_56.safetensors", tmp_path / "other.safetensors")
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(
        text.replace('"cases":{', '"cases":{"multimae_x":{"file":"other.safetensors"},', 1)
    )
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "multimae_x: skipped: this project has no model of that kind",
        "dense_p8_56 float64: ok",
        "dense_p8_56 float32: ok",
    ]
    assert main([str(tmp_path), "dense_p9"]) == 2
    monkeypatch.setattr("tests.golden_dense.REFERENCE_GRN_EPS", 1e-2)
    assert main([str(tmp_path), "dense_p8_56"]) == 1
    assert "dense_p8_56 float64: FAILED" in capsys.readouterr().out
