"""The door to NVIDIA's Python bindings (package cuda-bindings): NVRTC, and the driver calls that a launch takes.

PyTorch's CUDA builds bring both cuda-bindings and NVRTC. Nothing is imported before it is needed: compiling needs no GPU and
no driver, and everything else of `mpmae.kernels` works without either package.
Source: "CUDA Driver API" and "NVRTC" of the CUDA 13 documentation.
"""

from functools import cache
from typing import Any, NamedTuple

import torch

INSTALL = "install them: pip install 'mpmae[cuda]' (a CUDA build of PyTorch brings them)"


class CompileError(RuntimeError):
    """NVRTC does not take a source; holds its log."""


class DriverError(RuntimeError):
    """A call of the CUDA driver failed."""


class Image(NamedTuple):
    """What NVRTC makes of a source for one architecture: the machine code, and PTX, which names the parameters' types."""

    cubin: bytes
    ptx: str


@cache
def missing() -> str | None:
    """Why CUDA sources can't be compiled here and what to install; None when they can. Looks for no GPU."""
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401 - the launch needs it

        nvrtc.nvrtcVersion()
    except ImportError as error:
        return f"the packages cuda-bindings and nvidia-cuda-nvrtc are not (both) there ({error}); {INSTALL}"
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return f"NVRTC (package nvidia-cuda-nvrtc) is not found ({reason}); {INSTALL}"
    return None


def require() -> None:
    """Raise RuntimeError where `missing` has something to say."""
    reason = missing()
    if reason is not None:
        raise RuntimeError(f"CUDA kernels: {reason}")


@cache
def nvrtc_version() -> str:
    """NVRTC's version, such as "13.0"."""
    from cuda.bindings import nvrtc

    return "{}.{}".format(*_nvrtc(nvrtc.nvrtcVersion()))


@cache
def architectures() -> tuple[int, ...]:
    """The architectures that NVRTC compiles for: 80, 90, ..."""
    from cuda.bindings import nvrtc

    return tuple(_nvrtc(nvrtc.nvrtcGetSupportedArchs()))


def compile_source(source: str, name: str, options: tuple[str, ...]) -> Image:
    """Compile CUDA C++; name: what messages call the source. options: NVRTC's, a real architecture (sm_90) among them.

    Raises CompileError with NVRTC's log.
    """
    from cuda.bindings import nvrtc

    program = _nvrtc(nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], []))
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
            raise CompileError(
                f"{name}: NVRTC {nvrtc_version()} does not take it with {' '.join(options)}\n{log.strip(chr(0))}"
            )
        cubin = _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
        ptx = _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Image(cubin, ptx.rstrip(b"\0").decode())


def _text(size_of, read, program) -> bytes:
    buffer = bytes(_nvrtc(size_of(program)))
    _nvrtc(read(program, buffer))
    return buffer


def _nvrtc(answer: tuple) -> Any:
    from cuda.bindings import nvrtc

    result, *values = answer
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(result)[1].decode()}")
    return values[0] if len(values) == 1 else values


class Driver:
    """The driver calls that loading and launching take, on PyTorch's contexts (the primary ones)."""

    def __init__(self):
        require()
        from cuda.bindings import driver

        self._api = driver
        self._launch, self._success = driver.cuLaunchKernel, driver.CUresult.CUDA_SUCCESS
        self._streams: dict[int, Any] = {}
        self.current_stream = torch._C._cuda_getCurrentRawStream  # as Triton and Inductor; the public way takes longer

    def capability(self, device_index: int) -> tuple[int, int]:
        """Compute capability of a device."""
        return torch.cuda.get_device_capability(device_index)

    def current_device(self) -> int:
        """Number of the device that is current in this thread."""
        return torch.cuda.current_device()

    def on_device(self, device_index: int):
        """A context manager that makes a device current."""
        return torch.cuda.device(device_index)

    def bind_context(self, device_index: int) -> None:
        """Make the primary context of the current device that of this thread; a thread of autograd's may be without one."""
        torch.cuda.init()
        device = self._call("cuDeviceGet", device_index)
        self._call("cuCtxSetCurrent", self._call("cuDevicePrimaryCtxRetain", device))

    def load(self, cubin: bytes, kernel_name: str, device_index: int) -> Any:
        """The kernel of a cubin on a device, ready to be launched, also while a stream of it is being captured."""
        relaxed = self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        with self.on_device(device_index):
            self.bind_context(device_index)
            previous = self._call("cuThreadExchangeStreamCaptureMode", relaxed)  # loading allocates, which a capture forbids
            try:  # the function's code is loaded when it is looked up, not at its first launch
                return self._call("cuModuleGetFunction", self._call("cuModuleLoadData", cubin), kernel_name.encode())
            finally:
                self._call("cuThreadExchangeStreamCaptureMode", previous)

    def allow_shared(self, function: Any, shared_bytes: int) -> None:
        """Let the kernel have that much dynamic shared memory; more than 48 KB has to be asked for."""
        attribute = self._api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._call("cuFuncSetAttribute", function, attribute, shared_bytes)

    def launch(self, function: Any, grid: tuple, block: tuple, shared_bytes: int, stream: int, parameters: int) -> None:
        """Queue a kernel; parameters: address of the array of pointers to its arguments, read before this returns."""
        handle = self._streams.get(stream)
        if handle is None:
            handle = self._streams[stream] = self._api.CUstream(stream)
        (result,) = self._launch(function, *grid, *block, shared_bytes, handle, parameters, 0)
        if result != self._success:
            self._refuse("cuLaunchKernel", result)

    def _call(self, name: str, *arguments) -> Any:
        result, *values = getattr(self._api, name)(*arguments)
        if result != self._success:
            self._refuse(name, result)
        return values[0] if values else None

    def _refuse(self, name: str, result) -> None:
        _, text = self._api.cuGetErrorString(result)
        raise DriverError(f"{name}: {result.name} ({text.decode() if text else 'no text'})")
