"""Weights of every known naming scheme into a model and back."""

import pytest
import torch
from safetensors.torch import save_file

import mpmae
from mpmae.errors import CheckpointError, ConfigError
from mpmae.modalities import MODALITIES, TARGETS
from mpmae.models.interop import Weights, describe, load_encoder, load_reference, read_weights, to_mmearth, to_timm
from tests.models import schemes
from tests.models.schemes import VARIANTS


def build(**options):
    return mpmae.create_model("mpmae_atto", img_size=64, patch_size=32, decoder_dim=16, init="convnextv2", **options)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build()


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same(one: dict, other: dict):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("stem", ["mmearth", "convnext"])
def test_our_model_to_mmearth_and_back(stem, sparse):
    model, other = build(stem=stem, decoder_depth=2), build(stem=stem, decoder_depth=2)
    report = load_reference(other, to_mmearth(state_of(model), sparse=sparse))
    assert report.scheme == ("mmearth-sparse" if sparse else "mmearth-dense")
    assert not report.unused
    assert not report.fresh
    assert_same(state_of(other), state_of(model))


def test_kernel_axes(model):
    state = to_mmearth(state_of(model))
    kernel, weight = state["encoder.initial_conv.0.kernel"], model.encoder.stem.conv.weight
    assert kernel[2 * 3 + 1, 5, 7] == weight[7, 5, 1, 2]  # column 2, row 1: the row offset is the fastest
    assert state["encoder.stem.0.kernel"][3 * 4 + 1, 7] == model.encoder.stem.pool.weight[7, 0, 1, 3]
    assert state["encoder.stages.0.0.dwconv.kernel"].shape == (49, 40)
    assert state["encoder.stages.0.0.dwconv.bias"].shape == (1, 40)
    patch8 = to_mmearth(state_of(mpmae.create_model("mpmae_atto", stem="convnext")))
    assert patch8["encoder.stem_orig.0.kernel"].shape == (12, 40)


MMEARTH = [
    # every published folder: size, patch, variant, uncertainty, options
    *(("atto", 8, variant, True, {}) for variant in VARIANTS),
    ("atto", 8, "all_mod", False, {}),
    ("atto", 16, "all_mod", True, {}),
    ("atto", 16, "all_mod", False, {}),
    ("tiny", 8, "all_mod", True, {}),
    ("atto", 8, "S2", True, {"bands": 3}),  # "rgb" in the folder's name: Sentinel-2 blue, green, red in and out
    ("atto", 16, "all_mod", True, {"old_shapes": True}),
    ("atto", 32, "all_mod", False, {"original_stem": True}),
    ("atto", 8, "all_mod", True, {"sparse": False}),
]


@pytest.mark.parametrize(("size", "patch", "variant", "uncertainty", "options"), MMEARTH, ids=str)
def test_published_mmearth_layouts_load_and_come_back(size, patch, variant, uncertainty, options):
    source = schemes.mmearth(size, patch, variant, uncertainty, **options)
    bgr = options.get("bands") == 3
    model = mpmae.create_model(
        f"mpmae_{size}",
        img_size=7 * patch,
        patch_size=patch,
        bands_in=("B2", "B3", "B4") if bgr else None,
        modalities_out={"sentinel2": ("B2", "B3", "B4")} if bgr else VARIANTS[variant],
        stem="convnext" if options.get("original_stem") else "mmearth",
        loss_weighting="uncertainty" if uncertainty else "unweighted",
    )
    weights = read_weights(source)
    found = describe(weights.state)
    assert (found.size, found.patch_size, tuple(found.modalities)) == (size, patch, VARIANTS[variant])
    assert (found.in_chans, found.has_log_vars, found.decoder_dim) == (3 if bgr else 12, uncertainty, 512)
    report = load_reference(model, weights)
    assert len(report.loaded) == len(list(model.parameters()))
    assert report.unused == (() if options.get("sparse", True) else ("norm.weight", "norm.bias", "head.weight", "head.bias"))
    back = to_mmearth(state_of(model), sparse=options.get("sparse", True))
    for name, value in source.items():
        if not name.startswith(("encoder.norm.", "encoder.head.")):
            assert torch.equal(back[name].reshape(value.shape), value), name
            assert options.get("old_shapes") or back[name].shape == value.shape, name


