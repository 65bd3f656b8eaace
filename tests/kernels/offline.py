"""Triton kernels compiled for GPUs that are not here, and what the assembler says of them."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90)


class Usage(NamedTuple):
    """What a kernel takes per thread (registers, bytes of local memory, which spilled registers go to) and per program."""

    registers: int
    local_bytes: int
    shared_bytes: int


def compile_for(kernel, architecture: int, signature: dict[str, str], constants: dict, **options) -> Usage:
    """Compile a `triton.jit` function for sm_80, sm_90, ...

    signature: argument -> Triton's name of its type ("*bf16", "i32", ...). constants: constexpr argument -> value. options:
    num_warps, num_stages. Pointers are taken to be multiples of 16 bytes, as those of PyTorch are.
    """
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind[0] == "*"}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        printed = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", printed)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Usage(registers, stack + local, compiled.metadata.shared)
