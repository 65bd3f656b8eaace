"""mpmae: pretrain masked autoencoders on Earth-observation data at scale."""

from mpmae.lazy import lazy_exports

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "create_encoder",
    "create_model",
    "create_unet",
    "list_encoders",
    "list_models",
    "load_reference",
]
# tools that never touch a model (shard_tools) do not import torch
__getattr__, __dir__ = lazy_exports(__name__, {name: "mpmae.models" for name in __all__ if name != "__version__"})
