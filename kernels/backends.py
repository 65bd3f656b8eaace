"""Which implementation of an operator runs."""

import importlib.util

import torch


def choose(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend of `op` for tensors of `dtype` on `device`: Triton on CUDA, else the PyTorch reference."""
    has_triton = importlib.util.find_spec("triton") is not None
    return "triton" if device.type == "cuda" and dtype != torch.float64 and has_triton else "reference"
