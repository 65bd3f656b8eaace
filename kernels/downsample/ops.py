"""The downsampling between stages as a custom op with its backward as a second one; only x and its statistics are kept.

Shapes as in `mpmae.kernels.downsample.reference`.
"""

from types import ModuleType

import torch
from torch import Tensor

from mpmae.kernels import backends, checks
from mpmae.kernels.downsample import reference
from mpmae.kernels.downsample.reference import Weights
from mpmae.kernels.dtypes import accumulator, compute_dtype
from mpmae.kernels.pointwise.choice import MAX_ROW_LENGTH

OP = "downsample"


def downsample(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    conv: tuple[Tensor, Tensor],
    valid_in: Tensor | None,
    valid_out: Tensor | None,
    *,
    eps: float,
) -> Tensor:
    """LayerNorm, then a convolution with kernel = stride = 2 on Morton-ordered sites: [N, K/4, E] from `x` [N, K, C].

    norm: weight and bias of LayerNorm, C values each. conv: weight [E, C, 2, 2] and bias [E]. valid_in: bool [N, K], where
    it is False LayerNorm's output counts as 0; valid_out: bool [N, K/4], where it is False the output is 0; None when all
    sites exist. Under autocast the computation runs in autocast's dtype. Raises ValueError for what does not fit.
    """
    x, weights = x.contiguous(), Weights(*norm, *conv)
    checks.refuse(OP, _problems(x, weights, valid_in, valid_out))
    return _forward(x.to(compute_dtype(x.dtype, x.device)), *weights, valid_in, valid_out, eps)[0]


def _problems(x: Tensor, weights: Weights, valid_in: Tensor | None, valid_out: Tensor | None) -> list[str]:
    problems = checks.activation_problems("x", x)
    if problems:
        return problems
    num_samples, num_sites, channels = x.shape
    if num_sites % 4:
        return [f"x: {num_sites} sites of each sample, expected a multiple of 4"]
    num_out = weights.weight.shape[0]
    shapes = Weights((channels,), (channels,), (num_out, channels, 2, 2), (num_out,))
    for name, weight, shape in zip(Weights._fields, weights, shapes, strict=True):
        problems += checks.tensor_problems(name, weight, None, shape, x.device)
    problems += checks.tensor_problems("valid_in", valid_in, torch.bool, (num_samples, num_sites), x.device)
    return problems + checks.tensor_problems("valid_out", valid_out, torch.bool, (num_samples, num_sites // 4), x.device)


def _module(x: Tensor) -> ModuleType:
    too_wide = x.shape[-1] > MAX_ROW_LENGTH
    refusal = f"{x.shape[-1]} channels, expected at most {MAX_ROW_LENGTH}" if too_wide else None
    if backends.choose(OP, x.device, x.dtype, {"triton": refusal}) == "reference":
        return reference
    from mpmae.kernels.downsample import triton

    return triton


@torch.library.custom_op("mpmae::downsample", mutates_args=())
def _forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    valid_in: Tensor | None,
    valid_out: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = Weights(norm_weight, norm_bias, weight, bias)
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        return _module(x).forward(x, weights, valid_in, valid_out, eps)


@_forward.register_fake
def _(x, norm_weight, norm_bias, weight, bias, valid_in, valid_out, eps):
    num_samples, num_sites, _ = x.shape
    out = x.new_empty(num_samples, num_sites // 4, weight.shape[0])
    mean, rstd = (x.new_empty(num_samples, num_sites, dtype=accumulator(x.dtype)) for _ in range(2))
    return out, mean, rstd


@torch.library.custom_op("mpmae::downsample_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    valid_in: Tensor | None,
    valid_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights = Weights(norm_weight, norm_bias, weight, bias)
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        grad_x, grads = _module(x).backward(grad, x, mean, rstd, weights, valid_in, valid_out)
        return grad_x, *grads


@_backward.register_fake
def _(grad, x, mean, rstd, norm_weight, norm_bias, weight, bias, valid_in, valid_out):
    wide, weights = accumulator(x.dtype), (norm_weight, norm_bias, weight, bias)
    grads = (torch.empty_like(t, dtype=wide, memory_format=torch.contiguous_format) for t in weights)
    return torch.empty_like(x, memory_format=torch.contiguous_format), *grads


def _setup(ctx, inputs, output):
    x, *others, _ = inputs
    ctx.save_for_backward(x, *output[1:], *others)
    ctx.mark_non_differentiable(*output[1:])


def _autograd(ctx, grad, *_):
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes them at the first look and refuses a second
    grad_x, *grads = _backward(grad.contiguous(), *saved)
    return grad_x, *(g.to(weight.dtype) for g, weight in zip(grads, saved[3:7], strict=True)), None, None, None


_forward.register_autograd(_autograd, setup_context=_setup)
