"""Random changes of training batches and soft targets. Mixup, CutMix and random erasing are timm's: the one door to it.

What a sample gets is a pure function of seed, epoch and its key, so that no result depends on how batches are cut into
micro batches and ranks. Mixing joins the samples of one micro batch and does depend on that.

Shapes: M windows of a batch, B input bands, S image side in pixels, K classes.
"""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpmae.counter_rng import Stream, random_bits
from mpmae.errors import ConfigError
from mpmae.eval.dataset import Task
from mpmae.eval.encoder_input import EncoderInput
from mpmae.eval.finetune_config import AugmentSection
from mpmae.eval.torchvision_import import let_torchvision_import
from mpmae.eval.training_data import Batch

_ASPECT = math.log(4 / 3)  # of a crop, as timm's random resized crop
# which of a sample's random numbers is for what
_TURN, _FLIP_ROWS, _FLIP_COLUMNS, _AREA, _SHAPE, _TOP, _LEFT, _ERASE, _MIX, _NUM = range(10)


class Augment:
    """Changes a batch of images that have one target each, and makes its targets soft.

    Targets come as classes [M] or labels [M, K] (task kind "multilabel") and go as float32 [M, K]. encoder_input: what the
    channels are, where they are more than bands of Sentinel-2. Raises ConfigError for a task without such targets, and for
    changes that would make new class ids of old ones.
    """

    def __init__(self, section: AugmentSection, task: Task, seed: int, encoder_input: EncoderInput | None = None):
        if task.kind not in ("multiclass", "multilabel"):
            raise ConfigError(f"{task.name}: a task of kind {task.kind} has no target per image to smooth or mix")
        self._section, self._task, self._seed, self._input = section, task, seed, encoder_input
        if encoder_input is not None and encoder_input.class_channels:
            maps = ", ".join(encoder_input.channels[channel][0] for channel in encoder_input.class_channels)
            keys = [key for key in ("mixup_alpha", "erase_probability") if getattr(section, key)]
            if keys:
                raise ConfigError(
                    [f"augment.{key}: the class ids of {maps} cannot be mixed or be noise; set it to 0" for key in keys]
                )

    @torch.no_grad()
    def __call__(self, batch: Batch, epoch: int) -> Batch:
        """The changed batch; its tensors may be changed in place."""
        section, draws = self._section, draw(self._seed, epoch, batch.keys)
        images, _ = change_geometry(section, batch.images, draws, encoder_input=self._input)
        images = erase(section, images, draws)
        targets = soft_targets(batch.targets, self._task, section.smoothing)
        images, targets = mix(section, images, targets, draws)
        return replace(batch, images=images, targets=targets)


def draw(seed: int, epoch: int, keys: np.ndarray) -> np.ndarray:
    """The random numbers of each sample, uint64 [M, numbers], for the functions below."""
    return random_bits(seed, Stream.AUGMENT, epoch, keys, _NUM)


