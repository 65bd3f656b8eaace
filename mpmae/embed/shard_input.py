"""From batches of a shard set to the images of an encoder: its channels, normalised as in pretraining.

Shapes: N tiles, C channels of the encoder, S image side in pixels.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from mpmae.errors import ConfigError, MpmaeError, ShardError
from mpmae.eval.config import ImageSection
from mpmae.eval.encoder_input import SENTINEL2, EncoderInput
from mpmae.loader import Batch
from mpmae.modalities import PRODUCT_LEVELS, band_indices, spec_of
from mpmae.shard_format import BandStats, Manifest


class ShardInput:
    """Where the channels of an encoder lie in the tensors of a batch.

    modalities: those it reads. Raises ShardError or ConfigError with every modality and band that the set lacks.
    """

    def __init__(self, manifest: Manifest, encoder_input: EncoderInput):
        self._stored = {entry.name: entry.bands for entry in manifest.pixels}
        self._input = encoder_input
        self.modalities = tuple(dict.fromkeys(name for name, _ in encoder_input.channels))
        absent = [name for name in self.modalities if name not in self._stored]
        if absent:
            raise ShardError(
                f"the shard set has no {', '.join(absent)}, which the encoder reads; it has {', '.join(manifest.modalities)}"
            )
        self._parts: list[tuple[str, list[int]]] = []
        problems: list[str] = []
        for name, channels in groupby(encoder_input.channels, key=lambda channel: channel[0]):
            try:
                self._parts.append((name, self._rows(name, [band for _, band in channels])))
            except MpmaeError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)

    def images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """float32 [N, C, S, S], values or class ids, and bool of that shape, where there is data.

        No data is NaN for an encoder that tells it apart, else 0.
        """
        values = torch.cat([batch.values[name][:, rows].float() for name, rows in self._parts], 1)
        valid = torch.cat([batch.valid[name][:, rows] for name, rows in self._parts], 1)
        return (torch.where(valid, values, torch.nan) if self._input.tells_no_data else values), valid

    def with_statistics(self, manifest: Manifest, image: ImageSection) -> tuple[Manifest, dict[str, str]]:
        """The manifest with the statistics to normalise by, and whose they are.

        That is said by product level of Sentinel-2, and by name of other modalities. Raises ConfigError.
        """
        table, origins, problems = dict(manifest.band_stats), {}, []
        for modality in self.modalities:
            found = {}
            for said, key, ours in self._wanted(modality):
                if ours is not None and image.normalise != "dataset":
                    table[key] = self._replaced(table.get(key), modality, ours)
                    found[said] = "the checkpoint's"
                elif image.normalise == "pretraining":
                    table.pop(key, None)
                elif key in table:
                    found[said] = "the shard set's"
            if not found and image.normalise == "pretraining" and spec_of(modality).kind == "continuous":
                problems.append(
                    f"--normalise pretraining: the checkpoint has no statistics of {modality}; give --normalise dataset"
                )
            origins |= found
        if problems:
            raise ConfigError(problems)
        return manifest.model_copy(update={"band_stats": table}), origins

    def told_bands(self) -> list[str]:
        """The channels for people: Sentinel-2's bands by name alone, class maps by that of their modality."""
        return [
            band if name == SENTINEL2 else name if spec_of(name).kind == "categorical" else f"{name} {band}"
            for name, band in self._input.channels
        ]

    def _rows(self, modality: str, bands: Sequence[str]) -> list[int]:
        """Positions of channels of a modality in a batch's tensor; a class map has one channel."""
        if spec_of(modality).kind == "categorical":
            return [0]
        return band_indices(modality, tuple(bands), self._stored[modality])

    def _wanted(self, modality: str) -> list[tuple[str, str, Mapping[str, Sequence[float]] | None]]:
        """What origins call it, the key of `band_stats` and the checkpoint's statistics, for each of a modality."""
        if spec_of(modality).kind == "categorical":
            return []
        if modality != SENTINEL2:
            return [(modality, modality, self._input.other_statistics.get(modality))]
        return [(level, f"{SENTINEL2}_{level}", self._input.statistics.get(level)) for level in PRODUCT_LEVELS]

    def _replaced(self, stats: BandStats | None, modality: str, ours: Mapping[str, Sequence[float]]) -> BandStats:
        """Statistics of all stored bands, those that the encoder reads replaced by the checkpoint's."""
        bands = [band for name, band in self._input.channels if name == modality]
        rows, num = self._rows(modality, bands), len(self._stored[modality])
        values = {
            quantity: list(getattr(stats, quantity)) if stats else [start] * num
            for quantity, start in (("mean", 0.0), ("std", 1.0), ("min", 0.0), ("max", 0.0))
        }
        for quantity in ("mean", "std"):
            for row, value in zip(rows, ours[quantity], strict=True):
                values[quantity][row] = value
        return BandStats(**{quantity: tuple(numbers) for quantity, numbers in values.items()})
