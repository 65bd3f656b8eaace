"""What model a canonical state dict is of, read off names and shapes."""

import re
from dataclasses import dataclass, field

from torch import Tensor

from mpmae.errors import CheckpointError
from mpmae.models.encoder import FIRST_TILE_SIDE
from mpmae.models.interop.describe_multimae import MultiMAEArchitecture, describe_multimae
from mpmae.models.interop.multimae_names import multimae_scheme
from mpmae.models.interop.names_in import loss_order
from mpmae.models.presets import SIZES


@dataclass(frozen=True)
class Architecture:
    """The facts of a ConvNeXt V2 or MP-MAE that its weights show.

    dims, depths: channels and blocks of the four stages. patch_size: pixels, by the stem's stride. in_chans: bands that the
    stem reads. modalities: name -> output channels of its head (for a pixel modality bands or classes, without the factor
    patch_size**2), in the order of the losses. decoder_dim, decoder_depth: 0 without a decoder. num_classes: of the dense
    classifier, 0 without one.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    stem: str
    patch_size: int
    in_chans: int
    decoder_dim: int = 0
    decoder_depth: int = 0
    modalities: dict[str, int] = field(default_factory=dict)
    has_log_vars: bool = False
    num_classes: int = 0

    @property
    def size(self) -> str | None:
        """The name of dims and depths: "atto", ..., "huge"; None for other ones."""
        return next((name for name, sizes in SIZES.items() if sizes == (self.dims, self.depths)), None)

    def __str__(self) -> str:
        dims, depths = ("-".join(map(str, numbers)) for numbers in (self.dims, self.depths))
        parts = [
            f"{self.size or 'no usual size'} (channels {dims}, blocks {depths})",
            f"stem {self.stem}",
            f"patch size {self.patch_size}",
            f"{self.in_chans} input bands",
        ]
        if self.decoder_dim:
            parts.append(f"decoder {self.decoder_dim} x {self.decoder_depth}")
        if self.modalities:
            parts.append(f"modalities {', '.join(self.modalities)}")
        if self.num_classes:
            parts.append(f"{self.num_classes} classes")
        return ", ".join(parts)


def describe(state: dict[str, Tensor], where: str = "the state dict") -> Architecture | MultiMAEArchitecture:
    """The architecture of a canonical state dict, whose source `where` names: its family's own type.

    Raises CheckpointError if it holds no whole encoder of either family.
    """
    return describe_multimae(state, where) if multimae_scheme(state) else _describe_convnext(state, where)


def describe_convnext(state: dict[str, Tensor], where: str = "the state dict") -> Architecture:
    """As `describe`, for callers that can only use a ConvNeXt V2: CheckpointError for a MultiMAE, with what can use it."""
    if multimae_scheme(state):
        raise CheckpointError(
            f"{where} holds {describe_multimae(state, where)}; here a ConvNeXt V2 is needed. "
            "mpmae.models.interop.build_multimae gives the model, `mpmae-export --to timm --domain NAME` a ViT of timm for "
            "one of its domains"
        )
    return _describe_convnext(state, where)


def _describe_convnext(state: dict[str, Tensor], where: str) -> Architecture:
    depths, dims = [0, 0, 0, 0], [0, 0, 0, 0]
    for name, value in state.items():
        match = re.fullmatch(r"encoder\.stages\.([0-3])\.(\d+)\.norm\.weight", name)
        if match:
            stage = int(match[1])
            depths[stage] = max(depths[stage], int(match[2]) + 1)
            dims[stage] = value.shape[0]
    conv = state.get("encoder.stem.conv.weight")
    if conv is None or conv.ndim != 4 or not all(depths):
        absent = (
            "no stem"
            if conv is None or conv.ndim != 4
            else f"blocks of stages {[s for s, n in enumerate(depths) if n]} only"
        )
        raise CheckpointError(f"{where}: no whole ConvNeXt V2 encoder among {len(state)} tensors: {absent}")
    pool = state.get("encoder.stem.pool.weight")
    patch_size = FIRST_TILE_SIDE * (conv if pool is None else pool).shape[-1]
    proj = state.get("decoder.proj.weight")
    head = state.get("head.weight")
    return Architecture(
        dims=tuple(dims),
        depths=tuple(depths),
        stem="convnext" if pool is None else "mmearth",
        patch_size=patch_size,
        in_chans=conv.shape[1],
        decoder_dim=0 if proj is None else proj.shape[0],
        decoder_depth=len({name.split(".")[2] for name in state if name.startswith("decoder.blocks.")}),
        modalities=_modalities(state, patch_size),
        has_log_vars="log_vars" in state,
        num_classes=0 if head is None else head.shape[0],
    )


def _modalities(state: dict[str, Tensor], patch_size: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, value in state.items():
        match = re.fullmatch(r"heads\.(pixel|tile)\.([^.]+)\.weight", name)
        if match:
            found[match[2]] = value.shape[0] // (patch_size**2 if match[1] == "pixel" else 1)
    return {name: found[name] for name in loss_order(sorted(found))}
