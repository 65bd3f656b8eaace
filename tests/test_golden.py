"""Our models against the golden numbers of the published code."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mpmae
from mpmae.loader.batch import Batch
from mpmae.masking import draw_visible, visible_bool
from mpmae.models.interop import load_reference
from tests.golden_cases import fill, read_manifest
from tests.golden_check import cases, check, kind_of, main
from tests.golden_names import published, published_gradients, published_names
from tests.golden_tables import check_tables

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


@pytest.mark.slow
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


def test_wrongly_resized_positions_are_found(monkeypatch):
    """The published MultiMAE resizes the positions of class maps bilinearly, of images bicubically."""
    monkeypatch.setattr("mpmae.models.multimae.adapters.ClassAdapter.position_mode", "bicubic")
    failures = check(GOLDEN, "multimae_tiny_p8_56", torch.float64, trajectory=False).failures
    assert any("total loss" in failure for failure in failures)


def write_case(folder, name, model, config, seed=7):
    """A case of the golden format whose numbers are our own: 2 samples of 56 px, Sentinel-2 alone."""
    shapes = published(model, {name: value.detach() for name, value in model.named_parameters()})
    params = [
        [ref, list(shapes[ref].shape), float(own.endswith("norm.weight")), 0.05]
        for own, ref in published_names(model).items()
    ]
    load_reference(model, {ref: fill(seed, ref, *rest) for ref, *rest in params})
    image = torch.randn(2, len(model.bands_in), 56, 56, generator=torch.Generator().manual_seed(seed))
    visible = draw_visible(0, 0, [0, 1], 49, model.num_visible)
    values, valid = {"sentinel2": image}, {"sentinel2": torch.ones_like(image, dtype=torch.bool)}
    out = model.double()(Batch(values, valid, torch.arange(2), {"sentinel2": 2}, 2), visible, return_predictions=True)
    out.loss.backward()
    norms = {name: grad.norm().item() for name, grad in published_gradients(model).items()}
    entry = {
        "config": {"B": 2, "img": 56, "patch": 8, "orig": False, "ratio": 0.9, "weight_seed": seed, **config},
        "params": params,
        "loss": {"sentinel2": out.loss.item()},
        "loss_total": out.loss.item(),
        "loss_order": ["sentinel2"],
        "grad_norm": norms,
        "grad_norm_total": sum(norm**2 for norm in norms.values()) ** 0.5,
        "file": f"{name}.safetensors",
    }
    mask = 1 - visible_bool(visible, 49).to(torch.uint8)
    arrays = {
        "in.sentinel2": image,
        "mask": mask,
        "pred.sentinel2": out.predictions["sentinel2"].detach().float().contiguous(),
    }
    save_file(arrays, folder / entry["file"])
    (folder / "manifest.json").write_text(json.dumps({"cases": {name: entry}}))


def test_the_model_is_read_off_the_case(tmp_path):
    """Size, decoder, bands, ratio and losses need not be those of our own cases."""
    options = {"reference_quirks": True, "loss_weighting": "unweighted", "norm_pix_loss": False, "mask_ratio": 0.9}
    options |= {"modalities_out": ("sentinel2",), "bands_available": {"sentinel2": ("B2", "B3", "B4", "B5")}}
    model = mpmae.create_model("mpmae_femto", decoder_dim=24, decoder_depth=2, **options)
    write_case(tmp_path, "fcmae_other", model, {"loss": "unweighted", "norm_pix": False})
    assert check(tmp_path, "fcmae_other", torch.float64).failures == []
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"norm_pix": false', '"norm_pix": true'))
    assert any("total loss" in failure for failure in check(tmp_path, "fcmae_other", torch.float64).failures)


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
    absent = [
        f"{name}: absent: no file {name}.safetensors" for name in read_manifest(GOLDEN)["cases"] if name != "dense_p8_56"
    ]
    assert [line for line in lines if "absent" in line] == absent
    assert [line.split(" (")[0] for line in lines if "absent" not in line] == [
        "multimae_x: skipped: this project has no model of that kind",
        "dense_p8_56 float64: ok",
        "dense_p8_56 float32: ok",
        *(f"{table}: ok" for table in check_tables(GOLDEN)),
    ]
    assert main([str(tmp_path), "dense_p9"]) == 2
    assert main([str(tmp_path), "unet_p8_56"]) == 1
    monkeypatch.setattr("tests.golden_dense.REFERENCE_GRN_EPS", 1e-2)
    assert main([str(tmp_path), "dense_p8_56"]) == 1
    assert "dense_p8_56 float64: FAILED" in capsys.readouterr().out
