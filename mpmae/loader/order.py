"""Which samples make up which batch: a pure function of (seed, epoch, step), the same at any world size.

Nothing here holds state: to resume, ask for the next step. An `EpochOrder` says how the samples of an epoch follow each
other, `TrainOrder` cuts that into global batches, `BatchPlan` cuts a global batch into ranks and micro steps.

Shapes: n samples of the split, B global batch size, W world size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from mpmae.counter_rng import Stream, random_bits
from mpmae.errors import ConfigError


class Window(NamedTuple):
    """Shards that a part of an epoch reads and no other part of it, ascending; how many samples they hold."""

    shards: tuple[int, ...]
    num_samples: int


class EpochOrder(Protocol):
    """How the samples of a split follow each other in an epoch. Hashable and without state."""

    @property
    def num_samples(self) -> int:
        """n."""
        ...

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """A permutation of the sample ids: [n], int32 where that is wide enough, else int64."""
        ...

    def windows(self, seed: int, epoch: int) -> list[Window]:
        """The windows of an epoch as they follow each other; none for an order that reads everywhere at any time."""
        ...


@dataclass(frozen=True)
class ExactOrder:
    """A true permutation of the split: for shards on local disks, where any read costs the same."""

    num_samples: int

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """As in `EpochOrder`."""
        return _permuted(seed, epoch, np.arange(self.num_samples, dtype=_id_dtype(self.num_samples)))

    def windows(self, seed: int, epoch: int) -> list[Window]:
        """None."""
        return []


@dataclass(frozen=True)
class WindowOrder:
    """Shards permuted per epoch, samples permuted within windows of `window_shards` shards that follow each other then.

    For remote shards: each is needed during one window of the epoch and not again. A window of all shards gives the very
    order of `ExactOrder`. shard_sizes: samples of each shard of the split.
    """

    shard_sizes: tuple[int, ...]
    window_shards: int

    @property
    def num_samples(self) -> int:
        """n."""
        return sum(self.shard_sizes)

    def windows(self, seed: int, epoch: int) -> list[Window]:
        """As in `EpochOrder`; each of `window_shards` shards but the last, which has what is left."""
        numbers = np.arange(len(self.shard_sizes))
        shards = np.argsort(random_bits(seed, Stream.WINDOW, epoch, numbers)[:, 0], kind="stable").tolist()
        groups = [sorted(shards[i : i + self.window_shards]) for i in range(0, len(shards), self.window_shards)]
        return [Window(tuple(group), sum(self.shard_sizes[shard] for shard in group)) for group in groups]

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """As in `EpochOrder`."""
        first = np.cumsum([0, *self.shard_sizes])
        ids, filled = np.empty(self.num_samples, _id_dtype(self.num_samples)), 0
        for window in self.windows(seed, epoch):
            members = np.concatenate([np.arange(first[shard], first[shard + 1]) for shard in window.shards])
            ids[filled : filled + len(members)] = _permuted(seed, epoch, members)
            filled += len(members)
        return ids


def _permuted(seed: int, epoch: int, ids: np.ndarray) -> np.ndarray:
    """The ids sorted by their random keys of the epoch."""
    return ids[np.argsort(random_bits(seed, Stream.ORDER, epoch, ids)[:, 0], kind="stable")]


def _id_dtype(num_samples: int) -> type[np.signedinteger]:
    return np.int32 if num_samples <= np.iinfo(np.int32).max else np.int64


@lru_cache(maxsize=2)
def _epoch_ids(order: EpochOrder, seed: int, epoch: int) -> np.ndarray:
    ids = order.epoch(seed, epoch)
    ids.setflags(write=False)  # shared by the cache
    return ids


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


def possible_world_sizes(global_batch_size: int, micro_batch_size: int | None) -> list[int]:
    """The world sizes, ascending, among which the global batch divides: an elastic run may go on with any of them."""
    return sorted(set(_divisors(global_batch_size // (micro_batch_size or 1))))


def _divisors(number: int) -> list[int]:
    """In sqrt(number) steps; the root of a square is twice there."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return [*small, *(number // d for d in small)]


def _nearest_divisors(number: int, size: int) -> str:
    """The divisors of `number` next to `size`, which is none: below, and above if there is one."""
    divisors = _divisors(number)
    below = max(d for d in divisors if d < size)
    above = [d for d in divisors if d > size]
    return f"{below} or {min(above)}" if above else f"{below}"


@dataclass(frozen=True)
class TrainOrder:
    """The endless sequence of global batches of a training run; each epoch's last partial batch is dropped."""

    order: EpochOrder
    global_batch_size: int
    seed: int

    def __post_init__(self):
        if self.num_samples < self.global_batch_size:
            raise ConfigError(
                f"train.global_batch_size = {self.global_batch_size}, but the training split has only "
                f"{self.num_samples} samples; use at most that many"
            )

    @property
    def num_samples(self) -> int:
        """Samples of the split."""
        return self.order.num_samples

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches of an epoch."""
        return self.num_samples // self.global_batch_size

    def global_batch(self, step: int) -> tuple[int, np.ndarray]:
        """Epoch and sample ids int64 [B] of a step (counted from 0 over the whole run)."""
        epoch, start = self._place(step)
        ids = _epoch_ids(self.order, self.seed, epoch)[start : start + self.global_batch_size]
        return epoch, ids.astype(np.int64)

    def shards_ahead(self, step: int, num_windows: int = 1) -> tuple[int, ...]:
        """The shards that a step reads and then those of the `num_windows` windows after it, also of the next epoch.

        Each once, in the order in which they are needed; empty for an exact order.
        """
        epoch, start = self._place(step)
        windows = [w for e in (epoch, epoch + 1) for w in self.order.windows(self.seed, e)]
        ends = np.cumsum([window.num_samples for window in windows])
        first, last = np.searchsorted(ends, [start, start + self.global_batch_size - 1], side="right")
        coming = windows[first : last + 1 + num_windows]
        return tuple(dict.fromkeys(shard for window in coming for shard in window.shards))

    def _place(self, step: int) -> tuple[int, int]:
        epoch, index = divmod(step, self.steps_per_epoch)
        return epoch, index * self.global_batch_size


EVALUATION_SHARDS = 16


def evaluation_ids(shard_sizes: Sequence[int], max_samples: int | None = None) -> np.ndarray:
    """The samples of an evaluation, int64, ascending: all of the split, or `max_samples` of it.

    Those are spread evenly over EVALUATION_SHARDS shards, or as few more as hold so many, which are spread evenly over the
    split: of a remote set no more than these shards are downloaded.
    """
    sizes = np.asarray(shard_sizes, np.int64)
    num_samples = int(sizes.sum())
    if max_samples is None or max_samples >= num_samples:
        return np.arange(num_samples)
    ends = np.cumsum(sizes)
    for num_shards in range(min(EVALUATION_SHARDS, len(sizes)), len(sizes) + 1):
        shards = _spread(len(sizes), num_shards)
        if sizes[shards].sum() >= max_samples:
            break
    members = np.concatenate([np.arange(ends[shard] - sizes[shard], ends[shard]) for shard in shards])
    return members[_spread(len(members), max_samples)]


def _spread(num: int, wanted: int) -> np.ndarray:
    """`wanted` different numbers below `num`, evenly spread from the first to the last: int64, ascending."""
    return np.linspace(0, num - 1, wanted).round().astype(np.int64)


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
