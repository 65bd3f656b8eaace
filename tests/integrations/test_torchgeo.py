"""The weights enum in torchgeo's conventions, read from files in the published layout. Run by `make test-eo`."""

import argparse
import inspect
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchgeo", reason="needs torchgeo: make test-eo")

import torchgeo.models as torchgeo_models
from torchvision.models._api import WeightsEnum

from mpmae.errors import CheckpointError, ConfigError
from mpmae.integrations.torchgeo import ConvNeXtV2_Atto_Weights, convnextv2_atto
from mpmae.models.interop import read_weights
from tests.models import schemes


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Every address leads to a file of the published layout, with its command line inside, and the cache is empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    states = {}
    for weights in ConvNeXtV2_Atto_Weights:
        folder = weights.meta["checkpoint"]
        variant = "S2" if "-S2_" in folder else "all_mod"
        state = schemes.mmearth("atto", weights.meta["patch_size"], variant, "uncertainty" in folder, decoder_dim=16)
        if weights is ConvNeXtV2_Atto_Weights.SENTINEL2_ALL_MOD_MMEARTH64_UNWEIGHTED:
            state["encoder.initial_conv.0.bias"] += 1  # else its encoder would be another one's
        path = tmp_path / folder / "checkpoint-199.pth"
        path.parent.mkdir()
        torch.save({"model": state, "epoch": 199, "args": argparse.Namespace(data_dir=Path("data"))}, path)
        monkeypatch.setattr(weights.value, "url", path.as_uri())
        states[weights] = state
    return states


def test_each_address_is_loaded_and_kept_apart(published, tmp_path):
    for weights, state in published.items():
        model = convnextv2_atto(weights)
        expected = read_weights(state).state
        for name, value in model.state_dict().items():
            if not name.startswith("norm."):
                assert torch.equal(value, expected[f"encoder.{name}"]), name
        assert model.patch_size == weights.meta["patch_size"]
    cached = sorted(path.name for path in (tmp_path / "cache").rglob("*.pth"))
    assert cached == sorted(f"{weights.meta['checkpoint']}.pth" for weights in published)


def test_arguments_go_to_the_encoder(published):
    model = convnextv2_atto(ConvNeXtV2_Atto_Weights.SENTINEL2_ALL_MOD_MMEARTH, num_classes=10)
    assert model(torch.randn(1, 12, 32, 32)).shape == (1, 10)
    assert convnextv2_atto(in_chans=3, num_classes=2)(torch.randn(1, 3, 8, 8)).shape == (1, 2)
    with pytest.raises(ConfigError, match="patch_size = 8"):
        convnextv2_atto(ConvNeXtV2_Atto_Weights.SENTINEL2_ALL_MOD_MMEARTH, patch_size=8)
    with pytest.raises(TypeError):
        convnextv2_atto(torchgeo_models.ResNet18_Weights.SENTINEL2_ALL_MOCO)


def test_a_download_of_something_else_is_refused(published, tmp_path):
    weights = ConvNeXtV2_Atto_Weights.SENTINEL2_S2_MMEARTH64
    torch.save({"epoch": 199}, tmp_path / weights.meta["checkpoint"] / "checkpoint-199.pth")
    with pytest.raises(CheckpointError, match="no state dict"):
        convnextv2_atto(weights)


def test_conventions_are_torchgeos():
    theirs, ours = inspect.signature(torchgeo_models.resnet18), inspect.signature(convnextv2_atto)
    assert [(p.name, p.kind) for p in theirs.parameters.values()] == [(p.name, p.kind) for p in ours.parameters.values()]
    assert issubclass(ConvNeXtV2_Atto_Weights, WeightsEnum)
    theirs = torchgeo_models.ResNet18_Weights.SENTINEL2_ALL_MOCO.meta
    needed = set(theirs) & {"dataset", "in_chans", "model", "bands", "publication", "repo"}
    assert len(needed) >= 5
    for weights in ConvNeXtV2_Atto_Weights:
        assert needed <= set(weights.meta)
        assert weights.url.startswith("https://")
        assert weights.url.endswith(f"/{weights.meta['checkpoint']}/checkpoint-199.pth")
        image = torch.randn(2, 12, 8, 8)
        assert torch.equal(weights.transforms(image), image)
    assert ConvNeXtV2_Atto_Weights.verify("SENTINEL2_S2_MMEARTH64").meta["in_chans"] == 12
