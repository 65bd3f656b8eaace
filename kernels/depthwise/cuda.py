"""The depthwise convolution in CUDA C++: `depthwise.cu` planned by `plan.py`, compiled and launched by `cuda_runtime`.

Shapes as in `mpmae.kernels`. All tensors are contiguous and lie on one device; activations start at a multiple of 16 bytes;
slots: int16 [N, G+6, G+6] of `tile_slots`; visible: int64 [N, V]. Activations are float32, bfloat16 or float16, weight and
bias of the same type or float32; sums are taken in float32. No float atomics: the same inputs give the same bits.
"""

import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpmae.kernels.checks import ALIGNMENT_BYTES, HALO
from mpmae.kernels.depthwise.plan import MULTIPROCESSORS, OPS, Device, Plan, Problem, plan, plan_sum

if TYPE_CHECKING:
    from mpmae.kernels.build import Case
    from mpmae.kernels.cuda_runtime import Specialisation

SOURCE = Path(__file__).parent / "depthwise.cu"
SHARED_LIMITS = {80: 166912, 90: 232448}  # bytes of one CTA, opted in


def forward(x: Tensor, weight: Tensor, bias: Tensor, visible: Tensor, slots: Tensor, tile_side: int) -> Tensor:
    """Depthwise 7x7 convolution of the packed sites, [N, K, C] of the dtype of `x` [N, K, C].

    weight: [C, 1, 7, 7], bias: [C]. Sites that do not exist must hold 0 in `x`; what comes out at them means
    nothing. Raises ValueError for what the kernel does not take.
    """
    _check(x=x, weight=weight, bias=bias)
    return _convolve("forward", x, weight, bias.to(weight.dtype), None, visible, slots, tile_side)


def backward_input(
    grad_y: Tensor, weight: Tensor, visible: Tensor, slots: Tensor, tile_side: int, residual: Tensor | None = None
) -> Tensor:
    """Gradient of the input, [N, K, C] of the dtype of `grad_y` [N, K, C], plus `residual` [N, K, C] where it is given.

    `grad_y` must be 0 at sites that do not exist. Raises ValueError as `forward`.
    """
    _check(grad_y=grad_y, weight=weight, **({} if residual is None else {"residual": residual}))
    op = "backward_input" if residual is None else "backward_input_residual"
    return _convolve(op, grad_y, weight, None, residual, visible, slots, tile_side)


def backward_weight(grad_y: Tensor, x: Tensor, visible: Tensor, slots: Tensor, tile_side: int) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, float32 [C, 1, 7, 7] and [C], from `grad_y` and `x`, both [N, K, C] of one dtype.

    Both must be 0 at sites that do not exist. Raises ValueError as `forward`.
    """
    _check(grad_y=grad_y, x=x)
    channels = x.shape[-1]
    grad_weight = torch.empty(channels, 1, 7, 7, dtype=torch.float32, device=x.device)
    grad_bias = torch.empty(channels, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return grad_weight.zero_(), grad_bias.zero_()
    chosen = _plan("backward_weight", x, torch.float32, visible, slots, tile_side)
    partial = torch.empty(chosen.partial_shape, dtype=torch.float32, device=x.device)
    _launch(chosen, x, grad_y, visible, slots, partial, x.shape[0], visible.shape[1])
    _launch(plan_sum(chosen.partial_shape), partial, grad_weight, grad_bias, len(partial))
    return grad_weight, grad_bias


def _convolve(op, x, weight, bias, residual, visible, slots, tile_side) -> Tensor:
    y = torch.empty_like(x)
    if x.numel():
        chosen = _plan(op, x, weight.dtype, visible, slots, tile_side)
        _launch(chosen, x, weight, bias, residual, visible, slots, y, x.shape[0], visible.shape[1])
    return y


def _plan(op: str, x: Tensor, weight_dtype: torch.dtype, visible: Tensor, slots: Tensor, tile_side: int) -> Plan:
    num_patches_side = slots.shape[-1] - 2 * HALO
    sizes = (x.shape[0], visible.shape[1], num_patches_side, tile_side, x.shape[-1])
    return plan(Problem(op, x.dtype, weight_dtype, *sizes), device_of(x.device))


def _launch(chosen: Plan, *args) -> None:
    from mpmae.kernels import cuda_runtime  # needs CUDA's Python packages, which only a machine with a GPU has

    kernel = cuda_runtime.load(SOURCE, chosen.kernel_name, chosen.defines)
    kernel.launch(chosen.grid, chosen.block, chosen.shared_bytes, *args)


def specialisations(case: "Case", architecture: int) -> Iterator["Specialisation"]:
    """What a use of the op asks to be compiled on an architecture (80, 90), for `mpmae.kernels.build`."""
    from mpmae.kernels.cuda_runtime import Specialisation

    device = Device(architecture, SHARED_LIMITS[architecture], MULTIPROCESSORS[architecture])
    sizes = (case.num_samples, case.num_visible, case.num_patches_side, case.tile_side, case.channels)
    for op, weight_dtype in itertools.product(OPS, {torch.float32, case.dtype}):
        chosen = plan(Problem(op, case.dtype, weight_dtype, *sizes), device)
        yield Specialisation(SOURCE, chosen.kernel_name, chosen.defines)
        if chosen.partial_shape is not None:
            total = plan_sum(chosen.partial_shape)
            yield Specialisation(SOURCE, total.kernel_name, total.defines)


@cache
def device_of(device: torch.device) -> Device:
    """What plans have to fit on a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    architecture = 10 * properties.major + properties.minor
    return Device(architecture, properties.shared_memory_per_block_optin, properties.multi_processor_count)


def _check(**tensors: Tensor) -> None:
    first = next(iter(tensors.values()))
    problems = []
    for name, tensor in tensors.items():
        is_parameter = name in ("weight", "bias")
        if tensor.dtype != first.dtype and not (is_parameter and tensor.dtype == torch.float32):
            problems.append(f"{name}: dtype {tensor.dtype}, expected {first.dtype}{' or float32' if is_parameter else ''}")
        if not is_parameter and tensor.shape != first.shape:
            problems.append(f"{name}: shape {list(tensor.shape)}, expected {list(first.shape)}")
        if not tensor.is_contiguous() or (not is_parameter and tensor.data_ptr() % ALIGNMENT_BYTES):
            problems.append(
                f"{name}: strides {list(tensor.stride())} from address {tensor.data_ptr()}, expected a contiguous tensor "
                f"that starts at a multiple of {ALIGNMENT_BYTES}; .clone() it"
            )
    if problems:
        raise ValueError(f"depthwise kernel: {'; '.join(problems)}")
