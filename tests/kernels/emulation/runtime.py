"""CUDA sources compiled by g++ behind `emulation.h`, run on CPU tensors; in place of `mpmae.kernels.cuda_runtime`."""

import ctypes
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

HEADER = Path(__file__).parent / "emulation.h"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off", "-w", "-x", "c++", "-")
SANITIZED = ("-fsanitize=address,alignment", "-fno-sanitize-recover=alignment", "-g")
Defines = Mapping[str, str | int]


class Kernel:
    """One function of a shared library."""

    def __init__(self, function, runtime: "Runtime"):
        self._function, self._runtime = function, runtime
        self._function.restype = ctypes.c_char_p

    def launch(self, grid, block, shared_bytes, *args) -> None:
        """Run it on every CTA of the grid."""
        values = [_value(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        size = (ctypes.c_int * 3)(*grid, *[1] * (3 - len(grid)))
        assert set(block[1:]) <= {1}
        failure = self._function(size, block[0], shared_bytes, self._runtime.reverse, pointers)
        assert failure is None, failure.decode()


def _value(arg):
    if arg is None:
        return ctypes.c_void_p(None)
    if isinstance(arg, Tensor):
        assert arg.is_contiguous()
        return ctypes.c_void_p(arg.data_ptr())
    return ctypes.c_float(arg) if isinstance(arg, float) else ctypes.c_int(arg)


class Runtime:
    """Stands in for the module `mpmae.kernels.cuda_runtime`; compiles into `folder`.

    sanitize: with the address and alignment sanitizers. reverse: whether launches run the threads of a CTA in reverse order.
    """

    def __init__(self, folder: Path, *, sanitize: bool = False):
        self.folder, self.sanitize = folder, sanitize
        self.reverse = False
        self._kernels: dict[tuple, Kernel] = {}

    def load(self, source: Path, name: str, defines: Defines) -> Kernel:
        """The kernel `name` of a source under its macros, compiled now unless it was before."""
        key = _key(source, name, defines)
        if key not in self._kernels:
            self.compile([(source, name, defines)])
        return self._kernels[key]

    def compile(self, wanted: Iterable[tuple[Path, str, Defines]]) -> None:
        """Compile several kernels at once: a start of the compiler costs as much as two kernels."""
        text, keys = [f'#include "{HEADER}"'], []
        for number, (source, name, defines) in enumerate(wanted):
            text += [f"#define {macro} {value}" for macro, value in defines.items()]
            text += [f"namespace kernel{number} {{", f'#include "{source}"', "}"]
            text += [f"EMULATED_LAUNCH(kernel{number}::{name}, launch{number})", *(f"#undef {macro}" for macro in defines)]
            keys.append(_key(source, name, defines))
        library = self.folder / f"{len(self._kernels)}.so"
        command = ["g++", *FLAGS, *(SANITIZED if self.sanitize else ()), "-o", str(library)]
        done = subprocess.run(command, input="\n".join(text) + "\n", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        loaded = ctypes.CDLL(str(library))
        for number, key in enumerate(keys):
            self._kernels[key] = Kernel(loaded[f"launch{number}"], self)


def _key(source: Path, name: str, defines: Defines) -> tuple:
    return str(source), name, *sorted(defines.items())
