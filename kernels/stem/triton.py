"""The stem's kernels over blocks of sites; the forward keeps nothing at the image's resolution.

For each of the t*t pixels of its sites a block gathers the 3x3 neighbourhood of every band, [sites, 9B+1] (the last column
is 1 and carries the bias), multiplies, normalises and pools. A program walks over many blocks, so weights are read once.

The backward does that again. It writes the gradient of the 3x3 convolution's output, which a kernel of its own multiplies
with the neighbourhoods; the other gradients it sums as rows of one small matrix, by products with one-hot rows, which tensor
cores take. Each program writes its sums once and a last kernel adds them up in a fixed order: the same bits in every run.

One thread holds all neighbours of a pixel, so a load is one instruction with a constant offset from the pixel's address.
Channels are padded to a power of two; where warps split the sites only, the padding lies in registers of its own and the
compiler drops what is computed for it.

Shapes as in `mpmae.kernels`; B bands, S image side in pixels, p patch side in pixels, t = p/8 pixels on a side of a site, R
gradient rows of C values: 9B taps, VECTORS vectors and the t*t taps of the pooling.
"""

import triton
import triton.language as tl

from mpmae.kernels.stem.triton_parts import (
    VECTORS,
    add_row,
    cdf_and_density,
    columns_of,
    conv_norm,
    matrix,
    norm,
    norm_backward,
    pooled_sites,
    put,
    sites_of,
    taps,
    values_at,
)
from mpmae.kernels.triton_parts import narrow, product


