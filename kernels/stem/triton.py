"""The stem in two kernels over blocks of sites; nothing at the image's resolution leaves the registers.

For each of the t*t pixels of its sites a block gathers the 3x3 neighbourhood of every band, [sites, 9B+1] (the last column
is 1 and carries the bias), multiplies, normalises and pools. A program walks over many blocks, so weights are read once.

The backward does that again and sums the gradient of the 3x3 convolution in registers over all blocks of a program, the
others as rows of one small matrix, by products with one-hot rows, which tensor cores take. Each program writes its sums
once and a second kernel adds them up in a fixed order: the same bits in every run.

One thread holds all neighbours of a pixel, so a load is one instruction with a constant offset from the pixel's address.
Channels are padded to a power of two; where warps split the sites only, the padding lies in registers of its own and the
compiler drops what is computed for it.

Shapes as in `mpmae.kernels`; B bands, S image side in pixels, p patch side in pixels, t = p/8 pixels on a side of a site, R
gradient rows of C values: 9B taps, VECTORS vectors and the t*t taps of the pooling.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
SITES = tl.constexpr(64)  # of a tile
HALO = tl.constexpr(3)  # absent patches around the grid in the table of slots
VECTORS = tl.constexpr(6)  # gradients of C values: biases and norms


@triton.jit
def _narrow(x, DTYPE: tl.constexpr):
    """`x` rounded to DTYPE; the interpreter cuts bfloat16 off instead of rounding it, so it is rounded by hand there."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _product(a, b, acc):
    """acc + a b, sums in float32; the interpreter knows no arithmetic of bfloat16."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _cdf_and_density(x):
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
def _sites(
    first, num_sites, visible, slots, num_visible, G: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr
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
def _joined(parts, K: tl.constexpr):
    """[sites, K] from tensors [sites, threads of a pixel], those of one thread next to each other."""
    if len(parts) == 1:
        return parts[0].reshape(parts[0].shape[0], K)
    else:
        HALF: tl.constexpr = len(parts) // 2
        pairs = ()
        for k in tl.static_range(HALF):
            pairs = pairs + (tl.join(parts[k], parts[k + HALF]),)  # noqa: RUF005 - Triton has no starred tuples
        return _joined(pairs, K)


@triton.jit
def _columns(
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
        there = there + (exists,)  # noqa: RUF005
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
        parts = parts + (_narrow(value, DTYPE),)  # noqa: RUF005
    return _joined(parts, K), tl.max(there[4].to(tl.int32), 1)


@triton.jit
def _taps(column, BANDS: tl.constexpr, K: tl.constexpr, THREADS: tl.constexpr):
    """Where in [B, 3, 3] a column of `_columns` lies: -1 for one of zeros, 9B for the first thread's 1."""
    EACH: tl.constexpr = (BANDS + THREADS - 1) // THREADS
    thread, k = column // (K // THREADS), column % (K // THREADS)
    tap = thread * (9 * EACH) + k
    tap = tl.where((k < 9 * EACH) & (tap < 9 * BANDS), tap, -1)
    return tl.where(column == 9 * EACH, 9 * BANDS, tap)


@triton.jit
def _vector(pointer, first, stride: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr):
    """C values, `stride` apart, as [1, CHANNELS]."""
    channel = tl.arange(0, CHANNELS)[None, :]
    return tl.load(pointer + (first + channel * stride), mask=channel < C, other=0).to(tl.float32)


@triton.jit
def _norm(x, inside, C: tl.constexpr, eps):
    """`x` [sites, channels] with mean 0 and variance 1 over the channels `inside`, and the factor it took, [sites, 1]."""
    mean = tl.sum(tl.where(inside, x, 0.0), 1)[:, None] * (1.0 / C)
    centred = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1)[:, None] * (1.0 / C) + eps)
    return centred * rstd, rstd


@triton.jit
def _norm_backward(grad, unit, rstd, inside, C: tl.constexpr):
    """The gradient of a LayerNorm's input from that of its normalised values."""
    grad = tl.where(inside, grad, 0.0)
    mean = tl.sum(grad, 1)[:, None] * (1.0 / C)
    slope = tl.sum(grad * unit, 1)[:, None] * (1.0 / C)
    return tl.where(inside, (grad - mean - unit * slope) * rstd, 0.0)


