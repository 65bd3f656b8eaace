"""Cases of the pointwise half of a wide block, for the interpreter and for a GPU."""

from typing import NamedTuple

import torch
from torch import Tensor

from mpmae.kernels.pointwise import formulas
from mpmae.kernels.pointwise.formulas import Options, Weights
from tests.kernels.error_bounds import assert_within


class Case(NamedTuple):
    """Sizes of a block's input: samples, sites per sample, channels; and whether sites are missing."""

    num_samples: int
    num_sites: int
    num_channels: int
    gaps: bool


class Inputs(NamedTuple):
    """What forward and backward take. The second sample of a case with gaps has no site at all."""

    residual: Tensor
    y: Tensor
    grad: Tensor
    weights: Weights
    valid: Tensor | None


def draw(case: Case, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Random inputs of `dtype` with float32 weights; where sites are missing, y and grad hold NaN and the residual 1e3."""
    generator = torch.Generator().manual_seed(0)
    samples, sites, c, gaps = case

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    weights = Weights(
        1 + 0.3 * normal(c), 0.3 * normal(c), normal(4 * c, c) / c**0.5, 0.3 * normal(4 * c),
        normal(1, 4 * c), normal(1, 4 * c), normal(c, 4 * c) / (4 * c) ** 0.5, 0.3 * normal(c),
    )  # fmt: skip
    valid = torch.rand(samples, sites, generator=generator) > 0.3 if gaps else None
    tensors = [normal(samples, sites, c).to(dtype) for _ in range(3)]
    if gaps:
        valid[1] = False
        tensors = [
            torch.where(valid[:, :, None], t, hole) for t, hole in zip(tensors, (1e3, torch.nan, torch.nan), strict=True)
        ]
        valid = valid.to(device)
    return Inputs(*(t.to(device) for t in tensors), Weights(*(t.to(device) for t in weights)), valid)


def run(module, inputs: Inputs, options: Options) -> list[Tensor]:
    """The output, the gradient of y and those of the weights by `module.forward` and `module.backward`."""
    residual, y, grad, weights, valid = inputs
    out, saved = module.forward(residual, y, weights, valid, options)
    grad_y, grads = module.backward(grad, y, weights, saved, valid, options)
    return [out, grad_y, *grads]


def check(module, case: Case, dtype: torch.dtype, options: Options, device: str = "cpu") -> None:
    """`module` against the formulas, within the bounds, and 0 at sites that do not exist."""
    inputs = draw(case, dtype, device)
    clean = Inputs(*(t if t is None or isinstance(t, Weights) else t.nan_to_num() for t in inputs))
    double = Inputs(
        *(t.double().cpu() for t in clean[:3]), Weights(*(t.double().cpu() for t in clean.weights)),
        None if clean.valid is None else clean.valid.cpu(),
    )  # fmt: skip
    results = [run(m, i, options) for m, i in ((module, inputs), (formulas, clean), (formulas, double))]
    names = ("out", "grad_y", *Weights._fields)
    for name, got, plain, exact in zip(names, *results, strict=True):
        assert got.dtype == (dtype if name in names[:2] else torch.float32), name
        assert_within(got, plain, exact, "value" if name == "out" else "gradient", f"{case} {dtype} {options}: {name}")
    if inputs.valid is not None:
        assert all(t[~inputs.valid].count_nonzero() == 0 for t in results[0][:2])
