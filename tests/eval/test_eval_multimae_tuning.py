"""Fine-tuning of a MultiMAE: classes of images and label maps, resumed runs, the weights that are left."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mpmae.errors import ConfigError
from mpmae.eval.classification import ClassificationSetup
from mpmae.eval.config import EncoderSection
from mpmae.eval.encoders import open_encoder
from mpmae.eval.finetune import finetune
from mpmae.eval.finetune_config import load_config
from mpmae.eval.segmentation_models import LinearSegmenter, TokenSegmenter
from mpmae.files import read_jsonl
from tests.eval.many_modalities import SIDE, hidden_in, write_checkpoint

QUICK = ["output.num_workers=0", "output.device=cpu", "output.seeds=[0]", "finetune.baselines=[]", "finetune.batch_size=8"]
QUICK += ["finetune.warmup_epochs=0.5", "finetune.save_interval_s=0"]
NAME = "pretrained-labels100-seed0"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multimae")
    write_checkpoint(folder)
    return folder


def configured(checkpoint, folder, *overrides):
    return load_config(None, [*QUICK, f"encoder.checkpoint={checkpoint}", f"output.dir={folder}", *overrides])


TUNING = ("finetune.epochs=4", "finetune.lr=1e-3", "finetune.head_init_scale=1", "finetune.layer_decay=0.8")
CHANGES = ("finetune.drop_path=0.2", "augment.crop_min_area=0.6", "augment.cutmix_alpha=0.5", "augment.rotate=false")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, checkpoint):
    folder = tmp_path_factory.mktemp("tuned")
    labelled = hidden_in("colour", sizes=(32, 12, 24))
    options = ("encoder.domains=[rgb,semseg]", *TUNING)
    (score,) = finetune(configured(checkpoint, folder, *options), labelled=labelled)
    return folder / "runs" / NAME, labelled, score


def test_it_learns_what_its_input_shows(tmp_path, checkpoint, tuned):
    folder, labelled, score = tuned
    assert score.value > 0.95
    (blind,) = finetune(configured(checkpoint, tmp_path, "encoder.domains=[semseg]", *TUNING), labelled=labelled)
    assert blind.value < 0.8
    facts = json.loads((folder.parents[1] / "scores.json").read_text())["facts"]
    (about,) = facts["encoders"].values()
    assert about["domains"] == ["rgb", "semseg"]
    assert about["pooling"].startswith("mean over the tokens")


def test_the_tuned_encoder_is_read_again(tuned):
    folder, labelled, _ = tuned
    again = open_encoder(EncoderSection(checkpoint=folder), task=labelled.task)
    assert again.facts["domains"] == ["rgb", "semseg"]
    kept = load_file(folder / "model.safetensors")
    assert kept["head.weight"].shape == (2, 192)
    for name, value in again.backbone.state_dict().items():
        if not name.startswith(("norm.", "head.")):
            assert torch.equal(value, kept[name]), name
    beside = json.loads((folder / "config.json").read_text())
    assert beside["statistics"]["sentinel2_l2a"]["bands"] == ["B4", "B3", "B2"]
    assert (beside["img_size"], beside["num_heads"], beside["classes"]) == (SIDE, 3, ["class 0", "class 1"])


def test_a_resumed_run_ends_as_one_left_alone(tmp_path, checkpoint, monkeypatch):
    labelled = hidden_in("elevation", sizes=(12, 6, 6))
    options = ("encoder.domains=[rgb,depth]", *TUNING, *CHANGES)
    whole = finetune(configured(checkpoint, tmp_path / "whole", *options), labelled=labelled)
    config, begin = configured(checkpoint, tmp_path / "cut", *options), ClassificationSetup.begin_epoch

    def cut_off(self, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return begin(self, epoch)

    with monkeypatch.context() as patched:
        patched.setattr(ClassificationSetup, "begin_epoch", cut_off)
        with pytest.raises(KeyboardInterrupt):
            finetune(config, labelled=labelled)
    torch.rand(5)
    assert finetune(config, resume=True, labelled=labelled) == whole
    states, curves = [], []
    for name in ("whole", "cut"):
        states.append(load_file(tmp_path / name / "runs" / NAME / "model.safetensors"))
        curves.append([line | {"epoch_s": 0} for line in read_jsonl(tmp_path / name / "runs" / NAME / "metrics.jsonl")])
    assert curves[0] == curves[1]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_frozen_encoder_keeps_its_weights(tmp_path, checkpoint):
    options = ("encoder.domains=[rgb]", *TUNING, "finetune.freeze=true")
    (score,) = finetune(configured(checkpoint, tmp_path, *options), labelled=hidden_in("colour", sizes=(24, 4, 4)))
    assert score.method == "finetune-head"
    kept, before = (load_file(path / "model.safetensors") for path in (tmp_path / "runs" / NAME, checkpoint))
    assert all(torch.equal(value, before[name]) for name, value in kept.items() if name in before)
    assert (kept["head.bias"] != 0).any()


SEGMENTATION = ("encoder.domains=[rgb]", "segmentation.num_pictures=1")


@pytest.mark.parametrize(
    ("options", "method", "kind"),
    [
        (("finetune.epochs=6", "finetune.lr=2e-3"), "convnext", TokenSegmenter),
        (("finetune.epochs=20", "finetune.lr=3e-2", "segmentation.method=linear"), "linear segmentation", LinearSegmenter),
    ],
)
def test_label_maps_are_learned(tmp_path, checkpoint, options, method, kind):
    labelled = hidden_in("colour", "segmentation", sizes=(24, 8, 8))
    (score,) = finetune(configured(checkpoint, tmp_path, *SEGMENTATION, *options), labelled=labelled)
    assert score.method == method
    assert score.value > 0.9
    folder = tmp_path / "runs" / NAME
    assert (folder / "predictions.png").is_file()
    encoder = open_encoder(EncoderSection(checkpoint=folder), task=labelled.task)
    more = {"stages": (0, 1, 2, 3)} if kind is LinearSegmenter else {}
    model = kind(encoder, 2, seed=1, **more)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    before = load_file(checkpoint / "model.safetensors")["encoder.0.mlp.fc1.weight"]
    assert torch.equal(encoder.backbone.encoder[0].mlp.fc1.weight, before) == (kind is LinearSegmenter)


def test_no_data_reaches_a_segmenter(checkpoint):
    encoder = open_encoder(EncoderSection(checkpoint=checkpoint, domains=["rgb", "depth"]))
    images = torch.randn(2, 4, SIDE, SIDE)
    images[:, 3, :8] = torch.nan
    linear = LinearSegmenter(encoder, 3, (3,), seed=0)
    rows = linear.encode(images).unflatten(1, (2, 192, 2, 2))
    assert rows.isfinite().all()
    assert (rows[:, 1, :, 0] == 0).all()
    torch.testing.assert_close(rows[:, 0].mean(1), torch.zeros(2, 2, 2), atol=1e-5, rtol=0)
    assert linear(linear.encode(images)).shape == TokenSegmenter(encoder, 3, seed=0)(images).shape == (2, 3, SIDE, SIDE)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["segmentation.method=unet"], "unet: no decoder for the maps of .*; leave it out for convnext, or use linear"),
        (["segmentation.method=linear", "segmentation.stages=[4]"], r"expected different numbers within 0\.\.3"),
    ],
)
def test_what_does_not_fit_a_multimae_is_refused(tmp_path, checkpoint, overrides, problem):
    labelled = hidden_in("colour", "segmentation", sizes=(4, 2, 2))
    with pytest.raises(ConfigError, match=problem):
        finetune(configured(checkpoint, tmp_path, *SEGMENTATION, *overrides), labelled=labelled)
    assert not list(tmp_path.glob("runs/*/metrics.jsonl"))


def test_the_decoder_of_a_multimae_is_none_for_a_convnext(tmp_path):
    config = load_config(None, [*QUICK, f"output.dir={tmp_path}", "segmentation.method=convnext"])
    with pytest.raises(ConfigError, match="convnext: no decoder for the maps of random init; leave it out for unet"):
        finetune(config, labelled=hidden_in("colour", "segmentation", sizes=(4, 2, 2)))


def test_mixed_class_ids_are_refused_before_any_work(tmp_path, checkpoint):
    config = configured(checkpoint, tmp_path, "encoder.domains=[semseg]", "augment.mixup_alpha=0.3", "finetune.epochs=1")
    with pytest.raises(ConfigError, match="class ids of esa_worldcover cannot be mixed"):
        finetune(config, labelled=hidden_in("land cover", sizes=(4, 2, 2)))
