"""What cannot be is said at once, with what to do."""

import pytest
import torch

import mpmae
from mpmae.errors import ConfigError
from mpmae.models.multimae.sampler import TokenSample
from tests.models.multimae.small import SIZE, build, tokens_of
from tests.models.small import drop


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({"domains_in": ("rgb", "dept")}, ["domains_in: unknown domain 'dept'; did you mean depth?", "Known: rgb, depth"]),
        ({"domains_in": (), "domains_out": "sired2"}, ["domains_in is empty", "domains_out: unknown domain 'sired2'"]),
        ({"domains_in": ("rgb", "rgb")}, ["domains_in names a domain twice"]),
        (
            {"num_visible_tokens": 295},
            ["num_visible_tokens = 295 is more than the 294 tokens of 6 input domains", "49 patches"],
        ),
        ({"num_visible_tokens": 294}, ["nothing is hidden"]),
        ({"num_visible_tokens": 0}, ["num_visible_tokens = 0, expected at least 1"]),
        ({"img_size": 60}, ["img_size = 60 is not a multiple of patch_size = 8; use 56 or 64"]),
        ({"patch_size": 14}, ["patch_size = 14 is not a multiple of 4, the stride of semseg"]),
        ({"patch_size": 0}, ["patch_size = 0, expected 1 to 224"]),
        ({"alphas": 0.0}, ["alphas = 0.0, expected a finite number above 0"]),
        ({"alphas": {"rgb": -1.0, "dept": 1.0}}, ["alphas['rgb'] = -1.0", "alphas names 'dept', which is no input domain"]),
        ({"alphas": float("nan")}, ["alphas = nan"]),
        ({"alphas": [1.0, 2.0], "decoder_depth": -1}, ["alphas = [1.0, 2.0], expected a finite number", "decoder_depth"]),
        ({"alphas": {"rgb": "much"}}, ["alphas['rgb'] = 'much', expected a finite number"]),
        ({"decoder_dim": 100, "loss_weighting": "sum"}, ["decoder_dim = 100 is not a multiple", "loss_weighting = 'sum'"]),
        (
            {"decoder_dim": 30, "decoder_num_heads": 0},
            ["decoder_dim = 30, expected a multiple of 4", "decoder_num_heads = 0"],
        ),
        ({"decoder_depth": -1}, ["decoder_depth = -1"]),
        ({"domains_in": ("depth",), "domains_out": ("ired",), "extra_norm_rgb": True}, ["extra_norm_rgb needs rgb"]),
        (
            {"bands_available": {"sentinel2": ("B4", "B3")}},
            ["domains_in, rgb: sentinel2 has no band B2", "the set has B4, B3"],
        ),
        ({"mask_ratio": 0.6}, ["multimae_tiny has no option 'mask_ratio'", "num_visible_tokens"]),
    ],
)
def test_create_model(options, messages):
    with pytest.raises(ConfigError) as error:
        mpmae.create_model("multimae_tiny", **options)
    assert all(message in str(error.value) for message in messages)


def test_other_names():
    with pytest.raises(ConfigError, match="unknown model 'multimae_bas'; did you mean multimae_base"):
        mpmae.create_model("multimae_bas")
    with pytest.raises(ConfigError, match="unknown model 'multmae_base'; did you mean multimae_base"):
        mpmae.create_model("multmae_base")
    with pytest.raises(ConfigError, match="mpmae_atto has no option 'domains_in'; it has img_size"):
        mpmae.create_model("mpmae_atto", domains_in=("rgb",))


def test_options_are_taken():
    model = mpmae.create_model(
        "multimae_tiny", domains_in=("sentinel1", "rgb"), domains_out=("depth",), alphas={"rgb": 0.5}, img_size=64
    )
    assert (tuple(model.domains_in), model.alphas, model.num_visible) == (("rgb", "sentinel1"), (0.5, 1.0), 21)
    assert (tuple(model.targets), model.modalities) == (("depth",), ("sentinel2", "sentinel1", "aster"))
    model = mpmae.create_model("multimae_tiny", domains_out=("depth",), extra_norm_rgb=True)
    assert tuple(model.targets) == ("depth", "norm_rgb")


def test_a_sample_without_any_data(make_batch):
    model, batch = build(domains_in=("rgb", "depth")), make_batch(3, SIZE)
    batch.sample_ids = torch.tensor([40, 41, 42])
    for name in ("sentinel2", "aster"):
        drop(batch, name, slice(1, None))
    with pytest.raises(
        ConfigError, match=r"no data in any input domain \(rgb, depth\) for 2 of 3 samples, ids 41, 42; leave"
    ):
        model(batch)
    with pytest.raises(ConfigError, match=r"no data in any input domain \(depth\)"):
        model.encode(batch, "depth")


def test_a_batch_that_does_not_fit(make_batch):
    model, batch = build(), make_batch(2, 32)
    del batch.values["aster"]
    del batch.num_present["sentinel2"]
    batch.values["esa_worldcover"] = batch.values["esa_worldcover"].float()
    batch.valid["esa_worldcover"] = batch.valid["esa_worldcover"].long()
    with pytest.raises(ConfigError) as error:
        model(batch)
    for message in (
        "batch: no aster; it has sentinel2",
        "batch.num_present: no sentinel2",
        "batch.values['sentinel2']: shape [2, 13, 32, 32], expected [2, 13, 24, 24]",
        "batch.values['esa_worldcover']: dtype torch.float32, expected torch.int64 class ids",
        "batch.valid['esa_worldcover']: dtype torch.int64, expected torch.bool",
    ):
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("index", "real", "message"),
    [
        (torch.tensor([[0, 54], [1, 2]]), None, "token numbers 0..54, expected 0..53"),
        (torch.tensor([[3, 3], [1, 2]]), None, "names a token twice"),
        (torch.tensor([[3, 4]]), None, r"shape \[1, 2\], expected \[2, 1 to 54\]"),
        (torch.tensor([[3.0], [4.0]]), None, "dtype torch.float32"),
        (torch.tensor([[3], [4]]), torch.tensor([True, False]), r"tokens.real: torch.bool \[2\]"),
    ],
)
def test_tokens_that_do_not_fit(make_batch, index, real, message):
    with pytest.raises(ConfigError, match=message):
        build()(make_batch(2, SIZE), TokenSample(index, real))


def test_random_numbers_that_do_not_fit(make_batch):
    model, batch = build(), make_batch(2, SIZE)
    with pytest.raises(ConfigError, match=r"tokens.log_gammas: shape \[3, 6\], expected \[2, 6\]"):
        model(batch, model.draw(0, 0, torch.arange(3)))
    with pytest.raises(ConfigError, match="tokens: a Tensor, expected the random numbers"):
        model(batch, torch.zeros(2, 3))


def test_a_domain_that_is_no_input(make_batch):
    model = build(domains_in=("rgb", "depth"))
    with pytest.raises(ConfigError, match="encode: 'semseg' is no input domain of this model; it has rgb, depth"):
        model.encode(make_batch(2, SIZE), ("rgb", "semseg"))
    assert model(make_batch(2, SIZE), tokens_of(model, {"depth": (0,)})).loss.isfinite()
