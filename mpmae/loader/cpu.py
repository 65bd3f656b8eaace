"""The loader that needs no GPU: threads that read, decode and assemble micro batches ahead of the training step."""

from collections.abc import Iterable, Iterator

import numpy as np

from mpmae.in_order import in_order
from mpmae.loader.batch import Batch
from mpmae.loader.order import BatchPlan, TrainOrder
from mpmae.loader.read import ShardReader
from mpmae.loader.requests import BatchRequest, evaluation_requests, training_requests
from mpmae.loader.transform import Assembler, Augmentation, draw_views


class CpuLoader:
    """Batches of one split for one rank.

    `num_workers` threads build micro batches, `prefetch` of them ahead; order and content do not depend on either.
    reference_quirks: as in `Assembler`.
    """

    def __init__(
        self,
        reader: ShardReader,
        modalities: tuple[str, ...],
        img_size_px: int,
        *,
        seed: int,
        augmentation: Augmentation | None = None,
        num_workers: int = 2,
        prefetch: int = 4,
        reference_quirks: bool = False,
    ):
        self.reader, self.modalities = reader, modalities
        max_kept = prefetch + num_workers + 2  # queued, being built, and in use by the training step
        self._assembler = Assembler(reader, modalities, img_size_px, reference_quirks, max_kept)
        self._img_size_px, self._seed = img_size_px, seed
        self._augmentation = augmentation or Augmentation()
        self._num_workers, self._prefetch = num_workers, prefetch

    def training(self, order: TrainOrder, plan: BatchPlan, rank: int, start_step: int) -> Iterator[tuple[int, Batch]]:
        """(epoch, micro batch) from step `start_step` on, `plan.num_micro_steps` per step, without end."""
        return self._run(training_requests(self.reader, self.modalities, order, plan, rank, start_step))

    def evaluation(
        self, batch_size: int, rank: int, world_size: int, max_samples: int | None = None
    ) -> Iterator[tuple[int, Batch]]:
        """(0, batch) over the split once, centre-cropped.

        `num_present` and `global_batch_size` count the whole evaluated set, so that the shares of all batches and ranks add
        up to the set's mean loss.
        """
        return self._run(evaluation_requests(self.reader, self.modalities, batch_size, rank, world_size, max_samples))

    def batch_of(self, sample_ids: np.ndarray) -> Batch:
        """The given samples (int64 [N]) as one batch by themselves, with the views of epoch 0."""
        num_present = self.reader.num_present(sample_ids, self.modalities)
        return self._assemble(BatchRequest(0, sample_ids, num_present, len(sample_ids)))[1]

    def _run(self, requests: Iterable[BatchRequest]) -> Iterator[tuple[int, Batch]]:
        return in_order(self._assemble, requests, self._num_workers, self._prefetch)

    def _assemble(self, request: BatchRequest) -> tuple[int, Batch]:
        ids, tile_size_px = request.sample_ids, self.reader.manifest.tile_size_px
        views = draw_views(self._augmentation, self._seed, request.epoch, ids, tile_size_px, self._img_size_px)
        counts = request.num_present, request.global_batch_size
        return request.epoch, self._assembler.batch(ids, views, *counts, request.padding)
