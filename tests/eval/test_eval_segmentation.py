"""Segmentation on the fine-tuning loop: what is learned, what is frozen, what does not count, what is drawn."""

import json

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn, optim

import mpmae
from mpmae.errors import ConfigError
from mpmae.eval.config import EncoderSection
from mpmae.eval.dataset import IGNORED
from mpmae.eval.encoders import open_encoder
from mpmae.eval.finetune import finetune
from mpmae.eval.finetune_config import FinetuneConfig, load_config
from mpmae.eval.metrics import Metrics
from mpmae.eval.prepare import Preparation
from mpmae.eval.segmentation import DecoderSetup, segmentation_setup
from mpmae.eval.segmentation_models import LinearSegmenter, unet_on
from mpmae.eval.segmentation_pictures import Pictured, class_colours, draw_sheet
from mpmae.eval.training_data import Example, stack
from mpmae.models.dense import REFERENCE_GRN_EPS
from mpmae.models.interop import describe, read_weights
from mpmae.models.presets import SIZES
from tests import golden_dense
from tests.eval.coloured_blocks import NAMES, coloured_blocks
from tests.golden_cases import Case, bands_of

CPU = torch.device("cpu")
TRAINING = ("finetune.lr=0.01", "finetune.batch_size=4", "output.seeds=[0]", "segmentation.num_pictures=0")


@pytest.fixture(autouse=True)
def small_size(monkeypatch):
    """An encoder that trains in seconds."""
    monkeypatch.setitem(SIZES, "small", ((12, 16, 20, 24), (1, 1, 1, 1)))


def configured(*overrides) -> FinetuneConfig:
    bands = f"encoder.bands_in=[{','.join(NAMES)}]"
    fixed = ["encoder.name=convnextv2_small", bands, "output.num_workers=0", "finetune.warmup_epochs=0"]
    return load_config(None, [*fixed, *overrides])


def setup_of(config, labelled, seed=0):
    encoder = open_encoder(config.encoder)
    return segmentation_setup(config, labelled.task, encoder, Preparation(labelled.task, encoder.input, config.image), seed)


def examples_of(setup, labelled, indices):
    return [Example(i, *setup.prepare(labelled.image(i), labelled.label(i)), labelled.label(i)) for i in indices]


def statistics_of(labelled):
    return (torch.tensor([getattr(band, key) for band in labelled.task.bands])[:, None, None] for key in ("mean", "std"))


def encoder_of(setup):
    return {name: value.clone() for name, value in setup.model.encoder.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "least"),
    [
        (("segmentation.method=unet", "finetune.epochs=15"), 0.8),
        (("segmentation.method=linear", "finetune.epochs=60", "encoder.name=convnextv2_atto"), 0.7),
    ],
)
def test_a_task_of_pixels_is_solved(options, least, tmp_path):
    config = configured(*TRAINING, *options, f"output.dir={tmp_path}", "segmentation.num_pictures=2")
    (score,) = finetune(config, labelled=coloured_blocks(num=40, block_px=8))
    assert score.metrics["miou"] > least  # by guessing: 0.2
    assert score.metrics["accuracy"] > score.metrics["miou"]
    assert score.method == ("linear segmentation" if config.segmentation.method == "linear" else "unet")
    (folder,) = (tmp_path / "runs").iterdir()
    assert Image.open(folder / "predictions.png").size[0] > 500


def test_the_published_numbers_through_this_path(repo, tmp_path, monkeypatch):
    """Checkpoint in a file -> open_encoder -> U-Net: logits, loss and gradients of the published one."""
    case = Case(repo / "tests" / "golden", "unet_p8_56")
    bands = bands_of("sentinel2", case.arrays["in.x"].shape[1])
    save_file(
        {name: value.contiguous() for name, value in golden_dense.pretrained(case).items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps({"bands_in": bands, "grn_eps": REFERENCE_GRN_EPS}))

    def build(case):
        return unet_on(open_encoder(EncoderSection(checkpoint=tmp_path)), case.entry["num_classes"], seed=0)

    def load_decoder(case, model):
        own = golden_dense.own_weights(case, model)
        assert not own.keys() & {f"encoder.{name}" for name in model.encoder.state_dict()}
        assert not model.load_state_dict(own, strict=False).unexpected_keys

    monkeypatch.setattr(golden_dense, "build", build)
    monkeypatch.setattr(golden_dense, "_load", load_decoder)
    found = golden_dense.check_dense(case, torch.float64)
    assert not found.failures
    assert found.worst["prediction"] < 1e-6


def test_the_encoder_is_frozen_for_a_quarter_then_trains():
    config, labelled = configured("finetune.epochs=8", "finetune.layer_decay=0.5"), coloured_blocks()
    setup = setup_of(config, labelled)
    begun, optimizer, frozen = encoder_of(setup), None, []
    for epoch in range(4):
        groups = setup.begin_epoch(epoch)
        if optimizer is None:
            optimizer = optim.AdamW(groups, lr=0.01)
        else:
            for group in groups:
                optimizer.add_param_group(group)
        before = {name: value.clone() for name, value in setup.model.state_dict().items()}
        batch = setup.augment(stack(examples_of(setup, labelled, (0, 1)), CPU), epoch)
        loss, num = setup.loss(setup.model(batch.images), batch.targets)
        (loss / num).backward()
        optimizer.step()
        optimizer.zero_grad()
        after = setup.model.state_dict()
        assert not any(torch.equal(before[name], after[name]) for name in after if not name.startswith("encoder."))
        frozen.append(same(begun, encoder_of(setup)))
    assert frozen == [True, True, False, False]
    assert {group.get("lr_scale") for group in optimizer.param_groups} == {None, 0.5, 0.25, 0.125, 0.0625, 0.03125}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(setup.model.parameters()))


