"""Forward and backward of the encoder's stem in PyTorch, written out: the oracle of the kernels, and their form on a CPU.

3x3 convolution of the image that is 0 wherever a pixel does not exist, LayerNorm, GELU, 0 where the pixel does not exist,
depthwise convolution with kernel = stride = t, LayerNorm, 0 where the site does not exist. A pixel exists if its patch is
visible and it holds data, a site if one of its pixels does.

Both work on windows, the visible patches with one pixel around them, so hidden patches cost nothing and the backward needs
nothing but what the forward was given. Inside a window pixels lie row by row; only the output is in Morton order.

Shapes as in `mpmae.kernels`; B bands, S image side in pixels, p patch side in pixels, t = p/8 pixels on a side of a site,
M = N*V windows.
Source: Nedungadi et al., "MMEarth", arXiv 2405.02771, section 4; the backward is derived from it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mpmae.kernels.checks import HALO
from mpmae.kernels.dtypes import accumulator
from mpmae.kernels.layout import morton_sites

TILE_SIDE = 8  # sites on a side of a tile behind the stem


class StemWeights(NamedTuple):
    """The parameters of the stem, or their gradients.

    conv_weight: [C, B, 3, 3]. pool_weight: [C, 1, t, t]. Everything else: [C].
    """

    conv_weight: Tensor
    conv_bias: Tensor
    conv_norm_weight: Tensor
    conv_norm_bias: Tensor
    pool_weight: Tensor
    pool_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


class Image(NamedTuple):
    """What the stem looks at.

    values: [N, B, S, S]; what it holds at pixels that do not exist means nothing. pixel_valid: bool [N, S, S], True where a
    pixel holds data; None when all do. visible: int64 [N, V], patch numbers. slots: int16 [N, G+6, G+6], their
    `tile_slots`; here only its width is looked at, so [0, G+6, G+6] goes as well.
    """

    values: Tensor
    pixel_valid: Tensor | None
    visible: Tensor
    slots: Tensor

    @property
    def num_patches_side(self) -> int:
        """G."""
        return self.slots.shape[1] - 2 * HALO

    @property
    def patch_size(self) -> int:
        """p."""
        return self.values.shape[-1] // self.num_patches_side


class _Pooled(NamedTuple):
    """The forward up to the second LayerNorm; existence is None when all pixels exist.

    windows: [M, B, p+2, p+2] in the dtype of the products. conv: [M, p, p, C]. mean, rstd: of its LayerNorm. normed: its
    output. h: GELU's, 0 at pixels that do not exist. pixel_exists: bool [M, p, p]. site_exists: bool [M, 8, 8].
    pooled: [M, 8, 8, C].
    """

    windows: Tensor
    conv: Tensor
    mean: Tensor
    rstd: Tensor
    normed: Tensor
    h: Tensor
    pixel_exists: Tensor | None
    site_exists: Tensor | None
    pooled: Tensor


_FLAT = (
    "conv_weight",
    "conv_bias",
    "conv_norm_weight",
    "conv_norm_bias",
    "pool_bias",
    "norm_weight",
    "norm_bias",
    "pool_weight",
)


def flatten(grads: StemWeights) -> Tensor:
    """All gradients one after the other, the order of `unflatten`: one tensor is one output of an op."""
    return torch.cat([getattr(grads, name).flatten() for name in _FLAT])


def unflatten(flat: Tensor, weights: StemWeights) -> StemWeights:
    """The gradients in `flat`, each of its weight's shape and dtype."""
    parts = flat.split([getattr(weights, name).numel() for name in _FLAT])
    return StemWeights(
        **{
            name: part.view(getattr(weights, name).shape).to(getattr(weights, name).dtype)
            for name, part in zip(_FLAT, parts, strict=True)
        }
    )


def forward(image: Image, weights: StemWeights, eps: float, dtype: torch.dtype) -> Tensor:
    """Packed sites [N, V*64, C] of `dtype`, 0 at sites that do not exist.

    The products of the 3x3 convolution run in `dtype`, the rest in float32 at least.
    """
    steps = _pooled(image, weights, eps, dtype)
    out = _norm(steps.pooled, weights.norm_weight, weights.norm_bias, eps)[0]
    if steps.site_exists is not None:
        out = torch.where(steps.site_exists[:, :, :, None], out, 0)
    num_samples, num_visible = image.visible.shape
    out = out.to(dtype).flatten(1, 2).index_select(1, _raster_of_morton(out.device))
    return out.view(num_samples, num_visible * TILE_SIDE**2, -1)