@triton.jit
def _add_row(sums, row, x, SPLIT: tl.constexpr, DTYPE: tl.constexpr):
    """`sums` [rows, channels] with the sum of `x` [sites, channels] over the sites added to one row."""
    is_row = tl.arange(0, sums.shape[0])[:, None] == row
    if DTYPE == tl.float32:  # no tensor core takes that product
        return sums + tl.where(is_row, tl.sum(x, 0)[None, :], 0.0)
    else:
        one_hot = tl.where(is_row & (tl.arange(0, x.shape[0])[None, :] >= 0), 1.0, 0.0).to(DTYPE)
        if SPLIT:  # into two numbers of DTYPE, for a sum that cancels
            sums = _product(one_hot, _narrow(x - _narrow(x, DTYPE).to(tl.float32), DTYPE), sums)
        return _product(one_hot, _narrow(x, DTYPE), sums)


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
    """The weight [C, B, 3, 3] and the bias as [K, CHANNELS], in the order of `_columns`."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel, tap = place % CHANNELS, _taps(place // CHANNELS, BANDS, K, THREADS)
    inside = channel < C
    value = tl.load(weight + channel * (9 * BANDS) + tap, mask=inside & (tap >= 0) & (tap < 9 * BANDS), other=0)
    shift = tl.load(bias + channel, mask=inside & (tap == 9 * BANDS), other=0)
    value = value.to(tl.float32) + shift.to(tl.float32)  # one of them is 0
    tl.store(packed + place, _narrow(value, packed.dtype.element_ty))


@triton.jit
def _matrix(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    return tl.load(pointer + (tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, COLUMNS)[None, :]))


@triton.jit
def _put(pointer, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    tl.store(pointer + (tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, COLUMNS)[None, :]), values)


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
    DTYPE: tl.constexpr = packed.dtype.element_ty
    weight = _matrix(packed, K, CHANNELS, CHANNELS)
    for block in tl.range(tl.program_id(0), tl.cdiv(num_sites, BLOCK), tl.num_programs(0), disable_licm=True):
        late = block // tl.cdiv(num_sites, BLOCK)  # 0, which the compiler can't know: it would hoist loads into registers
        sites = _sites(block * BLOCK, num_sites, visible, slots, num_visible, G, T, BLOCK, THREADS)
        pooled = tl.zeros((BLOCK, CHANNELS), tl.float32)
        site_exists = tl.zeros((BLOCK,), tl.int32)
        for pixel in tl.range(num_pixels, disable_licm=True):
            columns, exists = _columns(image, pixel_valid, sites, pixel, G, BANDS, T, STRIDES, K, THREADS, DTYPE)
            conv = tl.zeros((BLOCK, CHANNELS), tl.float32)
            if num_pixels > 0:
                conv = _product(columns, weight, conv)
            unit, _ = _norm(conv, inside, C, eps)
            scale = _vector(conv_norm_weight, pixel // num_pixels, 1, C, CHANNELS)
            x = unit * scale + _vector(conv_norm_bias, pixel // num_pixels, 1, C, CHANNELS)
            cdf, _ = _cdf_and_density(x)
            h = tl.where(inside & (exists != 0)[:, None], x * cdf, 0.0)
            pooled += h * _vector(pool_weight, pixel, T * T, C, CHANNELS)
            site_exists |= exists
        unit, _ = _norm(pooled + _vector(pool_bias, late, 1, C, CHANNELS), inside, C, eps)
        result = unit * _vector(norm_weight, late, 1, C, CHANNELS) + _vector(norm_bias, late, 1, C, CHANNELS)
        result = tl.where((site_exists != 0)[:, None], result, 0.0)
        row = tl.arange(0, BLOCK)[:, None]
        place = out + tl.cast(block, tl.int64) * (BLOCK * C) + (row * C + tl.arange(0, CHANNELS)[None, :])
        tl.store(place, _narrow(result, out.dtype.element_ty), mask=inside & (block * BLOCK + row < num_sites))


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
    weight = _matrix(packed, K, CHANNELS, CHANNELS)
    sums = tl.zeros((ROWS, CHANNELS), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(num_sites, BLOCK), tl.num_programs(0), disable_licm=True):
        late = block // tl.cdiv(num_sites, BLOCK)  # 0, which the compiler can't know: it would hoist loads into registers
        sites = _sites(block * BLOCK, num_sites, visible, slots, num_visible, G, T, BLOCK, THREADS)
        pooled = tl.zeros((BLOCK, CHANNELS), tl.float32)
        site_exists = tl.zeros((BLOCK,), tl.int32)
        for pixel in tl.range(num_pixels, disable_licm=True):
            columns, exists = _columns(image, pixel_valid, sites, pixel, G, BANDS, T, STRIDES, K, THREADS, DTYPE)
            conv = tl.zeros((BLOCK, CHANNELS), tl.float32)
            if num_pixels > 0:
                conv = _product(columns, weight, conv)
            unit, rstd = _norm(conv, inside, C, eps)
            scale = _vector(conv_norm_weight, pixel // num_pixels, 1, C, CHANNELS)
            x = unit * scale + _vector(conv_norm_bias, pixel // num_pixels, 1, C, CHANNELS)
            cdf, density = _cdf_and_density(x)
            h = tl.where(inside & (exists != 0)[:, None], x * cdf, 0.0)
            pooled += h * _vector(pool_weight, pixel, T * T, C, CHANNELS)
            site_exists |= exists
        known = inside & (site_exists != 0)[:, None]
        place = grad + tl.cast(block, tl.int64) * (BLOCK * C) + (tl.arange(0, BLOCK)[:, None] * C + channel)
        above = tl.load(place, mask=known, other=0).to(tl.float32)
        unit2, rstd2 = _norm(pooled + _vector(pool_bias, late, 1, C, CHANNELS), inside, C, eps)
        sums = _add_row(sums, 3, above * unit2, False, DTYPE)
        sums = _add_row(sums, 4, above, False, DTYPE)
        grad_pooled = _norm_backward(above * _vector(norm_weight, late, 1, C, CHANNELS), unit2, rstd2, inside, C)
        sums = _add_row(sums, 2, grad_pooled, True, DTYPE)
        for pixel in tl.range(num_pixels, disable_licm=True):
            columns, exists = _columns(image, pixel_valid, sites, pixel, G, BANDS, T, STRIDES, K, THREADS, DTYPE)
            conv = tl.zeros((BLOCK, CHANNELS), tl.float32)
            if num_pixels > 0:
                conv = _product(columns, weight, conv)
            unit, rstd = _norm(conv, inside, C, eps)
            scale = _vector(conv_norm_weight, pixel // num_pixels, 1, C, CHANNELS)
            x = unit * scale + _vector(conv_norm_bias, pixel // num_pixels, 1, C, CHANNELS)
            cdf, density = _cdf_and_density(x)
            there = inside & (exists != 0)[:, None]
            sums = _add_row(sums, 5 + pixel, tl.where(there, grad_pooled * x * cdf, 0.0), False, DTYPE)
            tap = _vector(pool_weight, pixel, T * T, C, CHANNELS)
            grad_x = tl.where(there, grad_pooled * tap * (cdf + x * density), 0.0)
            sums = _add_row(sums, 0, grad_x * unit, False, DTYPE)
            sums = _add_row(sums, 1, grad_x, False, DTYPE)
            below = _narrow(_norm_backward(grad_x * scale, unit, rstd, inside, C), DTYPE)
            tile = grad_conv + (tl.cast(block, tl.int64) * (T * T) + pixel) * (BLOCK * C)
            tl.store(tile + (tl.arange(0, BLOCK)[:, None] * C + channel), below, mask=inside)
    _put(partial + (tl.program_id(0) * SIZE + SIZE - ROWS * CHANNELS), sums, ROWS, CHANNELS, CHANNELS)


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
        sites = _sites(block * BLOCK, num_sites, visible, slots, num_visible, G, T, BLOCK, THREADS)
        for pixel in tl.range(num_pixels, disable_licm=True):
            columns, _ = _columns(image, pixel_valid, sites, pixel, G, BANDS, T, STRIDES, K, THREADS, DTYPE)
            tile = grad_conv + (tl.cast(block, tl.int64) * (T * T) + pixel) * (BLOCK * C)
            below = _matrix(tile + first, BLOCK, COLUMNS, C)  # past the last channel it reads on: of no consequence
            grad_weight = _product(tl.trans(columns), below, grad_weight)
    _put(partial + (tl.program_id(0) * SIZE + first), grad_weight, K, COLUMNS, CHANNELS)


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
    tap, vector = _taps(row, BANDS, K, THREADS), row - K
    is_tap = (row < K) & (tap >= 0)
    of_weight = tl.where(tap < 9 * BANDS, channel * (9 * BANDS) + tap, 9 * BANDS * C + channel)
    of_vector = (9 * BANDS + 1 + vector) * C + channel
    of_pool = (9 * BANDS + VECTORS) * C + channel * (T * T) + vector - (VECTORS - 1)
    target = tl.where(row < K, of_weight, tl.where(vector < VECTORS - 1, of_vector, of_pool))
    kept = (channel < C) & tl.where(row < K, is_tap, vector < VECTORS - 1 + T * T)
    tl.store(total + target, tl.sum(sums, 0), mask=kept)
