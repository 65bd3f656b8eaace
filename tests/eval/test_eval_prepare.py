"""Stored images as an encoder takes them, and predictions back."""

import json
import logging

import numpy as np
import pytest
import torch

from mpmae.errors import DatasetError
from mpmae.eval.bands import SENTINEL2_UM
from mpmae.eval.config import ImageSection
from mpmae.eval.dataset import IGNORED, StoredBand, Task
from mpmae.eval.encoder_input import EncoderInput
from mpmae.eval.prepare import Preparation

L1C = {"mean": (1000.0, 900.0, 800.0), "std": (500.0, 450.0, 400.0)}
ENCODER = EncoderInput(("B4", "B3", "B2"), 8, {"l1c": L1C})
STORED = ("B2", "B3", "B4", "VV")


def task_of(names=STORED, level="l1c", scale=1.0, mean=1000.0, kind="segmentation") -> Task:
    bands = (StoredBand(name, SENTINEL2_UM.get(name), (mean + 10 * i) / scale, 200 / scale) for i, name in enumerate(names))
    return Task("mine", kind, ("a", "b"), tuple(bands), "miou", level, scale)


def image_of(height=16, width=16, num_bands=4) -> np.ndarray:
    return np.random.default_rng(0).uniform(1, 3000, (num_bands, height, width)).astype(np.float32)


def prepared(section=None, task=None, encoder=ENCODER) -> Preparation:
    return Preparation(task or task_of(), encoder, section or ImageSection())


def test_statistics_of_pretraining_come_first(caplog):
    caplog.set_level(logging.INFO)
    prepare, image = prepared(), image_of()
    expected = [(image[2] - 1000) / 500, (image[1] - 900) / 450, (image[0] - 800) / 400]
    np.testing.assert_allclose(prepare(image)[0].numpy(), np.stack(expected), rtol=1e-5, atol=1e-6)
    assert prepare(image).dtype == torch.float32
    assert prepare.facts["statistics"] == "pretraining"
    assert "normalised by statistics of pretraining: the checkpoint has those of l1c" in caplog.text


@pytest.mark.parametrize(
    ("section", "task", "encoder", "reason"),
    [
        (ImageSection(normalise="dataset"), task_of(), ENCODER, "image.normalise = dataset"),
        (ImageSection(), task_of(level=None), ENCODER, "product level is not known"),
        (ImageSection(), task_of(level="l2a"), ENCODER, "the checkpoint has statistics of l1c, not of l2a"),
        (ImageSection(), task_of(), EncoderInput(("B4", "B3", "B2"), 8), "statistics of no product"),
    ],
)
def test_statistics_of_the_set(section, task, encoder, reason):
    prepare, image = prepared(section, task, encoder), image_of()
    expected = [(image[2] - 1020) / 200, (image[1] - 1010) / 200, (image[0] - 1000) / 200]
    np.testing.assert_allclose(prepare(image)[0].numpy(), np.stack(expected), rtol=1e-5, atol=1e-6)
    assert prepare.facts["statistics"] == "dataset"
    assert reason in prepare.facts["statistics_reason"]


def test_pretraining_statistics_that_are_not_there():
    with pytest.raises(DatasetError, match=r"image.normalise = pretraining, but the set's product level is not known"):
        prepared(ImageSection(normalise="pretraining"), task_of(level=None))


def test_the_scale_brings_values_to_the_unit_of_pretraining():
    image = image_of()
    plain, scaled = prepared()(image), prepared(task=task_of(scale=10_000.0))(image / 10_000)
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-5)


def test_values_of_another_unit_are_found():
    with pytest.raises(DatasetError, match=r"are 0.0122 times those of pretraining \(l1c\).*image.normalise=dataset"):
        prepared(task=task_of(mean=1.0))


