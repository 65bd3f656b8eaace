"""Run-time compilation, its cache and the launch. NVRTC compiles for real, without a GPU; the driver has a stand-in."""

import contextlib
import ctypes
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mpmae.kernels import cuda_driver, cuda_runtime, kernel_cache
from mpmae.kernels.cuda_runtime import Specialisation, architecture, compiled_for

needs_nvrtc = pytest.mark.skipif(cuda_driver.missing() is not None, reason=f"needs NVRTC: {cuda_driver.missing()}")

SOURCE = """
extern "C" __global__ void scale(const float* x, float* y, int number, float factor) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < number) y[i] = x[i] * factor + OFFSET;
}
extern "C" __global__ void mixed(int a, const float* x, float b, int c, double* y) { y[a] = x[c] * b; }
extern "C" __global__ void wide(float* x, double factor) { x[0] = factor; }
extern "C" __global__ void staged(float* y) {
    extern __shared__ float room[];
    room[LAST - threadIdx.x] = threadIdx.x;
    __syncthreads();
    y[threadIdx.x] = room[LAST - blockDim.x + 1 + threadIdx.x];
}
"""
DEFINES = {"OFFSET": 0.5, "LAST": 20000}


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "kernels.cu"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def compilations(monkeypatch) -> list[tuple[str, ...]]:
    """The options of every compilation that takes place."""
    seen, real = [], cuda_driver.compile_source
    monkeypatch.setattr(cuda_driver, "compile_source", lambda *args: seen.append(args[2]) or real(*args))
    return seen


@needs_nvrtc
def test_what_is_in_the_cache_is_not_compiled_again(source, tmp_path, compilations):
    folder, item = tmp_path / "cache", Specialisation(source, "scale", DEFINES)
    first = compiled_for(item, "sm_90", folder)
    assert first.cubin.startswith(b"\x7fELF")
    assert first.parameters["scale"] == "PPif"
    assert first.parameters["mixed"] == "iPfiP"
    assert compiled_for(item, "sm_90", folder) == first
    assert compiled_for(item._replace(kernel_name="mixed"), "sm_90", folder) == first  # one file for a source's kernels
    assert compiled_for(item._replace(defines=dict(reversed(DEFINES.items()))), "sm_90", folder) == first
    assert len(compilations) == len(list(folder.iterdir())) == 1
    assert {"--gpu-architecture=sm_90", "--define-macro=OFFSET=0.5"} <= set(compilations[0])


@needs_nvrtc
def test_what_differs_is_compiled(source, tmp_path, compilations, monkeypatch):
    folder, item = tmp_path / "cache", Specialisation(source, "scale", DEFINES)
    compiled_for(item, "sm_80", folder)
    compiled_for(item, "sm_90", folder)
    compiled_for(item._replace(defines=DEFINES | {"OFFSET": True}), "sm_90", folder)
    assert "--define-macro=OFFSET=1" in compilations[-1]
    monkeypatch.setattr(cuda_driver, "nvrtc_version", lambda: "12.9")
    compiled_for(item, "sm_90", folder)
    other = tmp_path / "other.cu"
    other.write_text(SOURCE.replace("* factor", "- factor"))
    compiled_for(item._replace(source_path=other), "sm_90", folder)
    assert len(compilations) == len(list(folder.iterdir())) == 5


@needs_nvrtc
@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:40], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1])]
)
def test_a_damaged_file_is_not_used(source, tmp_path, compilations, caplog, damage):
    folder, item = tmp_path / "cache", Specialisation(source, "scale", DEFINES)
    expected = compiled_for(item, "sm_90", folder)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    caplog.set_level(logging.WARNING)
    assert compiled_for(item, "sm_90", folder) == expected
    assert len(compilations) == 2
    assert "damaged" in caplog.text
    assert path.read_bytes() == whole
    assert list(folder.iterdir()) == [path]


@needs_nvrtc
def test_two_processes_at_once(source, tmp_path):
    folder = tmp_path / "cache"
    code = (
        "import sys; from pathlib import Path; from mpmae.kernels.cuda_runtime import Specialisation, compiled_for\n"
        "sys.stdin.readline()\n"
        f"item = Specialisation(Path({str(source)!r}), 'scale', {DEFINES!r})\n"
        f"print(len(compiled_for(item, 'sm_90', Path({str(folder)!r})).cubin))"
    )
    start = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, "-c", code], **start) for _ in range(2)]
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    sizes = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(sizes) == 1
    assert [path.suffix for path in folder.iterdir()] == [".cubin"]


