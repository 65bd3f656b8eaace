"""What runs the pointwise half of a block: on a GPU one of two Triton implementations, else the written-out formulas."""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from mpmae.kernels import backends, checks
from mpmae.kernels.pointwise import formulas, tuning
from mpmae.kernels.pointwise.formulas import Options, Weights

OP = "pointwise"
MAX_ROW_LENGTH = 4096
SITES_PER_CHANNEL_TO_FOLD = 4

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


def folds(scope: str, num_sites: int, num_channels: int) -> bool:
    """Whether GRN's factors go into the weights of Linear2 rather than into a pass over the hidden activations.

    By bytes of a sample, in 2-byte types: forward, scaling writes and reads 8*K*C each way and folding 8*C*C; backward,
    scaling adds 12 units and folding writes and reads U, 32*C*C. So folding moves less from K = C (forward) and K = 4/3 C
    (backward) on; but its products are as short as K and round up to whole tiles of 128 sites, hence K >= 4 C.
    """
    return scope == "batch" or num_sites >= SITES_PER_CHANNEL_TO_FOLD * num_channels


def way_of(num_channels: int, num_sites: int, dtype: torch.dtype, scope: str, capability: int) -> str:
    """How that module goes about a block of K sites a sample: "fused", "fused in one pass", "wide" or "wide folded".

    What tells them apart is the bytes they move. capability: the major number of the GPU's compute capability.
    """
    if path_of(num_channels, dtype, scope) == "wide":
        return "wide folded" if folds(scope, num_sites, num_channels) else "wide"
    one_pass = tuning.blocks("rows_and_weight1", num_channels, dtype.itemsize, num_sites, capability)
    return "fused" if one_pass is None else "fused in one pass"


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
