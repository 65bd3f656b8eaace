"""Any subset of a MultiMAE's input domains as one image: features, pooling, bands, statistics, refusals."""

import logging

import numpy as np
import pytest
import torch

from mpmae.engine.optim import layer_decay_groups
from mpmae.errors import CheckpointError, ConfigError, DatasetError
from mpmae.eval.augment import Augment, change_geometry, draw
from mpmae.eval.bands import match_channels
from mpmae.eval.config import EncoderSection, ImageSection
from mpmae.eval.dataset import StoredBand, Task
from mpmae.eval.encoder_input import EncoderInput, input_of_domains
from mpmae.eval.encoders import open_encoder, random_twin
from mpmae.eval.finetune_config import AugmentSection
from mpmae.eval.multimae_encoder import encoder_of
from mpmae.eval.prepare import Preparation
from mpmae.loader.batch import Batch
from mpmae.modalities import MODALITIES, band_indices
from mpmae.models.multimae.backbone import vit_of
from tests.eval.many_modalities import CODES, hidden_in, write_checkpoint
from tests.models.multimae.small import SIZE, build

PATCH = 8
S2 = MODALITIES["sentinel2"].bands


@pytest.fixture(scope="module")
def model():
    return build().eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multimae")
    write_checkpoint(folder)
    return folder


def a_batch(num=2, gaps=True):
    """Values of all published modalities in float64, with patches without any data."""
    rng = np.random.default_rng(0)
    s2, aster = (torch.from_numpy(rng.normal(size=(num, channels, SIZE, SIZE))) for channels in (13, 2))
    cover = torch.from_numpy(rng.integers(0, 11, (num, 1, SIZE, SIZE)))
    if gaps:
        s2[0, :, :PATCH, :PATCH] = float("nan")
        aster[1, :, PATCH:] = float("nan")
        cover[1, :, :PATCH] = -1
    valid = {"sentinel2": s2.isfinite(), "aster": aster.isfinite(), "esa_worldcover": cover >= 0}
    values = {"sentinel2": s2.nan_to_num(), "aster": aster.nan_to_num(), "esa_worldcover": cover}
    return Batch(values, valid, torch.arange(num), {}, num)


def image_of(model, batch, names):
    """The channels of the domains, NaN where there is no data."""
    parts = []
    for name, domain in model.domains_in.items():
        if name in names:
            rows = band_indices(domain.modality, domain.bands, MODALITIES[domain.modality].bands) if domain.bands else [0]
            values, valid = (t[domain.modality][:, rows] for t in (batch.values, batch.valid))
            parts.append(torch.where(valid, values.double(), torch.nan))
    return torch.cat(parts, 1)


SUBSETS = [("rgb",), ("depth", "semseg"), ("ired", "rgb", "sired"), ("rgb", "depth", "semseg", "ired", "sired", "ebands")]


@pytest.mark.parametrize("names", SUBSETS)
@pytest.mark.parametrize("gaps", [True, False])
def test_features_of_a_subset_are_those_of_the_model(model, names, gaps):
    batch = a_batch(gaps=gaps)
    expected = model.encode(batch, names)
    vit = vit_of(model, names)
    image = image_of(model, batch, names)
    (tokens,) = vit.forward_tokens(image)
    for number, (name, patches) in enumerate(expected.patches.items()):
        there = expected.available[name]
        assert torch.equal(tokens.available[:, number], there)
        torch.testing.assert_close(tokens.patches[:, number], patches, rtol=0, atol=1e-12)
    torch.testing.assert_close(tokens.summary, expected.summary, rtol=0, atol=1e-12)
    means = []
    for row in range(len(batch)):
        kept = [expected.patches[name][row][expected.available[name][row]] for name in expected.patches]
        means.append(torch.cat([*kept, expected.summary[row : row + 1]]).mean(0))
    torch.testing.assert_close(vit.forward_vector(image), torch.stack(means), rtol=0, atol=1e-12)
    vit.pooling = "global"
    torch.testing.assert_close(vit.forward_vector(image), expected.summary, rtol=0, atol=1e-12)


def test_a_patch_without_data_says_nothing(model):
    vit = vit_of(model, ["rgb", "depth"])
    image = image_of(model, a_batch(gaps=False), ["rgb", "depth"])
    image[:, 3, PATCH:] = torch.nan
    few = vit.forward_vector(image)
    assert few.isfinite().all()
    assert not torch.equal(few, vit.forward_vector(image.nan_to_num()))
    (deep,) = vit.forward_intermediates(image, [3])
    assert (deep[:, 192:, 1:] == 0).all(), "no map where there is no data"
    assert (deep[:, 192:, :1] != 0).all()


