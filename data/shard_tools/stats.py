"""Band statistics in one pass over the tiles, exact, mergeable, on all cores.

Integers of up to 16 bits are summed exactly, values and squares, so that their statistics depend on no order. Of the others
each tile gives per band the count, mean and sum of squared deviations of its valid values in float64; two such moments merge
by the pairwise update of Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for computing sample
variances", 1979), which loses no digits to large means. They merge tile by tile within chunks of CHUNK_SAMPLES tiles, then
chunk by chunk, so the result does not depend on the number of threads. The standard deviation is that of the population
(divisor n), as in MMEarth's own statistics (MMEarth-data `utils/normalization.py`).

Shapes: C bands, P tile side in pixels, K length of a tile vector (its bands).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from mpmae.errors import SourceError
from mpmae.in_order import in_order
from mpmae.modalities import MODALITIES, NoData
from mpmae.shard_tools.progress import track
from mpmae.shard_tools.shard_set import CHUNK_SAMPLES, ShardSet
from mpmae.shard_tools.stats_loops import add_floats, add_integers
from mpmae.shard_tools.tile import Tile
from mpmae.shard_tools.tile_source import TileSource

Stats = dict[str, dict[str, list[float]]]


class IntegerSums:
    """Count, sum, sum of squares, minimum and maximum of integers per band, as Python integers: no rounding, no limit."""

    def __init__(self, num_bands: int):
        self.sums = [[0] * num_bands for _ in range(3)]
        self._limits = np.array([[np.iinfo(np.int64).max] * num_bands, [np.iinfo(np.int64).min] * num_bands])

    def add(self, values: np.ndarray, valid: np.ndarray) -> None:
        """Take in the `valid` among `values` [C, P, P] or [K], integers of up to 16 bits."""
        sums = np.zeros((3, len(values)), np.int64)
        add_integers(values.reshape(len(values), -1), valid.reshape(len(values), -1), sums, self._limits)
        self._add_sums(sums.tolist())

    def merge(self, other: "IntegerSums") -> None:
        """Take in what `other` has."""
        self._add_sums(other.sums)
        self._limits[0] = np.minimum(self._limits[0], other._limits[0])
        self._limits[1] = np.maximum(self._limits[1], other._limits[1])

    def state(self) -> dict[str, list]:
        """All of it as lists of numbers, exactly."""
        return {"sums": self.sums, "limits": self._limits.tolist()}

    @classmethod
    def from_state(cls, state: Mapping[str, list]) -> "IntegerSums":
        """What `state` was taken of."""
        sums = cls(len(state["sums"][0]))
        sums.sums, sums._limits = [list(row) for row in state["sums"]], np.array(state["limits"], np.int64)
        return sums

    def _add_sums(self, sums: list[list[int]]) -> None:
        for own, new in zip(self.sums, sums, strict=True):
            own[:] = [a + b for a, b in zip(own, new, strict=True)]

    def describe(self) -> dict[str, list[float]]:
        """mean, std, min and max as MMEarth's band_stats.json lists them; see `BandMoments.describe`."""
        rows = []
        for n, total, squares, low, high in zip(*self.sums, *self._limits.tolist(), strict=True):
            # True division of integers rounds once, and the difference of the products is exact.
            variance = (n * squares - total * total) / (n * n) if n else 0.0
            rows.append((total / n, math.sqrt(variance) or 1.0, float(low), float(high)) if n else (0.0, 1.0, 0.0, 0.0))
        return dict(zip(("mean", "std", "min", "max"), map(list, zip(*rows, strict=True)), strict=True))


class BandMoments:
    """Count, mean, sum of squared deviations, minimum and maximum per band, [C] each; bands without values count 0."""

    def __init__(self, num_bands: int):
        self.num = np.zeros(num_bands, np.int64)
        self._moments = np.array([[0.0] * num_bands, [0.0] * num_bands, [np.inf] * num_bands, [-np.inf] * num_bands])

    @property
    def mean(self) -> np.ndarray:
        """Mean per band, float64 [C]; 0 without values."""
        return self._moments[0]

    def add(self, values: np.ndarray, valid: np.ndarray) -> None:
        """Take in the `valid` among `values` [C, P, P] or [K]."""
        add_floats(values.reshape(len(values), -1), valid.reshape(len(values), -1), self.num, self._moments)

    def merge(self, other: "BandMoments") -> None:
        """Take in what `other` has."""
        num = self.num + other.num
        share = other.num / np.maximum(num, 1)
        delta = other.mean - self.mean
        self._moments[0] += delta * share
        self._moments[1] += other._moments[1] + delta * delta * self.num * share
        self._moments[2] = np.minimum(self._moments[2], other._moments[2])
        self._moments[3] = np.maximum(self._moments[3], other._moments[3])
        self.num = num

    def state(self) -> dict[str, list]:
        """All of it as lists of numbers, exactly."""
        return {"num": self.num.tolist(), "moments": self._moments.tolist()}

    @classmethod
    def from_state(cls, state: Mapping[str, list]) -> "BandMoments":
        """What `state` was taken of."""
        moments = cls(len(state["num"]))
        moments.num, moments._moments = np.array(state["num"], np.int64), np.array(state["moments"], np.float64)
        return moments

    def describe(self) -> dict[str, list[float]]:
        """mean, std, min and max as MMEarth's band_stats.json lists them.

        A band without values has mean, min and max 0 and std 1. A band without spread has std 1 too, so that dividing by
        the std is always possible.
        """
        has_values = self.num > 0
        mean, m2, low, high = self._moments
        std = np.sqrt(m2 / np.maximum(self.num, 1))
        columns = {
            "mean": np.where(has_values, mean, 0),
            "std": np.where(std > 0, std, 1),
            "min": np.where(has_values, low, 0),
            "max": np.where(has_values, high, 0),
        }
        return {name: column.tolist() for name, column in columns.items()}


