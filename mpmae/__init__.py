"""mpmae: pretrain masked autoencoders on Earth-observation data at scale."""

import importlib

__version__ = "0.1.0"

# Looked up on first use, so that tools which never touch a model (shard_tools) do not import torch.
_LAZY = {
    "create_encoder": "mpmae.models",
    "create_model": "mpmae.models",
    "create_unet": "mpmae.models",
    "list_encoders": "mpmae.models",
    "list_models": "mpmae.models",
    "load_reference": "mpmae.models",
}
__all__ = [
    "__version__",
    "create_encoder",
    "create_model",
    "create_unet",
    "list_encoders",
    "list_models",
    "load_reference",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'mpmae' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
