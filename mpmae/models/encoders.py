"""`create_encoder` and `create_unet`: the dense models for downstream use, by the name of their size."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mpmae.errors import ConfigError
from mpmae.modalities import MODALITIES
from mpmae.models.dense import STEM_PADDINGS, STEMS, ConvNeXtV2
from mpmae.models.interop import Architecture, Weights, as_weights, describe_convnext, load_encoder
from mpmae.models.mpmae import INPUT
from mpmae.models.named import band_problems, name_problems
from mpmae.models.presets import SIZES, patch_size_problems
from mpmae.models.unet import UNet

_PREFIX = "convnextv2_"
_PATCH_SIZE, _STEM = 8, "mmearth"
Source = Mapping[str, Tensor] | str | Path | Weights


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
    stem_padding: str | None = None,
    grn_eps: float | None = None,
    drop_path_rate: float = 0.0,
    checkpoint: Source | None = None,
) -> ConvNeXtV2:
    """A dense ConvNeXt V2, with random weights or those of a checkpoint.

    name: one of `list_encoders()`. patch_size: pixels, 8 times a power of two (default: 8). stem: "mmearth" (default) or
    "convnext". in_chans: input channels; bands_in: Sentinel-2 bands instead, in the order of the channels. Without
    both, all but B10. num_classes: 0 for features alone. stem_padding (default: "same"), grn_eps, drop_path_rate:
    see `mpmae.models.dense.Backbone`.
    checkpoint: anything that `mpmae.models.interop.read_weights` takes, in any known layout; what is left out of patch_size,
    stem, in_chans, stem_padding and grn_eps then follows it. Its decoder stays unused, and a classifier of another number of
    classes starts fresh; both are logged.
    Raises ConfigError with every problem at once, also for what the checkpoint contradicts, and CheckpointError.
    """
    weights, options, problems = _resolve(name, patch_size, stem, in_chans, bands_in, checkpoint)
    if stem_padding is None:
        stem_padding = "same" if weights is None else weights.stem_padding
    if grn_eps is None and weights is not None and stem_padding == weights.stem_padding:
        grn_eps = weights.grn_eps
    problems += _eps_problems(grn_eps)
    if num_classes < 0:
        problems.append(f"num_classes = {num_classes}: expected 0 (features only) or more")
    if stem_padding not in STEM_PADDINGS:
        problems.append(f"stem_padding = {stem_padding!r}, expected one of {', '.join(STEM_PADDINGS)}")
    if not 0 <= drop_path_rate < 1:
        problems.append(f"drop_path_rate = {drop_path_rate}: expected a fraction in [0, 1)")
    _raise("create_encoder", problems)
    options |= {"num_classes": num_classes, "stem_padding": stem_padding, "grn_eps": grn_eps}
    options |= {"drop_path_rate": drop_path_rate}
    encoder = ConvNeXtV2(*SIZES[name.removeprefix(_PREFIX)], **options)
    if weights is not None:
        load_encoder(encoder, weights)
    return encoder


def create_unet(
    name: str,
    *,
    num_classes: int,
    patch_size: int | None = None,
    stem: str | None = None,
    in_chans: int | None = None,
    bands_in: Sequence[str] | None = None,
    grn_eps: float | None = None,
    checkpoint: Source | None = None,
) -> UNet:
    """A U-Net on the dense ConvNeXt V2: logits per pixel.

    num_classes: at least 1. grn_eps: None is 1e-6, as in pretraining; the published U-Net has 1e-4. checkpoint: of a U-Net,
    or of an encoder or a pretraining, whose decoder of its own kind stays unused. The rest as for `create_encoder`.
    """
    weights, options, problems = _resolve(name, patch_size, stem, in_chans, bands_in, checkpoint)
    if grn_eps is None and weights is not None:
        grn_eps = weights.grn_eps
    problems += _eps_problems(grn_eps)
    if num_classes < 1:
        problems.append(f"num_classes = {num_classes}: expected at least 1")
    _raise("create_unet", problems)
    unet = UNet(*SIZES[name.removeprefix(_PREFIX)], num_classes=num_classes, grn_eps=grn_eps, **options)
    if weights is not None:
        load_encoder(unet, weights)
    return unet


def _resolve(
    name: str,
    patch_size: int | None,
    stem: str | None,
    in_chans: int | None,
    bands_in: Sequence[str] | None,
    checkpoint: Source | None,
) -> tuple[Weights | None, dict[str, Any], list[str]]:
    """The weights, the model's options and what is wrong with the arguments."""
    problems = name_problems(name, list_encoders())
    if bands_in is not None:
        problems += band_problems("bands_in", INPUT, bands_in, MODALITIES[INPUT].bands)
        if in_chans not in (None, len(bands_in)):
            problems.append(
                f"in_chans = {in_chans}, but bands_in names {len(bands_in)} bands ({', '.join(bands_in)}); give one of them"
            )
        in_chans = len(bands_in)
    weights = None
    if checkpoint is not None:
        weights = as_weights(checkpoint)
        found = describe_convnext(weights.state, weights.source)
        asked = {"size": name.removeprefix(_PREFIX), "patch_size": patch_size, "stem": stem, "in_chans": in_chans}
        problems += _contradictions(weights, found, asked, bands_in)
        patch_size, stem, in_chans = found.patch_size, found.stem, found.in_chans
    patch_size, stem = _PATCH_SIZE if patch_size is None else patch_size, _STEM if stem is None else stem
    in_chans = len(MODALITIES[INPUT].model_bands) if in_chans is None else in_chans
    problems += patch_size_problems(patch_size)
    if stem not in STEMS:
        problems.append(f"stem = {stem!r}, expected one of {', '.join(STEMS)}")
    if in_chans < 1 and bands_in is None:
        problems.append(f"in_chans = {in_chans}: expected at least 1")
    options = {"patch_size": patch_size, "stem": stem, "in_chans": in_chans}
    return weights, options, problems


def _contradictions(
    weights: Weights, found: Architecture, asked: dict[str, Any], bands_in: Sequence[str] | None
) -> list[str]:
    other = [
        f"{key} = {value} instead of {getattr(found, key)}"
        for key, value in asked.items()
        if value is not None and value != getattr(found, key)
    ]
    problems = [f"{', '.join(other)}: {weights.source} holds {found}; leave out what it decides"] if other else []
    recorded = weights.bands_in
    if bands_in is not None and recorded is not None and tuple(bands_in) != recorded:
        problems.append(
            f"bands_in = {', '.join(bands_in)}, but {weights.source} was trained on {', '.join(recorded)}, in this order"
        )
    return problems


def _eps_problems(grn_eps: float | None) -> list[str]:
    return [] if grn_eps is None or grn_eps > 0 else [f"grn_eps = {grn_eps}: expected a small positive number"]


def _raise(where: str, problems: list[str]) -> None:
    if problems:
        raise ConfigError([f"{where}: {problem}" for problem in problems])
