"""Wide blocks and the downsampling on a GPU: parity, determinism, capture in a CUDA graph."""

import pytest
import torch

from tests.kernels import downsample_cases
from tests.kernels.error_bounds import poisoned
from tests.kernels.wide_cases import Case, check, draw, run

__all__ = ["poisoned"]

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

SCOPES = ("sample", "batch")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CASES = [Case(5, 77, 128, False), Case(5, 77, 128, True), Case(3, 577, 136, True), Case(4, 19, 2816, False)]


@pytest.fixture
def wide():
    pytest.importorskip("triton")
    from mpmae.kernels.pointwise import wide

    return wide


@pytest.fixture
def fast_downsample():
    pytest.importorskip("triton")
    from mpmae.kernels.downsample import triton

    return triton


def options(scope):
    from mpmae.kernels.pointwise.formulas import Options

    return Options(scope, 1e-6, 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_wide_block(wide, scope, case, dtype):
    check(wide, case, dtype, options(scope), "cuda")


@pytest.mark.parametrize("case", CASES[:3], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_two_runs_are_bit_equal(wide, scope, case):
    inputs = draw(case, torch.bfloat16, "cuda")
    first, second = (run(wide, inputs, options(scope)) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_graph_replays_it(wide, scope):
    inputs = draw(CASES[1], torch.float32, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = run(wide, inputs, options(scope))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(wide, inputs, options(scope))
    graph.replay()
    torch.cuda.synchronize()
    for got, wanted in zip(captured, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("sizes", [(5, 76, 40, 80), (3, 304, 192, 384)])
def test_downsample(fast_downsample, sizes, gaps, dtype):
    downsample_cases.check(fast_downsample, sizes, dtype, gaps, "cuda")


def test_the_op_takes_the_fast_form():
    from mpmae.kernels.downsample import downsample

    x, weights, grad, valid = downsample_cases.draw((3, 28, 24, 48), torch.float32, True, "cuda")
    leaves = [t.requires_grad_() for t in (x, *weights)]
    out = downsample(x, tuple(weights[:2]), tuple(weights[2:]), *valid, eps=1e-6)
    expected = downsample_cases.plain(x, weights, valid)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    wanted = torch.autograd.grad(expected, leaves, grad.nan_to_num())
    for got, want in zip(torch.autograd.grad(out, leaves, grad), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)
