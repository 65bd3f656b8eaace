"""The device that an evaluation computes on, by name."""

import torch

from mpmae.errors import ConfigError


def find_device(name: str, key: str = "output.device") -> torch.device:
    """The device of "auto", "cpu", "cuda" or "cuda:N". Raises ConfigError, naming `key`, for one that is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ConfigError(f"{key} = {name}: {error}; expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{key} = {name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{key} = {name}: this process sees {torch.cuda.device_count()} GPUs; use auto or cpu")
    return device
