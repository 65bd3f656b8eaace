"""Samples of a labelled set as training takes them: read in threads, prepared once, in an order that is a pure function.

Shapes: B input bands, S image side in pixels, T windows of an image (1 unless it is cut up), M windows of a batch.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpmae.counter_rng import Stream, random_bits
from mpmae.eval.dataset import LabelledSet
from mpmae.in_order import in_order

_WINDOW_BITS = 12
Prepare = Callable[[np.ndarray, np.ndarray], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Example:
    """One sample, prepared. index: in its set. images: [T, B, S, S]. targets: [T, ...]. label: as the set gives it."""

    index: int
    images: Tensor
    targets: Tensor
    label: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Windows of several examples on the device.

    images: float32 [M, B, S, S]. targets: [M, ...]. keys: int64 [M], one number per sample and window, from which random
    augmentation is drawn so that it does not depend on the batch or the rank.
    """

    images: Tensor
    targets: Tensor
    keys: np.ndarray


class Examples:
    """The examples of a labelled set; what fits into `cache_bytes` is kept once it is prepared.

    num_workers: threads that read and prepare; 0: the caller's own.
    """

    def __init__(self, dataset: LabelledSet, num_workers: int = 2, cache_bytes: int = 0):
        self.dataset, self._num_workers = dataset, num_workers
        self._kept: dict[int, Example] = {}
        self._bytes_left, self._lock = cache_bytes, threading.Lock()

    def read(self, prepare: Prepare, pieces: Sequence[np.ndarray]) -> Iterator[list[Example]]:
        """The examples of each piece (indices, may be none), in order and read ahead. Raises DatasetError.

        prepare: (image [B_stored, H, W], label) -> (images, targets) of an Example. It must give the same for a sample
        every time, whatever run it belongs to: of what is kept, it is not asked again.
        """

        def example(index: int) -> Example:
            return self._example(prepare, index)

        indices = [int(index) for piece in pieces for index in piece]
        if self._num_workers:
            depth = max([2 * self._num_workers, *(2 * len(piece) for piece in pieces)])
            examples = in_order(example, indices, self._num_workers, depth)
        else:
            examples = (example(index) for index in indices)
        with contextlib.closing(examples):
            for piece in pieces:
                yield [next(examples) for _ in piece]

    def _example(self, prepare: Prepare, index: int) -> Example:
        if index in self._kept:
            return self._kept[index]
        label = self.dataset.label(index)
        images, targets = prepare(self.dataset.image(index), label)
        assert len(images) == len(targets) < 1 << _WINDOW_BITS, "as many targets as windows"
        example = Example(index, images, targets, label)
        size = images.nbytes + targets.nbytes + np.asarray(label).nbytes
        with self._lock:
            if size <= self._bytes_left and index not in self._kept:
                self._kept[index] = example
                self._bytes_left -= size
        return example


def stack(examples: Sequence[Example], device: torch.device) -> Batch:
    """The windows of all examples, one after the other; of at least one example."""
    images = torch.cat([example.images for example in examples])
    targets = torch.cat([example.targets for example in examples])
    if device.type == "cuda":
        images, targets = images.pin_memory(), targets.pin_memory()
    keys = [(example.index << _WINDOW_BITS) + window for example in examples for window in range(len(example.images))]
    return Batch(
        images.to(device, non_blocking=True), targets.to(device, non_blocking=True), np.asarray(keys, dtype=np.int64)
    )


def shuffled(indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """`indices` in the order of an epoch: a pure function of seed and epoch, each of them once."""
    return indices[np.argsort(random_bits(seed, Stream.ORDER, epoch, indices)[:, 0], kind="stable")]


def split_steps(
    indices: np.ndarray, batch_size: int, micro_batch_size: int | None, rank: int, world_size: int
) -> list[list[np.ndarray]]:
    """For each step of an epoch the micro batches of `rank`; every rank has as many, some of which may be empty.

    A step takes `batch_size` samples of all ranks together, the last one what is left. micro_batch_size: at most so many
    samples go through the model of a rank at once; None: no bound.
    """
    steps = []
    for start in range(0, len(indices), batch_size):
        step = indices[start : start + batch_size]
        per_rank = -(-len(step) // world_size)
        num_micro_steps = -(-per_rank // (micro_batch_size or per_rank))
        steps.append(np.array_split(step, num_micro_steps * world_size)[rank::world_size])
    return steps