def test_maps_hold_the_domains_one_after_the_other(model):
    vit, image = vit_of(model, ["rgb", "depth"]), image_of(model, a_batch(), ["rgb", "depth"])
    maps = vit.forward_intermediates(image)
    assert [m.shape for m in maps] == [(2, 384, 3, 3)] * 4
    assert [info["num_chs"] for info in vit.feature_info] == [384] * 4
    (tokens,) = vit.forward_tokens(image)
    assert torch.equal(maps[3][1, 192:, 0, 2], tokens.patches[1, 1, 2])
    assert torch.equal(maps[3][1, :192, 2, 1], tokens.patches[1, 0, 7])
    assert torch.equal(maps[0], maps[1]), "the first half of two blocks is one block"


def test_images_of_another_side(model):
    vit = vit_of(model, ["rgb"])
    assert vit.forward_vector(torch.randn(2, 3, 40, 40, dtype=torch.float64)).shape == (2, 192)
    for shape, problem in (((2, 3, 20, 20), "multiple of patch_size = 8"), ((2, 4, 24, 24), r"rgb \(3\)")):
        with pytest.raises(ValueError, match=problem):
            vit.forward_vector(torch.randn(shape, dtype=torch.float64))


def test_drop_path_is_for_training_alone(model):
    image = image_of(model, a_batch(), ["rgb"])
    plain, dropping = vit_of(model, ["rgb"]), vit_of(model, ["rgb"], drop_path_rate=0.9)
    assert torch.equal(plain.eval()(image), dropping.eval()(image))
    torch.manual_seed(0)
    assert not torch.equal(plain.train()(image), dropping.train()(image))


def test_the_depth_of_layers(model):
    vit = vit_of(model, ["rgb", "semseg"], num_classes=3)
    groups = layer_decay_groups(vit, 0.1, 0.5)
    names = {id(parameter): name for name, parameter in vit.named_parameters()}
    found = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == len(names)
    assert found["head.weight"] == (1.0, 0.1)
    assert found["norm.weight"] == (1.0, 0.0)
    assert found["encoder.1.mlp.fc1.weight"] == (0.5, 0.1)
    assert found["encoder.0.attn.qkv.bias"] == (0.25, 0.0)
    assert found["input_adapters.rgb.proj.weight"] == (0.125, 0.1)
    assert found["input_adapters.semseg.class_emb.weight"] == found["global_tokens"] == (0.125, 0.0)
    with pytest.raises(ConfigError, match="reference_quirks is for a ConvNeXt V2"):
        layer_decay_groups(vit, 0.1, 0.5, reference_quirks=True)


def test_a_checkpoint_is_read_for_what_the_set_has(checkpoint, caplog):
    caplog.set_level(logging.INFO)
    task = hidden_in("colour").task
    encoder = open_encoder(EncoderSection(checkpoint=checkpoint), task=task)
    assert encoder.facts["domains"] == ["rgb", "depth", "semseg"]
    assert "mean over the tokens of all patches with data" in encoder.facts["pooling"]
    assert "not read: ired (no B5, B6, B7), sired (no B11, B12), ebands (no B8A, B8)" in caplog.text
    assert encoder.input.bands == ("B4", "B3", "B2", "elevation", "Map")
    assert encoder.input.statistics["l2a"]["mean"] == (1000, 990, 980)
    assert encoder.input.other_statistics == {"aster": {"mean": (300.0,), "std": (200.0,)}}
    assert open_encoder(EncoderSection(checkpoint=checkpoint)).facts["domains"][-1] == "ebands", "without a set: all"
    one = open_encoder(EncoderSection(checkpoint=checkpoint, domains=["depth"], pooling="global"), task=task)
    assert one.input.channels == (("aster", "elevation"),)
    assert one.facts == {"domains": ["depth"], "pooling": "the global token"}
    assert one.fingerprint() != encoder.fingerprint()


