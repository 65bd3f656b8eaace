"""Problems for the pointwise kernels, and how their results are judged: against the formulas in float64."""

from typing import NamedTuple

import pytest
import torch

from mpmae.kernels.pointwise import formulas

NARROW = (torch.bfloat16, torch.float16)


class Case(NamedTuple):
    residual: torch.Tensor
    y: torch.Tensor
    grad: torch.Tensor
    weights: formulas.Weights
    valid: torch.Tensor | None
    options: formulas.Options


def draw(channels, samples, sites, dtype, *, scope="sample", gaps=False, gelu="erf", device="cpu") -> Case:
    """Random activations of `dtype`, float32 weights. gaps: sites don't exist, in sample 1 none does; grad is NaN there."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    hidden = 4 * channels
    weights = formulas.Weights(
        1 + 0.3 * normal(channels),
        0.5 * normal(channels),
        normal(hidden, channels) / channels**0.5,
        0.5 * normal(hidden),
        normal(1, hidden),
        0.5 * normal(1, hidden),
        normal(channels, hidden) / hidden**0.5,
        0.5 * normal(channels),
    )
    residual, y, grad = (normal(samples, sites, channels).to(dtype) for _ in range(3))
    valid = None
    if gaps:
        valid = torch.rand(samples, sites, generator=generator) > 0.3
        valid[1] = False
        there = valid[:, :, None]
        residual, y, grad = residual * there, y * there, torch.where(there, grad, torch.nan)
        valid = valid.to(device)
    case = Case(residual, y, grad, weights, valid, formulas.Options(scope, 1e-6, 1e-4, gelu))
    return case._replace(
        residual=residual.to(device),
        y=y.to(device),
        grad=grad.to(device),
        weights=formulas.Weights(*(w.to(device) for w in weights)),
    )


def run(implementation, case: Case) -> dict[str, torch.Tensor]:
    """Everything that `implementation` (formulas' signatures) gives for a case, by name."""
    out, saved = implementation.forward(case.residual, case.y, case.weights, case.valid, case.options)
    grad_y, grads = implementation.backward(case.grad, case.y, case.weights, saved, case.valid, case.options)
    named = {"out": out, "norm": saved.norm, "h": saved.h, "slope": saved.slope, "grad_y": grad_y}
    return named | {f"grad of {name}": grad for name, grad in zip(formulas.Weights._fields, grads, strict=True)}


def exact(case: Case) -> dict[str, torch.Tensor]:
    wide = formulas.Weights(*(w.double() for w in case.weights))
    return run(
        formulas, case._replace(residual=case.residual.double(), y=case.y.double(), grad=case.grad.double(), weights=wide)
    )


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.double().flatten() - wanted.flatten()).norm() / wanted.norm()).item()


def check(implementation, case: Case) -> dict[str, torch.Tensor]:
    """Asserts the error bound: 1e-6 in float32; else 2 times (gradients: 3 times) that of the formulas in the same dtype."""
    got, wanted = run(implementation, case), exact(case)
    plain = run(formulas, case)
    for name, value in got.items():
        assert torch.isfinite(value).all(), name
        assert value.numel() == wanted[name].numel(), name
        assert value.dtype == plain[name].dtype, name
        if case.y.dtype in NARROW:
            times = 3 if name.startswith("grad") else 2
            # sums that nothing rounds differ from the formulas' in the last bits only
            bound = max(times * error(plain[name], wanted[name]), 1e-6)
        else:
            bound = 1e-6
        assert error(value, wanted[name]) <= bound, (name, error(value, wanted[name]), bound)
    if case.valid is not None:
        for name in ("out", "h", "slope", "grad_y"):
            assert got[name][~case.valid].count_nonzero() == 0, name
    return got


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new buffer holds NaN."""

    def filled(make):
        def make_filled(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return make_filled

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