def test_a_stand_in_is_normalised_as_the_band_it_is():
    encoder = EncoderInput(("B1", "B2"), 8, {"l1c": {"mean": (1300.0, 1100.0), "std": (250.0, 330.0)}})
    prepare, image = prepared(task=task_of(("B2", "B3")), encoder=encoder), image_of(num_bands=2)
    expected = (image[0] - 1100) / 330
    np.testing.assert_allclose(prepare(image)[0].numpy(), np.stack([expected, expected]), rtol=1e-5, atol=1e-6)
    only_b8 = prepared(task=task_of(("B8",)), encoder=EncoderInput(("B4",), 8, {"l1c": {"mean": (900.0,), "std": (300.0,)}}))
    np.testing.assert_allclose(only_b8(image[:1])[0, 0].numpy(), (image[0] - 900) / 300, rtol=1e-5, atol=1e-6)


def test_no_data_becomes_the_mean():
    image = image_of()
    image[2, :3] = np.nan
    image[1, 5, 5] = np.inf
    found = prepared()(image)[0]
    assert torch.isfinite(found).all()
    assert (found[0, :3] == 0).all()
    assert found[1, 5, 5] == 0
    for fit in ("resize", "tile", "crop"):
        assert torch.isfinite(prepared(ImageSection(size=24, fit=fit))(image)).all()


@pytest.mark.parametrize(
    ("height", "width", "section", "num_windows", "side"),
    [
        (16, 16, ImageSection(), 1, 16),
        (20, 20, ImageSection(), 1, 24),
        (19, 19, ImageSection(), 1, 16),
        (3, 3, ImageSection(), 1, 8),
        (16, 24, ImageSection(), 1, 24),
        (20, 20, ImageSection(fit="crop"), 1, 16),
        (20, 20, ImageSection(fit="tile"), 4, 16),
        (16, 40, ImageSection(fit="tile"), 3, 16),
        (16, 16, ImageSection(size=8, fit="tile"), 4, 8),
        (16, 16, ImageSection(size=24, fit="tile"), 1, 24),
        (16, 16, ImageSection(size=24, fit="crop"), 1, 24),
        (100, 60, ImageSection(size=32), 1, 32),
    ],
)
def test_sizes(height, width, section, num_windows, side):
    prepare = prepared(section)
    found, label = prepare(image_of(height, width)), np.arange(height * width).reshape(height, width) % 2
    assert found.shape == (num_windows, 3, side, side)
    windows = prepare.label_windows(label)
    assert windows.shape == (num_windows, side, side)
    assert windows.dtype == torch.int64
    assert prepare.facts["side_px"] == side
    assert prepare.facts["num_windows"] == [num_windows]
    assert prepare.stitch(torch.zeros(num_windows, 2, side, side)).shape == (2, height, width)
    json.dumps(prepare.facts)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (ImageSection(), "16 x 40 px are scaled to 40 x 40, which changes their proportions"),
        (ImageSection(size=8, fit="crop"), "are cut to the 8 x 8 in their centre; the rest is neither seen nor scored"),
        (ImageSection(size=24, fit="tile"), "become 2 windows of 24 x 24, padded to at least 24 px"),
    ],
)
def test_what_happens_to_images_is_said_once(section, said, caplog):
    caplog.set_level(logging.INFO)
    prepare = prepared(section)
    prepare(image_of(16, 40))
    prepare(image_of(16, 40))
    assert caplog.text.count(said) == 1


def test_windows_hold_the_pixels_and_come_back_exactly():
    """The label as one-hot logits through windows and back is the label."""
    label = np.random.default_rng(1).integers(0, 2, (20, 37))
    for section in (ImageSection(fit="tile"), ImageSection(size=8, fit="tile"), ImageSection(size=40, fit="tile")):
        prepare = prepared(section)
        prepare(image_of(20, 37))
        windows = prepare.label_windows(label)
        logits = torch.nn.functional.one_hot(windows.clamp(min=0), 2).permute(0, 3, 1, 2).float()
        np.testing.assert_array_equal(prepare.stitch(logits).numpy()[1], label)