def test_imagenet_pretraining_of_mmearth_gives_its_encoder():
    source = schemes.mmearth(patch=32, variant="S2", bands=3)
    source = {name.replace("sentinel2", "IMNET"): value for name, value in source.items()}
    model = mpmae.create_model("mpmae_atto", img_size=224, patch_size=32, bands_in=("B4", "B3", "B2"))
    report = load_encoder(model.encoder, source)
    assert {"heads.pixel.IMNET.weight", "log_vars"} <= set(report.unused)
    with pytest.raises(CheckpointError, match="modalities IMNET"):
        load_reference(model, source)


@pytest.mark.parametrize("size", ["atto", "tiny"])
@pytest.mark.parametrize("form", ["fcmae", "finetuned", "pretraining", "timm", "timm finetuned"])
def test_imagenet_weights_fill_the_encoder(form, size):
    source = {
        "fcmae": lambda: schemes.facebook(size),
        "finetuned": lambda: schemes.facebook(size, num_classes=9),
        "pretraining": lambda: schemes.facebook(size, pretraining=True),
        "timm": lambda: schemes.timm(size),
        "timm finetuned": lambda: schemes.timm(size, num_classes=9),
    }[form]()
    model = mpmae.create_model(f"mpmae_{size}", img_size=64, patch_size=32, stem="convnext", bands_in=("B4", "B3", "B2"))
    weights = read_weights(source)
    report = load_encoder(model.encoder, weights)
    assert set(report.loaded) == {f"encoder.{name}" for name, _ in model.encoder.named_parameters()}
    dim = schemes.SIZES[size][0][0]
    value = model.encoder.stages[0][0].grn.gamma
    name = next(name for name in source if "stages.0." in name and ("grn.gamma" in name or "grn.weight" in name))
    assert torch.equal(value.flatten(), source[name].flatten())
    assert value.shape == (1, 4 * dim)
    if form.startswith("timm"):
        assert_same(to_timm(weights.state), source)


def test_timm_and_facebook_say_the_same():
    """The same values under both names give the same canonical state."""
    canonical = read_weights(schemes.facebook(num_classes=5)).state
    assert_same(read_weights(to_timm(canonical)).state, canonical)


def test_wrapper_prefixes(model):
    state = {f"module._orig_mod.{name}": value for name, value in state_of(model).items()}
    other = build()
    load_reference(other, state)
    assert_same(state_of(other), state_of(model))


def test_copies_of_the_shared_decoder(model):
    state = to_mmearth(state_of(model))
    state["decoder_dict.era5.0.norm.bias"] = state["decoder_dict.era5.0.norm.bias"] + 1
    with pytest.raises(CheckpointError, match=r"decoder_dict\.era5\.0\.norm\.bias differs from decoder_dict\.sentinel2"):
        load_reference(build(), state)


def test_every_problem_is_named_and_nothing_changes(model):
    state, other = state_of(model), build()
    before = state_of(other)
    del state["decoder.proj.bias"]
    state["decoder.mask_token"] = torch.zeros(1, 1, 17)
    state["heads.tile.weather.weight"] = torch.zeros(3, 16)
    state["encoder.stem.conv.bias"] = state["encoder.stem.conv.bias"].double()
    with pytest.raises(CheckpointError) as caught:
        load_reference(other, state)
    text = str(caught.value)
    assert "missing decoder.proj.bias [16]" in text
    assert "decoder.mask_token has shape [1, 1, 17], expected [1, 1, 16]" in text
    assert "unexpected heads.tile.weather.weight" in text
    assert "encoder.stem.conv.bias is torch.float64, the model torch.float32: that would lose digits" in text
    assert_same(state_of(other), before)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"size": "tiny"}, "holds tiny (channels 96-192-384-768"),
        ({"patch": 16}, "patch size 16"),
        ({"bands": 10}, "10 input bands"),
        ({"variant": "pix_mod"}, "modalities sentinel2, sentinel1, aster, dynamic_world"),
        ({"original_stem": True}, "stem convnext"),
        ({"decoder_dim": 256}, "decoder 256 x 1"),
    ],
)
def test_another_model_is_told_in_one_line(options, expected):
    model = mpmae.create_model("mpmae_atto", img_size=64)
    with pytest.raises(CheckpointError) as caught:
        load_reference(model, schemes.mmearth(**options))
    assert expected in caught.value.problems[0]
    assert "the model is atto" in caught.value.problems[0]
    assert len(caught.value.problems) <= 12


