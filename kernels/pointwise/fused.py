"""The pointwise half of a ConvNeXt V2 block in fused Triton kernels, for narrow blocks, where memory bandwidth rules.

Shapes as in `mpmae.kernels.pointwise.formulas`, whose `forward` and `backward` these are. Bytes, in units of one pass over
[N, K, C]: forward 15 (hidden 9, output 6), backward 16 where Q fits in registers (outer 5, rows_and_weight1 11), else 25
(outer 5, rows 15, weight1 5); small float32 partial sums aside. See README.md.
"""

import torch
import triton
from torch import Tensor

from mpmae.kernels.dtypes import FLOATS
from mpmae.kernels.pointwise import fused_backward, fused_forward, grn, tuning
from mpmae.kernels.pointwise.formulas import GELUS, Options, Saved, Weights

MAX_CHANNELS = 128
MAX_ROWS = 2**31 - 2**16
_PARAMETER_CHANNELS, _PARAMETER_HIDDEN = 16, 64


def supports(y: Tensor, options: Options) -> str | None:
    """Why these kernels do not take `y` [N, K, C], all reasons at once; None if they do."""
    num_rows, problems = y.shape[:-1].numel(), []
    if y.shape[-1] > MAX_CHANNELS:
        problems.append(f"{y.shape[-1]} channels, expected at most {MAX_CHANNELS}")
    if y.dtype not in FLOATS:
        problems.append(f"{y.dtype}, expected one of {', '.join(map(str, FLOATS))}")
    if num_rows > MAX_ROWS:
        problems.append(f"{num_rows} rows, expected at most {MAX_ROWS}; take a smaller batch")
    if options.gelu not in GELUS:
        problems.append(f"gelu {options.gelu!r}, expected one of {GELUS}")
    return "; ".join(problems) or None


class _Plan:
    """How the rows fall into groups (those of one norm) and what every launch is given besides its tensors."""

    def __init__(self, y: Tensor, valid: Tensor | None, options: Options):
        num_samples, num_sites, self.channels = y.shape
        self.num_rows, self.dtype = num_samples * num_sites, y.dtype
        self.per_sample = options.scope == "sample"
        self.groups, self.group_rows = (num_samples, num_sites) if self.per_sample else (1, self.num_rows)
        # the interpreter takes what the newest GPU takes
        self.capability = torch.cuda.get_device_capability(y.device)[0] if y.is_cuda else 9
        self.valid = None if valid is None else valid.contiguous().view(torch.uint8)
        self.constants = {
            "C": self.channels,
            "C_PADDED": tuning.padded(self.channels),
            "HAS_VALID": valid is not None,
        }

    def blocks(self, kernel: str) -> tuning.Blocks | None:
        return tuning.blocks(kernel, self.channels, self.dtype.itemsize, self.group_rows, self.capability)

    def launch_options(self, blocks: tuning.Blocks) -> dict:
        named = {"ROWS": blocks.rows, "HIDDEN": blocks.hidden}
        return {**self.constants, **named, "num_warps": blocks.num_warps, "num_stages": blocks.num_stages}

    def hidden_blocks(self, blocks: tuning.Blocks) -> int:
        return triton.cdiv(4 * self.channels, blocks.hidden)


