"""Launches of the stem's Triton kernels, on PyTorch's current stream, without a look at the data.

Shapes as in `mpmae.kernels.stem.reference`.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from mpmae.kernels.checks import MAX_PATCHES_SIDE, int32_refusal
from mpmae.kernels.dtypes import FLOATS
from mpmae.kernels.stem.reference import TILE_SIDE, Image, StemWeights

MAX_CHANNELS, MAX_CHANNELS_FLOAT32 = 192, 96
MAX_BANDS = 14
MAX_COLUMNS = 128
PROGRAMS_PER_PROCESSOR = 2
PROGRAMS_ELSEWHERE = 3  # in Triton's interpreter
WEIGHT_COLUMNS = 128  # channels of a program that sums the 3x3 convolution's gradient
ADD_BLOCK, ADD_STEP = 64, 32
PACK_BLOCK = 128


class Cut(NamedTuple):
    """How a kernel is cut: sites of a block, threads that share a pixel's neighbourhood, warps of a program."""

    block: int
    threads: int
    num_warps: int


def refusal(image: Image, weights: StemWeights, dtype: torch.dtype) -> str | None:
    """Why the kernels do not take these inputs; None when they do."""
    channels, bands = weights.conv_weight.shape[:2]
    if dtype not in FLOATS:
        return f"dtype {dtype}, expected one of {', '.join(map(str, FLOATS))}"
    most = MAX_CHANNELS_FLOAT32 if dtype == torch.float32 else MAX_CHANNELS
    if channels > most:
        return f"{channels} channels in {dtype}, expected at most {most}: a block of more does not fit into registers"
    if bands > MAX_BANDS:
        return f"{bands} bands, expected at most {MAX_BANDS}: the neighbourhood of a pixel has {MAX_COLUMNS} columns"
    if image.num_patches_side > MAX_PATCHES_SIDE:
        return f"{image.num_patches_side} patches on a side, expected at most {MAX_PATCHES_SIDE}; take larger patches"
    return int32_refusal("sites", (*image.visible.shape, TILE_SIDE**2))


