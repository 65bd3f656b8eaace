"""Layers of a pre-norm vision transformer, for one set of weights or for a stack of them run as one batch.

Shapes: T stacked sets of weights, N samples, L tokens, M attended ones, D width, H heads. A layer takes [..., N, L, D].
Source: Dosovitskiy et al., "An image is worth 16x16 words", arXiv 2010.11929; names of the layers are timm's.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6
MLP_RATIO = 4


class StackedLinear(nn.Module):
    """T linear layers as one batched matrix product: weight [T, D_out, D_in], bias [T, D_out]."""

    def __init__(self, num: int, dim_in: int, dim_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num, dim_out, dim_in))
        self.bias = nn.Parameter(torch.zeros(num, dim_out))

    def forward(self, x: Tensor) -> Tensor:
        """[T, N, L, D_out] for [T, N, L, D_in], or for [N, L, D_in] that all T layers read."""
        if x.ndim == 3:
            return F.linear(x, self.weight.flatten(0, 1), self.bias.flatten()).unflatten(2, self.bias.shape).movedim(2, 0)
        out = torch.baddbmm(self.bias[:, None], x.flatten(1, 2), self.weight.transpose(1, 2))
        return out.unflatten(1, x.shape[1:3])


class StackedNorm(nn.Module):
    """T layer normalisations: weight and bias [T, D]."""

    def __init__(self, num: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num, dim))
        self.bias = nn.Parameter(torch.zeros(num, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[T, N, L, D], normalised over D."""
        normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
        return torch.addcmul(self.bias[:, None, None], normed, self.weight[:, None, None])


class Layers(NamedTuple):
    """What a transformer is made of: functions that give a linear layer (D_in, D_out) and a normalisation (D)."""

    linear: Callable[[int, int], nn.Module]
    norm: Callable[[int], nn.Module]


PLAIN = Layers(nn.Linear, lambda dim: nn.LayerNorm(dim, eps=NORM_EPS))


def stacked(num: int) -> Layers:
    """Layers of `num` stacked sets of weights."""
    return Layers(lambda dim_in, dim_out: StackedLinear(num, dim_in, dim_out), lambda dim: StackedNorm(num, dim))


def attend(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    """Attention [..., N, L, D] of q [..., N, L, H, D/H] to k and v [..., N, M, H, D/H].

    real: bool [N, M], False for tokens that only fill up a sample and are attended by none; None when there are none.
    """
    lead = q.shape[:-3]
    if real is not None:
        real = real.expand(*lead, -1).reshape(-1, 1, 1, real.shape[-1])
    q, k, v = (t.transpose(-2, -3).flatten(0, -4) for t in (q, k, v))
    # torch's (2.13) fused backward on a CPU takes 8 times as long in bf16 as these products, see benchmarks/RESULTS.md
    by_products = q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled()
    attention = _products if by_products else F.scaled_dot_product_attention
    return attention(q, k, v, real).transpose(1, 2).flatten(2).unflatten(0, lead)


def _products(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    """What F.scaled_dot_product_attention gives, the scores in memory."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if real is not None:
        scores = scores.masked_fill(~real, -torch.inf)
    return scores.softmax(-1) @ v


class Attention(nn.Module):
    """Self-attention of H heads."""

    def __init__(self, dim: int, num_heads: int, layers: Layers):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = layers.linear(dim, 3 * dim)
        self.proj = layers.linear(dim, dim)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """[..., N, L, D]; `real` as in `attend`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return self.proj(attend(q, k, v, real))


class CrossAttention(nn.Module):
    """Attention of H heads from queries to a context."""

    def __init__(self, dim: int, num_heads: int, layers: Layers):
        super().__init__()
        self.num_heads = num_heads
        self.q = layers.linear(dim, dim)
        self.kv = layers.linear(dim, 2 * dim)
        self.proj = layers.linear(dim, dim)

    def forward(self, queries: Tensor, context: Tensor, real: Tensor | None = None) -> Tensor:
        """[..., N, L, D] from queries of that shape and a context [..., N, M, D]; `real` as in `attend`."""
        q = self.q(queries).unflatten(-1, (self.num_heads, -1))
        k, v = self.kv(context).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        return self.proj(attend(q, k, v, real))


class Mlp(nn.Module):
    """Linear to 4 D, exact GELU, linear back."""

    def __init__(self, dim: int, layers: Layers):
        super().__init__()
        self.fc1 = layers.linear(dim, MLP_RATIO * dim)
        self.fc2 = layers.linear(MLP_RATIO * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., N, L, D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: self-attention and MLP, each with a residual."""

    def __init__(self, dim: int, num_heads: int, layers: Layers = PLAIN):
        super().__init__()
        self.norm1 = layers.norm(dim)
        self.attn = Attention(dim, num_heads, layers)
        self.norm2 = layers.norm(dim)
        self.mlp = Mlp(dim, layers)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """[..., N, L, D]; `real` as in `attend`."""
        x = x + self.attn(self.norm1(x), real)
        return x + self.mlp(self.norm2(x))
