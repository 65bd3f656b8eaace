"""Launches of the stem's Triton kernels, on PyTorch's current stream, without a look at the data.

Shapes as in `mpmae.kernels.stem.reference`.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from mpmae.kernels.stem.reference import TILE_SIDE, Image, StemWeights

MAX_CHANNELS = 256
MAX_BANDS = 14
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PROGRAMS_PER_PROCESSOR = 2
PROGRAMS_ELSEWHERE = 3  # in Triton's interpreter
ADD_BLOCK, ADD_STEP = 64, 32
PACK_BLOCK = 256


class Cut(NamedTuple):
    """How a kernel is cut: sites of a block, threads that share a pixel's neighbourhood, warps of a program."""

    block: int
    threads: int
    num_warps: int


def refusal(image: Image, weights: StemWeights, dtype: torch.dtype) -> str | None:
    """Why the kernels do not take these inputs; None when they do."""
    channels, bands = weights.conv_weight.shape[:2]
    num_samples, num_visible = image.visible.shape
    if dtype not in DTYPES:
        return f"dtype {dtype}, expected one of {', '.join(map(str, DTYPES))}"
    if channels > MAX_CHANNELS:
        return f"{channels} channels, expected at most {MAX_CHANNELS}: more weight gradient than a program's registers hold"
    if bands > MAX_BANDS:
        return f"{bands} bands, expected at most {MAX_BANDS}: the neighbourhood of a pixel fills 128 columns"
    if num_samples * num_visible * TILE_SIDE**2 >= 2**31:
        return f"{num_samples} x {num_visible} visible patches hold 2**31 sites or more; take a smaller batch"
    return None


def forward(image: Image, weights: StemWeights, eps: float, dtype: torch.dtype) -> Tensor:
    """As `reference.forward`, for what `refusal` does not refuse; `image.slots` must be filled."""
    from mpmae.kernels.stem import triton as kernels

    num_samples, num_visible = image.visible.shape
    channels = weights.conv_weight.shape[0]
    num_sites = num_samples * num_visible * TILE_SIDE**2
    out = torch.empty(num_samples, num_visible * TILE_SIDE**2, channels, dtype=dtype, device=image.values.device)
    cut = forward_cut(channels, dtype)
    packed, shape = _pack(kernels, weights, dtype, cut)
    blocks = -(-num_sites // cut.block)
    kernels._forward_kernel[(_num_programs(out.device, blocks),)](
        *_image_arguments(image),
        packed,
        *weights[2:],
        out,
        num_sites,
        num_visible,
        weights.pool_weight.shape[-1] ** 2,
        eps,
        **_constants(image, weights),
        **shape,
        BLOCK=cut.block,
        num_warps=cut.num_warps,
        num_stages=1,
    )
    return out


def backward(grad: Tensor, image: Image, weights: StemWeights, eps: float) -> Tensor:
    """The gradients of `reference.backward` as `reference.flatten` puts them, float32; `grad` is contiguous."""
    from mpmae.kernels.stem import triton as kernels

    num_samples, num_visible = image.visible.shape
    channels, bands = weights.conv_weight.shape[:2]
    stride = weights.pool_weight.shape[-1]
    num_sites = num_samples * num_visible * TILE_SIDE**2
    cut = backward_cut(channels, grad.dtype)
    packed, shape = _pack(kernels, weights, grad.dtype, cut)
    rows = sum_rows(stride)
    num_programs = _num_programs(grad.device, -(-num_sites // cut.block))
    size = (shape["K"] + rows) * shape["CHANNELS"]
    partial = torch.empty(num_programs, size, dtype=torch.float32, device=grad.device)
    kernels._backward_kernel[(num_programs,)](
        grad,
        *_image_arguments(image),
        packed,
        *weights[2:7],
        partial,
        num_sites,
        num_visible,
        stride**2,
        eps,
        **_constants(image, weights),
        **shape,
        BLOCK=cut.block,
        ROWS=rows,
        num_warps=cut.num_warps,
        num_stages=1,
    )
    total = torch.empty(sum(weight.numel() for weight in weights), dtype=torch.float32, device=grad.device)
    kernels._add_kernel[(size // ADD_BLOCK,)](
        partial,
        total,
        num_programs,
        BANDS=bands,
        C=channels,
        T=stride,
        **shape,
        ROWS=rows,
        BLOCK=ADD_BLOCK,
        STEP=ADD_STEP,
    )
    return total


def forward_cut(channels: int, dtype: torch.dtype) -> Cut:
    """The cut of the forward kernel: 16 sites of a warp, so that all warps split sites, as long as registers last."""
    return Cut(64, 2, 4)


def backward_cut(channels: int, dtype: torch.dtype) -> Cut:
    """The cut of the backward kernel, which holds 128 x `channels` sums besides."""
    return Cut(64, 2, 4)


def padded(channels: int) -> int:
    """Channels of a block: the next power of two, 16 at least, which a matrix product wants."""
    return max(16, 1 << (channels - 1).bit_length())


def num_columns(bands: int, threads: int) -> int:
    """Columns of a pixel's neighbourhood: `threads` times the next power of two above those of a thread's bands."""
    return max(16, threads * (1 << (9 * -(-bands // threads)).bit_length()))


def sum_rows(stride: int) -> int:
    """Rows of the sums beside the 3x3 convolution's: 5 vectors and the taps of the pooling, padded for a product."""
    return max(16, 1 << (4 + stride**2).bit_length())


def _pack(kernels, weights: StemWeights, dtype: torch.dtype, cut: Cut) -> tuple[Tensor, dict[str, int]]:
    """Weight and bias of the 3x3 convolution in the order of a block's columns, and the kernels' sizes."""
    channels, bands = weights.conv_weight.shape[:2]
    shape = {"K": num_columns(bands, cut.threads), "CHANNELS": padded(channels), "THREADS": cut.threads}
    packed = torch.empty(shape["K"], shape["CHANNELS"], dtype=dtype, device=weights.conv_weight.device)
    grid = (packed.numel() // PACK_BLOCK,)
    kernels._pack_kernel[grid](
        weights.conv_weight, weights.conv_bias, packed, BANDS=bands, C=channels, **shape, BLOCK=PACK_BLOCK
    )
    return packed, shape


def _image_arguments(image: Image) -> tuple[Tensor | None, ...]:
    valid = None if image.pixel_valid is None else image.pixel_valid.view(torch.uint8)
    return image.values, valid, image.visible, image.slots


def _constants(image: Image, weights: StemWeights) -> dict:
    channels, bands = weights.conv_weight.shape[:2]
    return {
        "G": image.num_patches_side,
        "STRIDES": image.values.stride(),
        "BANDS": bands,
        "C": channels,
        "T": weights.pool_weight.shape[-1],
    }


@cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _num_programs(device: torch.device, num_blocks: int) -> int:
    """Programs that a GPU holds at once; the same for every call on a device, so sums are taken in the same order."""
    if device.type != "cuda":
        return min(num_blocks, PROGRAMS_ELSEWHERE)
    return min(num_blocks, PROGRAMS_PER_PROCESSOR * _num_processors(device))
