"""The Triton depthwise convolution in the interpreter, against PyTorch's convolution of the zero-filled grid.

A block of 16 sites costs the interpreter 0.1 s and each of the 49 taps of a reduction 2 ms, so the problems are tiny; blocks
of 32 and 64 channels, remainders, several blocks of channels, and programs of one or several blocks all occur.
"""

import pytest
import torch

from mpmae.kernels.depthwise import triton as implementation
from tests.kernels.depthwise_problems import assert_as_good_as_pytorch, draw, poisoned_outputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# tile side, patches on a side, visible ones, channels, samples, dtype, whether programs take several blocks
CASES = [
    (8, 1, 1, 5, 1, FP32, False),
    (8, 2, 2, 40, 1, BF16, True),
    (4, 2, 4, 3, 1, FP16, True),
    (4, 3, 2, 65, 1, BF16, False),
    (4, 7, 1, 8, 2, FP32, True),
    (2, 2, 4, 16, 1, BF16, True),
    (2, 7, 4, 33, 1, FP32, False),
    (2, 4, 1, 64, 2, FP16, True),
    (1, 3, 4, 33, 2, FP16, True),
    (1, 4, 16, 32, 1, FP32, False),
    (1, 5, 10, 7, 1, BF16, True),
    (1, 1, 1, 4, 1, FP32, True),
]


@pytest.fixture
def few_programs(monkeypatch):
    monkeypatch.setattr(implementation, "MIN_PROGRAMS", 1)
    monkeypatch.setattr(implementation, "MAX_GRADIENT_PROGRAMS", 2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)).replace("torch.", ""))
def test_equals_the_convolution_of_the_grid(case, request):
    *shape, several = case
    if several:
        request.getfixturevalue("few_programs")
    problem = draw(*shape)
    assert_as_good_as_pytorch(implementation, problem, with_residual=several, rounds=shape[-1] != BF16)


@pytest.mark.parametrize("side", [4, 1])
def test_samples_do_not_touch_each_other(side, few_programs):
    problem = draw(side, 3, 2, 4, 3, FP32)
    positions = problem.positions
    clean = implementation.forward(problem.x, problem.weight, problem.bias, *positions)
    problem.x[1] = float("nan")
    out = implementation.forward(problem.x, problem.weight, problem.bias, *positions)
    assert torch.equal(out[::2], clean[::2])
    assert out[1].isnan().any()


def test_no_sites():
    for num_samples, num_visible in ((0, 2), (2, 0)):
        problem = draw(2, 3, 2, 4, 2, FP32)
        x = problem.x[:num_samples, : num_visible * 4].contiguous()
        positions = problem.visible[:num_samples, :num_visible].contiguous(), problem.slots[:num_samples], 2
        with poisoned_outputs():
            assert implementation.forward(x, problem.weight, problem.bias, *positions).shape == x.shape
            grads = implementation.backward_weight(x, x, *positions)
        assert all(grad.count_nonzero() == 0 for grad in grads)


def test_the_split_into_programs_changes_no_sum(monkeypatch):
    problem = draw(2, 3, 3, 4, 2, FP32)
    arguments = problem.grad, problem.x, *problem.positions
    fine, again = (implementation.backward_weight(*arguments)[0] for _ in range(2))
    monkeypatch.setattr(implementation, "MAX_GRADIENT_PROGRAMS", 1)
    coarse = implementation.backward_weight(*arguments)[0]
    assert torch.equal(fine, again)
    torch.testing.assert_close(fine, coarse, rtol=1e-5, atol=1e-4)
