"""What an encoder takes as input."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpmae.modalities import PRODUCT_LEVELS


@dataclass(frozen=True)
class EncoderInput:
    """Bands, statistics and sizes that an encoder was trained with.

    bands: Sentinel-2 bands in the order of its channels. patch_size: sides of an image are multiples of it, in pixels.
    statistics: product level ("l1c", "l2a") -> {"mean": per band, "std": per band} in reflectance x 10,000, as pretraining
    normalised them; empty where the checkpoint does not say.
    """

    bands: tuple[str, ...]
    patch_size: int
    statistics: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)


def statistics_by_level(recorded: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, ...]]]:
    """`EncoderInput.statistics` from those of a shard set or a checkpoint, where "sentinel2_" stands before the level."""
    return {
        level: {key: tuple(recorded[f"sentinel2_{level}"][key]) for key in ("mean", "std")}
        for level in PRODUCT_LEVELS
        if f"sentinel2_{level}" in recorded
    }
