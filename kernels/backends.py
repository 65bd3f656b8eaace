"""The one place where an implementation of an op is picked: Triton or the PyTorch reference."""

import importlib.util
import os
from collections.abc import Mapping

import torch


def choose(op: str, device: torch.device, dtype: torch.dtype | None, refusals: Mapping[str, str | None]) -> str:
    """The backend that runs an op now: "triton" or "reference".

    refusals: the fast backends that the op has, and why each does not take these inputs (None: it does).
    """
    asked = os.environ.get("MPMAE_KERNELS")
    if asked in refusals:
        return asked
    can = device.type == "cuda" and dtype != torch.float64 and importlib.util.find_spec("triton") is not None
    return "triton" if can and refusals.get("triton", op) is None and asked is None else "reference"