def test_the_configuration_is_that_of_the_published_code(repo):
    small = ("encoder.name=convnextv2_small", f"encoder.bands_in=[{','.join(NAMES)}]")
    config = load_config(repo / "configs" / "eval" / "geobench_segmentation.yaml", small)
    setup = setup_of(config, coloured_blocks())
    assert (config.finetune.epochs, setup.num_frozen_epochs) == (200, 50)
    rate = config.finetune.blr * config.finetune.batch_size / 256
    assert rate == 1.25e-3


@pytest.mark.parametrize(("options", "epochs"), [(["finetune.freeze=true"], 8), (["segmentation.frozen_fraction=0"], 0)])
def test_other_lengths_of_the_frozen_phase(options, epochs):
    setup = setup_of(configured("finetune.epochs=8", *options), coloured_blocks())
    assert setup.num_frozen_epochs == epochs
    num = sum(len(group["params"]) for epoch in range(8) for group in setup.begin_epoch(epoch))
    encoder = 0 if epochs else len(list(setup.model.encoder.parameters()))
    assert num == encoder + len([n for n, _ in setup.model.named_parameters() if not n.startswith("encoder.")])


def test_pixels_without_a_label_never_matter():
    labelled = coloured_blocks()
    setup = setup_of(configured(), labelled)
    examples = examples_of(setup, labelled, (0, 1))
    targets = torch.cat([example.targets for example in examples])
    torch.manual_seed(0)
    outputs = torch.randn(2, 3, 16, 16, requires_grad=True)
    ignored = (targets == IGNORED)[:, None].expand_as(outputs)
    assert 0.1 < ignored.float().mean() < 0.2
    loss, num = setup.loss(outputs, targets)
    assert num == (targets != IGNORED).sum()
    loss.backward()
    assert bool((outputs.grad[ignored] == 0).all())
    assert bool((outputs.grad[~ignored] != 0).any())
    other = torch.where(ignored, 100 * torch.randn_like(outputs), outputs)
    assert torch.equal(setup.loss(other, targets)[0], loss)
    values = []
    for logits in (outputs, other):
        metrics = Metrics("segmentation", 3)
        for scores, target in setup.predict(logits.detach(), examples):
            metrics.update(scores, target)
        values.append(metrics.compute())
    assert values[0] == values[1]


def test_images_and_label_maps_turn_together():
    labelled = coloured_blocks(num=30)
    setup = setup_of(configured(), labelled)
    batch = stack(examples_of(setup, labelled, range(30)), CPU)
    changed = setup.augment(batch, epoch=3)
    assert not torch.equal(changed.images, batch.images)
    valid = changed.targets != IGNORED
    mean, std = statistics_of(labelled)
    raw = (changed.images * std + mean)[:, :3]
    assert torch.equal(raw.argmax(1)[valid], changed.targets[valid])
    assert valid.sum() == (batch.targets != IGNORED).sum()
    assert torch.equal(setup.augment(batch, epoch=3).images, changed.images)
    assert not torch.equal(setup.augment(batch, epoch=4).images, changed.images)


