"""The loader that needs no GPU: threads that read, decode and assemble micro batches ahead of the training step."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from mpmae.loader.batch import Batch
from mpmae.loader.order import BatchPlan, TrainOrder, evaluation_batches, evaluation_ids
from mpmae.loader.read import ShardReader
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

        def jobs() -> Iterator[Callable[[], tuple[int, Batch]]]:
            step = start_step
            while True:
                epoch, global_batch = order.global_batch(step)
                if ahead := order.shards_ahead(step):
                    self.reader.prefetch(ahead)
                num_present = self.reader.num_present(global_batch, self.modalities)
                for micro_step in range(plan.num_micro_steps):
                    ids = plan.share(global_batch, rank, micro_step)
                    yield self._job(epoch, ids, num_present, len(global_batch))
                step += 1

        return self._run(jobs())

    def evaluation(
        self, batch_size: int, rank: int, world_size: int, max_samples: int | None = None
    ) -> Iterator[tuple[int, Batch]]:
        """(0, batch) over the split once, centre-cropped.

        `num_present` and `global_batch_size` count the whole evaluated set, so that the shares of all batches and ranks add
        up to the set's mean loss.
        """
        everyone = evaluation_ids(len(self.reader), max_samples)
        num_present = self.reader.num_present(everyone, self.modalities)
        batches = evaluation_batches(everyone, batch_size, rank, world_size)
        return self._run(self._job(0, ids, num_present, len(everyone), padding) for ids, padding in batches)

    def batch_of(self, sample_ids: np.ndarray) -> Batch:
        """The given samples (int64 [N]) as one batch by themselves, with the views of epoch 0."""
        num_present = self.reader.num_present(sample_ids, self.modalities)
        return self._job(0, sample_ids, num_present, len(sample_ids))()[1]

    def _job(
        self, epoch: int, ids: np.ndarray, num_present: dict[str, int], total: int, padding: np.ndarray | None = None
    ) -> Callable[[], tuple[int, Batch]]:
        def assemble() -> tuple[int, Batch]:
            tile_size_px = self.reader.manifest.tile_size_px
            views = draw_views(self._augmentation, self._seed, epoch, ids, tile_size_px, self._img_size_px)
            return epoch, self._assembler.batch(ids, views, num_present, total, padding)

        return assemble

    def _run(self, jobs: Iterable[Callable[[], tuple[int, Batch]]]) -> Iterator[tuple[int, Batch]]:
        pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="loader")
        pending: deque[Future] = deque()
        try:
            for job in jobs:
                pending.append(pool.submit(job))
                if len(pending) > self._prefetch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
