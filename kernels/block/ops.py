"""The custom ops of a ConvNeXt V2 block: depthwise convolution and pointwise half, of whichever backend, in one.

As one op the block keeps what its backward needs and no more, adds the residual's gradient inside the depthwise kernel, and
is opaque to torch.compile, DDP, ZeRO and FSDP alike.

Shapes as in `mpmae.kernels`.
"""

import torch
from torch import Tensor

from mpmae.kernels import checks, depthwise, pointwise
from mpmae.kernels.dtypes import accumulator, compute_dtype
from mpmae.kernels.pointwise.formulas import Options, Saved, Weights


def sparse_block(
    x: Tensor,
    dwconv: tuple[Tensor, Tensor],
    weights: Weights,
    visible: Tensor,
    slots: Tensor,
    tile_side: int,
    valid: Tensor | None,
    options: Options,
) -> Tensor:
    """x + Linear2(GRN(GELU(Linear1(LayerNorm(depthwise(x)))))): [N, K, C], 0 at sites that do not exist.

    x: [N, K, C], 0 at sites that do not exist. dwconv: weight [C, 1, 7, 7] and bias [C]. visible, slots, tile_side:
    see `depthwise_conv`. valid: bool [N, K], None when all sites exist. Under autocast the block computes in autocast's
    dtype and returns it; gradients of parameters have their parameters' dtype. Raises as `depthwise_conv`.
    """
    x = x.to(compute_dtype(x.dtype, x.device))
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *dwconv, *weights))
    return _block(x.contiguous(), *dwconv, *weights, visible, slots, tile_side, valid, *options, keep)[0]


def _problems(
    x: Tensor,
    dwconv: tuple[Tensor, Tensor],
    weights: Weights,
    visible: Tensor,
    slots: Tensor,
    side: int,
    valid: Tensor | None,
) -> list[str]:
    problems = depthwise.input_problems(x, *dwconv, visible, slots, side)
    if problems:
        return problems
    problems = pointwise.weight_problems(x, weights)
    return problems + checks.tensor_problems("valid", valid, torch.bool, x.shape[:2], x.device)


@torch.library.custom_op("mpmae::block", mutates_args=())
def _block(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    grn_gamma: Tensor,
    grn_beta: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    visible: Tensor,
    slots: Tensor,
    tile_side: int,
    valid: Tensor | None,
    scope: str,
    norm_eps: float,
    grn_eps: float,
    gelu: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output and, if `keep`, what the backward needs: y and `Saved`; else these are empty."""
    weights = Weights(norm_weight, norm_bias, weight1, bias1, grn_gamma, grn_beta, weight2, bias2)
    options = Options(scope, norm_eps, grn_eps, gelu)
    checks.refuse("block", _problems(x, (dw_weight, dw_bias), weights, visible, slots, tile_side, valid))
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        x = checks.aligned(x)
        y = depthwise.chosen(x, dw_weight, slots).forward(
            x, dw_weight.contiguous(), dw_bias.contiguous(), visible, slots, tile_side
        )
        out, saved = pointwise.chosen(y, options).forward(x, y, weights, valid, options)
    if not keep:
        return out, *(x.new_empty(0, dtype=t.dtype) for t in (y, *saved))
    return out, y, *saved


@_block.register_fake
def _(x, dw_weight, dw_bias, norm_weight, norm_bias, weight1, bias1, grn_gamma, grn_beta, weight2, bias2,
      visible, slots, tile_side, valid, scope, norm_eps, grn_eps, gelu, keep):  # fmt: skip
    num_samples, num_sites, _ = x.shape
    hidden, wide = weight1.shape[0], accumulator(x.dtype)
    shapes = {
        "y": (x.shape, x.dtype),
        "mean": ((num_samples, num_sites), wide),
        "rstd": ((num_samples, num_sites), wide),
        "h": ((num_samples, num_sites, hidden), x.dtype),
        "slope": ((num_samples, num_sites, hidden), x.dtype),
        "norm": ((num_samples if scope == "sample" else 1, hidden), wide),
    }
    kept = (x.new_empty(shape if keep else 0, dtype=dtype) for shape, dtype in shapes.values())
    return torch.empty_like(x, memory_format=torch.contiguous_format), *kept


@torch.library.custom_op("mpmae::block_backward", mutates_args=())
def _block_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    h: Tensor,
    slope: Tensor,
    norm: Tensor,
    dw_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    grn_gamma: Tensor,
    grn_beta: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    visible: Tensor,
    slots: Tensor,
    tile_side: int,
    valid: Tensor | None,
    scope: str,
    norm_eps: float,
    grn_eps: float,
    gelu: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x and of the parameters, each with its parameter's dtype and strides."""
    weights = Weights(norm_weight, norm_bias, weight1, bias1, grn_gamma, grn_beta, weight2, bias2)
    options = Options(scope, norm_eps, grn_eps, gelu)
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        saved = Saved(mean, rstd, h, slope, norm)
        grad, x = checks.aligned(grad), checks.aligned(x)
        grad_y, grads = pointwise.chosen(y, options).backward(grad, y, weights, saved, valid, options)
        convolution = depthwise.chosen(x, dw_weight, slots)
        grad_x = convolution.backward_input(grad_y, dw_weight.contiguous(), visible, slots, tile_side, grad)
        grad_weight, grad_bias = convolution.backward_weight(grad_y, x, visible, slots, tile_side)
    parameters = zip((dw_weight, dw_weight[:, 0, 0, 0], *weights), (grad_weight, grad_bias, *grads), strict=True)
    return grad_x, *(torch.empty_like(like).copy_(value.view(like.shape)) for like, value in parameters)


@_block_backward.register_fake
def _(grad, x, y, mean, rstd, h, slope, norm, dw_weight, norm_weight, norm_bias, weight1, bias1, grn_gamma, grn_beta,
      weight2, bias2, visible, slots, tile_side, valid, scope, norm_eps, grn_eps, gelu):  # fmt: skip
    like = (norm_weight, norm_bias, weight1, bias1, grn_gamma, grn_beta, weight2, bias2)
    return (
        torch.empty_like(x),
        torch.empty_like(dw_weight),
        dw_weight.new_empty(dw_weight.shape[0]),
        *(torch.empty_like(t) for t in like),
    )


_NUM_PARAMETERS = 2 + len(Weights._fields)


def _setup(ctx, inputs, output):
    x, dw_weight, _, *weights = inputs[: 1 + _NUM_PARAMETERS]
    visible, slots, ctx.tile_side, valid, *ctx.options, keep = inputs[1 + _NUM_PARAMETERS :]
    if keep:
        ctx.save_for_backward(x, *output[1:], dw_weight, *weights, visible, slots, valid)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else autograd makes zeros for every kept output


def _autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * (1 + _NUM_PARAMETERS + 9)
    *tensors, valid = ctx.saved_tensors
    return *_block_backward(grad.contiguous(), *tensors, ctx.tile_side, valid, *ctx.options), *[None] * 9


_block.register_autograd(_autograd, setup_context=_setup)
