"""Augmentation: what happens to an image happens to its label map, to its target, and to nothing else."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mpmae.errors import ConfigError
from mpmae.eval.augment import Augment, change_geometry, draw, erase, mix, soft_targets
from mpmae.eval.finetune_config import AugmentSection
from mpmae.eval.training_data import Batch
from tests.eval.bright_bands import bright_bands
from tests.eval.tuning import ALL_CHANGES, small_setup

KEYS = np.arange(64, dtype=np.int64) << 12


def options(**chosen):
    return AugmentSection(**{"flip": False, "rotate": False, **chosen})


def numbered(num=64, side=6):
    """Images of two bands in which every pixel has its own number; and that number as a label map."""
    pixels = torch.arange(side * side, dtype=torch.float32).reshape(side, side)
    return torch.stack([pixels, -pixels])[None].repeat(num, 1, 1, 1), pixels.long()[None].repeat(num, 1, 1)


def test_turns_and_flips_are_the_symmetries_of_the_square():
    images, maps = numbered()
    changed, changed_maps = change_geometry(options(flip=True, rotate=True), images, draw(0, 0, KEYS), maps)
    square = maps[0]
    symmetries = [torch.rot90(s, turns) for s in (square, square.flip(0)) for turns in range(4)]
    found = [next(i for i, s in enumerate(symmetries) if torch.equal(s, one)) for one in changed_maps]
    assert set(found) == set(range(8))
    assert torch.equal(changed[:, 0].long(), changed_maps)
    assert torch.equal(changed[:, 1].long(), -changed_maps)
    flips, _ = change_geometry(options(flip=True), images, draw(0, 0, KEYS))
    corners = {tuple(image[0, [0, 0, -1, -1], [0, -1, 0, -1]].tolist()) for image in flips}
    assert corners == {(0, 5, 30, 35), (5, 0, 35, 30), (30, 35, 0, 5), (35, 30, 5, 0)}


def test_what_a_sample_gets_depends_on_seed_epoch_and_key_alone():
    section = options(flip=True, rotate=True, crop_min_area=0.3, erase_probability=0.5)

    def change(seed, epoch, chosen):
        draws = draw(seed, epoch, KEYS[chosen])
        return erase(section, change_geometry(section, numbered()[0][chosen], draws)[0], draws)

    whole = change(0, 0, slice(None))
    parts = torch.cat([change(0, 0, slice(0, 5)), change(0, 0, slice(5, None))])
    assert torch.equal(whole, parts)
    for other in (change(1, 0, slice(None)), change(0, 1, slice(None))):
        assert sum(torch.equal(a, b) for a, b in zip(whole, other, strict=True)) < 8


def test_a_crop_is_a_window_that_is_scaled_up():
    rows = torch.linspace(0, 1, 16)[:, None].expand(16, 16)
    images = torch.stack([rows, rows.T, torch.ones(16, 16)])[None].repeat(64, 1, 1, 1)
    changed, _ = change_geometry(options(crop_min_area=0.25), images, draw(0, 0, KEYS))
    torch.testing.assert_close(changed[:, 2], torch.ones(64, 16, 16))
    down, across = (changed[:, 0, -1, 0] - changed[:, 0, 0, 0]), (changed[:, 1, 0, -1] - changed[:, 1, 0, 0])
    areas = down * across
    assert 0.2 < areas.min() < 0.4
    assert 0.8 < areas.max() <= 1.0001
    assert torch.all((down / across).log().abs() < np.log(4 / 3) + 0.05)
    inner = changed[:, 0, 2:-2]
    torch.testing.assert_close(inner.diff(dim=1), inner.diff(dim=1)[:, :1, :1].expand(-1, 11, 16), atol=1e-5, rtol=0)
    starts = changed[:, 0, 0, 0]
    assert starts.min() < 0.05
    assert starts.max() > 0.25, "crops lie all over the image"


def test_a_map_is_cropped_with_its_image():
    maps = torch.arange(4).reshape(2, 2).repeat_interleave(8, 0).repeat_interleave(8, 1)[None].repeat(64, 1, 1)
    maps[:, 0, 0] = -1
    images = maps[:, None].float()
    changed, changed_maps = change_geometry(options(crop_min_area=0.25, rotate=True), images, draw(0, 0, KEYS), maps)
    assert changed_maps.dtype == torch.int64
    assert set(changed_maps.unique().tolist()) <= {-1, 0, 1, 2, 3}
    assert (changed_maps != maps).any()
    whole = changed == changed.round()  # where bilinear interpolation saw one class only
    assert whole.float().mean() > 0.7
    assert (changed[whole] == changed_maps[:, None][whole]).float().mean() > 0.99


def test_erasing_takes_a_rectangle_out_of_all_bands():
    images = torch.full((64, 3, 20, 20), 50.0)
    kept = erase(options(erase_probability=0.0), images.clone(), draw(0, 0, KEYS))
    assert torch.equal(kept, images)
    state = random.getstate(), np.random.default_rng(0), torch.get_rng_state()
    erased = erase(options(erase_probability=0.5), images.clone(), draw(0, 0, KEYS)) != images
    assert state[0] == random.getstate()
    assert torch.equal(state[2], torch.get_rng_state())
    hit = erased.flatten(1).any(1)
    assert 20 < hit.sum() < 44
    for image in erased[hit]:
        assert torch.equal(image[0], image[1]), "the same pixels of every band"
        rows, columns = image[0].any(1), image[0].any(0)
        assert torch.equal(image[0], rows[:, None] & columns[None])
        assert 0.01 < image[0].float().mean() < 0.4


def test_smoothing_by_hand():
    classes = bright_bands().task
    expected = torch.tensor([[0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3], [0.1 / 3, 0.1 / 3, 0.9 + 0.1 / 3]])
    torch.testing.assert_close(soft_targets(torch.tensor([0, 2]), classes, 0.1), expected)
    labels = bright_bands("multilabel").task
    expected = torch.tensor([[0.9, 0.1, 0.9]])
    torch.testing.assert_close(soft_targets(torch.tensor([[True, False, True]]), labels, 0.1), expected)


def test_losses_by_hand():
    logits = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]])
    setup = small_setup(bright_bands())
    shares = logits.exp() / logits.exp().sum(1, keepdim=True)
    loss, num_terms = setup.loss(logits, torch.tensor([1, 0]))
    torch.testing.assert_close(loss, -shares[0, 1].log() - shares[1, 0].log())
    assert num_terms == 2
    smooth = soft_targets(torch.tensor([1, 0]), setup.task, 0.1)
    torch.testing.assert_close(setup.loss(logits, smooth)[0], -(smooth * shares.log()).sum())
    torch.testing.assert_close(
        setup.loss(logits, smooth)[0], F.cross_entropy(logits, torch.tensor([1, 0]), label_smoothing=0.1, reduction="sum")
    )
    several = small_setup(bright_bands("multilabel"))
    labels = torch.tensor([[True, False, True], [False, False, False]])
    each = torch.where(labels, logits.sigmoid(), 1 - logits.sigmoid()).log()
    loss, num_terms = several.loss(logits, labels)
    torch.testing.assert_close(loss, -each.sum() / 3)
    assert num_terms == 2


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
@pytest.mark.parametrize("chosen", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}])
@pytest.mark.parametrize("num", [6, 7, 1])
def test_targets_are_mixed_in_the_shares_of_the_images(kind, chosen, num):
    labelled = bright_bands(kind)
    targets = soft_targets(torch.as_tensor(np.stack([labelled.label(i) for i in range(num)])), labelled.task, 0.1)
    images = torch.arange(num, dtype=torch.float32)[:, None, None, None].expand(num, 2, 20, 20).clone()
    shares = set()
    for first in range(20):
        keys = KEYS[first : first + num]
        mixed, soft = mix(options(**chosen), images.clone(), targets, draw(0, 0, keys))
        for i in range(num):
            j = i if num % 2 and i == num - 1 else num // 2 * 2 - 1 - i
            share = 1.0 if i == j else float((mixed[i].mean() - j) / (i - j))
            torch.testing.assert_close(soft[i], share * targets[i] + (1 - share) * targets[j], atol=1e-5, rtol=1e-5)
            shares.add(round(share, 3))
    assert shares == {1.0} if num == 1 else (len(shares) > 15 and min(shares) < 0.5)
    again, _ = mix(options(**chosen), images.clone(), targets, draw(0, 0, KEYS[19 : 19 + num]))
    assert torch.equal(again, mixed)


def test_a_batch_is_left_alone_where_nothing_is_asked_for():
    labelled = bright_bands()
    images = torch.from_numpy(labelled._images[:6].copy())
    batch = Batch(images.clone(), torch.arange(6) % 3, KEYS[:6])
    changed = Augment(options(smoothing=0.0), labelled.task, 0)(batch, 0)
    assert torch.equal(changed.images, images)
    assert torch.equal(changed.targets, F.one_hot(torch.arange(6) % 3, 3).float())
    other = Augment(AugmentSection(**ALL_CHANGES), labelled.task, 0)(batch, 0)
    assert other.images.shape == images.shape
    assert other.images.isfinite().all()
    assert not torch.equal(other.images, images)


def test_label_maps_are_not_mixed():
    with pytest.raises(ConfigError, match="segmentation has no target per image to smooth or mix"):
        Augment(AugmentSection(), bright_bands("segmentation").task, 0)
