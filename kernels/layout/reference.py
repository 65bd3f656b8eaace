"""Tile-packed layout in PyTorch: the index of every packed site, pack (gather) and unpack (zero-filled scatter).

Shapes as in `mpmae.kernels`. The rows of a site index are distinct, so pack and unpack are each other's backward; that
spares the accumulating scatter that autograd would run.
"""

import torch
from torch import Tensor


def morton_sites(side: int, device: torch.device | str | None = None) -> Tensor:
    """Row and column of every site of a tile in Morton order: int64 [side*side, 2]; `side` is a power of two.

    The bits of the position alternate between column (lowest bit) and row (G. M. Morton, 1966).
    """
    if side < 1 or side & (side - 1):
        raise ValueError(f"morton_sites: side = {side}, expected a power of two")
    position = torch.arange(side * side, device=device)
    row, column = torch.zeros_like(position), torch.zeros_like(position)
    for bit in range(side.bit_length()):
        column |= ((position >> (2 * bit)) & 1) << bit
        row |= ((position >> (2 * bit + 1)) & 1) << bit
    return torch.stack([row, column], dim=1)


def site_index(visible: Tensor, num_patches_side: int, morton: Tensor) -> Tensor:
    """Row of every packed site in the flattened [N*H*H, C] grid: int64 [N, V*T].

    visible: int64 [N, V], patch numbers (row-major). morton: int64 [T, 2], `morton_sites(s)` on the device of `visible`.
    """
    num_samples, num_sites = visible.shape[0], morton.shape[0]
    tile_side = int(num_sites**0.5)
    grid_side = num_patches_side * tile_side
    corner = (visible // num_patches_side * grid_side + visible % num_patches_side) * tile_side
    inside = morton[:, 0] * grid_side + morton[:, 1]
    sample = torch.arange(num_samples, device=visible.device) * grid_side**2
    return (sample[:, None, None] + corner[:, :, None] + inside).flatten(1)


def tile_slots(visible: Tensor, num_patches_side: int, halo: int = 3) -> Tensor:
    """Where each patch of the image lies among the packed tiles: int16 [N, G + 2*halo, G + 2*halo], -1 for an absent one.

    visible: int64 [N, V], distinct patch numbers. A border of `halo` absent patches on each side spares the kernels every
    test for the edge: a 7x7 neighbourhood of a site reaches 3 tiles far at most (tiles of one site).
    """
    num_samples, num_visible = visible.shape
    width = num_patches_side + 2 * halo
    place = (visible // num_patches_side + halo) * width + visible % num_patches_side + halo
    slots = torch.full((num_samples, width * width), -1, dtype=torch.int16, device=visible.device)
    number = torch.arange(num_visible, dtype=torch.int16, device=visible.device).expand_as(place)
    return slots.scatter(1, place, number).view(num_samples, width, width)


def hidden_patches(visible: Tensor, num_patches: int) -> Tensor:
    """Numbers of the patches that are not visible, ascending: int64 [N, num_patches - V] for `visible` int64 [N, V]."""
    num_samples, num_visible = visible.shape
    taken = torch.zeros(num_samples, num_patches, dtype=torch.int8, device=visible.device)
    taken = taken.scatter(1, visible, 1)
    return taken.argsort(dim=1, stable=True)[:, : num_patches - num_visible]


def pack_sites(grid: Tensor, index: Tensor) -> Tensor:
    """The sites at `index` (int64 [N, K], distinct rows of [N*H*H]): [N, K, C] from the grid [N, H, H, C]."""
    return _pack(grid, index)


def unpack_sites(x: Tensor, index: Tensor, grid_side: int) -> Tensor:
    """The grid [N, H, H, C] that holds the packed sites `x` [N, K, C] at `index` and 0 elsewhere; H = `grid_side`."""
    return _unpack(x, index, grid_side)


@torch.library.custom_op("mpmae::pack_sites", mutates_args=())
def _pack(grid: Tensor, index: Tensor) -> Tensor:
    channels = grid.shape[-1]
    return grid.reshape(-1, channels).index_select(0, index.flatten()).view(*index.shape, channels)


@_pack.register_fake
def _(grid, index):
    return grid.new_empty(*index.shape, grid.shape[-1])


@torch.library.custom_op("mpmae::unpack_sites", mutates_args=())
def _unpack(x: Tensor, index: Tensor, grid_side: int) -> Tensor:
    num_samples, channels = x.shape[0], x.shape[-1]
    grid = x.new_zeros(num_samples * grid_side**2, channels)
    grid.index_copy_(0, index.flatten(), x.reshape(-1, channels))
    return grid.view(num_samples, grid_side, grid_side, channels)


@_unpack.register_fake
def _(x, index, grid_side):
    return x.new_empty(x.shape[0], grid_side, grid_side, x.shape[-1])


def _pack_setup(ctx, inputs, output):
    grid, index = inputs
    ctx.save_for_backward(index)
    ctx.grid_side = grid.shape[1]


def _unpack_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _pack_backward(ctx, grad):
    return _unpack(grad, ctx.saved_tensors[0], ctx.grid_side), None


def _unpack_backward(ctx, grad):
    return _pack(grad, ctx.saved_tensors[0]), None, None


_pack.register_autograd(_pack_backward, setup_context=_pack_setup)
_unpack.register_autograd(_unpack_backward, setup_context=_unpack_setup)
