"""`create_encoder`, `create_unet` and the dense encoder inside MP-MAE."""

import pytest
import torch

import mpmae
from mpmae.errors import ConfigError
from mpmae.masking import draw_visible
from mpmae.models.dense import ConvNeXtV2
from mpmae.models.presets import SIZES

PARAMETERS = {  # with 1,000 classes, 3 channels, patch 32 and ConvNeXt's stem: arXiv 2301.00808, table 13, in millions
    "convnextv2_atto": 3.7,
    "convnextv2_femto": 5.2,
    "convnextv2_pico": 9.1,
    "convnextv2_nano": 15.6,
    "convnextv2_tiny": 28.6,
    "convnextv2_base": 88.7,
    "convnextv2_large": 198.0,
    "convnextv2_huge": 660.3,
}


@pytest.mark.parametrize("name", mpmae.list_encoders())
def test_sizes(name):
    with torch.device("meta"):
        model = mpmae.create_encoder(name, patch_size=32, stem="convnext", in_chans=3, num_classes=1000)
        unet = mpmae.create_unet(name, num_classes=2)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(PARAMETERS[name], abs=0.06 if millions < 100 else 0.5)
    assert unet.encoder.num_features == model.num_features == SIZES[name.removeprefix("convnextv2_")][0][-1]


def test_defaults():
    model = mpmae.create_encoder("convnextv2_atto")
    assert isinstance(model, ConvNeXtV2)
    assert (model.in_chans, model.patch_size, model.num_classes, model.stem_padding) == (12, 8, 0, "same")
    assert hasattr(model.stem, "pool")
    assert model.stages[0][0].grn.eps == 1e-6
    assert mpmae.create_unet("convnextv2_atto", num_classes=1).encoder.in_chans == 12


@pytest.mark.parametrize(
    ("options", "in_chans"),
    [
        ({"in_chans": 3}, 3),
        ({"bands_in": ("B4", "B3", "B2")}, 3),
        ({"bands_in": ("B4", "B10"), "in_chans": 2}, 2),
        ({}, 12),
    ],
)
def test_channels(options, in_chans):
    assert mpmae.create_encoder("convnextv2_atto", **options).in_chans == in_chans
    assert mpmae.create_unet("convnextv2_atto", num_classes=3, **options).encoder.in_chans == in_chans


@pytest.mark.parametrize(
    ("name", "options", "messages"),
    [
        ("convnextv2_ato", {}, ["create_encoder: unknown model 'convnextv2_ato'; did you mean convnextv2_atto?"]),
        ("resnet50", {}, ["Known: convnextv2_atto, convnextv2_femto"]),
        ("convnextv2_atto", {"patch_size": 12, "stem": "vit"}, ["patch_size = 12", "stem = 'vit', expected one of mmearth"]),
        ("convnextv2_atto", {"patch_size": 0}, ["patch_size = 0"]),
        ("convnextv2_atto", {"in_chans": 3, "bands_in": ("B4",)}, ["in_chans = 3, but bands_in names 1 bands (B4)"]),
        ("convnextv2_atto", {"bands_in": ("B4", "B99")}, ["no band B99", "B1, B2"]),
        ("convnextv2_atto", {"bands_in": ("B4", "B4")}, ["lists a band twice"]),
        ("convnextv2_atto", {"bands_in": ()}, ["empty list of bands"]),
        ("convnextv2_atto", {"in_chans": 0}, ["in_chans = 0"]),
        ("convnextv2_atto", {"num_classes": -1, "drop_path_rate": 1.0}, ["num_classes = -1", "drop_path_rate = 1.0"]),
        ("convnextv2_atto", {"stem_padding": "valid", "grn_eps": 0.0}, ["stem_padding = 'valid'", "grn_eps = 0.0"]),
    ],
)
def test_bad_arguments_are_named(name, options, messages):
    with pytest.raises(ConfigError) as caught:
        mpmae.create_encoder(name, **options)
    for message in messages:
        assert message in str(caught.value)


