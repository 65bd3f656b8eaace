"""The operators in their plainest form, on the zero-filled grid: what kernels are compared with, by autograd in float64."""

import torch
import torch.nn.functional as F

from mpmae import kernels


def grn(h, gamma, beta, scope, eps):
    """Global response normalisation of [N, K, D]."""
    norm = h.norm(dim=1, keepdim=True) if scope == "sample" else h.flatten(0, 1).norm(dim=0)[None, None]
    relative = norm / (norm.mean(-1, keepdim=True) + eps)
    return gamma * (h * relative) + beta + h


def pointwise(residual, y, weights, valid, options):
    """The pointwise half of a block, [N, K, C]."""
    approximate = {"erf": "none", "tanh": "tanh"}[options.gelu]
    normed = F.layer_norm(y, y.shape[-1:], weights.norm_weight, weights.norm_bias, options.norm_eps)
    h = F.gelu(F.linear(normed, weights.weight1, weights.bias1), approximate=approximate)
    if valid is not None:
        h = h * valid[:, :, None]
    z = grn(h, weights.grn_gamma, weights.grn_beta, options.scope, options.grn_eps)
    out = residual + F.linear(z, weights.weight2, weights.bias2)
    return out if valid is None else out * valid[:, :, None]


def depthwise(x, weight, bias, visible, num_patches_side, side):
    """The depthwise convolution of the zero-filled grid, read at the packed sites."""
    index = kernels.site_index(visible, num_patches_side, kernels.morton_sites(side))
    height = num_patches_side * side
    grid = x.new_zeros(len(x) * height**2, x.shape[-1]).index_put((index.flatten(),), x.flatten(0, 1))
    grid = grid.view(len(x), height, height, -1).permute(0, 3, 1, 2)
    out = F.conv2d(grid, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return out.permute(0, 2, 3, 1).reshape(len(x) * height**2, -1)[index]


def draw_weights(channels, dtype=torch.float64):
    """Random `Weights` that need gradients."""
    hidden = 4 * channels
    shapes = [
        (channels,),
        (channels,),
        (hidden, channels),
        (hidden,),
        (1, hidden),
        (1, hidden),
        (channels, hidden),
        (channels,),
    ]
    return kernels.pointwise.Weights(*(torch.randn(*shape, dtype=dtype).requires_grad_() for shape in shapes))


def draw_visible(num_visible, num_patches_side, num_samples=2):
    """Sorted patch numbers, int64 [N, V]."""
    return torch.stack([torch.randperm(num_patches_side**2)[:num_visible].sort().values for _ in range(num_samples)])
