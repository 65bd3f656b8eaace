"""What a GPU can do at most: from its data sheet, or measured where the table does not know it.

Rates are dense (no structured sparsity), at boost clock. bf16: matrix units with float32 sums; fp32: IEEE products, no TF32,
as this project computes them.
"""

import re
import time
from typing import NamedTuple

import torch

_MEASURED_SIDE = 8192
_WARMUP_RUNS, _MEASURED_RUNS = 3, 10


class Peak(NamedTuple):
    """flops_per_s: of one device. source: where that is from."""

    flops_per_s: float
    source: str


class _Sheet(NamedTuple):
    """words: all of them are in the device's name. bf16, fp32: TFLOP/s."""

    words: tuple[str, ...]
    bf16: float
    fp32: float
    source: str


# the first that fits, so the narrower names come first
_SHEETS = (
    _Sheet(("B200",), 2250, 75, "NVIDIA HGX B200, technical overview (an eighth of the board)"),
    _Sheet(("H200", "NVL"), 835, 60, "NVIDIA H200 Tensor Core GPU, data sheet (NVL)"),
    _Sheet(("H200",), 989, 67, "NVIDIA H200 Tensor Core GPU, data sheet (SXM)"),
    _Sheet(("H100", "NVL"), 835, 60, "NVIDIA H100 Tensor Core GPU, data sheet (NVL)"),
    _Sheet(("H100", "PCIe"), 756, 51, "NVIDIA H100 Tensor Core GPU, data sheet (PCIe)"),
    _Sheet(("H100",), 989, 67, "NVIDIA H100 Tensor Core GPU, data sheet (SXM)"),
    _Sheet(("A100",), 312, 19.5, "NVIDIA A100 Tensor Core GPU, data sheet"),
    _Sheet(("A30",), 165, 10.3, "NVIDIA A30 Tensor Core GPU, data sheet"),
    _Sheet(("A10",), 125, 31.2, "NVIDIA A10 Tensor Core GPU, data sheet"),
    _Sheet(("A40",), 149.7, 37.4, "NVIDIA A40, data sheet"),
    _Sheet(("L40S",), 362, 91.6, "NVIDIA L40S, data sheet"),
    _Sheet(("L4",), 121, 30.3, "NVIDIA L4 Tensor Core GPU, data sheet"),
    _Sheet(("RTX", "4090"), 165.2, 82.6, "NVIDIA Ada GPU architecture, white paper, appendix A"),
    _Sheet(("RTX", "3090"), 71, 35.6, "NVIDIA Ampere GA102 GPU architecture, white paper, appendix A"),
)
# a part of a GPU, a board for laptops, another chip of the same number
_OTHER_WORDS = {"MIG", "Laptop", "Ti", "D", "Max-Q"}


def sheet_peak(device_name: str, precision: str) -> Peak | None:
    """The peak of a device by the name that the driver gives it; None for one that the table does not know."""
    words = set(re.split(r"[ \-]", device_name))
    if words & _OTHER_WORDS:
        return None
    for sheet in _SHEETS:
        if words.issuperset(sheet.words):
            return Peak(1e12 * (sheet.bf16 if precision == "bf16" else sheet.fp32), sheet.source)
    return None


def device_peak(device: torch.device, precision: str) -> Peak | None:
    """The peak of a GPU: of its data sheet, else measured, which takes a second or so; None for a CPU."""
    if device.type != "cuda":
        return None
    return sheet_peak(torch.cuda.get_device_name(device), precision) or measured_peak(device, precision)


def measured_peak(device: torch.device, precision: str, side: int = _MEASURED_SIDE) -> Peak:
    """The rate of the fastest of a few large products."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    fastest_s = float("inf")
    for run in range(_WARMUP_RUNS + _MEASURED_RUNS):
        _finish(device)
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        _finish(device)
        if run >= _WARMUP_RUNS:
            fastest_s = min(fastest_s, time.perf_counter() - started)
    return Peak(2 * side**3 / fastest_s, f"measured, products of {side} x {side}")


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
