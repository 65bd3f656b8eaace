"""Pieces of the stem's kernels in Triton: where sites lie, their neighbourhoods, norms, products.

Shapes as in `mpmae.kernels.stem.triton`.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from mpmae.kernels import checks
from mpmae.kernels.triton_parts import INTERPRETED, narrow, product

SITES = tl.constexpr(64)  # of a tile
HALO = tl.constexpr(checks.HALO)
VECTORS = tl.constexpr(6)  # gradients of C values: biases and norms


@triton.jit
def cdf_and_density(x):
    """The normal distribution function, to 1e-7, and its density.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 7.1.26.
    """
    wide = 1.0 + 0.3275911 * 0.7071067811865476 * tl.abs(x)
    if INTERPRETED:
        e, t = tl.exp(-0.5 * x * x), 1.0 / wide
    else:
        e, t = libdevice.fast_expf(-0.5 * x * x), libdevice.fast_dividef(1.0, wide)
    series = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    tail = 0.5 * e * t * series
    return tl.where(x > 0, 1.0 - tail, tail), 0.3989422804014327 * e


@triton.jit
def sites_of(
    first,
    num_sites,
    visible,
    slots,
    num_visible,
    G: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Of the sites from `first` on, [sites, THREADS]: their sample, the row and column of their first pixel in the image,
    and which of the 3x3 patches around theirs are visible (bits; none for a site past the last)."""
    site = first + tl.arange(0, BLOCK)[:, None] + tl.zeros((1, THREADS), tl.int32)
    tile = site // SITES
    sample = tile // num_visible
    patch = tl.load(visible + tile, mask=site < num_sites, other=0).to(tl.int32)
    patch_row, patch_column = patch // G, patch % G
    row = ((site >> 1) & 1) | ((site >> 2) & 2) | ((site >> 3) & 4)
    column = (site & 1) | ((site >> 1) & 2) | ((site >> 2) & 4)
    WIDTH: tl.constexpr = G + 2 * HALO
    table = slots + sample * (WIDTH * WIDTH) + (patch_row + HALO) * WIDTH + patch_column + HALO
    shown = tl.zeros((BLOCK, THREADS), tl.int32)
    for near in tl.static_range(9):
        slot = tl.load(table + ((near // 3 - 1) * WIDTH + near % 3 - 1), mask=site < num_sites, other=-1)
        shown |= (slot >= 0).to(tl.int32) << near
    return sample, (patch_row * 8 + row) * T, (patch_column * 8 + column) * T, shown


@triton.jit
def joined(parts, K: tl.constexpr):
    """[sites, K] from tensors [sites, threads of a pixel], those of one thread next to each other."""
    if len(parts) == 1:
        return parts[0].reshape(parts[0].shape[0], K)
    else:
        HALF: tl.constexpr = len(parts) // 2
        pairs = ()
        for k in tl.static_range(HALF):
            pairs = pairs + (tl.join(parts[k], parts[k + HALF]),)
        return joined(pairs, K)


@triton.jit
def columns_of(
    image,
    pixel_valid,
    sites,
    pixel,
    G: tl.constexpr,
    BANDS: tl.constexpr,
    T: tl.constexpr,
    STRIDES: tl.constexpr,
    K: tl.constexpr,
    THREADS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The neighbourhoods [sites, K] of the given pixel of each site, 0 for what does not exist, and whether it exists.

    THREADS share a pixel. Of the K / THREADS columns of each, number 9*i + 3*dy + dx holds a neighbour in its i-th band,
    the next one 1, for the bias, and the rest 0.
    """
    PATCH: tl.constexpr = 8 * T
    SIDE: tl.constexpr = G * PATCH
    EACH: tl.constexpr = (BANDS + THREADS - 1) // THREADS
    sample, row, column, shown = sites
    sample, row, column = sample.to(tl.int64), row + pixel // T, column + pixel % T
    there = ()
    for tap in tl.static_range(9):
        patch = (row % PATCH + PATCH + (tap // 3 - 1)) // PATCH * 3 + (column % PATCH + PATCH + (tap % 3 - 1)) // PATCH
        exists = ((shown >> patch) & 1) != 0
        if pixel_valid is not None:
            place = sample * (SIDE * SIDE) + row * SIDE + column + ((tap // 3 - 1) * SIDE + tap % 3 - 1)
            exists &= tl.load(pixel_valid + place, mask=exists, other=0) != 0
        there = there + (exists,)
    own = tl.arange(0, THREADS)[None, :]
    address = image + sample * STRIDES[0] + row * STRIDES[2] + column * STRIDES[3]
    address += own * (EACH * STRIDES[1])
    zero = tl.zeros(address.shape, tl.float32)
    parts = ()
    for k in tl.static_range(K // THREADS):
        if k < 9 * EACH:
            near = address + (k // 9 * STRIDES[1] + (k % 9 // 3 - 1) * STRIDES[2] + (k % 3 - 1) * STRIDES[3])
            read = there[k % 9]
            if EACH * (THREADS - 1) + k // 9 >= BANDS:
                read = read & (own * EACH + k // 9 < BANDS)
            value = tl.load(near, mask=read, other=0).to(tl.float32)
        else:
            value = zero + 1.0 if k == 9 * EACH else zero
        parts = parts + (narrow(value, DTYPE),)
    return joined(parts, K), tl.max(there[4].to(tl.int32), 1)


@triton.jit
def taps(column, BANDS: tl.constexpr, K: tl.constexpr, THREADS: tl.constexpr):
    """Where in [B, 3, 3] a column of `columns_of` lies: -1 for one of zeros, 9B for the first thread's 1."""
    EACH: tl.constexpr = (BANDS + THREADS - 1) // THREADS
    thread, k = column // (K // THREADS), column % (K // THREADS)
    tap = thread * (9 * EACH) + k
    tap = tl.where((k < 9 * EACH) & (tap < 9 * BANDS), tap, -1)
    return tl.where(column == 9 * EACH, 9 * BANDS, tap)


@triton.jit
def values_at(pointer, first, stride: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr):
    """C values, `stride` apart, as [1, CHANNELS]."""
    channel = tl.arange(0, CHANNELS)[None, :]
    return tl.load(pointer + (first + channel * stride), mask=channel < C, other=0).to(tl.float32)


@triton.jit
def norm(x, inside, C: tl.constexpr, eps):
    """`x` [sites, channels] with mean 0 and variance 1 over the channels `inside`, and the factor it took, [sites, 1]."""
    mean = tl.sum(tl.where(inside, x, 0.0), 1)[:, None] * (1.0 / C)
    centred = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1)[:, None] * (1.0 / C) + eps)
    return centred * rstd, rstd


@triton.jit
def norm_backward(grad, unit, rstd, inside, C: tl.constexpr):
    """The gradient of a LayerNorm's input from that of its normalised values."""
    grad = tl.where(inside, grad, 0.0)
    mean = tl.sum(grad, 1)[:, None] * (1.0 / C)
    slope = tl.sum(grad * unit, 1)[:, None] * (1.0 / C)
    return tl.where(inside, (grad - mean - unit * slope) * rstd, 0.0)


@triton.jit
def add_row(sums, row, x, SPLIT: tl.constexpr, DTYPE: tl.constexpr):
    """`sums` [rows, channels] with the sum of `x` [sites, channels] over the sites added to one row."""
    is_row = tl.arange(0, sums.shape[0])[:, None] == row
    if DTYPE == tl.float32:  # noqa: SIM300 - no tensor core takes that product
        return sums + tl.where(is_row, tl.sum(x, 0)[None, :], 0.0)
    else:
        one_hot = tl.where(is_row & (tl.arange(0, x.shape[0])[None, :] >= 0), 1.0, 0.0).to(DTYPE)
        if SPLIT:  # into two numbers of DTYPE, for a sum that cancels
            sums = product(one_hot, narrow(x - narrow(x, DTYPE).to(tl.float32), DTYPE), sums)
        return product(one_hot, narrow(x, DTYPE), sums)


@triton.jit
def matrix(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """A matrix [ROWS, COLUMNS] whose rows lie STRIDE apart."""
    return tl.load(pointer + (tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, COLUMNS)[None, :]))


@triton.jit
def put(pointer, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """Store such a matrix."""
    tl.store(pointer + (tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, COLUMNS)[None, :]), values)


@triton.jit
def conv_norm(columns, weight, norm_weight, norm_bias, pixel, num_pixels, C: tl.constexpr, eps):
    """LayerNorm of the 3x3 convolution of the neighbourhoods `columns`, [sites, channels]; what it was before LayerNorm's
    weight and bias, the factor that took, and that weight.
    """
    CHANNELS: tl.constexpr = weight.shape[1]
    conv = tl.zeros((columns.shape[0], CHANNELS), tl.float32)
    if num_pixels > 0:  # always: products in one region share how warps split them, which suits none of ours
        conv = product(columns, weight, conv)
    unit, rstd = norm(conv, tl.arange(0, CHANNELS)[None, :] < C, C, eps)
    late = pixel // num_pixels  # 0, which the compiler can't know: it would hoist the loads into registers
    scale = values_at(norm_weight, late, 1, C, CHANNELS)
    return unit * scale + values_at(norm_bias, late, 1, C, CHANNELS), unit, rstd, scale


@triton.jit
def pooled_sites(
    image,
    pixel_valid,
    sites,
    weight,
    norm_weight,
    norm_bias,
    pool_weight,
    num_pixels,
    eps,
    G: tl.constexpr,
    BANDS: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    STRIDES: tl.constexpr,
    THREADS: tl.constexpr,
):
    """What the pooling makes of a block of sites, [sites, channels] before its bias, and which sites exist, [sites]."""
    K: tl.constexpr = weight.shape[0]
    CHANNELS: tl.constexpr = weight.shape[1]
    BLOCK: tl.constexpr = sites[0].shape[0]
    inside = tl.arange(0, CHANNELS)[None, :] < C
    pooled = tl.zeros((BLOCK, CHANNELS), tl.float32)
    site_exists = tl.zeros((BLOCK,), tl.int32)
    for pixel in tl.range(num_pixels, disable_licm=True):
        columns, exists = columns_of(image, pixel_valid, sites, pixel, G, BANDS, T, STRIDES, K, THREADS, weight.dtype)
        x, _, _, _ = conv_norm(columns, weight, norm_weight, norm_bias, pixel, num_pixels, C, eps)
        cdf, _ = cdf_and_density(x)
        h = tl.where(inside & (exists != 0)[:, None], x * cdf, 0.0)
        pooled += h * values_at(pool_weight, pixel, T * T, C, CHANNELS)
        site_exists |= exists
    return pooled, site_exists