def test_overlaps_are_averaged():
    prepare = prepared(ImageSection(size=16, fit="tile"))
    prepare(image_of(16, 24))
    logits = torch.stack([torch.full((1, 16, 16), value) for value in (1.0, 3.0)])
    found = prepare.stitch(logits)[0, 0]
    assert found.tolist() == [1.0] * 8 + [2.0] * 8 + [3.0] * 8


def test_a_crop_is_the_centre_and_nothing_else_is_scored():
    prepare, image = prepared(ImageSection(size=8, fit="crop")), image_of(20, 12)
    torch.testing.assert_close(prepare(image), prepared()(image[:, 6:14, 2:10]), rtol=0, atol=0)
    label = np.ones((20, 12), np.int64)
    seen = prepare.scored(label)
    assert (seen[6:14, 2:10] == 1).all()
    assert (seen == 1).sum() == 64
    assert (seen[seen != 1] == IGNORED).all()
    assert prepare.label_windows(label).eq(1).all()
    back = prepare.stitch(torch.ones(1, 2, 8, 8))
    np.testing.assert_array_equal(back[0].numpy() == 1, seen == 1)


def test_padding_is_no_data_and_no_label():
    for fit in ("crop", "tile"):
        prepare = prepared(ImageSection(size=24, fit=fit))
        found, labels = prepare(image_of())[0], prepare.label_windows(np.ones((16, 16), np.int64))[0]
        assert (labels == 1).sum() == 256
        assert (found[:, labels == IGNORED] == 0).all()
        assert (prepare.scored(np.ones((16, 16), np.int64)) == 1).all()


def test_scaled_label_maps_keep_their_classes():
    prepare = prepared(ImageSection(size=8))
    label = np.full((16, 16), 1)
    label[:8] = IGNORED
    found = prepare.label_windows(label)[0]
    assert found.tolist() == [[IGNORED] * 8] * 4 + [[1] * 8] * 4
    double = prepared(ImageSection(size=32)).label_windows(np.arange(256).reshape(16, 16))[0]
    np.testing.assert_array_equal(double.numpy(), np.arange(256).reshape(16, 16).repeat(2, 0).repeat(2, 1))


def test_scaled_images_keep_their_means():
    image = np.ones((4, 20, 20), np.float32) * 1500
    found = prepared(ImageSection(size=8))(image)[0]
    torch.testing.assert_close(found[0], torch.full((8, 8), 1.0))


def test_images_of_several_sizes_need_a_size():
    prepare = prepared()
    prepare(image_of(16, 16))
    with pytest.raises(DatasetError, match=r"images of 24 x 24 and 16 x 16 px; .*image.size"):
        prepare(image_of(24, 24))
    prepare = prepared(ImageSection(size=16))
    assert prepare(image_of(16, 16)).shape == prepare(image_of(24, 30)).shape
    assert prepare.facts["stored_px"] == [[16, 16], [24, 30]]
    with pytest.raises(DatasetError, match="`stitch` needs size_px"):
        prepare.stitch(torch.zeros(1, 2, 16, 16))
    assert prepare.stitch(torch.zeros(1, 2, 16, 16), (24, 30)).shape == (2, 24, 30)


def test_sizes_that_the_encoder_cannot_take():
    with pytest.raises(DatasetError, match=r"image.size = 20: expected a multiple of .* patch size 8, such as 16 or 24"):
        prepared(ImageSection(size=20))
    with pytest.raises(DatasetError, match=r"an image of shape \[2, 16, 16\]; expected \[4, H, W\]: B2, B3, B4, VV"):
        prepared()(image_of(num_bands=2))


def test_bands_that_do_not_vary(caplog):
    task = task_of(level=None)
    flat = Task(
        "mine", "multiclass", ("a", "b"), tuple(StoredBand(b.name, b.wavelength_um, 5.0, 0.0) for b in task.bands), "x"
    )
    found = prepared(task=flat)(np.full((4, 8, 8), 7, np.float32))
    assert (found == 2).all()
    assert "the bands B2, B3, B4 do not vary" in caplog.text
