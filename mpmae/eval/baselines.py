"""What every table of a probe shows beside the encoder: features that no pretraining made.

Shapes: n images, B stored bands, H x W pixels, F filters, D features.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpmae.errors import DatasetError
from mpmae.eval.config import EncoderSection, ImageSection
from mpmae.eval.dataset import LabelledSet, Task
from mpmae.eval.encoders import ImageEncoder, random_twin
from mpmae.eval.features import Source
from mpmae.eval.prepare import Preparation

BASELINES = ("random_init", "image_statistics", "random_convolutions")
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_PATCH_SIDE, _NUM_FILTERS = 3, 256
_CENTRING_EPS, _WHITENING_EPS = 1e-8, 1e-3
_NUM_SAMPLED = 4096


def encoder_source(encoder: ImageEncoder, task: Task, image: ImageSection) -> Source:
    """An encoder with the preparation of its input."""
    return Source(encoder, Preparation(task, encoder.input, image), image.model_dump(mode="json"))


def baseline_source(
    name: str, labelled: LabelledSet, train: Sequence[int], section: EncoderSection, image: ImageSection, seed: int
) -> Source:
    """The baseline `name`, one of BASELINES.

    train: images that random convolutions draw their patches from. seed: of the weights or patches.
    """
    if name == "random_init":
        return encoder_source(random_twin(section, seed, task=labelled.task), labelled.task, image)
    standardise = BandStandardise(labelled.task)
    if name == "image_statistics":
        return Source(ImageStatistics(), standardise)
    if name == "random_convolutions":
        return Source(RandomConvolutions(draw_patches(labelled, standardise, train, seed)), standardise)
    raise AssertionError(name)


class BandStandardise:
    """Stored images by the set's own mean and std of each band, all bands, at their own size; no data stays NaN."""

    def __init__(self, task: Task):
        std = torch.tensor([band.std for band in task.bands], dtype=torch.float32)
        self._mean = torch.tensor([band.mean for band in task.bands], dtype=torch.float32)[:, None, None]
        self._scale = torch.where(std > 0, 1 / std, 0.0)[:, None, None]

    def __call__(self, image: np.ndarray) -> Tensor:
        """float32 [1, B, H, W]."""
        return ((torch.from_numpy(np.asarray(image, np.float32)) - self._mean) * self._scale)[None]


class ImageStatistics(nn.Module):
    """Mean, std, minimum, maximum and five quantiles of each band: what an image says without any structure in space.

    D is 9 B. A band without any data gives zeros: the mean of the set.
    """

    label = "image statistics"

    def forward(self, image: Tensor) -> Tensor:
        """[n, D] for standardised images [n, B, H, W], NaN where there is no data."""
        return torch.stack([self._of_bands(one.flatten(1)).flatten() for one in image])

    def _of_bands(self, pixels: Tensor) -> Tensor:
        """[B, 9] of [B, H W]; image by image, as torch takes quantiles of few numbers at once."""
        there = pixels.isfinite()
        mean = pixels.nanmean(1, keepdim=True)
        std = (pixels - mean).square().nanmean(1).sqrt()
        low = torch.where(there, pixels, torch.inf).amin(1)
        high = torch.where(there, pixels, -torch.inf).amax(1)
        quantiles = torch.nanquantile(pixels, torch.tensor(_QUANTILES, device=pixels.device), dim=1)
        columns = torch.stack([mean[:, 0], std, low, high, *quantiles], 1)
        return torch.where(there.any(1)[:, None], columns, 0.0)

    def fingerprint(self) -> str:
        """Its quantiles."""
        return f"{self.label} {_QUANTILES}"


class RandomConvolutions(nn.Module):
    """Convolutions with patches of the training images as filters, one layer: texture without learning.

    D is 2 F: the mean over pixels of ReLU(z) and of ReLU(-z) for each response z. Source: MOSAIKS (Rolf et al. 2021, arXiv
    2010.08168): patches are centred, scaled to length 1 and whitened (ZCA), and so is what they meet, which is folded into
    the filters. Ours: responses are scaled to unit deviation over the patches drawn.
    """

    label = "random convolutions"

    def __init__(self, patches: Tensor, num_filters: int = _NUM_FILTERS):
        """patches: [P, B, 3, 3] without NaN, the first F of which become filters."""
        super().__init__()
        flat = patches.double().flatten(1)
        flat = flat - flat.mean(1, keepdim=True)
        flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(_CENTRING_EPS)
        values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
        whitening = (vectors / (values.clamp_min(0) + _WHITENING_EPS)) @ vectors.T  # of the filter and of what it meets
        filters = flat[:num_filters] @ whitening
        filters = filters - filters.mean(1, keepdim=True)
        deviation = (patches.double().flatten(1) @ filters.T).std(0, correction=0)
        filters = filters / deviation.clamp_min(_CENTRING_EPS)[:, None]
        self.register_buffer("filters", filters.float().unflatten(1, patches.shape[1:]))

    def forward(self, image: Tensor) -> Tensor:
        """[n, D] for standardised images [n, B, H, W]; no data counts as the mean of its band."""
        vectors = []
        for one in torch.nan_to_num(image, nan=0.0).split(4):  # responses of many images at once do not fit a cache
            responses = F.conv2d(one, self.filters).flatten(2)
            positive = responses.clamp_min(0).mean(2)
            vectors.append(torch.cat([positive, positive - responses.mean(2)], 1))
        return torch.cat(vectors)

    def fingerprint(self) -> str:
        """A hash of the filters."""
        return hashlib.sha256(self.filters.cpu().numpy().tobytes()).hexdigest()


def draw_patches(
    labelled: LabelledSet, standardise: BandStandardise, train: Sequence[int], seed: int, num: int = _NUM_SAMPLED
) -> Tensor:
    """[num, B, 3, 3] standardised patches at random places of random training images, no data as 0.

    Raises DatasetError for images smaller than a patch.
    """
    rng = np.random.default_rng([seed, 3])
    images = rng.choice(np.asarray(train), num)
    places = rng.random((num, 2))
    patches: list[Tensor | None] = [None] * num
    for index in np.unique(images):
        image = standardise(labelled.image(int(index)))[0]
        room = torch.tensor(image.shape[1:]) - _PATCH_SIDE + 1
        if int(room.min()) < 1:
            raise DatasetError(
                f"{labelled.sample_id(int(index))}: an image of {image.shape[1]} x {image.shape[2]} px is smaller than the "
                "3 px of random convolutions; take random_convolutions out of probe.baselines"
            )
        for at in np.flatnonzero(images == index):
            row, column = (int(place * size) for place, size in zip(places[at], room.tolist(), strict=True))
            patches[at] = image[:, row : row + _PATCH_SIDE, column : column + _PATCH_SIDE]
    return torch.nan_to_num(torch.stack(patches), nan=0.0)
