"""Submanifold depthwise convolution in PyTorch: a convolution of the zero-filled grid, read at the packed sites.

Shapes as in `mpmae.kernels`; R = kernel side (odd). Source of the semantics: Graham and van der Maaten, "Submanifold sparse
convolutional networks", arXiv 1706.01307.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor | None, grid_side: int) -> Tensor:
    """Depthwise convolution of the packed sites: [N, K, C], a missing neighbour contributing 0.

    x: [N, K, C]; sites that do not exist must hold 0, and what comes out at them means nothing. weight: [C, 1, R, R], bias:
    [C]. index: int64 [N, K] from `site_index`; None says that x is the whole grid in raster order, K = H*H. grid_side: H.
    Under autocast the computation runs in autocast's dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (t if t.dtype == torch.float64 else t.to(dtype) for t in (x, weight, bias))
    return _forward(x, weight, bias, index, grid_side)


def _grid(x: Tensor, index: Tensor | None, grid_side: int) -> Tensor:
    """The grid as a channels-last [N, C, H, H] view."""
    if index is None:
        grid = x.reshape(x.shape[0], grid_side, grid_side, x.shape[-1])
    else:
        grid = torch.ops.mpmae.unpack_sites(x, index, grid_side)
    return grid.permute(0, 3, 1, 2)


def _sites(grid: Tensor, index: Tensor | None) -> Tensor:
    grid = grid.permute(0, 2, 3, 1)
    # an output of a custom op may not alias its inputs or be a view of a hidden buffer with other strides
    return grid.flatten(1, 2).contiguous() if index is None else torch.ops.mpmae.pack_sites(grid, index)


@torch.library.custom_op("mpmae::depthwise_conv", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor | None, grid_side: int) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        padding = weight.shape[-1] // 2
        out = F.conv2d(_grid(x, index, grid_side), weight, bias, padding=padding, groups=weight.shape[0])
        return _sites(out, index)


@_forward.register_fake
def _(x, weight, bias, index, grid_side):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("mpmae::depthwise_conv_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, index: Tensor | None, grid_side: int
) -> tuple[Tensor, Tensor, Tensor]:
    padding, channels = weight.shape[-1] // 2, weight.shape[0]
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        _grid(grad, index, grid_side), _grid(x, index, grid_side), weight,
        None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], channels, [True, True, False],
    )  # fmt: skip
    # DDP's buckets want the weight's own strides; a channels-last convolution gives others to the dimension of size 1,
    # where `contiguous` sees no difference
    return _sites(grad_x, index), torch.empty_like(weight).copy_(grad_weight), grad.sum((0, 1))


@_backward.register_fake
def _(grad, x, weight, index, grid_side):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight),
        weight.new_empty(weight.shape[0]),
    )


def _setup(ctx, inputs, output):
    x, weight, _, index, ctx.grid_side = inputs
    ctx.save_for_backward(x, weight, index)


def _autograd(ctx, grad):
    x, weight, index = ctx.saved_tensors
    return *_backward(grad, x, weight, index, ctx.grid_side), None, None


_forward.register_autograd(_autograd, setup_context=_setup)
