"""The encoders as models of torchgeo-bench.

    model:                # configuration of a model, torchgeo-bench 0.4
      _target_: mpmae.integrations.torchgeo_bench.EncoderBench
      name: mpmae
      checkpoint: exported/

Shapes: N images, B_in channels as the benchmark gives them, B input bands of the encoder, H x W pixels, D features.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchgeo_bench.datasets.base import BandSpec
from torchgeo_bench.models._input_units import InputUnit
from torchgeo_bench.models._normalization import NormalizationStrategy, build_normalizer
from torchgeo_bench.models.interface import BenchModel

from mpmae.errors import ConfigError
from mpmae.eval.bands import SENTINEL2_UM, match_channels, sentinel2_name
from mpmae.eval.config import EncoderSection
from mpmae.eval.dataset import StoredBand, Task
from mpmae.eval.encoders import ImageEncoder, open_encoder
from mpmae.modalities import PRODUCT_LEVELS
from mpmae.models import ConvNeXtV2

_LOG = logging.getLogger(__name__)
_SENTINEL2 = "s2"  # the benchmark's name of the sensor
# what the benchmark calls bands where it uses words
_WORDS = {
    "coastal_aerosol": "B1",
    "coastal": "B1",
    "blue": "B2",
    "green": "B3",
    "red": "B4",
    "red_edge_1": "B5",
    "red_edge_2": "B6",
    "red_edge_3": "B7",
    "nir": "B8",
    "red_edge_4": "B8A",
    "water_vapour": "B9",
    "swir_cirrus": "B10",
    "swir_1": "B11",
    "swir_2": "B12",
}


class EncoderBench(BenchModel):
    """An encoder of a checkpoint, or with random weights, as torchgeo-bench probes it: frozen, raw images in.

    bands: the benchmark's, in the order of the channels; the encoder's are chosen from them by name, else by the nearest
    wavelength, and the choice is logged. normalization: a strategy of torchgeo-bench; with "model_native" the benchmark
    converts to reflectance x 10,000 and the checkpoint's statistics of `product_level` ("l1c" or "l2a", what the images are)
    apply; the others use the benchmark's own statistics. checkpoint: anything that mpmae reads; None is random weights
    drawn from `seed`, the baseline. encoder, patch_size, bands_in, domains, pooling: as in
    `mpmae.eval.config.EncoderSection`; a MultiMAE reads domains of Sentinel-2, without `domains` all whose bands are there.
    Options of the benchmark that mean nothing here (name, eval) are left alone.
    Raises ConfigError, CheckpointError or DatasetError.
    """

    def __init__(
        self,
        bands: list[BandSpec],
        *,
        normalization: str = "model_native",
        checkpoint: str | Path | None = None,
        product_level: str = "l2a",
        encoder: str | None = None,
        patch_size: int | None = None,
        bands_in: Sequence[str] | None = None,
        domains: Sequence[str] | None = None,
        pooling: str | None = None,
        seed: int = 0,
        **_: object,
    ):
        super().__init__(bands=bands, normalization=NormalizationStrategy.IDENTITY)
        given = {"name": encoder, "patch_size": patch_size, "bands_in": bands_in, "domains": domains, "pooling": pooling}
        section = EncoderSection(checkpoint=checkpoint, **{key: value for key, value in given.items() if value is not None})
        task = Task("torchgeo-bench", "segmentation", (), tuple(_stored(band) for band in bands), "miou")
        opened = open_encoder(section, seed, task=task).requires_grad_(False)
        # the benchmark looks for `backbone.*`, whose stages are named as elsewhere; a method is no module of its own
        self.backbone, self._num_features, self._encode = opened.backbone, opened.num_features, opened.forward
        self.input, self.label, self._logged = opened.input, opened.label, False
        self._no_data = math.nan if opened.input.tells_no_data else 0.0
        self._positions = match_channels(task, opened.input.channels).positions
        self.normalization = NormalizationStrategy(normalization)
        statistics = {}
        if self.normalization is NormalizationStrategy.MODEL_NATIVE:
            statistics = _native_statistics(opened, product_level)
        chosen = [bands[position] for position in self._positions]
        self._normalise = build_normalizer(self.normalization, chosen, expected_input_unit=InputUnit.S2_DN, **statistics)

    @property
    def segmentation_layers(self) -> list[str]:
        """The last block of each stage, coarsest first: what the benchmark wants as segmentation layers.

        Raises ConfigError for a MultiMAE, whose blocks give tokens of several domains and no maps.
        """
        if not isinstance(self.backbone, ConvNeXtV2):
            raise ConfigError(
                f"{self.label}: the benchmark's dense heads take maps, and a MultiMAE's blocks give the tokens of all "
                "domains and a global one; use launch/finetune.py for segmentation with it"
            )
        stages = self.backbone.stages
        return [f"stages.{stage}.{len(stages[stage]) - 1}" for stage in reversed(range(len(stages)))]

    def normalize_inputs(self, images: Tensor) -> Tensor:
        """[N, B, H, W]: the encoder's bands of `images` [N, B_in, H, W], normalised.

        No data is 0, NaN for a MultiMAE.
        """
        images = self._normalise(images[:, self._positions])
        return torch.where(images.isfinite(), images, self._no_data)

    @torch.no_grad()
    def _forward_patch_features(self, images: Tensor) -> Tensor:
        """[N, D] of normalised images [N, B, H, W]."""
        return self._encode(self._whole_patches(images))

    def _whole_patches(self, images: Tensor) -> Tensor:
        """Images whose sides are multiples of the patch size: enlarged (bilinear) to the next one where they are not."""
        patch = self.input.patch_size
        height, width = (-(-side // patch) * patch for side in images.shape[2:])
        if (height, width) == tuple(images.shape[2:]):
            return images
        if not self._logged:
            sides = " x ".join(map(str, images.shape[2:]))
            _LOG.warning("images of %s are enlarged to %d x %d: the encoder's patch size is %d", sides, height, width, patch)
            self._logged = True
        return F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)


def _stored(band: BandSpec) -> StoredBand:
    """The benchmark's band with Sentinel-2's name where it is one of its bands, else its own, and its wavelength."""
    word = _WORDS.get(band.name)
    name = sentinel2_name(band.name) or sentinel2_name(band.source_name) or word
    wavelength_um = band.wavelength_um if band.wavelength_um is not None else SENTINEL2_UM.get(word)
    own = name if band.sensor == _SENTINEL2 and name is not None else f"{band.sensor} {band.name}"
    return StoredBand(own, wavelength_um, band.mean, band.std)


def _native_statistics(encoder: ImageEncoder, level: str) -> dict[str, list[float]]:
    known = encoder.input.statistics
    if level not in PRODUCT_LEVELS:
        raise ConfigError(f"product_level = {level!r}, expected one of {', '.join(PRODUCT_LEVELS)}")
    if level not in known:
        raise ConfigError(
            f"normalization model_native: {encoder.label} has statistics for {', '.join(known) or 'no product level'}, not "
            f"for {level}; export it with --shards, which records them, or use normalization bandspec_zscore"
        )
    return {"pretrain_mean": list(known[level]["mean"]), "pretrain_std": list(known[level]["std"])}
