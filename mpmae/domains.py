"""Domains: what MultiMAE takes in and gives out, each a view of the bands of one modality; a table that needs no torch.

Source: "MultiMAE meets Earth Observation", arXiv 2505.14951; multimae-meets-eo, `domain_config.py`.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mpmae.errors import ConfigError
from mpmae.modalities import ALL_TARGETS, MODALITIES, ModalitySpec, spec_of

CLASS_STRIDE = 4
NORM_HEAD = "norm_rgb"  # no domain, but one more output: NORM_DOMAIN with each patch normalised
NORM_DOMAIN = "rgb"


@dataclass(frozen=True)
class Domain:
    """One input or output of MultiMAE.

    bands: of the modality, in the order of the channels; empty for class ids. stride: pixels of the image on a side of one
    pixel of the domain. loss: "squared", "absolute" or "classes". standardise: per sample, by
    `mpmae.models.multimae.views.standardise_truncated`. num_classes: of class ids, with one more, the last, that stands
    for no data in the input and is never a target.
    """

    name: str
    modality: str
    bands: tuple[str, ...]
    loss: Literal["squared", "absolute", "classes"] = "squared"
    stride: int = 1
    standardise: bool = False

    @property
    def num_classes(self) -> int:
        """Classes with the one for no data; 0 for a continuous domain."""
        return spec_of(self.modality).num_classes + 1 if self.loss == "classes" else 0

    @property
    def num_channels(self) -> int:
        """Values predicted per pixel: bands, or logits of the classes."""
        return self.num_classes or len(self.bands)


# Names and order are those of the published code, so that its weights find their place.
_PUBLISHED = (
    Domain("rgb", "sentinel2", ("B4", "B3", "B2")),
    Domain("depth", "aster", ("elevation",), "absolute", standardise=True),
    Domain("semseg", "esa_worldcover", (), "classes", CLASS_STRIDE),
    Domain("ired", "sentinel2", ("B5", "B6", "B7")),
    Domain("sired", "sentinel2", ("B11", "B12")),
    Domain("ebands", "sentinel2", ("B8A", "B8")),
)
PUBLISHED_DOMAINS: tuple[str, ...] = tuple(domain.name for domain in _PUBLISHED)
_TITLES = {
    "rgb": "Sentinel-2 true colour (rgb)",
    NORM_HEAD: "Sentinel-2 colour per patch (norm_rgb)",
    "depth": "Elevation (depth)",
    "semseg": "ESA WorldCover (semseg)",
    "ired": "Sentinel-2 red edge (ired)",
    "sired": "Sentinel-2 short-wave infrared (sired)",
    "ebands": "Sentinel-2 near infrared (ebands)",
}


def _of_modality(name: str) -> Domain:
    spec = spec_of(name)
    if spec.kind == "categorical":
        return Domain(name, name, (), "classes", CLASS_STRIDE)
    return Domain(name, name, spec.model_bands)


DOMAINS: dict[str, Domain] = {
    domain.name: domain
    for domain in (*_PUBLISHED, *(_of_modality(name) for name in ALL_TARGETS if spec_of(name).scope == "pixel"))
}
_LOSS_ORDER = (NORM_DOMAIN, NORM_HEAD, *PUBLISHED_DOMAINS[1:], *MODALITIES)


def domain_of(name: str) -> Domain:
    """The domain of that name: a published one, or a map modality with all of its usual bands by its own name.

    ConfigError, with the known names, for another one.
    """
    if name in DOMAINS:
        return DOMAINS[name]
    close = difflib.get_close_matches(name, DOMAINS, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else "."
    raise ConfigError(f"unknown domain {name!r}{hint} Known: {', '.join(DOMAINS)}")


def in_order(names: Sequence[str]) -> tuple[str, ...]:
    """The names in the order of the tokens, each once; names must be known."""
    return tuple(name for name in DOMAINS if name in names)


def modalities_of(names: Iterable[str]) -> tuple[str, ...]:
    """The modalities that the named domains are views of, each once; ConfigError as `domain_of`."""
    return tuple(dict.fromkeys(domain_of(name).modality for name in names))


def title_of(name: str) -> str:
    """The title of a domain, of `norm_rgb` or of a modality: of whatever a loss is named by; the name itself of others."""
    if name in _TITLES:
        return _TITLES[name]
    return MODALITIES[name].title if name in MODALITIES else name


def target_domain(name: str) -> str:
    """The domain that a target reconstructs: its own name but for `norm_rgb`."""
    return NORM_DOMAIN if name == NORM_HEAD else name


def map_modality(name: str) -> ModalitySpec | None:
    """The modality that a map shows: a domain, `norm_rgb` or a modality by its own name; None for what is no map."""
    domain = DOMAINS.get(target_domain(name))
    spec = MODALITIES.get(domain.modality if domain else name)
    return spec if spec and spec.scope == "pixel" else None


def noun_of(names: Iterable[str]) -> str:
    """What losses of these names are of: modalities, or targets if some are views of a modality."""
    return "targets" if {*PUBLISHED_DOMAINS, NORM_HEAD} & set(names) else "modalities"


def loss_order(names: Sequence[str]) -> list[str]:
    """Names of losses as people look for them: domains, `norm_rgb` behind its like, modalities, then unknown ones."""
    known = [name for name in _LOSS_ORDER if name in names]
    return known + sorted(set(names) - set(known))
