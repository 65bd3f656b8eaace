"""The pointwise half of a block alone, GRN over each sample: our kernels, and PyTorch eager and compiled.

Shapes as in `mpmae.kernels`; D = 4C.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from gpu_timing import Run
from kernel_cases import MASK_RATIO, Case, Setting, Way, as_tuple, pointwise_module, same
from synthetic import random_visible
from torch import Tensor

from mpmae.cost import operators
from mpmae.kernels.pointwise import formulas

OPERATIONS = {"forward": operators.pointwise_forward, "backward": operators.pointwise_backward}
MODULES = ("fused", "wide")
OPTIONS = formulas.Options("sample", 1e-6, 1e-6)
MEMORY_GOAL, MATRIX_GOAL, MATRIX_CHANNELS = 0.7, 0.7, 384
SAMPLES_AT_ONCE = 64


class Inputs(NamedTuple):
    """residual, y, grad: [N, K, C]. weights: float32."""

    residual: Tensor
    y: Tensor
    grad: Tensor
    weights: formulas.Weights


def pointwise_case(setting: Setting, operation: str, channels: int, tile_side: int) -> Case:
    """One of OPERATIONS at C channels and s sites on a side of a tile."""
    torch.manual_seed(0)
    visible = random_visible(setting.samples, setting.num_patches_side**2, MASK_RATIO, setting.device)
    num_samples, num_sites, hidden = len(visible), visible.shape[1] * tile_side**2, 4 * channels
    weights = formulas.Weights(
        1 + setting.normal(channels, scale=0.1),
        setting.normal(channels, scale=0.1),
        setting.normal(hidden, channels, scale=channels**-0.5),
        setting.normal(hidden, scale=0.1),
        setting.normal(1, hidden, scale=0.5),
        setting.normal(1, hidden, scale=0.1),
        setting.normal(channels, hidden, scale=hidden**-0.5),
        setting.normal(channels, scale=0.1),
    )
    inputs = Inputs(*(setting.normal(num_samples, num_sites, channels, dtype=setting.dtype) for _ in range(3)), weights)
    probe = sorted({0, num_samples // 2, num_samples - 1})
    case = Case(
        OPERATIONS[operation](num_samples * num_sites, channels, setting.dtype.itemsize),
        partial(expected, operation, inputs, probe),
        {"num_samples": num_samples, "num_sites": num_samples * num_sites, "channels": channels},
        probe,
        1,
        {"matrix": MATRIX_GOAL} if channels >= MATRIX_CHANNELS else {"memory": MEMORY_GOAL},
    )

    def ours(name: str) -> Way:
        module = pointwise_module(name, inputs.y, OPTIONS)
        return Way(call(module, operation, inputs, same), ours=True)

    for name in MODULES if setting.device.type == "cuda" else ():
        case.add(name, partial(ours, name))
    case.add("reference", lambda: Way(call(formulas, operation, inputs, same)))
    case.add("reference, compiled", lambda: Way(call(formulas, operation, inputs, setting.compiled)))
    return case


def call(module: ModuleType, operation: str, inputs: Inputs, wrap: Callable[[Callable], Callable]) -> Run:
    """A call of one of a module's functions; the backward gets what the module's own forward saves."""
    residual, y, grad, weights = inputs
    function = wrap(getattr(module, operation))
    if operation == "forward":
        return lambda: function(residual, y, weights, None, OPTIONS)[:1]
    saved = module.forward(residual, y, weights, None, OPTIONS)[1]
    return lambda: function(grad, y, weights, saved, None, OPTIONS)


def expected(operation: str, inputs: Inputs, probe: list[int]) -> tuple[Tensor, ...]:
    """Float32 outputs: activations at the samples `probe`, gradients of the weights over all samples."""
    if operation == "forward":
        return _float_outputs(operation, inputs, probe)
    grad_y, *totals = _float_outputs(operation, inputs, probe)
    totals = [torch.zeros_like(total) for total in totals]
    for first in range(0, len(inputs.y), SAMPLES_AT_ONCE):
        samples = list(range(first, min(first + SAMPLES_AT_ONCE, len(inputs.y))))
        for total, part in zip(totals, _float_outputs(operation, inputs, samples)[1:], strict=True):
            total += part
    return grad_y, *totals


def _float_outputs(operation: str, inputs: Inputs, samples: list[int]) -> tuple[Tensor, ...]:
    residual, y, grad = (t[samples].float() for t in inputs[:3])
    out, saved = formulas.forward(residual, y, inputs.weights, None, OPTIONS)
    if operation == "forward":
        return (out,)
    return as_tuple(formulas.backward(grad, y, inputs.weights, saved, None, OPTIONS))