def backward(grad: Tensor, image: Image, weights: StemWeights, eps: float) -> StemWeights:
    """The gradients of the weights, float32 at least.

    grad: of the output [N, V*64, C]; what it holds at sites that do not exist means nothing.
    """
    steps = _pooled(image, weights, eps, grad.dtype)
    channels, stride = weights.conv_weight.shape[0], weights.pool_weight.shape[-1]
    wide = steps.conv.dtype
    grad = grad.view(-1, TILE_SIDE**2, channels).index_select(1, _raster_of_morton(grad.device).argsort())
    grad = grad.to(wide).view_as(steps.pooled)
    if steps.site_exists is not None:
        grad = torch.where(steps.site_exists[:, :, :, None], grad, 0)
    _, mean, rstd = _norm(steps.pooled, weights.norm_weight, weights.norm_bias, eps)
    grad_pooled, grad_norm_weight, grad_norm_bias = _norm_backward(grad, steps.pooled, mean, rstd, weights.norm_weight)

    taps = weights.pool_weight.to(wide).permute(1, 2, 3, 0)[:, :, None]  # [1, t, 1, t, C]
    h = steps.h.view(-1, TILE_SIDE, stride, TILE_SIDE, stride, channels)
    spread = grad_pooled[:, :, None, :, None]
    grad_pool = torch.stack(
        [(h[:, :, row, :, column] * grad_pooled).sum((0, 1, 2)) for row in range(stride) for column in range(stride)]
    )
    grad_h = (spread * taps).reshape_as(steps.h)
    if steps.pixel_exists is not None:
        grad_h = torch.where(steps.pixel_exists[:, :, :, None], grad_h, 0)
    grad_normed = torch.ops.aten.gelu_backward(grad_h, steps.normed)
    grad_conv, grad_conv_norm_weight, grad_conv_norm_bias = _norm_backward(
        grad_normed, steps.conv, steps.mean, steps.rstd, weights.conv_norm_weight
    )

    narrow = grad_conv.to(steps.windows.dtype).permute(0, 3, 1, 2)
    grad_conv_weight = torch.ops.aten.convolution_backward(
        narrow, steps.windows, weights.conv_weight.to(narrow.dtype),
        None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False],
    )[1]  # fmt: skip
    return StemWeights(
        grad_conv_weight.to(wide).contiguous(),
        grad_conv.sum((0, 1, 2)),
        grad_conv_norm_weight,
        grad_conv_norm_bias,
        grad_pool.t().reshape(weights.pool_weight.shape),
        grad_pooled.sum((0, 1, 2)),
        grad_norm_weight,
        grad_norm_bias,
    )


def _pooled(image: Image, weights: StemWeights, eps: float, dtype: torch.dtype) -> _Pooled:
    windows, pixel_exists = _windows(image, dtype)
    wide = accumulator(dtype)
    channels, stride = weights.conv_weight.shape[0], weights.pool_weight.shape[-1]
    conv = F.conv2d(windows, weights.conv_weight.to(dtype), weights.conv_bias.to(dtype))
    conv = conv.permute(0, 2, 3, 1).to(wide).contiguous()  # views, both, of what a channels-last convolution gives
    normed, mean, rstd = _norm(conv, weights.conv_norm_weight, weights.conv_norm_bias, eps)
    h = F.gelu(normed)
    site_exists = None
    if pixel_exists is not None:
        h = torch.where(pixel_exists[:, :, :, None], h, 0)
        site_exists = pixel_exists.view(-1, TILE_SIDE, stride, TILE_SIDE, stride).any(4).any(2)
    taps = weights.pool_weight.to(wide).permute(1, 2, 3, 0)[:, :, None]
    if stride == 1:
        pooled = torch.addcmul(weights.pool_bias.to(wide), h, taps.flatten())
    else:
        pooled = (h.view(-1, TILE_SIDE, stride, TILE_SIDE, stride, channels) * taps).sum((2, 4)) + weights.pool_bias.to(wide)
    return _Pooled(windows, conv, mean, rstd, normed, h, pixel_exists, site_exists, pooled)


def _windows(image: Image, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The visible patches with a pixel around them, 0 where a pixel does not exist, [M, B, p+2, p+2] of `dtype`, and which
    of their own pixels exist, bool [M, p, p]."""
    grid_side, patch = image.num_patches_side, image.patch_size
    shown = torch.zeros(len(image.visible), grid_side**2, dtype=torch.bool, device=image.visible.device)
    shown = shown.scatter(1, image.visible, True).view(-1, grid_side, grid_side)
    exists = shown[:, :, None, :, None].expand(-1, -1, patch, -1, patch).reshape(-1, *image.values.shape[2:])
    if image.pixel_valid is not None:
        exists = exists & image.pixel_valid
    clean = torch.where(exists[:, None], image.values, 0).to(dtype)
    tiles = F.pad(clean, (1, 1, 1, 1)).unfold(2, patch + 2, patch).unfold(3, patch + 2, patch)
    sample = torch.arange(len(image.visible), device=image.visible.device)[:, None]
    row, column = image.visible // grid_side, image.visible % grid_side
    windows = tiles[sample, :, row, column].flatten(0, 1).contiguous(memory_format=torch.channels_last)
    if image.pixel_valid is None:
        return windows, None
    exists = exists.view(-1, grid_side, patch, grid_side, patch)[sample, row, :, column]
    return windows, exists.flatten(0, 1)


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of `x` in its own dtype, and the mean and rstd it took."""
    return torch.native_layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def _norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of LayerNorm's input, weight and bias."""
    shape, weight = x.shape[-1:], weight.to(x.dtype)
    return torch.ops.aten.native_layer_norm_backward(grad, x, shape, mean, rstd, weight, weight, [True, True, True])


def _raster_of_morton(device: torch.device) -> Tensor:
    """The row-by-row number of each site of a tile in Morton order: int64 [64]."""
    row, column = morton_sites(TILE_SIDE, device).unbind(1)
    return row * TILE_SIDE + column
