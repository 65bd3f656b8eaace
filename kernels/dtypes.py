"""Which dtypes the ops compute in."""

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # what the fast backends take


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics and sums over `dtype` are taken: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which an op given `dtype` computes: autocast's where that is on for the device, but float64 stays."""
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device.type)
    return dtype
