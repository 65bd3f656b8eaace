"""The driver calls of a launch, through the real cuda-bindings: into a stand-in for libcuda.so.1, and on a GPU."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpmae.kernels import cuda_driver, cuda_runtime
from tests.kernels.test_cuda_runtime import DEFINES, SOURCE, needs_nvrtc

STUB = Path(__file__).with_name("stub_driver.cpp")

# what a CPU build of PyTorch lacks is put in the place of what a CUDA build has
LAUNCH = """
import contextlib, sys
import torch
torch._C._cuda_getCurrentRawStream = lambda index: 42
torch.cuda.init = lambda: None
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda index: (9, 0)
torch.cuda.device = lambda index: contextlib.nullcontext()
from mpmae.kernels import cuda_runtime
from tests.kernels.test_cuda_runtime import DEFINES, OnDevice

x = torch.zeros(6).as_subclass(OnDevice)
kernel = cuda_runtime.load(sys.argv[1], "scale", DEFINES)
kernel.launch((2,), (32, 4), 60000, x, None, -7, 1.5)
kernel.launch((3, 4, 5), (64,), 0, None, x, 2**31 - 1, 0.25)
print("address", x.data_ptr())
try:
    kernel.launch((1,), (1,), 400000, x, x, 1, 1.0)
except RuntimeError as error:
    print("error", error)
"""


@needs_nvrtc
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_calls_reach_the_driver(tmp_path):
    source, cache = tmp_path / "kernels.cu", tmp_path / "cache"
    source.write_text(SOURCE)
    subprocess.run(["g++", "-shared", "-fPIC", STUB, "-o", tmp_path / "libcuda.so.1", "-ldl"], check=True, timeout=120)
    cuda_runtime.compiled_for(cuda_runtime.Specialisation(source, "scale", DEFINES), "sm_90", cache)  # not beside the stub
    environment = {"MPMAE_KERNEL_CACHE": str(cache), "LD_LIBRARY_PATH": str(tmp_path), "STUB_PARAMETERS": "PPif"}
    command, folder = [sys.executable, "-c", LAUNCH, source], STUB.parents[2]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    address = next(line.split()[1] for line in lines if line.startswith("address"))
    relaxed, attribute = 2, 8  # CU_STREAM_CAPTURE_MODE_RELAXED, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    expected = [
        "context 100",
        f"capture mode {relaxed}",
        "function scale",
        "capture mode 0",
        "context 100",
        f"attribute {attribute} of 15: 60000",
        f"launch 15: 2 1 1, 32 4 1, 60000, stream 42: {address} 0 -7 1.5",
        f"launch 15: 3 4 5, 64 1 1, 0, stream 42: 0 {address} 2147483647 0.25",
        f"attribute {attribute} of 15: 400000",
    ]
    assert sorted(expected) == sorted(line for line in lines if not line.startswith(("address", "error")))
    (error,) = (line for line in lines if line.startswith("error"))
    assert "scale: cuFuncSetAttribute: CUDA_ERROR_INVALID_VALUE (made up)" in error


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MPMAE_KERNEL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "kernels.cu"
    path.write_text(SOURCE)
    return path


def scaled(kernel, x, factor=2.0):
    y = torch.full_like(x, float("nan"))
    kernel.launch((-(-x.numel() // 128),), (128,), 0, x, y, x.numel(), factor)
    return y


@pytest.mark.gpu
def test_on_the_gpu(source):
    x = torch.randn(1000, device="cuda")
    kernel = cuda_runtime.load(source, "scale", DEFINES)
    torch.testing.assert_close(scaled(kernel, x), x * 2 + 0.5)
    staged = torch.full((256,), float("nan"), device="cuda")
    # 80 KB of dynamic shared memory, of which the kernel uses the far end
    cuda_runtime.load(source, "staged", DEFINES).launch((1,), (256,), 4 * (DEFINES["LAST"] + 1), staged)
    torch.testing.assert_close(staged, torch.arange(255.0, -1, -1, device="cuda"))


@pytest.mark.gpu
def test_on_the_current_stream(source):
    """A kernel queued behind a long wait on a side stream sees what was written before it on that stream."""
    kernel, x = cuda_runtime.load(source, "scale", DEFINES), torch.zeros(1000, device="cuda")
    scaled(kernel, x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.fill_(3)
        y = scaled(kernel, x)
    side.synchronize()
    torch.testing.assert_close(y, torch.full_like(y, 6.5))


@pytest.mark.gpu
def test_first_launch_inside_a_capture(source):
    """Compiling and loading happen while the stream is captured; replays read the inputs anew."""
    kernel, x = cuda_runtime.load(source, "scale", DEFINES), torch.ones(1000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = scaled(kernel, x)
    for value in (1.0, -4.0):
        x.fill_(value)
        graph.replay()
        torch.testing.assert_close(y, x * 2 + 0.5)


@pytest.mark.gpu
def test_from_a_thread_of_autograd(source):
    """The backward's thread has no CUDA context of its own before its first call."""
    kernel = cuda_runtime.load(source, "scale", DEFINES)

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return scaled(kernel, x)

        @staticmethod
        def backward(ctx, grad):
            return scaled(kernel, grad, 3.0)

    x = torch.randn(1000, device="cuda", requires_grad=True)
    Scale.apply(x).backward(torch.ones(1000, device="cuda"))
    torch.testing.assert_close(x.grad, torch.full_like(x, 3.5))


@pytest.mark.gpu
def test_what_a_gpu_refuses(source):
    staged = torch.empty(256, device="cuda")
    with pytest.raises(RuntimeError, match=r"staged: cuFuncSetAttribute: CUDA_ERROR_INVALID_VALUE.* 1000000 bytes"):
        cuda_runtime.load(source, "staged", DEFINES).launch((1,), (256,), 1_000_000, staged)
    kernel, x = cuda_runtime.load(source, "scale", DEFINES), torch.ones(8, device="cuda")
    with pytest.raises(ValueError, match=r"argument 1: on cpu, expected cuda:0"):
        kernel.launch((1,), (8,), 0, x, torch.ones(8), 8, 1.0)
    torch.testing.assert_close(scaled(kernel, x), torch.full_like(x, 2.5))


@pytest.mark.gpu
def test_packages_are_there_with_a_gpu():
    assert cuda_driver.missing() is None
