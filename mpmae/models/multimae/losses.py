"""Losses of the output domains, as this micro batch's share of the loss of the global batch.

Shapes: N samples, L patches, Q values of a patch (C*P*P, channel slowest), P side of a patch in pixels of the domain.

Default reduction: per sample the mean over the valid values of the domain's hidden patches, per domain the sum over samples
divided by the number of tiles of the GLOBAL batch that have the domain's modality. A sample without such values contributes
0 and no gradient. So the shares of all micro batches and ranks add up to the loss of the global batch, however it is cut.

What `quirks` does instead, after the published code (multimae-meets-eo, `criterion.py`): every value counts, data or not,
and the samples' means are averaged over the samples of the local micro batch that have a hidden patch; the share is that
mean times the micro batch's part of the global batch. A sample whose domain is fully visible drops out of that mean, but its
gradient is 0/0, NaN; a micro batch without any hidden patch has a loss of 0 and no gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mpmae.domains import Domain
from mpmae.models.losses import normalise_patches


def domain_share(
    domain: Domain,
    pred: Tensor,
    target: Tensor,
    valid: Tensor,
    hidden: Tensor,
    counted: Tensor,
    *,
    num_present: int,
    global_batch_size: int,
    norm_pix: bool = False,
    quirks: bool = False,
) -> Tensor:
    """The unweighted share of one domain's loss: a scalar, connected to `pred`.

    pred: [N, L, Q]. target: [N, L, Q], or class ids int64 [N, L, P*P]. valid: bool, its shape. hidden: bool [N, L].
    counted: bool [N], False for padding samples. num_present: tiles of the global batch that have the modality.
    norm_pix: the target is normalised per patch over its valid values (unbiased variance, 1e-6 added).
    The arithmetic is float32, or float64 for a float64 prediction.
    """
    with torch.autocast(pred.device.type, enabled=False):
        if pred.dtype != torch.float64:
            pred = pred.float()
        errors = _errors(domain, pred, target, valid, norm_pix)
        weight = (valid & hidden[:, :, None]).to(errors.dtype)
        total, num = (errors * weight).flatten(1).sum(1), weight.flatten(1).sum(1)
        if quirks:
            return _local_mean(total, num, counted) * (counted.sum().to(errors.dtype) / global_batch_size)
        total = torch.where(counted, total / num.clamp(min=1), 0).sum()
        return total / num_present if num_present else total * 0


def _errors(domain: Domain, pred: Tensor, target: Tensor, valid: Tensor, norm_pix: bool) -> Tensor:
    """[N, L, Q], of class ids [N, L, P*P]: 0 where nothing is valid."""
    if domain.loss == "classes":
        logits = pred.unflatten(2, (domain.num_classes, -1)).permute(0, 3, 1, 2)  # [N, P*P, L, classes]
        ids = torch.where(valid, target, 0).permute(0, 2, 1)
        errors = F.cross_entropy(logits.flatten(0, 2), ids.flatten(), reduction="none").view(ids.shape)
        return errors.permute(0, 2, 1)
    target = target.to(pred.dtype)
    if norm_pix:
        target = normalise_patches(target, valid)
    target = torch.where(valid, target, pred.detach())
    return (pred - target).abs() if domain.loss == "absolute" else (pred - target).square()


def _local_mean(total: Tensor, num: Tensor, counted: Tensor) -> Tensor:
    """The published code's mean over samples, NaN gradients included; padding, which is not its, leaves no trace."""
    any_hidden = (num * counted).any()
    means = total / torch.where(any_hidden & counted, num, num.clamp(min=1))
    means = torch.where(counted, means, torch.nan)
    present = counted & (num > 0)
    # sum and count apart, since the gradient of nanmean over nothing is NaN, padding or not
    return means.nansum() / present.sum().clamp(min=1)
