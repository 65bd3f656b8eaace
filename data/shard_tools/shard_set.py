"""A finished shard set: its samples by number, read through the indices."""

import os
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from mpmae.errors import ShardError
from mpmae.modalities import MODALITIES, NoData
from mpmae.shard_files import load_index, load_manifest
from mpmae.shard_format import ShardEntry, index_name, sample_key
from mpmae.shard_tools.tile import Tile, decode_members
from mpmae.tar_members import TAR_HEADER_BYTES

CHUNK_SAMPLES = 64


class Sample(NamedTuple):
    """Where a sample lies: its shard, its number within the split and its row of the index."""

    shard: ShardEntry
    ordinal: int
    index_row: np.void

    @property
    def start(self) -> int:
        """First byte of the sample in the tar, that of its first header."""
        return int(self.index_row["offset"][0]) - TAR_HEADER_BYTES

    @property
    def end(self) -> int:
        """Byte after the data of its last member."""
        return int(self.index_row["offset"][-1]) + int(self.index_row["size"][-1])

    def members(self, stored: memoryview) -> list[memoryview]:
        """The members in `stored`, the bytes of the tar from `start` to `end`."""
        places = zip(self.index_row["offset"].tolist(), self.index_row["size"].tolist(), strict=True)
        start = self.start
        return [stored[offset - start : offset - start + size] for offset, size in places]


class ShardSet:
    """The tiles of a shard set; ShardError for a folder without a readable manifest."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = load_manifest(folder)
        self._no_data = {entry.name: entry.no_data for entry in (*self.manifest.pixels, *self.manifest.scalars)}

    @property
    def name(self) -> str:
        """The name of the source that the set was made from."""
        return self.manifest.source.name

    @property
    def modalities(self) -> tuple[str, ...]:
        """All modalities: the pixel modalities, then the tile modalities."""
        return self.manifest.modalities

    def split_to_draw(self, split: str | None, num_tiles: int) -> str:
        """`split`, or the first with samples for None; ShardError where nothing can be drawn or `num_tiles` is below 1."""
        if num_tiles < 1:
            raise ShardError(f"num_tiles {num_tiles}; expected at least 1")
        if split is None:
            split = next((name for name in self.manifest.splits if self.num_tiles(name)), None)
        if split is None or not self.num_tiles(split):
            where = "any split" if split is None else f"split {split}"
            raise ShardError(f"{self.folder}: no samples to draw in {where}")
        return split

    def bands(self, name: str) -> tuple[str, ...]:
        """Band names of modality `name` in this set, of a tile vector those of its spec."""
        return next((entry.bands for entry in self.manifest.pixels if entry.name == name), MODALITIES[name].bands)

    def no_data(self, name: str) -> NoData:
        """How modality `name` writes absent values in this set."""
        return self._no_data[name]

    def num_tiles(self, split: str | None) -> int:
        """Samples of a split (None: of the set)."""
        return sum(self.manifest.num_samples(name) for name in self._splits(split))

    def index(self, shard: ShardEntry) -> np.ndarray:
        """The index rows of a shard; ShardError when the file is absent or not the one of the manifest."""
        return load_index(self.folder / index_name(shard.name), self.manifest, shard)

    def path(self, shard: ShardEntry) -> Path:
        """The tar of a shard."""
        return self.folder / shard.name

    def describe(self, sample: Sample) -> str:
        """How messages call a sample: its tar, its key and the byte where it begins."""
        return f"{self.path(sample.shard)}, sample {sample_key(sample.ordinal)} at byte {sample.start}"

    def samples(self, split: str | None) -> Iterator[Sample]:
        """The samples of a split (None: of the set) in the order of the tars; one index at a time is in memory."""
        for split_name in self._splits(split):
            first = 0
            for shard in self.manifest.shards(split_name):
                for i, row in enumerate(self.index(shard)):
                    yield Sample(shard, first + i, row)
                first += shard.num_samples

    def chunks(self, split: str | None) -> Iterator[list[Sample]]:
        """The samples of a split (None: of the set), CHUNK_SAMPLES at a time, whatever the shards' sizes."""
        samples = self.samples(split)
        while chunk := list(islice(samples, CHUNK_SAMPLES)):
            yield chunk

    def stored(self, samples: Sequence[Sample]) -> Iterator[memoryview]:
        """The bytes of each sample from `start` to `end`, one read each; safe to call from many threads.

        Raises ShardError naming the tar when it is absent or its size is not the manifest's, and the sample when it cannot
        be read.
        """
        file, open_shard = None, None
        try:
            for sample in samples:
                if sample.shard is not open_shard:
                    if file is not None:
                        file.close()
                    file, open_shard = self.open_tar(sample.shard), sample.shard
                yield self._read(file, sample)
        finally:
            if file is not None:
                file.close()

    def open_tar(self, shard: ShardEntry) -> BinaryIO:
        """The tar of a shard, unbuffered; ShardError when it is absent, no file or not of the size in the manifest."""
        path = self.path(shard)
        try:
            if path.exists() and not path.is_file():
                raise ShardError(f"{path} is not a file, though the manifest lists it; restore it or rebuild the set")
            file = path.open("rb", buffering=0)
        except OSError as error:
            raise ShardError(f"{path} cannot be read ({error.strerror or error}); restore or rebuild it") from error
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes != shard.num_bytes:
            file.close()
            raise ShardError(
                f"{path}: {num_bytes} bytes, the manifest says {shard.num_bytes}; restore it or rebuild the set"
            )
        return file

    def _read(self, file: BinaryIO, sample: Sample) -> memoryview:
        num_bytes = sample.end - sample.start
        try:
            file.seek(sample.start)
            data = file.read(num_bytes)
        except OSError as error:
            raise ShardError(f"{self.describe(sample)}: cannot be read ({error.strerror or error})") from error
        if len(data) != num_bytes:
            raise ShardError(f"{self.describe(sample)}: {len(data)} of {num_bytes} bytes; run `mpmae-shards verify`")
        return memoryview(data)

    def decode(self, sample: Sample, stored: memoryview, names: Collection[str] | None = None) -> Tile:
        """The tile in the bytes of a sample, with the modalities `names` (None: all); ShardError naming sample, member."""
        try:
            return decode_members(self.manifest, int(sample.index_row["row"]), sample.members(stored), names)
        except ShardError as error:
            raise ShardError([f"{self.describe(sample)}: {p}; run `mpmae-shards verify`" for p in error.problems]) from error

    def tiles(self, split: str | None, names: Collection[str] | None = None) -> Iterator[Tile]:
        """The samples of a split (None: of the set), with the modalities `names` (None: all).

        Raises ShardError naming shard and sample when a tar is absent, has another size, or a member does not decode.
        """
        for chunk in self.chunks(split):
            yield from self.read(chunk, names)

    def read(self, samples: Sequence[Sample], names: Collection[str] | None = None) -> Iterator[Tile]:
        """The tiles of `samples`; safe to call from many threads. Raises as `tiles`."""
        for sample, stored in zip(samples, self.stored(samples), strict=True):
            yield self.decode(sample, stored, names)

    def _splits(self, split: str | None) -> tuple[str, ...]:
        if split is None:
            return tuple(self.manifest.splits)
        self.manifest.shards(split)
        return (split,)
