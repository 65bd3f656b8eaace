"""The CUDA depthwise kernels, emulated on the CPU, against a convolution of the zero-filled grid in float64.

The threads of a CTA run in order and, in a second launch, in reverse; shared memory and outputs start as NaN.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import mpmae.kernels
from mpmae import kernels
from mpmae.kernels.depthwise import cuda
from mpmae.kernels.depthwise import reference as oracle
from mpmae.kernels.depthwise.plan import OPS, Device, Problem, plan, plan_sum
from tests.kernels.emulation.runtime import Runtime

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
HOPPER = Device(architecture=90, shared_limit=232448, num_multiprocessors=1)
SMALL = replace(HOPPER, shared_limit=36 << 10)
NUM_SAMPLES = 3


class Case(NamedTuple):
    """side, num_visible, num_patches_side and channels of a problem; float32 weights or those of dtype."""

    side: int
    num_visible: int
    num_patches_side: int
    channels: int
    dtype: torch.dtype
    weight_dtype: torch.dtype = FP32
    device: Device = HOPPER

    def __str__(self):
        s, v, g, c, dtype = self[:5]
        return f"s{s}-V{v}-G{g}-C{c}-{str(dtype)[6:]}{'-region' if self.device == SMALL else ''}"

    def plans(self):
        """The plans of all launches that `check` makes."""
        sizes = (NUM_SAMPLES, self.num_visible, self.num_patches_side, self.side, self.channels)
        dtypes = [self.weight_dtype] * 3 + [FP32]
        chosen = [plan(Problem(op, self.dtype, w, *sizes), self.device) for op, w in zip(OPS, dtypes, strict=True)]
        return [*chosen, plan_sum(chosen[-1].partial_shape)]


CASES = [
    Case(8, 19, 7, 40, BF16),
    Case(8, 49, 7, 16, FP16, FP16),
    Case(8, 1, 3, 5, FP32),
    Case(4, 19, 7, 80, BF16, BF16),
    Case(4, 19, 7, 64, FP16),
    Case(4, 9, 3, 33, FP32),
    Case(2, 19, 7, 64, BF16),
    Case(2, 76, 14, 33, FP32),
    Case(1, 19, 7, 40, FP32),
    Case(1, 49, 7, 33, BF16, BF16),
    Case(1, 76, 14, 5, FP16),
]
REGION_CASES = [
    Case(8, 60, 9, 16, BF16, device=SMALL),
    Case(4, 150, 14, 33, FP32, device=SMALL),
    Case(2, 120, 11, 64, FP32, device=SMALL),
    Case(1, 401, 21, 33, FP32, device=SMALL),
]
MORE_CASES = [
    Case(s, v, g, c, dtype)
    for (s, c), (g, v), dtype in product(
        ((8, 48), (8, 33), (4, 48), (4, 5), (2, 80), (2, 160), (1, 80), (1, 5)),
        ((7, 49), (7, 19), (7, 1), (3, 4), (14, 76)),
        (FP32, BF16, FP16),
    )
    if not (s == 8 and g == 14)
]


class Tensors(NamedTuple):
    visible: Tensor
    slots: Tensor
    x: Tensor
    grad: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor


def draw(case: Case, seed: int = 0) -> Tensors:
    rng = torch.Generator().manual_seed(seed)
    s, v, g, c = case[:4]
    visible = torch.stack([torch.randperm(g * g, generator=rng)[:v] for _ in range(NUM_SAMPLES)])
    x, grad, residual = (torch.randn(NUM_SAMPLES, v * s * s, c, generator=rng).to(case.dtype) for _ in range(3))
    weight, bias = torch.randn(c, 1, 7, 7, generator=rng), torch.randn(c, generator=rng)
    weight, bias = weight.to(case.weight_dtype), bias.to(case.weight_dtype)
    return Tensors(visible, kernels.tile_slots(visible, g), x, grad, residual, weight, bias)


def run(case: Case, t: Tensors) -> dict[str, Tensor]:
    place = (t.visible, t.slots, case.side)
    grad_weight, grad_bias = cuda.backward_weight(t.grad, t.x, *place)
    return {
        "y": cuda.forward(t.x, t.weight, t.bias, *place),
        "grad_x": cuda.backward_input(t.grad, t.weight, *place),
        "grad_x + residual": cuda.backward_input(t.grad, t.weight, *place, t.residual),
        "grad_weight": grad_weight,
        "grad_bias": grad_bias,
    }


def reference(case: Case, t: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same in PyTorch, in `dtype`; in float64 it is the oracle."""
    x, weight, bias, grad, residual = (tensor.to(dtype) for tensor in (t.x, t.weight, t.bias, t.grad, t.residual))
    place = (t.visible, t.slots, case.side)
    grad_weight, grad_bias = oracle.backward_weight(grad, x, *place)
    return {
        "y": oracle.forward(x, weight, bias, *place),
        "grad_x": oracle.backward_input(grad, weight, *place),
        "grad_x + residual": oracle.backward_input(grad, weight, *place, residual),
        "grad_weight": grad_weight,
        "grad_bias": grad_bias,
    }


