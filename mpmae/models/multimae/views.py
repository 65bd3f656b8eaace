"""Domains of a batch: their values in the model's units, cut into patches and put together again.

Shapes: N samples, C channels, S image side in pixels, H side of a domain's map (S / its stride).
Source: "MultiMAE meets Earth Observation", arXiv 2505.14951; multimae-meets-eo, `dataset_folder.py`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mpmae.domains import Domain
from mpmae.loader.batch import Batch

DEPTH_EPS = 1e-6


class View(NamedTuple):
    """A domain of a batch.

    values: [N, C, H, H], finite, 0 where there is no data; or class ids int64 [N, H, H], the last class where there is none.
    valid: bool, the shape of the values.
    """

    values: Tensor
    valid: Tensor


def view_of(domain: Domain, batch: Batch, bands: Tensor | None, dtype: torch.dtype, quirks: bool = False) -> View:
    """The domain's values and validity in a batch.

    bands: positions of the domain's bands in the batch's tensor; None when it holds just these. dtype: of the values.
    A class map is taken at the pixel next to the middle of each cell of `stride` pixels.
    quirks: everything is valid; no data is class 0, and the depth's truncated statistics count it; class ids are averaged
    over the four middle pixels of a cell and cut to whole numbers.
    """
    values, valid = batch.values[domain.modality], batch.valid[domain.modality]
    if domain.loss == "classes":
        return _class_view(domain, values[:, 0], valid[:, 0], quirks)
    if bands is not None:
        values, valid = (t.index_select(1, bands) for t in (values, valid))
    valid = valid & values.isfinite()
    values = torch.where(valid, values, 0).to(dtype)
    if quirks:
        valid = torch.ones_like(valid)
    if domain.standardise:
        values = standardise_truncated(values, valid)
    return View(values, valid)


def _class_view(domain: Domain, ids: Tensor, valid: Tensor, quirks: bool) -> View:
    step = domain.stride
    if quirks:
        known = torch.where(valid, ids, 0).clamp(min=0)
        resized = F.interpolate(known[:, None].float(), scale_factor=1 / step, mode="bilinear", align_corners=False)
        return View(resized[:, 0].long(), torch.ones_like(resized[:, 0], dtype=torch.bool))
    middle = slice(step // 2, None, step)
    ids, valid = (t[:, middle, middle] for t in (ids, valid))
    valid = valid & (ids >= 0)
    return View(torch.where(valid, ids, domain.num_classes - 1), valid)


def standardise_truncated(values: Tensor, valid: Tensor) -> Tensor:
    """`values` [N, C, H, H] per sample minus the mean over the deviation of `truncated_statistics`; 0 where not `valid`."""
    mean, deviation = truncated_statistics(values, valid)
    return torch.where(valid, ((values.flatten(1) - mean) / deviation).view_as(values), 0)


def truncated_statistics(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(variance + 1e-6), [N, 1], of each sample's values [N, C, H, H] between its 10 % and its 90 %.

    Only values marked in `valid` (bool) are ranked. The variance is the unbiased one.
    Source: multimae-meets-eo, `engine_pretraining.py`.
    """
    flat, present = values.flatten(1), valid.flatten(1)
    ranked = torch.where(present, flat, torch.inf).sort(dim=1).values
    count = present.sum(1, keepdim=True)
    first, end = count // 10, torch.maximum(9 * count // 10, count // 10 + (count > 0))
    rank = torch.arange(flat.shape[1], device=flat.device)
    inside = (rank >= first) & (rank < end)
    ranked, num = torch.where(inside, ranked, 0), (end - first).clamp(min=1)
    mean = ranked.sum(1, keepdim=True) / num
    square = torch.where(inside, ranked - mean, 0).square().sum(1, keepdim=True)
    return mean, (square / (num - 1).clamp(min=1) + DEPTH_EPS).sqrt()


def patches_of(values: Tensor, side: int) -> Tensor:
    """[N, L, C*P*P], channel slowest, of the `side` x `side` = L patches of a map [N, C, H, H], P = H / side."""
    num, channels, height, _ = values.shape
    patch = height // side
    grid = values.reshape(num, channels, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
    return grid.reshape(num, side * side, channels * patch * patch)


def map_of(patches: Tensor, num_channels: int, side: int) -> Tensor:
    """The map [N, C, H, H] of its patches [N, L, C*P*P]: the inverse of `patches_of`."""
    patch = int((patches.shape[2] // num_channels) ** 0.5)
    grid = patches.reshape(len(patches), side, side, num_channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(len(patches), num_channels, side * patch, side * patch)
