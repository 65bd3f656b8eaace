"""Domains: what MultiMAE takes in and gives out, each a view of the bands of one modality in a batch.

Shapes: N samples, C channels, S image side in pixels, H side of a domain's map (S / its stride).
Source: "MultiMAE meets Earth Observation", arXiv 2505.14951; multimae-meets-eo, `domain_config.py`, `dataset_folder.py`.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mpmae.errors import ConfigError
from mpmae.loader.batch import Batch
from mpmae.modalities import ALL_TARGETS, spec_of

CLASS_STRIDE = 4
DEPTH_EPS = 1e-6


@dataclass(frozen=True)
class Domain:
    """One input or output of MultiMAE.

    bands: of the modality, in the order of the channels; empty for class ids. stride: pixels of the image on a side of one
    pixel of the domain. loss: "squared", "absolute" or "classes". standardise: per sample, by `standardise_truncated`.
    num_classes: of class ids, with one more, the last, that stands for no data in the input and is never a target.
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


def _of_modality(name: str) -> Domain:
    spec = spec_of(name)
    if spec.kind == "categorical":
        return Domain(name, name, (), "classes", CLASS_STRIDE)
    return Domain(name, name, spec.model_bands)


DOMAINS: dict[str, Domain] = {
    domain.name: domain
    for domain in (*_PUBLISHED, *(_of_modality(name) for name in ALL_TARGETS if spec_of(name).scope == "pixel"))
}


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


class View(NamedTuple):
    """A domain of a batch.

    values: [N, C, H, H], finite, 0 where there is no data; or class ids int64 [N, H, H], the last class where there is none.
    valid: bool, the shape of the values.
    """

    values: Tensor
    valid: Tensor


def view_of(domain: Domain, batch: Batch, bands: Tensor | None, dtype: torch.dtype, quirks: bool = False) -> View:
    """The domain's values and validity in a batch.

    bands: positions of the domain's bands in the batch's tensor; None when it holds just these. dtype: of the values.
    A class map is taken at the pixel next to the middle of each cell of `stride` pixels.
    quirks: everything is valid; no data is class 0, and the depth's truncated statistics count it; class ids are averaged
    over the four middle pixels of a cell and cut to whole numbers.
    """
    values, valid = batch.values[domain.modality], batch.valid[domain.modality]
    if domain.loss == "classes":
        return _class_view(domain, values[:, 0], valid[:, 0], quirks)
    if bands is not None:
        values, valid = (t.index_select(1, bands) for t in (values, valid))
    valid = valid & values.isfinite()
    values = torch.where(valid, values, 0).to(dtype)
    if quirks:
        valid = torch.ones_like(valid)
    if domain.standardise:
        values = standardise_truncated(values, valid)
    return View(values, valid)


def _class_view(domain: Domain, ids: Tensor, valid: Tensor, quirks: bool) -> View:
    step = domain.stride
    if quirks:
        known = torch.where(valid, ids, 0).clamp(min=0)
        resized = F.interpolate(known[:, None].float(), scale_factor=1 / step, mode="bilinear", align_corners=False)
        return View(resized[:, 0].long(), torch.ones_like(resized[:, 0], dtype=torch.bool))
    middle = slice(step // 2, None, step)
    ids, valid = (t[:, middle, middle] for t in (ids, valid))
    valid = valid & (ids >= 0)
    return View(torch.where(valid, ids, domain.num_classes - 1), valid)


def standardise_truncated(values: Tensor, valid: Tensor) -> Tensor:
    """`values` [N, C, H, H] per sample minus the mean over sqrt(variance + 1e-6) of its values between 10 % and 90 %.

    Only values marked in `valid` (bool) are ranked; the others come out as 0. The variance is the unbiased one.
    Source: multimae-meets-eo, `engine_pretraining.py`.
    """
    flat, present = values.flatten(1), valid.flatten(1)
    ranked = torch.where(present, flat, torch.inf).sort(dim=1).values
    count = present.sum(1, keepdim=True)
    first, end = count // 10, torch.maximum(9 * count // 10, count // 10 + (count > 0))
    rank = torch.arange(flat.shape[1], device=flat.device)
    inside = (rank >= first) & (rank < end)
    ranked, num = torch.where(inside, ranked, 0), (end - first).clamp(min=1)
    mean = ranked.sum(1, keepdim=True) / num
    square = torch.where(inside, ranked - mean, 0).square().sum(1, keepdim=True)
    deviation = (square / (num - 1).clamp(min=1) + DEPTH_EPS).sqrt()
    return torch.where(valid, ((flat - mean) / deviation).view_as(values), 0)


def patches_of(values: Tensor, side: int) -> Tensor:
    """[N, L, C*P*P], channel slowest, of the `side` x `side` = L patches of a map [N, C, H, H], P = H / side."""
    num, channels, height, _ = values.shape
    patch = height // side
    grid = values.reshape(num, channels, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
    return grid.reshape(num, side * side, channels * patch * patch)


def map_of(patches: Tensor, num_channels: int, side: int) -> Tensor:
    """The map [N, C, H, H] of its patches [N, L, C*P*P]: the inverse of `patches_of`."""
    patch = int((patches.shape[2] // num_channels) ** 0.5)
    grid = patches.reshape(len(patches), side, side, num_channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(len(patches), num_channels, side * patch, side * patch)
