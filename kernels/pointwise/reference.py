"""Pointwise half of a ConvNeXt V2 block in PyTorch.

Shapes as in `mpmae.kernels`; D = 4C hidden channels. Source: Woo et al., "ConvNeXt V2", arXiv 2301.00808, section 3 and
appendix A (GRN).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_DIMS = {"sample": (1,), "batch": (0, 1)}


def global_response_norm(h: Tensor, gamma: Tensor, beta: Tensor, *, scope: str, eps: float) -> Tensor:
    """Global response normalisation: gamma * (h * Nx) + beta + h, Nx = G / (mean of G over channels + eps), G = L2 norm.

    h: [N, K, D], 0 at sites that do not exist. gamma, beta: D values. scope: "sample" takes the norm over the sites of each
    sample, "batch" over all sites of the micro batch. The norm accumulates in float32 at least.
    """
    return _grn(h, gamma.flatten(), beta.flatten(), scope, eps)[0]


def _factors(h: Tensor, gamma: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of the norm plus eps, Nx and the factor 1 + gamma * Nx, in the dtype of the norm."""
    mean = norm.mean(-1, keepdim=True) + eps
    relative = norm / mean
    return mean, relative, 1 + gamma.to(norm.dtype) * relative


@torch.library.custom_op("mpmae::global_response_norm", mutates_args=())
def _grn(h: Tensor, gamma: Tensor, beta: Tensor, scope: str, eps: float) -> tuple[Tensor, Tensor]:
    dims = _DIMS[scope]
    if h.dtype in (torch.bfloat16, torch.float16) or h.is_cuda:
        accumulate = torch.promote_types(h.dtype, torch.float32)
        norm = torch.linalg.vector_norm(h, dim=dims, keepdim=True, dtype=accumulate)
    else:  # on a CPU vector_norm over a leading axis takes several times as long as these passes
        norm = h.square().sum(dims, keepdim=True).sqrt()
    factor = _factors(h, gamma, norm, eps)[2]
    return torch.addcmul(beta.to(h.dtype), h, factor.to(h.dtype)), norm


@_grn.register_fake
def _(h, gamma, beta, scope, eps):
    norm = h.new_empty(
        h.shape[0] if scope == "sample" else 1, 1, h.shape[2], dtype=torch.promote_types(h.dtype, torch.float32)
    )
    return torch.empty_like(h, memory_format=torch.contiguous_format), norm


@torch.library.custom_op("mpmae::global_response_norm_backward", mutates_args=())
def _grn_backward(
    grad: Tensor, h: Tensor, gamma: Tensor, norm: Tensor, scope: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean, relative, factor = _factors(h, gamma, norm, eps)
    product = (grad * h).sum(_DIMS[scope], keepdim=True, dtype=norm.dtype)
    grad_relative = gamma.to(norm.dtype) * product
    grad_norm = grad_relative / mean - (grad_relative * norm).sum(-1, keepdim=True) / (norm.shape[-1] * mean.square())
    pull = torch.where(norm > 0, grad_norm / norm, 0)  # the norm of zeros gets the subgradient 0
    grad_h = torch.addcmul(grad * factor.to(h.dtype), h, pull.to(h.dtype))
    grad_gamma = (relative * product).sum((0, 1)).to(gamma.dtype)
    return grad_h, grad_gamma, grad.sum((0, 1), dtype=norm.dtype).to(gamma.dtype)


@_grn_backward.register_fake
def _(grad, h, gamma, norm, scope, eps):
    return torch.empty_like(h, memory_format=torch.contiguous_format), torch.empty_like(gamma), torch.empty_like(gamma)


def _setup(ctx, inputs, output):
    h, gamma, _, ctx.scope, ctx.eps = inputs
    ctx.save_for_backward(h, gamma, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad, _):
    h, gamma, norm = ctx.saved_tensors
    return *_grn_backward(grad.contiguous(), h, gamma, norm, ctx.scope, ctx.eps), None, None


_grn.register_autograd(_autograd, setup_context=_setup)


def pointwise_block(
    residual: Tensor,
    y: Tensor,
    norm: tuple[Tensor, Tensor],
    linear1: tuple[Tensor, Tensor],
    grn: tuple[Tensor, Tensor],
    linear2: tuple[Tensor, Tensor],
    valid: Tensor | None,
    *,
    scope: str,
    norm_eps: float,
    grn_eps: float,
) -> Tensor:
    """residual + Linear2(GRN(GELU(Linear1(LayerNorm(y))))): [N, K, C], 0 at sites that do not exist.

    residual, y: [N, K, C]. norm, linear1, grn, linear2: (weight, bias) or (gamma, beta). valid: bool [N, K], True where a
    site exists; None when all do. scope and grn_eps: see `global_response_norm`.
    """
    h = F.gelu(F.linear(F.layer_norm(y, y.shape[-1:], *norm, norm_eps), *linear1))
    if valid is not None:
        h = h * valid[:, :, None]
    out = residual + F.linear(global_response_norm(h, *grn, scope=scope, eps=grn_eps), *linear2)
    return out if valid is None else out * valid[:, :, None]