def test_random_weights_of_the_same_architecture_and_subset(checkpoint):
    section = EncoderSection(checkpoint=checkpoint, domains=["rgb", "depth"])
    pretrained, twins = open_encoder(section), [random_twin(section, seed) for seed in (0, 0, 1)]
    assert all(twin.input == pretrained.input for twin in twins)
    assert twins[0].fingerprint() == twins[1].fingerprint() != twins[2].fingerprint()
    states = [encoder.backbone.state_dict() for encoder in (pretrained, twins[0])]
    assert {name: value.shape for name, value in states[0].items()} == {n: v.shape for n, v in states[1].items()}
    assert not torch.equal(states[0]["encoder.0.mlp.fc1.weight"], states[1]["encoder.0.mlp.fc1.weight"])
    assert open_encoder(EncoderSection(name="multimae_tiny", domains=["sentinel1"])).input.bands[0] == "asc_VV"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"domains": ["rgb", "sentinel1"]}, r"does not read sentinel1; its input domains are rgb, depth, semseg"),
        ({"domains": ["rgb", "rgb"]}, "names a domain twice"),
        ({"bands_in": ["B4"]}, "reads domains; use encoder.domains"),
        ({"patch_size": 16}, "encoder.patch_size = 16: that of .* is 8"),
        ({"name": "multimae_base"}, r"holds a MultiMAE of size \(none usual\)"),
    ],
)
def test_settings_that_a_multimae_does_not_have(checkpoint, options, problem):
    with pytest.raises(ConfigError, match=problem):
        open_encoder(EncoderSection(checkpoint=checkpoint, **options))


@pytest.mark.parametrize("options", [{"domains": ["rgb"]}, {"pooling": "global"}])
def test_a_convnext_has_no_domains(options):
    with pytest.raises(ConfigError, match=rf"encoder\.{next(iter(options))}: random init is a ConvNeXt V2"):
        open_encoder(EncoderSection(**options))


def stored(*names, level="l2a", mean=500.0):
    bands = (StoredBand(name, None, mean, 100.0) for name in names)
    return Task("mine", "multiclass", ("a", "b"), tuple(bands), "accuracy", level)


def test_bands_of_other_modalities_match_by_name_alone():
    rows = match_channels(stored("VV", "desc_VH", "DEM", "esa_worldcover"), [
        ("sentinel1", "asc_VV"), ("sentinel1", "desc_VH"), ("sentinel1", "asc_HH"), ("aster", "elevation"),
        ("esa_worldcover", "Map"),
    ]).rows  # fmt: skip
    assert [row.position for row in rows] == [0, 1, None, 2, 3]
    assert [row.stored for row in rows] == ["VV", "desc_VH", "no data", "DEM", "esa_worldcover"]


def test_a_modality_that_the_set_lacks_is_refused_by_name():
    with pytest.raises(DatasetError) as error:
        match_channels(
            stored("B4", "B3", "B2"), [("sentinel1", "asc_VV"), ("aster", "elevation"), ("esa_worldcover", "Map")]
        )
    assert len(error.value.problems) == 3
    assert "no sentinel1 (asc_VV) among the stored bands B4, B3, B2" in str(error.value)
    assert "no esa_worldcover among" in str(error.value)
    with pytest.raises(DatasetError, match=r"make up no input domain of the encoder; it lacks those of rgb \(no B4"):
        encoder_of(build(), EncoderSection(), "mine", stored("NDVI"))


def test_a_set_says_which_modality_a_band_is_of():
    bands = (StoredBand("elevation", None, 0.0, 1.0, "dem"), StoredBand("elevation", None, 0.0, 1.0, "aster"))
    task = Task("mine", "multiclass", ("a", "b"), bands, "accuracy")
    assert match_channels(task, [("aster", "elevation"), ("dem", "elevation")]).positions == [1, 0]
    only = Task("mine", "multiclass", ("a", "b"), bands[:1], "accuracy")
    assert match_channels(only, [("aster", "elevation")]).positions == [0], "another product's metres"


def prepared(task, channels, recorded=None, **options):
    return Preparation(task, input_of_domains(channels, 8, recorded or {}, "mine"), ImageSection(**options))


RGB_DEPTH = [("sentinel2", "B4"), ("aster", "elevation"), ("esa_worldcover", "Map")]
RECORDED = {
    "sentinel2_l2a": {"bands": ["B4"], "mean": [400.0], "std": [50.0]},
    "aster": {"bands": ["slope", "elevation"], "mean": [1.0, 100.0], "std": [1.0, 10.0]},
}


