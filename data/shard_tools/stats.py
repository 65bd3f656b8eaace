"""Band statistics in one pass over the tiles, exact and mergeable.

Each tile gives per band the count, mean and sum of squared deviations of its valid values in float64; two such moments merge
by the pairwise update of Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm for computing sample
variances", 1979), which loses no digits to large means. The standard deviation is that of the population (divisor n), as in
MMEarth's own statistics (MMEarth-data `utils/normalization.py`).

Shapes: C bands, P tile side in pixels, K length of a tile vector (its bands).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mpmae.modalities import MODALITIES, NoData
from mpmae.shard_tools.progress import track
from mpmae.shard_tools.shard_set import ShardSet
from mpmae.shard_tools.source import MMEarthSource
from mpmae.shard_tools.tile import Tile


@dataclass(frozen=True)
class BandMoments:
    """Count, mean, sum of squared deviations, minimum and maximum per band, each [C]; bands without values count 0."""

    num: np.ndarray
    mean: np.ndarray
    m2: np.ndarray
    min: np.ndarray
    max: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, valid: np.ndarray) -> "BandMoments":
        """Moments of the `valid` among `values` [C, P, P] or [K]."""
        x = values.reshape(len(values), -1).astype(np.float64)
        valid = valid.reshape(x.shape)
        num = valid.sum(axis=1)
        mean = np.where(valid, x, 0).sum(axis=1) / np.maximum(num, 1)
        deviation = np.where(valid, x - mean[:, None], 0)
        return cls(
            num,
            mean,
            (deviation * deviation).sum(axis=1),
            np.where(valid, x, np.inf).min(axis=1),
            np.where(valid, x, -np.inf).max(axis=1),
        )

    def merge(self, other: "BandMoments") -> "BandMoments":
        """Moments of both sets of values together."""
        num = self.num + other.num
        share = other.num / np.maximum(num, 1)
        delta = other.mean - self.mean
        return BandMoments(
            num,
            self.mean + delta * share,
            self.m2 + other.m2 + delta * delta * self.num * share,
            np.minimum(self.min, other.min),
            np.maximum(self.max, other.max),
        )

    def describe(self) -> dict[str, list[float]]:
        """mean, std, min and max as MMEarth's band_stats.json lists them.

        A band without values has mean, min and max 0 and std 1. A band without spread has std 1 too, so that dividing by
        the std is always possible.
        """
        has_values = self.num > 0
        std = np.sqrt(self.m2 / np.maximum(self.num, 1))
        columns = {
            "mean": np.where(has_values, self.mean, 0),
            "std": np.where(std > 0, std, 1),
            "min": np.where(has_values, self.min, 0),
            "max": np.where(has_values, self.max, 0),
        }
        return {name: column.tolist() for name, column in columns.items()}


class StatsPass:
    """Collects the moments of the continuous modalities of tiles, sentinel2 by product level.

    `no_data` says, per modality, how absent values are written; categorical modalities in it are left out.
    """

    def __init__(self, no_data: Mapping[str, NoData]):
        self._no_data = {name: rule for name, rule in no_data.items() if MODALITIES[name].kind == "continuous"}
        self._moments: dict[str, BandMoments] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities that it needs of a tile."""
        return tuple(self._no_data)

    def add(self, tile: Tile) -> None:
        """Take the values of `tile` in."""
        self.merge(self.of_chunk([tile]))

    def of_chunk(self, tiles: Iterable[Tile]) -> dict[str, BandMoments]:
        """What `merge` takes, of some tiles; safe to call from many threads."""
        chunk: dict[str, BandMoments] = {}
        for tile in tiles:
            for name, rule in self._no_data.items():
                key = f"{name}_{tile.product_level.decode()}" if name == "sentinel2" else name
                moments = BandMoments.of(tile.values[name], rule.valid(tile.values[name]))
                chunk[key] = chunk[key].merge(moments) if key in chunk else moments
        return chunk

    def merge(self, chunk: Mapping[str, BandMoments]) -> None:
        """Take in the moments of some tiles; the order of merging decides the last digit."""
        for key, moments in chunk.items():
            self._moments[key] = self._moments[key].merge(moments) if key in self._moments else moments

    def state(self) -> dict[str, list]:
        """All that was taken in, for `json`, exactly."""
        return {key: [array.tolist() for array in vars(moments).values()] for key, moments in self._moments.items()}

    def restore(self, state: Mapping[str, list]) -> None:
        """Go on from what `state` gave."""
        self._moments = {key: BandMoments(*map(np.array, arrays)) for key, arrays in state.items()}

    def result(self) -> dict[str, dict[str, list[float]]]:
        """The content of band_stats.json."""
        return {key: self._moments[key].describe() for key in sorted(self._moments)}


def band_stats(
    source: MMEarthSource | ShardSet, split: str | None = "train", progress: bool = False
) -> dict[str, dict[str, list[float]]]:
    """Statistics in the layout of band_stats.json over the valid values of a split (None: of all tiles).

    Raises SourceError or ShardError for an unknown split or a tile that cannot be read.
    """
    stats = StatsPass({name: source.no_data(name) for name in source.modalities})
    num_tiles = source.num_tiles(split) if isinstance(source, ShardSet) else len(source.rows(split))
    for tile in track(source.tiles(split, stats.names), num_tiles, "stats", enabled=progress):
        stats.add(tile)
    return stats.result()
