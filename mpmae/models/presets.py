"""`create_model`, the sizes of MP-MAE and `create_mpmae`, which checks every argument and builds one.

Source of the sizes: Woo et al., "ConvNeXt V2", arXiv 2301.00808, table 13; of the rest: Nedungadi et al., "MMEarth",
arXiv 2405.02771.
"""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from mpmae.errors import ConfigError
from mpmae.masking import num_visible
from mpmae.modalities import ALL_TARGETS, MODALITIES, TARGETS, spec_of
from mpmae.models.blocks import GELUS
from mpmae.models.dense import grid_side
from mpmae.models.encoder import FIRST_TILE_SIDE, STEMS
from mpmae.models.init import INITS, initialise
from mpmae.models.mpmae import ENCODERS, INPUT, MPMAE
from mpmae.models.multimae.model import MultiMAE
from mpmae.models.multimae.presets import create_multimae, list_multimae
from mpmae.models.named import band_problems, name_problems

# name -> (channels, depths) of the four stages
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "atto": ((40, 80, 160, 320), (2, 2, 6, 2)),
    "femto": ((48, 96, 192, 384), (2, 2, 6, 2)),
    "pico": ((64, 128, 256, 512), (2, 2, 6, 2)),
    "nano": ((80, 160, 320, 640), (2, 2, 8, 2)),
    "tiny": ((96, 192, 384, 768), (3, 3, 9, 3)),
    "base": ((128, 256, 512, 1024), (3, 3, 27, 3)),
    "large": ((192, 384, 768, 1536), (3, 3, 27, 3)),
    "huge": ((352, 704, 1408, 2816), (3, 3, 27, 3)),
}
_CHOICES = {
    "encoder": ENCODERS,
    "stem": tuple(STEMS),
    "loss_weighting": ("uncertainty", "unweighted"),
    "grn_scope": ("sample", "batch"),
    "gelu": GELUS,
    "init": INITS,
}


def list_models() -> list[str]:
    """The names that `create_model` knows: those of MP-MAE, then those of MultiMAE, each smallest first."""
    return [*list_mpmae(), *list_multimae()]


def list_mpmae() -> list[str]:
    """The names that `create_mpmae` knows, smallest first."""
    return [f"mpmae_{size}" for size in SIZES]


def create_model(name: str, **options: Any) -> MPMAE | MultiMAE:
    """A new model with random weights: an MP-MAE or a MultiMAE, by its name, one of `list_models()`.

    options: as in `mpmae.models.presets.create_mpmae` and `mpmae.models.multimae.presets.create_multimae`.
    Raises ConfigError with every problem at once; for options that the other family has, before anything else is looked at.
    """
    if not name.startswith(("mpmae", "multimae")):
        raise ConfigError([f"create_model: {problem}" for problem in name_problems(name, list_models())])
    create = create_multimae if name.startswith("multimae") else create_mpmae
    known = [key for key in inspect.signature(create).parameters if key != "name"]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ConfigError([f"create_model: {name} has no option {key!r}; it has {', '.join(known)}" for key in unknown])
    return create(name, **options)


