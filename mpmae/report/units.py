"""From normalised values back to the units of a modality.

Shapes: C bands, G patches per side, p patch side in pixels, H = G * p image side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mpmae.models.losses import patch_statistics
from mpmae.shard_format import Manifest

NORM_NOTE = (
    "The model predicts each patch up to its brightness and contrast (per-patch normalised targets); "
    "the picture borrows both from the target."
)


@dataclass
class Scale:
    """Brings one modality's normalised values back to raw units: float32 [C] each."""

    mean: np.ndarray
    std: np.ndarray

    def raw(self, values: np.ndarray) -> np.ndarray:
        """Raw units of normalised `values` [C, ...]."""
        axes = (slice(None), *[None] * (values.ndim - 1))
        return values * self.std[axes] + self.mean[axes]


def scale_of(manifest: Manifest, name: str, level: str, order: Sequence[int] | None = None) -> Scale:
    """The scale of a modality of a tile of this product level; `order`: positions of its bands, None for all."""
    stats = manifest.band_stats[f"{name}_{level}" if name == "sentinel2" else name]
    mean, std = (np.asarray(values, np.float32) for values in (stats.mean, stats.std))
    return Scale(mean, std) if order is None else Scale(mean[list(order)], std[list(order)])


def denormalise_patches(image: torch.Tensor, target: torch.Tensor, valid: torch.Tensor, patch_size: int) -> torch.Tensor:
    """`image` [C, H, H] in per-patch normalised units, given the mean and spread of each patch of `target` over its valid
    values (see `mpmae.models.losses.normalise_patches`)."""

    def patches(x: torch.Tensor) -> torch.Tensor:  # [G, G, p*p*C]
        return x.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size)).permute(1, 3, 0, 2, 4).flatten(2)

    mean, variance = (x.squeeze(-1) for x in patch_statistics(patches(torch.where(valid, target, 0)), patches(valid)))
    grow = torch.ones(patch_size, patch_size)
    return image * torch.kron(variance.sqrt(), grow) + torch.kron(mean, grow)
