"""Pieces of the pointwise kernels in Triton: GELU, GRN, which rows exist, blocks of matrices."""

import triton
import triton.language as tl

from mpmae.kernels.triton_parts import narrow


@triton.jit
def gelu_and_slope(a, GELU: tl.constexpr):
    """GELU of float32 `a` and its derivative. GELU, the kind: see `mpmae.kernels.pointwise.formulas.gelu_and_slope`."""
    if GELU == "erf":
        cdf = 0.5 + 0.5 * tl.erf(a * 0.7071067811865476)
        return a * cdf, cdf + a * (0.3989422804014327 * tl.exp(-0.5 * a * a))
    elif GELU == "poly":
        # the numbers of formulas.CDF_COEFFICIENTS
        u = tl.minimum(tl.maximum(a, -4.0), 4.0)
        t = u * u
        q = -5.932922630e-10 * t + 6.111105033e-08
        q = q * t - 2.604967780e-06
        q = q * t + 6.171437460e-05
        q = q * t - 9.181253198e-04
        q = q * t + 9.198536975e-03
        q = q * t - 6.541736100e-02
        q = q * t + 3.984744487e-01
        cdf = 0.5 + u * q
        return a * cdf, cdf + a * (0.3989422804014327 * tl.exp(-0.5 * a * a))
    else:
        # (1 + tanh(u)) / 2 is the logistic function of 2u
        square = a * a
        cdf = 1 / (1 + tl.exp(a * (-1.5957691216057308 - 0.07135481627159897 * square)))
        return a * cdf, cdf + a * (cdf * (1 - cdf)) * (1.5957691216057308 + 0.21406444881479692 * square)


@triton.jit
def grn_factor(length, mean, gamma):
    """The factor 1 + gamma * Nx of h for norms `length`, `mean` their mean + eps."""
    return 1.0 + gamma * (length / mean)


@triton.jit
def grn_pull(product, length, mean, gamma, level):
    """The factor of h that the gradient through the norms adds; see `mpmae.kernels.pointwise.formulas.grn_pull`.

    product: P. level: what the mean takes off a norm's gradient, sum(gamma P G) / (D mean^2).
    """
    # the norm of zeros gets the subgradient 0
    return tl.where(length > 0, (gamma * product / mean - level) / tl.where(length > 0, length, 1.0), 0.0)


@triton.jit
def existing_rows(valid, first, row, end, HAS_VALID: tl.constexpr):
    """Whether rows `row` (counted from row `first`) exist: below `end`, and sites with data."""
    exists = row < end
    if HAS_VALID:
        exists = exists & (tl.load(valid + first + row, mask=exists, other=0) != 0)
    return exists


@triton.jit
def block_rows(group, block, num_sites, valid, ROWS: tl.constexpr, HAS_VALID: tl.constexpr):
    """Of the ROWS rows of a block of a group of `num_sites`: the first's number (int64), their numbers from it on, which of
    them the group has, and which of those exist."""
    first = tl.cast(group, tl.int64) * num_sites + block * ROWS
    row, end = tl.arange(0, ROWS), num_sites - block * ROWS
    return first, row, row < end, existing_rows(valid, first, row, end, HAS_VALID)


@triton.jit
def load_block(matrix, first, row, column, exists, WIDTH: tl.constexpr):
    """matrix[first + row, column] of a row-major matrix of WIDTH columns: 0 in rows that don't exist and beyond WIDTH.

    first: int64, so that the matrix may hold more elements than int32 counts.
    """
    place = matrix + first * WIDTH + (row[:, None] * WIDTH + column[None, :])
    return tl.load(place, mask=exists[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_block(matrix, value, first, row, column, inside, WIDTH: tl.constexpr):
    """matrix[first + row, column] = float32 `value` in rows `inside` and below WIDTH."""
    place = matrix + first * WIDTH + (row[:, None] * WIDTH + column[None, :])
    tl.store(place, narrow(value, matrix.dtype.element_ty), mask=inside[:, None] & (column < WIDTH)[None, :])
