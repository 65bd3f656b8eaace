"""Segmentation on the loop of `mpmae.eval.training`: a decoder on the encoder, or a linear layer on a frozen one.

Protocol of a decoder: the encoder keeps its weights for the first quarter of the epochs, then all trains.
Source: MMEarth-train, `main_finetune.py` (50 of 200 epochs) and `engine_finetune.py`.

Shapes: T windows of an image, M windows of a batch, B input bands, S side of a window in pixels, H x W pixels of a stored
image, K classes, F features of a window.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpmae.engine.optim import layer_decay_groups, parameter_groups
from mpmae.errors import ConfigError
from mpmae.eval.augment import change_geometry, draw
from mpmae.eval.dataset import IGNORED, LabelledSet, Task
from mpmae.eval.encoder_input import EncoderInput
from mpmae.eval.encoders import ImageEncoder
from mpmae.eval.finetune_config import FinetuneConfig
from mpmae.eval.prepare import Preparation
from mpmae.eval.segmentation_models import LinearSegmenter, TokenSegmenter, unet_on
from mpmae.eval.segmentation_pictures import Pictured, draw_sheet
from mpmae.eval.training_data import Batch, Example
from mpmae.models import UNet

_LOG = logging.getLogger(__name__)


@dataclass
class _MapSetup:
    """What the two methods have in common: label maps in windows, cross entropy of the labelled pixels, stitching."""

    task: Task
    preparation: Preparation
    config: FinetuneConfig
    seed: int

    def loss(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy of logits [M, K, S, S] summed over the pixels that have a label in [M, S, S]; their number."""
        total = F.cross_entropy(outputs.float(), targets, ignore_index=IGNORED, reduction="sum")
        return total, (targets != IGNORED).sum()

    def predict(self, outputs: Tensor, examples: Sequence[Example]) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits [1, K, H, W], label map [1, H, W]) of each image at its stored size."""
        for logits, example in zip(outputs.split([len(example.images) for example in examples]), examples, strict=True):
            whole = self.preparation.stitch(logits, example.label.shape)
            yield whole[None], torch.from_numpy(self.preparation.scored(example.label))[None]


@dataclass
class DecoderSetup(_MapSetup):
    """Segmentation by a decoder on the encoder `model.encoder`: see `mpmae.eval.training.Setup`.

    name: of the decoder. encoder_input: what the images' channels are.
    """

    model: UNet | TokenSegmenter
    name: str
    encoder_input: EncoderInput
    prepares_alike = True

    def prepare(self, image: np.ndarray, label: np.ndarray) -> tuple[Tensor, Tensor]:
        """Windows [T, B, S, S] and their label maps [T, S, S]."""
        return self.preparation(image), self.preparation.label_windows(label)

    @property
    def method(self) -> str:
        """For scores."""
        return f"{self.name}-decoder" if self.config.finetune.freeze else self.name

    @property
    def num_frozen_epochs(self) -> int:
        """How long the encoder keeps its weights."""
        section = self.config.finetune
        return section.epochs if section.freeze else int(self.config.segmentation.frozen_fraction * section.epochs)

    def begin_epoch(self, epoch: int) -> list[dict[str, Any]]:
        """The decoder's parameters from the first epoch on, the encoder's with the first in which it is not frozen."""
        section, groups = self.config.finetune, []
        if epoch == 0:
            self.model.encoder.requires_grad_(False)
            groups += parameter_groups(self.model, section.weight_decay)
        if epoch == self.num_frozen_epochs:
            encoder = self.model.encoder.requires_grad_(True)
            quirks = section.reference_quirks
            groups += layer_decay_groups(encoder, section.weight_decay, section.layer_decay, reference_quirks=quirks)
            _LOG.info("from epoch %d on the encoder trains too", epoch)
        return groups

    def augment(self, batch: Batch, epoch: int) -> Batch:
        """Images and label maps cropped, turned and flipped alike."""
        draws = draw(self.seed, epoch, batch.keys)
        images, targets = change_geometry(self.config.augment, batch.images, draws, batch.targets, self.encoder_input)
        return replace(batch, images=images, targets=targets)


@dataclass
class LinearSetup(_MapSetup):
    """Linear segmentation: see `mpmae.eval.training.Setup`. What is read ahead and cached are the encoder's features.

    Images are taken as they are: turned ones would need features of their own in every epoch.
    """

    model: LinearSegmenter
    method = "linear segmentation"
    prepares_alike = False

    def prepare(self, image: np.ndarray, label: np.ndarray) -> tuple[Tensor, Tensor]:
        """Features of the windows [T, F] and their label maps [T, S, S]."""
        return self.model.encode(self.preparation(image)), self.preparation.label_windows(label)

    def begin_epoch(self, epoch: int) -> list[dict[str, Any]]:
        """The linear layer's parameters."""
        return [] if epoch else parameter_groups(self.model, self.config.finetune.weight_decay)

    def augment(self, batch: Batch, epoch: int) -> Batch:
        """The batch as it is."""
        return batch


