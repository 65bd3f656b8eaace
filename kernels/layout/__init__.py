"""The tile-packed layout: where each packed site lies in the grid, and the moves between the two."""

from mpmae.kernels.layout.reference import (
    hidden_patches,
    morton_sites,
    pack_sites,
    site_index,
    tile_slots,
    unpack_sites,
)

__all__ = ["hidden_patches", "morton_sites", "pack_sites", "site_index", "tile_slots", "unpack_sites"]
