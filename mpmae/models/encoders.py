"""`create_encoder` and `create_unet`: the dense models for downstream use, by the name of their size."""

from collections.abc import Sequence
from typing import Any

from mpmae.errors import ConfigError
from mpmae.modalities import MODALITIES
from mpmae.models.dense import STEM_PADDINGS, STEMS, ConvNeXtV2
from mpmae.models.mpmae import INPUT
from mpmae.models.presets import SIZES, band_problems, name_problems, patch_size_problems
from mpmae.models.unet import UNet

_PREFIX = "convnextv2_"
_PATCH_SIZE, _STEM = 8, "mmearth"


def list_encoders() -> list[str]:
    """The names that `create_encoder` and `create_unet` know, smallest first."""
    return [_PREFIX + size for size in SIZES]


def create_encoder(
    name: str,
    *,
    patch_size: int | None = None,
    stem: str | None = None,
    in_chans: int | None = None,
    bands_in: Sequence[str] | None = None,
    num_classes: int = 0,
    stem_padding: str = "same",
    grn_eps: float | None = None,
    drop_path_rate: float = 0.0,
) -> ConvNeXtV2:
    """A dense ConvNeXt V2 with random weights.

    name: one of `list_encoders()`. patch_size: pixels, 8 times a power of two (default: 8). stem: "mmearth" (default) or
    "convnext". in_chans: input channels; bands_in: Sentinel-2 bands instead, in the order of the channels. Without
    both, all but B10. num_classes: 0 for features alone. stem_padding, grn_eps, drop_path_rate: see
    `mpmae.models.dense.Backbone`.
    Raises ConfigError with every problem at once.
    """
    patch_size, stem = _PATCH_SIZE if patch_size is None else patch_size, stem or _STEM
    in_chans, problems = _checked(name, patch_size, stem, in_chans, bands_in, grn_eps)
    if num_classes < 0:
        problems.append(f"num_classes = {num_classes}: expected 0 (features only) or more")
    if stem_padding not in STEM_PADDINGS:
        problems.append(f"stem_padding = {stem_padding!r}, expected one of {', '.join(STEM_PADDINGS)}")
    if not 0 <= drop_path_rate < 1:
        problems.append(f"drop_path_rate = {drop_path_rate}: expected a fraction in [0, 1)")
    _raise("create_encoder", problems)
    dims, depths = SIZES[name.removeprefix(_PREFIX)]
    options: dict[str, Any] = {"stem_padding": stem_padding, "grn_eps": grn_eps, "drop_path_rate": drop_path_rate}
    return ConvNeXtV2(dims, depths, in_chans=in_chans, patch_size=patch_size, stem=stem, num_classes=num_classes, **options)


def create_unet(
    name: str,
    *,
    num_classes: int,
    patch_size: int = _PATCH_SIZE,
    stem: str = _STEM,
    in_chans: int | None = None,
    bands_in: Sequence[str] | None = None,
    grn_eps: float | None = None,
) -> UNet:
    """A U-Net on the dense ConvNeXt V2, with random weights: logits per pixel.

    num_classes: at least 1. grn_eps: None is 1e-6, as in pretraining; the published U-Net has 1e-4. The rest as for
    `create_encoder`. Raises ConfigError with every problem at once.
    """
    in_chans, problems = _checked(name, patch_size, stem, in_chans, bands_in, grn_eps)
    if num_classes < 1:
        problems.append(f"num_classes = {num_classes}: expected at least 1")
    _raise("create_unet", problems)
    dims, depths = SIZES[name.removeprefix(_PREFIX)]
    return UNet(dims, depths, num_classes=num_classes, in_chans=in_chans, patch_size=patch_size, stem=stem, grn_eps=grn_eps)


def _checked(
    name: str,
    patch_size: int,
    stem: str,
    in_chans: int | None,
    bands_in: Sequence[str] | None,
    grn_eps: float | None,
) -> tuple[int, list[str]]:
    """The number of input channels, and what is wrong with the arguments."""
    problems = name_problems(name, list_encoders()) + patch_size_problems(patch_size)
    if stem not in STEMS:
        problems.append(f"stem = {stem!r}, expected one of {', '.join(STEMS)}")
    if grn_eps is not None and not grn_eps > 0:
        problems.append(f"grn_eps = {grn_eps}: expected a small positive number")
    if bands_in is not None:
        problems += band_problems("bands_in", INPUT, bands_in, MODALITIES[INPUT].bands)
        if in_chans not in (None, len(bands_in)):
            problems.append(
                f"in_chans = {in_chans}, but bands_in names {len(bands_in)} bands ({', '.join(bands_in)}); give one of them"
            )
    elif in_chans is None:
        bands_in = MODALITIES[INPUT].model_bands
    elif in_chans < 1:
        problems.append(f"in_chans = {in_chans}: expected at least 1")
    return len(bands_in) if in_chans is None else in_chans, problems


def _raise(where: str, problems: list[str]) -> None:
    if problems:
        raise ConfigError([f"{where}: {problem}" for problem in problems])
