"""The fused pointwise kernels compiled for GPUs that are not here: no spilled register, within registers and shared memory.

`python -m tests.kernels.test_pointwise_offline` prints the table of kernels/pointwise/README.md.
"""

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton, which is not installed", allow_module_level=True)

from mpmae.kernels.pointwise import fused_backward, fused_forward, tuning
from tests.kernels.offline import ARCHITECTURES, Usage, compile_for

KERNELS = {
    "hidden": fused_forward.hidden_kernel,
    "output": fused_forward.output_kernel,
    "outer": fused_backward.outer_kernel,
    "rows": fused_backward.rows_kernel,
    "weight1": fused_backward.weight1_kernel,
    "rows_and_weight1": fused_backward.rows_and_weight1_kernel,
}
ACTIVATIONS = {"y", "residual", "out", "grad", "h", "slope", "grad_a", "grad_y", "weight1", "weight2"}
COUNTS = {"part_rows", "parts_per_chunk", "rows_per_chunk", "total_blocks", "blocks_per_chunk"}
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
# warps that a multiprocessor holds at once, at least, with its 65536 registers and this shared memory
LEAST_WARPS = 8
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
GROUP_ROWS = 1216


def usage(name: str, channels: int, dtype: str, architecture: int, gelu: str = "erf") -> tuple[tuning.Blocks, Usage] | None:
    kernel = KERNELS[name]
    blocks = tuning.blocks(name, channels, ELEMENT_BYTES[dtype], GROUP_ROWS, architecture // 10)
    if blocks is None:
        return None
    signature = {}
    for parameter in kernel.params:
        argument = parameter.name
        if parameter.is_constexpr:
            continue
        if argument.startswith("num_") or argument in COUNTS:
            signature[argument] = "i32"
        elif argument == "eps":
            signature[argument] = "fp32"
        else:
            signature[argument] = "*" + ("u8" if argument == "valid" else dtype if argument in ACTIVATIONS else "fp32")
    constants = {"C": channels, "C_PADDED": tuning.padded(channels), "ROWS": blocks.rows, "HIDDEN": blocks.hidden}
    constants |= {"HAS_VALID": True, "GELU": gelu, "FACTOR_STRIDE": 4 * channels}
    constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}
    pointers = [argument for argument, kind in signature.items() if kind[0] == "*"]
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    return blocks, compile_for(kernel, architecture, signature, constants, aligned=pointers, **options)


def check(name: str, channels: int, dtype: str, architecture: int, gelu: str = "erf") -> None:
    found = usage(name, channels, dtype, architecture, gelu)
    if found is None:
        assert name == "rows_and_weight1"
        return
    blocks, used = found
    assert used.local_bytes == 0, (name, channels, dtype, architecture, blocks, used)
    assert used.shared_bytes <= SHARED_BYTES[architecture], (blocks, used)
    rounded = -(-used.registers // 8) * 8
    resident = min(65536 // (rounded * 32 * blocks.num_warps), SHARED_BYTES[architecture] // (used.shared_bytes + 1024))
    assert resident * blocks.num_warps >= LEAST_WARPS, (name, channels, dtype, architecture, blocks, used)


@pytest.mark.parametrize("name", KERNELS)
def test_atto_compiles_for_hopper_without_spilling(name):
    check(name, 40, "bf16", 90)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("channels", "dtype"), [(c, "bf16") for c in (5, 40, 48, 64, 80, 96, 128)] + [(40, "fp16")])
def test_every_width_compiles_without_spilling(channels, dtype, architecture):
    for name in KERNELS:
        check(name, channels, dtype, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("channels", [5, 40, 64, 80, 128])
def test_float32_compiles_without_spilling(channels, architecture):
    for name in KERNELS:
        check(name, channels, "fp32", architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("gelu", ["tanh", "poly"])
def test_every_gelu_compiles_without_spilling(gelu, architecture):
    check("hidden", 40, "bf16", architecture, gelu)


def print_table() -> None:
    print("| C | kernel | rows, hidden, warps, stages | sm_80: registers, shared bytes | sm_90: registers, shared bytes |")
    print("|---|---|---|---|---|")
    for channels in (40, 80, 96, 128):
        for name in KERNELS:
            found = {architecture: usage(name, channels, "bf16", architecture) for architecture in ARCHITECTURES}
            if found[90] is not None:
                cells = [f"{u[1].registers}, {u[1].shared_bytes}" if u else "not used" for u in found.values()]
                print(f"| {channels} | {name} | {', '.join(map(str, found[90][0]))} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    print_table()
