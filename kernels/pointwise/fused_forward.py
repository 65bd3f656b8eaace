"""Triton kernels of the fused forward: rows to hidden responses, hidden responses to the output.

Shapes: C channels, D = 4C hidden channels; rows come in groups of `num_sites` that share one norm of GRN (a sample, or the
whole micro batch), and every program works on ROWS rows of one group, so that factors are vectors and never gathered.
W: the dtype of activations and products. Bytes are counted in units of one pass over [rows, C] in W.
"""

import triton
import triton.language as tl

from mpmae.kernels.pointwise.triton_parts import block_rows, gelu_and_slope, load_block, store_block
from mpmae.kernels.triton_parts import narrow, product


@triton.jit
def hidden_kernel(
    y,
    norm_weight,
    norm_bias,
    weight1,
    bias1,
    valid,
    mean,
    rstd,
    h,
    slope,
    squares,
    num_sites,
    num_blocks,
    eps,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    GELU: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """LayerNorm, Linear1 and GELU: mean, rstd, h and slope of ROWS rows, and their sums of h*h. Reads 1 unit, writes 8.

    y: [rows, C]. weight1: [D, C] in W. h, slope: [rows, D]. squares: [groups, num_blocks, D].
    """
    D: tl.constexpr = 4 * C
    program = tl.program_id(0)
    group, block = program // num_blocks, program % num_blocks
    first, row, inside, exists = block_rows(group, block, num_sites, valid, ROWS, HAS_VALID)
    column = tl.arange(0, C_PADDED)

    wide = load_block(y, first, row, column, exists, C).to(tl.float32)
    centre = tl.sum(wide, 1) / C
    centred = tl.where((column < C)[None, :], wide - centre[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    tl.store(mean + first + row, centre, mask=inside)
    tl.store(rstd + first + row, scale, mask=inside)
    gamma = tl.load(norm_weight + column, mask=column < C, other=0.0).to(tl.float32)
    beta = tl.load(norm_bias + column, mask=column < C, other=0.0).to(tl.float32)
    normed = narrow(centred * scale[:, None] * gamma[None, :] + beta[None, :], y.dtype.element_ty)

    for start in range(0, D, HIDDEN):
        d = start + tl.arange(0, HIDDEN)
        transposed = (d < D)[None, :] & (column < C)[:, None]
        taps = tl.load(weight1 + (d[None, :] * C + column[:, None]), mask=transposed, other=0.0)
        bias = tl.load(bias1 + d, mask=d < D, other=0.0).to(tl.float32)
        a = product(normed, taps, tl.zeros([ROWS, HIDDEN], tl.float32)) + bias[None, :]
        value, derivative = gelu_and_slope(a, GELU)
        # the norms are those of h as it is stored
        rounded = narrow(tl.where(exists[:, None], value, 0.0), h.dtype.element_ty).to(tl.float32)
        store_block(h, rounded, first, row, d, inside, D)
        store_block(slope, tl.where(exists[:, None], derivative, 0.0), first, row, d, inside, D)
        tl.store(squares + program.to(tl.int64) * D + d, tl.sum(rounded * rounded, 0), mask=d < D)


@triton.jit
def output_kernel(
    residual,
    h,
    factor,
    grn_beta,
    weight2,
    bias2,
    valid,
    out,
    num_sites,
    num_blocks,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    HIDDEN: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """residual + (h * factor + beta) W2^T + bias2 where a row exists, else 0, for ROWS rows. Reads 5 units, writes 1.

    factor: [groups, D] float32. weight2: [C, D] in W.
    """
    D: tl.constexpr = 4 * C
    program = tl.program_id(0)
    group, block = program // num_blocks, program % num_blocks
    first, row, inside, exists = block_rows(group, block, num_sites, valid, ROWS, HAS_VALID)
    column = tl.arange(0, C_PADDED)

    total = tl.zeros([ROWS, C_PADDED], tl.float32)
    for start in range(0, D, HIDDEN):
        d = start + tl.arange(0, HIDDEN)
        scale = tl.load(factor + group.to(tl.int64) * D + d, mask=d < D, other=0.0)
        shift = tl.load(grn_beta + d, mask=d < D, other=0.0).to(tl.float32)
        value = load_block(h, first, row, d, exists, D).to(tl.float32)
        response = narrow(value * scale[None, :] + shift[None, :], out.dtype.element_ty)
        transposed = (d < D)[:, None] & (column < C)[None, :]
        taps = tl.load(weight2 + (column[None, :] * D + d[:, None]), mask=transposed, other=0.0)
        total = product(response, taps, total)
    bias = tl.load(bias2 + column, mask=column < C, other=0.0).to(tl.float32)
    total += load_block(residual, first, row, column, exists, C).to(tl.float32) + bias[None, :]
    store_block(out, tl.where(exists[:, None], total, 0.0), first, row, column, inside, C)