def test_half_precision_is_widened_and_listed(model):
    state = {name: value.bfloat16() for name, value in state_of(model).items()}
    report = load_reference(build(), state)
    assert len(report.cast) == len(state)
    assert "torch.bfloat16 -> torch.float32" in report.cast[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {name: value.to(torch.int8) for name, value in state.items()}, "is torch.int8, expected floating"),
        (lambda state: state | {"log_vars": torch.full((12,), torch.nan)}, "log_vars holds NaN or inf"),
        (lambda state: {f"vit.{name}": value for name, value in state.items()}, "names of no known layout"),
        (lambda state: {}, "0 names of no known layout"),
        (
            lambda state: {n: v for n, v in state.items() if ".stages.3." not in n},
            "no whole ConvNeXt V2 encoder among 160 tensors",
        ),
    ],
)
def test_unsuitable_weights(model, change, message):
    with pytest.raises(CheckpointError) as caught:
        load_reference(model, change(state_of(model)))
    assert message in str(caught.value)


def test_what_stays_unused_is_logged(model, caplog):
    load_encoder(model.encoder, state_of(build()))
    assert "not used: log_vars, decoder (13), heads (26)" in caplog.text


def test_names_without_meaning_are_listed(model, tmp_path):
    save_file(schemes.facebook() | {"optimizer.something": torch.zeros(1)}, tmp_path / "w.safetensors")
    other = mpmae.create_model("mpmae_atto", img_size=64, patch_size=32, stem="convnext", bands_in=("B4", "B3", "B2"))
    assert "optimizer.something" in load_encoder(other.encoder, tmp_path / "w.safetensors").unused


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (schemes.mmearth(), {}),
        (schemes.mmearth(patch=16), {"stem_padding": "reference"}),
        (schemes.mmearth(bands=3, variant="S2"), {"bands_in": ("B2", "B3", "B4")}),
        (schemes.facebook(num_classes=7), {"num_classes": 7}),
        (schemes.timm(bands=12, stride=2), {"num_classes": 5}),
    ],
    ids=["mmearth", "mmearth 112-16", "mmearth rgb", "facebook", "timm"],
)
def test_encoder_from_a_checkpoint(source, options, caplog):
    """Everything left out of the call follows the checkpoint, and what does not come from it is said."""
    encoder = mpmae.create_encoder("convnextv2_atto", checkpoint=source, **options)
    found = describe(read_weights(source).state)
    assert (encoder.in_chans, encoder.patch_size) == (found.in_chans, found.patch_size)
    assert encoder(torch.zeros(1, found.in_chans, 64, 64)).shape == (1, options.get("num_classes") or 320)
    value = read_weights(source).state["encoder.stages.2.5.pwconv2.weight"]
    assert torch.equal(encoder.stages[2][5].pwconv2.weight, value)
    assert ("initial values kept" in caplog.text) == ("downsample_layers.3.0.weight" not in source)


def test_unet_from_a_pretraining_checkpoint():
    unet = mpmae.create_unet("convnextv2_atto", num_classes=3, checkpoint=schemes.mmearth())
    assert torch.equal(unet.encoder.stem.conv.bias, schemes.mmearth()["encoder.initial_conv.0.bias"][0])
    again = mpmae.create_unet("convnextv2_atto", num_classes=3, checkpoint=dict(unet.named_parameters()))
    assert_same(state_of(again), state_of(unet))


def test_what_the_checkpoint_contradicts_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        mpmae.create_encoder("convnextv2_tiny", patch_size=16, in_chans=3, stem="convnext", checkpoint=schemes.mmearth())
    expected = "size = tiny instead of atto, patch_size = 16 instead of 8, stem = convnext instead of mmearth, in_chans = 3"
    assert expected in str(caught.value)
    weights = Weights(read_weights(schemes.facebook()).state, "mpmae", "w", {"bands_in": ["B4", "B3", "B2"]})
    with pytest.raises(ConfigError, match="w was trained on B4, B3, B2, in this order"):
        mpmae.create_encoder("convnextv2_atto", bands_in=("B2", "B3", "B4"), checkpoint=weights)


