"""Models: MP-MAE and MultiMAE, the dense ConvNeXt V2 and U-Net for downstream use, presets, checkpoints from elsewhere."""

from mpmae.lazy import lazy_exports

__all__ = [
    "MPMAE",
    "ConvNeXtV2",
    "MPMAEOutput",
    "MultiMAE",
    "MultiMAEOutput",
    "UNet",
    "create_encoder",
    "create_model",
    "create_unet",
    "list_encoders",
    "list_models",
    "load_reference",
]
_HOME_OF = {
    "MPMAE": "mpmae.models.mpmae",
    "ConvNeXtV2": "mpmae.models.dense",
    "MPMAEOutput": "mpmae.models.mpmae",
    "MultiMAE": "mpmae.models.multimae.model",
    "MultiMAEOutput": "mpmae.models.multimae.model",
    "UNet": "mpmae.models.unet",
    "create_encoder": "mpmae.models.encoders",
    "create_model": "mpmae.models.presets",
    "create_unet": "mpmae.models.encoders",
    "list_encoders": "mpmae.models.encoders",
    "list_models": "mpmae.models.presets",
    "load_reference": "mpmae.models.interop",
}
# a model of random weights needs torch and numpy; checkpoints from elsewhere need safetensors
__getattr__, __dir__ = lazy_exports(__name__, _HOME_OF)
