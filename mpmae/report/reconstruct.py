"""A few tiles of a split through a model, as pictures of what it saw, said and should have said."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from mpmae.config import RunConfig
from mpmae.loader import Batch, ShardReader
from mpmae.models import MPMAE, MultiMAE
from mpmae.report.data import TilePicture
from mpmae.report.of_mpmae import MPMAEPictures
from mpmae.report.of_multimae import MultiMAEPictures
from mpmae.train.data import cpu_loader


class Pictures(Protocol):
    """How the predictions of one family of models become pictures; as in `MPMAEPictures` and `MultiMAEPictures`."""

    facts: dict[str, str]

    def tiles(self, batch: Batch, facts: Sequence[Mapping[str, Any]]) -> list[TilePicture]:
        """A picture for each tile of the batch; `facts` are the picture's fields that do not come from the model."""
        ...


_FAMILIES = {MPMAE: MPMAEPictures, MultiMAE: MultiMAEPictures}


class Reconstructor:
    """Runs tiles of a split through a model and brings targets and predictions back to raw units.

    facts: what there is to say of the model besides its name, label -> text.
    """

    def __init__(self, model: MPMAE | MultiMAE, reader: ShardReader, config: RunConfig):
        self._modalities, self._reader, self._config = model.modalities, reader, config
        self._pictures: Pictures = _FAMILIES[type(model)](model, reader.manifest, config.train.seed)
        self.facts = self._pictures.facts

    @torch.no_grad()
    def tiles(self, num_tiles: int) -> list[TilePicture]:
        """`num_tiles` tiles of the split, spread over those with the most modalities."""
        chosen = self._choose(num_tiles)
        if not len(chosen):
            return []
        loader = cpu_loader(self._config, self._reader, training=False, modalities=self._modalities)
        return self._pictures.tiles(loader.batch_of(chosen), [self._facts(sample_id) for sample_id in chosen])

    def _choose(self, num_tiles: int) -> np.ndarray:
        bits = np.array([self._reader.manifest.modalities.index(name) for name in self._modalities], np.uint64)
        present = (self._reader.index["presence"][:, None] >> bits & np.uint64(1)).sum(1).astype(int)
        best = np.argsort(-present, kind="stable")[: 4 * num_tiles]
        return np.sort(best[np.linspace(0, len(best) - 1, min(num_tiles, len(best))).round().astype(int)])

    def _facts(self, sample_id: int) -> dict[str, Any]:
        """Fields of a `TilePicture` that are the tile's own."""
        record = self._reader.scalars(int(sample_id))
        return {
            "tile_id": record["tile_id"].decode(errors="replace"),
            "product_level": record["product_level"].decode(),
            "split": self._reader.split,
            "lat": _degrees(record, "lat"),
            "lon": _degrees(record, "lon"),
        }


def _degrees(record: np.void, name: str) -> float | None:
    """The angle that a (sin, cos) field holds, in degrees; None where the set lacks it."""
    if name not in record.dtype.names or not np.isfinite(record[name]).all():
        return None
    sine, cosine = map(float, record[name])
    return math.degrees(math.atan2(sine, cosine))
