"""Errors of a chunk of logits and their gradient in PyTorch: the CPU's form and the kernels' oracle.

Shapes as in `mpmae.kernels.heads.targets`; n samples of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mpmae.kernels.dtypes import accumulator
from mpmae.kernels.heads.targets import NORM_EPS, Targets


class Errors:
    """Sums the errors of chunks of logits; the arithmetic is float32, or float64 for float64 logits."""

    def __init__(self, targets: Targets, dtype: torch.dtype, chunk_samples: int):
        self.targets = targets
        self.wide = accumulator(dtype)
        self.total = torch.zeros((), dtype=self.wide, device=targets.hidden.device)

    def add(self, logits: Tensor, first: int, gain: float | None) -> None:
        """Adds the mean errors of the samples from `first` on; their logits [n*M, P*C] become gradients times `gain`.

        Without a gain they stay as they are.
        """
        targets = self.targets
        part = slice(first, first + len(logits) // targets.hidden.shape[1])
        target, valid = (_pack(image[part], targets, part) for image in (targets.values, targets.valid))
        valid = valid & (target >= 0 if targets.num_classes else target.isfinite()) & targets.counted[part, None, None, None]
        target = torch.where(valid, target, 0)
        per_value = 1 / valid.flatten(1).sum(1).clamp(min=1).to(self.wide)[:, None, None, None]
        logits = logits.view(*target.shape[:3], -1)
        errors = _class_errors if targets.num_classes else _squared_errors
        error, gradient = errors(logits.to(self.wide), target, valid, targets.normalise, gain is not None)
        self.total += (error * per_value).sum()
        if gain is not None:
            torch.mul(gradient, per_value * gain, out=logits)

    def sum(self) -> Tensor:
        """The scalar sum over everything added."""
        return self.total


def _squared_errors(pred: Tensor, target: Tensor, valid: Tensor, normalise: bool, with_gradient: bool):
    target = target.to(pred.dtype)
    if normalise:
        count = valid.sum((2, 3), keepdim=True)
        mean = target.sum((2, 3), keepdim=True) / count.clamp(min=1)
        away = torch.where(valid, target - mean, 0)
        variance = away.square().sum((2, 3), keepdim=True) / (count - 1).clamp(min=1)
        target = away * (variance + NORM_EPS).rsqrt()
    away = torch.where(valid, pred - target, 0)
    return away.square(), away.mul_(2) if with_gradient else None


def _class_errors(pred: Tensor, target: Tensor, valid: Tensor, normalise: bool, with_gradient: bool):
    log_shares = F.log_softmax(pred, -1)
    error = torch.where(valid, -log_shares.gather(-1, target.long()), 0)
    if not with_gradient:
        return error, None
    gradient = log_shares.exp_()
    gradient.scatter_add_(-1, target.long(), gradient.new_full((), -1.0).expand_as(target))
    return error, torch.where(valid, gradient, 0)


def _pack(image: Tensor, targets: Targets, part: slice) -> Tensor:
    """The pixels of the hidden patches, row by row: [n, M, P, C]."""
    size, hidden = targets.patch_size, targets.hidden[part]
    side = image.shape[-1] // size
    tiles = image.reshape(*image.shape[:2], side, size, side, size)
    sample = torch.arange(len(image), device=image.device)[:, None]
    chosen = tiles[sample, :, hidden // side, :, hidden % side]
    if targets.bands is not None:
        chosen = chosen.index_select(2, targets.bands)
    return chosen.permute(0, 1, 3, 4, 2).flatten(2, 3)
