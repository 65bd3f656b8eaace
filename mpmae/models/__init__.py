"""Models: MP-MAE, the dense ConvNeXt V2 and U-Net for downstream use, their presets and checkpoints from elsewhere."""

from mpmae.models.dense import ConvNeXtV2
from mpmae.models.encoders import create_encoder, create_unet, list_encoders
from mpmae.models.interop import load_reference
from mpmae.models.mpmae import MPMAE, MPMAEOutput
from mpmae.models.presets import create_model, list_models
from mpmae.models.unet import UNet

__all__ = [
    "MPMAE",
    "ConvNeXtV2",
    "MPMAEOutput",
    "UNet",
    "create_encoder",
    "create_model",
    "create_unet",
    "list_encoders",
    "list_models",
    "load_reference",
]
