"""Reductions around the global response normalisation, in Triton: partial sums, norms, factors and the pull on h.

Everything here is small beside an activation; sums run in a fixed order, without atomics.

Shapes: S norms (one per sample, or 1), P partial sums per norm, D hidden channels, L any length. All tensors are float32.
Formulas: `mpmae.kernels.pointwise.formulas`, grn_factors and grn_pull.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpmae.kernels.pointwise.triton_parts import grn_factor, grn_pull

MAX_PARTIALS = 256
_FOLD_ROWS, _FOLD_COLUMNS = 32, 128


@triton.jit
def _fold_kernel(
    partials, sums, num_partials, num_parts, length, PART: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """One program: the sum of PART rows, for COLUMNS columns, in the order of the rows."""
    part = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    group, first = part // num_parts, part % num_parts * PART
    base = partials + group.to(tl.int64) * num_partials * length
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(first, tl.minimum(first + PART, num_partials), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < tl.minimum(first + PART, num_partials))[:, None] & (column < length)[None, :]
        total += tl.sum(tl.load(base + row[:, None].to(tl.int64) * length + column[None, :], mask=inside, other=0.0), 0)
    tl.store(sums + part.to(tl.int64) * length + column, total, mask=column < length)


def sum_partials(partials: Tensor, most: int = 1) -> Tensor:
    """Sums of neighbouring partial sums [S, P, L]: [S, P', L] with P' <= `most`, at least 1."""
    while partials.shape[1] > most:
        num_groups, num_partials, length = partials.shape
        num_parts = triton.cdiv(num_partials, MAX_PARTIALS)
        sums = partials.new_empty(num_groups, num_parts, length)
        grid = (num_groups * num_parts, triton.cdiv(length, _FOLD_COLUMNS))
        _fold_kernel[grid](
            partials,
            sums,
            num_partials,
            num_parts,
            length,
            PART=MAX_PARTIALS,
            ROWS=_FOLD_ROWS,
            COLUMNS=_FOLD_COLUMNS,
            num_warps=8,
        )
        partials = sums
    return partials


@triton.jit
def _norms_kernel(partials, gamma, norm, factor, num_partials, hidden, eps, SQUARES: tl.constexpr, D_PADDED: tl.constexpr):
    """One program: the norms (SQUARES: the root of a sum of partials, else loaded) and factors of one row of [S, D]."""
    s, d = tl.program_id(0).to(tl.int64), tl.arange(0, D_PADDED)
    inside = d < hidden
    if SQUARES:
        total = tl.zeros([D_PADDED], tl.float32)
        for p in range(num_partials):
            total += tl.load(partials + (s * num_partials + p) * hidden + d, mask=inside, other=0.0)
        length = tl.sqrt_rn(total)
        tl.store(norm + s * hidden + d, length, mask=inside)
    else:
        length = tl.load(norm + s * hidden + d, mask=inside, other=0.0)
    mean = tl.sum(length, 0) / hidden + eps
    scale = tl.load(gamma + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(factor + s * hidden + d, grn_factor(length, mean, scale), mask=inside)


@triton.jit
def _pull_kernel(products, norm, gamma, pull, grad_gamma, num_partials, hidden, eps, D_PADDED: tl.constexpr):
    """One program: one row of the pull [S, D] and of the terms of gamma's gradient."""
    s, d = tl.program_id(0).to(tl.int64), tl.arange(0, D_PADDED)
    inside = d < hidden
    product = tl.zeros([D_PADDED], tl.float32)
    for p in range(num_partials):
        product += tl.load(products + (s * num_partials + p) * hidden + d, mask=inside, other=0.0)
    length = tl.load(norm + s * hidden + d, mask=inside, other=0.0)
    mean = tl.sum(length, 0) / hidden + eps
    scale = tl.load(gamma + d, mask=inside, other=0.0).to(tl.float32)
    level = tl.sum(scale * product * length, 0) / (hidden * mean * mean)
    tl.store(pull + s * hidden + d, grn_pull(product, length, mean, scale, level), mask=inside)
    tl.store(grad_gamma + s * hidden + d, length / mean * product, mask=inside)


def _shape_options(hidden: int) -> dict[str, int]:
    padded = triton.next_power_of_2(hidden)
    return {"D_PADDED": padded, "num_warps": max(1, min(16, padded // 256))}


def norms_from_partials(partials: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """GRN's norms [S, D] and factors 1 + gamma * Nx [S, D].

    partials: [S, P, D], sums of squares whose sum over P is the squared norm. gamma: D values of any floating dtype.
    """
    partials = sum_partials(partials, MAX_PARTIALS)
    num_norms, num_partials, hidden = partials.shape
    norm, factor = partials.new_empty(2, num_norms, hidden).unbind()
    _norms_kernel[(num_norms,)](
        partials, gamma, norm, factor, num_partials, hidden, eps, SQUARES=True, **_shape_options(hidden)
    )
    return norm, factor


def factors_from_norms(norm: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """The factors 1 + gamma * Nx [S, D] of norms [S, D]."""
    factor = torch.empty_like(norm)
    _norms_kernel[(len(norm),)](
        None, gamma, norm, factor, 0, norm.shape[1], eps, SQUARES=False, **_shape_options(norm.shape[1])
    )
    return factor


def pull_from_products(products: Tensor, norm: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The factor of h that the gradient through the norms adds [S, D], 0 where a norm is 0, and the gradient of gamma [D].

    products: [S, P, D], partial sums over the sites of a norm of h times the gradient of GRN's output. norm: [S, D].
    """
    products = sum_partials(products, MAX_PARTIALS)
    num_norms, num_partials, hidden = products.shape
    pull, terms = products.new_empty(2, num_norms, hidden).unbind()
    _pull_kernel[(num_norms,)](products, norm, gamma, pull, terms, num_partials, hidden, eps, **_shape_options(hidden))
    return pull, sum_partials(terms[None])[0, 0]
