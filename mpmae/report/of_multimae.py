"""What MultiMAE says of tiles: the map of each domain in raw units, and what single inputs alone give.

Shapes: N samples, K input domains, L = G*G patches, T = K*L tokens, C bands, H side of a domain's map.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpmae.domains import NORM_HEAD, Domain
from mpmae.loader import Batch
from mpmae.modalities import MODALITIES, spec_of
from mpmae.models import MultiMAE
from mpmae.models.multimae.sampler import TokenSample
from mpmae.models.multimae.views import patches_of, truncated_statistics, view_of
from mpmae.report.data import FromInputs, MapTriple, TilePicture
from mpmae.report.units import NORM_NOTE, denormalise_patches, scale_of
from mpmae.shard_format import Manifest

_OPTICAL = "sentinel2"
_NUM_STRIPS = 2  # tiles that are shown from single inputs too
_STANDARDISED_NOTE = (
    "The model predicts a tile up to its mean and spread (targets standardised per tile); the picture borrows both from the "
    "target."
)


class MultiMAEPictures:
    """Tiles through a MultiMAE."""

    def __init__(self, model: MultiMAE, manifest: Manifest, seed: int):
        self._model, self._manifest, self._seed = model, manifest, seed
        self._domains = {**model.domains_in, **model.targets}

    @property
    def facts(self) -> dict[str, str]:
        """What of the model the report names besides its name."""
        model = self._model
        return {
            "inputs": ", ".join(model.domains_in),
            "outputs": ", ".join(model.targets),
            "visible tokens": f"{model.num_visible} of {model.num_tokens}",
        }

    def tiles(self, batch: Batch, facts: Sequence[Mapping[str, Any]]) -> list[TilePicture]:
        """A picture for each tile of the batch; `facts` are the picture's fields that do not come from the model."""
        model = self._model
        out = model(batch, model.draw(self._seed, 0, batch.sample_ids), return_predictions=True)
        visible = self._visible(out.tokens)
        levels = [each["product_level"] for each in facts]
        maps = [
            {name: self._map(name, i, level, batch, out.predictions) for name in self._domains}
            for i, level in enumerate(levels)
        ]
        strips = self._strips(batch, levels)
        return [
            TilePicture(
                **facts[i],
                visible={name: visible[domain.name][i] for name, domain in self._domains.items()},
                patch_size_px=model.patch_size,
                maps=maps[i],
                inputs=tuple(model.domains_in),
                from_inputs=strips.get(i, ()),
            )
            for i in range(len(batch))
        ]

    def _visible(self, sample: TokenSample) -> dict[str, np.ndarray]:
        """Domain -> which of its patches the encoder saw, bool [N, G, G]; none of a domain that is no input."""
        model, side = self._model, self._model.num_patches_side
        real = torch.ones_like(sample.index, dtype=torch.bool) if sample.real is None else sample.real
        seen = torch.zeros(len(real), model.num_tokens, dtype=torch.bool).scatter(1, sample.index, real)
        seen = seen.view(len(real), -1, side, side)
        none = np.zeros((len(real), side, side), bool)
        return dict.fromkeys((domain.name for domain in self._domains.values()), none) | {
            name: seen[:, k].numpy() for k, name in enumerate(model.domains_in)
        }

    def _maps(self, names: Iterable[str], *where: Any) -> dict[str, MapTriple]:
        return {name: self._map(name, *where) for name in names}

    def _map(self, name: str, i: int, level: str, batch: Batch, predictions: Mapping[str, Tensor]) -> MapTriple:
        """A domain of sample `i`; `predictions` [N, C, H, H], without those that are not reconstructed."""
        domain = self._domains[name]
        prediction = predictions[name][i].float() if name in predictions else None
        if domain.loss == "classes":
            view = view_of(domain, _rows(batch, [i]), None, torch.float32)
            ids = torch.where(view.valid[0], view.values[0], -1).numpy()
            likeliest = None if prediction is None else prediction[: domain.num_classes - 1].argmax(0).numpy()
            return MapTriple(spec_of(domain.modality).bands, ids, likeliest, view.valid[0].numpy())
        order = self._order(domain)
        values, valid = (part[domain.modality][i, order] for part in (batch.values, batch.valid))
        valid = valid & values.isfinite()
        target = torch.where(valid, values, 0)
        scale, note = scale_of(self._manifest, domain.modality, level, order), ""
        if prediction is not None:
            ranked = torch.ones_like(valid) if self._model.reference_quirks else valid
            if domain.standardise:
                mean, deviation = truncated_statistics(target[None], ranked[None])
                prediction, note = prediction * deviation + mean, _STANDARDISED_NOTE
            elif name == NORM_HEAD:
                prediction, note = denormalise_patches(prediction, target, ranked, self._model.patch_size), NORM_NOTE
            prediction = scale.raw(prediction.numpy())
        return MapTriple(domain.bands, scale.raw(target.numpy()), prediction, valid.numpy(), note)

    def _order(self, domain: Domain) -> list[int]:
        """Where the batch's tensor of the modality has the domain's bands."""
        return [self._model.bands_available[domain.modality].index(band) for band in domain.bands]

    def _strips(self, batch: Batch, levels: Sequence[str]) -> dict[int, list[FromInputs]]:
        """What single inputs give for a few tiles, those with data in the most domains, by sample."""
        available = self._available(batch)
        chosen = sorted(range(len(batch)), key=lambda i: -sum(bool(each[i].any()) for each in available.values()))
        chosen = sorted(chosen[:_NUM_STRIPS])
        part, strips = _rows(batch, chosen), {i: [] for i in chosen}
        for title, names in self._sources().items():
            numbers = [list(self._model.domains_in).index(name) for name in names]
            index = torch.cat([torch.arange(self._model.num_patches) + k * self._model.num_patches for k in numbers])
            real = torch.cat([available[name][chosen] for name in names], dim=1)
            out = self._model(part, TokenSample(index.expand(len(chosen), -1), real), return_predictions=True)
            outputs = [name for name in self._model.targets if name != NORM_HEAD and name not in names]
            for row, i in enumerate(chosen):
                if real[row].any():
                    maps = self._maps(outputs, row, levels[i], part, out.predictions)
                    strips[i].append(FromInputs(title, names, {name: each.prediction for name, each in maps.items()}))
        return strips

    def _available(self, batch: Batch) -> dict[str, Tensor]:
        """Input domain -> which of its patches have any data, bool [N, L]."""
        found = {}
        for name, domain in self._model.domains_in.items():
            order = None if domain.loss == "classes" else torch.tensor(self._order(domain))
            valid = view_of(domain, batch, order, torch.float32, self._model.reference_quirks).valid
            valid = valid[:, None] if domain.loss == "classes" else valid
            found[name] = patches_of(valid, self._model.num_patches_side).any(2)
        return found

    def _sources(self) -> dict[str, tuple[str, ...]]:
        """Inputs to look at alone, by title: rgb or else the first, all of Sentinel-2, each of the other modalities."""
        optical = tuple(name for name, domain in self._model.domains_in.items() if domain.modality == _OPTICAL)
        sources = {f"{optical[0]} alone": optical[:1]} if optical else {}
        if len(optical) > 1:
            sources[f"All of {MODALITIES[_OPTICAL].title}"] = optical
        return sources | {f"{name} alone": (name,) for name in self._model.domains_in if name not in optical}


def _rows(batch: Batch, rows: Sequence[int]) -> Batch:
    """These samples of a batch."""
    parts = {part: {name: each[rows] for name, each in getattr(batch, part).items()} for part in ("values", "valid")}
    return replace(batch, **parts, sample_ids=batch.sample_ids[rows], padding=batch.padding[rows])
