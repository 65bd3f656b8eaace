"""LayerNorm and 2x2 convolution of stride 2 on Morton-ordered sites in PyTorch, forward and backward written out.

Shapes as in `mpmae.kernels`; Q = K/4 sites of the coarser stage, E channels there. In Morton order the four sites under a
coarser one lie next to each other, so the convolution is a product with [Q, 4C] rows.
Source: Woo et al., "ConvNeXt V2", arXiv 2301.00808, section 3.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mpmae.kernels.dtypes import accumulator


class Weights(NamedTuple):
    """The parameters of the downsampling, or their gradients.

    norm_*: C values, of LayerNorm. weight: [E, C, 2, 2] and bias: [E], of the convolution.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    bias: Tensor


def taps_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [E, C, 2, 2] as a matrix [E, 4C] of `dtype`; row by row is Morton order for 2x2 taps."""
    return weight.to(dtype).flatten(2).transpose(1, 2).flatten(1)


def weight_of(taps: Tensor) -> Tensor:
    """The inverse of `taps_of`: contiguous [E, C, 2, 2], as DDP's buckets want it."""
    return taps.view(len(taps), 4, -1).transpose(1, 2).reshape(len(taps), -1, 2, 2).contiguous()


def forward(
    x: Tensor, weights: Weights, valid_in: Tensor | None, valid_out: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output [N, Q, E] for `x` [N, K, C], both of one dtype, and the mean and 1/deviation of each site [N, K].

    weights: may be of another dtype. valid_in, valid_out: bool [N, K] and [N, Q], None when all sites
    exist: LayerNorm's output is 0 where valid_in is False, the output is 0 where valid_out is False.
    """
    wide = accumulator(x.dtype)
    normed, mean, rstd = torch.native_layer_norm(x.to(wide), x.shape[-1:], *_norm(weights, wide), eps)
    rows = _kept(normed, valid_in).to(x.dtype).view(-1, 4 * x.shape[-1])
    flat_out = F.linear(rows, taps_of(weights.weight, x.dtype), weights.bias.to(x.dtype))
    # no view: FSDP's hook on a block's output would not survive an operation in place on one
    out = torch.ops.aten._unsafe_view(flat_out, (len(x), x.shape[1] // 4, flat_out.shape[-1]))
    return _kept(out, valid_out), mean.squeeze(-1), rstd.squeeze(-1)


def backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weights: Weights,
    valid_in: Tensor | None,
    valid_out: Tensor | None,
) -> tuple[Tensor, Weights]:
    """The gradients of x, in its dtype, and of the weights, float32 at least.

    grad: of the output [N, Q, E]; what it holds at sites that do not exist means nothing.
    """
    dtype, wide = x.dtype, accumulator(x.dtype)
    norm = _norm(weights, wide)
    grad = _kept(grad, valid_out)
    pulled = _kept((grad @ taps_of(weights.weight, dtype)).view(x.shape), valid_in).to(wide)
    statistics = mean.unsqueeze(-1), rstd.unsqueeze(-1)
    grad_x, grad_norm_weight, grad_norm_bias = torch.ops.aten.native_layer_norm_backward(
        pulled, x.to(wide), x.shape[-1:], *statistics, *norm, [True] * 3
    )
    unit = (x.to(wide) - statistics[0]) * statistics[1]
    rows = _kept(unit * norm[0] + norm[1], valid_in).to(dtype).view(-1, 4 * x.shape[-1])
    flat_grad = grad.reshape(-1, grad.shape[-1])
    grad_taps = (flat_grad.t() @ rows).to(wide)
    grad_bias = flat_grad.sum(0, dtype=wide)
    return grad_x.to(dtype), Weights(grad_norm_weight, grad_norm_bias, weight_of(grad_taps), grad_bias)


def _kept(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else torch.where(valid[:, :, None], x, 0)


def _norm(weights: Weights, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return weights.norm_weight.to(dtype), weights.norm_bias.to(dtype)
