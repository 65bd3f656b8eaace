"""The files of each export of a MultiMAE, written into an empty folder.

| target      | files                                                                            | loads with             |
|-------------|----------------------------------------------------------------------------------|------------------------|
| safetensors | model.safetensors (our names, the whole model), config.json                      | mpmae                  |
| multimae    | checkpoint.pth (`{"model": ...}`, the published names and positions), config.json | the published code    |
| timm        | model.safetensors (timm's names, one domain), config.json (ours below `mpmae`)   | timm, "local-dir:DIR"  |
| hf          | those of timm; README.md                                                         | timm                   |
"""

import json
from pathlib import Path
from typing import Any

import torch

from mpmae.checkpoint_format import MMEARTH_NAME
from mpmae.errors import CheckpointError
from mpmae.export.card_multimae import multimae_card
from mpmae.export.config import CONFIG_NAME, WEIGHTS_NAME, MultiMAEExportConfig
from mpmae.export.layouts import State, Writer, image_side, pretrained_config, save, write_safetensors
from mpmae.models.interop.multimae import published_state
from mpmae.models.interop.vit import to_vit

# timm's own name for the size, whose arguments are all given beside it
_TIMM_NAMES = {f"multimae_{size}": f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")}
_TIMM_NAME = "vit_base_patch16_224"


def write_multimae(state: State, config: MultiMAEExportConfig, folder: Path) -> None:
    """A checkpoint of the published pretraining code. Raises CheckpointError for weights without decoders."""
    if not config.decoders:
        raise CheckpointError("--to multimae needs the whole pretraining model; these weights have no decoders")
    balancer = {"loss_balancer": {"log_vars": state["log_vars"]}} if "log_vars" in state else {}
    torch.save({"model": published_state(state), **balancer}, folder / MMEARTH_NAME)
    (folder / CONFIG_NAME).write_text(config.dump())


def write_timm(state: State, config: MultiMAEExportConfig, folder: Path) -> None:
    """The encoder for one domain as timm's VisionTransformer without a final norm. Raises CheckpointError: heads unknown."""
    if config.num_heads is None:
        raise CheckpointError("timm needs the number of heads, which nothing beside these weights says")
    (domain,) = config.domains_in
    save(to_vit(state, domain, image_side(config) // config.patch_size), folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(_timm_config(config), indent=1) + "\n")


def write_hf(state: State, config: MultiMAEExportConfig, folder: Path) -> None:
    """A folder for the Hugging Face Hub with its model card."""
    write_timm(state, config, folder)
    (folder / "README.md").write_text(multimae_card(config))


WRITERS: dict[str, Writer] = {
    "safetensors": write_safetensors,
    "multimae": write_multimae,
    "timm": write_timm,
    "hf": write_hf,
}


def _timm_config(config: MultiMAEExportConfig) -> dict[str, Any]:
    (domain,), side, size = config.domains_in.values(), image_side(config), config.architecture
    layers = {"fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": "head"}
    return {
        "architecture": _TIMM_NAMES.get(size.name, _TIMM_NAME),
        "num_classes": 0,
        "num_features": size.dim,
        "pretrained_cfg": pretrained_config(config, len(domain.bands), 0, **layers),
        "model_args": {
            "img_size": side,
            "patch_size": config.patch_size,
            "in_chans": len(domain.bands),
            "embed_dim": size.dim,
            "depth": size.depth,
            "num_heads": config.num_heads,
            "final_norm": False,
        },
        "mpmae": config.model_dump(mode="json"),
    }
