"""Which samples make up which batch: a pure function of (seed, epoch, step), the same at any world size.

Nothing here holds state: to resume, ask for the next step. `exact` order is a true permutation of the split per epoch.

Shapes: B global batch size, W world size.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mpmae.counter_rng import Stream, random_bits
from mpmae.errors import ConfigError


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The permutation of a split for one epoch: int64 [num_samples]."""
    keys = random_bits(seed, Stream.ORDER, epoch, np.arange(num_samples))[:, 0]
    order = np.argsort(keys, kind="stable")
    order.setflags(write=False)  # shared by the cache
    return order


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut: B = micro_batch_size x num_micro_steps x world_size."""

    global_batch_size: int
    micro_batch_size: int
    num_micro_steps: int
    world_size: int

    def share(self, global_batch: np.ndarray, rank: int, micro_step: int) -> np.ndarray:
        """The samples of one rank and micro step: int64 [micro_batch_size]."""
        start = (rank * self.num_micro_steps + micro_step) * self.micro_batch_size
        return global_batch[start : start + self.micro_batch_size]


def plan_batches(global_batch_size: int, micro_batch_size: int | None, world_size: int) -> BatchPlan:
    """The cut of a global batch; without a micro batch size there is no accumulation.

    Raises ConfigError when the sizes do not divide, naming the nearest ones that do.
    """
    per_rank, rest = divmod(global_batch_size, world_size)
    if rest:
        raise ConfigError(
            f"train.global_batch_size = {global_batch_size} does not divide among {world_size} ranks; "
            f"use {per_rank * world_size or world_size} or {(per_rank + 1) * world_size}"
        )
    micro = micro_batch_size or per_rank
    if per_rank % micro:
        raise ConfigError(
            f"train.micro_batch_size = {micro} does not divide a rank's part of the global batch "
            f"({global_batch_size} / {world_size} ranks = {per_rank}); use {_nearest_divisors(per_rank, micro)}"
        )
    return BatchPlan(global_batch_size, micro, per_rank // micro, world_size)


def _nearest_divisors(number: int, size: int) -> str:
    """The divisors of `number` next to `size`, which is none: below, and above if there is one. sqrt(number) steps."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = [*small, *(number // d for d in small)]
    below = max(d for d in divisors if d < size)
    above = [d for d in divisors if d > size]
    return f"{below} or {min(above)}" if above else f"{below}"


@dataclass(frozen=True)
class TrainOrder:
    """The endless sequence of global batches of a training run; each epoch's last partial batch is dropped."""

    num_samples: int
    global_batch_size: int
    seed: int

    def __post_init__(self):
        if self.num_samples < self.global_batch_size:
            raise ConfigError(
                f"train.global_batch_size = {self.global_batch_size}, but the training split has only "
                f"{self.num_samples} samples; use at most that many"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches of an epoch."""
        return self.num_samples // self.global_batch_size

    def global_batch(self, step: int) -> tuple[int, np.ndarray]:
        """Epoch and sample ids int64 [B] of a step (counted from 0 over the whole run)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.seed, epoch, self.num_samples)
        return epoch, order[index * self.global_batch_size : (index + 1) * self.global_batch_size]


def evaluation_ids(num_samples: int, max_samples: int | None = None) -> np.ndarray:
    """The samples of an evaluation, int64: all of the split, or `max_samples` spread evenly over it."""
    if max_samples is None or max_samples >= num_samples:
        return np.arange(num_samples)
    return np.linspace(0, num_samples - 1, max_samples).round().astype(np.int64)


def evaluation_batches(
    sample_ids: np.ndarray, batch_size: int, rank: int, world_size: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """A rank's evaluation batches, (sample ids int64 [batch_size], padding bool [batch_size]) each.

    Every rank gets the same number of batches: missing places repeat the first sample and are marked as padding.
    """
    stride = batch_size * world_size
    num_batches = -(-len(sample_ids) // stride)
    padded = np.full(num_batches * stride, sample_ids[0] if len(sample_ids) else 0)
    padded[: len(sample_ids)] = sample_ids
    padding = np.arange(len(padded)) >= len(sample_ids)
    return [
        (padded[start : start + batch_size], padding[start : start + batch_size])
        for start in range(rank * batch_size, len(padded), stride)
    ]
