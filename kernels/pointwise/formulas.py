"""Forward and backward of the pointwise half of a ConvNeXt V2 block, written out in PyTorch.

What the fused kernels compute, step by step: their oracle, and their form on a CPU.

Shapes as in `mpmae.kernels`; D = 4C hidden channels, S = N norms of GRN with scope "sample", 1 with scope "batch".
Source: Woo et al., "ConvNeXt V2", arXiv 2301.00808, section 3 and appendix A (GRN); the backward is derived from it.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mpmae.kernels.dtypes import accumulator

GELUS = ("erf", "tanh", "poly")
# the normal CDF as 1/2 + u Q(u^2), u within +-CDF_CUT; Q from the highest power down, by fit_normal_cdf.py
CDF_CUT = 4.0
CDF_COEFFICIENTS = (
    -5.932922630e-10,
    6.111105033e-08,
    -2.604967780e-06,
    6.171437460e-05,
    -9.181253198e-04,
    9.198536975e-03,
    -6.541736100e-02,
    3.984744487e-01,
)


class Weights(NamedTuple):
    """The parameters of the half block, or their gradients.

    norm_*: C values, of LayerNorm. weight1: [D, C], bias1: D values. grn_*: D values (any shape). weight2: [C, D], bias2: C.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    weight1: Tensor
    bias1: Tensor
    grn_gamma: Tensor
    grn_beta: Tensor
    weight2: Tensor
    bias2: Tensor


class Options(NamedTuple):
    """scope: "sample" or "batch", over which sites GRN takes its norm. gelu: one of GELUS."""

    scope: str
    norm_eps: float
    grn_eps: float
    gelu: str = "erf"


class Saved(NamedTuple):
    """What the backward needs beside its inputs.

    mean, rstd: [N, K], of LayerNorm. h: [N, K, D], GELU's output, 0 at sites that do not exist. slope: [N, K, D], GELU's
    derivative, 0 there too. norm: [S, D], GRN's L2 norms. mean, rstd and norm are float32 at least.
    """

    mean: Tensor
    rstd: Tensor
    h: Tensor
    slope: Tensor
    norm: Tensor


