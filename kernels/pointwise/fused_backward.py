"""Triton kernels of the fused backward.

Shapes: C channels, D = 4C hidden channels; rows in groups as in `fused_forward`. U = h^T g of a group gives both what GRN's
norm needs, P = rowsum(U * W2), and the gradient of W2, so h is read once for them. The gradients of W1, its bias, and
LayerNorm's weight and bias all follow from Q = da^T unit (unit: y normalised, without weight and bias), with da's column
sums as its row C: see `parameters_kernel`. W: the dtype of activations and products; bytes in units of one pass over
[rows, C] in W.
"""

import triton
import triton.language as tl

from mpmae.kernels.pointwise.triton_parts import block_rows, existing_rows, load_block, store_block
from mpmae.kernels.triton_parts import narrow, product


@triton.jit
def outer_kernel(
    grad,
    h,
    factor,
    weight2,
    valid,
    products,
    partial_weight2,
    partial_sum,
    num_rows,
    num_parts,
    part_rows,
    parts_per_chunk,
    FACTOR_STRIDE: tl.constexpr,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """P of each part of the rows, and a chunk's sums of U * factor and of g, for HIDDEN hidden channels. Reads 5 units.

    A part is a sample, or any stretch of rows where all share one norm (FACTOR_STRIDE 0); the last may be shorter.
    products: [parts, D]. partial_weight2: [chunks, C, D]. partial_sum: [chunks, C]. factor: [groups, D].
    """
    D: tl.constexpr = 4 * C
    NUM_BLOCKS: tl.constexpr = (D + HIDDEN - 1) // HIDDEN
    chunk, block = tl.program_id(0) // NUM_BLOCKS, tl.program_id(0) % NUM_BLOCKS
    row, column = tl.arange(0, ROWS), tl.arange(0, C_PADDED)
    d = block * HIDDEN + tl.arange(0, HIDDEN)
    place = column[:, None] * D + d[None, :]
    inside = (column < C)[:, None] & (d < D)[None, :]
    ones = tl.full([ROWS, 16], 1.0, tl.float32).to(grad.dtype.element_ty)
    scaled = tl.zeros([C_PADDED, HIDDEN], tl.float32)
    grad_sum = tl.zeros([C_PADDED, 16], tl.float32)

    for part in range(chunk * parts_per_chunk, tl.minimum((chunk + 1) * parts_per_chunk, num_parts)):
        first = tl.cast(part, tl.int64) * part_rows
        end = tl.minimum(part_rows, num_rows - part * part_rows)
        outer = tl.zeros([C_PADDED, HIDDEN], tl.float32)
        for start in range(0, end, ROWS):
            exists = existing_rows(valid, first, start + row, end, HAS_VALID)
            transposed = tl.trans(load_block(grad, first + start, row, column, exists, C))
            outer = product(transposed, load_block(h, first + start, row, d, exists, D), outer)
            # every column is the sum over the rows; the tensor cores are idle enough to take it
            grad_sum = product(transposed, ones, grad_sum)
        # loaded late: over the rows it would hold as many registers as a sum
        taps = tl.load(weight2 + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(products + tl.cast(part, tl.int64) * D + d, tl.sum(outer * taps, 0), mask=d < D)
        scale = tl.load(factor + tl.cast(part, tl.int64) * FACTOR_STRIDE + d, mask=d < D, other=0.0)
        scaled += outer * scale[None, :]
    tl.store(partial_weight2 + chunk.to(tl.int64) * (C * D) + place, scaled, mask=inside)
    total = tl.sum(tl.where(tl.arange(0, 16)[None, :] == 0, grad_sum, 0.0), 1)
    tl.store(partial_sum + chunk * C + column, total, mask=(column < C) & (block == 0))


@triton.jit
def grad_hidden(g, taps, h, slope, factor, pull, group, first, row, d, exists, D: tl.constexpr):
    """The gradient of the pre-activations, (g W2 * factor + h * pull) * slope, in float32; taps: W2's columns d."""
    grad_z = product(g, taps, tl.zeros([g.shape[0], taps.shape[1]], tl.float32))
    scale = tl.load(factor + tl.cast(group, tl.int64) * D + d, mask=d < D, other=0.0)
    pulled = tl.load(pull + tl.cast(group, tl.int64) * D + d, mask=d < D, other=0.0)
    response = load_block(h, first, row, d, exists, D).to(tl.float32)
    steepness = load_block(slope, first, row, d, exists, D).to(tl.float32)
    return (grad_z * scale[None, :] + response * pulled[None, :]) * steepness


@triton.jit
def normalised(y, mean, rstd, first, row, column, exists, C: tl.constexpr):
    """(y - mean) * rstd of the rows in float32, 0 in rows that don't exist and beyond column C; and rstd."""
    centre = tl.load(mean + first + row, mask=exists, other=0.0)
    scale = tl.load(rstd + first + row, mask=exists, other=0.0)
    centred = load_block(y, first, row, column, exists, C).to(tl.float32) - centre[:, None]
    return tl.where((column < C)[None, :], centred * scale[:, None], 0.0), scale


@triton.jit
def norm_backward(grad_n, unit, scale, norm_weight, column, C: tl.constexpr):
    """LayerNorm's gradient of its input from that of its output; 0 where `scale` is 0."""
    gamma = tl.load(norm_weight + column, mask=column < C, other=0.0).to(tl.float32)
    scaled = grad_n * gamma[None, :]
    centre = tl.sum(scaled, 1) / C
    along = tl.sum(scaled * unit, 1) / C
    return (scaled - centre[:, None] - unit * along[:, None]) * scale[:, None]


@triton.jit
def with_ones(unit, column, C: tl.constexpr):
    """`unit` with its column C, which padding left free, set to 1: a product with it takes column sums too."""
    return tl.where((column == C)[None, :], 1.0, unit)


@triton.jit
def rows_kernel(
    grad,
    y,
    norm_weight,
    weight1,
    weight2,
    mean,
    rstd,
    h,
    slope,
    factor,
    pull,
    valid,
    grad_a,
    grad_y,
    num_sites,
    num_blocks,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """The gradient of the pre-activations, stored, and of y, for ROWS rows. Reads 10 units, writes 5.

    factor, pull: [groups, D] float32. grad_a: [rows, D].
    """
    D: tl.constexpr = 4 * C
    group, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    first, row, inside, exists = block_rows(group, block, num_sites, valid, ROWS, HAS_VALID)
    column = tl.arange(0, C_PADDED)
    g = load_block(grad, first, row, column, exists, C)

    grad_n = tl.zeros([ROWS, C_PADDED], tl.float32)
    for start in range(0, D, HIDDEN):
        d = start + tl.arange(0, HIDDEN)
        taps = load_block(weight2, 0, column, d, column < C, D)
        wide = grad_hidden(g, taps, h, slope, factor, pull, group, first, row, d, exists, D)
        da = narrow(wide, grad_a.dtype.element_ty)
        store_block(grad_a, wide, first, row, d, inside, D)
        grad_n = product(da, load_block(weight1, 0, d, column, d < D, C), grad_n)
    unit, scale = normalised(y, mean, rstd, first, row, column, exists, C)
    backward = norm_backward(grad_n, unit, scale, norm_weight, column, C)
    store_block(grad_y, backward, first, row, column, inside, C)


@triton.jit
def store_weight1(partial, total, sums, chunk, column, d, C: tl.constexpr):
    """One chunk's Q^T [C, D] with the sums of da as its row C: from `total` where padding leaves room, else from `sums`."""
    D: tl.constexpr = 4 * C
    base = partial + chunk.to(tl.int64) * ((C + 1) * D)
    tl.store(base + (column[:, None] * D + d[None, :]), total, mask=(column < C + 1)[:, None] & (d < D)[None, :])
    if total.shape[0] == C:
        tl.store(base + C * D + d, sums, mask=d < D)


@triton.jit
def weight1_kernel(
    grad_a,
    y,
    mean,
    rstd,
    valid,
    partial,
    num_rows,
    rows_per_chunk,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """A chunk's Q^T and sums of da, for HIDDEN hidden channels: partial [chunks, C + 1, D] float32. Reads 5 units."""
    D: tl.constexpr = 4 * C
    NUM_BLOCKS: tl.constexpr = (D + HIDDEN - 1) // HIDDEN
    chunk, block = tl.program_id(0) // NUM_BLOCKS, tl.program_id(0) % NUM_BLOCKS
    row, column = tl.arange(0, ROWS), tl.arange(0, C_PADDED)
    d = block * HIDDEN + tl.arange(0, HIDDEN)
    first = chunk.to(tl.int64) * rows_per_chunk
    end = tl.minimum(rows_per_chunk, num_rows - chunk * rows_per_chunk)
    total = tl.zeros([C_PADDED, HIDDEN], tl.float32)
    sums = tl.zeros([HIDDEN], tl.float32)
    for start in range(0, end, ROWS):
        exists = existing_rows(valid, first, start + row, end, HAS_VALID)
        unit, _ = normalised(y, mean, rstd, first + start, row, column, exists, C)
        da = load_block(grad_a, first + start, row, d, exists, D)
        left = tl.trans(narrow(with_ones(unit, column, C), y.dtype.element_ty))
        total = product(left, da, total)
        if C == C_PADDED:
            sums += tl.sum(da.to(tl.float32), 0)
    store_weight1(partial, total, sums, chunk, column, d, C)


@triton.jit
def rows_and_weight1_kernel(
    grad,
    y,
    norm_weight,
    weight1,
    weight2,
    mean,
    rstd,
    h,
    slope,
    factor,
    pull,
    valid,
    grad_y,
    partial,
    num_sites,
    num_blocks,
    total_blocks,
    blocks_per_chunk,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """`rows_kernel` and `weight1_kernel` at once, with all of Q in registers: reads 10 units, writes 1, and no da at all."""
    D: tl.constexpr = 4 * C
    NUM_PIECES: tl.constexpr = (D + HIDDEN - 1) // HIDDEN
    chunk = tl.program_id(0)
    column = tl.arange(0, C_PADDED)
    totals = (tl.zeros([C_PADDED, HIDDEN], tl.float32),) * NUM_PIECES
    sums = (tl.zeros([HIDDEN], tl.float32),) * NUM_PIECES
    for index in range(chunk * blocks_per_chunk, tl.minimum((chunk + 1) * blocks_per_chunk, total_blocks)):
        group, block = index // num_blocks, index % num_blocks
        first, row, inside, exists = block_rows(group, block, num_sites, valid, ROWS, HAS_VALID)
        g = load_block(grad, first, row, column, exists, C)
        unit, scale = normalised(y, mean, rstd, first, row, column, exists, C)
        left = tl.trans(narrow(with_ones(unit, column, C), y.dtype.element_ty))
        grad_n = tl.zeros([ROWS, C_PADDED], tl.float32)
        new_totals, new_sums = (), ()
        for piece in tl.static_range(NUM_PIECES):
            d = piece * HIDDEN + tl.arange(0, HIDDEN)
            taps = load_block(weight2, 0, column, d, column < C, D)
            wide = grad_hidden(g, taps, h, slope, factor, pull, group, first, row, d, exists, D)
            da = narrow(wide, y.dtype.element_ty)
            grad_n = product(da, load_block(weight1, 0, d, column, d < D, C), grad_n)
            new_totals = new_totals + (product(left, da, totals[piece]),)  # noqa: RUF005
            if C == C_PADDED:
                new_sums = new_sums + (sums[piece] + tl.sum(da.to(tl.float32), 0),)  # noqa: RUF005
            else:
                new_sums = new_sums + (sums[piece],)  # noqa: RUF005
        totals, sums = new_totals, new_sums
        backward = norm_backward(grad_n, unit, scale, norm_weight, column, C)
        store_block(grad_y, backward, first, row, column, inside, C)
    for piece in tl.static_range(NUM_PIECES):
        store_weight1(partial, totals[piece], sums[piece], chunk, column, piece * HIDDEN + tl.arange(0, HIDDEN), C)


@triton.jit
def parameters_kernel(
    sums1,
    sums2,
    grad_sum,
    weights1,
    weights2,
    norm_weight,
    norm_bias,
    grn_beta,
    grad_norm_weight,
    grad_norm_bias,
    grad_weight1,
    grad_grn_beta,
    grad_weight2,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Gradients of the parameters from Q^T and da's sums (sums1 [C + 1, D]), sums of U * factor (sums2 [C, D]) and of g.

    dW1 = Q * weight + sum(da) outer bias; LayerNorm's weight: rowsum(Q^T * W1^T); its bias: W1^T sum(da);
    dW2 = sums2 + sum(g) outer beta; beta: W2^T sum(g). weights1 is in W, as its products were; weights2 as it is given.
    """
    D: tl.constexpr = 4 * C
    CHANNEL_BLOCKS: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    program = tl.program_id(0)
    if program < CHANNEL_BLOCKS:
        c = program * CHANNELS + tl.arange(0, CHANNELS)
        weight = tl.load(norm_weight + c, mask=c < C, other=0.0).to(tl.float32)
        bias = tl.load(norm_bias + c, mask=c < C, other=0.0).to(tl.float32)
        grads = tl.load(grad_sum + c, mask=c < C, other=0.0)
        of_weight = tl.zeros([CHANNELS], tl.float32)
        of_bias = tl.zeros([CHANNELS], tl.float32)
        for start in range(0, D, HIDDEN):
            d = start + tl.arange(0, HIDDEN)
            inside = (c < C)[:, None] & (d < D)[None, :]
            place, transposed = c[:, None] * D + d[None, :], d[None, :] * C + c[:, None]
            q = tl.load(sums1 + place, mask=inside, other=0.0)
            taps = tl.load(weights1 + transposed, mask=inside, other=0.0).to(tl.float32)
            da = tl.load(sums1 + C * D + d, mask=d < D, other=0.0)
            beta = tl.load(grn_beta + d, mask=d < D, other=0.0).to(tl.float32)
            of_weight += tl.sum(q * taps, 1)
            of_bias += tl.sum(da[None, :] * taps, 1)
            tl.store(grad_weight1 + transposed, q * weight[:, None] + da[None, :] * bias[:, None], mask=inside)
            scaled = tl.load(sums2 + place, mask=inside, other=0.0)
            tl.store(grad_weight2 + place, scaled + grads[:, None] * beta[None, :], mask=inside)
        tl.store(grad_norm_weight + c, of_weight, mask=c < C)
        tl.store(grad_norm_bias + c, of_bias, mask=c < C)
    else:
        d = (program - CHANNEL_BLOCKS) * HIDDEN + tl.arange(0, HIDDEN)
        c = tl.arange(0, C_PADDED)
        grads = tl.load(grad_sum + c, mask=c < C, other=0.0)
        inside = (c < C)[:, None] & (d < D)[None, :]
        taps = tl.load(weights2 + (c[:, None] * D + d[None, :]), mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_grn_beta + d, tl.sum(taps * grads[:, None], 0), mask=d < D)
