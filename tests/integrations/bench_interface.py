"""What of torchgeo-bench a model of it meets, written from its documentation: for machines without the package.

Shapes: N images, B channels, H x W pixels.
"""

import sys
from dataclasses import dataclass
from enum import Enum
from types import ModuleType

import torch
from torch import nn


@dataclass(frozen=True)
class BandSpec:
    sensor: str
    name: str
    source_name: str
    mean: float
    std: float
    min: float
    max: float
    wavelength_um: float | None = None


class InputUnit(str, Enum):
    S2_DN = "s2_dn"
    REFLECTANCE_0_1 = "reflectance_0_1"
    UINT8 = "uint8"


class NormalizationStrategy(str, Enum):
    BANDSPEC_ZSCORE = "bandspec_zscore"
    MODEL_NATIVE = "model_native"
    IDENTITY = "identity"


def build_normalizer(strategy, bands, *, expected_input_unit=None, pretrain_mean=None, pretrain_std=None):
    if strategy is NormalizationStrategy.IDENTITY:
        return lambda images: images
    factor, mean, std = 1.0, [band.mean for band in bands], [band.std for band in bands]
    if strategy is NormalizationStrategy.MODEL_NATIVE:
        assert expected_input_unit is InputUnit.S2_DN
        largest = max(band.max for band in bands)
        factor = 1.0 if largest > 1000 else 10000 / 255 if largest > 10 else 10000.0
        mean, std = pretrain_mean, pretrain_std
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    return lambda images: (images * factor - mean) / std


class BenchModel(nn.Module):
    def __init__(self, bands, normalization=NormalizationStrategy.BANDSPEC_ZSCORE, **_):
        super().__init__()
        self.bands, self.num_channels = list(bands), len(bands)
        self.normalization = NormalizationStrategy(normalization)
        self._normalizer = build_normalizer(self.normalization, self.bands)

    def normalize_inputs(self, images):
        return self._normalizer(images)

    def forward_patch_features(self, images):
        return self._forward_patch_features(self.normalize_inputs(images))

    def forward(self, images):
        return self.forward_patch_features(images)


MODULES = {
    "torchgeo_bench.datasets.base": {"BandSpec": BandSpec},
    "torchgeo_bench.models._input_units": {"InputUnit": InputUnit},
    "torchgeo_bench.models._normalization": {
        "NormalizationStrategy": NormalizationStrategy,
        "build_normalizer": build_normalizer,
    },
    "torchgeo_bench.models.interface": {"BenchModel": BenchModel},
}


def install(monkeypatch):
    """Put the stand-in where `import torchgeo_bench...` looks."""
    for name, content in MODULES.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[0]))
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