def gelu_and_slope(a: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """GELU of `a` and its derivative there; kind: "erf" (exact), "tanh" (its usual approximation) or "poly".

    Errors against "erf" at most: "tanh" 4.8e-4 (slope 8.7e-4); "poly", whose CDF is a fitted polynomial, 1.3e-4 (1.3e-4).
    Source: Hendrycks and Gimpel, arXiv 1606.08415.
    """
    if kind == "poly":
        cdf = _fitted_cdf(a)
        return a * cdf, cdf + a * torch.exp(-0.5 * a.square()) / math.sqrt(2 * math.pi)
    approximate = {"erf": "none", "tanh": "tanh"}[kind]
    slope = torch.ops.aten.gelu_backward(a.new_ones(()).expand_as(a), a, approximate=approximate)
    return F.gelu(a, approximate=approximate), slope


def _fitted_cdf(a: Tensor) -> Tensor:
    u = a.clamp(-CDF_CUT, CDF_CUT)
    q = torch.zeros_like(a)
    for coefficient in CDF_COEFFICIENTS:
        q = q * u.square() + coefficient
    return 0.5 + u * q


def grn_factors(norm: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of the norms plus eps [S, 1], the relative norm Nx [S, D] and the factor 1 + gamma * Nx [S, D]."""
    mean = norm.mean(-1, keepdim=True) + eps
    relative = norm / mean
    return mean, relative, 1 + gamma.flatten().to(norm.dtype) * relative


def forward(residual: Tensor, y: Tensor, weights: Weights, valid: Tensor | None, options: Options) -> tuple[Tensor, Saved]:
    """residual + Linear2(GRN(GELU(Linear1(LayerNorm(y))))): [N, K, C], 0 at sites that do not exist.

    residual, y: [N, K, C] of one dtype, in which the products run. valid: bool [N, K], None when all sites exist.
    """
    wide = accumulator(y.dtype)
    normed, mean, rstd = torch.native_layer_norm(y.to(wide), y.shape[-1:], *_norm(weights, wide), options.norm_eps)
    a = F.linear(normed.to(y.dtype), weights.weight1.to(y.dtype), weights.bias1.to(y.dtype))
    h, slope = gelu_and_slope(a.to(wide), options.gelu)
    if valid is not None:
        h, slope = (torch.where(valid[:, :, None], t, 0) for t in (h, slope))
    h, slope = h.to(y.dtype), slope.to(y.dtype)
    dims = 1 if options.scope == "sample" else (0, 1)
    norm = h.to(wide).square().sum(dims).sqrt().reshape(-1, h.shape[-1])
    z = _responses(h, norm, weights, options)
    out = residual + F.linear(z, weights.weight2.to(y.dtype), weights.bias2.to(y.dtype))
    if valid is not None:
        out = torch.where(valid[:, :, None], out, 0)
    return out, Saved(mean[:, :, 0], rstd[:, :, 0], h, slope, norm)


def backward(
    grad: Tensor, y: Tensor, weights: Weights, saved: Saved, valid: Tensor | None, options: Options
) -> tuple[Tensor, Weights]:
    """The gradient of `y` [N, K, C], 0 at sites that do not exist, and of the weights (float32 at least, flat or matrices).

    grad: of the output [N, K, C]; what it holds at sites that do not exist means nothing. The residual's gradient is `grad`.
    """
    wide, dtype = accumulator(y.dtype), y.dtype
    if valid is not None:
        grad = torch.where(valid[:, :, None], grad, 0)
    mean_norm, relative, factor = grn_factors(saved.norm, weights.grn_gamma, options.grn_eps)
    grad_sum = grad.to(wide).sum((0, 1))
    grad_z = grad @ weights.weight2.to(dtype)
    dims = 1 if options.scope == "sample" else (0, 1)
    product = (grad_z * saved.h).sum(dims, dtype=wide).reshape(saved.norm.shape)
    pull = grn_pull(product, saved.norm, mean_norm, weights.grn_gamma)
    grad_a = grad_z.mul_(factor[:, None].to(dtype)).addcmul_(saved.h, pull[:, None].to(dtype)).mul_(saved.slope)

    hidden = saved.h.shape[-1]
    z = _responses(saved.h, saved.norm, weights, options).reshape(-1, hidden)
    flat_grad, flat_a = grad.reshape(-1, grad.shape[-1]), grad_a.reshape(-1, hidden)
    norm = _norm(weights, wide)
    normed = F.layer_norm(y.to(wide), y.shape[-1:], *norm, options.norm_eps).to(dtype).view(flat_grad.shape)
    grad_n = (flat_a @ weights.weight1.to(dtype)).to(wide).view(y.shape)
    grad_y, grad_norm_weight, grad_norm_bias = torch.ops.aten.native_layer_norm_backward(
        grad_n, y.to(wide), y.shape[-1:], saved.mean[:, :, None], saved.rstd[:, :, None], *norm, [True] * 3
    )
    return grad_y.to(dtype), Weights(
        grad_norm_weight,
        grad_norm_bias,
        (flat_a.t() @ normed).to(wide),
        flat_a.sum(0, dtype=wide),
        (relative * product).sum(0),
        grad_sum @ weights.weight2.to(wide),
        (flat_grad.t() @ z).to(wide),
        grad_sum,
    )


def grn_pull(product: Tensor, norm: Tensor, mean: Tensor, gamma: Tensor) -> Tensor:
    """The factor of h that the gradient through the norm adds, [S, D]; 0 where the norm is 0.

    product: [S, D], sum over the sites of a norm of h times the gradient of GRN's output. mean: [S, 1], of the norms, + eps.
    """
    grad_relative = gamma.flatten().to(norm.dtype) * product
    grad_norm = grad_relative / mean - (grad_relative * norm).sum(-1, keepdim=True) / (norm.shape[-1] * mean.square())
    return torch.where(norm > 0, grad_norm / norm, 0)


def _norm(weights: Weights, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return weights.norm_weight.to(dtype), weights.norm_bias.to(dtype)


def _responses(h: Tensor, norm: Tensor, weights: Weights, options: Options) -> Tensor:
    factor = grn_factors(norm, weights.grn_gamma, options.grn_eps)[2]
    return torch.addcmul(weights.grn_beta.flatten().to(h.dtype), h, factor[:, None].to(h.dtype))
