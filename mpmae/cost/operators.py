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

TAP_SIDE = 7
TAPS = TAP_SIDE**2
PARAMETER_BYTES = STATISTIC_BYTES = 4


class Work(NamedTuple):
    """num_bytes: through device memory. matrix_flops: on the matrix units. vector_flops: of depthwise convolutions."""

    num_bytes: int
    matrix_flops: int = 0
    vector_flops: int = 0

    @property
    def flops(self) -> int:
        """All operations."""
        return self.matrix_flops + self.vector_flops

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


def expected_taps(num_visible: int, num_patches_side: int, tile_side: int) -> float:
    """What `active_taps` gives on average over all ways to show V of the G*G patches.

    A tap inside the tile meets a visible site, one outside the image meets none, and one in another tile does in
    (V - 1) / (G*G - 1) of the ways.
    """
    side, num_patches = num_patches_side * tile_side, num_patches_side**2
    other = (num_visible - 1) / max(1, num_patches - 1)
    reach = range(-(TAP_SIDE // 2), TAP_SIDE // 2 + 1)
    in_image = sum(0 <= site + tap < side for site in range(side) for tap in reach) / side
    in_tile = sum(0 <= site + tap < tile_side for site in range(tile_side) for tap in reach) / tile_side
    return in_tile**2 + other * (in_image**2 - in_tile**2)


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


# passes over [M, C] of the pointwise half, forward and backward: the least, and what the ways of kernels/pointwise take
POINTWISE_PASSES = {
    "least": (15, 16),
    "fused in one pass": (15, 16),
    "fused": (15, 25),
    "wide folded": (27, 41),
    "wide": (35, 53),
}


def pointwise_forward(num_sites: int, channels: int, item_bytes: int, way: str = "least") -> Work:
    """LayerNorm, Linear, GELU, GRN, Linear, residual; way: one of POINTWISE_PASSES.

    The least is y, the residual and the output, 3C items a site; h, which is written, and read again once its norm is known,
    and GELU's slope, which is written for the backward: 3D. Mean and rstd of LayerNorm: two float32. Two products of 2CD
    operations a site.
    """
    return _pointwise(num_sites, channels, item_bytes, POINTWISE_PASSES[way][0], 1)


def pointwise_backward(num_sites: int, channels: int, item_bytes: int, way: str = "least") -> Work:
    """Its backward: gradients of y and of all parameters.

    In the least, grad and h are read once for the gradient of GRN's norm, then grad, y, h and the slope for everything else,
    and grad_y is written: 4C + 3D items a site. Four products of 2CD operations: grad_z, grad_n and the two weights.
    """
    return _pointwise(num_sites, channels, item_bytes, POINTWISE_PASSES[way][1], 2)


def _pointwise(num_sites: int, channels: int, item_bytes: int, passes: int, times: int) -> Work:
    activations = num_sites * (passes * channels * item_bytes + 2 * STATISTIC_BYTES)
    return Work(activations + times * _pointwise_parameters(channels), times * 4 * num_sites * channels * 4 * channels)


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


def patch_stem_forward(
    num_patches: int, patch_size: int, num_bands: int, channels: int, item_bytes: int, pixel_bytes: int
) -> Work:
    """Convolution with kernel = stride = p/8 and LayerNorm, the stem of ConvNeXt; arguments as in `stem_forward`."""
    pixels = num_patches * patch_size**2
    activations = pixels * num_bands * pixel_bytes + num_patches * 64 * channels * item_bytes
    parameters = (patch_size**2 // 64 * num_bands + 3) * channels * PARAMETER_BYTES
    return Work(activations + parameters, 2 * pixels * num_bands * channels)


def patch_stem_backward(
    num_patches: int, patch_size: int, num_bands: int, channels: int, item_bytes: int, pixel_bytes: int
) -> Work:
    """Its backward: image, what LayerNorm read and the output's gradient in, the parameters' gradients out; one product."""
    forward = patch_stem_forward(num_patches, patch_size, num_bands, channels, item_bytes, pixel_bytes)
    return forward._replace(num_bytes=forward.num_bytes + num_patches * 64 * channels * item_bytes)


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


def linear_forward(num_rows: int, dim_in: int, dim_out: int, item_bytes: int) -> Work:
    """A product of [rows, dim_in] and [dim_in, dim_out], and its bias."""
    parameters = (dim_in + 1) * dim_out * PARAMETER_BYTES
    return Work(num_rows * (dim_in + dim_out) * item_bytes + parameters, 2 * num_rows * dim_in * dim_out)


def linear_backward(num_rows: int, dim_in: int, dim_out: int, item_bytes: int) -> Work:
    """Its backward: input and output's gradient in, the input's and the parameters' gradients out; two products."""
    parameters = (2 * dim_in + 1) * dim_out * PARAMETER_BYTES
    return Work(num_rows * (2 * dim_in + dim_out) * item_bytes + parameters, 4 * num_rows * dim_in * dim_out)


def attention_forward(num_queries: int, num_keys: int, dim: int, item_bytes: int) -> Work:
    """Attention of one sample, scores never in memory: queries, keys and values in, output out; two products.

    dim: of all heads together.
    """
    return Work(2 * (num_queries + num_keys) * dim * item_bytes, 4 * num_queries * num_keys * dim)


def attention_backward(num_queries: int, num_keys: int, dim: int, item_bytes: int) -> Work:
    """Its backward: queries, keys, values, output and its gradient in, three gradients out; four products."""
    return Work(4 * (num_queries + num_keys) * dim * item_bytes, 8 * num_queries * num_keys * dim)
