"""Passes over the rows of a matrix in Triton: LayerNorm, its backward, sums of columns, a row added to every row.

Shapes: M rows, C columns, P strips (contiguous ranges of rows, one program each for a block of columns). `valid`: bool [M]
or None; a row where it is False counts for nothing, whatever it holds, and comes out as 0.

Each tensor is read once and written once; rows that do not exist are loaded, too, as a load that waited for `valid` would
come a second latency late. A sum over rows is taken in two stages and a fixed order, in float32: every strip
writes its own sum [P, C], and one reduction adds the strips, so the result never depends on timing. How many strips there
are follows from the shape alone, not from the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS_PER_TILE = 2048
TARGET_PROGRAMS = 4096


@triton.jit
def tile_rows(start, stop, valid, ROWS: tl.constexpr):
    """Numbers of ROWS rows from `start` (int64), which of them lie before `stop`, and which of those exist."""
    row = start + tl.arange(0, ROWS)
    inside = row < stop
    exists = inside
    if valid is not None:
        exists = inside & (tl.load(valid + row, mask=inside, other=0) != 0)
    return row.to(tl.int64), inside, exists


@triton.jit
def _layer_norm_kernel(
    x, weight, bias, valid, normed, mean, rstd, num_rows, num_columns, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row, inside, exists = tile_rows(tl.program_id(0) * ROWS, num_rows, valid, ROWS)
    column = tl.arange(0, COLUMNS)
    in_row = column < num_columns
    place = row[:, None] * num_columns + column[None, :]
    there, here = inside[:, None] & in_row[None, :], exists[:, None] & in_row[None, :]
    value = tl.where(here, tl.load(x + place, mask=there, other=0.0).to(tl.float32), 0.0)
    average = tl.sum(value, axis=1) / num_columns
    centred = tl.where(in_row[None, :], value - average[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / num_columns + eps)
    gain = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=in_row, other=0.0).to(tl.float32)
    out = tl.where(exists[:, None], centred * scale[:, None] * gain[None, :] + shift[None, :], 0.0)
    tl.store(normed + place, out.to(normed.dtype.element_ty), mask=there)
    tl.store(mean + row, average, mask=inside)
    tl.store(rstd + row, scale, mask=inside)


@triton.jit
def _layer_norm_backward_kernel(
    grad,
    x,
    mean,
    rstd,
    weight,
    bias,
    valid,
    grad_x,
    normed,
    weight_sums,
    bias_sums,
    num_rows,
    num_columns,
    rows_per_strip,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    strip = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    in_row = column < num_columns
    gain = tl.load(weight + column, mask=in_row, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=in_row, other=0.0).to(tl.float32)
    of_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    stop = tl.minimum((strip + 1) * rows_per_strip, num_rows)
    for start in range(strip * rows_per_strip, stop, ROWS):
        row, inside, exists = tile_rows(start, stop, valid, ROWS)
        place = row[:, None] * num_columns + column[None, :]
        there, here = inside[:, None] & in_row[None, :], exists[:, None] & in_row[None, :]
        centre, scale = tl.load(mean + row, mask=inside, other=0.0), tl.load(rstd + row, mask=inside, other=0.0)
        pulled = tl.where(here, tl.load(grad + place, mask=there, other=0.0).to(tl.float32), 0.0)
        value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        unit = tl.where(here, (value - centre[:, None]) * scale[:, None], 0.0)
        of_weight += pulled * unit
        of_bias += pulled
        scaled = pulled * gain[None, :]
        level = tl.sum(scaled, axis=1) / num_columns
        slant = tl.sum(scaled * unit, axis=1) / num_columns
        out = (scaled - level[:, None] - unit * slant[:, None]) * scale[:, None]
        tl.store(grad_x + place, out.to(grad_x.dtype.element_ty), mask=there)
        again = tl.where(exists[:, None], unit * gain[None, :] + shift[None, :], 0.0)
        tl.store(normed + place, again.to(normed.dtype.element_ty), mask=there)
    sums = strip.to(tl.int64) * num_columns + column
    tl.store(weight_sums + sums, tl.sum(of_weight, axis=0), mask=in_row)
    tl.store(bias_sums + sums, tl.sum(of_bias, axis=0), mask=in_row)


@triton.jit
def _column_sums_kernel(
    x, valid, kept, sums, num_rows, num_columns, rows_per_strip, num_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    strip = tl.program_id(0) // num_blocks
    column = tl.program_id(0) % num_blocks * COLUMNS + tl.arange(0, COLUMNS)
    in_row = column < num_columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    stop = tl.minimum((strip + 1) * rows_per_strip, num_rows)
    for start in range(strip * rows_per_strip, stop, ROWS):
        row, inside, exists = tile_rows(start, stop, valid, ROWS)
        place = row[:, None] * num_columns + column[None, :]
        there, here = inside[:, None] & in_row[None, :], exists[:, None] & in_row[None, :]
        value = tl.where(here, tl.load(x + place, mask=there, other=0.0).to(tl.float32), 0.0)
        total += value
        if kept is not None:
            tl.store(kept + place, value.to(kept.dtype.element_ty), mask=there)
    tl.store(sums + strip.to(tl.int64) * num_columns + column, tl.sum(total, axis=0), mask=in_row)


@triton.jit
def _add_row_kernel(x, addend, valid, out, num_rows, num_columns, num_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, inside, exists = tile_rows(tl.program_id(0) // num_blocks * ROWS, num_rows, valid, ROWS)
    column = tl.program_id(0) % num_blocks * COLUMNS + tl.arange(0, COLUMNS)
    in_row = column < num_columns
    place = row[:, None] * num_columns + column[None, :]
    there, here = inside[:, None] & in_row[None, :], exists[:, None] & in_row[None, :]
    value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    added = value + tl.load(addend + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, tl.where(here, added, 0.0).to(out.dtype.element_ty), mask=there)


def bytes_of(valid: Tensor | None) -> Tensor | None:
    """`valid` as the bytes that a kernel loads."""
    return None if valid is None else valid.reshape(-1).view(torch.uint8)


def tile_shape(num_columns: int) -> tuple[int, int]:
    """Rows and columns of the tile that a program holds in registers at a time; wide enough for whole cache lines."""
    columns = min(256, triton.next_power_of_2(num_columns))
    return ELEMENTS_PER_TILE // columns, columns


def row_tile(num_columns: int) -> dict[str, int]:
    """The same for a kernel that needs whole rows of up to `choice.MAX_ROW_LENGTH` columns, as its options."""
    columns = triton.next_power_of_2(num_columns)
    return {"ROWS": max(1, ELEMENTS_PER_TILE // columns), "COLUMNS": columns, "num_warps": max(4, columns // 256)}


def strip_length(num_rows: int, num_programs_per_strip: int, rows: int) -> int:
    """Rows of a strip, a multiple of a tile's `rows`: about TARGET_PROGRAMS programs, but four tiles each at least."""
    even = triton.cdiv(num_rows * num_programs_per_strip, TARGET_PROGRAMS)
    return triton.cdiv(max(even, 4 * rows), rows) * rows


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, valid: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of `x` [M, C] in its dtype, 0 where rows do not exist, and the rows' mean and 1/deviation, float32 [M]."""
    num_rows, num_columns = x.shape
    normed = torch.empty_like(x)
    mean, rstd = (torch.empty(num_rows, dtype=torch.float32, device=x.device) for _ in range(2))
    tile = row_tile(num_columns)
    grid = (triton.cdiv(num_rows, tile["ROWS"]),)
    _layer_norm_kernel[grid](x, weight, bias, bytes_of(valid), normed, mean, rstd, num_rows, num_columns, eps, **tile)
    return normed, mean, rstd


def layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias for that of the output `grad` [M, C], and once more the output of `layer_norm`.

    x, mean, rstd: as `layer_norm` got and gave them. The gradient of x is in its dtype, the others are float32.
    """
    num_rows, num_columns = x.shape
    grad_x, normed = torch.empty_like(x), torch.empty_like(x)
    tile = row_tile(num_columns)
    length = strip_length(num_rows, 1, tile["ROWS"])
    sums = torch.empty(2, triton.cdiv(num_rows, length), num_columns, dtype=torch.float32, device=x.device)
    _layer_norm_backward_kernel[(sums.shape[1],)](
        grad, x, mean, rstd, weight, bias, bytes_of(valid), grad_x, normed, sums[0], sums[1],
        num_rows, num_columns, length, **tile,
    )  # fmt: skip
    grad_weight, grad_bias = sums[0].sum(0), sums[1].sum(0)  # outputs of an op may not share memory
    return grad_x, grad_weight, grad_bias, normed


def masked_sums(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """`x` [M, C] with 0 in rows that do not exist (x itself where all do) and the sums of its columns, float32 [C]."""
    num_rows, num_columns = x.shape
    rows, columns = tile_shape(num_columns)
    num_blocks = triton.cdiv(num_columns, columns)
    length = strip_length(num_rows, num_blocks, rows)
    kept = None if valid is None else torch.empty_like(x)
    sums = torch.empty(triton.cdiv(num_rows, length), num_columns, dtype=torch.float32, device=x.device)
    _column_sums_kernel[(len(sums) * num_blocks,)](
        x, bytes_of(valid), kept, sums, num_rows, num_columns, length, num_blocks, ROWS=rows, COLUMNS=columns
    )
    return x if kept is None else kept, sums.sum(0)


def add_row(x: Tensor, addend: Tensor, valid: Tensor | None, out: Tensor) -> Tensor:
    """`out` [M, C] filled with `x` + `addend` (C values), 0 in rows that do not exist; `out` may be `x`."""
    num_rows, num_columns = x.shape
    rows, columns = tile_shape(num_columns)
    num_blocks = triton.cdiv(num_columns, columns)
    _add_row_kernel[(triton.cdiv(num_rows, rows) * num_blocks,)](
        x, addend, bytes_of(valid), out, num_rows, num_columns, num_blocks, ROWS=rows, COLUMNS=columns
    )
    return out
