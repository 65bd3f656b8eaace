"""Small MP-MAEs as files, and timm."""

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mpmae
from mpmae.eval.torchvision_import import let_torchvision_import


@pytest.fixture(scope="session")
def make_source(tmp_path_factory):
    """A function that writes a small MP-MAE with random weights: its file and its state dict."""

    @cache
    def make(size="atto", stem="mmearth", patch_size=8, **options) -> tuple[Path, dict[str, torch.Tensor]]:
        modalities = {"modalities_out": ("sentinel2", "biome"), "decoder_dim": 16} | options
        model = mpmae.create_model(f"mpmae_{size}", stem=stem, patch_size=patch_size, img_size=3 * patch_size, **modalities)
        generator = torch.Generator().manual_seed(1)
        state = {
            name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()
        }
        path = tmp_path_factory.mktemp("source") / f"{size}-{stem}-{patch_size}.safetensors"
        save_file(state, path)
        return path, state

    return make


@pytest.fixture(scope="session")
def timm():
    let_torchvision_import()
    return pytest.importorskip("timm", reason="needs timm: pip install -e '.[test]'")
