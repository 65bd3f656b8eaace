"""The encoders as TerraTorch backbones `mpmae_convnextv2_atto`, ..., `mpmae_convnextv2_huge`.

    import mpmae.integrations.terratorch
    from terratorch.registry import BACKBONE_REGISTRY

    backbone = BACKBONE_REGISTRY.build("mpmae_convnextv2_atto", ckpt_path="runs/pretrain", bands=["BLUE", "GREEN", "RED"])

In a TerraTorch YAML: `backbone: mpmae_convnextv2_atto`, `backbone_ckpt_path: ...`, with the import above in a module of the
folder `custom_modules`, which TerraTorch imports by itself.

Shapes: N images, B input bands, H and W pixels, p patch size, C_s channels of stage s.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path

from terratorch.registry import TERRATORCH_BACKBONE_REGISTRY
from torch import Tensor, nn

from mpmae.errors import CheckpointError, ConfigError
from mpmae.models import ConvNeXtV2, create_encoder, list_encoders
from mpmae.models.interop import Weights, read_weights

_STEM_WEIGHT = "encoder.stem.conv.weight"
# TerraTorch's names of optical bands (terratorch.datasets.HLSBands) in Sentinel-2's
_TERRATORCH_BANDS = {
    "COASTAL_AEROSOL": "B1",
    "BLUE": "B2",
    "GREEN": "B3",
    "RED": "B4",
    "RED_EDGE_1": "B5",
    "RED_EDGE_2": "B6",
    "RED_EDGE_3": "B7",
    "NIR_BROAD": "B8",
    "NIR_NARROW": "B8A",
    "WATER_VAPOR": "B9",
    "CIRRUS": "B10",
    "SWIR_1": "B11",
    "SWIR_2": "B12",
}


class PyramidBackbone(nn.Module):
    """A dense encoder as TerraTorch wants it: a list of maps out, their channels in `out_channels`."""

    def __init__(self, encoder: ConvNeXtV2, out_indices: Sequence[int] | None = None):
        super().__init__()
        self.encoder = encoder
        num_stages = len(encoder.feature_info)
        wanted = range(num_stages) if out_indices is None else out_indices
        if not wanted or not all(-num_stages <= index < num_stages for index in wanted):
            raise ConfigError(f"out_indices = {list(wanted)}: expected stages within -{num_stages}..{num_stages - 1}")
        self.out_indices = sorted({index % num_stages for index in wanted})
        self.out_channels = [encoder.feature_info[index]["num_chs"] for index in self.out_indices]
        self.patch_size = encoder.patch_size  # TerraTorch pads images to multiples of it

    def forward(self, image: Tensor) -> list[Tensor]:
        """The maps [N, C_s, H_s, W_s] of the chosen stages for `image` [N, B, H, W], finest first."""
        return self.encoder.forward_intermediates(image, indices=self.out_indices, intermediates_only=True)


def build(
    name: str,
    *,
    ckpt_path: str | Path | None = None,
    pretrained: bool = False,
    bands: Sequence[str | Enum] | None = None,
    in_chans: int | None = None,
    patch_size: int | None = None,
    stem: str | None = None,
    out_indices: Sequence[int] | None = None,
    drop_path_rate: float = 0.0,
) -> PyramidBackbone:
    """The backbone of one size.

    name: as for `mpmae.create_encoder`. ckpt_path: any checkpoint that mpmae reads; it then also decides patch_size, stem
    and bands. pretrained: True asks for weights and needs ckpt_path. bands: input bands in the order of the channels, in
    TerraTorch's names or Sentinel-2's; of a checkpoint any of its bands may be chosen, in any order (where it does not say
    which it has: as many as it reads). out_indices: stages 0..3 (negative: from the end), None for all.
    Raises ConfigError or CheckpointError.
    """
    chosen = None if bands is None else tuple(_sentinel_name(band) for band in bands)
    options = {"in_chans": in_chans, "patch_size": patch_size, "stem": stem, "drop_path_rate": drop_path_rate}
    if ckpt_path is None:
        if pretrained:
            raise ConfigError("pretrained = True, but there are no default weights; give a checkpoint as ckpt_path")
        return PyramidBackbone(create_encoder(name, bands_in=chosen, **options), out_indices)
    weights = read_weights(ckpt_path)
    if chosen is not None and _STEM_WEIGHT in weights.state:
        weights = replace(weights, state=weights.state | {_STEM_WEIGHT: _chosen_bands(weights, chosen)})
    return PyramidBackbone(create_encoder(name, checkpoint=weights, **options), out_indices)


def _sentinel_name(band: str | Enum) -> str:
    """ "B2" for BLUE, "B02", "B2" or an enum member of TerraTorch."""
    text = str(band.value if isinstance(band, Enum) else band)
    short = f"B{text[2:]}" if text.startswith("B0") else text
    name = _TERRATORCH_BANDS.get(text, short)
    if name not in _TERRATORCH_BANDS.values():
        known = ", ".join(f"{ours} ({theirs})" for theirs, ours in _TERRATORCH_BANDS.items())
        raise ConfigError(f"bands: unknown band {text!r}; expected one of {known}")
    return name


def _chosen_bands(weights: Weights, chosen: tuple[str, ...]) -> Tensor:
    """The stem's weight [C, B, R, R] for the chosen bands alone."""
    weight, recorded = weights.state[_STEM_WEIGHT], weights.bands_in
    if recorded is None:
        if len(chosen) == weight.shape[1]:
            return weight
        raise CheckpointError(
            f"{weights.source}: nothing says which {weight.shape[1]} bands it reads, so {len(chosen)} cannot be chosen from "
            "them; export it with mpmae-export, which records the bands, or leave bands out"
        )
    missing = [band for band in chosen if band not in recorded]
    if missing:
        raise CheckpointError(f"{weights.source}: no weights for {', '.join(missing)}; it reads {', '.join(recorded)}")
    return weight[:, [recorded.index(band) for band in chosen]]


def _register(name: str) -> Callable[..., PyramidBackbone]:
    def constructor(**options) -> PyramidBackbone:
        return build(name, **options)

    constructor.__name__ = f"mpmae_{name}"  # the registry goes by it
    constructor.__doc__ = f"`{name}` pretrained by MP-MAE; arguments as for `mpmae.integrations.terratorch.build`."
    return TERRATORCH_BACKBONE_REGISTRY.register(constructor)


BACKBONES = tuple(_register(name).__name__ for name in list_encoders())
