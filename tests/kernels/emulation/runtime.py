"""CUDA sources compiled by g++ behind `emulation.h` and run on CPU tensors, with the interface of `mpmae.kernels.cuda_runtime`."""

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from torch import Tensor

HEADER = Path(__file__).parent / "emulation.h"
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off", "-w", "-x", "c++", "-")
SANITIZED = ("-fsanitize=address,alignment", "-fno-sanitize-recover=alignment", "-g")


class Kernel:
    """One kernel as a shared library."""

    def __init__(self, library: Path, reverse: bool):
        self._launch = ctypes.CDLL(str(library)).emulated_launch
        self._launch.restype = ctypes.c_char_p
        self._reverse = reverse

    def launch(self, grid, block, shared_bytes, *args) -> None:
        """Run it on every CTA of the grid."""
        values = [_value(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        size = (ctypes.c_int * 3)(*grid, *[1] * (3 - len(grid)))
        assert len(block) == 1 or set(block[1:]) == {1}
        failure = self._launch(size, block[0], shared_bytes, self._reverse, pointers)
        assert failure is None, failure.decode()


def _value(arg):
    if arg is None:
        return ctypes.c_void_p(None)
    if isinstance(arg, Tensor):
        assert arg.is_contiguous()
        return ctypes.c_void_p(arg.data_ptr())
    return ctypes.c_float(arg) if isinstance(arg, float) else ctypes.c_int(arg)


class Runtime:
    """Stands in for the module `mpmae.kernels.cuda_runtime`; compiles into a folder of its own, removed by `close`.

    reverse: run the threads of a CTA in reverse order. sanitize: with the address and alignment sanitizers.
    """

    def __init__(self, *, reverse: bool = False, sanitize: bool = False):
        self.folder = Path(tempfile.mkdtemp(prefix="emulated-"))
        self.reverse, self.sanitize = reverse, sanitize
        self.load = lambda source, name, defines: self._load(source, name, tuple(sorted(defines.items())))
        self._load = cache(self._compile)

    def _compile(self, source: Path, name: str, defines: tuple[tuple[str, str | int], ...]) -> Kernel:
        return Kernel(self.build(source, name, dict(defines)), self.reverse)

    def build(self, source: Path, name: str, defines: Mapping[str, str | int]) -> Path:
        """The shared library of a kernel."""
        key = hashlib.sha256(repr((str(source), name, sorted(defines.items()))).encode()).hexdigest()[:16]
        library = self.folder / f"{key}.so"
        text = f'#include "{HEADER}"\n#include "{source}"\nEMULATED_LAUNCH({name})\n'
        macros = [f"-D{key}={value}" for key, value in defines.items()]
        command = ["g++", *FLAGS, *(SANITIZED if self.sanitize else ()), *macros, "-o", str(library)]
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return library

    def close(self) -> None:
        """Remove the compiled files."""
        shutil.rmtree(self.folder)
