"""The U-Net on the dense ConvNeXt V2; its numbers are pinned by the golden cases `unet_*`."""

import pytest
import torch

import mpmae
from mpmae.models.dense import Backbone
from mpmae.models.unet import UNet

DIMS, DEPTHS = (6, 8, 10, 12), (1, 1, 1, 1)


def build(patch_size=8, stem="mmearth", **options):
    torch.manual_seed(0)
    return UNet(DIMS, DEPTHS, num_classes=4, in_chans=3, patch_size=patch_size, stem=stem, **options).eval()


@pytest.mark.parametrize("stem", ["mmearth", "convnext"])
@pytest.mark.parametrize("patch_size", [8, 16, 32])
def test_every_pixel_gets_logits_and_every_weight_a_gradient(patch_size, stem):
    model, image = build(patch_size, stem), torch.randn(2, 3, patch_size, 2 * patch_size)
    features = model.forward_features(image)
    assert features.shape == (2, DIMS[0] // 2, patch_size, 2 * patch_size)
    logits = model(image)
    assert logits.shape == (2, 4, patch_size, 2 * patch_size)
    assert torch.equal(logits, model.head(features))
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_encoder_is_the_backbone():
    model = build()
    encoder = mpmae.create_encoder("convnextv2_atto")
    unet = mpmae.create_unet("convnextv2_atto", num_classes=2)
    assert isinstance(model.encoder, Backbone)
    names = {name for name, _ in encoder.named_parameters() if not name.startswith("norm.")}
    assert {name.removeprefix("encoder.") for name, _ in unet.named_parameters() if name.startswith("encoder.")} == names
    assert unet.num_classes == 2


def test_the_full_resolution_skip_carries_detail():
    """With the pretrained path cut off, single pixels still reach the logits through the stem's first map."""
    model = build()
    with torch.no_grad():
        model.upsamples[-1].conv.weight[:, : DIMS[0]] = 0
    image = torch.randn(1, 3, 16, 16)
    other = image.clone()
    other[0, :, 8, 8] += 1
    changed = (model(other) != model(image)).any(1)[0].nonzero()
    assert len(changed)
    assert (changed - 8).abs().max() <= 2  # two 3x3 convolutions


def test_traces_and_checkpoints():
    model, image = build(16), torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(torch.export.export(model, (image,)).module()(image), model(image))
    plain = torch.autograd.grad(model(image).square().sum(), list(model.parameters()))
    model.encoder.set_grad_checkpointing()
    again = torch.autograd.grad(model(image).square().sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="multiples of patch_size = 8"):
        build()(torch.zeros(1, 3, 20, 16))
    with pytest.raises(ValueError, match=r"expected \[N, 3, H, W\]"):
        build()(torch.zeros(1, 12, 16, 16))
