"""Cache tiers for stored (compressed) samples: host memory and device memory over the page cache.

A tier answers what the one below it answers, and keeps what its budget holds:

    ShardReader (files, page cache)  ->  HostTier (host memory)  ->  DeviceTier (one packed buffer per batch, on the device)

What a tier keeps is a fixed choice, made from the index before anything is read: the first samples of `ids` that fit.
Samples are shuffled when a set is written and every order visits all of them, so any choice of that size saves the same
reads, and no entry is ever thrown out. Everything is kept and moved in blocks of 512 bytes, tar's own grid: members keep the
alignment that they have in the tar, and copies on the device are gathers of whole rows.

Only the buffers that go to the device are pinned, one per batch and reused. The host tier's memory is not: its samples pass
through such a buffer anyway, so that a batch is one copy, and PyTorch rounds pinned memory up to a power of two, which would
break the budget.

Shapes: N samples of a batch, n of a split, M members per sample (pixel modalities, then scalars).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from mpmae.errors import ConfigError, ShardError
from mpmae.shard_format import SCALARS_MEMBER, Manifest
from mpmae.tar_members import TAR_HEADER_BYTES

BLOCK_BYTES = TAR_HEADER_BYTES
_WORDS = BLOCK_BYTES // 8


class SampleStore(Protocol):
    """What gives the stored bytes of samples: a `ShardReader` or a tier on top of one."""

    manifest: Manifest
    index: np.ndarray

    def spans(self, sample_ids: np.ndarray) -> list[np.ndarray]:
        """Stored bytes of samples, uint8 each, from the first member's data to the last one's end."""

    def error(self, sample_id: int, problem: str) -> ShardError:
        """A ShardError that tells shard and sample."""

    def samples_of(self, shard: int) -> slice:
        """The samples of a shard of the split."""

    def prefetch(self, shards: Sequence[int]) -> None:
        """Get these shards ready ahead of their use."""


@dataclass(frozen=True)
class TierReport:
    """What of a split a tier keeps. Bytes are those of memory, whole blocks."""

    name: str
    num_samples: int
    num_kept: int
    total_bytes: int
    kept_bytes: int
    budget_bytes: int

    def __str__(self) -> str:
        percent = 100 * self.num_kept / self.num_samples if self.num_samples else 100.0
        rest = "the rest is read from below in every epoch" if self.num_kept < self.num_samples else "all of them"
        return (
            f"{self.name}: keeps {self.num_kept:,} of {self.num_samples:,} samples ({percent:.1f} %), "
            f"{self.kept_bytes / 1e9:.3f} of {self.total_bytes / 1e9:.3f} GB, budget {self.budget_bytes / 1e9:.3f} GB; "
            f"{rest}"
        )


def span_bytes(index: np.ndarray) -> np.ndarray:
    """Length of each sample's span, int64 [n], for index rows [n]."""
    return (index["offset"][:, -1] + index["size"][:, -1] - index["offset"][:, 0]).astype(np.int64)


def member_positions(index: np.ndarray) -> np.ndarray:
    """Where each member begins in its sample's span, int64 [n, M], for index rows [n]."""
    return (index["offset"] - index["offset"][:, :1]).astype(np.int64)


def check_spans(store: SampleStore) -> None:
    """ShardError if a row of the index describes members that do not follow each other on tar's grid."""
    index = store.index
    starts, sizes = member_positions(index), index["size"].astype(np.int64)
    bad = (starts % BLOCK_BYTES != 0).any(1) | (starts[:, 1:] < starts[:, :-1] + sizes[:, :-1]).any(1)
    bad |= sizes[:, -1] != store.manifest.scalars_dtype.itemsize
    if bad.any():
        sample_id = int(np.argmax(bad))
        raise store.error(
            sample_id,
            f"the members of {bad.sum()} samples overlap, are out of order or off tar's grid in the index, here offsets "
            f"{index['offset'][sample_id].tolist()} and sizes {sizes[sample_id].tolist()}",
        )


