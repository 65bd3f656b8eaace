"""Our parameters under the names and shapes of the published dense code (MMEarth-train, `models/convnextv2*.py`)."""

import re

from torch import nn

from mpmae.models import MPMAE, UNet
from mpmae.models.encoder import DenseEncoder
from mpmae.models.interop import Twin, reference_parameters

_STEMS = {
    "mmearth": {"conv": "initial_conv.0", "conv_norm": "initial_conv.1", "pool": "stem.0", "norm": "stem.1"},
    "convnext": {"conv": "stem_orig.0", "norm": "stem_orig.1"},
}
_RULES = (
    (r"^downsamples\.(\d+)\.norm\.", r"downsample_layers.\1.0."),
    (r"^downsamples\.(\d+)\.conv\.", r"downsample_layers.\1.1."),
    (r"^upsamples\.([0-3])\.", r"upsample_layers.\1."),
    (r"^upsamples\.4\.conv\.", "initial_conv_upsample.0."),
    (r"^upsamples\.4\.norm\.", "initial_conv_upsample.1."),
)


def dense_parameters(model: nn.Module, stem: str) -> dict[str, Twin]:
    """Our name -> published twin for every parameter of a ConvNeXtV2, UNet or dense encoder."""
    twins = {}
    for name, value in model.named_parameters():
        published = name.removeprefix("encoder.") if isinstance(model, UNet) else name
        if published.startswith("stem."):
            _, part, leaf = published.split(".")
            published = f"{_STEMS[stem][part]}.{leaf}"
        for pattern, replacement in _RULES:
            published = re.sub(pattern, replacement, published)
        shape = tuple(value.shape)
        twins[name] = Twin(published, (1, 1, *shape) if ".grn." in name else shape, shape, kernel=False)
    return twins


def published_parameters(model: MPMAE, stem: str) -> dict[str, Twin]:
    """Our name -> published twin for every parameter of an MP-MAE with either encoder."""
    twins = reference_parameters(model)
    if isinstance(model.encoder, DenseEncoder):
        for name, twin in dense_parameters(model.encoder, stem).items():
            twins[f"encoder.{name}"] = Twin(f"encoder.{twin.name}", twin.shape, twin.own_shape, kernel=False)
    return twins
