"""The stem as a differentiable op that keeps nothing but its inputs, and the choice of what computes it.

Two custom ops, `mpmae::stem` and `mpmae::stem_backward`; the choice is made inside of them, so a compiler sees one opaque op
whatever runs. First-order gradients of the weights only: an image has none.

Shapes as in `mpmae.kernels.stem.reference`.
"""

import torch
from torch import Tensor

from mpmae.kernels import backends, checks
from mpmae.kernels.checks import HALO
from mpmae.kernels.dtypes import accumulator, compute_dtype
from mpmae.kernels.layout import tile_slots
from mpmae.kernels.stem import launch, reference
from mpmae.kernels.stem.reference import TILE_SIDE, Image, StemWeights

OP = "stem"
_FIRST_WEIGHT = 4  # among the inputs of the op


def stem(
    image: Tensor, pixel_valid: Tensor | None, visible: Tensor, slots: Tensor, weights: StemWeights, *, eps: float
) -> Tensor:
    """Packed sites [N, V*64, C] of the stem, 0 at sites that do not exist.

    image: [N, B, S, S], any strides; what it holds at hidden pixels and at those without data means nothing. pixel_valid:
    bool [N, S, S], True where a pixel holds data; None when all do. visible: int64 [N, V], distinct patch numbers. slots:
    int16 [N, G+6, G+6], their `tile_slots`, or [0, G+6, G+6], which only says G. eps: of both LayerNorms.
    The output has the dtype of the weights, or autocast's; sums are taken in float32 at least.
    Raises ValueError for inputs that do not fit together and BackendError for a backend that was asked for and can't run.
    """
    dtype = compute_dtype(weights.conv_weight.dtype, image.device)
    return _forward(image, pixel_valid, visible, slots, *weights, eps, dtype)


def input_problems(image: Image, weights: StemWeights) -> list[str]:
    """What is wrong with the arguments of `stem`, without a look at their values."""
    values, valid, visible, slots = image
    if values.dim() != 4 or values.shape[2] != values.shape[3] or not values.is_floating_point():
        return [f"image: {values.dtype} {list(values.shape)}, expected a floating-point [N, B, S, S]"]
    num_samples, bands, side, _ = values.shape
    stride, channels = weights.pool_weight.shape[-1], weights.conv_weight.shape[0]
    patch, grid_side = TILE_SIDE * stride, slots.shape[-1] - 2 * HALO
    problems = []
    if stride & (stride - 1):
        problems.append(f"pool_weight: stride {stride}, expected a power of two")
    if grid_side < 1 or side != grid_side * patch:
        problems.append(f"image: {side} pixels on a side, expected {grid_side} patches (slots) of {patch} (8 x stride)")
    if slots.dtype != torch.int16 or slots.shape[0] not in (0, num_samples) or slots.shape[1:] != slots.shape[2:] * 2:
        problems.append(
            f"slots: {slots.dtype} {list(slots.shape)}, expected int16 [{num_samples}, G+6, G+6] (see tile_slots)"
        )
    if visible.dtype != torch.int64 or visible.dim() != 2 or visible.shape[0] != num_samples:
        problems.append(f"visible: {visible.dtype} {list(visible.shape)}, expected int64 [{num_samples}, visible patches]")
    elif visible.shape[1] > grid_side**2:
        problems.append(f"visible: {visible.shape[1]} patches of each sample, but the grid has {grid_side**2}")
    problems += checks.device_problems("slots", slots, values) + checks.device_problems("visible", visible, values)
    problems += checks.tensor_problems("pixel_valid", valid, torch.bool, (num_samples, side, side), values.device)
    expected = StemWeights((channels, bands, 3, 3), *[(channels,)] * 3, (channels, 1, stride, stride), *[(channels,)] * 3)
    for name, weight, shape in zip(StemWeights._fields, weights, expected, strict=True):
        problems += checks.tensor_problems(name, weight, None, shape, values.device)
    return problems


def _chosen(image: Image, weights: StemWeights, dtype: torch.dtype) -> str:
    return backends.choose(OP, image.values.device, dtype, {"triton": launch.refusal(image, weights, dtype)})


def _ready(image: Image, weights: StemWeights) -> tuple[Image, StemWeights]:
    """The inputs as the kernels need them: contiguous, the slots filled."""
    values, valid, visible, slots = image
    if not len(slots):
        slots = tile_slots(visible, image.num_patches_side)
    valid = None if valid is None else valid.contiguous()
    return Image(values, valid, visible.contiguous(), slots.contiguous()), StemWeights(*(w.contiguous() for w in weights))


@torch.library.custom_op("mpmae::stem", mutates_args=())
def _forward(
    image: Tensor,
    pixel_valid: Tensor | None,
    visible: Tensor,
    slots: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    conv_norm_weight: Tensor,
    conv_norm_bias: Tensor,
    pool_weight: Tensor,
    pool_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    seen = Image(image, pixel_valid, visible, slots)
    weights = StemWeights(
        conv_weight, conv_bias, conv_norm_weight, conv_norm_bias, pool_weight, pool_bias, norm_weight, norm_bias
    )
    checks.refuse(OP, input_problems(seen, weights))
    with torch.cuda.device_of(image), torch.autocast(image.device.type, enabled=False):
        if _chosen(seen, weights, dtype) == "triton":
            return launch.forward(*_ready(seen, weights), eps, dtype)
        return reference.forward(seen, weights, eps, dtype)


@_forward.register_fake
def _(image, pixel_valid, visible, slots, conv_weight, *rest):
    dtype = rest[-1]
    return image.new_empty(visible.shape[0], visible.shape[1] * TILE_SIDE**2, conv_weight.shape[0], dtype=dtype)


@torch.library.custom_op("mpmae::stem_backward", mutates_args=())
def _backward(
    grad: Tensor,
    image: Tensor,
    pixel_valid: Tensor | None,
    visible: Tensor,
    slots: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    conv_norm_weight: Tensor,
    conv_norm_bias: Tensor,
    pool_weight: Tensor,
    pool_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """The gradients as `reference.flatten` puts them, float32 at least."""
    seen = Image(image, pixel_valid, visible, slots)
    weights = StemWeights(
        conv_weight, conv_bias, conv_norm_weight, conv_norm_bias, pool_weight, pool_bias, norm_weight, norm_bias
    )
    with torch.cuda.device_of(grad), torch.autocast(grad.device.type, enabled=False):
        if _chosen(seen, weights, grad.dtype) == "triton":
            return launch.backward(grad.contiguous(), *_ready(seen, weights), eps)
        return reference.flatten(reference.backward(grad, seen, weights, eps))


@_backward.register_fake
def _(grad, image, pixel_valid, visible, slots, *rest):
    size = sum(weight.numel() for weight in rest[:-1])
    return grad.new_empty(size, dtype=accumulator(grad.dtype))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-2])
    ctx.eps = inputs[-2]


def _autograd(ctx, grad):
    saved = ctx.saved_tensors
    flat = _backward(grad.contiguous(), *saved, ctx.eps)
    grads = reference.unflatten(flat, StemWeights(*saved[_FIRST_WEIGHT:]))
    return *[None] * _FIRST_WEIGHT, *grads, None, None


_forward.register_autograd(_autograd, setup_context=_setup)
