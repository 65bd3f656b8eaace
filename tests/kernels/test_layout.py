"""The tile-packed layout."""

import pytest
import torch

from mpmae import kernels


@pytest.fixture
def visible():
    return torch.tensor([[0, 3, 8], [1, 4, 5]])


def test_morton_order():
    assert kernels.morton_sites(1).tolist() == [[0, 0]]
    assert kernels.morton_sites(2).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    sites = kernels.morton_sites(8)
    assert sites[[4, 8, 21, 63]].tolist() == [[0, 2], [2, 0], [0, 7], [7, 7]]
    coarse = sites.view(16, 4, 2) // 2
    assert (coarse == kernels.morton_sites(4)[:, None]).all()
    with pytest.raises(ValueError, match="power of two"):
        kernels.morton_sites(6)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_site_index_names_each_visible_site_once(visible, side):
    index = kernels.site_index(visible, 3, kernels.morton_sites(side))
    grid_side = 3 * side
    for n in range(2):
        for v, patch in enumerate(visible[n].tolist()):
            for t, (r, c) in enumerate(kernels.morton_sites(side).tolist()):
                row, column = patch // 3 * side + r, patch % 3 * side + c
                assert index[n, v * side * side + t] == n * grid_side**2 + row * grid_side + column


def test_pack_and_unpack(visible):
    index = kernels.site_index(visible, 3, kernels.morton_sites(2))
    x = torch.randn(2, 12, 5)
    grid = kernels.unpack_sites(x, index, 6)
    assert torch.equal(kernels.pack_sites(grid, index), x)
    assert grid.count_nonzero() == x.count_nonzero()


def test_gradients_and_registration(visible):
    index = kernels.site_index(visible, 3, kernels.morton_sites(2))
    x = torch.randn(2, 12, 2, dtype=torch.float64, requires_grad=True)
    grid = torch.randn(2, 6, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: kernels.unpack_sites(t, index, 6), x)
    assert torch.autograd.gradcheck(lambda t: kernels.pack_sites(t, index), grid)
    torch.library.opcheck(torch.ops.mpmae.unpack_sites.default, (x, index, 6))
    torch.library.opcheck(torch.ops.mpmae.pack_sites.default, (grid, index))


def test_hidden_patches(visible):
    assert kernels.hidden_patches(visible, 9).tolist() == [[1, 2, 4, 5, 6, 7], [0, 2, 3, 6, 7, 8]]
    assert kernels.hidden_patches(torch.arange(9)[None], 9).shape == (1, 0)


def test_slots_say_where_each_patch_is_packed():
    visible = torch.tensor([[1, 5, 8], [0, 2, 4]])
    slots = kernels.tile_slots(visible, 3)
    assert slots.dtype == torch.int16
    assert slots.shape == (2, 9, 9)
    inside = slots[:, 3:6, 3:6].flatten(1)
    assert inside.tolist() == [[-1, 0, -1, -1, -1, 1, -1, -1, 2], [0, -1, 1, -1, 2, -1, -1, -1, -1]]
    assert (slots >= 0).sum() == 6
