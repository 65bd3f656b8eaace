"""What the ops ask of their inputs, looked at without touching the data: no wait for the device, no cost to speak of.

Shapes as in `mpmae.kernels`. Every function returns the problems it finds; `refuse` raises them as one ValueError.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

TILE_SIDES = (8, 4, 2, 1)
HALO = 3  # absent patches around the grid in a table of slots
MAX_PATCHES_SIDE = 181  # a slot is an int16
INT32_LIMIT = 2**31
ALIGNMENT_BYTES = 16


def refuse(op: str, problems: list[str]) -> None:
    """Raise ValueError with all problems; nothing happens when there are none."""
    if problems:
        raise ValueError(f"{op}: {'; '.join(problems)}")


def activation_problems(name: str, x: Tensor) -> list[str]:
    """What is wrong with an activation: [N, K, C], contiguous, of a floating-point type."""
    problems = []
    if x.dim() != 3:
        problems.append(f"{name}: shape {list(x.shape)}, expected [samples, sites, channels]")
    if not x.dtype.is_floating_point:
        problems.append(f"{name}: dtype {x.dtype}, expected a floating-point type")
    if not x.is_contiguous():
        problems.append(f"{name}: strides {list(x.stride())}, expected a contiguous tensor; call .contiguous()")
    return problems


def parameter_problems(name: str, parameter: Tensor, shape: tuple[int, ...], x: Tensor) -> list[str]:
    """What is wrong with a parameter that goes with the activation `x`: its shape, device and dtype (x's, or float32)."""
    problems = []
    if tuple(parameter.shape) != shape:
        problems.append(f"{name}: shape {list(parameter.shape)}, expected {list(shape)}")
    allowed = (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)
    if parameter.dtype not in allowed:
        problems.append(f"{name}: dtype {parameter.dtype}, expected {' or '.join(map(str, dict.fromkeys(allowed)))}")
    return problems + device_problems(name, parameter, x)


def tensor_problems(
    name: str, tensor: Tensor | None, dtype: torch.dtype | None, shape: Sequence[int], device: torch.device
) -> list[str]:
    """What is wrong with a tensor's dtype (None: any will do), shape and device; nothing with one that is None."""
    if tensor is None:
        return []
    dtype = dtype or tensor.dtype
    if tensor.dtype == dtype and tuple(tensor.shape) == tuple(shape) and tensor.device == device:
        return []
    found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
    return [f"{name}: {found}, expected {dtype} {list(shape)} on {device}"]


def device_problems(name: str, tensor: Tensor, x: Tensor) -> list[str]:
    """What is wrong with the device of a tensor that goes with `x`."""
    return [] if tensor.device == x.device else [f"{name}: on {tensor.device}, expected {x.device}, as the input"]


def position_problems(x: Tensor, visible: Tensor, slots: Tensor, tile_side: int) -> list[str]:
    """What is wrong with where the sites of `x` [N, K, C] lie.

    visible: int64 [N, V]. slots: int16 [N, G+6, G+6]. The patch numbers themselves are not looked at.
    """
    problems = []
    if tile_side not in TILE_SIDES:
        problems.append(f"tile_side: {tile_side}, expected one of {', '.join(map(str, TILE_SIDES))}")
    num_samples, num_sites = x.shape[:2]
    width = slots.shape[-1]
    side = width - 2 * HALO
    if slots.dim() != 3 or slots.shape[1] != width or slots.shape[0] != num_samples or side < 1:
        problems.append(
            f"slots: shape {list(slots.shape)}, expected [{num_samples}, G+{2 * HALO}, G+{2 * HALO}] (see tile_slots)"
        )
    if slots.dtype != torch.int16 or not slots.is_contiguous():
        problems.append(f"slots: {slots.dtype} with strides {list(slots.stride())}, expected contiguous torch.int16")
    problems += device_problems("slots", slots, x)
    if problems:
        return problems
    num_visible = visible.shape[-1]
    if visible.dim() != 2 or visible.shape[0] != num_samples:
        problems.append(f"visible: shape {list(visible.shape)}, expected [{num_samples}, visible patches]")
    if visible.dtype != torch.int64 or not visible.is_contiguous():
        problems.append(f"visible: {visible.dtype} with strides {list(visible.stride())}, expected contiguous torch.int64")
    if num_visible > side * side:
        problems.append(f"visible: {num_visible} patches of each sample, but a grid of {side} x {side} has {side * side}")
    problems += device_problems("visible", visible, x)
    if num_sites != num_visible * tile_side**2:
        expected = f"{num_visible} patches x {tile_side**2} sites = {num_visible * tile_side**2}"
        problems.append(f"x: {num_sites} sites of each sample, expected {expected}")
    return problems


def int32_refusal(what: str, sizes: Sequence[int]) -> str | None:
    """Why kernels that count `what` in 32-bit integers do not take a problem of these sizes; None when they do."""
    number = math.prod(sizes)
    if number < INT32_LIMIT:
        return None
    return f"{what}: {' x '.join(map(str, sizes))} = {number}, expected fewer than 2**31; take a smaller batch or image"


def aligned(tensor: Tensor) -> Tensor:
    """`tensor` itself if contiguous and starting at a multiple of 16 bytes, as the kernels' wide loads ask; else a copy."""
    if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT_BYTES == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
