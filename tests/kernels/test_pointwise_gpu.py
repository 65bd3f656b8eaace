"""The fused pointwise kernels on a GPU: the formulas' results, the same bits every time, no host sync, CUDA graphs."""

import pytest
import torch

from mpmae.kernels.pointwise import formulas
from tests.kernels.pointwise_cases import check, draw, poison, run

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def fused():
    pytest.importorskip("triton")
    from mpmae.kernels.pointwise import fused

    return fused


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["sample", "batch"])
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize(("channels", "sites"), [(5, 19), (40, 1216), (48, 76), (64, 304), (80, 304), (96, 131), (128, 304)])
def test_equals_the_formulas(fused, monkeypatch, channels, sites, scope, gaps, dtype):
    poison(monkeypatch)
    check(fused, draw(channels, 7, sites, dtype, scope=scope, gaps=gaps, device="cuda"))


@pytest.mark.parametrize("gelu", formulas.GELUS)
def test_every_gelu(fused, gelu):
    check(fused, draw(40, 3, 304, torch.float32, gelu=gelu, device="cuda"))


@pytest.mark.parametrize("scope", ["sample", "batch"])
@pytest.mark.parametrize("channels", [40, 80])
def test_two_runs_give_the_same_bits_and_wait_for_nothing(fused, channels, scope):
    case = draw(channels, 64, 304, torch.bfloat16, scope=scope, gaps=True, device="cuda")
    first = run(fused, case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run(fused, case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_replays_in_a_cuda_graph(fused):
    case = draw(40, 8, 304, torch.bfloat16, device="cuda")
    expected = run(fused, case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(fused, case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(fused, case)
    for value in captured.values():
        value.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(value, captured[name]) for name, value in expected.items())


def test_more_elements_than_int32_counts(fused):
    channels, samples, sites = 128, 3600, 1216
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    few = draw(channels, 2, sites, torch.bfloat16, device="cuda")
    tile = lambda t: t.repeat(samples // 2, 1, 1)  # noqa: E731
    many = few._replace(residual=tile(few.residual), y=tile(few.y))
    expected, _ = fused.forward(few.residual, few.y, few.weights, None, few.options)
    out, saved = fused.forward(many.residual, many.y, many.weights, None, many.options)
    assert saved.h.numel() > 2**31
    assert torch.equal(out[-2:], expected)
    grad_y, _ = fused.backward(tile(few.grad), many.y, many.weights, saved, None, many.options)
    wanted = run(fused, few)["grad_y"]
    assert torch.equal(grad_y[-2:], wanted)
