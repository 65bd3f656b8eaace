"""The depthwise convolution of the sparse encoder as a differentiable op, and the choice of what computes it.

Shapes as in `mpmae.kernels`; R = kernel side. Two custom ops, `mpmae::depthwise_conv` and `mpmae::depthwise_conv_backward`,
of plain tensors and ints; the choice is made inside of them, so a compiler sees one opaque op whatever runs. Gradients are
of first order only.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from mpmae.kernels import backends, checks

OP = "depthwise_conv"
FAST_KERNEL_SIDE = 7


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor, visible: Tensor, slots: Tensor, tile_side: int) -> Tensor:
    """Depthwise convolution of the packed sites: [N, K, C], a missing neighbour contributing 0.

    x: [N, K, C]; sites that do not exist must hold 0, and what comes out at them means nothing. weight: [C, 1, R, R], bias:
    [C], float32 or of the dtype of `x`. visible: int64 [N, V], distinct patch numbers. slots: int16 [N, G+6, G+6] of
    `tile_slots`, one for all stages of an encoder. tile_side: s.
    The fast backends take R = 7. Under autocast the computation runs in autocast's dtype; sums are taken in float32.
    The gradient that comes back must be 0 at sites that do not exist. Raises ValueError for inputs that do not fit together
    and `backends.BackendError` for a backend that was asked for and can't run.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), *(t if t.dtype == torch.float32 else t.to(dtype) for t in (weight, bias))
    return _forward(x, weight, bias, visible, slots, tile_side)


def implementation(backend: str) -> ModuleType:
    """The module of a backend: functions forward, backward_input and backward_weight as in `reference`.

    Those of "cuda" and "triton" take contiguous tensors, and activations that start at a multiple of 16 bytes.
    """
    return importlib.import_module(f"mpmae.kernels.depthwise.{backend}")


def chosen(x: Tensor, weight: Tensor, slots: Tensor) -> ModuleType:
    """The implementation for `x` [N, K, C], `weight` [C, 1, R, R] and `slots` [N, G+6, G+6] here and under `MPMAE_KERNELS`.

    The fast ones take R = 7, G <= 181, and fewer than 2**31 elements of a sample and patches of a batch.
    """
    side = slots.shape[-1] - 2 * checks.HALO
    refusal = checks.int32_refusal("elements of a sample", x.shape[1:])
    refusal = refusal or checks.int32_refusal("patches of the batch", (x.shape[0], side, side))
    if weight.shape[-1] != FAST_KERNEL_SIDE:
        refusal = f"a kernel of {weight.shape[-1]} x {weight.shape[-1]}, expected {FAST_KERNEL_SIDE} x {FAST_KERNEL_SIDE}"
    elif side > checks.MAX_PATCHES_SIDE:
        refusal = f"{side} patches on a side, expected at most {checks.MAX_PATCHES_SIDE}; take larger patches"
    return implementation(backends.choose(OP, x.device, x.dtype, {"cuda": refusal, "triton": refusal}))


def input_problems(x: Tensor, weight: Tensor, bias: Tensor, visible: Tensor, slots: Tensor, tile_side: int) -> list[str]:
    """What is wrong with the arguments of `depthwise_conv`, without a look at their values."""
    problems = checks.activation_problems("x", x)
    if problems:
        return problems
    channels, side = x.shape[-1], weight.shape[-1] if weight.dim() else 0
    problems += checks.parameter_problems("weight", weight, (channels, 1, side, side), x)
    problems += checks.parameter_problems("bias", bias, (channels,), x)
    if side % 2 == 0:
        problems.append(f"weight: a kernel of side {side}, expected an odd side")
    return problems + checks.position_problems(x, visible, slots, tile_side)


@torch.library.custom_op("mpmae::depthwise_conv", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, visible: Tensor, slots: Tensor, tile_side: int) -> Tensor:
    checks.refuse(OP, input_problems(x, weight, bias, visible, slots, tile_side))
    x, weight, bias = checks.aligned(x), weight.contiguous(), bias.contiguous()
    with torch.cuda.device_of(x):
        return chosen(x, weight, slots).forward(x, weight, bias, visible, slots, tile_side)


@_forward.register_fake
def _(x, weight, bias, visible, slots, tile_side):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("mpmae::depthwise_conv_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, visible: Tensor, slots: Tensor, tile_side: int
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, weight = checks.aligned(grad), checks.aligned(x), weight.contiguous()
    with torch.cuda.device_of(x):
        module = chosen(x, weight, slots)
        other_side = () if weight.shape[-1] == FAST_KERNEL_SIDE else (weight.shape[-1],)  # the reference's alone
        grad_weight, grad_bias = module.backward_weight(grad, x, visible, slots, tile_side, *other_side)
        grad_x = module.backward_input(grad, weight, visible, slots, tile_side)
    return grad_x, _as_parameter(grad_weight, weight), grad_bias.to(weight.dtype)


@_backward.register_fake
def _(grad, x, weight, visible, slots, tile_side):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight),
        weight.new_empty(weight.shape[0]),
    )


def _as_parameter(grad: Tensor, weight: Tensor) -> Tensor:
    """`grad` with the dtype and strides of its weight, which DDP's buckets want."""
    if grad.dtype == weight.dtype and grad.stride() == weight.stride():
        return grad
    return torch.empty_like(weight).copy_(grad)


def _setup(ctx, inputs, output):
    x, weight, bias, visible, slots, ctx.tile_side = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, weight, visible, slots)


def _autograd(ctx, grad):
    x, weight, visible, slots = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _backward(grad.contiguous(), x, weight, visible, slots, ctx.tile_side)
    return grad_x, grad_weight, grad_bias.to(ctx.bias_dtype), None, None, None


_forward.register_autograd(_autograd, setup_context=_setup)
