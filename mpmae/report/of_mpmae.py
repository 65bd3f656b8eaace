"""What MP-MAE says of tiles: its predictions as maps and vectors in raw units, beside the targets.

Shapes: C bands, G patches per side, p patch side in pixels, H = G * p image side.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mpmae.loader import Batch
from mpmae.masking import visible_bool
from mpmae.modalities import MODALITIES
from mpmae.models import MPMAE
from mpmae.report.data import ClassGuess, MapTriple, TilePicture, VectorPair
from mpmae.report.units import NORM_NOTE, Scale, denormalise_patches, scale_of
from mpmae.shard_format import Manifest

_NUM_GUESSES = 3
_TRUE_COLOUR = {"B4", "B3", "B2"}


class MPMAEPictures:
    """Tiles through an MP-MAE."""

    def __init__(self, model: MPMAE, manifest: Manifest, seed: int):
        self._model, self._manifest, self._seed = model, manifest, seed

    @property
    def facts(self) -> dict[str, str]:
        """What of the model the report names besides its name: nothing."""
        return {}

    def tiles(self, batch: Batch, facts: Sequence[Mapping[str, Any]]) -> list[TilePicture]:
        """A picture for each tile of the batch; `facts` are the picture's fields that do not come from the model."""
        model = self._model
        visible = model.draw(self._seed, 0, batch.sample_ids)
        out = model(batch, visible, return_predictions=True)
        shown = visible_bool(visible, model.num_patches).unflatten(1, (model.num_patches_side, -1)).numpy()
        return [self._tile(i, batch, out.predictions, shown[i], each) for i, each in enumerate(facts)]

    def _tile(
        self, i: int, batch: Batch, predictions: dict[str, torch.Tensor], shown: np.ndarray, facts: Mapping[str, Any]
    ) -> TilePicture:
        level = facts["product_level"]
        maps, vectors = {}, {}
        if "sentinel2" not in predictions:
            values, valid = batch.values["sentinel2"][i], batch.valid["sentinel2"][i]
            maps["sentinel2"] = self._with_input_bands(None, level, values, valid)
        for name, prediction in predictions.items():
            values, valid = batch.values[name][i], batch.valid[name][i]
            if MODALITIES[name].scope == "pixel":
                maps[name] = self._map(name, level, prediction[i], values, valid)
            elif MODALITIES[name].kind == "categorical":
                vectors[name] = _guess(name, prediction[i], values)
            else:
                scale, names = self._scale(name, level), self._model.bands_out[name]
                order = [MODALITIES[name].bands.index(band) for band in names]
                pair = scale.raw(values.numpy())[order], scale.raw(_spread(prediction[i].numpy(), order, len(values)))[order]
                vectors[name] = VectorPair(names, *pair, valid.numpy()[order])
        return TilePicture(**facts, visible=shown, patch_size_px=self._model.patch_size, maps=maps, vectors=vectors)

    def _map(self, name: str, level: str, prediction: torch.Tensor, values: torch.Tensor, valid: torch.Tensor) -> MapTriple:
        bands = self._model.bands_out[name]
        channels = MODALITIES[name].num_classes or len(bands)
        image = unpatch(prediction.float(), channels, self._model.patch_size)
        if MODALITIES[name].kind == "categorical":
            return MapTriple(bands, values[0].numpy(), image.argmax(0).numpy(), valid[0].numpy())
        order = [self._model.bands_available[name].index(band) for band in bands]
        scale = self._scale(name, level, order)
        target, all_valid, valid = values[order], valid, valid[order]
        note = ""
        if name == "sentinel2" and self._model.norm_pix_loss:
            image, note = denormalise_patches(image, target, valid, self._model.patch_size), NORM_NOTE
        triple = MapTriple(bands, scale.raw(target.numpy()), scale.raw(image.numpy()), valid.numpy(), note)
        if name == "sentinel2" and not set(bands) >= _TRUE_COLOUR:
            return self._with_input_bands(triple, level, values, all_valid)
        return triple

    def _with_input_bands(
        self, triple: MapTriple | None, level: str, values: torch.Tensor, valid: torch.Tensor
    ) -> MapTriple:
        """`triple` of Sentinel-2 (None: nothing of it is reconstructed) with the other bands that the encoder read."""
        available = self._model.bands_available["sentinel2"]
        bands = tuple(band for band in self._model.bands_in if triple is None or band not in triple.bands)
        order = [available.index(band) for band in bands]
        target = self._scale("sentinel2", level, order).raw(values[order].numpy())
        added = MapTriple(bands, target, np.full_like(target, np.nan), valid[order].numpy(), input_only=bands)
        if triple is None:
            return added
        parts = (np.concatenate([getattr(x, part) for x in (triple, added)]) for part in ("target", "prediction", "valid"))
        return MapTriple(triple.bands + bands, *parts, triple.note, bands)

    def _scale(self, name: str, level: str, order: Sequence[int] | None = None) -> Scale:
        return scale_of(self._manifest, name, level, order)


def unpatch(prediction: torch.Tensor, num_channels: int, patch_size: int) -> torch.Tensor:
    """[C, H, H] from a prediction [p*p*C, G, G] whose channel is (row*p + column)*C + c."""
    side = prediction.shape[-1] * patch_size
    split = prediction.unflatten(0, (patch_size, patch_size, num_channels))  # row, column, C, G, G
    return split.permute(2, 3, 0, 4, 1).reshape(num_channels, side, side)


def _guess(name: str, logits: torch.Tensor, target: torch.Tensor) -> ClassGuess:
    label = MODALITIES[name].title.lower()
    best = logits.float().softmax(0).topk(min(_NUM_GUESSES, len(logits)))
    top = [(f"{label} {index}", float(p)) for p, index in zip(best.values, best.indices.tolist(), strict=True)]
    return ClassGuess(f"{label} {int(target)}" if target >= 0 else None, top)


def _spread(values: np.ndarray, positions: list[int], length: int) -> np.ndarray:
    whole = np.zeros(length, values.dtype)
    whole[positions] = values
    return whole