@needs_nvrtc
def test_a_folder_that_cannot_be_used_is_named_once(source, tmp_path, compilations, caplog, monkeypatch):
    monkeypatch.setattr(kernel_cache, "_complained", set())
    (tmp_path / "file").write_text("in the way")
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        item = Specialisation(source, "scale", DEFINES)
        assert compiled_for(item, "sm_90", tmp_path / "file" / "cache").cubin
    assert len(compilations) == 3
    assert len(caplog.records) == 1
    assert "Set MPMAE_KERNEL_CACHE to a folder" in caplog.text


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("MPMAE_KERNEL_CACHE", str(tmp_path))
    assert kernel_cache.default_folder() == tmp_path
    monkeypatch.delenv("MPMAE_KERNEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernel_cache.default_folder() == tmp_path / "mpmae" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert kernel_cache.default_folder() == Path.home() / ".cache" / "mpmae" / "kernels"


@needs_nvrtc
def test_sources_that_do_not_fit(source, tmp_path):
    item = Specialisation(source, "scale", DEFINES)
    with pytest.raises(cuda_driver.CompileError, match=r"(?s)kernels.cu: NVRTC .*OFFSET.*undefined"):
        compiled_for(item._replace(defines={"LAST": 1}), "sm_90", tmp_path)
    with pytest.raises(ValueError, match="kernel scael: not among scale, mixed, wide, staged"):
        compiled_for(item._replace(kernel_name="scael"), "sm_90", tmp_path)
    with pytest.raises(ValueError, match="kernel wide: expected parameters that are pointers, 32-bit integers or floats"):
        compiled_for(item._replace(kernel_name="wide"), "sm_90", tmp_path)


def test_architecture_of_a_device(monkeypatch):
    known = (75, 80, 86, 89, 90, 100, 120)
    wanted = {(8, 0): 80, (8, 7): 86, (8, 9): 89, (9, 0): 90, (10, 3): 100, (12, 1): 120}
    assert {capability: architecture(capability, known) for capability in wanted} == {
        capability: f"sm_{arch}" for capability, arch in wanted.items()
    }
    monkeypatch.setattr(cuda_driver, "nvrtc_version", lambda: "13.0")
    with pytest.raises(
        RuntimeError, match=r"compute capability 13.0: NVRTC 13.0 compiles for sm_75.*update nvidia-cuda-nvrtc"
    ):
        architecture((13, 0), known)


@pytest.mark.parametrize("absent", ["cuda.bindings", "cuda"])
def test_absent_packages_are_named(monkeypatch, absent):
    monkeypatch.setitem(sys.modules, absent, None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    reason = cuda_driver.missing.__wrapped__()
    assert "cuda-bindings and nvidia-cuda-nvrtc" in reason
    assert "pip install 'mpmae[cuda]'" in reason
    monkeypatch.setattr(cuda_driver, "missing", lambda: reason)
    with pytest.raises(RuntimeError, match="cuda-bindings"):
        cuda_runtime.load("kernels.cu", "scale")


class OnDevice(torch.Tensor):
    """A tensor of the host that says it is on a GPU."""

    number = 0

    def get_device(self):
        return self.number


def on_device(*shape: int, number: int = 0) -> OnDevice:
    tensor = torch.randn(*shape).as_subclass(OnDevice)
    tensor.number = number
    return tensor


class FakeDriver:
    """What `cuda_driver.Driver` offers; notes the calls and reads arguments as CUDA does, through the array of pointers."""

    letters: str

    def __init__(self):
        self.calls, self.launches, self.device = [], [], 0

    def capability(self, index):
        return 9, 0

    def current_device(self):
        return self.device

    @contextlib.contextmanager
    def on_device(self, index):
        previous, self.device = self.device, index
        yield
        self.device = previous

    def current_stream(self, index):
        return 1000 + index

    def bind_context(self, index):
        self.calls.append(("bind_context", index, threading.get_ident()))

    def load(self, cubin, name, index):
        assert cubin.startswith(b"\x7fELF")
        self.calls.append(("load", name, index))
        return name

    def allow_shared(self, function, shared_bytes):
        self.calls.append(("allow_shared", function, shared_bytes))

    def launch(self, function, grid, block, shared_bytes, stream, parameters):
        types = {"P": ctypes.c_uint64, "i": ctypes.c_int32, "f": ctypes.c_float}
        places = (ctypes.c_void_p * len(self.letters)).from_address(parameters)
        values = [types[letter].from_address(place).value for letter, place in zip(self.letters, places, strict=True)]
        self.launches.append((function, self.device, grid, block, shared_bytes, stream, values))


@pytest.fixture
def driver(monkeypatch, tmp_path) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setattr(cuda_runtime, "_driver", lambda: fake)
    monkeypatch.setattr(cuda_runtime, "_devices_of_thread", threading.local())
    monkeypatch.setenv("MPMAE_KERNEL_CACHE", str(tmp_path / "cache"))
    return fake


@needs_nvrtc
def test_arguments_arrive_as_the_kernel_reads_them(source, driver):
    x, y = on_device(6), on_device(6)
    driver.letters = "PPif"
    kernel = cuda_runtime.load(source, "scale", DEFINES)
    assert kernel is cuda_runtime.load(str(source), "scale", dict(DEFINES))
    kernel.launch((2,), (32, 4), 0, x, y, -7, 1.5)
    kernel.launch((2, 3, 4), (8, 8, 1), 1000, x, None, 2**31 - 1, 2)
    assert driver.launches == [
        ("scale", 0, (2, 1, 1), (32, 4, 1), 0, 1000, [x.data_ptr(), y.data_ptr(), -7, 1.5]),
        ("scale", 0, (2, 3, 4), (8, 8, 1), 1000, 1000, [x.data_ptr(), 0, 2**31 - 1, 2.0]),
    ]
    driver.letters = "iPfiP"
    cuda_runtime.load(source, "mixed", DEFINES).launch((1,), (1,), 0, 3, x, 0.25, True, y)
    assert driver.launches[-1][-1] == [3, x.data_ptr(), 0.25, 1, y.data_ptr()]


@needs_nvrtc
def test_loaded_once_on_each_device(source, driver):
    driver.letters = "PPif"
    kernel = cuda_runtime.load(source, "scale", DEFINES)
    for number in (0, 1, 1, 0):
        x = on_device(6, number=number)
        kernel.launch((1,), (32,), 0, x, x, 6, 1.0)
    assert [call for call in driver.calls if call[0] == "load"] == [("load", "scale", 0), ("load", "scale", 1)]
    assert [(launch[1], launch[5]) for launch in driver.launches] == [(0, 1000), (1, 1001), (1, 1001), (0, 1000)]
    assert driver.device == 0


@needs_nvrtc
def test_shared_memory_is_asked_for_when_it_grows(source, driver):
    driver.letters = "P"
    kernel = cuda_runtime.load(source, "staged", DEFINES)
    for shared_bytes in (100, 80000, 80000, 50000):
        kernel.launch((1,), (32,), shared_bytes, on_device(32))
    asked = [call[2] for call in driver.calls if call[0] == "allow_shared"]
    assert asked == [100, 80000]


@needs_nvrtc
def test_every_thread_has_a_context_before_it_launches(source, driver):
    driver.letters = "P"
    kernel = cuda_runtime.load(source, "staged", DEFINES)

    def run():
        for _ in range(2):
            kernel.launch((1,), (32,), 0, on_device(32))

    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    threads = [call[2] for call in driver.calls if call[0] == "bind_context"]
    assert threads == [threading.get_ident(), thread.ident]


@needs_nvrtc
def test_arguments_that_do_not_fit(source, driver):
    driver.letters = "PPif"
    kernel, x = cuda_runtime.load(source, "scale", DEFINES), on_device(6)
    with pytest.raises(TypeError, match="scale: 3 arguments, expected 4: tensor or None, tensor or None, int, float"):
        kernel.launch((1,), (32,), 0, x, x, 6)
    with pytest.raises(ValueError, match=r"argument 0: strides .*contiguous tensor; argument 3: str, expected float"):
        kernel.launch((1,), (32,), 0, on_device(4, 2).t(), x, 6, "1")
    with pytest.raises(ValueError, match=r"argument 1: on .*, expected cuda:0"):
        kernel.launch((1,), (32,), 0, x, on_device(6, number=1), 6, 1.0)
    with pytest.raises(ValueError, match="argument 2: 2147483648 does not fit 32 bits"):
        kernel.launch((1,), (32,), 0, x, x, 2**31, 1.0)
    with pytest.raises(ValueError, match="argument 1: int, expected tensor or None; argument 2: float, expected int"):
        kernel.launch((1,), (32,), 0, x, 5, 6.0, 1.0)
    with pytest.raises(TypeError, match="scale: no tensor among the arguments"):
        kernel.launch((1,), (32,), 0, None, None, 6, 1.0)
    with pytest.raises(ValueError, match="scale: tensors on the CPU, expected on a CUDA device"):
        kernel.launch((1,), (32,), 0, torch.ones(6), x, 6, 1.0)
    assert not driver.launches


@needs_nvrtc
def test_what_the_driver_refuses_names_the_launch(source, driver, monkeypatch):
    driver.letters = "P"

    def refuse(*args):
        raise cuda_driver.DriverError("cuFuncSetAttribute: CUDA_ERROR_INVALID_VALUE (invalid argument)")

    monkeypatch.setattr(driver, "allow_shared", refuse)
    with pytest.raises(
        RuntimeError, match=r"staged: cuFuncSetAttribute.*grid \(1,\), block \(32,\), 400000 bytes of dynamic"
    ):
        cuda_runtime.load(source, "staged", DEFINES).launch((1,), (32,), 400000, on_device(32))
