"""What is known of every sample of a shard set, in memory, from one pass over its tars that checks their hashes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpmae.errors import ShardError
from mpmae.in_order import in_order
from mpmae.modalities import PRODUCT_LEVELS
from mpmae.shard_codecs import decode_scalars
from mpmae.shard_format import ShardEntry
from mpmae.shard_tools.progress import track
from mpmae.shard_tools.shard_set import Sample, ShardSet

_ID_DTYPE = np.dtype([("tile_id", "S100"), ("product_level", "S10")])


@dataclass(frozen=True)
class ScannedSet:
    """A shard set with a table of the samples of some of its splits, in the order of the tars; arrays of n samples.

    shards: the tars, each with its split and the number of its first sample within the split. shard: number among them.
    index: rows of the indices. tile_id, product_level: as in the scalars. About 250 bytes a sample.
    """

    shard_set: ShardSet
    shards: tuple[tuple[str, ShardEntry, int], ...]
    shard: np.ndarray
    index: np.ndarray
    tile_id: np.ndarray
    product_level: np.ndarray

    @property
    def folder(self) -> Path:
        """The folder of the set."""
        return self.shard_set.folder

    def of_split(self, split: str) -> np.ndarray:
        """Positions of the samples of a split, int64."""
        return np.flatnonzero(np.array([name == split for name, _, _ in self.shards], bool)[self.shard])

    def sample(self, position: int) -> Sample:
        """Where the sample at `position` lies."""
        number = int(self.shard[position])
        _, shard, first_ordinal = self.shards[number]
        start = int(np.searchsorted(self.shard, number))
        return Sample(shard, first_ordinal + position - start, self.index[position])


def scan(shard_set: ShardSet, splits: Sequence[str], workers: int | None = None, progress: bool = False) -> ScannedSet:
    """The table of `splits`. Raises ShardError with every tar that is absent, cut off or not the one of the manifest."""
    shards = []
    for split in splits:
        first = 0
        for shard in shard_set.manifest.shards(split):
            shards.append((split, shard, first))
            first += shard.num_samples
    results = in_order(lambda entry: _scan_shard(shard_set, entry[1]), shards, workers)
    tracked = track(results, len(shards), f"check {shard_set.folder.name}", unit="shards", enabled=progress)
    indices, ids, problems = [np.zeros(0, shard_set.manifest.index_dtype)], [np.zeros(0, _ID_DTYPE)], []
    for index, shard_ids, shard_problems in tracked:
        indices.append(index)
        ids.append(shard_ids)
        problems += shard_problems
    if problems:
        raise ShardError(problems)
    numbers = np.repeat(np.arange(len(shards), dtype=np.uint32), [len(index) for index in indices[1:]])
    all_ids = np.concatenate(ids)
    return ScannedSet(
        shard_set, tuple(shards), numbers, np.concatenate(indices), all_ids["tile_id"], all_ids["product_level"]
    )


def _scan_shard(shard_set: ShardSet, shard: ShardEntry) -> tuple[np.ndarray, np.ndarray, list[str]]:
    dtype = shard_set.manifest.index_dtype
    try:
        index = shard_set.index(shard)
        ids = np.zeros(shard.num_samples, _ID_DTYPE)
        digest, position = hashlib.sha256(), 0
        with shard_set.open_tar(shard) as file:
            for i, row in enumerate(index):
                sample = Sample(shard, i, row)
                data = file.read(sample.end - position)
                digest.update(data)
                record = decode_scalars(shard_set.manifest, sample.members(memoryview(data)[sample.start - position :])[-1])
                ids[i], position = (record["tile_id"], record["product_level"]), sample.end
            digest.update(file.read())
    except ShardError as error:
        return np.zeros(0, dtype), np.zeros(0, _ID_DTYPE), [_named(shard_set, shard, problem) for problem in error.problems]
    except OSError as error:
        problem = f"{shard_set.path(shard)} cannot be read ({error.strerror or error})"
        return np.zeros(0, dtype), np.zeros(0, _ID_DTYPE), [problem]
    if digest.hexdigest() != shard.sha256:
        changed = f"{shard_set.path(shard)}: its sha256 is not the manifest's: its bytes have changed"
        return index, ids, [f"{changed}; restore it or rebuild the set"]
    unknown = sorted(set(ids["product_level"].tolist()) - {level.encode() for level in PRODUCT_LEVELS})
    if unknown:
        return index, ids, [f"{shard_set.path(shard)}: product levels {unknown[:3]}, expected {' or '.join(PRODUCT_LEVELS)}"]
    return index, ids, []


def _named(shard_set: ShardSet, shard: ShardEntry, problem: str) -> str:
    return problem if str(shard_set.folder) in problem else f"{shard_set.path(shard)}: {problem}"
