"""The depthwise convolution alone: packed backends, cuDNN on the whole grid, and one kernel per tap with atomics.

Shapes as in `mpmae.kernels`; H = G*s sites on a side of the grid.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import dense_masked
import torch
import torch.nn.functional as F
from gpu_timing import Run
from kernel_cases import (
    MASK_RATIO,
    Case,
    Setting,
    Unavailable,
    Way,
    as_tuple,
    backends,
    depthwise_module,
    per_tap_module,
    same,
)
from synthetic import random_visible
from torch import Tensor

from mpmae.cost import operators
from mpmae.kernels import morton_sites, pack_sites, site_index, tile_slots, unpack_sites

OPERATIONS = {
    "forward": operators.depthwise_forward,
    "input gradient": operators.depthwise_input_grad,
    "weight gradient": operators.depthwise_weight_grad,
}
FORWARD_GOALS = {8: 0.5, 4: 0.6, 2: 0.6}
SAMPLES_AT_ONCE = 256


class Inputs(NamedTuple):
    """x, grad_y: [N, K, C]. weight: [C, 1, 7, 7], bias: [C], float32. visible: int64 [N, V]. slots: int16 [N, G+6, G+6]."""

    x: Tensor
    grad_y: Tensor
    weight: Tensor
    bias: Tensor
    visible: Tensor
    slots: Tensor
    tile_side: int

    @property
    def grid_side(self) -> int:
        """H."""
        return (self.slots.shape[-1] - 6) * self.tile_side

    @property
    def index(self) -> Tensor:
        """Row of each site in the flattened grid: int64 [N, K]."""
        morton = morton_sites(self.tile_side).to(self.visible.device)
        return site_index(self.visible, self.slots.shape[-1] - 6, morton)

    def float_part(self, samples: list[int]) -> "Inputs":
        """Float32 inputs of some samples."""
        parts = (self.x[samples].float(), self.grad_y[samples].float(), self.weight, self.bias)
        return Inputs(*parts, self.visible[samples], self.slots[samples], self.tile_side)

    def grid(self, x: Tensor) -> Tensor:
        """The grid [N, H, H, C] of packed sites, 0 elsewhere."""
        return unpack_sites(x, self.index, self.grid_side)


def depthwise_case(setting: Setting, operation: str, channels: int, tile_side: int) -> Case:
    """One of OPERATIONS at C channels and s sites on a side of a tile."""
    torch.manual_seed(0)
    side = setting.num_patches_side
    visible = random_visible(setting.depthwise_samples, side**2, MASK_RATIO, setting.device)
    num_samples, num_sites = len(visible), visible.shape[1] * tile_side**2
    inputs = Inputs(
        *(setting.normal(num_samples, num_sites, channels, dtype=setting.dtype) for _ in range(2)),
        setting.normal(channels, 1, 7, 7, scale=0.2),
        setting.normal(channels),
        visible,
        tile_slots(visible, side),
        tile_side,
    )
    taps = operators.active_taps(visible, side, tile_side)
    probe = sorted({0, num_samples // 2, num_samples - 1})
    case = Case(
        OPERATIONS[operation](num_samples * num_sites, channels, setting.dtype.itemsize, taps),
        partial(expected, operation, inputs, probe),
        {"num_samples": num_samples, "num_sites": num_samples * num_sites, "channels": channels, "active_taps": taps},
        probe,
        0 if operation == "weight gradient" else 1,
        {"memory": FORWARD_GOALS[tile_side]} if operation == "forward" and tile_side in FORWARD_GOALS else {},
    )
    for backend in (names := backends(setting.device)):
        case.add(backend, lambda b=backend: Way(call(depthwise_module(b), operation, inputs), ours=b in names[:2]))
    if setting.device.type == "cuda":
        case.add("per-tap atomics", lambda: per_tap(operation, inputs))
    case.add("cuDNN on the grid", lambda: on_the_grid(operation, inputs, same))
    case.add("cuDNN on the grid, compiled", lambda: on_the_grid(operation, inputs, setting.compiled))
    return case


def call(module: ModuleType, operation: str, inputs: Inputs) -> Run:
    """A call of one of a module's functions."""
    x, grad_y, weight, bias, *places = inputs
    if operation == "forward":
        return partial(module.forward, x, weight, bias, *places)
    if operation == "input gradient":
        return partial(module.backward_input, grad_y, weight, *places)
    return partial(module.backward_weight, grad_y, x, *places)


