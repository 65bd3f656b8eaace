"""Operators of the sparse encoder on tile-packed activations; imports torch only.

Shapes: N samples, V visible patches per sample, s sites on a side of a tile, T = s*s sites per tile, K = V*T sites per
sample, G patches on a side of the image, H = G*s sites on a side of the grid, C channels.

Activations are [N, K, C], channels last and contiguous (the [N, V, s, s, C] of the design without its inner splits); the
sites of a tile are in Morton order, so four siblings of a 2x2 square lie next to each other.

Signatures of custom ops and of Triton kernels are long and alike: torch.library reads an op's schema off its signature,
where a named tuple can't stand, and a kernel takes its pointers and constants one by one.
"""

from mpmae.kernels.block import sparse_block
from mpmae.kernels.depthwise import depthwise_conv
from mpmae.kernels.layout import hidden_patches, morton_sites, pack_sites, site_index, tile_slots, unpack_sites

__all__ = [
    "depthwise_conv",
    "hidden_patches",
    "morton_sites",
    "pack_sites",
    "site_index",
    "sparse_block",
    "tile_slots",
    "unpack_sites",
]
