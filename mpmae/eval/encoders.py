"""Encoders by configuration: those of a checkpoint, or of the same architecture with random weights."""

import torch

from mpmae.domains import DOMAINS
from mpmae.errors import ConfigError
from mpmae.eval.config import EncoderSection
from mpmae.eval.dataset import Task
from mpmae.eval.encoder_input import EncoderInput, statistics_by_level
from mpmae.eval.image_encoder import ImageEncoder
from mpmae.eval.multimae_encoder import encoder_of, new_multimae
from mpmae.modalities import spec_of
from mpmae.models import ConvNeXtV2, create_encoder
from mpmae.models.interop import Weights, as_weights, build_multimae, describe
from mpmae.models.multimae.init import initialise

RANDOM_INIT = "random init"
_SIZE_PREFIX = "convnextv2_"
_MULTIMAE_PREFIX = "multimae_"
__all__ = ["RANDOM_INIT", "ImageEncoder", "build_encoder", "domains_of", "open_encoder", "random_twin"]


def open_encoder(
    section: EncoderSection, seed: int = 0, drop_path_rate: float = 0.0, task: Task | None = None
) -> ImageEncoder:
    """The encoder of a checkpoint, or of the same architecture with random weights drawn from `seed`.

    task: of the set, by whose bands a MultiMAE without `section.domains` chooses what it reads; None: all it can.
    Raises ConfigError, or CheckpointError when the weights cannot be read or name no bands.
    """
    weights = None if section.checkpoint is None else as_weights(section.checkpoint)
    return build_encoder(section, weights, seed, drop_path_rate, task)


def random_twin(
    section: EncoderSection, seed: int = 0, drop_path_rate: float = 0.0, task: Task | None = None
) -> ImageEncoder:
    """The architecture, bands and statistics of `open_encoder`, with random weights: what pretraining has to beat."""
    if section.checkpoint is None:
        return open_encoder(section, seed, drop_path_rate, task)
    weights = as_weights(section.checkpoint)
    if weights.family == "multimae":
        return _multimae(section, weights, RANDOM_INIT, seed, drop_path_rate, task)
    like, found = build_encoder(section, weights), describe(weights.state, weights.source)
    with _seeded(seed):
        fresh = ConvNeXtV2(
            found.dims,
            found.depths,
            in_chans=found.in_chans,
            patch_size=found.patch_size,
            stem=found.stem,
            stem_padding=like.backbone.stem_padding,
            grn_eps=like.backbone.grn_eps,
            drop_path_rate=drop_path_rate,
        )
    return ImageEncoder(fresh.eval(), like.input, RANDOM_INIT)


def build_encoder(
    section: EncoderSection,
    weights: Weights | None,
    seed: int = 0,
    drop_path_rate: float = 0.0,
    task: Task | None = None,
) -> ImageEncoder:
    """As `open_encoder`, with the weights given."""
    label = RANDOM_INIT if weights is None else str(section.checkpoint or weights.source)
    if _is_multimae(section, weights):
        return _multimae(section, weights, label, seed, drop_path_rate, task)
    _check_dense(section, label)
    name, bands = section.name, section.bands_in
    if weights is not None:
        size = describe(weights.state, weights.source).size
        asked = "name" in section.model_fields_set
        name = name if asked or size is None else _SIZE_PREFIX + size
        bands = bands or weights.bands_in
        if bands is None:
            raise ConfigError(
                f"encoder.bands_in: nothing beside {weights.source} says which bands it reads; name them in the order of "
                "its channels, such as encoder.bands_in=[B2,B3,B4]"
            )
    elif bands is None:
        bands = spec_of("sentinel2").model_bands
    with _seeded(seed):
        backbone = create_encoder(
            name,
            patch_size=section.patch_size,
            bands_in=bands,
            drop_path_rate=drop_path_rate,
            checkpoint=weights,
        )
    statistics = {} if weights is None else statistics_by_level(weights.recorded("statistics") or {})
    encoder_input = EncoderInput(tuple(bands), backbone.patch_size, statistics)
    return ImageEncoder(backbone.eval(), encoder_input, label)


def domains_of(section: EncoderSection) -> tuple[str, ...] | None:
    """The domains that the encoder can read: those of its checkpoint, any for random weights; None: it is no MultiMAE."""
    weights = None if section.checkpoint is None else as_weights(section.checkpoint)
    if not _is_multimae(section, weights):
        return None
    return tuple(DOMAINS) if weights is None else weights.domains_in


def _is_multimae(section: EncoderSection, weights: Weights | None) -> bool:
    return section.name.startswith(_MULTIMAE_PREFIX) if weights is None else weights.family == "multimae"


def _multimae(
    section: EncoderSection, weights: Weights | None, label: str, seed: int, drop_path_rate: float, task: Task | None
) -> ImageEncoder:
    """A MultiMAE with the weights given, or with random ones of `seed` where `label` says so."""
    with _seeded(seed):
        model = new_multimae(section) if weights is None else build_multimae(weights)
        if weights is not None and label == RANDOM_INIT:
            initialise(model)
    if weights is not None and "name" in section.model_fields_set:
        size = describe(weights.state, weights.source).size
        if section.name != f"{_MULTIMAE_PREFIX}{size}":
            raise ConfigError(
                f"encoder.name = {section.name}: {weights.source} holds a MultiMAE of size {size or '(none usual)'}; leave "
                "it out"
            )
    statistics = {} if weights is None else weights.statistics
    return encoder_of(model, section, label, task, statistics, drop_path_rate)


def _check_dense(section: EncoderSection, label: str) -> None:
    of_multimae = {"encoder.domains": section.domains is not None, "encoder.pooling": section.pooling != "mean"}
    keys = ", ".join(key for key, is_set in of_multimae.items() if is_set)
    if keys:
        raise ConfigError(f"{keys}: {label} is a ConvNeXt V2, which reads Sentinel-2 bands; that is for a MultiMAE")


class _seeded:
    """Random weights of a seed, without touching the caller's random state."""

    def __init__(self, seed: int):
        self._seed, self._fork = seed, torch.random.fork_rng(devices=[])

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *error) -> None:
        self._fork.__exit__(*error)
