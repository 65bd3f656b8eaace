"""What every weight of a checkpoint must be, whatever model it is of."""

from typing import NamedTuple

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Canonical(NamedTuple):
    """A state dict under our names. unknown, reshaped: see `mpmae.models.interop.Weights`."""

    state: dict[str, Tensor]
    unknown: tuple[str, ...]
    reshaped: tuple[str, ...]


def value_problem(name: str, value: Tensor) -> str | None:
    """Why a tensor cannot be the weight `name`; None if it can."""
    if value.dtype not in _FLOATS:
        return f"{name} is {value.dtype}, expected floating-point weights; was it quantised?"
    if value.is_meta or value.layout != torch.strided:
        kind = "on the meta device" if value.is_meta else f"stored as {value.layout}"
        return f"{name} is {kind}; expected a dense tensor with values"
    if value.ndim == 0:
        return f"{name} is a single number; no weight has shape []"
    if not bool(value.isfinite().all()):
        return f"{name} holds NaN or inf; the run that wrote it had diverged"
    return None
