"""Every difference to the published code: what is right (the default) and what `reference_quirks=True` gives instead.

docs/quirks.md lists them with the names of these tests.
"""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mpmae
from mpmae.config import load_config
from mpmae.masking import visible_bool
from mpmae.modalities import MODALITIES, class_lookup, no_data_rule
from mpmae.train.setup import set_up
from tests.models.small import PATCHES, SIZE, build, cut, draw, drop

EITHER = pytest.mark.parametrize("quirks", [False, True])


def both(batch, name):
    """The loss of `name`, right and with the quirks, for one model."""
    right, quirk = (
        build(loss_weighting="unweighted", norm_pix_loss=name == "sentinel2", reference_quirks=q) for q in (False, True)
    )
    visible = draw(batch)
    outs = [model(batch, visible, return_predictions=True) for model in (right, quirk)]
    torch.testing.assert_close(outs[0].predictions[name], outs[1].predictions[name])
    return outs[0].losses[name], outs[1].losses[name], outs[0].predictions[name], visible


def hidden_errors(batch, name, pred, visible, channels):
    """Squared errors on hidden patches, [N, M, p*p*C], no data being a target of 0."""
    target = batch.values[name].double().unflatten(3, (3, 8)).unflatten(2, (3, 8))
    target = target.permute(0, 2, 4, 3, 5, 1).reshape(-1, 9, 64 * channels)
    errors = (pred.flatten(2).transpose(1, 2) - target).square()
    return errors[~visible_bool(visible, PATCHES)].view(len(pred), 6, -1)


def head_of(model, name):
    return model.heads.pixel[name] if name in model.heads.pixel else model.heads.tile[name]


@pytest.mark.parametrize(("name", "channels"), [("sentinel1", 8), ("aster", 2), ("canopy_height_eth", 2)])
def test_no_data_in_a_continuous_map(make_batch, name, channels):
    """Ignored; quirk: a target of 0 that counts."""
    batch = make_batch(2, SIZE)
    drop(batch, name, (0, 1))
    right, quirk, pred, visible = both(batch, name)
    errors = hidden_errors(batch, name, pred, visible, channels)
    torch.testing.assert_close(quirk, errors.mean(-1).sum() / 12)
    valid = torch.arange(64 * channels) % channels != 1
    torch.testing.assert_close(right, (errors[0][:, valid].mean() + errors[1].mean()) / 2)


@pytest.mark.parametrize("name", ["biome", "eco_region"])
def test_a_row_without_data(make_batch, name):
    """Ignored; quirk: class 0."""
    batch = make_batch(2, SIZE)
    drop(batch, name, 1)
    batch.num_present[name] = 1
    right, quirk, pred, _ = both(batch, name)
    rows = F.cross_entropy(pred, batch.values[name].clamp(min=0), reduction="none")
    assert batch.values[name][1] == -1
    torch.testing.assert_close(right, rows[0])
    torch.testing.assert_close(quirk, F.cross_entropy(pred, torch.stack([batch.values[name][0], torch.tensor(0)])))


def test_sentinel2_target_without_data(make_batch):
    """The patch is normalised over its valid values; quirk: over the zeros that stand for no data too."""
    batch = make_batch(2, SIZE)
    drop(batch, "sentinel2", (slice(None), 2))
    right, quirk, pred, visible = both(batch, "sentinel2")
    bands = [b for b in range(13) if b != 10]
    target = batch.values["sentinel2"][:, bands].double().unflatten(3, (3, 8)).unflatten(2, (3, 8))
    target = target.permute(0, 2, 4, 3, 5, 1).reshape(2, 9, -1)
    hidden, pred = ~visible_bool(visible, PATCHES), pred.flatten(2).transpose(1, 2)

    def errors(columns):
        t = target[..., columns]
        t = (t - t.mean(-1, keepdim=True)) / (t.var(-1, keepdim=True) + 1e-6).sqrt()
        return (pred[..., columns] - t).square()[hidden].mean()

    torch.testing.assert_close(quirk, errors(torch.ones(64 * 12, dtype=torch.bool)))
    torch.testing.assert_close(right, errors(torch.arange(64 * 12) % 12 != 2))


@EITHER
def test_a_pixel_that_is_0_in_every_band(make_batch, quirks):
    """It is a site like any other where the batch says `valid`; quirk: it does not exist."""
    shown = torch.tensor([[0, 1, 2]])
    zero, absent = make_batch(1, SIZE), make_batch(1, SIZE)
    zero.values["sentinel2"][0, :, 2:4, 2:4] = 0
    drop(absent, "sentinel2", (0, slice(None), slice(2, 4), slice(2, 4)))
    model = build(reference_quirks=quirks)
    assert torch.equal(model.encode(zero, shown), model.encode(absent, shown)) == quirks


