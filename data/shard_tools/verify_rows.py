"""Whether the samples of a set are the tiles they should be, once each, from the rows of its indices."""

import json
from pathlib import Path

import numpy as np

from mpmae.shard_format import Manifest, ShardEntry, sample_key
from mpmae.shard_tools.output import SKIPPED_NAME
from mpmae.shard_tools.tile_source import TileSource


class SeenRows:
    """The source rows of a set's samples, 8 bytes each."""

    def __init__(self, folder: Path, manifest: Manifest):
        self._folder, self._manifest = folder, manifest
        self._shards: list[tuple[str, ShardEntry, int]] = []
        self._rows: list[np.ndarray] = []

    def add(self, split: str, shard: ShardEntry, first_ordinal: int, rows: np.ndarray) -> None:
        """Take in the rows of a shard whose first sample is the `first_ordinal`-th of its split."""
        self._shards.append((split, shard, first_ordinal))
        self._rows.append(rows.copy())

    def problems(self, source: TileSource | None) -> list[str]:
        """Rows that the source cannot have, rows that are there twice, and how the splits differ from those of `source`."""
        rows = np.concatenate([np.zeros(0, np.uint64), *self._rows])
        ends = np.cumsum([len(part) for part in self._rows])
        num_tiles = self._manifest.source.num_tiles
        found = []
        for position in np.flatnonzero(rows >= np.uint64(num_tiles)):
            found.append(f"{self._label(position, ends)}: row {rows[position]}, but the source has {num_tiles} tiles")
        order = np.argsort(rows, kind="stable")
        again = np.flatnonzero(rows[order][1:] == rows[order][:-1])
        for i in again:
            first, second = (self._label(order[j], ends) for j in (i, i + 1))
            found.append(f"{second}: row {rows[order[i]]} is in the set twice, first as {first}")
        if source is not None:
            skipped = self._skipped(found)
            for split in self._manifest.splits:
                found += self._compare(split, rows, ends, source, skipped)
        return found

    def _skipped(self, problems: list[str]) -> np.ndarray:
        """Rows that the build left out because they could not be read, as its report lists them."""
        path = self._folder / SKIPPED_NAME
        if not path.is_file():
            return np.zeros(0, np.uint64)
        try:
            return np.array([int(tile["row"]) for tile in json.loads(path.read_bytes())["tiles"]], np.uint64)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            problems.append(f"{path}: cannot be read as a list of skipped tiles ({error!r}); restore the file")
            return np.zeros(0, np.uint64)

    def _label(self, position: int, ends: np.ndarray) -> str:
        number = int(np.searchsorted(ends, position, side="right"))
        _, shard, first_ordinal = self._shards[number]
        start = int(ends[number]) - len(self._rows[number])
        return f"{self._folder / shard.name}, sample {sample_key(first_ordinal + int(position) - start)}"

    def _compare(self, split: str, rows: np.ndarray, ends: np.ndarray, source: TileSource, skipped: np.ndarray) -> list[str]:
        if split not in source.splits:
            return [f"{source.folder} has no split {split!r}"]
        numbers = [i for i, (name, _, _) in enumerate(self._shards) if name == split]
        positions = np.concatenate(
            [np.zeros(0, np.int64), *(np.arange(ends[i] - len(self._rows[i]), ends[i]) for i in numbers)]
        )
        expected = np.asarray(source.splits[split]).astype(np.uint64)
        own, found = rows[positions], []
        # The rows of a shard without a good index are unknown, and that is told already.
        if len(own) == self._manifest.num_samples(split):
            for row in np.setdiff1d(expected, np.concatenate([own, skipped])):
                found.append(f"split {split} lacks {source.describe(int(row))} of the source")
        for position in positions[~np.isin(own, expected)]:
            found.append(f"{self._label(position, ends)}: row {rows[position]} is not in split {split} of the source")
        return found