def change_geometry(
    section: AugmentSection,
    images: Tensor,
    draws: np.ndarray,
    maps: Tensor | None = None,
    encoder_input: EncoderInput | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Images [M, B, S, S] cropped and resized, turned and flipped, and label maps [M, S, S] with them.

    Crops have an aspect ratio within 3/4 and 4/3 and are read with bilinear interpolation, maps and channels of class ids
    with the nearest pixel. For an encoder that tells no data apart, NaN stays NaN and touches no other pixel.
    """
    if section.crop_min_area is not None:
        grid = _crop_grid(section.crop_min_area, len(images), images.shape[-2:], draws).to(images)
        images = _cropped(images, grid, encoder_input)
        if maps is not None:
            as_images = maps[:, None].to(torch.float32)
            maps = F.grid_sample(as_images, grid.float(), mode="nearest", padding_mode="border", align_corners=False)
            maps = maps[:, 0].round().to(torch.int64)
    uniform = _uniform(draws)
    turns = (uniform[:, _TURN] * 4).astype(int) * section.rotate
    flips = [(uniform[:, number] < 0.5) & section.flip for number in (_FLIP_ROWS, _FLIP_COLUMNS)]
    images = _dihedral(images, turns, *flips)
    return images, None if maps is None else _dihedral(maps, turns, *flips)


def _cropped(images: Tensor, grid: Tensor, encoder_input: EncoderInput | None) -> Tensor:
    def sampled(t: Tensor, mode: str = "bilinear") -> Tensor:
        return F.grid_sample(t, grid, mode=mode, padding_mode="border", align_corners=False)

    if encoder_input is None or not encoder_input.tells_no_data:
        return sampled(images)
    there = images.isfinite()
    share = sampled(there.to(images.dtype))
    cropped = torch.where(share >= 0.5, sampled(torch.where(there, images, 0)) / share, math.nan)
    classes = list(encoder_input.class_channels)
    if classes:
        cropped[:, classes] = sampled(images[:, classes], "nearest")
    return cropped


def erase(section: AugmentSection, images: Tensor, draws: np.ndarray) -> Tensor:
    """Images [M, B, S, S], each with the given probability with a rectangle of normal noise, in place."""
    if not section.erase_probability:
        return images
    let_torchvision_import()
    from timm.data.random_erasing import RandomErasing

    erasing = RandomErasing(section.erase_probability, mode="pixel", device=images.device)
    for image, number in zip(images, draws[:, _ERASE], strict=True):
        with _seeded(int(number), images.device):
            erasing(image)
    return images


def mix(section: AugmentSection, images: Tensor, targets: Tensor, draws: np.ndarray) -> tuple[Tensor, Tensor]:
    """Images [M, B, S, S] and soft targets [M, K], mixed with those of the batch in reverse order by mixup or CutMix.

    Of an odd number the last stays as it is. Works on label vectors of any kind: they are mixed in the shares that timm
    mixes the images in.
    """
    num = len(images) // 2 * 2
    if not num or not (section.mixup_alpha or section.cutmix_alpha):
        return images, targets
    let_torchvision_import()
    from timm.data.mixup import Mixup

    mixup = Mixup(
        section.mixup_alpha,
        section.cutmix_alpha,
        prob=section.mix_probability,
        label_smoothing=0.0,
        num_classes=num,
    )
    with _seeded(int(draws[0, _MIX]), images.device):
        # each sample as a class of its own: the "targets" that come back are the shares of the samples
        mixed, shares = mixup(images[:num].contiguous(), torch.arange(num, device=images.device))
    soft = targets.to(torch.float32)
    return torch.cat([mixed, images[num:]]), torch.cat([shares.to(soft) @ soft[:num], soft[num:]])


def soft_targets(targets: Tensor, task: Task, smoothing: float) -> Tensor:
    """Targets float32 [M, K] from classes [M] or labels [M, K].

    Of one class: 1 - smoothing, and smoothing spread evenly over all K. Of several: 1 - smoothing or smoothing each.
    Source: timm, `mixup_target`; MMEarth-train, `LabelSmoothingBinaryCrossEntropy`.
    """
    if task.kind == "multilabel":
        return targets.to(torch.float32) * (1 - 2 * smoothing) + smoothing
    return F.one_hot(targets.long(), task.num_classes).to(torch.float32) * (1 - smoothing) + smoothing / task.num_classes


def _uniform(draws: np.ndarray) -> np.ndarray:
    return (draws >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _dihedral(x: Tensor, turns: np.ndarray, flip_rows: np.ndarray, flip_columns: np.ndarray) -> Tensor:
    """x [M, ..., S, S] with each sample turned and flipped as asked; samples that are treated alike at once."""
    code = turns * 4 + flip_rows * 2 + flip_columns
    if not code.any():
        return x
    result = torch.empty_like(x)
    for value in np.unique(code):
        where = torch.from_numpy(np.flatnonzero(code == value)).to(x.device)
        axes = [axis for axis, flip in ((-2, value & 2), (-1, value & 1)) if flip]
        result[where] = torch.rot90(x[where], int(value) // 4, (-2, -1)).flip(axes)
    return result


def _crop_grid(min_area: float, num: int, size: tuple[int, int], draws: np.ndarray) -> Tensor:
    """Where in the image each output pixel lies, [M, H, W, 2] as `grid_sample` wants it."""
    uniform = _uniform(draws)
    area = min_area + (1 - min_area) * uniform[:, _AREA]
    ratio = np.exp(_ASPECT * (2 * uniform[:, _SHAPE] - 1))
    height, width = np.minimum(np.sqrt(area * ratio), 1), np.minimum(np.sqrt(area / ratio), 1)  # fractions of the sides
    top, left = (1 - height) * (2 * uniform[:, _TOP] - 1), (1 - width) * (2 * uniform[:, _LEFT] - 1)
    affine = np.zeros((num, 2, 3))
    affine[:, 0, 0], affine[:, 0, 2], affine[:, 1, 1], affine[:, 1, 2] = width, left, height, top
    return F.affine_grid(torch.from_numpy(affine), [num, 1, *size], align_corners=False)


@contextmanager
def _seeded(number: int, device: torch.device) -> Iterator[None]:
    """The global generators that timm draws from, seeded for the block and put back afterwards."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002 (timm's own)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            random.seed(number)
            np.random.seed(number & 0xFFFFFFFF)  # noqa: NPY002
            torch.manual_seed(number >> 1)
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
