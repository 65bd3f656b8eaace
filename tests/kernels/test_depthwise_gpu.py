"""The fast depthwise implementations on a GPU: against float64, run to run, in a CUDA graph, past 32-bit offsets."""

import pytest
import torch

from mpmae.kernels import depthwise
from tests.kernels.depthwise_problems import assert_as_good_as_pytorch, computed, draw

pytestmark = pytest.mark.gpu

G = 7
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=["cuda", "triton"])
def module(request):
    return depthwise.implementation(request.param)


QUICK = (
    *((19, channels, torch.bfloat16) for channels in (3, 40, 96, 130)),
    (49, 40, torch.bfloat16),
    (1, 40, torch.bfloat16),
    (19, 40, torch.float16),
    (19, 40, torch.float32),
)


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    """PyTorch's own convolution, the measure of the error, in float32 and not in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


# Each combination compiles kernels of its own for seconds: every one beyond a few is for `-m "gpu and slow"`.
@pytest.mark.parametrize(
    ("num_visible", "channels", "dtype"),
    [
        pytest.param(num_visible, channels, dtype, marks=[] if (num_visible, channels, dtype) in QUICK else pytest.mark.slow)
        for num_visible in (49, 19, 1)
        for channels in (3, 40, 96, 130)
        for dtype in DTYPES
    ],
)
@pytest.mark.parametrize("side", [8, 4, 2, 1])
def test_equals_the_convolution_of_the_grid(module, side, num_visible, channels, dtype):
    problem = draw(side, G, num_visible, channels, 3, dtype, device="cuda")
    assert_as_good_as_pytorch(module, problem, with_residual=channels % 4 == 0)


@pytest.mark.parametrize("num_patches_side", [1, 2, 5, 14])
@pytest.mark.parametrize("side", [8, 4, 2, 1])
def test_other_grids(module, side, num_patches_side):
    num_visible = (num_patches_side**2 + 1) // 2
    problem = draw(side, num_patches_side, num_visible, 48, 2, torch.bfloat16, device="cuda")
    assert_as_good_as_pytorch(module, problem, with_residual=True)


@pytest.mark.parametrize("side", [8, 4, 2, 1])
def test_many_samples(module, side):
    """Enough work that every program has several blocks, of several samples."""
    problem = draw(side, G, 19, 40, 512, torch.bfloat16, device="cuda")
    assert_as_good_as_pytorch(module, problem, with_residual=False)


@pytest.mark.parametrize("side", [8, 4, 2, 1])
def test_two_runs_give_the_same_bits(module, side):
    problem = draw(side, G, 19, 80, 64, torch.bfloat16, device="cuda")
    first, second = (computed(module, problem, with_residual=True) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("side", [8, 1])
def test_samples_do_not_touch_each_other(module, side):
    problem = draw(side, G, 19, 40, 3, torch.float32, device="cuda")
    arguments = problem.weight, problem.bias, *problem.positions
    clean = module.forward(problem.x, *arguments)
    problem.x[1] = float("nan")
    assert torch.equal(module.forward(problem.x, *arguments)[::2], clean[::2])


@pytest.mark.parametrize("side", [8, 4, 2, 1])
def test_runs_in_a_cuda_graph(module, side):
    """Captured once and replayed on other values; a wait for the device or a copy from the host would end the capture."""
    problem, other = (draw(side, G, 19, 40, 2, torch.bfloat16, device="cuda", seed=seed) for seed in (0, 1))

    def run():
        residual = module.backward_input(problem.grad, problem.weight, *problem.positions, residual=problem.residual)
        grads = module.backward_weight(problem.grad, problem.x, *problem.positions)
        return module.forward(problem.x, problem.weight, problem.bias, *problem.positions), residual, *grads

    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        run()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for mine, its in zip(problem[:7], other[:7], strict=True):
        mine.copy_(its)
    graph.replay()
    for got, wanted in zip(captured, run(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("past", [False, True], ids=["below 2**31 elements", "above 2**31 elements"])
def test_tensors_as_large_as_offsets_allow(past, module):
    """The last samples of a large batch equal those of a small one."""
    num_sites, channels = 19 * 64, 128
    num_samples = 2**31 // (num_sites * channels) + (2 if past else 0)
    if torch.cuda.mem_get_info()[0] < 4 * num_samples * num_sites * channels * 2:
        pytest.skip("needs 18 GB of free GPU memory")
    problem = draw(8, G, 19, channels, 2, torch.bfloat16, device="cuda")
    x = torch.zeros(num_samples, num_sites, channels, dtype=torch.bfloat16, device="cuda")
    visible, slots = (t[:1].repeat(num_samples, *[1] * (t.dim() - 1)) for t in (problem.visible, problem.slots))
    x[-2:], visible[-2:], slots[-2:] = problem.x, problem.visible, problem.slots
    assert (x.numel() >= 2**31) == past

    small = module.forward(problem.x, problem.weight, problem.bias, *problem.positions)
    large = module.forward(x, problem.weight, problem.bias, visible, slots, 8)
    assert torch.equal(large[-2:], small)
    del large
    small = module.backward_weight(problem.x, problem.x, *problem.positions)
    large = module.backward_weight(x, x, visible, slots, 8)
    for got, wanted in zip(large, small, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-2)