class _Slots:
    """Where the kept samples lie in an arena of blocks: `first[i]` is the first block of sample i, -1 if it is not kept."""

    def __init__(self, name: str, index: np.ndarray, budget_bytes: int, ids: np.ndarray | None):
        self.num_blocks = -(-span_bytes(index) // BLOCK_BYTES)
        ids = np.arange(len(index)) if ids is None else np.asarray(ids, np.int64)
        ends = np.cumsum(self.num_blocks[ids])
        kept = ids[: np.searchsorted(ends, budget_bytes // BLOCK_BYTES, side="right")]
        self.kept = kept
        self.first = np.full(len(index), -1, np.int64)
        self.first[kept] = ends[: len(kept)] - self.num_blocks[kept]
        self.filled = np.zeros(len(index), bool)
        self.total_blocks = int(ends[len(kept) - 1]) if len(kept) else 0
        self.report = TierReport(
            name,
            len(ids),
            len(kept),
            int(ends[-1]) * BLOCK_BYTES if len(ids) else 0,
            self.total_blocks * BLOCK_BYTES,
            budget_bytes,
        )

    def unfilled(self, store: SampleStore, shards: Sequence[int]) -> list[int]:
        """Those of `shards` that are still read: not all of their samples are here."""
        return [shard for shard in shards if not self.filled[store.samples_of(shard)].all()]


def num_fitting(index: np.ndarray, budget_bytes: int) -> int:
    """How many samples a tier of that budget keeps: the first ones of the split. index: rows [n]."""
    return _Slots("", index, budget_bytes, None).report.num_kept


def _host_arena(report: TierReport) -> np.ndarray:
    """uint8 [report.kept_bytes], uninitialised. Pages come when they are filled, so what cannot end well is refused here."""
    available_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        if report.kept_bytes > available_bytes:
            raise MemoryError
        return np.empty(report.kept_bytes, np.uint8)
    except MemoryError as error:
        raise ConfigError(
            f"{report}, but the machine has {available_bytes / 1e9:.0f} GB of memory; lower data.host_cache_gb, which every "
            "rank uses for itself"
        ) from error


def _host_bytes(num_bytes: int) -> torch.Tensor:
    """Uninitialised uint8 memory to copy to the device from: pinned where there is CUDA, reused once copied."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


class HostTier:
    """The samples of a split that fit into `budget_bytes` of host memory, read once, on first touch; from many threads.

    Stands in for the reader that it wraps: whatever else that one offers is passed on, so a loader takes either.
    ids: the samples to choose from, in order of preference (all of the split unless given). Raises ConfigError when the
    machine has less memory than that.
    """

    def __init__(self, store: SampleStore, budget_bytes: int, ids: np.ndarray | None = None):
        check_spans(store)
        self._store = store
        self._slots = _Slots("host tier", store.index, budget_bytes, ids)
        self._sizes = span_bytes(store.index)
        self._arena = _host_arena(self._slots.report)
        self._kept = self._arena.view()
        self._kept.setflags(write=False)  # callers get parts of it

    def __len__(self) -> int:
        return len(self._slots.first)

    def __getattr__(self, name: str):
        if name == "_store":  # not there yet: an error of __init__ is on its way
            raise AttributeError(name)
        return getattr(self._store, name)

    @property
    def report(self) -> TierReport:
        """What is kept and what is not."""
        return self._slots.report

    def spans(self, sample_ids: np.ndarray) -> list[np.ndarray]:
        """Stored bytes of samples, read-only uint8 each; those not kept, or not yet, come from the store below."""
        ids = np.asarray(sample_ids, np.int64)
        missing = ids[~self._slots.filled[ids]]
        below = dict(zip(missing.tolist(), self._store.spans(missing), strict=True)) if len(missing) else {}
        for sample_id, span in below.items():
            if self._slots.first[sample_id] >= 0:
                self._arena[self._place(sample_id)] = span
                self._slots.filled[sample_id] = True  # after the bytes: other threads read without a lock
        return [self._kept[self._place(i)] if self._slots.filled[i] else below[i] for i in ids.tolist()]

    def prefetch(self, shards: Sequence[int]) -> None:
        """Get those of the shards ready that are still read: of the others every sample is kept here."""
        self._store.prefetch(self._slots.unfilled(self._store, shards))

    def warm(self, batch_size: int = 64) -> None:
        """Read everything that is kept now instead of on first touch."""
        for start in range(0, len(self._slots.kept), batch_size):
            self.spans(self._slots.kept[start : start + batch_size])

    def _place(self, sample_id: int) -> slice:
        start = int(self._slots.first[sample_id]) * BLOCK_BYTES
        return slice(start, start + int(self._sizes[sample_id]))


@dataclass(frozen=True)
class PackedBatch:
    """The stored bytes of a batch in one buffer.

    data: uint8 [bytes], on the loader's device. offsets, sizes: int64 [N, M] on the host, where each member lies in `data`.
    """

    data: torch.Tensor
    offsets: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True)
class StagedBatch:
    """The host's part of a batch: what the device does not have yet, and where everything goes.

    In the packed buffer the samples found on the device come first. fresh: uint8, host, the blocks of the others.
    found: rows of the arena, int64 [blocks], that make up the front. keep_from, keep_at: blocks of the packed buffer to copy
    into rows of the arena, int64 each. scalars: the packed records [N]. adds: samples that the arena holds afterwards.
    """

    fresh: torch.Tensor
    found: torch.Tensor
    keep_from: torch.Tensor
    keep_at: torch.Tensor
    adds: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    scalars: np.ndarray

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed buffer."""
        return len(self.found) * BLOCK_BYTES + len(self.fresh)


class DeviceTier:
    """Packs batches on `device`, and keeps the samples that fit into `budget_bytes` of its memory, compressed.

    `stage` does the host's part, from any thread; `place` the device's part, on the current stream, which must always be the
    same one. A budget of 0 keeps nothing: then every batch is one host-to-device copy. The scalars of kept samples stay on
    the host, some 400 bytes each, where they are decoded. Raises ConfigError when the device has less memory than that.
    """

    def __init__(self, store: SampleStore, budget_bytes: int, device: torch.device | str, ids: np.ndarray | None = None):
        check_spans(store)
        self._store, self._index = store, store.index
        self._slots = _Slots("device tier", store.index, budget_bytes, ids)
        self._device = torch.device(device)
        try:
            self._arena = torch.empty((self._slots.total_blocks, _WORDS), dtype=torch.int64, device=self._device)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{self.report}, but {self._device} has not that much free; lower data.device_cache_gb"
            ) from error
        self._record = np.full(len(store.index), -1, np.int64)
        self._record[self._slots.kept] = np.arange(len(self._slots.kept))
        self._scalars = np.empty(len(self._slots.kept), store.manifest.scalars_dtype)
        self._scalars_position = store.manifest.members.index(SCALARS_MEMBER)

    @property
    def report(self) -> TierReport:
        """What is kept and what is not."""
        return self._slots.report

    def prefetch(self, shards: Sequence[int]) -> None:
        """As `HostTier.prefetch`."""
        self._store.prefetch(self._slots.unfilled(self._store, shards))

    def stage(self, sample_ids: np.ndarray) -> StagedBatch:
        """Read what the device does not have of the samples int64 [N]; a sample may occur several times."""
        ids, slots = np.asarray(sample_ids, np.int64), self._slots
        is_found = slots.filled[ids]  # read once: `place` may set flags meanwhile
        order = np.argsort(~is_found, kind="stable")
        num_found = int(is_found.sum())
        blocks = slots.num_blocks[ids]
        first = np.empty(len(ids), np.int64)
        first[order] = np.cumsum(blocks[order]) - blocks[order]
        start = int(blocks[is_found].sum())
        new = order[num_found:]
        fresh = _host_bytes(int(blocks[new].sum()) * BLOCK_BYTES)
        target = fresh.numpy()
        for i, span in zip(new.tolist(), self._store.spans(ids[new]) if len(new) else [], strict=True):
            place = (int(first[i]) - start) * BLOCK_BYTES
            target[place : place + len(span)] = span
        positions = first[:, None] * BLOCK_BYTES + member_positions(self._index[ids])
        keep = new[slots.first[ids[new]] >= 0]
        return StagedBatch(
            fresh=fresh,
            found=_pinned(_rows(slots.first[ids[order[:num_found]]], blocks[order[:num_found]])),
            keep_from=_pinned(_rows(first[keep], blocks[keep])),
            keep_at=_pinned(_rows(slots.first[ids[keep]], blocks[keep])),
            adds=ids[keep],
            offsets=positions,
            sizes=self._index["size"][ids].astype(np.int64),
            scalars=self._records(ids, new, keep, target, positions[:, self._scalars_position] - start * BLOCK_BYTES),
        )

    def _records(self, ids: np.ndarray, new: np.ndarray, keep: np.ndarray, fresh: np.ndarray, at: np.ndarray) -> np.ndarray:
        dtype = self._scalars.dtype
        records = np.empty(len(ids), dtype)
        places = at[new][:, None] + np.arange(dtype.itemsize)
        records[new] = fresh[places].view(dtype)[:, 0]
        self._scalars[self._record[ids[keep]]] = records[keep]
        found = np.setdiff1d(np.arange(len(ids)), new, assume_unique=True)
        records[found] = self._scalars[self._record[ids[found]]]
        return records

    def place(self, staged: StagedBatch) -> PackedBatch:
        """The packed buffer on the device; copies and gathers are queued on the current stream."""
        num_found = len(staged.found)
        packed = torch.empty((num_found + len(staged.fresh) // BLOCK_BYTES, _WORDS), dtype=torch.int64, device=self._device)
        if num_found:
            torch.index_select(self._arena, 0, self._moved(staged.found), out=packed[:num_found])
        packed[num_found:].copy_(staged.fresh.view(torch.int64).view(-1, _WORDS), non_blocking=True)
        if len(staged.adds):
            self._arena.index_copy_(0, self._moved(staged.keep_at), packed[self._moved(staged.keep_from)])
            self._slots.filled[staged.adds] = True  # later gathers follow on the same stream
        return PackedBatch(packed.view(-1).view(torch.uint8), staged.offsets, staged.sizes)

    def _moved(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(self._device, non_blocking=True)


def _pinned(rows: np.ndarray) -> torch.Tensor:
    tensor = torch.empty(len(rows), dtype=torch.int64, pin_memory=torch.cuda.is_available())
    tensor.numpy()[:] = rows
    return tensor


def _rows(first: np.ndarray, counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """first[0], ..., first[0] + counts[0] - 1, first[1], ...: int64 [sum of counts]."""
    counts = np.asarray(counts, np.int64)
    if not len(counts):
        return np.zeros(0, np.int64)
    steps = np.repeat(first - (np.cumsum(counts) - counts), counts)
    return steps + np.arange(len(steps))