def create_mpmae(
    name: str,
    *,
    img_size: int = 56,
    patch_size: int = 8,
    bands_in: Sequence[str] | None = None,
    modalities_out: Sequence[str] | Mapping[str, Sequence[str] | None] = TARGETS,
    mask_ratio: float = 0.6,
    encoder: str = "sparse",
    stem: str = "mmearth",
    loss_weighting: str = "uncertainty",
    norm_pix_loss: bool = True,
    decoder_dim: int = 512,
    decoder_depth: int = 1,
    grn_scope: str | None = None,
    gelu: str = "erf",
    init: str = "convnextv2",
    reference_quirks: bool = False,
    bands_available: Mapping[str, Sequence[str]] | None = None,
) -> MPMAE:
    """A new MP-MAE with random weights.

    name: one of `list_mpmae()`. img_size, patch_size: pixels; patch_size is 8 times a power of two and divides img_size.
    bands_in: Sentinel-2 bands that the encoder reads; None: all but B10. modalities_out: the targets, by name or as
    {name: bands or None for the default ones}; the losses keep the order of `mpmae.modalities.ALL_TARGETS`.
    mask_ratio: hidden fraction, in [0, 1). encoder: "sparse" (computes visible patches only) or "dense" (computes every
    patch of the image with 0 at hidden ones: the slow baseline). stem: "mmearth" (3x3 convolution first) or "convnext".
    loss_weighting: "uncertainty" (learned log variances) or "unweighted". norm_pix_loss: whether sentinel2 targets are
    normalised per patch. grn_scope: over which sites the encoder's GRN takes its norm, "sample" or "batch" (the published
    sparse code; results then depend on the micro batch); None: "batch" with reference_quirks, else "sample".
    gelu: "erf" (exact), or on a GPU with fewer instructions "poly" (error at most 1.3e-4) or "tanh" (4.8e-4).
    init: "convnextv2" (0.02 everywhere; trains better, see `mpmae.models.init`) or "reference" (published code).
    reference_quirks: what the published code computes where that differs, line by line in docs/quirks.md; it reads the bands
    that it reconstructs, so bands_in then defaults to sentinel2's output bands and may not differ from them. With the dense
    encoder also its stem without padding and GRN eps 1e-4 (see `mpmae.models.dense`). Loaders need the same switch
    (`CpuLoader(reference_quirks=True)`; a run sets it from its configuration).
    bands_available: bands that a batch's tensors hold, in order; default: those of `mpmae.modalities`.

    Raises ConfigError with every problem at once.
    """
    problems: list[str] = []
    grn_scope = grn_scope or ("batch" if reference_quirks and encoder != "dense" else "sample")
    chosen = {
        "encoder": encoder,
        "stem": stem,
        "loss_weighting": loss_weighting,
        "grn_scope": grn_scope,
        "gelu": gelu,
        "init": init,
    }
    problems += [
        f"{key} = {value!r}, expected one of {', '.join(_CHOICES[key])}"
        for key, value in chosen.items()
        if value not in _CHOICES[key]
    ]
    if encoder == "dense" and grn_scope == "batch":
        problems.append("grn_scope = 'batch': the dense encoder takes the norm per sample; leave grn_scope out")
    if encoder == "dense" and gelu != "erf":
        problems.append(f"gelu = {gelu!r}: the dense encoder has the exact one; leave gelu out")
    problems += name_problems(name, list_mpmae())
    problems += _size_problems(img_size, patch_size, decoder_dim, decoder_depth)
    if encoder == "dense" and reference_quirks and not problems:
        problems += _published_dense_problems(img_size, patch_size, stem)
    available = {key: spec.bands for key, spec in MODALITIES.items()}
    problems += [f"bands_available names an {_unknown(key)}" for key in bands_available or {} if key not in MODALITIES]
    available |= {key: tuple(bands) for key, bands in (bands_available or {}).items()}
    bands_out = _bands_out(modalities_out, available, problems)
    if bands_in is None:
        follow = reference_quirks and INPUT in bands_out
        bands_in = bands_out[INPUT] if follow else _default_bands(INPUT, available[INPUT])
    elif reference_quirks and INPUT in bands_out and tuple(bands_in) != bands_out[INPUT]:
        problems.append(
            f"reference_quirks reads the bands that it reconstructs, but bands_in = {', '.join(bands_in)} and "
            f"{INPUT} in modalities_out = {', '.join(bands_out[INPUT])}; give the same list or leave bands_in out"
        )
    problems += band_problems("bands_in", INPUT, bands_in, available[INPUT])
    visible = 0
    try:
        visible = num_visible(max(img_size // max(patch_size, 1), 1) ** 2, mask_ratio)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError([f"create_model: {problem}" for problem in problems])
    dims, depths = SIZES[name.removeprefix("mpmae_")]
    model = MPMAE(
        dims,
        depths,
        img_size=img_size,
        patch_size=patch_size,
        num_visible=visible,
        bands_in=tuple(bands_in),
        bands_out=bands_out,
        bands_available=available,
        encoder=encoder,
        stem=stem,
        loss_weighting=loss_weighting,
        norm_pix_loss=norm_pix_loss,
        decoder_dim=decoder_dim,
        decoder_depth=decoder_depth,
        grn_scope=grn_scope,
        gelu=gelu,
        reference_quirks=reference_quirks,
    )
    initialise(model, init)
    return model


def patch_size_problems(patch_size: int) -> list[str]:
    """What is wrong with a patch size: nothing or that the stem has no such stride."""
    factor, rest = divmod(patch_size, FIRST_TILE_SIDE)
    if patch_size > 0 and not rest and not factor & (factor - 1):
        return []
    return [
        f"patch_size = {patch_size} is not supported; the stem's stride is patch_size / 8, so it is 8 times a power of two: "
        "8, 16, 32, 64, ..."
    ]


def _size_problems(img_size: int, patch_size: int, decoder_dim: int, decoder_depth: int) -> list[str]:
    problems = patch_size_problems(patch_size)
    if not problems and (img_size <= 0 or img_size % patch_size):
        below = img_size // patch_size * patch_size
        near = f"{below} or {below + patch_size}" if below > 0 else f"{patch_size}"
        problems.append(f"img_size = {img_size} is not a multiple of patch_size = {patch_size}; use {near}")
    for key, value in {"decoder_dim": decoder_dim, "decoder_depth": decoder_depth}.items():
        if value < 1:
            problems.append(f"{key} = {value}, expected at least 1")
    return problems


def _published_dense_problems(img_size: int, patch_size: int, stem: str) -> list[str]:
    """What is wrong with a size for the published dense encoder: nothing or that its map is no grid of patches."""
    side, wanted = grid_side(img_size, patch_size, stem, "reference"), img_size // patch_size
    if side == wanted:
        return []
    return [
        f"encoder = 'dense' with reference_quirks: the published stem does not pad, so img_size = {img_size} and "
        f"patch_size = {patch_size} give {side} x {side} sites for {wanted} x {wanted} patches; use patch_size >= 16, "
        "stem = 'convnext' or leave reference_quirks out"
    ]


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, ALL_TARGETS, n=1, cutoff=0.5)
    return (
        f"unknown modality {name!r}{f'; did you mean {close[0]}?' if close else ''} Known targets: {', '.join(ALL_TARGETS)}"
    )


def _bands_out(
    modalities_out: Sequence[str] | Mapping[str, Sequence[str] | None],
    available: dict[str, tuple[str, ...]],
    problems: list[str],
) -> dict[str, tuple[str, ...]]:
    """Output bands per target in the canonical order; what is wrong goes into `problems`."""
    if isinstance(modalities_out, str):
        modalities_out = (modalities_out,)
    wanted = dict(modalities_out) if isinstance(modalities_out, Mapping) else dict.fromkeys(modalities_out)
    if not wanted:
        problems.append(f"modalities_out is empty; name at least one of {', '.join(ALL_TARGETS)}")
    problems += [f"modalities_out names an {_unknown(name)}" for name in wanted if name not in ALL_TARGETS]
    bands_out = {}
    for name in ALL_TARGETS:
        if name not in wanted:
            continue
        if spec_of(name).kind == "categorical":
            bands_out[name] = spec_of(name).bands
            if wanted[name] is not None and tuple(wanted[name]) != spec_of(name).bands:
                problems.append(f"{name} holds class ids, not bands; give null instead of {list(wanted[name])}")
            continue
        bands = _default_bands(name, available[name]) if wanted[name] is None else tuple(wanted[name])
        problems += band_problems("modalities_out", name, bands, available[name])
        bands_out[name] = bands
    return bands_out


def _default_bands(name: str, available: tuple[str, ...]) -> tuple[str, ...]:
    """The modality's usual bands, as far as the set holds them."""
    return tuple(band for band in spec_of(name).model_bands if band in available)
