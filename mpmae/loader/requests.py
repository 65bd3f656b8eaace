"""Which batches a loader is asked for, in order: shared by the loaders.

Shapes: N samples of a batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mpmae.loader.order import BatchPlan, TrainOrder, evaluation_batches, evaluation_ids
from mpmae.loader.read import ShardReader

_T = TypeVar("_T")


@dataclass(frozen=True)
class BatchRequest:
    """One micro batch to build: samples int64 [N], and what `Batch` says of the global batch it is part of."""

    epoch: int
    sample_ids: np.ndarray
    num_present: dict[str, int]
    global_batch_size: int
    padding: np.ndarray | None = None


def training_requests(
    reader: ShardReader,
    modalities: tuple[str, ...],
    order: TrainOrder,
    plan: BatchPlan,
    rank: int,
    start_step: int,
    prefetch: Callable[[Sequence[int]], None] | None = None,
) -> Iterator[BatchRequest]:
    """The micro batches of a rank from step `start_step` on, `plan.num_micro_steps` per step, without end.

    prefetch: told which shards are needed next, the reader's unless given.
    """
    prefetch = prefetch or reader.prefetch
    step = start_step
    while True:
        epoch, global_batch = order.global_batch(step)
        if shards := order.shards_ahead(step):
            prefetch(shards)
        num_present = reader.num_present(global_batch, modalities)
        for micro_step in range(plan.num_micro_steps):
            yield BatchRequest(epoch, plan.share(global_batch, rank, micro_step), num_present, len(global_batch))
        step += 1


def evaluation_requests(
    reader: ShardReader,
    modalities: tuple[str, ...],
    batch_size: int,
    rank: int,
    world_size: int,
    max_samples: int | None,
) -> Iterator[BatchRequest]:
    """The batches of a rank over the evaluated set, once; the counts are those of the whole set."""
    shard_sizes = [shard.num_samples for shard in reader.manifest.shards(reader.split)]
    everyone = evaluation_ids(shard_sizes, max_samples)
    num_present = reader.num_present(everyone, modalities)
    for ids, padding in evaluation_batches(everyone, batch_size, rank, world_size):
        yield BatchRequest(0, ids, num_present, len(everyone), padding)
