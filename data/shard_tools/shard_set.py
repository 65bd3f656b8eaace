"""A finished shard set, read in the order of its tars."""

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from mpmae.errors import ShardError
from mpmae.modalities import NoData
from mpmae.shard_format import ShardEntry, index_name, load_index, load_manifest, sample_key
from mpmae.shard_tools.tile import Tile, decode_members


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

    def no_data(self, name: str) -> NoData:
        """How modality `name` writes absent values in this set."""
        return self._no_data[name]

    def num_tiles(self, split: str | None) -> int:
        """Samples of a split (None: of the set)."""
        return sum(shard.num_samples for shard in self._shards(split))

    def index(self, shard: ShardEntry) -> np.ndarray:
        """The index rows of a shard; ShardError when the file is absent or not the one of the manifest."""
        return load_index(self.folder / index_name(shard.name), self.manifest, shard)

    def tiles(self, split: str | None, names: Collection[str] | None = None) -> Iterator[Tile]:
        """The samples of a split (None: of the set), with the modalities `names` (None: all).

        Raises ShardError naming shard and sample when a tar is absent, cut off or a member does not decode.
        """
        for split_name in self.manifest.splits if split is None else [split]:
            ordinal = 0
            for shard in self.manifest.shards(split_name):
                path = self.folder / shard.name
                rows = self.index(shard)
                try:
                    with path.open("rb") as file:
                        for row in rows:
                            yield self._read(file, path, row, sample_key(ordinal), names)
                            ordinal += 1
                except OSError as error:
                    raise ShardError(f"{path} cannot be read ({error.strerror or error}); restore or rebuild it") from error

    def _read(self, file, path: Path, row: np.void, key: str, names: Collection[str] | None) -> Tile:
        members = []
        for offset, size in zip(row["offset"].tolist(), row["size"].tolist(), strict=True):
            file.seek(offset)
            members.append(file.read(size))
        try:
            return decode_members(self.manifest, int(row["row"]), members, names)
        except ShardError as error:
            raise ShardError([f"{path}, sample {key}: {p}; run `mpmae-shards verify`" for p in error.problems]) from error

    def _shards(self, split: str | None) -> tuple[ShardEntry, ...]:
        if split is not None:
            return self.manifest.shards(split)
        return tuple(shard for shards in self.manifest.splits.values() for shard in shards)
