"""Depthwise convolution over visible sites against a convolution of the zero-filled grid, in float64."""

import pytest
import torch
import torch.nn.functional as F

from mpmae import kernels

G = 7


def draw(num_visible, num_samples=2):
    return torch.stack([torch.randperm(G * G)[:num_visible].sort().values for _ in range(num_samples)])


def oracle(grid, visible, weight, bias, side):
    """The convolution of `grid` [N, C, H, H] with everything outside visible patches set to 0, and which sites count."""
    shown = torch.zeros(len(visible), G * G, dtype=grid.dtype).scatter(1, visible, 1).view(-1, 1, G, G)
    shown = shown.repeat_interleave(side, 2).repeat_interleave(side, 3)
    return F.conv2d(grid * shown, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight)) * shown


@pytest.mark.parametrize("num_visible", [49, 19, 1])
@pytest.mark.parametrize("side", [8, 4, 2, 1])
def test_equals_the_oracle(side, num_visible):
    torch.manual_seed(0)
    visible, channels, height = draw(num_visible), 3, G * side
    grid = torch.randn(2, channels, height, height, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(channels, 1, 7, 7, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(channels, dtype=torch.float64, requires_grad=True)
    expected = oracle(grid, visible, weight, bias, side)
    probe = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * probe).sum(), (grid, weight, bias))

    index = kernels.site_index(visible, G, kernels.morton_sites(side))
    x = kernels.pack_sites(grid.permute(0, 2, 3, 1), index)
    out = kernels.depthwise_conv(x, weight, bias, visible, kernels.tile_slots(visible, G), side)
    got = kernels.unpack_sites(out, index, height).permute(0, 3, 1, 2)
    grads = torch.autograd.grad((got * probe).sum(), (grid, weight, bias))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-11)


def whole_grid(num_samples, num_patches_side):
    visible = torch.arange(num_patches_side**2).expand(num_samples, -1).contiguous()
    return visible, kernels.tile_slots(visible, num_patches_side), 1


@pytest.mark.parametrize("whole", [True, False])
def test_gradcheck_and_registration(whole):
    torch.manual_seed(0)
    visible = torch.tensor([[0, 2, 5, 8], [0, 1, 4, 8]])
    x = torch.randn(2, 9 if whole else 4, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    positions = whole_grid(2, 3) if whole else (visible, kernels.tile_slots(visible, 3), 1)
    assert torch.autograd.gradcheck(lambda *args: kernels.depthwise_conv(*args, *positions), (x, weight, bias))
    torch.library.opcheck(torch.ops.mpmae.depthwise_conv.default, (x, weight, bias, *positions))


def test_autocast_sets_the_dtype_and_leaves_the_gradients_wide():
    x, weight, bias = torch.randn(1, 9, 4), torch.randn(4, 1, 7, 7, requires_grad=True), torch.randn(4, requires_grad=True)
    positions = whole_grid(1, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = kernels.depthwise_conv(x, weight, bias, *positions)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), kernels.depthwise_conv(x, weight, bias, *positions), rtol=0.05, atol=0.1)
    grads = torch.autograd.grad(out.float().sum(), (weight, bias))
    assert [grad.dtype for grad in grads] == [torch.float32] * 2


def test_the_gradient_has_the_strides_of_its_weight():
    """DDP copies, and warns about, a gradient whose strides differ from its bucket's, those of dimensions of size 1 too."""
    x, weight, bias = torch.randn(2, 9, 4), torch.randn(4, 1, 7, 7, requires_grad=True), torch.randn(4)
    kernels.depthwise_conv(x, weight, bias, *whole_grid(2, 3)).square().sum().backward()
    assert weight.grad.stride() == weight.stride() == (49, 49, 7, 1)
