"""Losses of the reconstructed modalities, as this micro batch's share of the loss of the global batch.

Shapes: N samples, M hidden patches, Q values of a patch (p*p*C, channel fastest), P pixels of a patch (p*p), K classes or
values of a tile vector.

Default reduction: per sample the mean over its valid target values (on hidden patches), per modality the sum over samples
divided by the number of tiles of the GLOBAL batch that have the modality. The shares of all micro batches and ranks add up
to the loss of the global batch exactly, however it is cut.

What `reference_quirks=True` does instead, after the published code (MMEarth-train 1f368b3, `models/fcmae.py`;
docs/quirks.md has the whole preset with its tests):
- every loss is a mean over the values of the local micro batch; the share of a micro batch is that mean times its part of
  the global batch, so a result depends on the cut;
- continuous pixel modalities: no data is a target of 0 and counts; the mean of each patch is summed over the hidden patches
  and divided by the number of hidden patches with a non-zero loss: 0/0, NaN, when every hidden patch is predicted exactly;
- sentinel2's per-patch normalisation includes the zeros that stand for no data;
- categorical pixel modalities: the mean over all valid hidden pixels of the micro batch, NaN without any;
- continuous tile modalities: the mean over all valid entries of the micro batch, NaN without any;
- biome and eco_region: a row without data is class 0;
- uncertainty weighting drops a term (its log variance too) whose loss is exactly 0.
One NaN term makes the total NaN. A mean over nothing has no gradient itself, but its log variance gets NaN; 0/0 gives NaN
gradients everywhere. A micro batch of nothing but padding has a loss of 0 all the same: padding is not the published code's.
Not reproduced: it takes the size of the dense grid from the sites that exist, and so crashes when the last row or column of
patches is hidden in every sample. What it reads as data although it is not (int16 aster -32768, int8 canopy height 127) is
decided by the loader, before this module: `mpmae.modalities.no_data_rule`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mpmae.modalities import ModalitySpec

PATCH_NORM_EPS = 1e-6


def patch_statistics(target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance [..., 1] of each patch of `target` [..., Q] over the values marked in `valid` (bool).

    1e-6 is added to the variance, so that it is never 0. Not valid values of `target` must be finite.
    """
    weight = valid.to(target.dtype)
    count = weight.sum(-1, keepdim=True)
    mean = (target * weight).sum(-1, keepdim=True) / count.clamp(min=1)
    variance = ((target - mean).square() * weight).sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return mean, variance + PATCH_NORM_EPS


def is_normalised(spec: ModalitySpec, norm_pix: bool) -> bool:
    """Whether the target patches of a modality are normalised: those of sentinel2, if `norm_pix`."""
    return norm_pix and spec.name == "sentinel2"


def normalise_patches(target: Tensor, valid: Tensor) -> Tensor:
    """`target` [N, M, Q] per patch with mean 0 and variance 1 by `patch_statistics` (valid: bool [N, M, Q]).

    Values that are not valid come out meaningless but finite.
    """
    mean, variance = patch_statistics(target, valid)
    return (target - mean) * variance.rsqrt()


def modality_share(
    spec: ModalitySpec,
    pred: Tensor,
    target: Tensor,
    valid: Tensor,
    counted: Tensor,
    *,
    num_present: int,
    global_batch_size: int,
    norm_pix: bool,
    quirks: bool,
) -> Tensor:
    """The unweighted share of one modality's loss: a scalar, connected to `pred`; 0 when nothing is valid (quirk: NaN).

    pred: pixel [N, M, Q], tile [N, K]. target: like pred, or class ids int64 [N, M, P] / [N]. valid: bool, shape of target.
    counted: bool [N], False for padding samples. num_present: tiles of the global batch that have the modality.
    The arithmetic is float32, or float64 for a float64 prediction. `blocks.head_loss` computes the same from a pixel head's
    input, without the quirks.
    """
    with torch.autocast(pred.device.type, enabled=False):
        if pred.dtype != torch.float64:
            pred = pred.float()
        categorical = spec.kind == "categorical"
        errors = (_class_errors if categorical else _squared_errors)(spec, pred, target, valid, norm_pix, quirks)
        if quirks and (spec.one_hot or (spec.scope == "pixel" and not categorical)):
            valid = torch.ones_like(valid)
        weight = (valid & counted.view(-1, *[1] * (valid.ndim - 1))).to(errors.dtype)
        errors = errors * weight
        if quirks:
            return _local_mean(spec, errors, weight, counted) * (counted.sum().to(errors.dtype) / global_batch_size)
        per_sample = errors.reshape(len(errors), -1).sum(1) / weight.reshape(len(errors), -1).sum(1).clamp(min=1)
        return per_sample.sum() / num_present if num_present else per_sample.sum() * 0


def _squared_errors(spec: ModalitySpec, pred: Tensor, target: Tensor, valid: Tensor, norm_pix: bool, quirks: bool) -> Tensor:
    target = torch.where(valid, target, 0).to(pred.dtype)
    if is_normalised(spec, norm_pix):
        target = normalise_patches(target, torch.ones_like(valid) if quirks else valid)
    if not quirks or spec.scope == "tile":
        target = torch.where(valid, target, pred.detach())  # keeps an error there from overflowing into 0 * inf
    return (pred - target).square()


def _class_errors(spec: ModalitySpec, pred: Tensor, target: Tensor, valid: Tensor, norm_pix: bool, quirks: bool) -> Tensor:
    target = torch.where(valid, target, 0)
    logits = pred.reshape(-1, spec.num_classes)
    return F.cross_entropy(logits, target.flatten(), reduction="none").view(target.shape)


def _local_mean(spec: ModalitySpec, errors: Tensor, weight: Tensor, counted: Tensor) -> Tensor:
    """The published code's mean; NaN where it divides by 0, unless all samples are padding."""
    if spec.scope == "pixel" and spec.kind == "continuous":
        per_patch = errors.mean(-1)
        return per_patch.sum() / torch.where(counted.any(), (per_patch != 0).sum(), 1)
    count = weight.sum()
    nothing = torch.where(counted.any() & (count == 0), torch.nan, 0.0)  # added, so that the gradient stays 0
    return errors.sum() / count.clamp(min=1) + nothing


def weigh(
    shares: dict[str, Tensor],
    log_vars: Tensor | None,
    counted: Tensor,
    *,
    num_present: dict[str, int],
    global_batch_size: int,
    quirks: bool,
) -> Tensor:
    """The share of the training loss: a scalar from the unweighted shares of the modalities.

    log_vars: [number of modalities], s_i in the order of `shares`; None for the plain sum. With them the loss is
    sum_i exp(-s_i) L_i + s_i (Kendall, Gal, Cipolla, "Multi-task learning using uncertainty", CVPR 2018, in the published
    code's form). This share holds each s_i by its samples' part of the global batch; an s_i drops out when no tile of the
    global batch has the modality (quirk: when the loss is exactly 0). The rest as in `modality_share`.
    """
    losses = torch.stack(list(shares.values()))
    if log_vars is None:
        return losses.sum()
    part = counted.sum().to(losses.dtype) / global_batch_size
    if quirks:
        parts = part * (losses.detach() != 0)
    else:
        parts = torch.stack([part if num_present[name] else torch.zeros_like(part) for name in shares])
    log_vars = log_vars.to(losses.dtype)
    return ((-log_vars).exp() * losses + log_vars * parts).sum()
