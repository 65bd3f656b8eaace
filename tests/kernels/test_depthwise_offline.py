"""The CUDA depthwise kernels compiled for sm_80 and sm_90: no spills, and registers for the CTAs that the plan counts on."""

import shutil
from itertools import product

import pytest
import torch

from mpmae.kernels.depthwise.cuda import SOURCE
from mpmae.kernels.depthwise.plan import OPS, Device, Plan, Problem, plan, plan_sum
from tests.kernels.nvcc import compile_with_nvcc, compile_with_nvrtc, nvrtc_library

AMPERE = Device(architecture=80, shared_limit=166912, num_multiprocessors=108)
HOPPER = Device(architecture=90, shared_limit=232448, num_multiprocessors=132)
MODELS = {"atto": 40, "tiny": 96, "base": 128}
REGISTERS = 1 << 16
SUBPARTITIONS = 4

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, which is not on the path")


def problem(op: str, side: int, channels: int, dtype: torch.dtype = torch.bfloat16, num_visible: int = 19) -> Problem:
    return Problem(op, dtype, torch.float32, 1024, num_visible, 7, side, channels)


def register_cap(chosen: Plan) -> int:
    """Registers per thread with which the planned CTAs fit; a warp takes them, 8 at a time, from its quarter."""
    warps = chosen.block[0] // 32 * int(chosen.defines.get("MIN_CTAS", 1))
    per_quarter = -(-warps // SUBPARTITIONS)
    return min(255, REGISTERS // SUBPARTITIONS // per_quarter // 32 // 8 * 8)


def compiles(chosen: Plan, device: Device, folder) -> None:
    usage = compile_with_nvcc(SOURCE, chosen.defines, device.architecture, folder)
    assert usage.local_bytes == 0
    assert usage.registers <= register_cap(chosen)
    assert usage.shared_bytes == 0
    assert chosen.shared_bytes <= device.shared_limit


@needs_nvcc
@pytest.mark.parametrize(
    ("op", "side", "channels", "device"),
    [("forward", 8, 40, HOPPER), ("backward_weight", 4, 192, AMPERE), ("backward_input_residual", 1, 320, HOPPER)],
)
def test_compiles_without_spills(op, side, channels, device, tmp_path):
    compiles(plan(problem(op, side, channels), device), device, tmp_path)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", [AMPERE, HOPPER], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize(("model", "stage"), list(product(MODELS, range(4))))
def test_every_plan_compiles_without_spills(model, stage, device, op, tmp_path):
    compiles(plan(problem(op, 8 >> stage, MODELS[model] << stage), device), device, tmp_path)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("device", [AMPERE, HOPPER], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("side", "channels", "dtype", "num_visible"),
    [
        (1, 512, torch.bfloat16, 49),
        (8, 40, torch.float32, 19),
        (8, 40, torch.float32, 49),
        (4, 80, torch.float32, 49),
        (2, 160, torch.float16, 49),
        (8, 33, torch.bfloat16, 19),
    ],
)
def test_the_decoder_and_other_problems_compile_without_spills(side, channels, dtype, num_visible, device, tmp_path):
    for op in ("forward", "backward_weight"):
        chosen = plan(problem(op, side, channels, dtype, num_visible), device)
        compiles(chosen, device, tmp_path)
    compiles(plan_sum(chosen.partial_shape), device, tmp_path)


@pytest.mark.skipif(nvrtc_library() is None, reason="needs nvidia-cuda-nvrtc, which is not installed")
@pytest.mark.parametrize("device", [AMPERE, HOPPER], ids=["sm_80", "sm_90"])
def test_nvrtc_takes_the_source(device):
    chosen = plan(problem("forward", 2, 160), device)
    cubin = compile_with_nvrtc(nvrtc_library(), SOURCE, chosen.defines, device.architecture)
    assert cubin.startswith(b"\x7fELF")
    assert chosen.kernel_name.encode() in cubin


def test_a_plan_says_all_that_it_refuses():
    wrong = Problem("sideways", torch.float64, torch.float32, 0, 50, 7, 3, 0)
    with pytest.raises(ValueError, match=r"op 'sideways'.*float64.*tile side 3.*50 visible patches.*0 samples"):
        plan(wrong, HOPPER)
    with pytest.raises(ValueError, match=r"compute capability 7.5, expected at least 8.0"):
        plan(problem("forward", 8, 40), Device(75, 65536, 40))


@pytest.mark.parametrize(("num_patches_side", "num_visible"), [(7, 49), (14, 76), (14, 196), (32, 410), (32, 1024)])
@pytest.mark.parametrize("side", [8, 4, 2, 1])
def test_any_number_of_visible_patches_has_a_plan(side, num_patches_side, num_visible):
    smallest = Device(architecture=86, shared_limit=101376, num_multiprocessors=84)
    for device, channels, dtype in product((HOPPER, smallest), (5, 40, 512), (torch.float32, torch.bfloat16)):
        sizes = (4, num_visible, num_patches_side, side, channels)
        chosen = plan(Problem("backward_weight", dtype, torch.float32, *sizes), device)
        assert chosen.shared_bytes <= device.shared_limit
        assert chosen.block[0] <= 640
        assert chosen.grid[0] * int(chosen.defines["GROUPS"]) * int(chosen.defines["LANES"]) * 2 >= channels
