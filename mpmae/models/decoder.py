"""Decoder shared by all modalities, and the heads.

Shapes: N samples, L patches, V visible ones, C encoder channels, D decoder channels, G patches on a side, L = G*G.
Source: Nedungadi et al., "MMEarth", arXiv 2405.02771, section 4. The published code names one decoder per modality, but all
of them are one module; it runs once here.
"""

import torch
from torch import Tensor, nn

from mpmae.modalities import spec_of
from mpmae.models import blocks
from mpmae.models.blocks import Block, Sites

DECODER_GRN_EPS = 1e-4


class Decoder(nn.Module):
    """1x1 projection, mask token at the hidden patches, ConvNeXt V2 blocks on the whole grid."""

    def __init__(self, dim_in: int, dim: int, depth: int, num_patches_side: int, gelu: str = "erf"):
        super().__init__()
        self.num_patches_side = num_patches_side
        self.proj = nn.Linear(dim_in, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("everywhere", torch.arange(num_patches_side**2), persistent=False)
        self.blocks = nn.ModuleList(Block(dim, grn_scope="sample", grn_eps=DECODER_GRN_EPS, gelu=gelu) for _ in range(depth))

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """[N, L, D] from the encoder's `tokens` [N, V, C] at the patches `visible` int64 [N, V]."""
        side = self.num_patches_side
        x = blocks.fill_hidden(self.proj(tokens), visible, self.mask_token, side * side)
        everywhere = self.everywhere.expand(len(x), -1).contiguous()
        # not a buffer: no backend of torch.distributed can broadcast int16, as DDP does with buffers
        sites = Sites(everywhere, blocks.tile_slots(everywhere, side), 1, None)
        for block in self.blocks:
            x = block(x, sites)
        return x


class Heads(nn.Module):
    """One linear head per modality: p*p*C values per patch for a pixel modality, one vector per tile for a tile modality.

    channels: modality -> output channels (bands or classes), in the order of the losses.
    """

    def __init__(self, channels: dict[str, int], dim: int, patch_size: int):
        super().__init__()
        self.pixel = nn.ModuleDict()
        self.tile = nn.ModuleDict()
        for name, count in channels.items():
            if spec_of(name).scope == "pixel":
                self.pixel[name] = nn.Linear(dim, patch_size**2 * count)
            else:
                self.tile[name] = nn.Linear(dim, count)
        if self.tile:
            self.tile_norm = nn.LayerNorm(dim, eps=blocks.NORM_EPS)

    def tile_predictions(self, grid: Tensor) -> dict[str, Tensor]:
        """[N, C] per tile modality: LayerNorm of the decoder's output `grid` [N, L, D], mean over the patches, head."""
        if not self.tile:
            return {}
        pooled = self.tile_norm(grid).mean(1)
        return {name: head(pooled) for name, head in self.tile.items()}
