"""CUDA sources compiled for GPUs that are not here, by nvcc and by NVRTC, and what the assembler says of them."""

import ctypes
import importlib.util
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Usage(NamedTuple):
    """What a kernel takes per thread (registers, bytes of local memory, which spilled registers go to) and per CTA."""

    registers: int
    local_bytes: int
    shared_bytes: int


def compile_with_nvcc(source: Path, defines: Mapping[str, str | int], architecture: int, folder: Path) -> Usage:
    """Compile a source of one kernel for sm_80, sm_90, ... into `folder`; shared_bytes is the static part."""
    macros = [f"-D{name}={value}" for name, value in defines.items()]
    target = ["-std=c++17", f"-arch=sm_{architecture}", "-cubin", "-o", str(folder / f"sm_{architecture}.cubin")]
    done = subprocess.run(["nvcc", "-Xptxas", "-v", *target, *macros, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    registers = int(re.search(r"Used (\d+) registers", done.stderr)[1])
    local = sum(map(int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", done.stderr).groups()))
    static = re.search(r"(\d+) bytes smem", done.stderr)
    return Usage(registers, local, int(static[1]) if static else 0)


def nvrtc_library() -> Path | None:
    """NVRTC of the package nvidia-cuda-nvrtc, if that is installed."""
    found = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in found.submodule_search_locations] if found else []
    return next((path for folder in folders for path in folder.glob("*/lib/libnvrtc.so.*")), None)


def compile_with_nvrtc(library: Path, source: Path, defines: Mapping[str, str | int], architecture: int) -> bytes:
    """The cubin of a source."""
    for part in library.parent.glob("libnvrtc-builtins.so.*"):  # NVRTC finds it once it is loaded
        ctypes.CDLL(str(part), mode=ctypes.RTLD_GLOBAL)
    nvrtc, program = ctypes.CDLL(str(library)), ctypes.c_void_p()
    options = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", *(f"-D{k}={v}" for k, v in defines.items())]
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), b"kernel.cu", 0, None, None) == 0
    try:
        status, size = nvrtc.nvrtcCompileProgram(program, len(options), given), ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, text)
        assert status == 0, text.value.decode()
        assert nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0
        cubin = ctypes.create_string_buffer(size.value)
        assert nvrtc.nvrtcGetCUBIN(program, cubin) == 0
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
