"""Random access to the samples of a shard set: index in memory, one `pread` per member, no tar walking.

Shapes: n samples of a split, M members per sample.
"""

import errno
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import TypeVar

import numpy as np

from mpmae.errors import ShardError
from mpmae.loader.folder import ShardFolder, shard_folder
from mpmae.shard_codecs import decode_pixels, decode_scalars, unpack_one_hot
from mpmae.shard_format import SCALARS_MEMBER, Manifest

_T = TypeVar("_T")
_NUM_NAMED = 8


class ShardReader:
    """One split of a shard set, readable from many threads.

    Raises ShardError at once when a local shard is absent or its size differs from the manifest; of a remote one, when it is
    first read. Few shards are open at a time.
    """

    def __init__(self, shards_dir: str | Path | ShardFolder, split: str, manifest: Manifest | None = None):
        self.folder = shard_folder(shards_dir) if isinstance(shards_dir, str | Path) else shards_dir
        self.manifest = manifest or self.folder.manifest()
        self.split = split
        self._shards = self.manifest.shards(split)
        self._files = self.folder.files(self._shards)
        indices = self.folder.indices(self.manifest, self._shards)
        self.index = np.concatenate(indices) if indices else np.zeros(0, self.manifest.index_dtype)
        self._first = np.cumsum([0] + [s.num_samples for s in self._shards]).tolist()
        self._member_position = {name: i for i, name in enumerate(self.manifest.members)}
        self._pixels = {entry.name: entry for entry in self.manifest.pixels}
        self._scalars = {entry.name: entry for entry in self.manifest.scalars}

    def __len__(self) -> int:
        return len(self.index)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetch these shards of the split (numbers in the order of need, those in use first) ahead, if they are remote."""
        self._files.prefetch(shards)

    def close(self) -> None:
        """Close the shard files."""
        self._files.close()

    def __del__(self):
        if hasattr(self, "_files"):
            self.close()

    def require(self, modalities: Sequence[str]) -> None:
        """ShardError naming every one of `modalities` that the set lacks."""
        missing = [name for name in modalities if name not in self.manifest.modalities]
        if missing:
            raise ShardError(
                f"{self.folder} has no {', '.join(missing)}; it has {', '.join(self.manifest.modalities)}. "
                "Leave what reads or reconstructs them out of the model, or rebuild the shards from a source that has them"
            )

    def require_any(self, modalities: Sequence[str]) -> None:
        """ShardError naming the samples that have none of `modalities`, which the set must have."""
        bits = sum(1 << self.manifest.modalities.index(name) for name in modalities)
        empty = np.flatnonzero(self.index["presence"] & np.uint64(bits) == 0)
        if len(empty):
            shown = ", ".join(str(number) for number in empty[:_NUM_NAMED]) + (", ..." if len(empty) > _NUM_NAMED else "")
            raise ShardError(
                f"{self.folder}, split {self.split}: {len(empty)} of {len(self)} samples ({shown}) have none of "
                f"{', '.join(modalities)}, so the model would see nothing of them; read more modalities, or rebuild the "
                "shards without these tiles"
            )

    def num_present(self, sample_ids: np.ndarray, modalities: Sequence[str]) -> dict[str, int]:
        """In how many of the samples each modality is present, from the index alone."""
        words = self.index["presence"][sample_ids]
        position = {name: i for i, name in enumerate(self.manifest.modalities)}
        return {name: int(((words >> np.uint64(position[name])) & np.uint64(1)).sum()) for name in modalities}

    def samples_of(self, shard: int) -> slice:
        """The samples of the `shard`-th shard of the split."""
        return slice(self._first[shard], self._first[shard + 1])

    def _shard_of(self, sample_id: int) -> int:
        return bisect_right(self._first, sample_id) - 1

    def spans(self, sample_ids: np.ndarray) -> list[np.ndarray]:
        """The stored bytes of samples (int [N]), uint8 each, from the first member's data to the last one's end.

        Members of a sample are adjacent in the tar, so this is one read each; member j of sample i lies at
        `index["offset"][i, j] - index["offset"][i, 0]`. Raises ShardError naming shard and sample.
        """
        rows = self.index[sample_ids]
        start = rows["offset"][:, 0].astype(np.int64)
        size = rows["offset"][:, -1].astype(np.int64) + rows["size"][:, -1] - start
        return [
            np.frombuffer(self._read(*place), np.uint8)
            for place in zip(sample_ids.tolist(), repeat("the sample"), start.tolist(), size.tolist(), strict=False)
        ]

    def _read(self, sample_id: int, what: str, offset: int, size: int) -> bytes:
        """`size` bytes of the sample's shard; every failure becomes a ShardError naming shard and sample."""
        try:
            data = self._files.read(self._shard_of(sample_id), size, offset)
        except OSError as error:
            too_many = error.errno in (errno.EMFILE, errno.ENFILE)
            hint = "raise the limit of open files (`ulimit -n`)" if too_many else "check the disk and the permissions"
            problem = f"{what}: cannot be read ({error.strerror or error}); {hint}"
            raise ShardError(f"{self._where(sample_id)}: {problem}") from error
        if len(data) != size:
            raise ShardError(
                f"{self._where(sample_id)}: {what}: {len(data)} of {size} bytes; the tar is shorter now; "
                f"{self.folder.check_hint}"
            )
        return data

    def _decoded(self, sample_id: int, member: str, decode: Callable[[bytes], _T]) -> _T:
        """`decode` of a member's bytes; every failure becomes a ShardError naming shard and sample."""
        row, position = self.index[sample_id], self._member_position[member]
        data = self._read(sample_id, member, int(row["offset"][position]), int(row["size"][position]))
        try:
            return decode(data)
        except ShardError as error:
            raise self.error(sample_id, str(error)) from error

    def error(self, sample_id: int, problem: str) -> ShardError:
        """A ShardError that tells shard, sample and what to do."""
        return ShardError(f"{self._where(sample_id)}: {problem}; {self.folder.check_hint}")

    def _where(self, sample_id: int) -> str:
        shard = self._shard_of(sample_id)
        name = self.folder / self._shards[shard].name
        return f"{name}: sample {sample_id - self._first[shard]} (source row {int(self.index['row'][sample_id])})"

    def pixels(self, sample_id: int, modality: str) -> np.ndarray:
        """The stored array [C, P, P] of a pixel modality; ShardError naming shard and sample when it cannot be had."""
        return self._decoded(sample_id, modality, partial(decode_pixels, self._pixels[modality]))

    def scalars(self, sample_id: int) -> np.void:
        """The packed record of tile id, product level and tile modalities (`manifest.scalars_dtype`)."""
        return self._decoded(sample_id, SCALARS_MEMBER, partial(decode_scalars, self.manifest))

    def sample(self, sample_id: int) -> dict[str, np.ndarray | bytes]:
        """Everything about a sample exactly as its source had it: arrays by modality, `tile_id`, `product_level`."""
        record = self.scalars(sample_id)
        values: dict[str, np.ndarray | bytes] = {name: self.pixels(sample_id, name) for name in self._pixels}
        for name, entry in self._scalars.items():
            value = record[name]
            values[name] = (
                unpack_one_hot(int(value), entry.dtype, entry.length) if entry.encoding == "one_hot" else value.copy()
            )
        return values | {"tile_id": record["tile_id"], "product_level": record["product_level"]}