def forward(image: Image, weights: StemWeights, eps: float, dtype: torch.dtype) -> Tensor:
    """As `reference.forward`, for what `refusal` does not refuse; `image.slots` must be filled."""
    from mpmae.kernels.stem import triton as kernels

    num_samples, num_visible = image.visible.shape
    channels = weights.conv_weight.shape[0]
    out = torch.empty(num_samples, num_visible * TILE_SIDE**2, channels, dtype=dtype, device=image.values.device)
    cut = cut_of(weights, dtype)
    num_sites, num_pixels = out.shape[0] * out.shape[1], weights.pool_weight[0].numel()
    kernels._forward_kernel[(_num_programs(out.device, -(-num_sites // cut.block)),)](
        *_image_arguments(image),
        _packed(kernels, weights, dtype, cut.threads),
        *weights[2:],
        out,
        num_sites,
        num_visible,
        num_pixels,
        eps,
        **_image_constants(image, weights),
        **sizes(weights, cut.threads),
        BLOCK=cut.block,
        num_warps=cut.num_warps,
        num_stages=1,
    )
    return out


def backward(grad: Tensor, image: Image, weights: StemWeights, eps: float) -> Tensor:
    """The gradients of `reference.backward` as `reference.flatten` puts them, float32; `grad` is contiguous."""
    from mpmae.kernels.stem import triton as kernels

    num_sites, num_visible = grad.shape[0] * grad.shape[1], image.visible.shape[1]
    num_pixels = weights.pool_weight[0].numel()
    counts = num_sites, num_visible, num_pixels
    cut, weight_cut = cut_of(weights, grad.dtype), weight_cut_of(weights, grad.dtype)
    num_blocks = -(-num_sites // cut.block)
    num_programs = _num_programs(grad.device, num_blocks)
    rows = sum_rows(num_pixels)
    weight_sizes = sizes(weights, weight_cut.threads)
    channels = weight_sizes["CHANNELS"]
    size = (weight_sizes["K"] + rows) * channels
    partial = torch.empty(num_programs, size, dtype=torch.float32, device=grad.device)
    num_values = num_blocks * cut.block * num_pixels * grad.shape[2]
    grad_conv = torch.empty(num_values + channels, dtype=grad.dtype, device=grad.device)  # one row may be read past the end
    where, constants = _image_arguments(image), _image_constants(image, weights)
    kernels._backward_kernel[(num_programs,)](
        grad,
        *where,
        _packed(kernels, weights, grad.dtype, cut.threads),
        *weights[2:7],
        grad_conv,
        partial,
        *counts,
        eps,
        **constants,
        **sizes(weights, cut.threads),
        BLOCK=cut.block,
        ROWS=rows,
        SIZE=size,
        num_warps=cut.num_warps,
        num_stages=1,
    )
    columns = min(channels, WEIGHT_COLUMNS)
    kernels._weight_kernel[(num_programs, channels // columns)](
        grad_conv,
        *where,
        partial,
        *counts,
        **constants,
        **weight_sizes,
        BLOCK=cut.block,
        COLUMNS=columns,
        SIZE=size,
        num_warps=weight_cut.num_warps,
        num_stages=1,
    )
    total = torch.empty(sum(weight.numel() for weight in weights), dtype=torch.float32, device=grad.device)
    kernels._add_kernel[(size // ADD_BLOCK,)](
        partial,
        total,
        num_programs,
        T=weights.pool_weight.shape[-1],
        **weight_sizes,
        ROWS=rows,
        BLOCK=ADD_BLOCK,
        STEP=ADD_STEP,
    )
    return total


def cut_of(weights: StemWeights, dtype: torch.dtype) -> Cut:
    """The cut of the forward and of the backward kernel.

    16 sites of a warp as long as registers last: warps then split sites only, and padded channels cost nothing.
    """
    channels, bands = weights.conv_weight.shape[:2]
    if dtype == torch.float32:
        return _cut(16, 8, bands)
    if channels <= 48:
        return _cut(64, 4, bands)
    return _cut(64 if channels <= 128 else 32, 8, bands)


def weight_cut_of(weights: StemWeights, dtype: torch.dtype) -> Cut:
    """The cut of the kernel that sums the gradient of the 3x3 convolution, over the same blocks."""
    channels, bands = weights.conv_weight.shape[:2]
    return _cut(cut_of(weights, dtype).block, 4 if channels <= 64 and dtype != torch.float32 else 8, bands)


def _cut(block: int, num_warps: int, bands: int) -> Cut:
    threads = num_warps // 2
    return Cut(block, threads if num_columns(bands, threads) <= MAX_COLUMNS else 2, num_warps)


def sizes(weights: StemWeights, threads: int) -> dict[str, int]:
    """Constants of a kernel in which `threads` share a pixel."""
    channels, bands = weights.conv_weight.shape[:2]
    columns, padded = num_columns(bands, threads), max(16, 1 << (channels - 1).bit_length())
    return {"BANDS": bands, "C": channels, "K": columns, "CHANNELS": padded, "THREADS": threads}


def num_columns(bands: int, threads: int) -> int:
    """Columns of a pixel's neighbourhood: `threads` times the next power of two above those of a thread's bands."""
    return max(16, threads * (1 << (9 * -(-bands // threads)).bit_length()))


def sum_rows(num_pixels: int) -> int:
    """Rows of the sums beside the 3x3 convolution's: 5 vectors and the taps of the pooling, padded for a product."""
    return max(16, 1 << (4 + num_pixels).bit_length())


def _packed(kernels, weights: StemWeights, dtype: torch.dtype, threads: int) -> Tensor:
    """Weight and bias of the 3x3 convolution in the order of a block's columns: [columns, padded channels]."""
    constants = sizes(weights, threads)
    packed = torch.empty(constants["K"], constants["CHANNELS"], dtype=dtype, device=weights.conv_weight.device)
    grid = (packed.numel() // PACK_BLOCK,)
    kernels._pack_kernel[grid](weights.conv_weight, weights.conv_bias, packed, **constants, BLOCK=PACK_BLOCK)
    return packed


def _image_arguments(image: Image) -> tuple[Tensor | None, ...]:
    valid = None if image.pixel_valid is None else image.pixel_valid.view(torch.uint8)
    return image.values, valid, image.visible, image.slots


def _image_constants(image: Image, weights: StemWeights) -> dict:
    return {"G": image.num_patches_side, "STRIDES": image.values.stride(), "T": weights.pool_weight.shape[-1]}


@cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _num_programs(device: torch.device, num_blocks: int) -> int:
    """Programs that a GPU holds at once; the same for every call on a device, so sums are taken in the same order."""
    if device.type != "cuda":
        return min(num_blocks, PROGRAMS_ELSEWHERE)
    return min(num_blocks, PROGRAMS_PER_PROCESSOR * _num_processors(device))