def test_a_fine_tuned_dense_model_keeps_its_geometry():
    """The published dense code pads its stem otherwise and has another epsilon: what it trained is computed that way."""
    source = schemes.mmearth(sparse=False)
    encoder = mpmae.create_encoder("convnextv2_atto", checkpoint=source)
    assert (encoder.stem_padding, encoder.stages[0][0].grn.eps) == ("reference", 1e-4)
    assert mpmae.create_encoder("convnextv2_atto", checkpoint=source, stem_padding="same").stages[0][0].grn.eps == 1e-6
    assert mpmae.create_unet("convnextv2_atto", num_classes=2, checkpoint=source).encoder.stages[0][0].grn.eps == 1e-4
    assert mpmae.create_encoder("convnextv2_atto", checkpoint=schemes.mmearth()).stem_padding == "same"


GAMMA, BIAS = "encoder.stages.0.0.grn.gamma", "encoder.stages.0.0.dwconv.bias"


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        (GAMMA, lambda v: v.reshape(2, -1), "expected a vector"),
        (BIAS, lambda v: v.reshape(2, -1), "expected a vector"),
        ("mask_token", lambda v: v.reshape(1, 4, 4, 1), "expected a vector"),
        ("loss_fn.log_vars", lambda v: v[0], "a single number"),
        ("encoder.stages.0.0.norm.ln.weight", lambda v: v[0], "a single number"),
        ("proj.weight", lambda v: v[0, 0, 0, 0], "a single number"),
        ("proj.weight", lambda v: v.to_sparse(), "torch.sparse_coo"),
        ("proj.weight", lambda v: v.to("meta"), "on the meta device"),
        ("proj.weight", lambda v: v.to(torch.float8_e4m3fn), "was it quantised"),
        ("proj.weight", lambda v: v.numpy(), "is a ndarray, no tensor"),
        (
            "module.proj.weight",
            lambda v: torch.zeros(16, 320, 1, 1),
            "module.proj.weight and proj.weight are the same weight",
        ),
        (3, lambda v: torch.zeros(1), "key 3 is no name"),
    ],
)
def test_no_weight_of_this_scheme(name, change, problem):
    state = schemes.mmearth(variant="S2", decoder_dim=16)
    state[name] = change(state.get(name))
    with pytest.raises(CheckpointError, match=problem):
        read_weights(state)


@pytest.mark.parametrize("name", ["downsample_layers.9.0.weight", "downsample_layers.0.5.bias"])
def test_a_layer_that_no_convnext_has_is_listed(name):
    assert read_weights(schemes.facebook() | {name: torch.zeros(3)}).unknown == (name,)


def test_copies_of_the_decoder_of_another_dtype():
    state = schemes.mmearth(variant="img_mod", decoder_dim=16)
    name = "decoder_dict.biome.0.pwconv1.weight"
    with pytest.raises(CheckpointError, match=f"{name} differs from"):
        read_weights(state | {name: state[name].double()})


def test_a_model_without_memory_takes_no_weights():
    with torch.device("meta"):
        model = mpmae.create_model("mpmae_atto", modalities_out=("sentinel2",), decoder_dim=16)
    with pytest.raises(CheckpointError, match="on the meta device"):
        load_reference(model, schemes.mmearth(variant="S2", decoder_dim=16))


@pytest.mark.parametrize("quirks", [False, True])
def test_a_run_with_the_dense_encoder_keeps_its_geometry(quirks):
    options = {"img_size": 48, "patch_size": 16, "encoder": "dense", "reference_quirks": quirks, "decoder_dim": 16}
    model = mpmae.create_model("mpmae_atto", **options)
    meta = {"files": {}, "config": {"model": options}}
    weights = Weights(read_weights(model.state_dict()).state, "mpmae", "step-1", meta)
    encoder, image = mpmae.create_encoder("convnextv2_atto", checkpoint=weights), torch.randn(1, 12, 48, 48)
    assert torch.equal(encoder.forward_features(image), model.encoder.forward_features(image))


