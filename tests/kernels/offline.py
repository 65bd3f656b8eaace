"""Triton kernels compiled for GPUs that are not here, and what the assembler says of them.

A test file of an op lists its own kernels and calls `assert_fits` (as tests/kernels/test_triton_offline.py does). Compiling
takes seconds per kernel: few of them by default, the rest marked slow.
"""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90)


class Usage(NamedTuple):
    """What a kernel takes per thread (registers, bytes of local memory, which spilled registers go to) and per program.

    instructions: how often each opcode of the assembly occurs ("FFMA", "LDG", ...), no-operations left out.
    """

    registers: int
    local_bytes: int
    shared_bytes: int
    instructions: Counter


def compile_for(
    kernel, architecture: int, signature: dict[str, str], constants: dict, *, aligned: tuple[str, ...] = (), **options
) -> Usage:
    """Compile a `triton.jit` function for sm_80, sm_90, ...

    signature: argument -> Triton's name of its type ("*bf16", "i32", ...). constants: constexpr argument -> value, None for
    a pointer that is left out. aligned: numbers that are multiples of 16, as a launch finds out; pointers are taken
    to be multiples of 16 bytes, as those of PyTorch are. options: num_warps, num_stages.
    """
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {*aligned, *(name for name, kind in types.items() if kind[0] == "*")}
    multiples = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=multiples)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        printed = _run_tool("cuobjdump", "--dump-resource-usage", path)
        assembly = _run_tool("nvdisasm", "-c", path)
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", printed)[1]) for name in ("REG", "STACK", "LOCAL"))
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z0-9]+)", assembly, re.MULTILINE))
    del opcodes["NOP"]
    return Usage(registers, stack + local, compiled.metadata.shared, opcodes)


def assert_fits(max_registers: int, kernel, architecture: int, signature: dict, constants: dict, **options) -> Usage:
    """Compile as `compile_for` does, and see that nothing spills and that the registers stay within the cap."""
    usage = compile_for(kernel, architecture, signature, constants, **options)
    where = f"{kernel.fn.__name__} for sm_{architecture} in Triton {triton.__version__}, {constants}: {usage}"
    assert usage.local_bytes == 0, f"registers are spilled: {where}"
    assert usage.registers <= max_registers, f"more than {max_registers} registers: {where}"
    return usage


def _run_tool(name: str, *arguments) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout
