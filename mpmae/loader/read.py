"""Random access to the samples of a shard set: index in memory, one `pread` per member, no tar walking.

Shapes: n samples of a split, M members per sample.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpmae.errors import ShardError
from mpmae.shard_format import (
    SCALARS_MEMBER,
    Manifest,
    decode_pixels,
    decode_scalars,
    index_name,
    load_index,
    load_manifest,
    unpack_one_hot,
)


class ShardReader:
    """One split of a shard set, readable from many threads.

    Raises ShardError at once when a shard is absent or its size differs from the manifest.
    """

    def __init__(self, shards_dir: str | Path, split: str, manifest: Manifest | None = None):
        self._files: list[int] = []
        self.folder = Path(shards_dir)
        self.manifest = manifest or load_manifest(self.folder)
        self.split = split
        self._shards = self.manifest.shards(split)
        try:
            self._open()
            self.index = (
                np.concatenate([load_index(self.folder / index_name(s.name), self.manifest, s) for s in self._shards])
                if self._shards
                else np.zeros(0, self.manifest.index_dtype)
            )
        except BaseException:
            self.close()
            raise
        self._first = np.cumsum([0] + [s.num_samples for s in self._shards])
        self._member_position = {name: i for i, name in enumerate(self.manifest.members)}
        self._pixels = {entry.name: entry for entry in self.manifest.pixels}
        self._scalars = {entry.name: entry for entry in self.manifest.scalars}

    def _open(self) -> None:
        problems = []
        for shard in self._shards:
            path = self.folder / shard.name
            if not path.is_file():
                problems.append(f"{path} is missing, though the manifest lists it; restore it or rebuild the set")
            elif path.stat().st_size != shard.num_bytes:
                problems.append(
                    f"{path} has {path.stat().st_size} bytes, the manifest says {shard.num_bytes}; "
                    "restore it or rebuild the set"
                )
            else:
                self._files.append(os.open(path, os.O_RDONLY))
        if problems:
            raise ShardError(problems)

    def __len__(self) -> int:
        return len(self.index)

    def close(self) -> None:
        """Close the shard files."""
        while self._files:
            os.close(self._files.pop())

    def __del__(self):
        self.close()

    def require(self, modalities: Sequence[str]) -> None:
        """ShardError naming every one of `modalities` that the set lacks."""
        missing = [name for name in modalities if name not in self.manifest.modalities]
        if missing:
            raise ShardError(
                f"{self.folder} has no {', '.join(missing)}; it has {', '.join(self.manifest.modalities)}. "
                "Leave the others out of model.modalities_out, or rebuild the shards from a source that has them"
            )

    def num_present(self, sample_ids: np.ndarray, modalities: Sequence[str]) -> dict[str, int]:
        """In how many of the samples each modality is present, from the index alone."""
        words = self.index["presence"][sample_ids]
        position = {name: i for i, name in enumerate(self.manifest.modalities)}
        return {name: int(((words >> np.uint64(position[name])) & np.uint64(1)).sum()) for name in modalities}

    def _member(self, sample_id: int, member: str) -> bytes:
        shard = int(np.searchsorted(self._first, sample_id, side="right")) - 1
        row, position = self.index[sample_id], self._member_position[member]
        size = int(row["size"][position])
        data = os.pread(self._files[shard], size, int(row["offset"][position]))
        if len(data) != size:
            raise ShardError(f"{self._where(sample_id)}: {member}: {len(data)} of {size} bytes; the tar is shorter now")
        return data

    def _where(self, sample_id: int) -> str:
        shard = int(np.searchsorted(self._first, sample_id, side="right")) - 1
        name = self.folder / self._shards[shard].name
        return f"{name}: sample {sample_id - int(self._first[shard])} (source row {int(self.index['row'][sample_id])})"

    def pixels(self, sample_id: int, modality: str) -> np.ndarray:
        """The stored array [C, P, P] of a pixel modality; ShardError naming shard and sample when it is corrupt."""
        try:
            return decode_pixels(self._pixels[modality], self._member(sample_id, modality))
        except ShardError as error:
            raise ShardError(f"{self._where(sample_id)}: {error}; run `mpmae-shards verify {self.folder}`") from error

    def scalars(self, sample_id: int) -> np.void:
        """The packed record of tile id, product level and tile modalities (`manifest.scalars_dtype`)."""
        try:
            return decode_scalars(self.manifest, self._member(sample_id, SCALARS_MEMBER))
        except ShardError as error:
            raise ShardError(f"{self._where(sample_id)}: {error}; run `mpmae-shards verify {self.folder}`") from error

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
