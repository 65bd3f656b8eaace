"""CUDA kernels from source files: compiled by NVRTC for the device at hand, kept on disk, launched on PyTorch's stream.

    kernel = load(SOURCE, "depthwise_forward", {"CHANNELS": 40, "TILE_SIDE": 8})
    kernel.launch((grid,), (block,), shared_bytes, x, weight, None, num_samples, 1e-6)

A source is one file of CUDA C++ without includes, its kernels `extern "C" __global__` functions of pointers, 32-bit integers
and floats; macros make it special. A kernel is compiled and loaded on its first launch on a device (or by `Kernel.prepare`),
also while a CUDA graph is being captured; from then on a launch compiles, loads and allocates nothing.
"""

import ctypes
import re
import struct
import threading
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mpmae.kernels import cuda_driver, kernel_cache

Define = int | float | str | bool

_OPTIONS = ("--std=c++17", "--generate-line-info")
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\(([^)]*)\)")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)")
_LETTERS = {"u64": "P", "s64": "P", "b64": "P", "u32": "i", "s32": "i", "b32": "i", "f32": "f"}
_devices_of_thread = threading.local()
_WORDS = {"P": "tensor or None", "i": "int", "f": "float"}


class Specialisation(NamedTuple):
    """One compilation that an op may ask for: what `load` takes."""

    source_path: Path
    kernel_name: str
    defines: Mapping[str, Define]


class Kernel:
    """A kernel of a source file with its macros set, for any device. Built by `load`."""

    def __init__(self, specialisation: Specialisation):
        self.specialisation = specialisation
        self._bound: dict[int, _Bound] = {}
        self._lock = threading.Lock()

    def launch(self, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int, *args: Any) -> None:
        """Queue the kernel on PyTorch's current stream of the tensors' device.

        grid, block: one to three sizes. shared_bytes: dynamic shared memory. args, one per parameter: a contiguous tensor
        (its first element's address), None (the null pointer), an int (32 bits) or a float (32 bits).
        Raises TypeError or ValueError for arguments that do not fit the kernel, RuntimeError where CUDA fails.
        """
        for arg in args:
            if isinstance(arg, Tensor):
                index = arg.get_device()
                break
        else:
            raise TypeError(f"{self.specialisation.kernel_name}: no tensor among the arguments, so no device to run on")
        bound = self._bound.get(index) or self.prepare(index)
        bound.launch(grid, block, shared_bytes, args)

    def prepare(self, device_index: int) -> "_Bound":
        """Compile and load for a device, if that is not done yet."""
        with self._lock:
            bound = self._bound.get(device_index)
            if bound is None:
                if device_index < 0:
                    raise ValueError(f"{self.specialisation.kernel_name}: tensors on the CPU, expected on a CUDA device")
                bound = self._bound[device_index] = _Bound(self.specialisation, device_index, _driver())
            return bound


class _Bound:
    """A kernel on one device, and the memory in which its arguments are laid out for a launch."""

    def __init__(self, specialisation: Specialisation, device_index: int, driver):
        name = specialisation.kernel_name
        target = architecture(driver.capability(device_index), cuda_driver.architectures())
        compiled = compiled_for(specialisation, target)
        self.name, self.device_index, self._driver = name, device_index, driver
        self._letters = compiled.parameters[name]
        self._function = driver.load(compiled.cubin, name, device_index)
        self._shared_allowed = 0
        # one buffer, filled and read under a lock: the driver copies the arguments before its call returns
        self._packer = struct.Struct(f"@{self._letters}")
        self._buffer = ctypes.create_string_buffer(max(self._packer.size, 1))
        start = ctypes.addressof(self._buffer)
        ends = [struct.calcsize(f"@{self._letters[: i + 1]}") for i in range(len(self._letters))]
        places = [start + end - struct.calcsize(letter) for end, letter in zip(ends, self._letters, strict=True)]
        self._pointers = (ctypes.c_void_p * max(len(places), 1))(*places)
        self._parameters = ctypes.addressof(self._pointers)
        self._lock = threading.Lock()

    def launch(self, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int, args: tuple) -> None:
        driver, index = self._driver, self.device_index
        values = []
        if len(args) != len(self._letters):
            raise TypeError(f"{self.name}: {len(args)} arguments, expected {len(self._letters)}: {self._signature()}")
        for letter, arg in zip(self._letters, args):  # noqa: B905 - lengths are equal, and this runs at every launch
            if letter != "P":
                values.append(arg)
            elif arg is None:
                values.append(0)
            elif isinstance(arg, Tensor) and arg.get_device() == index and arg.is_contiguous():
                values.append(arg.data_ptr())
            else:
                self._explain(args)
        if driver.current_device() != index:
            with driver.on_device(index):
                return self.launch(grid, block, shared_bytes, args)
        if index not in _devices_of_thread.__dict__:
            driver.bind_context(index)
            _devices_of_thread.__dict__[index] = True
        stream = driver.current_stream(index)
        with self._lock:
            try:
                self._packer.pack_into(self._buffer, 0, *values)
            except struct.error:
                self._explain(args)
            try:
                if shared_bytes > self._shared_allowed:
                    driver.allow_shared(self._function, shared_bytes)
                    self._shared_allowed = shared_bytes
                driver.launch(self._function, _three(grid), _three(block), shared_bytes, stream, self._parameters)
            except cuda_driver.DriverError as error:
                asked = f"grid {grid}, block {block}, {shared_bytes} bytes of dynamic shared memory"
                raise RuntimeError(f"{self.name}: {error}; {asked}") from error

    def _explain(self, args: tuple) -> None:
        """Raise an error that names every argument that does not fit."""
        problems = []
        for number, (letter, arg) in enumerate(zip(self._letters, args, strict=True)):
            expected = f"expected {_WORDS[letter]}"
            if isinstance(arg, Tensor) and letter == "P":
                if arg.get_device() != self.device_index:
                    problems.append(f"argument {number}: on {arg.device}, expected cuda:{self.device_index}")
                if not arg.is_contiguous():
                    problems.append(f"argument {number}: strides {arg.stride()}, expected a contiguous tensor")
            elif letter == "i" and isinstance(arg, int) and not -(2**31) <= arg < 2**31:
                problems.append(f"argument {number}: {arg} does not fit 32 bits")
            elif not isinstance(arg, {"P": type(None), "i": int, "f": (int, float)}[letter]):
                problems.append(f"argument {number}: {type(arg).__name__}, {expected}")
        raise ValueError(f"{self.name}: {'; '.join(problems)}")

    def _signature(self) -> str:
        return ", ".join(_WORDS[letter] for letter in self._letters) or "none"


