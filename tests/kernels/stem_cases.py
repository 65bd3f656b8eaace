"""Inputs for tests of the stem: images with gaps, visible patches, weights.

Shapes as in `mpmae.kernels.stem.reference`.
"""

import torch
import torch.nn.functional as F

from mpmae.kernels import morton_sites, pack_sites, site_index, tile_slots
from mpmae.kernels.stem.reference import Image, StemWeights

EPS = 1e-6


def draw(
    *, bands=3, channels=5, stride=1, grid_side=3, num_visible=4, gaps=True, dtype=torch.float64, num_samples=2, seed=0
):
    """An image, the weights and a gradient of the output; with gaps a patch, some rows and single pixels are not there."""
    generator = torch.Generator().manual_seed(seed)
    side, patch = grid_side * 8 * stride, 8 * stride

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    visible = torch.stack(
        [torch.randperm(grid_side**2, generator=generator)[:num_visible].sort().values for _ in range(num_samples)]
    )
    pixel_valid = None
    if gaps:
        pixel_valid = torch.rand(num_samples, side, side, generator=generator) > 0.1
        pixel_valid[0, : patch // 2] = False
        row, column = int(visible[-1, 0]) // grid_side * patch, int(visible[-1, 0]) % grid_side * patch
        pixel_valid[-1, row : row + patch, column : column + patch] = False
    values = normal(num_samples, bands, side, side)
    vectors = [1 + normal(channels) / 4 if scale else normal(channels) / 2 for scale in (0, 1, 0, 0, 1, 0)]
    weights = StemWeights(
        normal(channels, bands, 3, 3) / 3,
        *vectors[:3],
        normal(channels, 1, stride, stride) / stride,
        *vectors[3:],
    )
    grad = normal(num_samples, num_visible * 64, channels)
    return Image(values, pixel_valid, visible, tile_slots(visible, grid_side)), weights, grad


def shown_pixels(image):
    """bool [N, S, S], True at visible patches."""
    side, patch = image.num_patches_side, image.patch_size
    shown = torch.zeros(len(image.visible), side * side, dtype=torch.bool).scatter(1, image.visible, True)
    return shown.view(-1, side, side).repeat_interleave(patch, 1).repeat_interleave(patch, 2)


def existing(image):
    """bool [N, S, S], True at pixels that exist."""
    shown = shown_pixels(image)
    return shown if image.pixel_valid is None else shown & image.pixel_valid


def composite(image, weights):
    """The stem from PyTorch's own modules on the whole image, differentiable: [N, V*64, C]."""
    exists, stride = existing(image), weights.pool_weight.shape[-1]
    clean = torch.where(exists[:, None], image.values, 0)
    x = F.conv2d(clean, weights.conv_weight, weights.conv_bias, padding=1).permute(0, 2, 3, 1)
    x = F.gelu(F.layer_norm(x, x.shape[-1:], weights.conv_norm_weight, weights.conv_norm_bias, EPS)) * exists[..., None]
    x = F.conv2d(x.permute(0, 3, 1, 2), weights.pool_weight, weights.pool_bias, stride=stride, groups=x.shape[-1])
    x = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], weights.norm_weight, weights.norm_bias, EPS)
    x = x * F.max_pool2d(exists[:, None].to(x.dtype), stride).permute(0, 2, 3, 1)
    return pack_sites(x.contiguous(), site_index(image.visible, image.num_patches_side, morton_sites(8)))


def poisoned(image):
    """The same image with NaN at every pixel that does not exist."""
    return image._replace(values=torch.where(existing(image)[:, None], image.values, torch.nan))


def poisoned_grad(grad, out):
    """`grad` with NaN at sites that do not exist: those where all of `out` is 0."""
    return torch.where((out != 0).any(-1, keepdim=True), grad, torch.nan)


def to(image, weights, dtype):
    """The same in another dtype."""
    return image._replace(values=image.values.to(dtype)), StemWeights(*(weight.to(dtype) for weight in weights))