def forward(residual: Tensor, y: Tensor, weights: Weights, valid: Tensor | None, options: Options) -> tuple[Tensor, Saved]:
    """residual + Linear2(GRN(GELU(Linear1(LayerNorm(y))))): [N, K, C], 0 where no site exists; see `formulas.forward`."""
    plan, hidden = _Plan(y, valid, options), 4 * y.shape[2]
    residual, y = residual.contiguous(), y.contiguous()
    mean, rstd = (y.new_empty(y.shape[:2], dtype=torch.float32) for _ in range(2))  # outputs of an op may not share memory
    h, slope = (y.new_empty(*y.shape[:2], hidden) for _ in range(2))
    blocks = plan.blocks("hidden")
    num_blocks = triton.cdiv(plan.group_rows, blocks.rows)
    squares = y.new_empty(plan.groups, num_blocks, hidden, dtype=torch.float32)
    with torch.cuda.device_of(y):
        fused_forward.hidden_kernel[(plan.groups * num_blocks,)](
            y,
            weights.norm_weight,
            weights.norm_bias,
            weights.weight1.to(y.dtype).contiguous(),
            weights.bias1,
            plan.valid,
            mean,
            rstd,
            h,
            slope,
            squares,
            plan.group_rows,
            num_blocks,
            options.norm_eps,
            GELU=options.gelu,
            **plan.launch_options(blocks),
        )
        norm, factor = grn.norms_from_partials(squares, weights.grn_gamma, options.grn_eps)
        blocks = plan.blocks("output")
        num_blocks = triton.cdiv(plan.group_rows, blocks.rows)
        out = torch.empty_like(y)
        fused_forward.output_kernel[(plan.groups * num_blocks,)](
            residual,
            h,
            factor,
            weights.grn_beta,
            weights.weight2.to(y.dtype).contiguous(),
            weights.bias2,
            plan.valid,
            out,
            plan.group_rows,
            num_blocks,
            **plan.launch_options(blocks),
        )
    return out, Saved(mean, rstd, h, slope, norm)


def backward(
    grad: Tensor, y: Tensor, weights: Weights, saved: Saved, valid: Tensor | None, options: Options
) -> tuple[Tensor, Weights]:
    """The gradient of `y` [N, K, C], 0 at sites that do not exist, and of the weights (float32); see `formulas.backward`."""
    plan = _Plan(y, valid, options)
    grad, y = grad.to(y.dtype).contiguous(), y.contiguous()
    cast = weights._replace(**{name: getattr(weights, name).to(y.dtype).contiguous() for name in ("weight1", "weight2")})
    with torch.cuda.device_of(y):
        factor = grn.factors_from_norms(saved.norm, weights.grn_gamma, options.grn_eps)
        products, sums2, grad_sum = _outer(plan, grad, cast.weight2, saved.h, factor)
        pull, grad_gamma = grn.pull_from_products(products, saved.norm, weights.grn_gamma, options.grn_eps)
        grad_y, sums1 = _rows(plan, grad, y, cast, saved, factor, pull)
        return grad_y, _parameters(plan, weights, cast.weight1, sums1, sums2, grad_sum, grad_gamma)