@triton.jit
def _pack_kernel(
    weight,
    bias,
    packed,
    BANDS: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    THREADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weight [C, B, 3, 3] and the bias as [K, CHANNELS], in the order of `columns_of`."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel, tap = place % CHANNELS, taps(place // CHANNELS, BANDS, K, THREADS)
    inside = channel < C
    value = tl.load(weight + channel * (9 * BANDS) + tap, mask=inside & (tap >= 0) & (tap < 9 * BANDS), other=0)
    shift = tl.load(bias + channel, mask=inside & (tap == 9 * BANDS), other=0)
    value = value.to(tl.float32) + shift.to(tl.float32)  # one of them is 0
    tl.store(packed + place, narrow(value, packed.dtype.element_ty))


@triton.jit
def _forward_kernel(
    image,
    pixel_valid,
    visible,
    slots,
    packed,
    conv_norm_weight,
    conv_norm_bias,
    pool_weight,
    pool_bias,
    norm_weight,
    norm_bias,
    out,
    num_sites,
    num_visible,
    num_pixels,
    eps,
    G: tl.constexpr,
    STRIDES: tl.constexpr,
    BANDS: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    THREADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    inside = tl.arange(0, CHANNELS)[None, :] < C
    weight = matrix(packed, K, CHANNELS, CHANNELS)
    for block in tl.range(tl.program_id(0), tl.cdiv(num_sites, BLOCK), tl.num_programs(0), disable_licm=True):
        late = block // tl.cdiv(num_sites, BLOCK)  # 0, which the compiler can't know: it would hoist loads into registers
        sites = sites_of(block * BLOCK, num_sites, visible, slots, num_visible, G, T, BLOCK, THREADS)
        pooled, site_exists = pooled_sites(
            image, pixel_valid, sites, weight, conv_norm_weight, conv_norm_bias, pool_weight, num_pixels, eps,
            G, BANDS, C, T, STRIDES, THREADS,
        )  # fmt: skip
        unit, _ = norm(pooled + values_at(pool_bias, late, 1, C, CHANNELS), inside, C, eps)
        result = unit * values_at(norm_weight, late, 1, C, CHANNELS) + values_at(norm_bias, late, 1, C, CHANNELS)
        result = tl.where((site_exists != 0)[:, None], result, 0.0)
        row = tl.arange(0, BLOCK)[:, None]
        place = out + tl.cast(block, tl.int64) * (BLOCK * C) + (row * C + tl.arange(0, CHANNELS)[None, :])
        tl.store(place, narrow(result, out.dtype.element_ty), mask=inside & (block * BLOCK + row < num_sites))


@triton.jit
def _backward_kernel(
    grad,
    image,
    pixel_valid,
    visible,
    slots,
    packed,
    conv_norm_weight,
    conv_norm_bias,
    pool_weight,
    pool_bias,
    norm_weight,
    grad_conv,
    partial,
    num_sites,
    num_visible,
    num_pixels,
    eps,
    G: tl.constexpr,
    STRIDES: tl.constexpr,
    BANDS: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    THREADS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """A program's sums of all gradients but the 3x3 convolution's, and the gradient of what that gives, tile by tile."""
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = channel < C
    DTYPE: tl.constexpr = packed.dtype.element_ty
    weight = matrix(packed, K, CHANNELS, CHANNELS)
    sums = tl.zeros((ROWS, CHANNELS), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(num_sites, BLOCK), tl.num_programs(0), disable_licm=True):
        late = block // tl.cdiv(num_sites, BLOCK)  # 0, which the compiler can't know: it would hoist loads into registers
        sites = sites_of(block * BLOCK, num_sites, visible, slots, num_visible, G, T, BLOCK, THREADS)
        pooled, site_exists = pooled_sites(
            image, pixel_valid, sites, weight, conv_norm_weight, conv_norm_bias, pool_weight, num_pixels, eps,
            G, BANDS, C, T, STRIDES, THREADS,
        )  # fmt: skip
        known = inside & (site_exists != 0)[:, None]
        place = grad + tl.cast(block, tl.int64) * (BLOCK * C) + (tl.arange(0, BLOCK)[:, None] * C + channel)
        above = tl.load(place, mask=known, other=0).to(tl.float32)
        unit2, rstd2 = norm(pooled + values_at(pool_bias, late, 1, C, CHANNELS), inside, C, eps)
        sums = add_row(sums, 3, above * unit2, False, DTYPE)
        sums = add_row(sums, 4, above, False, DTYPE)
        grad_pooled = norm_backward(above * values_at(norm_weight, late, 1, C, CHANNELS), unit2, rstd2, inside, C)
        sums = add_row(sums, 2, grad_pooled, True, DTYPE)
        for pixel in tl.range(num_pixels, disable_licm=True):
            columns, exists = columns_of(image, pixel_valid, sites, pixel, G, BANDS, T, STRIDES, K, THREADS, DTYPE)
            x, unit, rstd, scale = conv_norm(columns, weight, conv_norm_weight, conv_norm_bias, pixel, num_pixels, C, eps)
            cdf, density = cdf_and_density(x)
            there = inside & (exists != 0)[:, None]
            sums = add_row(sums, 5 + pixel, tl.where(there, grad_pooled * x * cdf, 0.0), False, DTYPE)
            tap = values_at(pool_weight, pixel, T * T, C, CHANNELS)
            grad_x = tl.where(there, grad_pooled * tap * (cdf + x * density), 0.0)
            sums = add_row(sums, 0, grad_x * unit, False, DTYPE)
            sums = add_row(sums, 1, grad_x, False, DTYPE)
            below = narrow(norm_backward(grad_x * scale, unit, rstd, inside, C), DTYPE)
            tile = grad_conv + (tl.cast(block, tl.int64) * (T * T) + pixel) * (BLOCK * C)
            tl.store(tile + (tl.arange(0, BLOCK)[:, None] * C + channel), below, mask=inside)
    put(partial + (tl.program_id(0) * SIZE + SIZE - ROWS * CHANNELS), sums, ROWS, CHANNELS, CHANNELS)


@triton.jit
def _weight_kernel(
    grad_conv,
    image,
    pixel_valid,
    visible,
    slots,
    partial,
    num_sites,
    num_visible,
    num_pixels,
    G: tl.constexpr,
    STRIDES: tl.constexpr,
    BANDS: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    THREADS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """A program's sums of the gradient of the 3x3 convolution, for COLUMNS of its channels."""
    DTYPE: tl.constexpr = grad_conv.dtype.element_ty
    first = tl.program_id(1) * COLUMNS
    grad_weight = tl.zeros((K, COLUMNS), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(num_sites, BLOCK), tl.num_programs(0), disable_licm=True):
        sites = sites_of(block * BLOCK, num_sites, visible, slots, num_visible, G, T, BLOCK, THREADS)
        for pixel in tl.range(num_pixels, disable_licm=True):
            columns, _ = columns_of(image, pixel_valid, sites, pixel, G, BANDS, T, STRIDES, K, THREADS, DTYPE)
            tile = grad_conv + (tl.cast(block, tl.int64) * (T * T) + pixel) * (BLOCK * C)
            below = matrix(tile + first, BLOCK, COLUMNS, C)  # past the last channel it reads on: of no consequence
            grad_weight = product(tl.trans(columns), below, grad_weight)
    put(partial + (tl.program_id(0) * SIZE + first), grad_weight, K, COLUMNS, CHANNELS)


@triton.jit
def _add_kernel(
    partial,
    total,
    num_programs,
    BANDS: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    THREADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """The sums of all programs, in the order of `reference.flatten`: BLOCK values of each of STEP programs at a time."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((STEP, BLOCK), tl.float32)
    for first in range(0, num_programs, STEP):
        program = (first + tl.arange(0, STEP))[:, None]
        sums += tl.load(partial + (program * ((K + ROWS) * CHANNELS) + place[None, :]), mask=program < num_programs, other=0)
    row, channel = place // CHANNELS, place % CHANNELS
    tap, vector = taps(row, BANDS, K, THREADS), row - K
    is_tap = (row < K) & (tap >= 0)
    of_weight = tl.where(tap < 9 * BANDS, channel * (9 * BANDS) + tap, 9 * BANDS * C + channel)
    of_vector = (9 * BANDS + 1 + vector) * C + channel
    of_pool = (9 * BANDS + VECTORS) * C + channel * (T * T) + vector - (VECTORS - 1)
    target = tl.where(row < K, of_weight, tl.where(vector < VECTORS - 1, of_vector, of_pool))
    kept = (channel < C) & tl.where(row < K, is_tap, vector < VECTORS - 1 + T * T)
    tl.store(total + target, tl.sum(sums, 0), mask=kept)