@pytest.mark.parametrize("size", [(40, 24), (33, 17), (16, 16)])
def test_windows_of_a_large_image_give_what_the_whole_gives(size):
    """With a model that sees one pixel at a time."""
    labelled = coloured_blocks(num=3, size=size)
    setup = setup_of(configured("image.fit=tile", "image.size=16"), labelled)
    pixelwise = nn.Conv2d(4, 3, 1).double()
    mean, std = statistics_of(labelled)
    examples = examples_of(setup, labelled, (0, 2))
    batch = stack(examples, CPU)
    num_windows = -(-size[0] // 16) * -(-size[1] // 16)
    assert batch.images.shape == (2 * num_windows, 4, 16, 16)
    outputs = pixelwise(batch.images.double())
    for (scores, target), index in zip(setup.predict(outputs, examples), (0, 2), strict=True):
        whole = pixelwise((torch.from_numpy(labelled.image(index)).double() - mean) / std)[None]
        torch.testing.assert_close(scores.double(), whole, rtol=0, atol=2e-6)  # stitched in float32
        assert torch.equal(target[0], torch.from_numpy(labelled.label(index)))


def test_metrics_by_hand():
    labelled = coloured_blocks(num=5, size=(8, 8))
    labelled.label(0)[:] = IGNORED
    labelled.label(0)[0] = [0, 0, 0, 0, 1, 1, 2, IGNORED]
    setup = setup_of(configured(), labelled)
    examples = examples_of(setup, labelled, (0,))
    predicted = torch.zeros(8, 8, dtype=torch.long)
    predicted[0] = torch.tensor([0, 0, 0, 1, 1, 2, 2, 0])
    metrics = Metrics("segmentation", 3)
    for scores, target in setup.predict(nn.functional.one_hot(predicted, 3).permute(2, 0, 1)[None].float(), examples):
        metrics.update(scores, target)
    # unions: 4, 3, 2; intersections: 3, 1, 1; of 7 pixels with a label 5 are right
    assert metrics.compute() == pytest.approx(
        {"miou": (3 / 4 + 1 / 3 + 1 / 2) / 3, "accuracy": 5 / 7, "f1_macro": (6 / 7 + 2 / 4 + 2 / 3) / 3}
    )


@pytest.mark.parametrize("stages", [(0, 1, 2, 3), (3,), (2, 0)])
def test_the_linear_layer_is_a_convolution_on_concatenated_maps(stages):
    encoder = open_encoder(EncoderSection(name="convnextv2_small", bands_in=NAMES))
    images = torch.randn(2, 4, 16, 16)
    maps = []
    for m in encoder.maps(images, stages):
        normalised = nn.functional.layer_norm(m.detach().permute(0, 2, 3, 1), m.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)
        maps.append(nn.functional.interpolate(normalised, (16, 16), mode="bilinear").double())
    model = LinearSegmenter(encoder, 5, stages, seed=0)
    weight = torch.cat([conv.weight for conv in model.head.convs], 1).double()
    with torch.no_grad():
        model.head.bias.copy_(torch.arange(5.0))
        expected = nn.functional.conv2d(torch.cat(maps, 1), weight, model.head.bias.double())
        torch.testing.assert_close(model(model.encode(images)).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("cache_bytes", "passes"), [(1 << 30, 1), (0, 3)])
def test_features_of_the_frozen_encoder_are_computed_once(cache_bytes, passes, tmp_path, monkeypatch):
    calls, encode = [], LinearSegmenter.encode

    def counted(self, images):
        calls.append(encoder_of_model(self))
        return encode(self, images)

    def encoder_of_model(model):
        return torch.cat([value.flatten() for value in model.encoder.state_dict().values()])

    monkeypatch.setattr(LinearSegmenter, "encode", counted)
    options = ("segmentation.method=linear", "finetune.epochs=3", f"output.dir={tmp_path}")
    finetune(configured(*TRAINING, *options, f"finetune.cache_bytes={cache_bytes}"), labelled=coloured_blocks())
    assert len(calls) == passes * (12 + 4) + 4  # train and val in every epoch, test once
    assert all(torch.equal(encoder, calls[0]) for encoder in calls)


def test_pretrained_beside_scratch_and_what_is_kept(tmp_path):
    torch.manual_seed(5)
    state = mpmae.create_unet("convnextv2_small", num_classes=1, bands_in=NAMES).encoder.state_dict()
    save_file({f"encoder.{name}": value for name, value in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"bands_in": NAMES}))
    options = (*TRAINING, "finetune.epochs=4", "output.seeds=[0, 1]", f"encoder.checkpoint={tmp_path}")
    scores = finetune(configured(*options, f"output.dir={tmp_path / 'unet'}"), labelled=coloured_blocks())
    assert [(score.encoder, score.seed) for score in scores] == [
        (str(tmp_path), 0),
        ("random init", 0),
        (str(tmp_path), 1),
        ("random init", 1),
    ]
    assert len({score.value for score in scores}) == 4
    folder = tmp_path / "unet" / "runs" / "pretrained-labels100-seed0"
    unet, kept = (
        mpmae.create_unet("convnextv2_small", num_classes=3, checkpoint=folder),
        load_file(folder / "model.safetensors"),
    )
    assert same(kept, unet.state_dict())
    assert read_weights(folder).bands_in == NAMES

    linear = ("segmentation.method=linear", "finetune.baselines=[]", f"output.dir={tmp_path / 'linear'}")
    finetune(configured(*options, *linear), labelled=coloured_blocks())
    weights = read_weights(tmp_path / "linear" / "runs" / "pretrained-labels100-seed0")
    assert describe(weights.state, "it").size == "small"
    stored = load_file(tmp_path / "model.safetensors")
    assert same(stored, weights.state)
    mpmae.create_encoder("convnextv2_small", checkpoint=weights)


