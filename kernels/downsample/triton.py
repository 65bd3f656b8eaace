"""The fast form on a GPU: one pass for LayerNorm, one for its backward, and products by cuBLAS.

Shapes and arguments as in `mpmae.kernels.downsample.reference`. One unit is one pass over [M, C] in the type of x, M = N*K;
the output is half a unit (E = 2C channels at a quarter of the sites).

    forward: LayerNorm 2, product 1.5 (with gaps 1 more for bias and zeros)                                  3.5-4.5
    backward: sums of the gradient 0.5 (with gaps 1), product 1.5, LayerNorm with its output again 4, weight 1.5    7.5-8
"""

import torch
from torch import Tensor

from mpmae.kernels.downsample.reference import Weights, taps_of, weight_of
from mpmae.kernels.pointwise import row_passes
from mpmae.kernels.pointwise.products import float32_product


def forward(
    x: Tensor, weights: Weights, valid_in: Tensor | None, valid_out: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`; x contiguous, bfloat16, float16 or float32."""
    num_samples, num_sites, num_channels = x.shape
    normed, mean, rstd = row_passes.layer_norm(
        x.view(-1, num_channels), weights.norm_weight, weights.norm_bias, valid_in, eps
    )
    rows, taps = normed.view(-1, 4 * num_channels), taps_of(weights.weight, x.dtype).t()
    if valid_out is None:
        out = torch.addmm(weights.bias.to(x.dtype), rows, taps)
    else:
        out = rows @ taps
        row_passes.add_row(out, weights.bias, valid_out, out)
    by_sample = (num_samples, num_sites)
    return out.view(num_samples, num_sites // 4, -1), mean.view(by_sample), rstd.view(by_sample)


def backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weights: Weights,
    valid_in: Tensor | None,
    valid_out: Tensor | None,
) -> tuple[Tensor, Weights]:
    """As `reference.backward`; grad and x contiguous and of one dtype."""
    num_channels = x.shape[-1]
    grad, grad_bias = row_passes.masked_sums(grad.view(-1, grad.shape[-1]), valid_out)
    pulled = (grad @ taps_of(weights.weight, x.dtype)).view(-1, num_channels)
    grad_x, grad_norm_weight, grad_norm_bias, normed = row_passes.layer_norm_backward(
        pulled, x.view(-1, num_channels), mean, rstd, weights.norm_weight, weights.norm_bias, valid_in
    )
    grad_taps = float32_product(grad.t(), normed.view(-1, 4 * num_channels))
    return grad_x.view(x.shape), Weights(grad_norm_weight, grad_norm_bias, weight_of(grad_taps), grad_bias)
