"""Building the model and what a forward pass gives."""

import subprocess
import sys

import pytest
import torch

import mpmae
from mpmae.errors import ConfigError
from mpmae.masking import draw_visible
from mpmae.modalities import MODALITIES, TARGETS, spec_of

SIZE, PATCHES = 24, 9
PARAMETERS = {
    "mpmae_atto": 7_580_674,  # as the published code counts
    "mpmae_femto": 9_074_666,
    "mpmae_pico": 12_846_010,
    "mpmae_nano": 19_341_834,
    "mpmae_tiny": 32_291_834,
    "mpmae_base": 92_250_746,
    "mpmae_large": 201_243_002,
    "mpmae_huge": 662_958_842,
    "multimae_tiny": 9_991_280,
    "multimae_small": 26_304_176,
    "multimae_base": 90_780_464,  # as the published code counts
    "multimae_large": 308_512_304,
}


def build(**options):
    torch.manual_seed(0)
    return mpmae.create_model("mpmae_atto", img_size=SIZE, decoder_dim=16, **options)


def draw(batch, num_visible=3, seed=0):
    return draw_visible(seed, 0, batch.sample_ids, PATCHES, num_visible)


@pytest.mark.parametrize("name", mpmae.list_models())
def test_presets_build(name):
    with torch.device("meta"):
        model = mpmae.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_importing_the_package_leaves_torch_alone():
    code = "import sys, mpmae; assert 'torch' not in sys.modules; mpmae.create_model; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "options", "messages"),
    [
        ("mpmae_ato", {}, ["did you mean mpmae_atto"]),
        ("mpmae_atto", {"img_size": 60}, ["img_size = 60 is not a multiple of patch_size = 8", "56 or 64"]),
        ("mpmae_atto", {"patch_size": 12}, ["patch_size = 12", "8, 16, 32, 64"]),
        ("mpmae_atto", {"patch_size": 24}, ["patch_size = 24"]),
        ("mpmae_atto", {"patch_size": 4, "stem": "vit"}, ["patch_size = 4", "stem = 'vit'"]),
        ("mpmae_atto", {"modalities_out": ("sentinel2", "asterr")}, ["'asterr'", "did you mean aster"]),
        ("mpmae_atto", {"modalities_out": ("sentinel2_scl",)}, ["unknown modality 'sentinel2_scl'"]),
        ("mpmae_atto", {"modalities_out": ()}, ["modalities_out is empty"]),
        ("mpmae_atto", {"modalities_out": {"aster": ("height",)}}, ["aster has no band height", "elevation, slope"]),
        ("mpmae_atto", {"modalities_out": {"biome": ("x",)}}, ["biome holds class ids"]),
        ("mpmae_atto", {"bands_in": ("B2", "B99")}, ["bands_in: sentinel2 has no band B99"]),
        ("mpmae_atto", {"bands_in": ("B2", "B2")}, ["lists a band twice"]),
        ("mpmae_atto", {"bands_in": ()}, ["empty list of bands"]),
        ("mpmae_atto", {"bands_available": {"sentinel3": ("O1",)}}, ["bands_available", "'sentinel3'"]),
        ("mpmae_atto", {"mask_ratio": 1.0}, ["mask_ratio = 1.0"]),
        ("mpmae_atto", {"loss_weighting": "sum", "init": "zeros", "gelu": "relu"}, ["'sum'", "'zeros'", "'relu'"]),
        ("mpmae_atto", {"decoder_depth": 0}, ["decoder_depth = 0"]),
    ],
)
def test_bad_arguments_are_named(name, options, messages):
    with pytest.raises(ConfigError) as caught:
        mpmae.create_model(name, **options)
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    "modalities_out",
    [(name,) for name in TARGETS]
    + [("month", "aster"), {"sentinel1": ("desc_VV", "asc_VH"), "era5": ("year_temperature_min",), "esa_worldcover": None}],
    ids=str,
)
def test_any_subset_works(make_batch, modalities_out):
    model, batch = build(modalities_out=modalities_out), make_batch(2, SIZE)
    out = model(batch, draw(batch), return_predictions=True)
    out.loss.backward()
    names = [name for name in TARGETS if name in modalities_out]
    assert list(out.losses) == list(out.log_vars) == list(out.predictions) == names
    for name, pred in out.predictions.items():
        channels = spec_of(name).num_classes or len(model.bands_out[name])
        assert pred.shape == ((2, 64 * channels, 3, 3) if spec_of(name).scope == "pixel" else (2, channels))
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bands_are_picked_by_name(make_batch):
    """A model that reads B4, B2 of 13 bands equals one whose batch holds just these."""
    batch, other = make_batch(2, SIZE), make_batch(2, SIZE)
    picked = [MODALITIES["sentinel2"].bands.index(band) for band in ("B4", "B2")]
    other.values["sentinel2"], other.valid["sentinel2"] = (d["sentinel2"][:, picked] for d in (batch.values, batch.valid))
    options = {"bands_in": ("B4", "B2"), "modalities_out": {"sentinel2": ("B2",), "aster": ("slope",)}}
    all_bands, two_bands = build(**options), build(**options, bands_available={"sentinel2": ("B4", "B2")})
    outs = all_bands(batch, draw(batch)), two_bands(other, draw(other))
    assert torch.equal(outs[0].latent, outs[1].latent)
    assert torch.equal(outs[0].loss, outs[1].loss)


