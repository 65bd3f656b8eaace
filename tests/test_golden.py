"""Our models against the golden numbers of the published code."""

import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

import mpmae
from mpmae.loader.batch import Batch
from mpmae.masking import draw_visible, visible_bool
from mpmae.models.interop import load_reference
from mpmae.models.interop.multimae import to_published
from mpmae.models.multimae.sampler import TokenSample
from tests import golden_multimae
from tests.golden_cases import Findings, fill, read_manifest
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


def test_nan_is_right_where_the_published_code_has_it():
    """A fully visible domain makes its gradients NaN; a number in the place of one, or one in its place, is found."""
    found = Findings()
    found.relative("grad norm", "both", math.nan, math.nan, 1e-7)
    found.array("grad", "both", torch.tensor([math.nan, 1.0]), np.array([math.nan, 1.0], np.float32), 1e-7)
    assert found.failures == []
    found.relative("grad norm", "one", math.nan, 1.0, 1e-7)
    found.relative("grad norm", "one", 1.0, math.nan, 1e-7)
    found.array("grad", "one", torch.tensor([math.nan, 1.0]), np.array([1.0, math.nan], np.float32), 1e-7)
    assert len(found.failures) == 3


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


def write_multimae_case(folder, name):
    """A case of the golden format whose numbers are our own: 16 px patches of 112 px, other decoders, domains in no order of
    ours, one that is only read and one that is only given, and log variances in the order of the published predictions.
    """
    inputs, outputs, size, patch, budget = ["semseg", "rgb", "depth"], ["semseg", "rgb", "sired"], 112, 16, 20
    arguments = {"in_domains": inputs, "out_domains": outputs, "input_size": size, "patch_size": patch}
    arguments |= {"num_encoded_tokens": budget, "alphas": [0.5, 1.0, 2.0], "sample_tasks_uniformly": True}
    arguments |= {"extra_norm_pix_loss": False, "decoder_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2}
    arguments |= {"fp32_output_adapters": "semseg"}
    seed, generator = 7, torch.Generator().manual_seed(7)
    entry = {
        "config": {"case": {"dim": {"dim_tokens": 32, "depth": 1, "num_heads": 4}, "weight_seed": seed}, "args": arguments},
        "token_order": ["rgb", "semseg", "depth"],
        "params": [["loss_balancer.log_vars", [3], 0.0, 0.3]],
        "loss_if_on_all_tokens": {},
        "file": f"{name}.safetensors",
    }
    case = SimpleNamespace(entry=entry)
    model = golden_multimae.empty(case)
    published = to_published(dict(model.named_parameters()), tuple(model.domains_in), tuple(model.targets))
    entry["params"] += [[ref, list(value.shape), 0.0, 0.1] for ref, value in published.items() if ref != "log_vars"]
    case.inputs = {
        "in.rgb": torch.randn(2, 3, size, size, generator=generator).half().numpy(),
        "in.depth": torch.randn(2, 1, size, size, generator=generator).half().numpy(),
        "in.sired": torch.randn(2, 2, size, size, generator=generator).half().numpy(),
        "in.semseg": torch.randint(12, (2, size // 4, size // 4), generator=generator).byte().numpy(),
    }
    index = torch.stack([torch.randperm(3 * 49, generator=generator)[:budget] for _ in range(2)])
    model = golden_multimae.build(case, torch.float64)
    out = model(golden_multimae.batch_of(case), TokenSample(index, None), return_predictions=True)
    out.loss.backward()
    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    grads = to_published(own, tuple(model.domains_in), tuple(model.targets))
    log_vars = grads.pop("log_vars")[[1, 2, 0]]  # of decoders semseg, rgb, sired: the one in float32 comes last
    grads["loss_balancer.log_vars"] = log_vars
    entry |= {
        "loss": {name: loss.item() for name, loss in out.losses.items()},
        "loss_total": out.loss.item(),
        "grad_norm": {name: grad.norm().item() for name, grad in grads.items()},
    }
    arrays = {f"pred.{name}": pred.detach().float().numpy() for name, pred in out.predictions.items()}
    arrays |= {"grad.loss_balancer.log_vars": log_vars.float().numpy()}
    arrays |= {"enc_out": out.latent.detach().float().numpy(), "ids_keep": index.int().numpy(), **case.inputs}
    arrays |= {"pos_emb.rgb_output_14x14": model.decoders.table.float().numpy()}
    save_numpy(arrays, folder / entry["file"])
    (folder / "manifest.json").write_text(json.dumps({"cases": {name: entry}}))
    return model


def test_a_multimae_is_read_off_the_case(tmp_path):
    """Sizes, domains, their order, budget, alphas and log variances need not be those of our own cases."""
    model = write_multimae_case(tmp_path, "multimae_other")
    assert (tuple(model.domains_in), tuple(model.targets)) == (("rgb", "semseg", "depth"), ("semseg", "rgb", "sired"))
    assert (model.alphas, model.sample_domains_uniformly, model.log_vars.shape) == ((0.5, 1.0, 2.0), True, (3,))
    for dtype in (torch.float64, torch.float32):
        assert check(tmp_path, "multimae_other", dtype).failures == []
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"fp32_output_adapters": "semseg"', '"fp32_output_adapters": ""'))
    assert any("total loss" in failure for failure in check(tmp_path, "multimae_other", torch.float64).failures)


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