def segmentation_setup(
    config: FinetuneConfig, task: Task, encoder: ImageEncoder, preparation: Preparation, seed: int
) -> DecoderSetup | LinearSetup:
    """The setup of a run; `encoder` becomes part of its model. seed: of the new layers' weights and of augmentation.

    Raises ConfigError with every setting that means nothing for label maps.
    """
    method = config.segmentation.method or encoder.decoder_method
    _check(config, method, encoder)
    if method == "linear":
        _LOG.info("linear segmentation: the encoder stays as it is, and images are neither turned nor flipped")
        model = LinearSegmenter(encoder, task.num_classes, config.segmentation.stages, seed)
        return LinearSetup(task, preparation, config, seed, model)
    decoded = {"unet": unet_on, "convnext": TokenSegmenter}[method]
    model = decoded(encoder, task.num_classes, seed, config.finetune.drop_path)
    return DecoderSetup(task, preparation, config, seed, model, method, encoder.input)


def _check(config: FinetuneConfig, method: str, encoder: ImageEncoder) -> None:
    augment, finetune, problems = config.augment, config.finetune, []
    for section, keys, advice in (
        (augment, ("mixup_alpha", "cutmix_alpha", "erase_probability", "smoothing"), "is for classes of whole images"),
        (finetune, ("head_init_scale",), "is for classifiers of whole images"),
    ):
        name = "augment" if section is augment else "finetune"
        set_keys = [key for key in keys if key in section.model_fields_set and getattr(section, key)]
        problems += [f"{name}.{key} = {getattr(section, key)}: {advice}; leave it out" for key in set_keys]
    is_linear = method == "linear"
    if method not in ("linear", encoder.decoder_method):
        problems.append(
            f"segmentation.method = {method}: no decoder for the maps of {encoder.label}; leave it out for "
            f"{encoder.decoder_method}, or use linear"
        )
    if is_linear and augment.crop_min_area is not None:
        problems.append("augment.crop_min_area: linear segmentation takes images as they are; leave it out")
    if finetune.drop_path and (is_linear or finetune.freeze):
        problems.append("finetune.drop_path: a frozen encoder skips no blocks; leave it out")
    if problems:
        raise ConfigError(problems)


def predict_maps(
    setup: DecoderSetup | LinearSetup, labelled: LabelledSet, indices: Iterable[int], device: torch.device
) -> Iterator[Pictured]:
    """Image, label map and predicted classes at the stored size, for each sample of `indices`."""
    model = setup.model.to(device).eval()
    for index in map(int, indices):
        image, label = labelled.image(index), labelled.label(index)
        inputs, _ = setup.prepare(image, label)
        with torch.inference_mode():
            logits = setup.preparation.stitch(model(inputs.to(device)).float(), label.shape)
        seen = setup.preparation.scored(label)
        yield Pictured(labelled.sample_id(index), image, seen, logits.argmax(0).cpu().numpy())


def draw_predictions(
    path: Path,
    setup: DecoderSetup | LinearSetup,
    labelled: LabelledSet,
    indices: np.ndarray,
    device: torch.device,
    title: str,
) -> None:
    """The sheet of `segmentation.num_pictures` samples with a label, spread evenly over `indices`, as a PNG."""
    num = setup.config.segmentation.num_pictures
    shown = [int(index) for index in indices if num and (labelled.label(int(index)) != IGNORED).any()]
    chosen = [shown[i] for i in np.linspace(0, len(shown) - 1, min(num, len(shown))).round().astype(int)]
    draw_sheet(path, setup.task, list(predict_maps(setup, labelled, chosen, device)), title)
