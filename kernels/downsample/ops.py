"""The downsampling between stages as a custom op with its backward as a second one; only x and its statistics are kept.

Shapes as in `mpmae.kernels.downsample.reference`.
"""

from types import ModuleType

import torch
from torch import Tensor

from mpmae.kernels import backends
from mpmae.kernels.downsample import reference
from mpmae.kernels.pointwise.choice import MAX_ROW_LENGTH


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
    _check(x, norm, conv, valid_in, valid_out)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _forward(x.contiguous(), *norm, *conv, valid_in, valid_out, eps)[0]


def _module(x: Tensor) -> ModuleType:
    too_wide = x.shape[-1] > MAX_ROW_LENGTH
    refusal = f"{x.shape[-1]} channels, expected at most {MAX_ROW_LENGTH}" if too_wide else None
    if backends.choose("downsample", x.device, x.dtype, {"triton": refusal}) == "reference":
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
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        return _module(x).forward(x, norm_weight, norm_bias, weight, bias, valid_in, valid_out, eps)


@_forward.register_fake
def _(x, norm_weight, norm_bias, weight, bias, valid_in, valid_out, eps):
    num_samples, num_sites, _ = x.shape
    out = x.new_empty(num_samples, num_sites // 4, weight.shape[0])
    mean, rstd = (x.new_empty(num_samples, num_sites, dtype=reference.accumulator(x.dtype)) for _ in range(2))
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
    valid_in: Tensor | None,
    valid_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        return _module(x).backward(grad, x, mean, rstd, norm_weight, norm_bias, weight, valid_in, valid_out)


@_backward.register_fake
def _(grad, x, mean, rstd, norm_weight, norm_bias, weight, valid_in, valid_out):
    of_parameters = (norm_weight, norm_bias, weight, weight.new_empty(weight.shape[0]))
    wide = reference.accumulator(x.dtype)
    grads = (torch.empty_like(t, dtype=wide, memory_format=torch.contiguous_format) for t in of_parameters)
    return torch.empty_like(x, memory_format=torch.contiguous_format), *grads


def _setup(ctx, inputs, output):
    x, norm_weight, norm_bias, weight, bias, valid_in, valid_out, _ = inputs
    ctx.save_for_backward(x, *output[1:], norm_weight, norm_bias, weight, valid_in, valid_out)
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(*output[1:])


def _autograd(ctx, grad, *_):
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes them at the first look and refuses a second
    *_, norm_weight, norm_bias, weight, _, _ = saved
    grad_x, *grads = _backward(grad.contiguous(), *saved)
    dtypes = (norm_weight.dtype, norm_bias.dtype, weight.dtype, ctx.bias_dtype)
    return grad_x, *(g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True)), None, None, None


_forward.register_autograd(_autograd, setup_context=_setup)


def _check(x, norm, conv, valid_in, valid_out) -> None:
    if x.dim() != 3 or x.shape[1] % 4 or not x.is_floating_point():
        raise ValueError(f"downsample: x is {x.dtype} {tuple(x.shape)}, expected floats [N, K, C] with K a multiple of 4")
    num_samples, num_sites, num_channels = x.shape
    num_out = conv[0].shape[0]
    problems = [
        f"{name} is {tuple(tensor.shape)}, expected {shape}"
        for name, tensor, shape in (
            ("norm weight", norm[0], (num_channels,)),
            ("norm bias", norm[1], (num_channels,)),
            ("conv weight", conv[0], (num_out, num_channels, 2, 2)),
            ("conv bias", conv[1], (num_out,)),
            ("valid_in", valid_in, (num_samples, num_sites)),
            ("valid_out", valid_out, (num_samples, num_sites // 4)),
        )
        if tensor is not None and tuple(tensor.shape) != shape
    ]
    for name, valid in (("valid_in", valid_in), ("valid_out", valid_out)):
        if valid is not None and valid.dtype != torch.bool:
            problems.append(f"{name} is {valid.dtype}, expected torch.bool")
    tensors = (*norm, *conv, *(v for v in (valid_in, valid_out) if v is not None))
    if others := sorted({str(t.device) for t in tensors} - {str(x.device)}):
        problems.append(f"tensors lie on {', '.join(others)}, expected {x.device} like x")
    if problems:
        raise ValueError(f"downsample of x {tuple(x.shape)}: " + "; ".join(problems))
