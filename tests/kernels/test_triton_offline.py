"""The depthwise kernels compile for GPUs that are not here, spill nothing and stay within their registers."""

import pytest

pytest.importorskip("triton", reason="needs triton, which is not installed")

from mpmae.kernels.depthwise import triton as depthwise
from tests.kernels.offline import ARCHITECTURES, Usage, assert_fits

MAX_REGISTERS = {32: 128, 64: 224}  # by channels of a program: at least 16 and 9 warps per SM
PRESETS = {"atto": 40, "tiny": 96, "base": 128}
FUNCTIONS = ("forward", "backward_input", "backward_weight")


def fits(function: str, side: int, channels: int, dtype: str, architecture: int) -> Usage:
    block_channels = depthwise.block_channels(channels)
    constants = {"C": channels, "BLOCK_C": block_channels, **depthwise.layout_constants(side, 7)}
    signature = {"visible": "*i64", "slots": "*i16", "num_visible": "i32", "num_blocks": "i32", "blocks_per_program": "i32"}
    signature |= {"x": f"*{dtype}"}
    if function == "backward_weight":
        kernel = depthwise._weight_gradient_kernel
        signature |= {"partial": "*fp32", "grad": f"*{dtype}"}
    else:
        kernel = depthwise._convolve_kernel
        forward = function == "forward"
        signature |= {"out": f"*{dtype}", "taps": "*fp32"} | ({"bias": "*fp32"} if forward else {"residual": f"*{dtype}"})
        constants |= {"FLIP": not forward, "residual" if forward else "bias": None}
    cap = MAX_REGISTERS[block_channels]
    return assert_fits(cap, kernel, architecture, signature, constants, **depthwise.launch_options(side))


@pytest.mark.parametrize("function", ["forward", "backward_weight"])
def test_tiles_of_two(function):
    """Atto's third stage: every neighbour's loads are few instructions, as its addresses are immediates."""
    usage = fits(function, 2, 160, "bf16", 90)
    assert usage.instructions["FFMA"] == 196 * depthwise.block_channels(160) // 32
    assert sum(usage.instructions.values()) < 1300


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", [8, 4, 2, 1])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_stage(function, preset, side, architecture):
    channels = PRESETS[preset] * 8 // side
    for dtype in ("bf16", "fp16", "fp32") if preset == "atto" and side > 1 else ("bf16",):
        fits(function, side, channels, dtype, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reduction(architecture):
    constants = {"C": 40, "ROWS": depthwise.REDUCED_ROWS, "BLOCK_C": depthwise.REDUCED_CHANNELS}
    signature = {"grad_weight": "*fp32", "grad_bias": "*fp32", "partial": "*fp32", "num_parts": "i32"}
    assert_fits(96, depthwise._reduce_kernel, architecture, signature, constants)
