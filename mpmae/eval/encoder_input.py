"""What an encoder takes as input.

Shapes: C channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpmae.errors import CheckpointError
from mpmae.modalities import PRODUCT_LEVELS, spec_of

SENTINEL2 = "sentinel2"
Moments = Mapping[str, tuple[float, ...]]  # "mean" and "std", one number per band


@dataclass(frozen=True)
class EncoderInput:
    """Bands, statistics and sizes that an encoder was trained with.

    bands: in the order of its channels, by their modalities' names. patch_size: sides of an image are multiples of it, in
    pixels. statistics: product level ("l1c", "l2a") -> mean and std of its Sentinel-2 bands in reflectance x 10,000, as
    pretraining normalised them; empty where the checkpoint does not say. modalities: of each channel; () where all are of
    Sentinel-2. other_statistics: the same by modality, for bands of others. tells_no_data: whether it knows no data as such:
    a prepared image then holds NaN there, else 0.
    """

    bands: tuple[str, ...]
    patch_size: int
    statistics: Mapping[str, Moments] = field(default_factory=dict)
    modalities: tuple[str, ...] = ()
    other_statistics: Mapping[str, Moments] = field(default_factory=dict)
    tells_no_data: bool = False

    @property
    def channels(self) -> tuple[tuple[str, str], ...]:
        """(modality, band) of each channel."""
        return tuple(zip(self.modalities or (SENTINEL2,) * len(self.bands), self.bands, strict=True))

    @property
    def class_channels(self) -> tuple[int, ...]:
        """Positions of the channels that hold class ids."""
        return tuple(i for i, (name, _) in enumerate(self.channels) if spec_of(name).kind == "categorical")

    def positions_of(self, modality: str) -> list[int]:
        """Of a modality's channels."""
        return [i for i, (name, _) in enumerate(self.channels) if name == modality]


def statistics_by_level(recorded: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, ...]]]:
    """`EncoderInput.statistics` from those of a shard set or a checkpoint, where "sentinel2_" stands before the level."""
    return {
        level: {key: tuple(recorded[f"sentinel2_{level}"][key]) for key in ("mean", "std")}
        for level in PRODUCT_LEVELS
        if f"sentinel2_{level}" in recorded
    }


def input_of_domains(
    channels: Sequence[tuple[str, str]], patch_size: int, recorded: Mapping[str, Any], where: str
) -> EncoderInput:
    """The input of an encoder of these (modality, band) channels, which tells no data apart.

    recorded: key of `band_stats` -> {"bands", "mean", "std"}, as `mpmae.models.MultiMAE.input_record` gives them.
    Raises CheckpointError, naming `where`, for statistics that lack a band.
    """
    levels, others = {}, {}
    for modality in dict.fromkeys(name for name, _ in channels):
        bands = [band for name, band in channels if name == modality]
        if modality == SENTINEL2:
            keys = {level: f"{SENTINEL2}_{level}" for level in PRODUCT_LEVELS}
            levels = {level: _rows(recorded[key], bands, where, key) for level, key in keys.items() if key in recorded}
        elif modality in recorded:
            others[modality] = _rows(recorded[modality], bands, where, modality)
    names, bands = zip(*channels, strict=True)
    return EncoderInput(tuple(bands), patch_size, levels, tuple(names), others, tells_no_data=True)


def _rows(entry: Mapping[str, Any], bands: Sequence[str], where: str, key: str) -> dict[str, tuple[float, ...]]:
    known = list(entry.get("bands", ()))
    lacking = [band for band in dict.fromkeys(bands) if band not in known]
    if lacking:
        raise CheckpointError(
            f"{where}: statistics of {key} lack {', '.join(lacking)}; they have {', '.join(known) or 'no named bands'}"
        )
    return {name: tuple(float(entry[name][known.index(band)]) for band in bands) for name in ("mean", "std")}