def load(source_path: Path | str, kernel_name: str, defines: Mapping[str, Define] | None = None) -> Kernel:
    """The kernel `kernel_name` of a source file under the given macros; the same object for the same arguments.

    Nothing is compiled yet. Raises RuntimeError where cuda-bindings or NVRTC is absent.
    """
    cuda_driver.require()
    return _loaded(str(source_path), kernel_name, tuple(sorted((defines or {}).items())))


@cache
def _loaded(source_path: str, kernel_name: str, defines: tuple[tuple[str, Define], ...]) -> Kernel:
    return Kernel(Specialisation(Path(source_path), kernel_name, dict(defines)))


@cache
def _driver():
    return cuda_driver.Driver()


def architecture(capability: tuple[int, int], known: Iterable[int]) -> str:
    """What to compile for a device of a compute capability: "sm_90"; the newest of its generation that NVRTC knows.

    Raises RuntimeError for a generation that NVRTC does not know.
    """
    major, minor = capability
    fitting = [arch for arch in known if arch // 10 == major and arch % 10 <= minor]
    if not fitting:
        raise RuntimeError(
            f"compute capability {major}.{minor}: NVRTC {cuda_driver.nvrtc_version()} compiles for "
            f"{', '.join(f'sm_{arch}' for arch in sorted(known))}; update nvidia-cuda-nvrtc"
        )
    return f"sm_{max(fitting)}"


def compiled_for(specialisation: Specialisation, target: str, folder: Path | None = None) -> kernel_cache.Compiled:
    """The machine code for an architecture ("sm_90"): from the cache in `folder` (the user's by default), else compiled.

    Needs no GPU. Raises CompileError for a source that NVRTC does not take, ValueError for a kernel that is not in it or
    has parameters other than pointers, 32-bit integers and floats.
    """
    folder = kernel_cache.default_folder() if folder is None else folder
    source = _source(specialisation.source_path)
    defines = {name: _macro(value) for name, value in specialisation.defines.items()}
    options = (*_OPTIONS, f"--gpu-architecture={target}")
    key = kernel_cache.key_of(source, defines, options, cuda_driver.nvrtc_version())
    compiled = kernel_cache.read(folder, key)
    if compiled is None:
        macros = tuple(f"--define-macro={name}={value}" for name, value in sorted(defines.items()))
        image = cuda_driver.compile_source(source, specialisation.source_path.name, (*options, *macros))
        compiled = kernel_cache.Compiled(image.cubin, _parameters(image.ptx))
        kernel_cache.write(folder, key, compiled)
    letters = compiled.parameters.get(specialisation.kernel_name)
    if letters is None or "?" in letters:
        raise ValueError(
            f"{specialisation.source_path}: kernel {specialisation.kernel_name}: "
            + (
                f'not among {", ".join(compiled.parameters) or "no kernels"}; expected an extern "C" function of that name'
                if letters is None
                else "expected parameters that are pointers, 32-bit integers or floats"
            )
        )
    return compiled


@cache
def _source(path: Path) -> str:
    return path.read_text()


def _macro(value: Define) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _parameters(ptx: str) -> dict[str, str]:
    """Letters of `struct` for the parameters of each kernel in a PTX text; "?" for a type that a launch does not take."""
    return {
        name: "".join(_LETTERS.get(kind, "?") for kind in _PARAMETER.findall(parameters))
        for name, parameters in _ENTRY.findall(ptx)
    }


def _three(sizes: tuple[int, ...]) -> tuple[int, int, int]:
    return sizes if len(sizes) == 3 else (*sizes, 1, 1)[:3]
