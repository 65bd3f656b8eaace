"""Passes over the hidden activations of a block in Triton: GELU, the statistics of GRN and its backward.

Shapes as in `mpmae.kernels.pointwise.formulas`: S norms, each over R sites (S = N, R = K, or S = 1, R = N*K), D = 4C.
Hidden activations are [S, R, D]; a strip is a range of the sites of one norm. Sums as in `row_passes`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpmae.kernels.pointwise.row_passes import bytes_of, strip_length, tile_rows, tile_shape
from mpmae.kernels.pointwise.triton_parts import gelu_and_slope


@triton.jit
def _where(num_sites, num_columns, sites_per_strip, num_strips, num_blocks, COLUMNS: tl.constexpr):
    """Number of this program's norm and of its strip over all norms, its first and last site, its columns."""
    number = tl.program_id(0) // num_blocks
    norm, strip = number // num_strips, number % num_strips
    column = tl.program_id(0) % num_blocks * COLUMNS + tl.arange(0, COLUMNS)
    start = norm * num_sites + strip * sites_per_strip
    stop = norm * num_sites + tl.minimum((strip + 1) * sites_per_strip, num_sites)
    return norm.to(tl.int64), number.to(tl.int64) * num_columns + column, start, stop, column, column < num_columns


@triton.jit
def _gelu_kernel(
    a, bias, valid, slope, square_sums,
    num_sites, num_columns, sites_per_strip, num_strips, num_blocks,
    GELU: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    _norm, sums, first, stop, column, in_row = _where(
        num_sites, num_columns, sites_per_strip, num_strips, num_blocks, COLUMNS
    )
    shift = tl.load(bias + column, mask=in_row, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, stop, ROWS):
        row, inside, exists = tile_rows(start, stop, valid, ROWS)
        place = row[:, None] * num_columns + column[None, :]
        there, here = inside[:, None] & in_row[None, :], exists[:, None] & in_row[None, :]
        value, derivative = gelu_and_slope(tl.load(a + place, mask=there, other=0.0).to(tl.float32) + shift[None, :], GELU)
        rounded = tl.where(here, value, 0.0).to(a.dtype.element_ty)
        tl.store(a + place, rounded, mask=there)
        tl.store(slope + place, tl.where(here, derivative, 0.0).to(slope.dtype.element_ty), mask=there)
        stored = rounded.to(tl.float32)
        total += stored * stored
    tl.store(square_sums + sums, tl.sum(total, axis=0), mask=in_row)


@triton.jit
def _scale_kernel(
    h, factor, out,
    num_sites, num_columns, sites_per_strip, num_strips, num_blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    norm, _sums, first, stop, column, in_row = _where(
        num_sites, num_columns, sites_per_strip, num_strips, num_blocks, COLUMNS
    )
    scale = tl.load(factor + norm * num_columns + column, mask=in_row, other=0.0)
    for start in range(first, stop, ROWS):
        row, inside, _exists = tile_rows(start, stop, None, ROWS)
        place = row[:, None] * num_columns + column[None, :]
        there = inside[:, None] & in_row[None, :]
        value = tl.load(h + place, mask=there, other=0.0).to(tl.float32) * scale[None, :]
        tl.store(out + place, value.to(out.dtype.element_ty), mask=there)


@triton.jit
def _product_sums_kernel(
    h, grad, product_sums,
    num_sites, num_columns, sites_per_strip, num_strips, num_blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    _norm, sums, first, stop, column, in_row = _where(
        num_sites, num_columns, sites_per_strip, num_strips, num_blocks, COLUMNS
    )
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, stop, ROWS):
        row, inside, _exists = tile_rows(start, stop, None, ROWS)
        place = row[:, None] * num_columns + column[None, :]
        there = inside[:, None] & in_row[None, :]
        value = tl.load(h + place, mask=there, other=0.0).to(tl.float32)
        total += value * tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
    tl.store(product_sums + sums, tl.sum(total, axis=0), mask=in_row)


@triton.jit
def _hidden_backward_kernel(
    grad, h, slope, factor, pull, response, bias_sums,
    num_sites, num_columns, sites_per_strip, num_strips, num_blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    norm, sums, first, stop, column, in_row = _where(
        num_sites, num_columns, sites_per_strip, num_strips, num_blocks, COLUMNS
    )
    scale = tl.load(factor + norm * num_columns + column, mask=in_row, other=0.0)[None, :]
    tug = tl.load(pull + norm * num_columns + column, mask=in_row, other=0.0)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, stop, ROWS):
        row, inside, _exists = tile_rows(start, stop, None, ROWS)
        place = row[:, None] * num_columns + column[None, :]
        there = inside[:, None] & in_row[None, :]
        of_z = tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
        value = tl.load(h + place, mask=there, other=0.0).to(tl.float32)
        derivative = tl.load(slope + place, mask=there, other=0.0).to(tl.float32)
        of_a = (of_z * scale + value * tug) * derivative
        total += of_a
        tl.store(grad + place, of_a.to(grad.dtype.element_ty), mask=there)
        if response is not None:
            tl.store(response + place, (value * scale).to(response.dtype.element_ty), mask=there)
    tl.store(bias_sums + sums, tl.sum(total, axis=0), mask=in_row)


class _Strips:
    """How the hidden activations [S, R, D] are dealt to programs: grid and arguments that all the kernels share."""

    def __init__(self, hidden: Tensor):
        num_norms, num_sites, num_columns = hidden.shape
        rows, columns = tile_shape(num_columns)
        num_blocks = triton.cdiv(num_columns, columns)
        length = strip_length(num_norms * num_sites, num_blocks, rows)
        num_strips = triton.cdiv(num_sites, length)
        self.grid = (num_norms * num_strips * num_blocks,)
        self.sizes = (num_sites, num_columns, length, num_strips, num_blocks)
        self.tile = {"ROWS": rows, "COLUMNS": columns}
        self.sums = torch.empty(num_norms, num_strips, num_columns, dtype=torch.float32, device=hidden.device)


def gelu(a: Tensor, bias: Tensor, valid: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """GELU's derivative at `a` + `bias`, and the sums of the squares of GELU's values, float32 [S, D].

    GELU itself takes the place of `a`; both are 0 at sites that do not exist. kind: one of `formulas.GELUS`.
    """
    strips, slope = _Strips(a), torch.empty_like(a)
    _gelu_kernel[strips.grid](a, bias, bytes_of(valid), slope, strips.sums, *strips.sizes, GELU=kind, **strips.tile)
    return slope, strips.sums.sum(1)


def scale(h: Tensor, factor: Tensor) -> Tensor:
    """`h` times `factor` [S, D]."""
    strips, out = _Strips(h), torch.empty_like(h)
    _scale_kernel[strips.grid](h, factor, out, *strips.sizes, **strips.tile)
    return out


def product_sums(h: Tensor, grad: Tensor) -> Tensor:
    """The sums of `h` * `grad` over the sites of each norm, float32 [S, D]."""
    strips = _Strips(h)
    _product_sums_kernel[strips.grid](h, grad, strips.sums, *strips.sizes, **strips.tile)
    return strips.sums.sum(1)


def hidden_backward(
    grad: Tensor, h: Tensor, slope: Tensor, factor: Tensor, pull: Tensor, *, with_response: bool
) -> tuple[Tensor | None, Tensor]:
    """h * factor if asked for, and the sums over all sites [D] of what takes the place of `grad`.

    That is (grad * factor + h * pull) * slope, the gradient of GELU's input. grad: of GRN's output. factor, pull: [S, D].
    """
    strips = _Strips(h)
    response = torch.empty_like(h) if with_response else None
    _hidden_backward_kernel[strips.grid](grad, h, slope, factor, pull, response, strips.sums, *strips.sizes, **strips.tile)
    return response, strips.sums.sum((0, 1))
