"""The fast form of the downsampling in Triton's interpreter, products by torch on the CPU."""

import pytest
import torch

from mpmae.kernels.downsample import triton
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
