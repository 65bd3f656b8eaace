"""Prepared images at another size.

Shapes: N images, C channels, H x W pixels, S new side.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F


def resized(images: Tensor, side: int, class_channels: Iterable[int] = ()) -> Tensor:
    """[N, C, S, S] of images [N, C, H, W], NaN where there is no data.

    Bilinear over what is there; a pixel of which most is absent has none. Channels of class ids by nearest neighbour.
    """
    there = images.isfinite()

    def scaled(values: Tensor) -> Tensor:
        return F.interpolate(values, (side, side), mode="bilinear", antialias=True)

    if bool(there.all()):
        result = scaled(images)
    else:
        share = scaled(there.to(images.dtype))
        result = torch.where(share >= 0.5, scaled(torch.where(there, images, 0.0)) / share, math.nan)
    for channel in class_channels:
        result[:, channel] = nearest(images[:, channel], side)
    return result


def nearest(values: Tensor, side: int) -> Tensor:
    """[..., S, S] of [..., H, W] by nearest neighbour."""
    rows, columns = (((torch.arange(side) + 0.5) * length / side).long() for length in values.shape[-2:])
    return values[..., rows[:, None], columns]