def test_each_modality_has_its_own_statistics():
    image = np.full((3, 16, 16), 500, np.float32)
    image[2] = 80
    image[1, :3] = np.nan
    prepare = prepared(stored("B4", "elevation", "esa_worldcover"), RGB_DEPTH, RECORDED)
    (got,) = prepare(image)
    assert got[0].unique().tolist() == [2.0]
    assert got[1, 3:].unique().tolist() == [40.0]
    assert got[1, :3].isnan().all(), "no data stays no data"
    assert got[2].unique().tolist() == [7.0], "permanent water"
    facts = prepare.facts
    assert facts["statistics"] == facts["statistics_of"]["aster"]["statistics"] == "pretraining"
    only = {"aster": RECORDED["aster"]}
    facts = prepared(stored("B4", "elevation", "esa_worldcover"), RGB_DEPTH, only).facts
    assert (facts["statistics"], facts["statistics_of"]["aster"]["statistics"]) == ("dataset", "pretraining")
    with pytest.raises(DatasetError, match="pretraining, but the checkpoint has no statistics of aster"):
        prepared(stored("elevation"), [("aster", "elevation")], normalise="pretraining")
    with pytest.raises(CheckpointError, match="statistics of aster lack elevation; they have slope"):
        input_of_domains([("aster", "elevation")], 8, {"aster": {"bands": ["slope"], "mean": [0], "std": [1]}}, "mine")


def test_radar_must_be_in_db():
    recorded = {"sentinel1": {"bands": ["asc_VV"], "mean": [-11.0], "std": [4.0]}}
    with pytest.raises(DatasetError, match="means of VV are above 0, so they are no backscatter in dB"):
        prepared(stored("VV", mean=0.1), [("sentinel1", "asc_VV")], recorded)
    assert prepared(stored("VV", mean=-9.0), [("sentinel1", "asc_VV")], recorded).facts["statistics"] == "pretraining"


@pytest.mark.parametrize("fit", ["resize", "tile"])
def test_sizes_change_neither_class_ids_nor_gaps(fit):
    rng = np.random.default_rng(0)
    image = np.stack([rng.normal(500, 50, (21, 19)), rng.normal(500, 50, (21, 19)), CODES[rng.integers(0, 3, (21, 19))]])
    image[1, 10:] = np.nan
    prepare = prepared(stored("B4", "elevation", "esa_worldcover"), RGB_DEPTH, fit=fit, size=24)
    (got,) = prepare(image.astype(np.float32))
    assert set(got[2][got[2].isfinite()].tolist()) == {0.0, 1.0, 2.0}
    assert got[0].isnan().any() == (fit == "tile"), "padding is no data"
    seen, height = got[1].isfinite().all(1), {"resize": 24 * 10 / 21, "tile": 10}[fit]
    assert abs(int(got[1].isfinite().any(1).sum()) - height) <= 1
    assert fit == "tile" or seen.any()


def test_codes_of_a_land_cover_map():
    prepare = prepared(stored("esa_worldcover"), [("esa_worldcover", "Map")])
    image = np.zeros((1, 8, 8), np.float32)
    image[0, 0, :4] = 10, 100, 255, np.nan
    assert prepare(image)[0, 0, 0].nan_to_num(-1).tolist() == [0, 10, -1, -1, -1, -1, -1, -1]
    image[0, 1, :2] = 3, 10.5
    with pytest.raises(DatasetError, match=r"esa_worldcover holds 3, 10\.5; expected its codes 10, 20"):
        prepare(image)


def test_crops_keep_gaps_and_class_ids_apart():
    given = EncoderInput(("B4", "Map"), 8, {}, ("sentinel2", "esa_worldcover"), {}, tells_no_data=True)
    images = torch.randn(8, 2, 16, 16)
    images[:, 1] = torch.randint(0, 11, (8, 16, 16)).float()
    images[:, 0, 4] = torch.nan
    section = AugmentSection(crop_min_area=0.5, smoothing=0.0)
    draws = draw(0, 0, np.arange(8))
    cropped, _ = change_geometry(section, images.clone(), draws, encoder_input=given)
    assert (cropped[:, 1] == cropped[:, 1].round()).all()
    gaps = cropped[:, 0].isnan().float().mean((1, 2))
    assert (gaps > 0).any()
    assert (gaps < 0.2).all()
    whole = EncoderInput(("B4", "B3"), 8)
    plain = change_geometry(section, images.nan_to_num(), draws, encoder_input=whole)[0]
    assert torch.equal(plain, change_geometry(section, images.nan_to_num(), draws)[0])
    with pytest.raises(ConfigError, match=r"augment\.mixup_alpha: the class ids of esa_worldcover cannot be mixed"):
        Augment(AugmentSection(mixup_alpha=0.5), stored("B4"), 0, given)
