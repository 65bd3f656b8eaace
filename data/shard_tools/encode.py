"""Tiles read and encoded by several threads, handed over in order.

Reading, inflating, filtering and compressing all let go of Python's lock, so threads of one process scale; what holds it is
about a tenth of a millisecond a tile.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpmae.errors import SourceError
from mpmae.in_order import in_order
from mpmae.shard_format import Manifest
from mpmae.shard_tools.stats import StatsPass
from mpmae.shard_tools.tile import ModalityError, SampleEncoder, TileError
from mpmae.shard_tools.tile_source import TileSource

TILES_PER_TASK = 4


@dataclass(frozen=True)
class Sample:
    """A tile as a shard holds it; `moments` are those of its bands, where they are asked for."""

    row: int
    presence: int
    members: list[bytes]
    moments: Mapping[str, Any]


@dataclass(frozen=True)
class BadTile:
    """A tile that cannot be read or encoded."""

    row: int
    error: SourceError

    def describe(self, source: TileSource, split: str) -> dict[str, Any]:
        """Its entry in the report of skipped tiles."""
        return {
            "tile": source.describe(self.row),
            "row": self.row,
            "split": split,
            "modality": getattr(self.error, "modality", None),
            "error": "; ".join(self.error.problems),
        }


class TileEncoder:
    """Reads and encodes tiles of a source for the shard set of `manifest`; with `stats` it takes their moments too."""

    def __init__(self, source: TileSource, manifest: Manifest, stats: StatsPass | None = None):
        self._source, self._names, self._stats = source, manifest.modalities, stats
        self._encoder = SampleEncoder(manifest)

    def one(self, row: int) -> Sample | BadTile:
        """The sample of the tile at `row`, or what is wrong with it."""
        try:
            tile = self._source.read_tile(row, self._names)
            try:
                presence, members = self._encoder.encode(tile)
            except ModalityError as error:
                raise TileError(
                    f"{self._source.where}: {self._source.describe(row)}: {error}; mend it or take it out of the splits",
                    modality=error.modality,
                ) from error
        except SourceError as error:
            return BadTile(row, error)
        moments = self._stats.of_chunk([tile]) if self._stats else {}
        return Sample(row, presence, members, moments)

    def ordered(self, rows: np.ndarray, num_workers: int) -> Iterator[Sample | BadTile]:
        """The samples of `rows` in their order, made by `num_workers` threads, at most 12 tiles a thread in flight."""
        tasks = np.array_split(rows, range(TILES_PER_TASK, len(rows), TILES_PER_TASK))
        with closing(in_order(self._several, tasks, num_workers)) as results:
            for samples in results:
                yield from samples

    def _several(self, rows: np.ndarray) -> list[Sample | BadTile]:
        return [self.one(row) for row in rows.tolist()]
