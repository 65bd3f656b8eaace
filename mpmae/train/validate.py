"""Validation losses beside those of the trivial predictor, which knows only means and class frequencies.

Shapes: N samples, K classes, P pixels of a patch.
"""

from collections.abc import Callable
from typing import Any

import torch

from mpmae.config import RunConfig
from mpmae.engine.base import Engine
from mpmae.models import MPMAE, MultiMAE
from mpmae.train.data import Loader

BATCH_SIZE = 32


class Validator:
    """Mean losses over a split, the same at any world size up to rounding.

    `validation` reads the split to judge on, `training` the one whose class frequencies the trivial predictor uses.
    `on_batch` is called after every batch.
    """

    def __init__(
        self, engine: Engine, validation: Loader, training: Loader, config: RunConfig, on_batch: Callable[[], None]
    ):
        self._engine, self._validation, self._training, self._on_batch = engine, validation, training, on_batch
        self._seed, self._max_samples = config.train.seed, config.train.val_samples
        self._model: MPMAE | MultiMAE = engine.module
        self._constants: dict[str, torch.Tensor] | None = None

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """{num_samples, loss, losses, trivial}; the two last by target, None for one that no validation tile has."""
        if self._constants is None:
            self._constants = self._constant_predictions()
        names = list(self._model.target_modalities)
        sums = torch.zeros(2, len(names) + 1, dtype=torch.float64, device=self._engine.device)
        num_samples, num_present = 0, {}
        self._model.eval()
        for epoch, batch in self._batches(self._validation):
            drawn = self._model.draw(self._seed, epoch, batch.sample_ids).to(self._engine.device)
            batch = batch.to(self._engine.device)
            out = self._engine.forward(batch, drawn)
            trivial = self._model.constant_shares(batch, drawn, self._constants)
            sums[0] += torch.stack([out.loss, *(out.losses[name] for name in names)])
            sums[1, 1:] += torch.stack([trivial[name] for name in names])
            num_samples, num_present = batch.global_batch_size, batch.num_present
        (loss, *losses), (_, *trivials) = self._engine.sum_over_ranks(sums).tolist()
        modality_of = self._model.target_modalities
        absent = dict.fromkeys((name for name in names if not num_present.get(modality_of[name])), None)
        return {
            "num_samples": num_samples,
            "loss": loss if num_samples else None,
            "losses": dict(zip(names, losses, strict=True)) | absent,
            "trivial": dict(zip(names, trivials, strict=True)) | absent,
        }

    def _batches(self, loader: Loader):
        for batch in loader.evaluation(BATCH_SIZE, self._engine.rank, self._engine.world_size, self._max_samples):
            yield batch
            self._on_batch()

    def _constant_predictions(self) -> dict[str, torch.Tensor]:
        """Per target the constant that the trivial predictor says: 0 (the mean), or log frequencies of the classes [K]."""
        counts = {name: torch.zeros(num, dtype=torch.float64) for name, num in self._model.class_targets.items()}
        for _, batch in self._batches(self._training) if counts else ():
            for name in counts:
                ids = self._model.class_ids(batch.to(self._engine.device), name)[~batch.padding.to(self._engine.device)]
                counts[name] += torch.bincount(ids[ids >= 0].flatten(), minlength=len(counts[name])).cpu()
        constants = {name: torch.zeros(1, device=self._engine.device) for name in self._model.target_modalities}
        for name, count in counts.items():
            total = 1 + self._engine.sum_over_ranks(count.to(self._engine.device))  # no class is impossible
            constants[name] = (total / total.sum()).log().float()
        return constants
