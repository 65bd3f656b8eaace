"""ConvNeXt V2 block and downsampling on tile-packed sites; the only module of `models` that calls the kernels.

Shapes: N samples, K packed sites per sample, C channels, L patches, V visible ones, G patches and H sites on a side of the
grid, s sites on a side of a tile.
Source: Woo et al., "ConvNeXt V2", arXiv 2301.00808, section 3.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpmae.kernels import hidden_patches, morton_sites, pack_sites, site_index, tile_slots, unpack_sites
from mpmae.kernels.block import sparse_block
from mpmae.kernels.downsample import downsample
from mpmae.kernels.heads import head_loss
from mpmae.kernels.pointwise import GELUS, Options, Weights, way_of
from mpmae.kernels.stem import StemWeights, stem

__all__ = [
    "GELUS",
    "NORM_EPS",
    "Block",
    "Downsample",
    "Sites",
    "StemWeights",
    "fill_hidden",
    "head_loss",
    "hidden_patches",
    "morton_sites",
    "pack_patches",
    "pack_sites",
    "pointwise_way",
    "site_index",
    "stem",
    "tile_slots",
    "unpack_sites",
]

NORM_EPS = 1e-6
DEPTHWISE_SIZE = 7


class Sites(NamedTuple):
    """Where the packed sites of a stage lie.

    visible: int64 [N, V], the packed patches, ascending. slots: int16, their `tile_slots`, the same for all stages.
    tile_side: s. valid: bool [N, K], True where a site exists; None when all do (the fast path).
    """

    visible: Tensor
    slots: Tensor
    tile_side: int
    valid: Tensor | None


class GRN(nn.Module):
    """The scale and shift of a global response normalisation: gamma and beta, [1, D] (ndim 2: weight decay applies)."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, dim))
        self.beta = nn.Parameter(torch.zeros(1, dim))


class Block(nn.Module):
    """ConvNeXt V2 block: depthwise 7x7, LayerNorm, Linear, GELU, GRN, Linear, residual.

    grn_scope: "sample" or "batch", over which sites GRN takes its norm; grn_eps: 1e-6 in the encoder, 1e-4 in the decoder.
    gelu: one of `mpmae.kernels.pointwise.GELUS`.
    """

    def __init__(self, dim: int, *, grn_scope: str, grn_eps: float, gelu: str = "erf"):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, DEPTHWISE_SIZE, padding=DEPTHWISE_SIZE // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.grn = GRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.options = Options(grn_scope, NORM_EPS, grn_eps, gelu)

    def forward(self, x: Tensor, sites: Sites) -> Tensor:
        """The block's output [N, K, C] for `x` [N, K, C]; both are 0 at sites that do not exist."""
        weights = Weights(
            self.norm.weight,
            self.norm.bias,
            self.pwconv1.weight,
            self.pwconv1.bias,
            self.grn.gamma,
            self.grn.beta,
            self.pwconv2.weight,
            self.pwconv2.bias,
        )
        return sparse_block(x, (self.dwconv.weight, self.dwconv.bias), weights, *sites, self.options)


def pointwise_way(block: Block, num_sites: int, dtype: torch.dtype, capability: int) -> str:
    """How a GPU of this major compute capability runs the pointwise half on K sites: see `kernels.pointwise.way_of`."""
    return way_of(block.dwconv.in_channels, num_sites, dtype, block.options.scope, capability)


class Downsample(nn.Module):
    """LayerNorm, then a convolution with kernel = stride = 2: in Morton order a reshape and one matrix product."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim_in, eps=NORM_EPS)
        self.conv = nn.Conv2d(dim_in, dim_out, 2, stride=2)

    def forward(self, x: Tensor, valid_in: Tensor | None, valid_out: Tensor | None) -> Tensor:
        """[N, K/4, C_out] for `x` [N, K, C_in]; `valid_in` [N, K] and `valid_out` [N, K/4] are None when all sites exist."""
        norm, conv = (self.norm.weight, self.norm.bias), (self.conv.weight, self.conv.bias)
        return downsample(x, norm, conv, valid_in, valid_out, eps=NORM_EPS)


def keep(x: Tensor, valid: Tensor | None) -> Tensor:
    """`x` [N, K, C] with 0 at sites that do not exist."""
    return x if valid is None else torch.where(valid[:, :, None], x, 0)


def merge_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A convolution with kernel = stride = 2**j on Morton-ordered sites: [N, K / 4**j, C_out] from [N, K, C_in]."""
    weight = _morton_taps(conv.weight)
    x = x.reshape(x.shape[0], -1, weight.shape[2] * x.shape[-1])
    return F.linear(x, weight.transpose(1, 2).flatten(1), conv.bias)


def _morton_taps(weight: Tensor) -> Tensor:
    """The taps of a kernel [C_out, C_in, 2**j, 2**j] in Morton order: [C_out, C_in, 4**j]."""
    num_bits = weight.shape[-1].bit_length() - 1
    interleaved = [2 + bit + half * num_bits for bit in range(num_bits) for half in (0, 1)]
    bits = weight.reshape(*weight.shape[:2], *[2] * (2 * num_bits))
    return bits.permute(0, 1, *interleaved).reshape(*weight.shape[:2], -1)


def merge_valid(valid: Tensor | None, side: int) -> Tensor | None:
    """Whether any of the side*side sites under each coarser site exists: bool [N, K / side**2], or None for None."""
    return valid if valid is None or side == 1 else valid.unflatten(1, (-1, side * side)).any(2)


def pack_patches(image: Tensor, patches: Tensor, patch_size: int) -> Tensor:
    """The pixels of the chosen patches, row by row: [N, P, p*p, C] from `image` [N, C, S, S] and `patches` int64 [N, P]."""
    num_samples, channels, side, _ = image.shape
    grid_side = side // patch_size
    tiles = image.reshape(num_samples, channels, grid_side, patch_size, grid_side, patch_size)
    sample = torch.arange(num_samples, device=image.device)[:, None]
    chosen = tiles[sample, :, patches // grid_side, :, patches % grid_side]
    return chosen.permute(0, 1, 3, 4, 2).flatten(2, 3)


def fill_hidden(x: Tensor, visible: Tensor, token: Tensor, num_patches: int) -> Tensor:
    """`x` [N, V, C] at the visible patches and `token` (C values) elsewhere: [N, L, C]; L is a square number."""
    side = int(num_patches**0.5)
    sample = torch.arange(visible.shape[0], device=visible.device)[:, None] * num_patches
    full = unpack_sites(x, visible + sample, side).flatten(1, 2)
    shown = torch.zeros_like(full[:, :, :1], dtype=torch.bool).scatter(1, visible[:, :, None], True)
    return torch.where(shown, full, token.view(1, 1, -1).to(full.dtype))