def _outer(plan: _Plan, grad: Tensor, weight2: Tensor, h: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P [S, parts of a norm, D], the sum of U * factor [C, D], the sum of g [C]."""
    blocks, channels, hidden = plan.blocks("outer"), plan.channels, 4 * plan.channels
    num_hidden_blocks = plan.hidden_blocks(blocks)
    most = tuning.num_chunks(plan.num_rows, channels, num_hidden_blocks)
    part_rows = plan.group_rows
    if not plan.per_sample:
        part_rows = blocks.rows * triton.cdiv(triton.cdiv(plan.num_rows, blocks.rows), most)
    num_parts = triton.cdiv(plan.num_rows, part_rows)
    parts_per_chunk = triton.cdiv(num_parts, most)
    num_chunks = triton.cdiv(num_parts, parts_per_chunk)
    products = factor.new_empty(plan.groups, num_parts // plan.groups, hidden)
    partial_weight2, partial_sum = (
        factor.new_empty(1, num_chunks, channels * hidden),
        factor.new_empty(1, num_chunks, channels),
    )
    fused_backward.outer_kernel[(num_chunks * num_hidden_blocks,)](
        grad,
        h,
        factor,
        weight2,
        plan.valid,
        products,
        partial_weight2,
        partial_sum,
        plan.num_rows,
        num_parts,
        part_rows,
        parts_per_chunk,
        FACTOR_STRIDE=hidden if plan.per_sample else 0,
        **plan.launch_options(blocks),
    )
    return products, grn.sum_partials(partial_weight2), grn.sum_partials(partial_sum)


def _rows(
    plan: _Plan, grad: Tensor, y: Tensor, weights: Weights, saved: Saved, factor: Tensor, pull: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of y, and Q^T with the sums of da below it [C + 1, D]."""
    grad_y, hidden = torch.empty_like(y), 4 * plan.channels
    matrices = (weights.norm_weight, weights.weight1, weights.weight2, saved.mean, saved.rstd, saved.h, saved.slope)
    blocks = plan.blocks("rows_and_weight1")
    if blocks is not None:
        num_blocks = triton.cdiv(plan.group_rows, blocks.rows)
        total_blocks = plan.groups * num_blocks
        per_chunk = triton.cdiv(total_blocks, tuning.RESIDENT_PROGRAMS)
        num_chunks = triton.cdiv(total_blocks, per_chunk)
        partial = factor.new_empty(1, num_chunks, (plan.channels + 1) * hidden)
        shape = (plan.group_rows, num_blocks, total_blocks, per_chunk)
        fused_backward.rows_and_weight1_kernel[(num_chunks,)](
            grad, y, *matrices, factor, pull, plan.valid, grad_y, partial, *shape, **plan.launch_options(blocks)
        )
        return grad_y, grn.sum_partials(partial)

    blocks, grad_a = plan.blocks("rows"), torch.empty_like(saved.h)
    num_blocks = triton.cdiv(plan.group_rows, blocks.rows)
    fused_backward.rows_kernel[(plan.groups * num_blocks,)](
        grad,
        y,
        *matrices,
        factor,
        pull,
        plan.valid,
        grad_a,
        grad_y,
        plan.group_rows,
        num_blocks,
        **plan.launch_options(blocks),
    )
    blocks = plan.blocks("weight1")
    num_hidden_blocks = plan.hidden_blocks(blocks)
    most = tuning.num_chunks(plan.num_rows, plan.channels, num_hidden_blocks)
    rows_per_chunk = blocks.rows * triton.cdiv(triton.cdiv(plan.num_rows, blocks.rows), most)
    num_chunks = triton.cdiv(plan.num_rows, rows_per_chunk)
    partial = factor.new_empty(1, num_chunks, (plan.channels + 1) * hidden)
    fused_backward.weight1_kernel[(num_chunks * num_hidden_blocks,)](
        grad_a,
        y,
        saved.mean,
        saved.rstd,
        plan.valid,
        partial,
        plan.num_rows,
        rows_per_chunk,
        **plan.launch_options(blocks),
    )
    return grad_y, grn.sum_partials(partial)


def _parameters(
    plan: _Plan, weights: Weights, weight1: Tensor, sums1: Tensor, sums2: Tensor, grad_sum: Tensor, grad_gamma: Tensor
) -> Weights:
    channels, hidden = plan.channels, 4 * plan.channels
    norm_weight, norm_bias = sums1.new_empty(2, channels).unbind()
    grad_weight1, grad_weight2 = sums1.new_empty(hidden, channels), sums1.new_empty(channels, hidden)
    grad_beta = sums1.new_empty(hidden)
    grid = triton.cdiv(channels, _PARAMETER_CHANNELS) + triton.cdiv(hidden, _PARAMETER_HIDDEN)
    fused_backward.parameters_kernel[(grid,)](
        sums1,
        sums2,
        grad_sum,
        weight1,
        weights.weight2.contiguous(),
        weights.norm_weight,
        weights.norm_bias,
        weights.grn_beta,
        norm_weight,
        norm_bias,
        grad_weight1,
        grad_beta,
        grad_weight2,
        C=channels,
        C_PADDED=tuning.padded(channels),
        CHANNELS=_PARAMETER_CHANNELS,
        HIDDEN=_PARAMETER_HIDDEN,
    )
    bias1 = sums1.view(channels + 1, hidden)[channels].clone()
    return Weights(norm_weight, norm_bias, grad_weight1, bias1, grad_gamma, grad_beta, grad_weight2, grad_sum.view(channels))
