"""The one place where an implementation of an op is picked: CUDA C++, Triton or the PyTorch reference."""

import os
from collections.abc import Mapping

import torch

BACKENDS = ("cuda", "triton", "reference")
VARIABLE = "MPMAE_KERNELS"


class BackendError(RuntimeError):
    """A backend was asked for that can't run here, or that does not exist."""


def choose(
    op: str,
    device: torch.device,
    dtype: torch.dtype | None,
    refusals: Mapping[str, str | None],
    *,
    asked: str | None = None,
) -> str:
    """The backend that runs an op now: the one `MPMAE_KERNELS` asks for, else the first that takes CUDA tensors.

    refusals: the fast backends that the op has, and why each does not take these inputs (None: it does).
    Raises BackendError for one that was asked for, that the op has and that can't run.
    """
    asked = asked or os.environ.get(VARIABLE) or None
    if asked is not None and asked not in BACKENDS:
        raise BackendError(f"{op}: backend {asked!r}, expected one of {', '.join(BACKENDS)}")
    if asked in refusals:
        if refusals[asked] is not None:
            raise BackendError(f"{op}: backend {asked} was asked for and can't run: {refusals[asked]}")
        return asked
    if asked == "reference" or device.type != "cuda":
        return "reference"
    return next((name for name in BACKENDS if name in refusals and refusals[name] is None), "reference")