def per_tap(operation: str, inputs: Inputs) -> Way:
    """A launch for each tap, in float32; its map of neighbours is made beforehand."""
    if operation == "weight gradient":
        raise Unavailable("its backward gives both gradients at once: see the input gradient")
    module, runtime = per_tap_module()
    neighbours = module.neighbour_map(inputs.index, inputs.grid_side)
    x, grad_y, weight = inputs.x.float(), inputs.grad_y.float(), inputs.weight
    if operation == "forward":
        return Way(partial(module.forward, runtime, x, weight, inputs.bias, neighbours))
    return Way(partial(module.backward, runtime, grad_y, x, weight, neighbours), lambda grads: grads[:1])


def on_the_grid(operation: str, inputs: Inputs, wrap: Callable[[Callable], Callable]) -> Way:
    """The convolution of the whole channels-last grid, hidden sites set to 0 after it."""
    dtype = inputs.x.dtype
    shown = dense_masked.shown_sites(inputs.visible, inputs.slots.shape[-1] - 6, inputs.tile_side).to(dtype)
    weight, bias = inputs.weight.to(dtype), inputs.bias.to(dtype)
    x = inputs.grid(inputs.x)
    if operation == "forward":
        function = wrap(dense_masked.depthwise)
        return Way(lambda: function(x, shown, weight, bias), lambda out: (pack_sites(out, inputs.index),))
    grad, is_input = inputs.grid(inputs.grad_y), operation == "input gradient"
    function = wrap(_grid_input_gradient if is_input else _grid_weight_gradient)
    packed = (lambda out: (pack_sites(out.contiguous(), inputs.index),)) if is_input else as_tuple
    return Way(lambda: function(grad, x, shown, weight), packed)


def _grid_backward(grad: Tensor, x: Tensor, shown: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
    maps = ((grad * shown).permute(0, 3, 1, 2), x.permute(0, 3, 1, 2))
    channels = len(weight)
    return torch.ops.aten.convolution_backward(
        *maps, weight, [channels], [1, 1], [3, 3], [1, 1], False, [0, 0], channels, wanted
    )


def _grid_input_gradient(grad: Tensor, x: Tensor, shown: Tensor, weight: Tensor) -> Tensor:
    return _grid_backward(grad, x, shown, weight, [True, False, False])[0].permute(0, 2, 3, 1) * shown


def _grid_weight_gradient(grad: Tensor, x: Tensor, shown: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return _grid_backward(grad, x, shown, weight, [False, True, True])[1:]


def expected(operation: str, inputs: Inputs, probe: list[int]) -> tuple[Tensor, ...]:
    """Float32 outputs: activations at the samples `probe`, gradients of parameters over all samples, tap by tap."""
    if operation != "weight gradient":
        part = inputs.float_part(probe)
        grid = part.grid(part.x if operation == "forward" else part.grad_y).permute(0, 3, 1, 2)
        weight, bias = (inputs.weight, inputs.bias) if operation == "forward" else (inputs.weight.flip(2, 3), None)
        out = F.conv2d(grid, weight, bias, padding=3, groups=len(weight))
        return (pack_sites(out.permute(0, 2, 3, 1).contiguous(), part.index),)
    height, channels = inputs.grid_side, inputs.x.shape[-1]
    total, bias = (torch.zeros(*shape, device=inputs.x.device) for shape in ((channels, 7, 7), (channels,)))
    for first in range(0, len(inputs.x), SAMPLES_AT_ONCE):
        part = inputs.float_part(list(range(first, min(first + SAMPLES_AT_ONCE, len(inputs.x)))))
        x, grad = F.pad(part.grid(part.x), (0, 0, 3, 3, 3, 3)), part.grid(part.grad_y)
        bias += grad.sum((0, 1, 2))
        for row in range(7):
            for column in range(7):
                total[:, row, column] += (grad * x[:, row : row + height, column : column + height]).sum((0, 1, 2))
    return total[:, None], bias
