"""A MultiMAE as evaluations use it: which of its input domains it reads, as one image, and how tokens become a vector.

Shapes: N images, C channels, S image side in pixels, D features, K domains, G patches on a side.
"""

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mpmae.domains import PUBLISHED_DOMAINS, Domain, in_order
from mpmae.errors import ConfigError, DatasetError
from mpmae.eval.bands import lacking
from mpmae.eval.config import EncoderSection
from mpmae.eval.dataset import Task
from mpmae.eval.encoder_input import input_of_domains
from mpmae.eval.image_encoder import ImageEncoder, copy_weights
from mpmae.modalities import spec_of
from mpmae.models import create_model
from mpmae.models.multimae.backbone import MultiMAEBackbone, MultiMAEViT, vit_of
from mpmae.models.multimae.model import MultiMAE

_LOG = logging.getLogger(__name__)
_PATCH_SIZE, _GRID = 8, 7
POOLED = {
    "mean": "mean over the tokens of all patches with data, of all domains, and the global token",
    "global": "the global token",
}


class MultiMAEEncoder(ImageEncoder):
    """Some input domains of a MultiMAE: see `mpmae.eval.encoders.ImageEncoder`.

    The feature vector is pooled from the last block's tokens as `backbone.pooling` says; the backbone's final norm is fresh
    after pretraining and takes no part.
    """

    backbone: MultiMAEViT

    @property
    def facts(self) -> dict[str, Any]:
        """What is read and how it becomes a vector, as plain data."""
        return {"domains": [domain.name for domain in self.backbone.domains], "pooling": POOLED[self.backbone.pooling]}

    def forward(self, image: Tensor) -> Tensor:
        """Feature vectors [N, D] for prepared images [N, C, S, S], NaN where there is no data."""
        return self.backbone.forward_vector(image)

    def maps(self, image: Tensor, stages: Sequence[int] | None = None) -> list[Tensor]:
        """The maps [N, K*D, G, G] after the chosen quarters of the blocks (None: all four), domain after domain."""
        return self.backbone.forward_intermediates(image, stages)

    @property
    def decoder_method(self) -> str:
        """The `segmentation.method` whose decoder is made for its maps."""
        return "convnext"

    def trunk(self, drop_path_rate: float = 0.0) -> MultiMAEBackbone:
        """A copy of the backbone without norm and classifier."""
        like = self.backbone
        trunk = MultiMAEBackbone(
            like.domains,
            like.num_features,
            len(like.encoder),
            like.encoder[0].attn.num_heads,
            patch_size=like.patch_size,
            drop_path_rate=drop_path_rate,
            reference_quirks=like.reference_quirks,
        )
        copy_weights(like, trunk)
        return trunk.to(like.global_tokens)

    @property
    def _about(self) -> tuple:
        backbone = self.backbone
        return backbone.patch_size, backbone.pooling, backbone.reference_quirks, backbone.domains


def new_multimae(section: EncoderSection) -> MultiMAE:
    """A MultiMAE of random weights: the size of `section.name`, its patch size (8) and domains (the published ones)."""
    patch_size = section.patch_size or _PATCH_SIZE
    domains = section.domains or PUBLISHED_DOMAINS
    options = {"domains_in": domains, "domains_out": domains, "num_visible_tokens": 1}
    return create_model(section.name, patch_size=patch_size, img_size=_GRID * patch_size, **options)


def encoder_of(
    model: MultiMAE,
    section: EncoderSection,
    label: str,
    task: Task | None = None,
    statistics: dict[str, Any] | None = None,
    drop_path_rate: float = 0.0,
) -> MultiMAEEncoder:
    """The encoder of `model` for the domains of `section`, else for all whose bands `task` has (None: for all).

    statistics: of the pretraining, as `MultiMAE.input_record` gives them. Raises ConfigError for settings that the model
    does not have, DatasetError when the set has bands for no domain.
    """
    problems = _problems(section, model, label)
    if problems:
        raise ConfigError(problems)
    names = in_order(section.domains or _stored_domains(model, task))
    vit = vit_of(model, names, pooling=section.pooling, drop_path_rate=drop_path_rate)
    channels = [channel for domain in vit.domains for channel in channels_of(domain)]
    encoder_input = input_of_domains(channels, model.patch_size, statistics or {}, label)
    return MultiMAEEncoder(vit.eval(), encoder_input, label)


def channels_of(domain: Domain) -> list[tuple[str, str]]:
    """(modality, band) of each channel of a domain."""
    bands = domain.bands or spec_of(domain.modality).bands
    return [(domain.modality, band) for band in bands]


def _problems(section: EncoderSection, model: MultiMAE, label: str) -> list[str]:
    problems, known = [], tuple(model.domains_in)
    if section.bands_in is not None:
        problems.append(f"encoder.bands_in: {label} is a MultiMAE, which reads domains; use encoder.domains instead")
    if section.patch_size not in (None, model.patch_size):
        problems.append(f"encoder.patch_size = {section.patch_size}: that of {label} is {model.patch_size}; leave it out")
    unknown = [name for name in section.domains or () if name not in known]
    if unknown:
        problems.append(
            f"encoder.domains: {label} does not read {', '.join(unknown)}; its input domains are {', '.join(known)}"
        )
    if len(set(section.domains or ())) < len(section.domains or ()):
        problems.append(f"encoder.domains names a domain twice: {', '.join(section.domains)}")
    return problems


def _stored_domains(model: MultiMAE, task: Task | None) -> tuple[str, ...]:
    """The input domains whose bands the set stores; which those are is logged."""
    if task is None:
        return tuple(model.domains_in)
    absent = {name: lacking(task, channels_of(domain)) for name, domain in model.domains_in.items()}
    found = [name for name, bands in absent.items() if not bands]
    left_out = [f"{name} (no {', '.join(bands)})" for name, bands in absent.items() if bands]
    if not found:
        raise DatasetError(
            f"{task.name}: its bands {', '.join(task.band_names)} make up no input domain of the encoder; it lacks those of "
            f"{'; '.join(left_out)}. Name encoder.domains to read the nearest Sentinel-2 bands instead"
        )
    said = f"; not read: {', '.join(left_out)}" if left_out else ""
    _LOG.info("%s: the encoder reads %s, all domains whose bands are stored%s", task.name, ", ".join(found), said)
    return tuple(found)
