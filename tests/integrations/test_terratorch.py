"""The backbones in TerraTorch's own registry and factory. Run by `make test-eo`."""

import pytest
import torch

pytest.importorskip("terratorch", reason="needs terratorch: make test-eo")

from terratorch.datasets import HLSBands
from terratorch.models import EncoderDecoderFactory
from terratorch.registry import BACKBONE_REGISTRY

import mpmae
from mpmae.errors import CheckpointError, ConfigError
from mpmae.export import export
from mpmae.integrations.terratorch import BACKBONES
from mpmae.modalities import spec_of

BANDS = spec_of("sentinel2").model_bands


@pytest.mark.parametrize("name", ["mpmae_convnextv2_atto", "mpmae_convnextv2_tiny"])
def test_the_registry_builds_a_pyramid(name):
    assert name in BACKBONES
    backbone = BACKBONE_REGISTRY.build(name, in_chans=4, patch_size=16, out_indices=[1, -1])
    maps = backbone(torch.randn(2, 4, 32, 32))
    assert [tuple(m.shape) for m in maps] == [
        (2, channels, side, side) for channels, side in zip(backbone.out_channels, (8, 2), strict=True)
    ]


@pytest.mark.parametrize("indices", [[7], [-9], []])
def test_stages_that_do_not_exist(indices):
    with pytest.raises(ConfigError, match=r"out_indices = .*: expected stages within -4\.\.3"):
        BACKBONE_REGISTRY.build("mpmae_convnextv2_atto", out_indices=indices)


def test_all_sizes_are_registered():
    assert [f"mpmae_{name}" for name in mpmae.list_encoders()] == list(BACKBONES)
    assert all(name in BACKBONE_REGISTRY.find_registry(name) for name in BACKBONES)


def test_weights_of_a_checkpoint_and_of_its_export(checkpoint, tmp_path):
    image = torch.randn(1, 12, 16, 16)
    with torch.no_grad():
        expected = mpmae.create_encoder("convnextv2_atto", checkpoint=checkpoint).forward_features(image)
        for path in (checkpoint, export(checkpoint, "hub", tmp_path / "hub").folder):
            backbone = BACKBONE_REGISTRY.build("mpmae_convnextv2_atto", pretrained=True, ckpt_path=str(path))
            assert torch.equal(backbone(image)[-1], expected)


def test_bands_are_chosen_by_name_in_any_order(checkpoint):
    bands = [HLSBands.RED, "NIR_NARROW", "B02"]
    full = BACKBONE_REGISTRY.build("mpmae_convnextv2_atto", ckpt_path=checkpoint).double()
    few = BACKBONE_REGISTRY.build("mpmae_convnextv2_atto", ckpt_path=checkpoint, bands=bands).double()
    image = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    padded = torch.zeros(1, 12, 16, 16, dtype=torch.float64)
    padded[:, [BANDS.index(band) for band in ("B4", "B8A", "B2")]] = image
    with torch.no_grad():
        torch.testing.assert_close(few(image)[0], full(padded)[0])


def test_an_encoder_decoder_trains_on_a_tile(checkpoint):
    model = EncoderDecoderFactory().build_model(
        task="segmentation",
        backbone="mpmae_convnextv2_atto",
        backbone_ckpt_path=checkpoint,
        backbone_bands=list(BANDS),
        decoder="UNetDecoder",
        decoder_channels=[32, 16, 8, 8],
        num_classes=5,
    )
    output = model(torch.randn(2, 12, 56, 56)).output
    assert output.shape == (2, 5, 56, 56)
    output.mean().backward()
    assert model.encoder.encoder.stem.conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"pretrained": True}, ConfigError, "ckpt_path"),
        ({"bands": ["MAGENTA"]}, ConfigError, "unknown band 'MAGENTA'"),
        ({"ckpt_path": True, "bands": ["B10"]}, CheckpointError, "no weights for B10"),
        ({"ckpt_path": True, "patch_size": 16}, ConfigError, "patch_size = 16"),
        ({"ckpt_path": True, "in_chans": 3}, ConfigError, "in_chans = 3"),
    ],
)
def test_what_does_not_fit_is_refused(options, error, words, checkpoint):
    if "ckpt_path" in options:
        options = options | {"ckpt_path": checkpoint}
    with pytest.raises(error, match=words):
        BACKBONE_REGISTRY.build("mpmae_convnextv2_atto", **options)
