"""Writing tensors so that they are on the disk, and reading them back; the random state of a process."""

import os
from pathlib import Path
from typing import Any

import torch

from mpmae.errors import CheckpointError


def save_tensors(state: Any, path: str | Path) -> None:
    """torch.save to `path`, then fsync. A full disk raises OSError."""
    with Path(path).open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # torch's archive writer reports a failed write as a RuntimeError of its own, raised while closing
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())


def load_tensors(path: str | Path, map_location: Any = "cpu") -> Any:
    """What `save_tensors` wrote: tensors in plain containers (no code is run). Raises CheckpointError."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is absent: the checkpoint is of another engine, or incomplete") from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; continue from an older checkpoint") from error


def copied_to_host(state: Any) -> Any:
    """A copy, on the CPU, of tensors in plain containers: what happens to the originals does not change it.

    From a GPU all copies are under way at once, into page-locked memory, and are waited for in the end.
    """
    copied = _copy(state)
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return copied


def _copy(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        tensor = state.detach()
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return host.copy_(tensor, non_blocking=True)
    if isinstance(state, dict):
        return type(state)((key, _copy(value)) for key, value in state.items())
    if isinstance(state, (list, tuple)):
        return type(state)(_copy(value) for value in state)
    return state


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of torch's generators that this process draws from.

    Python's and NumPy's are left out: data order, crops and masks come from counters (`mpmae.counter_rng`).
    """
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
