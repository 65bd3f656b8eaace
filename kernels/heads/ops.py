"""`head_loss` and its custom op: chunks of logits that stay in the cache, with gradients taken on the way.

The loss is a scalar, so the gradients by the features, the weight and the bias are known up to its own upstream gradient
while a chunk's logits are at hand: they are computed in the forward pass and only scaled in the backward pass.

Shapes as in `mpmae.kernels.heads.targets`; D channels of the features, Q = P*C predictions of a patch (channel fastest).
"""

import torch
from torch import Tensor

from mpmae.kernels import checks
from mpmae.kernels.backends import choose
from mpmae.kernels.dtypes import accumulator, compute_dtype
from mpmae.kernels.heads import reference
from mpmae.kernels.heads.targets import Targets

OP = "head_loss"
# 16 MiB of logits, their targets and their features lie in an L2 cache of 40 MB (A100) or 50 MB (H100, H200) at once
CHUNK_BYTES = {"triton": 16 << 20, "reference": 2 << 20}


def head_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    values: Tensor,
    valid: Tensor,
    hidden: Tensor,
    counted: Tensor,
    *,
    patch_size: int,
    num_present: int,
    num_classes: int = 0,
    normalise: bool = False,
    bands: Tensor | None = None,
) -> Tensor:
    """The share of a pixel modality's loss, a scalar: float32, or float64 for float64 features.

    Per sample the mean error over its valid target values on hidden patches; the sum over the samples that count, divided
    by `num_present`; 0 with zero gradients where nothing is valid or `num_present` is 0. The error is the squared
    difference, or with `num_classes` the cross entropy.

    x: [N, M, D], features at the hidden patches. weight: [Q, D], bias: [Q], of the head; prediction (row*p + column)*C + c.
    values: [N, B, S, S], floating-point targets, or class ids (integers, negative: not valid) with B = 1 and
    C = `num_classes`. valid: bool, shape of values; what is NaN or infinite is not valid in any case. hidden: int64 [N, M],
    patch numbers. counted: bool [N]. normalise: each target patch gets mean 0 and variance 1 (unbiased, + 1e-6) over its
    valid values. bands: int64 [C], which of the B bands are predicted, in order; None: all.

    The products run in x's dtype (autocast's under autocast), the loss in float32. First-order gradients only, for x, weight
    and bias. A class id of num_classes or more is an IndexError on a CPU and makes the loss NaN on a GPU.
    Raises ValueError for tensors that do not fit together.
    """
    _check(x, weight, bias, values, valid, hidden, counted, patch_size, num_classes, normalise, bands)
    x = x.to(compute_dtype(x.dtype, x.device))
    with_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    total = _head_loss(
        x, weight, bias, values, valid, bands, hidden, counted, patch_size, num_classes, normalise, with_gradient
    )[0]
    return total / num_present if num_present else total * 0


