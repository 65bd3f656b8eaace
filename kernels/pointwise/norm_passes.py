"""What GRN needs per norm, and its factors folded into the weights of Linear2, in Triton.

Shapes: S norms, D = 4C hidden channels. All in float32; sums in a fixed order. `grn` has the same for narrow blocks, which
keep a norm's channels in registers all at once; here there may be 16384 of them, which a program passes over twice.
Source of the formulas: `mpmae.kernels.pointwise.formulas`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpmae.kernels.pointwise.triton_parts import grn_factor, grn_pull

COLUMNS = 1024
FOLD_ROWS, FOLD_COLUMNS = 16, 128
TARGET_PROGRAMS = 1024


@triton.jit
def _factor_kernel(norm, gamma, factor, num_columns, eps, COLUMNS: tl.constexpr):
    base = tl.program_id(0).to(tl.int64) * num_columns
    lengths = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, num_columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        lengths += tl.load(norm + base + column, mask=column < num_columns, other=0.0)
    mean = tl.sum(lengths, axis=0) / num_columns + eps
    for start in range(0, num_columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < num_columns
        length = tl.load(norm + base + column, mask=inside, other=0.0)
        gain = tl.load(gamma + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(factor + base + column, grn_factor(length, mean, gain), mask=inside)


@triton.jit
def _pull_kernel(products, norm, gamma, pull, grad_gamma, num_columns, eps, COLUMNS: tl.constexpr):
    base = tl.program_id(0).to(tl.int64) * num_columns
    lengths = tl.zeros((COLUMNS,), tl.float32)
    along = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, num_columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < num_columns
        length = tl.load(norm + base + column, mask=inside, other=0.0)
        gain = tl.load(gamma + column, mask=inside, other=0.0).to(tl.float32)
        lengths += length
        along += gain * tl.load(products + base + column, mask=inside, other=0.0) * length
    mean = tl.sum(lengths, axis=0) / num_columns + eps
    level = tl.sum(along, axis=0) / num_columns / mean / mean
    for start in range(0, num_columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < num_columns
        length = tl.load(norm + base + column, mask=inside, other=0.0)
        gain = tl.load(gamma + column, mask=inside, other=0.0).to(tl.float32)
        product = tl.load(products + base + column, mask=inside, other=0.0)
        tl.store(pull + base + column, grn_pull(product, length, mean, gain, level), mask=inside)
        tl.store(grad_gamma + base + column, length / mean * product, mask=inside)


@triton.jit
def _fold_kernel(
    weight, factor, out, num_rows, num_columns, num_row_blocks, num_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    program = tl.program_id(0)
    norm = (program // num_blocks // num_row_blocks).to(tl.int64)
    row = program // num_blocks % num_row_blocks * ROWS + tl.arange(0, ROWS)
    column = program % num_blocks * COLUMNS + tl.arange(0, COLUMNS)
    in_row = column < num_columns
    here = (row < num_rows)[:, None] & in_row[None, :]
    place = row[:, None] * num_columns + column[None, :]
    value = tl.load(weight + place, mask=here, other=0.0).to(tl.float32)
    scaled = value * tl.load(factor + norm * num_columns + column, mask=in_row, other=0.0)[None, :]
    tl.store(out + norm * num_rows * num_columns + place, scaled.to(out.dtype.element_ty), mask=here)


@triton.jit
def _unfold_kernel(
    outer, weight, factor, grad_weight, products,
    num_norms, num_rows, num_columns, num_row_blocks, num_blocks, norms_per_strip,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    strip = (program // num_blocks // num_row_blocks).to(tl.int64)
    row_block = program // num_blocks % num_row_blocks
    row = row_block * ROWS + tl.arange(0, ROWS)
    column = program % num_blocks * COLUMNS + tl.arange(0, COLUMNS)
    in_row = column < num_columns
    here = (row < num_rows)[:, None] & in_row[None, :]
    place = row[:, None] * num_columns + column[None, :]
    values = tl.load(weight + place, mask=here, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for norm in range(strip * norms_per_strip, tl.minimum((strip + 1) * norms_per_strip, num_norms)):
        pair = tl.load(outer + norm * num_rows * num_columns + place, mask=here, other=0.0)
        scale = tl.load(factor + norm * num_columns + column, mask=in_row, other=0.0)
        total += pair * scale[None, :]
        part = (norm * num_row_blocks + row_block) * num_columns + column
        tl.store(products + part, tl.sum(values * pair, axis=0), mask=in_row)
    tl.store(grad_weight + strip * num_rows * num_columns + place, total, mask=here)


def factors(norm: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """The factors 1 + gamma * Nx of h, [S, D], for the norms [S, D]."""
    factor = torch.empty_like(norm)
    _factor_kernel[(len(norm),)](norm, gamma, factor, norm.shape[1], eps, COLUMNS=COLUMNS)
    return factor


def pulls(products: Tensor, norm: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The pulls of `formulas.grn_pull` [S, D] and the gradient of gamma [D].

    products: [S, D], sums over the sites of a norm of h times the gradient of GRN's output. norm: [S, D].
    """
    pull, grad_gamma = torch.empty_like(norm), torch.empty_like(norm)
    _pull_kernel[(len(norm),)](products, norm, gamma, pull, grad_gamma, norm.shape[1], eps, COLUMNS=COLUMNS)
    return pull, grad_gamma.sum(0)


def fold(weight: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` [C, D] with its columns times each row of `factor` [S, D], rounded to `dtype`: [S, C, D]."""
    num_rows, num_columns = weight.shape
    out = torch.empty(len(factor), num_rows, num_columns, dtype=dtype, device=weight.device)
    num_row_blocks, num_blocks = triton.cdiv(num_rows, FOLD_ROWS), triton.cdiv(num_columns, FOLD_COLUMNS)
    _fold_kernel[(len(factor) * num_row_blocks * num_blocks,)](
        weight, factor, out, num_rows, num_columns, num_row_blocks, num_blocks, ROWS=FOLD_ROWS, COLUMNS=FOLD_COLUMNS
    )
    return out


def unfold(outer: Tensor, weight: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """What the products of the output's gradient and h over the sites of each norm, `outer` float32 [S, C, D], hold.

    The sum over the norms of `outer` times the factors [S, D]: weight's gradient [C, D] but for GRN's beta. And the sums of
    h times the gradient of GRN's output [S, D], which here are the sums over the rows of `weight` [C, D] times `outer`.
    """
    num_norms, num_rows, num_columns = outer.shape
    num_row_blocks, num_blocks = triton.cdiv(num_rows, FOLD_ROWS), triton.cdiv(num_columns, FOLD_COLUMNS)
    strip = triton.cdiv(num_norms * num_row_blocks * num_blocks, TARGET_PROGRAMS)
    grad_weight = torch.empty(triton.cdiv(num_norms, strip), num_rows, num_columns, device=outer.device)
    products = torch.empty(num_norms, num_row_blocks, num_columns, device=outer.device)
    _unfold_kernel[(len(grad_weight) * num_row_blocks * num_blocks,)](
        outer, weight, factor, grad_weight, products,
        num_norms, num_rows, num_columns, num_row_blocks, num_blocks, strip, ROWS=FOLD_ROWS, COLUMNS=FOLD_COLUMNS,
    )  # fmt: skip
    return grad_weight.sum(0), products.sum(1)
