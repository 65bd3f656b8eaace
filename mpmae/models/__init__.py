"""Models: MP-MAE on the sparse, tile-packed encoder, its presets and its checkpoints from elsewhere."""

from mpmae.models.interop import load_reference
from mpmae.models.mpmae import MPMAE, MPMAEOutput
from mpmae.models.presets import create_model, list_models

__all__ = ["MPMAE", "MPMAEOutput", "create_model", "list_models", "load_reference"]
