"""TerraTorch imports this folder (`custom_modules_path`), which registers the backbones `mpmae_convnextv2_*`."""

import mpmae.integrations.terratorch  # noqa: F401