def check(case: Case, t: Tensors) -> dict[str, Tensor]:
    got, exact = run(case, t), reference(case, t, torch.float64)
    rounded = None if case.dtype == FP32 else reference(case, t, case.dtype)
    for name, value in got.items():
        assert value.dtype == (FP32 if name in ("grad_weight", "grad_bias") else case.dtype)
        error = (value.double() - exact[name]).abs().max().item()
        bound = 3e-6 * exact[name].abs().max().item()  # of sums in float32, which gradients of parameters are in any case
        if rounded is not None:
            bound = max(bound, (2 if name == "y" else 3) * (rounded[name].double() - exact[name]).abs().max().item())
        assert error <= bound, (name, error, bound)
    return got


@pytest.fixture(autouse=True)
def poisoned():
    """Everything that `torch.empty` gives is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def install(case: Case, folder: Path, monkeypatch, *, sanitize: bool = False) -> Runtime:
    """An emulation with the kernels of `case`, in the place of the CUDA runtime."""
    runtime = Runtime(folder, sanitize=sanitize)
    runtime.compile([(cuda.SOURCE, p.kernel_name, p.defines) for p in case.plans()])
    monkeypatch.setitem(sys.modules, "mpmae.kernels.cuda_runtime", runtime)
    monkeypatch.setattr(mpmae.kernels, "cuda_runtime", runtime, raising=False)
    monkeypatch.setattr(cuda, "device_of", lambda device: case.device)
    return runtime


def agree(case: Case, folder: Path, monkeypatch) -> None:
    """Right when the threads run in order, and the same bits when they run again and when they run in reverse."""
    t = draw(case)
    runtime = install(case, folder, monkeypatch)
    got = check(case, t)
    for reverse in (False, True):
        runtime.reverse = reverse
        for name, value in run(case, t).items():
            assert torch.equal(value, got[name]), (name, reverse)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(case, tmp_path, monkeypatch):
    agree(case, tmp_path, monkeypatch)


@pytest.mark.parametrize("case", REGION_CASES, ids=str)
def test_by_regions_where_a_sample_exceeds_shared_memory(case, tmp_path, monkeypatch):
    assert all(p.defines["REGION"] for p in case.plans()[:-1])
    agree(case, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_CASES, ids=str)
def test_equals_the_oracle_everywhere(case, tmp_path, monkeypatch):
    agree(case, tmp_path, monkeypatch)


@pytest.mark.parametrize("case", [CASES[0], CASES[8]], ids=str)
def test_nothing_reaches_further_than_the_kernel(case, tmp_path, monkeypatch):
    """What is not finite in one tile shows at the sites within 3 of it, and nowhere else."""
    install(case, tmp_path, monkeypatch)
    t = draw(case)
    t.x[1, : case.side**2] = torch.nan
    seen = t._replace(x=t.x.isnan().double(), weight=torch.ones(case.channels, 1, 7, 7), bias=torch.zeros(case.channels))
    reached = reference(case, seen, torch.float64)["y"] > 0.5
    assert 0 < reached.sum() < reached.numel()
    y = cuda.forward(t.x, t.weight, t.bias, t.visible, t.slots, case.side)
    assert torch.equal(y.isnan(), reached)
    grad_x = cuda.backward_input(t.x, t.weight, t.visible, t.slots, case.side)
    assert torch.equal(grad_x.isnan(), reached)


def test_what_does_not_fit_is_refused():
    case = CASES[0]
    t = draw(case)
    place = (t.visible, t.slots, case.side)
    with pytest.raises(ValueError, match=r"bias: dtype torch.float16, expected torch.bfloat16 or float32"):
        cuda.forward(t.x, t.weight, t.bias.half(), *place)
    with pytest.raises(ValueError, match=r"grad_y: strides .* x: dtype torch.float32, expected torch.bfloat16; x: shape"):
        cuda.backward_weight(t.grad.transpose(1, 2), t.x.float(), *place)
    shifted = torch.zeros(t.x.numel() + 1, dtype=BF16)[1:].view_as(t.x)
    with pytest.raises(ValueError, match=r"x: .* starts at a multiple of 16"):
        cuda.forward(shifted, t.weight, t.bias, *place)


def test_an_empty_batch_gives_zeros():
    x, positions = (
        torch.empty(0, 19 * 4, 8),
        (torch.empty(0, 19, dtype=torch.int64), torch.empty(0, 13, 13, dtype=torch.int16)),
    )
    assert cuda.forward(x, torch.ones(8, 1, 7, 7), torch.ones(8), *positions, 2).shape == x.shape
    assert not any(grad.any() for grad in cuda.backward_weight(x, x, *positions, 2))


@pytest.mark.slow
def test_every_access_is_in_bounds():
    """All cases under the sanitizers, in a process of their own: they have to be loaded before Python."""
    library = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = {**os.environ, "LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0"}
    command = [sys.executable, "-c", "from tests.kernels.test_depthwise_cuda import sanitized; sanitized()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.splitlines() == [f"checked {case}" for case in CASES + REGION_CASES]


def sanitized() -> None:
    """Check all cases with sanitizers; run by `test_every_access_is_in_bounds`."""
    for case in CASES + REGION_CASES:
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
            install(case, Path(folder), monkeypatch, sanitize=True)
            check(case, draw(case))
        print("checked", case)
