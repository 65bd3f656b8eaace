"""Submanifold depthwise convolution in PyTorch: a convolution of the zero-filled grid, read at the packed sites.

Shapes as in `mpmae.kernels`; R = kernel side (odd). The three functions are what every implementation offers; here R may be
any odd number, and of `slots` only the width is looked at. Gradients of parameters are float32 at least.
Source of the semantics: Graham and van der Maaten, "Submanifold sparse convolutional networks", arXiv 1706.01307.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mpmae.kernels.checks import HALO
from mpmae.kernels.dtypes import accumulator
from mpmae.kernels.layout import morton_sites, pack_sites, site_index, unpack_sites


def forward(x: Tensor, weight: Tensor, bias: Tensor, visible: Tensor, slots: Tensor, tile_side: int) -> Tensor:
    """The convolution at the packed sites: [N, K, C], of the dtype of `x`, in which it is computed.

    x: [N, K, C], 0 at sites that do not exist; what comes out at them means nothing. weight: [C, 1, R, R], bias: [C].
    visible: int64 [N, V], distinct. slots: int16 [N, G+6, G+6] of `tile_slots`.
    """
    index, grid_side = _index(x, visible, slots, tile_side)
    with torch.autocast(x.device.type, enabled=False):
        out = F.conv2d(
            _grid(x, index, grid_side),
            weight.to(x.dtype),
            bias.to(x.dtype),
            padding=weight.shape[-1] // 2,
            groups=weight.shape[0],
        )
    return _sites(out, index)


def backward_input(
    grad_y: Tensor, weight: Tensor, visible: Tensor, slots: Tensor, tile_side: int, residual: Tensor | None = None
) -> Tensor:
    """The gradient of `x` [N, K, C], plus `residual` [N, K, C] if given; grad_y: [N, K, C], 0 at sites that do not exist."""
    index, grid_side = _index(grad_y, visible, slots, tile_side)
    grad = _grid(grad_y, index, grid_side)
    # the input's shape is all that the gradient needs of it
    grad_x = _sites(_convolution_backward(grad, grad, weight.to(grad_y.dtype), (True, False, False))[0], index)
    return grad_x if residual is None else grad_x + residual


def backward_weight(
    grad_y: Tensor, x: Tensor, visible: Tensor, slots: Tensor, tile_side: int, kernel_side: int = 7
) -> tuple[Tensor, Tensor]:
    """The gradients of weight [C, 1, R, R] and bias [C]; grad_y: [N, K, C], 0 at sites that do not exist."""
    index, grid_side = _index(x, visible, slots, tile_side)
    channels, wide = x.shape[-1], accumulator(x.dtype)
    weight = x.new_empty(channels, 1, kernel_side, kernel_side)
    grids = _grid(grad_y, index, grid_side), _grid(x, index, grid_side)
    grad_weight = _convolution_backward(*grids, weight, (False, True, False))[1]
    # a channels-last convolution gives strides of its own to the dimension of size 1, where `contiguous` sees no difference
    return torch.empty_like(weight, dtype=wide).copy_(grad_weight), grad_y.sum((0, 1), dtype=wide)


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]) -> tuple:
    padding, channels = weight.shape[-1] // 2, weight.shape[0]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], channels, list(wanted)
    )


def _index(x: Tensor, visible: Tensor, slots: Tensor, tile_side: int) -> tuple[Tensor, int]:
    """Row of each site in the flattened grid, int64 [N, K], and the grid's side."""
    num_patches_side = slots.shape[-1] - 2 * HALO
    grid_side = num_patches_side * tile_side
    return site_index(visible, num_patches_side, morton_sites(tile_side, x.device)), grid_side


def _grid(x: Tensor, index: Tensor, grid_side: int) -> Tensor:
    """The grid as a channels-last [N, C, H, H] view."""
    return unpack_sites(x, index, grid_side).permute(0, 3, 1, 2)


def _sites(grid: Tensor, index: Tensor) -> Tensor:
    return pack_sites(grid.permute(0, 2, 3, 1), index)