def test_bad_arguments_of_the_unet_are_named():
    with pytest.raises(ConfigError) as caught:
        mpmae.create_unet("convnextv2_at", num_classes=0, patch_size=10)
    assert len(caught.value.problems) == 3
    assert all(problem.startswith("create_unet: ") for problem in caught.value.problems)


def dense_model(**options):
    torch.manual_seed(0)
    return mpmae.create_model("mpmae_atto", img_size=24, decoder_dim=16, encoder="dense", **options)


def test_mpmae_with_the_dense_encoder(make_batch):
    model, batch = dense_model(), make_batch(2, 24)
    sparse = mpmae.create_model("mpmae_atto", img_size=24, decoder_dim=16)
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in sparse.named_parameters()]
    visible = draw_visible(0, 0, batch.sample_ids, 9, 3)
    out = model(batch, visible)
    out.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert (out.latent != 0).any(1).all()  # hidden patches too
    rows = out.latent.flatten(2).transpose(1, 2).gather(1, visible[:, :, None].expand(-1, -1, 320))
    assert torch.equal(model.encode(batch, visible), rows)


def test_the_dense_encoder_sees_no_hidden_pixel(make_batch):
    model, batch = dense_model(), make_batch(2, 24)
    visible = draw_visible(0, 0, batch.sample_ids, 9, 3)
    expected = model(batch, visible).latent
    shown = torch.zeros(2, 9).scatter(1, visible, 1).view(2, 1, 3, 3).repeat_interleave(8, 2).repeat_interleave(8, 3)
    image = batch.values["sentinel2"]
    batch.values["sentinel2"] = torch.where(shown > 0, image, 9.0)
    assert torch.equal(model(batch, visible).latent, expected)
    batch.values["sentinel2"] = image + shown
    assert not torch.equal(model(batch, visible).latent, expected)


def test_all_visible_both_encoders_agree(make_batch):
    options = {"img_size": 24, "decoder_dim": 16, "mask_ratio": 0.0, "init": "convnextv2"}
    torch.manual_seed(0)
    sparse = mpmae.create_model("mpmae_atto", **options).double()
    dense = mpmae.create_model("mpmae_atto", encoder="dense", **options).double()
    dense.load_state_dict(sparse.state_dict())
    batch, visible = make_batch(2, 24, dtype=torch.float64), torch.arange(9).expand(2, -1)
    torch.testing.assert_close(dense(batch, visible).latent, sparse(batch, visible).latent, rtol=1e-10, atol=1e-10)


def test_the_dense_encoder_s_initialisation():
    """The published code fills all convolutions of a dense encoder with spread 1, the linear layers with 0.02."""
    model = mpmae.create_model("mpmae_atto", encoder="dense", init="reference")
    for name, module in model.encoder.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            spread = 0.88 if isinstance(module, torch.nn.Conv2d) else 0.02
            assert module.weight.std().item() == pytest.approx(spread, rel=5 / module.weight.numel() ** 0.5), name


def test_quirks_take_the_published_stem():
    model = mpmae.create_model("mpmae_atto", encoder="dense", img_size=32, patch_size=16, reference_quirks=True)
    assert model.encoder.stem_padding == "reference"
    assert model.encoder.stages[0][0].grn.eps == 1e-4
    assert model.grn_scope == "sample"
    plain = mpmae.create_model("mpmae_atto", encoder="dense")
    assert (plain.encoder.stem_padding, plain.encoder.stages[0][0].grn.eps) == ("same", 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference_quirks": True}, "img_size = 56 and patch_size = 8 give 6 x 6 sites for 7 x 7 patches"),
        ({"grn_scope": "batch"}, "the dense encoder takes the norm per sample"),
    ],
)
def test_what_the_dense_encoder_cannot_do(options, message):
    with pytest.raises(ConfigError, match=message):
        mpmae.create_model("mpmae_atto", encoder="dense", **options)
    with pytest.raises(ConfigError, match="encoder = 'vit', expected one of sparse, dense"):
        mpmae.create_model("mpmae_atto", encoder="vit")
