"""Encoders as evaluations use them: images in, feature vectors or maps out, whatever the model behind.

Shapes: N images, B input bands, S image side in pixels, D features, C_s channels and h_s sites on a side of stage s.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mpmae.errors import ConfigError
from mpmae.eval.config import EncoderSection
from mpmae.eval.encoder_input import EncoderInput, statistics_by_level
from mpmae.modalities import spec_of
from mpmae.models import ConvNeXtV2, create_encoder
from mpmae.models.interop import Weights, as_weights, describe

RANDOM_INIT = "random init"
_SIZE_PREFIX = "convnextv2_"


class ImageEncoder(nn.Module):
    """A dense ConvNeXt V2 with what it takes as input.

    backbone: without a classifier. input: see `EncoderInput`. label: what it is, for tables. The feature vector is the mean
    of the last stage's map over its sites: the backbone's final norm follows the pooling and is fresh after pretraining, so
    it takes no part.
    """

    def __init__(self, backbone: ConvNeXtV2, encoder_input: EncoderInput, label: str):
        super().__init__()
        self.backbone, self.input, self.label = backbone, encoder_input, label

    @property
    def num_features(self) -> int:
        """D."""
        return self.backbone.num_features

    def forward(self, image: Tensor) -> Tensor:
        """Feature vectors [N, D] for prepared images [N, B, S, S]."""
        return self.backbone.forward_features(image).mean((2, 3))

    def maps(self, image: Tensor, stages: Sequence[int] | None = None) -> list[Tensor]:
        """The maps [N, C_s, h_s, h_s] of the chosen stages (None: all four), finest first."""
        return self.backbone.forward_intermediates(image, stages, intermediates_only=True)

    def fingerprint(self) -> str:
        """A hash of weights and input, under which features can be kept."""
        digest = hashlib.sha256(repr((self.backbone.patch_size, self.backbone.stem_padding, self.input)).encode())
        for name, value in self.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().to("cpu", torch.float32).numpy().tobytes())
        return digest.hexdigest()


def open_encoder(section: EncoderSection, seed: int = 0, drop_path_rate: float = 0.0) -> ImageEncoder:
    """The encoder of a checkpoint, or of the same architecture with random weights drawn from `seed`.

    Raises ConfigError, or CheckpointError when the weights cannot be read or name no bands.
    """
    weights = None if section.checkpoint is None else as_weights(section.checkpoint)
    return build_encoder(section, weights, seed, drop_path_rate)


def random_twin(section: EncoderSection, seed: int = 0, drop_path_rate: float = 0.0) -> ImageEncoder:
    """The architecture, bands and statistics of `open_encoder`, with random weights: what pretraining has to beat."""
    if section.checkpoint is None:
        return open_encoder(section, seed, drop_path_rate)
    weights = as_weights(section.checkpoint)
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
    section: EncoderSection, weights: Weights | None, seed: int = 0, drop_path_rate: float = 0.0
) -> ImageEncoder:
    """As `open_encoder`, with the weights given."""
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
    label = RANDOM_INIT if weights is None else str(section.checkpoint or weights.source)
    return ImageEncoder(backbone.eval(), encoder_input, label)


class _seeded:
    """Random weights of a seed, without touching the caller's random state."""

    def __init__(self, seed: int):
        self._seed, self._fork = seed, torch.random.fork_rng(devices=[])

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *error) -> None:
        self._fork.__exit__(*error)
