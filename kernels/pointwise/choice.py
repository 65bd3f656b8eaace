"""What runs the pointwise half of a block: on a GPU one of two Triton implementations, else the written-out formulas."""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from mpmae.kernels import backends, checks
from mpmae.kernels.pointwise import formulas
from mpmae.kernels.pointwise.formulas import Options, Weights

OP = "pointwise"
MAX_ROW_LENGTH = 4096

WIDE_FROM_CHANNELS = {
    (torch.bfloat16, "sample"): 128,
    (torch.bfloat16, "batch"): 128,
    (torch.float16, "sample"): 128,
    (torch.float16, "batch"): 128,
    (torch.float32, "sample"): 64,
    (torch.float32, "batch"): 64,
}


def path_of(num_channels: int, dtype: torch.dtype, scope: str) -> str:
    """ "fused" or "wide": the module of this folder that takes a block of C channels.

    Fused moves the fewest bytes and pays with products below cuBLAS's rate; a product of C by 4C channels does 2/3 C
    operations per byte that a fused forward moves in a 2-byte type, 1/3 C in float32 (about 8 C*C operations for 12 C bytes
    a direction), so the narrower the block, the less the rate of the products counts. The borders are estimates, to be
    decided by the benchmark's record; a type that is not listed takes "wide".
    """
    return "wide" if num_channels >= WIDE_FROM_CHANNELS.get((dtype, scope), 0) else "fused"


def chosen(y: Tensor, options: Options) -> ModuleType:
    """The module whose `forward` and `backward` run for `y` [N, K, C] on its device and under `MPMAE_KERNELS`."""
    if backends.choose(OP, y.device, y.dtype, {"triton": None}) == "reference":
        return formulas
    module = importlib.import_module(f"mpmae.kernels.pointwise.{path_of(y.shape[-1], y.dtype, options.scope)}")
    refusal = module.supports(y, options)
    if refusal is not None:
        backends.choose(OP, y.device, y.dtype, {"triton": refusal})
        return formulas
    return module


def weight_problems(x: Tensor, weights: Weights) -> list[str]:
    """What is wrong with the parameters that go with the activation `x` [N, K, C]."""
    channels = x.shape[-1]
    hidden = weights.weight1.shape[0]
    shapes = Weights(
        (channels,), (channels,), (hidden, channels), (hidden,), weights.grn_gamma.shape, weights.grn_beta.shape,
        (channels, hidden), (channels,),
    )  # fmt: skip
    problems = []
    for name, weight, shape in zip(Weights._fields, weights, shapes, strict=True):
        problems += checks.parameter_problems(name, weight, tuple(shape), x)
    for name in ("grn_gamma", "grn_beta"):
        if (weight := getattr(weights, name)).numel() != hidden:
            problems.append(f"{name}: shape {list(weight.shape)}, expected {hidden} values")
    return problems
