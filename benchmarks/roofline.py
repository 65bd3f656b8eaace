"""The least that an operator must do: bytes through device memory and operations, counted by hand.

Each input is read once and each output written once, and again only where no order of the work could spare it (the norm of
GRN covers all sites of a sample, so what follows it is a second pass). Index tables are left out: a few bytes a tile.

Shapes: N samples, V visible patches, G patches on a side of the image, s sites on a side of a tile, M = N*V*s*s sites of a
micro batch, C channels, D = 4C hidden channels, p patch side in pixels, B bands, R hidden patches of a micro batch, Q
outputs of a patch. An item is one number of an activation (2 bytes in bf16); parameters and their gradients are float32.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TAPS = 49
PARAMETER_BYTES = STATISTIC_BYTES = 4


class Work(NamedTuple):
    """num_bytes: through device memory. matrix_flops: on the matrix units. vector_flops: of depthwise convolutions."""

    num_bytes: int
    matrix_flops: int = 0
    vector_flops: int = 0

    def floor_s(self, bytes_per_s: float, flops_per_s: float) -> float:
        """Seconds that no implementation gets below at these measured rates."""
        return max(self.num_bytes / bytes_per_s, self.matrix_flops / flops_per_s)

    def bound(self, bytes_per_s: float, flops_per_s: float) -> str:
        """Which of the two sets the floor: "memory" or "matrix"."""
        return "memory" if self.num_bytes / bytes_per_s >= self.matrix_flops / flops_per_s else "matrix"


def added(parts: Iterable[Work]) -> Work:
    """The work of several operators that share nothing."""
    return Work(*map(sum, zip(*parts, strict=True)))


def active_taps(visible: Tensor, num_patches_side: int, tile_side: int) -> float:
    """Mean number of the 49 taps of a visible site that meet a visible site; `visible` int64 [N, V] on any device."""
    side = num_patches_side
    shown = torch.zeros(len(visible), side * side, device=visible.device).scatter(1, visible, 1.0).view(-1, 1, side, side)
    grid = shown.repeat_interleave(tile_side, 2).repeat_interleave(tile_side, 3)
    met = F.conv2d(grid, torch.ones(1, 1, 7, 7, device=visible.device), padding=3)
    return float((met * grid).sum(dtype=torch.float64) / grid.sum(dtype=torch.float64))


def depthwise_forward(num_sites: int, channels: int, item_bytes: int, taps: float = TAPS) -> Work:
    """7x7 convolution of M sites: x in, y out; `taps` is the mean number that meet a site."""
    parameters = (TAPS + 1) * channels * PARAMETER_BYTES
    return Work(2 * num_sites * channels * item_bytes + parameters, 0, round(2 * taps * num_sites * channels))


def depthwise_input_grad(num_sites: int, channels: int, item_bytes: int, taps: float = TAPS, residual: bool = False) -> Work:
    """Its input gradient: grad_y in, grad_x out; `residual`: another gradient is read and added."""
    activations = (3 if residual else 2) * num_sites * channels * item_bytes
    parameters = TAPS * channels * PARAMETER_BYTES
    return Work(activations + parameters, 0, round(2 * taps * num_sites * channels))


def depthwise_weight_grad(num_sites: int, channels: int, item_bytes: int, taps: float = TAPS) -> Work:
    """Its weight and bias gradient: grad_y and x in, 50 numbers a channel out."""
    return depthwise_forward(num_sites, channels, item_bytes, taps)


def pointwise_forward(num_sites: int, channels: int, item_bytes: int) -> Work:
    """LayerNorm, Linear, GELU, GRN, Linear, residual.

    y, the residual and the output: 3C items a site. h is written, and read again once its norm is known; GELU's slope is
    written for the backward: 3D. Mean and rstd of LayerNorm: two float32. Two products of 2CD operations a site.
    """
    hidden = 4 * channels
    activations = num_sites * ((3 * channels + 3 * hidden) * item_bytes + 2 * STATISTIC_BYTES)
    return Work(activations + _pointwise_parameters(channels), 4 * num_sites * channels * hidden)


def pointwise_backward(num_sites: int, channels: int, item_bytes: int) -> Work:
    """Its backward: gradients of y and of all parameters.

    grad and h are read once for the gradient of GRN's norm, then grad, y, h and the slope for everything else; grad_y is
    written: 4C + 3D items a site. Four products of 2CD operations: grad_z, grad_n and the two weights.
    """
    hidden = 4 * channels
    activations = num_sites * ((4 * channels + 3 * hidden) * item_bytes + 2 * STATISTIC_BYTES)
    return Work(activations + 2 * _pointwise_parameters(channels), 8 * num_sites * channels * hidden)


def _pointwise_parameters(channels: int) -> int:
    hidden = 4 * channels
    return (2 * channels * hidden + 3 * channels + 3 * hidden) * PARAMETER_BYTES


def stem_forward(
    num_patches: int, patch_size: int, num_bands: int, channels: int, item_bytes: int, pixel_bytes: int
) -> Work:
    """3x3 convolution at full resolution, LayerNorm, GELU, depthwise pooling to 64 sites a patch, LayerNorm.

    num_patches: N*V. pixel_bytes: size of a number of the image. The image is read at visible patches; in between everything
    stays on the chip.
    """
    pixels = num_patches * patch_size**2
    activations = pixels * num_bands * pixel_bytes + num_patches * 64 * channels * item_bytes
    parameters = (9 * num_bands + patch_size**2 // 64 + 6) * channels * PARAMETER_BYTES
    return Work(activations + parameters, 18 * num_bands * channels * pixels, 2 * channels * pixels)


def stem_backward(
    num_patches: int, patch_size: int, num_bands: int, channels: int, item_bytes: int, pixel_bytes: int
) -> Work:
    """Its backward, recomputing the forward: image and output gradient in, parameter gradients out.

    The convolution runs again and once more for its weight; the pooling again, for its input and for its weight.
    """
    forward = stem_forward(num_patches, patch_size, num_bands, channels, item_bytes, pixel_bytes)
    parameters = (9 * num_bands + patch_size**2 // 64 + 6) * channels * PARAMETER_BYTES
    return Work(forward.num_bytes + parameters, 2 * forward.matrix_flops, 3 * forward.vector_flops)


def downsample_forward(num_sites: int, channels_in: int, channels_out: int, item_bytes: int) -> Work:
    """LayerNorm and a 2x2 convolution of stride 2: M sites in, M/4 out, one product of [M/4, 4C] and [4C, C_out]."""
    activations = num_sites * channels_in + num_sites // 4 * channels_out
    parameters = 4 * channels_in * channels_out + channels_out + 2 * channels_in
    return Work(
        activations * item_bytes + parameters * PARAMETER_BYTES, 2 * (num_sites // 4) * 4 * channels_in * channels_out
    )


def downsample_backward(num_sites: int, channels_in: int, channels_out: int, item_bytes: int) -> Work:
    """Its backward: x and the output's gradient in, the input's and the parameters' gradients out; two products."""
    activations = 2 * num_sites * channels_in + num_sites // 4 * channels_out
    parameters = 2 * 4 * channels_in * channels_out + channels_out + 4 * channels_in
    return Work(
        activations * item_bytes + parameters * PARAMETER_BYTES, 4 * (num_sites // 4) * 4 * channels_in * channels_out
    )


def heads_step(num_patches: int, dim: int, num_outputs: int, item_bytes: int, target_bytes: int) -> Work:
    """Linear heads at R hidden patches and their masked losses, forward and backward at once, with no logits in memory.

    dim: channels of the decoder. target_bytes: all targets and their validity at these patches. The features are read and
    their gradient is written; three products: the logits, the gradients of the features and of the heads.
    """
    parameters = 2 * (dim + 1) * num_outputs * PARAMETER_BYTES
    return Work(2 * num_patches * dim * item_bytes + target_bytes + parameters, 6 * num_patches * dim * num_outputs)
