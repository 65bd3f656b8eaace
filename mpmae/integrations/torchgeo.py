"""The published MMEarth checkpoints in the conventions of torchgeo: an enum of weights and a function that builds the model.

    from mpmae.integrations.torchgeo import ConvNeXtV2_Atto_Weights, convnextv2_atto

    model = convnextv2_atto(ConvNeXtV2_Atto_Weights.SENTINEL2_ALL_MOD_MMEARTH64)

The weights are downloaded when a model is built with them, into torch.hub's folder, and unpickled without running code.
Source of names and addresses: MMEarth-train, `hubconf.py`.
"""

from typing import Any

import torch
from torch import nn
from torchvision.models._api import Weights, WeightsEnum

from mpmae.errors import CheckpointError
from mpmae.modalities import spec_of
from mpmae.models import ConvNeXtV2, create_encoder
from mpmae.models.interop.pickles import HARMLESS

_PUBLISHED = "https://sid.erda.dk/share_redirect/g23YOnaaTp"


def _published(folder: str, dataset: str, modalities: str, loss: str, img_size: int, patch_size: int) -> Weights:
    bands = spec_of("sentinel2").model_bands
    return Weights(
        url=f"{_PUBLISHED}/{folder}/checkpoint-199.pth",
        # the statistics of the full set are in its NAME_band_stats.json, by product level: no one normalisation is right
        transforms=nn.Identity(),
        meta={
            "dataset": dataset,
            "model": "convnextv2_atto",
            "publication": "https://arxiv.org/abs/2405.02771",
            "repo": "https://github.com/vishalned/MMEarth-train",
            "checkpoint": folder,
            "bands": bands,
            "in_chans": len(bands),
            "img_size": img_size,
            "patch_size": patch_size,
            "stem": "mmearth",
            "modalities_out": modalities,
            "loss_weighting": loss,
            "licence": None,  # none is stated beside the checkpoints
            "citation": "Nedungadi et al., MMEarth: Exploring Multi-Modal Pretext Tasks for Geospatial Representation "
            "Learning, ECCV 2024",
        },
    )


class ConvNeXtV2_Atto_Weights(WeightsEnum):
    """Published weights of ConvNeXt V2 atto with MMEarth's stem, pretrained on Sentinel-2 by MP-MAE."""

    SENTINEL2_ALL_MOD_MMEARTH64 = _published(
        "pt-all_mod_atto_1M_64_uncertainty_56-8", "MMEarth64", "all", "uncertainty", 56, 8
    )
    SENTINEL2_ALL_MOD_MMEARTH64_UNWEIGHTED = _published(
        "pt-all_mod_atto_1M_64_unweighted_56-8", "MMEarth64", "all", "unweighted", 56, 8
    )
    SENTINEL2_ALL_MOD_MMEARTH = _published(
        "pt-all_mod_atto_1M_128_uncertainty_112-16", "MMEarth", "all", "uncertainty", 112, 16
    )
    SENTINEL2_S2_MMEARTH64 = _published("pt-S2_atto_1M_64_uncertainty_56-8", "MMEarth64", "sentinel2", "uncertainty", 56, 8)


def convnextv2_atto(weights: ConvNeXtV2_Atto_Weights | None = None, *args: Any, **kwargs: Any) -> ConvNeXtV2:
    """ConvNeXt V2 atto, dense; args and kwargs go to `mpmae.create_encoder`.

    weights: they decide in_chans, patch_size and stem. Final norm and classifier start fresh.
    Raises ConfigError, or CheckpointError if the download holds something else.
    """
    weights = ConvNeXtV2_Atto_Weights.verify(weights)
    if weights is None:
        return create_encoder("convnextv2_atto", *args, **kwargs)
    # All files are named alike, so the name in the cache is the folder's. They hold their command line too.
    with torch.serialization.safe_globals(HARMLESS):
        content = weights.get_state_dict(
            progress=True, map_location="cpu", weights_only=True, file_name=f"{weights.meta['checkpoint']}.pth"
        )
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise CheckpointError(
            f"{weights.url}: no state dict under 'model'; delete it from {torch.hub.get_dir()} and try again"
        )
    return create_encoder("convnextv2_atto", *args, **kwargs, checkpoint=content["model"])
