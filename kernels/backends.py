"""The one place where an implementation of an op is picked: CUDA C++, Triton or the PyTorch reference.

Left to itself the choice is the first of cuda, triton, reference that can: CUDA tensors go down that list, what is skipped
is logged once per op and cause, and CPU tensors get the reference. `MPMAE_KERNELS` asks for one of the three: it is taken by
every op that has it, and an op that has it but can't run it raises an error that names the cause.
"""

import importlib.util
import logging
import os
from collections.abc import Mapping
from functools import cache

import torch

from mpmae.kernels import cuda_driver
from mpmae.kernels.dtypes import FLOATS

BACKENDS = ("cuda", "triton", "reference")
VARIABLE = "MPMAE_KERNELS"
MINIMUM_CAPABILITY = (8, 0)

log = logging.getLogger(__name__)
_logged: set[tuple[str, str]] = set()


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
    """The backend that runs an op now: "cuda", "triton" or "reference".

    dtype: of the activations, one of `dtypes.FLOATS` for the fast backends; None for an op to which it does not matter.
    refusals: the fast backends that the op has, and why each does not take these inputs (None: it does). asked: a backend
    asked for by the caller, before `MPMAE_KERNELS`.
    Raises BackendError for an unknown backend, and for one that was asked for, that the op has and that can't run.
    """
    asked = asked or requested()
    if asked is not None and asked not in BACKENDS:
        raise BackendError(f"{op}: backend {asked!r}, expected one of {', '.join(BACKENDS)}")
    if asked == "reference":
        return asked
    if asked in refusals:
        cause = refusals[asked] or unavailable(asked, device, dtype)
        if cause is not None:
            raise BackendError(
                f"{op}: backend {asked} was asked for and can't run: {cause}. "
                f"Or leave {VARIABLE} unset (or set it to another of {', '.join(BACKENDS)})"
            )
        return asked
    if device.type != "cuda":
        return "reference"
    for backend in BACKENDS:
        if backend in refusals:
            cause = refusals[backend] or unavailable(backend, device, dtype)
            if cause is None:
                return backend
            _log_once(op, f"{backend} can't run: {cause}")
    return "reference"


def requested() -> str | None:
    """What `MPMAE_KERNELS` asks for; None when it asks for nothing. Raises BackendError for a value that is no backend."""
    value = os.environ.get(VARIABLE)
    if not value:
        return None
    if value not in BACKENDS:
        raise BackendError(f"environment variable {VARIABLE}={value!r}, expected one of {', '.join(BACKENDS)}; or unset it")
    return value


def unavailable(backend: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why a fast backend can't run on tensors of this device and dtype, whatever the op; None when it can."""
    if dtype is not None and dtype not in FLOATS:
        return f"dtype {dtype}, expected one of {', '.join(map(str, FLOATS))}"
    return _unavailable_on(backend, device.type, device.index)


def _unavailable_on(backend: str, device_type: str, device_index: int | None) -> str | None:
    causes = [cuda_driver.missing() if backend == "cuda" else _triton_missing()]
    if device_type == "cuda":
        causes.append(_too_old(torch.cuda.current_device() if device_index is None else device_index))
    elif not (backend == "triton" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        causes.append(f"the tensors are on the {device_type} device, expected a CUDA GPU; move model and batch to one")
    return "; ".join(filter(None, causes)) or None


@cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not there; install it: pip install 'mpmae[triton]' (a CUDA build of PyTorch brings it)"
    return None


@cache
def _too_old(device_index: int) -> str | None:
    if torch.version.hip is not None:
        return "PyTorch is built for ROCm, expected a CUDA build"
    capability = torch.cuda.get_device_capability(device_index)
    if capability < MINIMUM_CAPABILITY:
        name = torch.cuda.get_device_name(device_index)
        least = ".".join(map(str, MINIMUM_CAPABILITY))
        return f"{name} has compute capability {capability[0]}.{capability[1]}, expected {least} or newer (A100, H100, ...)"
    return None


def _log_once(op: str, cause: str) -> None:
    if (op, cause) not in _logged:
        _logged.add((op, cause))
        log.warning("%s: %s; the next backend runs instead", op, cause)
