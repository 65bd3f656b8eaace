"""A whole ConvNeXt V2 block on packed sites as one operator with a backward of its own."""

from mpmae.kernels.block.ops import sparse_block

__all__ = ["sparse_block"]
