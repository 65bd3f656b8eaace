"""Pointwise half of a ConvNeXt V2 block in PyTorch.

Shapes as in `mpmae.kernels`; D = 4C hidden channels. Source: Woo et al., "ConvNeXt V2", arXiv 2301.00808, section 3 and
appendix A (GRN).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def global_response_norm(h: Tensor, gamma: Tensor, beta: Tensor, *, scope: str, eps: float) -> Tensor:
    """Global response normalisation: gamma * (h * Nx) + beta + h, Nx = G / (mean of G over channels + eps), G = L2 norm.

    h: [N, K, D], 0 at sites that do not exist. gamma, beta: D values. scope: "sample" takes the norm over the sites of each
    sample, "batch" over all sites of the micro batch. The norm accumulates in float32 at least.
    """
    dims = {"sample": (1,), "batch": (0, 1)}[scope]
    dtype = torch.float32 if h.dtype in (torch.bfloat16, torch.float16) else None
    norm = torch.linalg.vector_norm(h, dim=dims, keepdim=True, dtype=dtype)
    relative = norm / (norm.mean(-1, keepdim=True) + eps)
    scale = 1 + gamma.view(1, 1, -1) * relative
    return torch.addcmul(beta.view(1, 1, -1).to(h.dtype), h, scale.to(h.dtype))


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
