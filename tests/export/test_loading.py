"""Exported folders load where mpmae is not, and compute what our dense model computes."""

import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import mpmae
from mpmae.export import export


def dense_twin(state, size="atto", **options):
    model = mpmae.create_encoder(f"convnextv2_{size}", in_chans=12, **options)
    own = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    assert set(model.load_state_dict(own, strict=False).missing_keys) == {"norm.weight", "norm.bias"}
    return model.eval()


def images(patch_size, dtype=torch.float64):
    side = 2 * patch_size
    return torch.randn(1, 12, side, side, generator=torch.Generator().manual_seed(5), dtype=dtype)


@pytest.mark.parametrize(("size", "patch_size"), [("atto", 8), ("atto", 32), ("tiny", 32)])
def test_timm_computes_the_same(size, patch_size, make_source, tmp_path, timm):
    source, state = make_source(size=size, stem="convnext", patch_size=patch_size)
    folder = export(source, "timm", tmp_path / "out").folder
    ours = dense_twin(state, size=size, stem="convnext", patch_size=patch_size).double()
    arguments = {"in_chans": 12, "num_classes": 0, "patch_size": patch_size // 8}
    file, image = str(folder / "model.safetensors"), images(patch_size)
    models = [
        timm.create_model(f"local-dir:{folder}", pretrained=True),
        timm.create_model(f"convnextv2_{size}", checkpoint_path=file, **arguments),
    ]
    for model in models:
        model = model.double().eval()
        with torch.no_grad():
            map_theirs, map_ours = model.forward_features(image), ours.forward_features(image)
            torch.testing.assert_close(map_theirs, map_ours, rtol=0, atol=1e-10)
            torch.testing.assert_close(model.forward_head(map_theirs), ours.forward_head(map_ours), rtol=0, atol=1e-10)


def test_timm_adapts_the_head(make_source, tmp_path, timm):
    source, _ = make_source(stem="convnext", patch_size=32)
    folder = export(source, "hf", tmp_path / "out", licence="MIT").folder
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5)
    assert model(images(32, torch.float32)).shape == (1, 5)
    assert model.pretrained_cfg["license"] == "MIT"
    text = (folder / "README.md").read_text()
    assert "library_name: timm" in text
    assert "license: mit" in text


HUB_SCRIPT = """
import sys
sys.modules["mpmae"] = None  # importing it fails from here on
import torch
from safetensors.torch import load_file, save_file

image = load_file(sys.argv[1])["image"]
for folder in sys.argv[2:]:
    model = torch.hub.load(folder, "encoder", source="local").double().eval()
    with torch.no_grad():
        save_file({"features": model.forward_features(image).contiguous()}, folder + ".features.safetensors")
    fresh = torch.hub.load(folder, "encoder", source="local", pretrained=False, num_classes=3, drop_path_rate=0.1)
    assert fresh(image.float()).shape == (1, 3)
    assert not torch.equal(fresh.stem.conv.weight, model.stem.conv.weight.float())
    tuned = torch.hub.load(folder, "encoder", source="local", num_classes=3)
    assert torch.equal(tuned.stem.conv.weight, model.stem.conv.weight.float())
    assert tuned(image.float()).shape == (1, 3)
"""


def test_torch_hub_without_mpmae(make_source, tmp_path):
    folders, twins = [], []
    for target, stem, patch_size in (("hub", "mmearth", 16), ("hub", "convnext", 16), ("hf", "mmearth", 8)):
        source, state = make_source(stem=stem, patch_size=patch_size)
        folders.append(export(source, target, tmp_path / f"{target}-{stem}").folder)
        twins.append(dense_twin(state, stem=stem, patch_size=patch_size).double())
    save_file({"image": images(16)}, tmp_path / "image.safetensors")
    command = [sys.executable, "-c", HUB_SCRIPT, str(tmp_path / "image.safetensors"), *map(str, folders)]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=300)
    for folder, twin in zip(folders, twins, strict=True):
        with torch.no_grad():
            expected = twin.forward_features(images(16))
        assert torch.equal(load_file(f"{folder}.features.safetensors")["features"], expected)


def test_two_hub_folders_run_their_own_code(make_source, tmp_path):
    """Folders of different versions in one process: the module of the first is not taken for the second."""
    source, _ = make_source()
    folders = [export(source, "hub", tmp_path / name).folder for name in ("old", "new")]
    code = folders[1] / "mpmae_convnextv2.py"
    code.write_text(code.read_text().replace("NORM_EPS = 1e-6", "NORM_EPS = 0.5"))
    old, new = (torch.hub.load(str(folder), "encoder", source="local") for folder in folders)
    assert (old.norm.eps, new.norm.eps) == (1e-6, 0.5)
    assert torch.equal(pickle.loads(pickle.dumps(new)).stem.conv.weight, new.stem.conv.weight)
