"""The custom ops of a ConvNeXt V2 block: depthwise convolution and pointwise half, of whichever backend, in one.

As one op the block keeps what its backward needs and no more, adds the residual's gradient inside the depthwise kernel, and
is opaque to torch.compile, DDP, ZeRO and FSDP alike.

Shapes as in `mpmae.kernels`.
"""

import torch
from torch import Tensor

from mpmae.kernels import depthwise, pointwise
from mpmae.kernels.pointwise.formulas import Options, Saved, Weights, accumulator


def sparse_block(
    x: Tensor,
    dwconv: tuple[Tensor, Tensor],
    weights: Weights,
    visible: Tensor,
    slots: Tensor,
    valid: Tensor | None,
    options: Options,
) -> Tensor:
    """x + Linear2(GRN(GELU(Linear1(LayerNorm(depthwise(x)))))): [N, K, C], 0 at sites that do not exist.

    x: [N, K, C], 0 at sites that do not exist. dwconv: weight [C, 1, 7, 7] and bias [C]. visible, slots: see `tile_slots`.
    valid: bool [N, K], None when all sites exist. Under autocast the block computes in autocast's dtype and returns it.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *dwconv, *weights))
    return _block(x.contiguous(), *dwconv, *weights, visible, slots, valid, *options, keep)[0]


def _side(x: Tensor, visible: Tensor) -> int:
    """Sites on a side of a tile."""
    return round((x.shape[1] / visible.shape[1]) ** 0.5)


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
    with torch.autocast(x.device.type, enabled=False):
        y = depthwise.implementation_for(x).forward(x, dw_weight, dw_bias, visible, slots, _side(x, visible))
        out, saved = pointwise.implementation_for(y, options).forward(x, y, weights, valid, options)
    if not keep:
        return out, *(x.new_empty(0, dtype=t.dtype) for t in (y, *saved))
    return out, y, *saved


@_block.register_fake
def _(x, dw_weight, dw_bias, norm_weight, norm_bias, weight1, bias1, grn_gamma, grn_beta, weight2, bias2,
      visible, slots, valid, scope, norm_eps, grn_eps, gelu, keep):  # fmt: skip
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
    return torch.empty_like(x), *kept


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
    valid: Tensor | None,
    scope: str,
    norm_eps: float,
    grn_eps: float,
    gelu: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x and of the parameters, each with its parameter's dtype and strides."""
    weights = Weights(norm_weight, norm_bias, weight1, bias1, grn_gamma, grn_beta, weight2, bias2)
    options = Options(scope, norm_eps, grn_eps, gelu)
    with torch.autocast(x.device.type, enabled=False):
        saved = Saved(mean, rstd, h, slope, norm)
        grad_y, grads = pointwise.implementation_for(y, options).backward(grad, y, weights, saved, valid, options)
        convolution, side = depthwise.implementation_for(x), _side(x, visible)
        grad_x = convolution.backward_input(grad_y, dw_weight, visible, slots, side, grad)
        grad_weight, grad_bias = convolution.backward_weight(grad_y, x, visible, slots, side)
    parameters = zip((dw_weight, dw_weight[:, 0, 0, 0], *weights), (grad_weight, grad_bias, *grads), strict=True)
    return grad_x, *(torch.empty_like(like).copy_(value.view(like.shape)) for like, value in parameters)


@_block_backward.register_fake
def _(grad, x, y, mean, rstd, h, slope, norm, dw_weight, norm_weight, norm_bias, weight1, bias1, grn_gamma, grn_beta,
      weight2, bias2, visible, slots, valid, scope, norm_eps, grn_eps, gelu):  # fmt: skip
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
    visible, slots, valid, *ctx.options, keep = inputs[1 + _NUM_PARAMETERS :]
    if keep:
        ctx.save_for_backward(x, *output[1:], dw_weight, *weights, visible, slots, valid)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else autograd makes zeros for every kept output


def _autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * (1 + _NUM_PARAMETERS + 8)
    x, y, mean, rstd, h, slope, norm, *rest = ctx.saved_tensors
    grads = _block_backward(grad.contiguous(), x, y, mean, rstd, h, slope, norm, *rest, *ctx.options)
    return *grads, *[None] * 8


_block.register_autograd(_autograd, setup_context=_setup)
