"""The baseline of one launch per tap: right in emulation, and taken by the compiler."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from mpmae import kernels
from tests.kernels.emulation.runtime import Runtime
from tests.kernels.nvcc import compile_with_nvcc

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def baseline():
    spec = importlib.util.spec_from_file_location("kernels_baseline", FOLDER / "kernels_baseline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_equals_the_reference(baseline, tmp_path):
    torch.manual_seed(0)
    visible = torch.stack([torch.randperm(9)[:4].sort().values for _ in range(2)])
    index = kernels.site_index(visible, 3, kernels.morton_sites(2))
    x, weight, bias = torch.randn(2, 16, 5), torch.randn(5, 1, 7, 7), torch.randn(5)
    inputs = [tensor.double().requires_grad_() for tensor in (x, weight)]
    expected = kernels.depthwise_conv(*inputs, bias.double(), visible, kernels.tile_slots(visible, 3), 2)
    grad = torch.randn_like(x)
    wanted = torch.autograd.grad(expected, inputs, grad.double())

    runtime = Runtime(tmp_path)
    neighbours = baseline.neighbour_map(index, 6)
    assert neighbours.shape == (49, 32)
    y = baseline.forward(runtime, x, weight, bias, neighbours)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for got, exact in zip(baseline.backward(runtime, grad, x, weight, neighbours), wanted, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, which is not on the path")
def test_compiles(baseline, tmp_path):
    usage = compile_with_nvcc(baseline.SOURCE, {}, 90, tmp_path)
    assert usage.local_bytes == 0