Accumulator = IntegerSums | BandMoments
_KINDS = {"integers": IntegerSums, "floats": BandMoments}


class StatsPass:
    """Collects the moments of the continuous modalities of tiles, sentinel2 by product level.

    `no_data` says, per modality, how absent values are written; categorical modalities in it are left out.
    """

    def __init__(self, no_data: Mapping[str, NoData]):
        self._no_data = {name: rule for name, rule in no_data.items() if MODALITIES[name].kind == "continuous"}
        self._total: dict[str, Accumulator] = {}
        self._chunk: dict[str, Accumulator] = {}
        self._num_in_chunk = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities that it needs of a tile."""
        return tuple(self._no_data)

    def add(self, tile: Tile) -> None:
        """Take in the values of `tile`."""
        self._add(self._chunk, tile)
        self._num_in_chunk += 1
        if self._num_in_chunk == CHUNK_SAMPLES:
            self._end_chunk()

    def of_chunk(self, tiles: Iterable[Tile]) -> dict[str, Accumulator]:
        """What `merge` takes, of up to CHUNK_SAMPLES tiles; safe to call from many threads."""
        chunk: dict[str, Accumulator] = {}
        for tile in tiles:
            self._add(chunk, tile)
        return chunk

    def _add(self, chunk: dict[str, Accumulator], tile: Tile) -> None:
        for name, rule in self._no_data.items():
            values = tile.values[name]
            key = f"{name}_{tile.product_level.decode(errors='replace')}" if name == "sentinel2" else name
            if key not in chunk:
                is_exact = values.dtype.kind in "iu" and values.dtype.itemsize <= 2
                chunk[key] = (IntegerSums if is_exact else BandMoments)(len(values))
            chunk[key].add(values, rule.valid(values))

    def merge(self, chunk: Mapping[str, Accumulator]) -> None:
        """Take in the moments of a chunk; the order of the chunks decides the last digit of floats."""
        for key, moments in chunk.items():
            if key in self._total:
                self._total[key].merge(moments)
            else:
                self._total[key] = moments

    def _end_chunk(self) -> None:
        self.merge(self._chunk)
        self._chunk, self._num_in_chunk = {}, 0

    def state(self) -> dict[str, dict]:
        """All that was taken in, for `json`, exactly."""
        self._end_chunk()
        kinds = {kind: name for name, kind in _KINDS.items()}
        return {key: {"kind": kinds[type(moments)], **moments.state()} for key, moments in self._total.items()}

    def restore(self, state: Mapping[str, Mapping]) -> None:
        """Go on from what `state` gave."""
        self._total = {key: _KINDS[moments["kind"]].from_state(moments) for key, moments in state.items()}

    def result(self) -> Stats:
        """The content of band_stats.json."""
        self._end_chunk()
        return {key: self._total[key].describe() for key in sorted(self._total)}


def band_stats(
    source: TileSource | ShardSet, split: str | None = "train", progress: bool = False, workers: int | None = None
) -> Stats:
    """Statistics in the layout of band_stats.json over the valid values of a split (None: of all tiles).

    workers: threads (None: one per core); the result does not depend on it. Raises SourceError or ShardError for an unknown
    split or a tile that cannot be read.
    """
    is_set = isinstance(source, ShardSet)
    modalities = source.modalities if is_set else (*source.pixels, *source.scalars)
    stats = StatsPass({name: source.no_data(name) for name in modalities})
    if is_set:
        num_tiles, chunks, read = source.num_tiles(split), source.chunks(split), source.read
    else:
        rows = _rows(source, split)
        num_tiles, chunks = len(rows), (rows[i : i + CHUNK_SAMPLES].tolist() for i in range(0, len(rows), CHUNK_SAMPLES))
        read = partial(_read_tiles, source)
    results = in_order(lambda chunk: (len(chunk), stats.of_chunk(read(chunk, stats.names))), chunks, workers)

    def merge_all() -> Iterator[None]:
        for num, moments in results:
            stats.merge(moments)
            yield from [None] * num

    for _ in track(merge_all(), num_tiles, "stats", enabled=progress):
        pass
    return stats.result()


def _rows(source: TileSource, split: str | None) -> np.ndarray:
    if split is None:
        return np.arange(source.num_tiles)
    if split not in source.splits:
        raise SourceError(f"{source.folder} has no split {split!r}; it has {', '.join(source.splits)}")
    return source.splits[split]


def _read_tiles(source: TileSource, rows: list[int], names: Sequence[str]) -> Iterator[Tile]:
    for row in rows:
        yield source.read_tile(row, names)
