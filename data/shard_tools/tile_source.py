"""What a dataset must offer to become a shard set: one interface, one adapter per format.

An adapter checks its whole input when it is opened (every problem at once) and then gives tiles by row, in any order and
from many threads. The builder needs nothing else; see docs/new_source.md.

Shapes: N tiles, C bands, P tile side in pixels, K length of a tile vector.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from mpmae.modalities import NoData
from mpmae.shard_format import BandStats
from mpmae.shard_tools.tile import Tile


class TileSource(Protocol):
    """The tiles of a dataset; a context manager.

    name: of the dataset. where: file or folder that messages name; folder: what must not be written into.
    num_tiles: N. tile_size_px: P, the same for all pixel modalities.
    pixels, scalars: names of the pixel and of the tile modalities, in the order of `mpmae.modalities`.
    bands: per pixel modality its C band names. shapes, dtypes: per modality, of one tile: (C, P, P) or (K,), little-endian.
    splits: per split, its rows in ascending order, int64.
    band_stats: statistics that come with the dataset; None where it has none and the builder computes them.
    fingerprint: hex digest that changes with the source's content.
    """

    name: str
    where: Path
    folder: Path
    num_tiles: int
    tile_size_px: int
    pixels: tuple[str, ...]
    scalars: tuple[str, ...]
    bands: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]
    splits: Mapping[str, np.ndarray]
    band_stats: Mapping[str, BandStats] | None
    fingerprint: str

    def no_data(self, name: str) -> NoData:
        """How modality `name` writes absent values."""

    def notes(self) -> Sequence[str]:
        """What a user should know before a long build, a line each: what is dropped, lacking or slow."""

    def describe(self, row: int) -> str:
        """How messages call the tile at `row`: its id and row."""

    def read_tile(self, row: int, names: Sequence[str] | None = None) -> Tile:
        """The tile at `row` with the modalities `names` (None: all), a missing one filled with its no-data code.

        Safe to call from many threads. Raises SourceError naming the tile and the modality when it cannot be read.
        """

    def close(self) -> None:
        """Let go of the files."""

    def __enter__(self) -> "TileSource": ...

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
