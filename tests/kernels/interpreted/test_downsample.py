"""The fast form of the downsampling in Triton's interpreter, products by torch on the CPU."""

import pytest
import torch

from mpmae.kernels import backends
from mpmae.kernels.downsample import downsample, triton
from tests.kernels.downsample_cases import SIZES, check, draw, run
from tests.kernels.error_bounds import poisoned
from tests.kernels.rounding import rounding

__all__ = ["poisoned", "rounding"]

pytestmark = pytest.mark.usefixtures("poisoned", "rounding")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("sizes", [SIZES, (3, 12, 96, 64)])
def test_against_the_reference(sizes, gaps, dtype):
    check(triton, sizes, dtype, gaps)


def test_what_lies_at_missing_sites_changes_no_bit():
    x, weights, grad, valid = draw(SIZES, torch.float32, True)
    other = torch.where(valid[0][:, :, None], x, torch.nan)
    results = [run(triton, t, weights, grad, valid) for t in (x, other)]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("gaps", [False, True])
def test_the_op_on_these_kernels(gaps, monkeypatch):
    x, weights, grad, valid = draw(SIZES, torch.float32, gaps)
    leaves, results = [t.requires_grad_() for t in (x, *weights)], []
    for backend in ("triton", "reference"):
        monkeypatch.setenv(backends.VARIABLE, backend)
        out = downsample(x, tuple(weights[:2]), tuple(weights[2:]), *valid, eps=1e-6)
        results.append((out, *torch.autograd.grad(out, leaves, torch.nan_to_num(grad))))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
