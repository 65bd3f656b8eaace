"""How far a kernel's results may be off: a multiple of the error that PyTorch makes in the same type.

Both errors are against the same computation in float64.
"""

import pytest
import torch
from torch import Tensor

FACTORS = {"value": 2.0, "gradient": 3.0}
FLOOR = 1e-6


def assert_within(got: Tensor, plain: Tensor, exact: Tensor, kind: str, name: str = "") -> None:
    """Check `got` against `exact` (float64), given what plain PyTorch makes of it in the type of `got`; NaN never passes."""
    scale = exact.norm().item() or 1.0
    error, allowed = (((t.double().cpu().view_as(exact) - exact).norm() / scale).item() for t in (got, plain))
    assert error <= FACTORS[kind] * allowed + FLOOR, f"{name}: {error:.2e}, PyTorch in this type {allowed:.2e}"


@pytest.fixture
def poisoned(monkeypatch):
    """Every buffer that is not filled when it is made holds NaN."""

    def poison(make):
        def made(*args, **options):
            out = make(*args, **options)
            return out.fill_(torch.nan) if out.is_floating_point() else out

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