def test_output(make_batch):
    model, batch = build(), make_batch(2, SIZE)
    visible = draw(batch)
    out, full = model(batch, visible), model(batch, visible, return_predictions=True)
    assert out.predictions == {}
    assert torch.equal(out.loss, full.loss)
    assert out.latent.shape == (2, 320, 3, 3)
    shown = (out.latent != 0).any(1).flatten(1)
    assert torch.equal(shown.nonzero()[:, 1].view(2, -1), visible)
    assert torch.equal(out.visible, visible)
    assert model.modalities_out == TARGETS


@pytest.mark.parametrize("training", [True, False])
def test_without_an_index_one_is_drawn(make_batch, training):
    model, batch = build().train(training), make_batch(4, SIZE)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model(batch).visible)
    assert drawn[0].shape == (4, 3)
    assert (drawn[0].diff(dim=1) > 0).all()
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("visible", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int32), "torch.int32"),
        (torch.tensor([[0, 1], [0, 1]]), r"shape \[2, 2\], expected \[2, 3\]"),
        (torch.tensor([[0, 1, 2]]), r"shape \[1, 3\]"),
        (torch.tensor([[0, 1, 9], [0, 1, 2]]), r"0\.\.9, expected 0\.\.8"),
        (torch.tensor([[-1, 1, 3], [0, 1, 2]]), r"-1\.\.3"),
        (torch.tensor([[0, 1, 1], [0, 1, 2]]), "strictly ascending"),
        (torch.ones(2, 9, dtype=torch.bool), "visible_index"),
    ],
)
def test_a_bad_visible_index_is_named(make_batch, visible, message):
    with pytest.raises(ConfigError, match=message):
        build()(make_batch(2, SIZE), visible)


def test_a_bad_batch_is_named(make_batch):
    batch = make_batch(2, 32)
    del batch.values["aster"], batch.num_present["era5"]
    batch.valid["month"] = batch.valid["month"][:, :1]
    with pytest.raises(ConfigError) as caught:
        build()(batch, torch.tensor([[0, 1, 2]] * 2))
    text = str(caught.value)
    for message in (
        "no aster",
        "num_present: no era5",
        "'sentinel2']: shape [2, 13, 32, 32], expected [2, 13, 24, 24]",
        "valid['month']: shape [2, 1]",
    ):
        assert message in text


@pytest.mark.parametrize("how", ["autocast", "module"])
def test_bfloat16_runs(make_batch, how):
    model, batch = build(init="convnextv2"), make_batch(2, SIZE)
    batch.valid["sentinel2"][0, :, :5] = False
    exact = model(batch, draw(batch))
    if how == "module":
        model = model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        out = model(batch, draw(batch), return_predictions=True)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("esa_worldcover", lambda v: v.int(), "dtype torch.int32, expected torch.int64 class ids"),
        ("esa_worldcover", lambda v: v.clamp(min=11), "class id 11, expected at most 10"),
        ("biome", lambda v: v + 14, "class id"),
        ("lat", lambda v: v.long(), "dtype torch.int64, expected floating-point numbers"),
    ],
)
def test_values_of_another_type_or_class(make_batch, name, change, message):
    model, batch = build(), make_batch(2, SIZE)
    batch.values[name] = change(batch.values[name])
    with pytest.raises(ConfigError, match=rf"batch\.values\['{name}'\]: {message}"):
        model(batch)


def test_validity_and_index_of_another_type(make_batch):
    model, batch = build(), make_batch(2, SIZE)
    with pytest.raises(ConfigError, match="visible: a list, expected an int64 tensor"):
        model(batch, [[0, 1, 2]])
    batch.valid["lat"] = batch.valid["lat"].float()
    with pytest.raises(ConfigError, match=r"batch\.valid\['lat'\]: dtype torch.float32, expected torch.bool"):
        model(batch)


def test_weight_decay_rule():
    """Exempt are parameters of ndim <= 1 or named *.bias: GRN and the mask token are decayed, log_vars is not."""
    parameters = dict(build().named_parameters())
    assert parameters["log_vars"].ndim == 1
    assert parameters["decoder.mask_token"].ndim >= 2
    assert all(p.ndim >= 2 for n, p in parameters.items() if ".grn." in n)


def test_convnextv2_initialisation():
    model = build(init="convnextv2")
    for name, value in model.named_parameters():
        if value.std() > 0:
            assert value.std().item() == pytest.approx(0.02, rel=4 * value.numel() ** -0.5), name
