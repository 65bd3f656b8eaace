"""The sizes of the model and `create_model`, which checks every argument and builds one.

Source of the sizes: Woo et al., "ConvNeXt V2", arXiv 2301.00808, table 13; of the rest: Nedungadi et al., "MMEarth",
arXiv 2405.02771.
"""

import difflib
from collections.abc import Mapping, Sequence

from mpmae.errors import ConfigError
from mpmae.masking import num_visible
from mpmae.modalities import MODALITIES, TARGETS, spec_of
from mpmae.models.encoder import FIRST_TILE_SIDE, STEMS
from mpmae.models.init import INITS, initialise
from mpmae.models.mpmae import INPUT, MPMAE

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
    "stem": tuple(STEMS),
    "loss_weighting": ("uncertainty", "unweighted"),
    "grn_scope": ("sample", "batch"),
    "init": INITS,
}


def list_models() -> list[str]:
    """The names that `create_model` knows, smallest first."""
    return [f"mpmae_{size}" for size in SIZES]


def create_model(
    name: str,
    *,
    img_size: int = 56,
    patch_size: int = 8,
    bands_in: Sequence[str] | None = None,
    modalities_out: Sequence[str] | Mapping[str, Sequence[str] | None] = TARGETS,
    mask_ratio: float = 0.6,
    stem: str = "mmearth",
    loss_weighting: str = "uncertainty",
    norm_pix_loss: bool = True,
    decoder_dim: int = 512,
    decoder_depth: int = 1,
    grn_scope: str | None = None,
    init: str = "convnextv2",
    reference_quirks: bool = False,
    bands_available: Mapping[str, Sequence[str]] | None = None,
) -> MPMAE:
    """A new MP-MAE with random weights.

    name: one of `list_models()`. img_size, patch_size: pixels; patch_size is 8 times a power of two and divides img_size.
    bands_in: Sentinel-2 bands that the encoder reads; None: all but B10. modalities_out: the targets, by name or as
    {name: bands or None for the default ones}; the losses keep the order of `mpmae.modalities.TARGETS`.
    mask_ratio: hidden fraction, in [0, 1). stem: "mmearth" (3x3 convolution first) or "convnext".
    loss_weighting: "uncertainty" (learned log variances) or "unweighted". norm_pix_loss: whether sentinel2 targets are
    normalised per patch. grn_scope: over which sites the encoder's GRN takes its norm, "sample" or "batch" (the published
    code; results then depend on the micro batch); None: "batch" with reference_quirks, else "sample".
    init: "convnextv2" (0.02 everywhere; trains better, see `mpmae.models.init`) or "reference" (published code).
    reference_quirks: what the published code computes where that differs, line by line in docs/quirks.md; it reads the bands
    that it reconstructs, so bands_in then defaults to sentinel2's output bands and may not differ from them. Its loaders
    need the same switch (`CpuLoader(reference_quirks=True)`; a run sets it from its configuration).
    bands_available: bands that a batch's tensors hold, in order; default: those of `mpmae.modalities`.

    Raises ConfigError with every problem at once.
    """
    problems: list[str] = []
    grn_scope = grn_scope or ("batch" if reference_quirks else "sample")
    chosen = {"stem": stem, "loss_weighting": loss_weighting, "grn_scope": grn_scope, "init": init}
    problems += [
        f"create_model: {key} = {value!r}, expected one of {', '.join(_CHOICES[key])}"
        for key, value in chosen.items()
        if value not in _CHOICES[key]
    ]
    if name not in list_models():
        close = difflib.get_close_matches(name, list_models(), n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        problems.append(f"create_model: unknown model {name!r}{hint} Known: {', '.join(list_models())}")
    problems += _size_problems(img_size, patch_size, decoder_dim, decoder_depth)
    available = {key: spec.bands for key, spec in MODALITIES.items()}
    problems += [
        f"create_model: bands_available names an {_unknown(key)}" for key in bands_available or {} if key not in MODALITIES
    ]
    available |= {key: tuple(bands) for key, bands in (bands_available or {}).items()}
    bands_out = _bands_out(modalities_out, available, problems)
    if bands_in is None:
        follow = reference_quirks and INPUT in bands_out
        bands_in = bands_out[INPUT] if follow else _default_bands(INPUT, available[INPUT])
    elif reference_quirks and INPUT in bands_out and tuple(bands_in) != bands_out[INPUT]:
        problems.append(
            f"create_model: reference_quirks reads the bands that it reconstructs, but bands_in = {', '.join(bands_in)} and "
            f"{INPUT} in modalities_out = {', '.join(bands_out[INPUT])}; give the same list or leave bands_in out"
        )
    problems += _band_problems("bands_in", INPUT, bands_in, available[INPUT])
    visible = 0
    try:
        visible = num_visible(max(img_size // max(patch_size, 1), 1) ** 2, mask_ratio)
    except ConfigError as error:
        problems += [f"create_model: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
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
        stem=stem,
        loss_weighting=loss_weighting,
        norm_pix_loss=norm_pix_loss,
        decoder_dim=decoder_dim,
        decoder_depth=decoder_depth,
        grn_scope=grn_scope,
        reference_quirks=reference_quirks,
    )
    initialise(model, init)
    return model


def _size_problems(img_size: int, patch_size: int, decoder_dim: int, decoder_depth: int) -> list[str]:
    problems = []
    factor, rest = divmod(patch_size, FIRST_TILE_SIDE)
    if patch_size <= 0 or rest or factor & (factor - 1):
        problems.append(
            f"create_model: patch_size = {patch_size} is not supported; the stem's stride is patch_size / 8, so it is "
            "8 times a power of two: 8, 16, 32, 64, ..."
        )
    elif img_size <= 0 or img_size % patch_size:
        below = img_size // patch_size * patch_size
        near = f"{below} or {below + patch_size}" if below > 0 else f"{patch_size}"
        problems.append(f"create_model: img_size = {img_size} is not a multiple of patch_size = {patch_size}; use {near}")
    for key, value in {"decoder_dim": decoder_dim, "decoder_depth": decoder_depth}.items():
        if value < 1:
            problems.append(f"create_model: {key} = {value}, expected at least 1")
    return problems


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, TARGETS, n=1, cutoff=0.5)
    return f"unknown modality {name!r}{f'; did you mean {close[0]}?' if close else ''} Known targets: {', '.join(TARGETS)}"


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
        problems.append(f"create_model: modalities_out is empty; name at least one of {', '.join(TARGETS)}")
    problems += [f"create_model: modalities_out names an {_unknown(name)}" for name in wanted if name not in TARGETS]
    bands_out = {}
    for name in TARGETS:
        if name not in wanted:
            continue
        if spec_of(name).kind == "categorical":
            bands_out[name] = spec_of(name).bands
            if wanted[name] is not None and tuple(wanted[name]) != spec_of(name).bands:
                problems.append(
                    f"create_model: {name} holds class ids, not bands; give null instead of {list(wanted[name])}"
                )
            continue
        bands = _default_bands(name, available[name]) if wanted[name] is None else tuple(wanted[name])
        problems += _band_problems("modalities_out", name, bands, available[name])
        bands_out[name] = bands
    return bands_out


def _default_bands(name: str, available: tuple[str, ...]) -> tuple[str, ...]:
    """The modality's usual bands, as far as the set holds them."""
    return tuple(band for band in spec_of(name).model_bands if band in available)


def _band_problems(where: str, name: str, bands: Sequence[str], available: tuple[str, ...]) -> list[str]:
    missing = [band for band in bands if band not in available]
    problems = []
    if missing:
        problems.append(
            f"create_model: {where}: {name} has no band {', '.join(missing)}; the set has {', '.join(available)}"
        )
    if len(set(bands)) != len(bands):
        problems.append(f"create_model: {where}: {name} lists a band twice: {', '.join(bands)}")
    if not bands:
        problems.append(f"create_model: {where}: {name} has an empty list of bands; the set has {', '.join(available)}")
    return problems
