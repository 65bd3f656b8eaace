"""The trivial predictor's loss, by hand: mean squares and log frequencies."""

import torch

from mpmae.masking import draw_visible
from mpmae.models import create_model


def test_tile_modalities(make_batch):
    model, batch = create_model("mpmae_atto", img_size=24, modalities_out=("era5", "biome")), make_batch(6)
    batch.values["biome"][2], batch.valid["biome"][2], batch.num_present["biome"] = -1, False, 5
    visible = draw_visible(0, 0, batch.sample_ids, model.num_patches, model.num_visible)
    log_frequencies = torch.randn(14).log_softmax(0)
    shares = model.constant_shares(batch, visible, {"era5": torch.zeros(1), "biome": log_frequencies})
    biome = batch.values["biome"]
    torch.testing.assert_close(shares["biome"], -log_frequencies[biome[biome >= 0]].sum() / 5)
    torch.testing.assert_close(shares["era5"], batch.values["era5"].square().mean())


def test_pixel_modalities_count_hidden_patches_only(make_batch):
    names = ("sentinel2", "aster", "esa_worldcover")
    model, batch = create_model("mpmae_atto", img_size=24, modalities_out=names), make_batch(3)
    visible = draw_visible(0, 0, batch.sample_ids, model.num_patches, model.num_visible)
    logits = torch.randn(11)
    constants = {"sentinel2": torch.zeros(1), "aster": torch.zeros(1), "esa_worldcover": logits}
    shares = model.constant_shares(batch, visible, constants)
    hidden = torch.ones(3, 9, dtype=torch.bool).scatter(1, visible, False)
    pixels = hidden.view(3, 1, 3, 3).repeat_interleave(8, 2).repeat_interleave(8, 3)
    aster = (batch.values["aster"].square() * pixels).sum((1, 2, 3)) / (2 * pixels.sum((1, 2, 3)))
    torch.testing.assert_close(shares["aster"], aster.mean())
    classes = -logits.log_softmax(0)[batch.values["esa_worldcover"]]
    torch.testing.assert_close(shares["esa_worldcover"], classes[pixels].mean())
    assert 0.99 < shares["sentinel2"] < 1.0  # unit variance, unbiased, 768 values a patch