@EITHER
@pytest.mark.parametrize(("name", "dtype", "code"), [("aster", "i2", -32768), ("canopy_height_eth", "i1", 127)])
def test_a_saturated_code(name, dtype, code, quirks):
    """No data; quirk: data, since the code that the published code looks for (-inf, 255) cannot be in such a file."""
    valid = no_data_rule(name, dtype, reference_quirks=quirks).valid(np.array([0, code], dtype))
    assert valid.tolist() == [True, quirks]


@EITHER
def test_codes_that_the_file_can_hold(quirks):
    """Both agree where the published code can see its no-data value."""
    for name, dtype, code in (
        ("sentinel2", "u2", 0),
        ("canopy_height_eth", "u1", 255),
        ("canopy_height_eth", "f4", 255),
        ("aster", "f4", -np.inf),
        ("sentinel1", "f4", -np.inf),
        ("era5", "f4", np.nan),
        ("lat", "f4", -np.inf),
    ):
        valid = no_data_rule(name, dtype, reference_quirks=quirks).valid(np.array([1, code], dtype))
        assert valid.tolist() == [True, False], name


@EITHER
def test_tree_cover(quirks):
    """esa_worldcover's class 0; quirk: no data, as the class id equals the no-data code."""
    table = class_lookup(MODALITIES["esa_worldcover"], reference_quirks=quirks)
    assert table[10] == (-1 if quirks else 0)
    assert table[[20, 100, 0, 255]].tolist() == [1, 10, -1, -1]
    assert class_lookup(MODALITIES["dynamic_world"], reference_quirks=quirks)[[0, 1, 9]].tolist() == [-1, 0, 8]


@EITHER
def test_the_loader_follows(shards_dir, quirks):
    """The run's switch reaches its batches: saturated codes and tree cover, in training and in validation."""
    overrides = [f"data.shards={shards_dir}", f"model.reference_quirks={quirks}", "train.global_batch_size=4"]
    setup = set_up(load_config(None, overrides), world_size=1)
    for loader in (setup.training, setup.reference, setup.validation):
        batch = loader.batch_of(np.arange(len(loader.reader)))
        assert batch.valid["canopy_height_eth"].all() == quirks
        assert (batch.values["esa_worldcover"] != 0).all() == quirks
    aster = setup.reference.batch_of(np.arange(len(setup.reference.reader)))
    raw = np.stack([setup.reference.reader.pixels(i, "aster")[:, 4:60, 4:60] for i in range(len(aster))])
    stats = setup.reference.reader.manifest.band_stats["aster"]
    expected = (raw - np.reshape(stats.mean, (2, 1, 1))) / np.reshape(stats.std, (2, 1, 1))
    assert (raw == -32768).any()
    expected = np.where((raw == -32768) & (not quirks), 0, expected)
    np.testing.assert_allclose(aster.values["aster"].numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["era5", "dynamic_world"])
def test_means_are_local(make_batch, name):
    """Samples count equally and the cut changes nothing; quirk: they count by their valid values, and the cut shows."""
    batch = make_batch(2, SIZE)
    drop(batch, name, (0, slice(0, 9)) if name == "era5" else (0, 0, slice(0, 17)))
    right, quirk, _, _ = both(batch, name)
    assert not torch.isclose(right, quirk, rtol=1e-6)
    for quirks, whole in ((False, right), (True, quirk)):
        model = build(loss_weighting="unweighted", norm_pix_loss=False, reference_quirks=quirks)
        parts = sum(model(cut(batch, n, n + 1), draw(cut(batch, n, n + 1))).losses[name] for n in range(2))
        assert torch.isclose(parts, whole, rtol=1e-9) != quirks


@EITHER
def test_a_patch_that_is_predicted_exactly(make_batch, quirks):
    """Its 0 counts in the mean; quirk: the sum is divided by the number of patches with a loss."""
    batch = make_batch(1, SIZE)
    batch.values["aster"].zero_()
    batch.values["aster"][0, 0, :8, :8] = 1.0
    model = build(loss_weighting="unweighted", reference_quirks=quirks)
    torch.nn.init.zeros_(model.heads.pixel["aster"].weight)
    loss = model(batch, torch.tensor([[3, 4, 5]])).losses["aster"].item()
    assert loss == pytest.approx(0.5 if quirks else 0.5 / 6)


@EITHER
@pytest.mark.parametrize("name", ["sentinel1", "aster", "canopy_height_eth", "sentinel2"])
def test_a_map_that_is_predicted_exactly(make_batch, name, quirks):
    """A loss of 0; quirk: 0/0, NaN in the total too."""
    batch = make_batch(2, SIZE)
    batch.values[name].zero_()
    model = build(reference_quirks=quirks)
    torch.nn.init.zeros_(model.heads.pixel[name].weight)
    out = model(batch, draw(batch))
    out.loss.backward()
    assert out.losses[name].isnan() if quirks else out.losses[name] == 0
    assert out.loss.isnan() == quirks
    assert head_of(model, name).bias.grad.isnan().any() == quirks