@torch.library.custom_op("mpmae::head_loss", mutates_args=())
def _head_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    values: Tensor,
    valid: Tensor,
    bands: Tensor | None,
    hidden: Tensor,
    counted: Tensor,
    patch_size: int,
    num_classes: int,
    normalise: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum over samples and, with_gradient, `_gain` times its gradients by x (x's dtype), weight and bias (float32)."""
    targets = Targets(values, valid, bands, hidden, counted, patch_size, num_classes, normalise)
    total, grads = torch.zeros((), dtype=accumulator(x.dtype), device=x.device), _empty_gradients(x, weight, with_gradient)
    if not x.numel():
        return total, *(grad.zero_() for grad in grads)
    backend = choose(OP, x.device, x.dtype, {"triton": None})
    chunk_samples = _chunk_samples(x, weight, CHUNK_BYTES[backend])
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        errors = _implementation(backend).Errors(targets, x.dtype, chunk_samples)
        _run(x.contiguous(), weight.to(x.dtype), bias.to(x.dtype), errors, grads, chunk_samples, targets)
        return errors.sum(), *grads


@_head_loss.register_fake
def _(x, weight, bias, values, valid, bands, hidden, counted, patch_size, num_classes, normalise, with_gradient):
    return x.new_empty((), dtype=accumulator(x.dtype)), *_empty_gradients(x, weight, with_gradient)


def _run(x: Tensor, weight: Tensor, bias: Tensor, errors, grads, chunk_samples: int, targets: Targets) -> None:
    """Chunk by chunk: logits, their errors and gradient in their place, the products of that gradient."""
    grad_x, grad_weight, grad_bias = grads
    gain = _gain(targets.num_values) if len(grad_x) else None
    num_samples, num_hidden, _ = x.shape
    buffer = x.new_empty(chunk_samples * num_hidden, len(weight))
    for first in range(0, num_samples, chunk_samples):
        part = slice(first, first + chunk_samples)
        rows = x[part].flatten(0, 1)
        logits = torch.addmm(bias, rows, weight.t(), out=buffer[: len(rows)])
        errors.add(logits, first, gain)
        if gain is not None:
            torch.mm(logits, weight, out=grad_x[part].view(rows.shape))
            _add_product(grad_weight, logits, rows, is_first=first == 0)
            _add_sum(grad_bias, logits, is_first=first == 0)


def _add_product(total: Tensor, logits: Tensor, rows: Tensor, is_first: bool) -> None:
    """total += logits^T rows; sums of bfloat16 and float16 stay float32 where the device's products can."""
    if total.dtype == logits.dtype:
        torch.addmm(total, logits.t(), rows, beta=0 if is_first else 1, out=total)
        return
    wide = {"out_dtype": total.dtype} if logits.is_cuda else {}
    product = torch.mm(logits.t(), rows, **wide)
    total.copy_(product) if is_first else total.add_(product)


def _add_sum(total: Tensor, logits: Tensor, is_first: bool) -> None:
    part = logits.sum(0, dtype=total.dtype)
    total.copy_(part) if is_first else total.add_(part)


def _chunk_samples(x: Tensor, weight: Tensor, chunk_bytes: int) -> int:
    """Samples per chunk, so that the chunks are about equal and hold `chunk_bytes` of logits at most (or one sample)."""
    num_samples, num_hidden, _ = x.shape
    most = max(1, chunk_bytes // (num_hidden * len(weight) * x.element_size()))
    num_chunks = -(-num_samples // most)
    return -(-num_samples // num_chunks)


def _gain(num_values: int) -> float:
    """What the stored gradients are multiplied with, so that float16 holds them whatever the upstream gradient is.

    A logit's gradient is an error divided by the sample's number of valid values, 1..num_values: times the root it lies
    between 1/root and root.
    """
    return num_values**0.5


def _empty_gradients(x: Tensor, weight: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    if not with_gradient:
        return x.new_empty(0), x.new_empty(0, dtype=accumulator(x.dtype)), x.new_empty(0, dtype=accumulator(x.dtype))
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(weight.shape, dtype=accumulator(x.dtype)),
        x.new_empty(weight.shape[0], dtype=accumulator(x.dtype)),
    )


def _implementation(backend: str):
    if backend == "reference":
        return reference
    from mpmae.kernels.heads import triton

    return triton


def _setup(ctx, inputs, output):
    _, weight, bias, _, _, _, hidden, _, patch_size, num_classes, _, _ = inputs
    channels = 1 if num_classes else len(weight) // patch_size**2
    ctx.gain = _gain(max(hidden.shape[1] * patch_size**2 * channels, 1))
    ctx.dtypes = weight.dtype, bias.dtype
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _autograd(ctx, grad, *_):
    grad_x, grad_weight, grad_bias = ctx.saved_tensors
    # one element, not a scalar, so that the product is taken in its float32 and rounded once
    scale = grad.reshape(1) / ctx.gain
    grads = (
        torch.mul(stored, scale, out=torch.empty_like(stored, dtype=dtype))
        for stored, dtype in zip((grad_x, grad_weight, grad_bias), (grad_x.dtype, *ctx.dtypes), strict=True)
    )
    return *grads, *[None] * 9


_head_loss.register_autograd(_autograd, setup_context=_setup)


def _check(x, weight, bias, values, valid, hidden, counted, patch_size, num_classes, normalise, bands) -> None:
    problems = []
    if x.ndim != 3 or not x.is_floating_point():
        problems.append(f"x: {x.dtype} {list(x.shape)}, expected floating-point [samples, hidden patches, channels]")
    if values.ndim != 4 or values.shape[-1] != values.shape[-2] or values.shape[-1] % patch_size:
        problems.append(
            f"values: shape {list(values.shape)}, expected [N, B, S, S], S a multiple of patch_size {patch_size}"
        )
    if values.is_floating_point() == bool(num_classes) or (num_classes and normalise):
        kind = "integer class ids, not normalised" if num_classes else "floating-point values"
        problems.append(f"values: {values.dtype}, normalise {normalise}; num_classes {num_classes} expects {kind}")
    if num_classes and (values.ndim != 4 or values.shape[1] != 1 or bands is not None):
        problems.append(f"values: shape {list(values.shape)} with bands {bands is not None}; class ids are [N, 1, S, S]")
    checks.refuse(OP, problems)
    channels = num_classes or (values.shape[1] if bands is None else bands.shape[0])
    wanted = {
        "weight": (weight, None, (patch_size**2 * channels, x.shape[2])),
        "bias": (bias, None, (patch_size**2 * channels,)),
        "values": (values, None, (x.shape[0], *values.shape[1:])),
        "valid": (valid, torch.bool, values.shape),
        "hidden": (hidden, torch.int64, x.shape[:2]),
        "counted": (counted, torch.bool, (x.shape[0],)),
        "bands": (bands, torch.int64, (channels,)),
    }
    for name, (tensor, dtype, shape) in wanted.items():
        problems += checks.tensor_problems(name, tensor, dtype, shape, x.device)
    checks.refuse(OP, problems)