def test_pictures_are_of_the_best_weights_or_none(tmp_path):
    """Where weights are not kept, a run that had ended draws nothing; one that ends under --resume does."""
    keys = ("finetune.epochs=1", "finetune.keep_weights=false", "segmentation.num_pictures=1", f"output.dir={tmp_path}")
    options = (*TRAINING, *keys)
    finetune(configured(*options), resume=True, labelled=coloured_blocks())
    (picture,) = (tmp_path / "runs").glob("*/predictions.png")
    picture.unlink()
    finetune(configured(*options), resume=True, labelled=coloured_blocks())
    assert not picture.exists()


def test_a_run_cut_off_in_the_frozen_phase_goes_on(tmp_path, monkeypatch):
    options = (*TRAINING, "finetune.epochs=4", "segmentation.frozen_fraction=0.5", "finetune.save_interval_s=0")
    (whole,) = finetune(configured(*options, f"output.dir={tmp_path / 'whole'}"), labelled=coloured_blocks())
    config, begin = configured(*options, f"output.dir={tmp_path / 'cut'}"), DecoderSetup.begin_epoch
    for last in (1, 3):  # within the first phase, and in the second

        def cut_off(self, epoch, last=last):
            if epoch == last:
                raise KeyboardInterrupt
            return begin(self, epoch)

        monkeypatch.setattr(DecoderSetup, "begin_epoch", cut_off)
        with pytest.raises(KeyboardInterrupt):
            finetune(config, labelled=coloured_blocks(), resume=last > 1)
    monkeypatch.setattr(DecoderSetup, "begin_epoch", begin)
    (resumed,) = finetune(config, labelled=coloured_blocks(), resume=True)
    assert resumed == whole


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["augment.mixup_alpha=0.8"], r"augment\.mixup_alpha = 0\.8: is for classes of whole images"),
        (["augment.smoothing=0.1", "augment.erase_probability=0.25"], "augment.erase_probability.*\n.*augment.smoothing"),
        (["finetune.freeze=true", "finetune.drop_path=0.1"], "a frozen encoder skips no blocks"),
        (["segmentation.method=linear", "augment.crop_min_area=0.5"], "takes images as they are"),
        (
            ["segmentation.method=linear", "segmentation.stages=[4]"],
            r"stages = \[4\]: expected different numbers",
        ),
        (["segmentation.method=linear", "segmentation.stages=[3, 3]"], r"segmentation\.stages = \[3, 3\]"),
        (["segmentation.frozen_fraction=1"], "less than 1"),
        (["segmentation.method=fcn"], "segmentation.method=fcn"),
    ],
)
def test_settings_that_mean_nothing_are_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        setup_of(configured(*overrides), coloured_blocks())


def test_the_sheet_shows_label_prediction_and_error(tmp_path, monkeypatch):
    labelled = coloured_blocks(num=2, size=(16, 16))
    images, labels = [labelled.image(i) for i in (0, 1)], [labelled.label(i) for i in (0, 1)]
    classes = [image[:3].argmax(0) for image in images]
    right = Pictured("right", images[0], labels[0], classes[0])
    wrong = Pictured("wrong", images[1], labels[1], (classes[1] + 1) % 3)
    sheets, drawn = [], []
    monkeypatch.setattr(Axes, "imshow", lambda self, picture, **_: drawn.append(picture))
    monkeypatch.setattr(Figure, "legend", lambda self, handles, **_: sheets.append([h.get_label() for h in handles]))
    draw_sheet(tmp_path / "new" / "sheet.png", labelled.task, [right, wrong], "title")
    assert len(drawn) == 8
    colours = class_colours(3)
    for number, sample in enumerate((right, wrong)):
        image, label, predicted, error = drawn[4 * number : 4 * number + 4]
        seen = sample.label != IGNORED
        for channel, band in enumerate((2, 1, 0)):  # B4, B3, B2
            assert np.corrcoef(image[..., channel].ravel(), sample.image[band].ravel())[0, 1] > 0.99
        assert (label[seen] == colours[sample.label[seen]]).all()
        assert (predicted == colours[sample.predicted]).all()
        assert len(np.unique(error[seen], axis=0)) == 1
    assert not (drawn[3][seen] == drawn[7][seen]).any()
    (names,) = sheets
    assert set(names[:3]) == set(labelled.task.class_names)
    assert names[3:] == ["right", "wrong", "no label"]


def test_many_classes_have_colours_of_their_own():
    for num in (2, 11, 20, 60):
        assert len(np.unique(class_colours(num), axis=0)) == num