@EITHER
@pytest.mark.parametrize("weighting", ["uncertainty", "unweighted"])
@pytest.mark.parametrize("name", ["dynamic_world", "esa_worldcover", "era5", "lat", "lon", "month"])
def test_no_valid_target(make_batch, name, weighting, quirks):
    """A loss of 0 and no gradient; quirk: the mean of nothing, NaN, which has no gradient but that of the log variance."""
    batch = make_batch(2, SIZE)
    drop(batch, name)
    batch.num_present[name] = 0
    model = build(loss_weighting=weighting, reference_quirks=quirks)
    out = model(batch, draw(batch))
    out.loss.backward()
    assert out.losses[name].isnan() if quirks else out.losses[name] == 0
    assert out.loss.isnan() == quirks
    assert all(loss.isfinite() for other, loss in out.losses.items() if other != name)
    assert head_of(model, name).weight.grad.count_nonzero() == 0
    if weighting == "uncertainty":
        grad = model.log_vars.grad[model.modalities_out.index(name)]
        assert grad.isnan() if quirks else grad == 0


def test_what_torch_says_of_nothing():
    """The published code's two means over nothing; the quirk's NaN and its gradient are theirs."""
    pred = torch.ones(3, 9, requires_grad=True)
    none = torch.zeros(3, dtype=torch.bool)
    for loss in (F.cross_entropy(pred[none], torch.zeros(0, dtype=torch.int64)), F.mse_loss(pred[none], torch.zeros(0, 9))):
        assert loss.isnan()
        (grad,) = torch.autograd.grad(loss, pred)
        assert (grad == 0).all()


@EITHER
def test_uncertainty_of_a_loss_of_0(make_batch, quirks):
    """s_i counts while a tile has the modality; quirk: it drops out when the loss is exactly 0."""
    batch = make_batch(1, SIZE)
    batch.values["era5"].zero_()
    model = build(reference_quirks=quirks)
    torch.nn.init.zeros_(model.heads.tile["era5"].weight)
    out = model(batch, draw(batch))
    out.loss.backward()
    assert out.losses["era5"] == 0
    grad = model.log_vars.grad[model.modalities_out.index("era5")].item()
    assert grad == pytest.approx(0.0 if quirks else 1.0)


@EITHER
def test_grn_scope(make_batch, quirks):
    """A sample's features are its own; quirk: GRN takes its norm over the micro batch."""
    batch, other = make_batch(2, SIZE), make_batch(2, SIZE)
    other.values["sentinel2"][1] *= 3
    torch.manual_seed(0)
    model = build(reference_quirks=quirks)
    for name, parameter in model.named_parameters():
        if name.endswith("grn.gamma"):
            torch.nn.init.normal_(parameter)
    first, second = (model(b, draw(b)).latent[0] for b in (batch, other))
    assert torch.allclose(first, second, rtol=1e-9) != quirks


@EITHER
def test_bands(make_batch, quirks):
    """The encoder reads its own list of bands; quirk: the output's list wins, and another one is refused."""
    bands = ("B4", "B3", "B2")
    model = build(modalities_out={"sentinel2": bands}, reference_quirks=quirks)
    assert model.bands_in == (bands if quirks else MODALITIES["sentinel2"].model_bands)
    batch = make_batch(2, SIZE)
    assert model(batch, draw(batch)).loss.isfinite()
    options = {"bands_in": ("B2",), "modalities_out": {"sentinel2": bands}, "reference_quirks": quirks}
    if quirks:
        with pytest.raises(mpmae.errors.ConfigError, match="reference_quirks reads the bands"):
            build(**options)
    else:
        assert build(**options).bands_in == ("B2",)


@EITHER
@pytest.mark.parametrize("shown", [[0, 1, 3], [0, 1, 2], [0, 3, 6]], ids=["both", "rows", "column"])
def test_a_last_row_or_column_that_is_hidden(make_batch, shown, quirks):
    """Works in both: the published code's crash is not reproduced."""
    batch, visible = make_batch(2, SIZE), torch.tensor([shown] * 2)
    model = build(reference_quirks=quirks)
    out = model(batch, visible, return_predictions=True)
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert out.latent.shape[2:] == out.predictions["aster"].shape[2:] == (3, 3)
    assert (out.latent != 0).any(1).flatten(1).nonzero()[:, 1].view(2, 3).tolist() == [shown] * 2


def test_the_page_names_every_test(repo):
    """docs/quirks.md lists exactly the tests of this file, and those of MultiMAE in a section of its own."""
    page = (repo / "docs" / "quirks.md").read_text().split("## MultiMAE")[0]
    named = set(re.findall(r"`(test_\w+)`", page))
    here = {name for name in globals() if name.startswith("test_")} - {"test_the_page_names_every_test"}
    assert named == here