def test_bands_in_another_order():
    options = {"modalities_out": ("sentinel2",), "decoder_dim": 16}
    state = mpmae.create_model("mpmae_atto", bands_in=("B4", "B3", "B2"), **options).state_dict()
    weights = Weights(read_weights(state).state, "mpmae", "w", {"bands_in": ["B4", "B3", "B2"]})
    with pytest.raises(CheckpointError, match="w was trained on B4, B3, B2, in this order; the model reads B2, B3, B4"):
        load_reference(mpmae.create_model("mpmae_atto", bands_in=("B2", "B3", "B4"), **options), weights)
    load_reference(mpmae.create_model("mpmae_atto", bands_in=("B4", "B3", "B2"), **options), weights)


def test_another_geometry_is_said(caplog):
    """The published dense pretraining computes otherwise than the sparse encoder that its weights also fit."""
    model = mpmae.create_model("mpmae_atto", img_size=64)
    report = load_reference(model, schemes.mmearth(sparse=False))
    assert report.other_geometry == ("stem_padding = reference, here same", "grn_eps = 0.0001, here 1e-06")
    assert "trained with stem_padding = reference, here same" in caplog.text
    assert load_reference(model, schemes.mmearth()).other_geometry == ()


def test_bands_of_published_weights_are_known():
    """12 bands are all but B10, three are blue, green, red; of photographs nothing is known."""
    assert read_weights(schemes.mmearth()).bands_in == MODALITIES["sentinel2"].model_bands
    rgb = read_weights(schemes.mmearth(bands=3, variant="S2"))
    assert rgb.bands_in == ("B2", "B3", "B4")
    assert read_weights(schemes.mmearth(bands=3, variant="S2", patch=32)).bands_in is None
    assert read_weights(schemes.facebook()).bands_in is None
    with pytest.raises(ConfigError, match="was trained on B2, B3, B4, in this order"):
        mpmae.create_encoder("convnextv2_atto", bands_in=("B4", "B3", "B2"), checkpoint=rgb)


def test_log_variances_follow_the_heads():
    """Whoever trained with the modalities in another order has the log variances in that order too."""
    usual = schemes.mmearth(variant="pix_mod")
    heads = [name for name in usual if name.startswith("pred_dict.")]
    other = {name: value for name, value in usual.items() if name not in heads}
    other |= {name: usual[name] for name in reversed(heads)}
    other["loss_fn.log_vars"] = usual["loss_fn.log_vars"].flip(0)
    assert_same(read_weights(other).state, read_weights(usual).state)
    as_a_file_sorts = {name: usual[name] for name in sorted(usual)}
    assert_same(read_weights(as_a_file_sorts).state, read_weights(usual).state)
    only_encoder = {name: value for name, value in usual.items() if name.startswith(("encoder.", "loss_fn."))}
    assert torch.equal(read_weights(only_encoder).state["log_vars"], usual["loss_fn.log_vars"])
    with pytest.raises(CheckpointError, match="5 log variances for 6 heads"):
        read_weights(usual | {"loss_fn.log_vars": torch.zeros(5)})


@pytest.mark.parametrize("sparse", [True, False])
def test_published_names_come_back_whole(sparse):
    source = schemes.mmearth(variant="img_mod", sparse=sparse)
    assert_same(to_mmearth(read_weights(source).state, sparse=sparse), source)


def test_heads_leave_in_the_order_of_the_losses():
    state = state_of(build())
    written = to_mmearth({name: state[name] for name in sorted(state)})
    heads = [name.split(".")[1] for name in written if name.startswith("pred_dict.") and name.endswith(".bias")]
    assert heads == list(TARGETS)


@pytest.mark.parametrize("config", [{"stem_padding": 5}, {"grn_eps": "a"}, {"mpmae": {"grn_eps": -1}}])
def test_a_config_that_makes_no_sense(config):
    weights = Weights(read_weights(schemes.mmearth()).state, "mpmae", "w", config)
    with pytest.raises(CheckpointError, match=r"w: its config has (stem_padding 5|grn_eps ('a'|-1)), expected"):
        mpmae.create_encoder("convnextv2_atto", checkpoint=weights)
