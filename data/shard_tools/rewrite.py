"""A shard set out of the samples of others: members are copied as they are stored, re-keyed and shuffled anew.

`merge` and `subset` say which samples go where; this writes them.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpmae.counter_rng import Stream, random_bits
from mpmae.errors import ShardError
from mpmae.files import sync, write_whole
from mpmae.in_order import in_order, num_cores
from mpmae.shard_codecs import decode_scalars
from mpmae.shard_format import MANIFEST_NAME, BandStats, Manifest, ShardEntry, member_name, sample_key
from mpmae.shard_tools import output
from mpmae.shard_tools.lock import locked
from mpmae.shard_tools.progress import MB, say, track
from mpmae.shard_tools.scan import ScannedSet
from mpmae.shard_tools.shard_set import CHUNK_SAMPLES, Sample
from mpmae.shard_tools.stats import Accumulator, StatsPass
from mpmae.shard_tools.tar_walk import header_problem
from mpmae.shard_tools.tile import Tile
from mpmae.tar_members import TAR_END, TAR_HEADER_BYTES

MAX_CHUNK_BYTES = 10**9
STATS_SPLIT = "train"
_PLACE = np.dtype([("part", "<u4"), ("position", "<u4"), ("row", "<u8")])


@dataclass(frozen=True)
class RewriteOptions:
    """How the output is shuffled and cut, as for `build`: a tar is cut before it exceeds `shard_size_mb` (10^6 bytes).

    overwrite: replace the shard set in the output folder. workers: threads (None: one per core); the bytes do not depend on
    them.
    """

    seed: int = 0
    shard_size_mb: float = 256
    max_samples_per_shard: int | None = None
    overwrite: bool = False
    workers: int | None = None
    progress: bool = False

    def problems(self) -> list[str]:
        """What is wrong with the options, one text each."""
        found = []
        if not 0 < self.shard_size_mb < float("inf"):
            found.append(f"shard_size_mb {self.shard_size_mb}; expected a number above 0")
        if self.max_samples_per_shard is not None and self.max_samples_per_shard < 1:
            found.append(f"max_samples_per_shard {self.max_samples_per_shard}; expected at least 1")
        if self.seed < 0:
            found.append(f"seed {self.seed}; expected at least 0")
        if self.workers is not None and self.workers < 1:
            found.append(f"workers {self.workers}; expected at least 1")
        return found


class Selection:
    """The samples of the output: per split the set (by number), position and row of each."""

    def __init__(self) -> None:
        self._places: dict[str, list[np.ndarray]] = {}

    def add(self, split: str, part: int, positions: np.ndarray, rows: np.ndarray) -> None:
        """Add samples of the `part`-th set; `rows` [n], their source rows in the output, are there once in all."""
        places = np.zeros(len(positions), _PLACE)
        places["part"], places["position"], places["row"] = part, positions, rows
        self._places.setdefault(split, []).append(places)

    def shuffled(self, seed: int) -> dict[str, np.ndarray]:
        """Per split its samples in the order of the output: a pure function of the seed and the rows, that of `build`."""
        splits = {}
        for split, parts in self._places.items():
            places = np.sort(np.concatenate(parts), order="row")
            keys = random_bits(seed, Stream.SHARD_ORDER, 0, places["row"])[:, 0]
            splits[split] = places[np.argsort(keys, kind="stable")]
        return splits


def combined_fingerprint(content: object) -> str:
    """The source fingerprint of a set made from others: a hex digest of what describes them (JSON-like)."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_folders(output_dir: Path, parts: Sequence[Path]) -> None:
    """ShardError when the output would replace a set that is read."""
    if output_dir.resolve() in [folder.resolve() for folder in parts]:
        raise ShardError(f"{output_dir} is one of the sets to read; give another folder for the output")


def rewrite(
    output_dir: Path, manifest: Manifest, parts: Sequence[ScannedSet], selection: Selection, options: RewriteOptions
) -> Manifest:
    """Write the set; the finished manifest, written last, is returned.

    manifest: of the output, without splits; its modalities are among those of the parts. The statistics are those of the
    output's split `train`, exact; a key that has no tile there keeps the statistics in `manifest`.

    Raises ShardError for an output folder that is not empty, a full disk, no samples, or damage in a set that is read.
    """
    splits = selection.shuffled(options.seed)
    if not any(map(len, splits.values())):
        raise ShardError(f"{output_dir}: no samples are left to write")
    with ExitStack() as stack:
        with output.disk_errors(str(output_dir), output_dir):
            stack.enter_context(locked(output_dir, say if options.progress else lambda text: None))
        return _write(output_dir, manifest, parts, splits, options)


def _write(
    output_dir: Path,
    manifest: Manifest,
    parts: Sequence[ScannedSet],
    splits: dict[str, np.ndarray],
    options: RewriteOptions,
) -> Manifest:
    copier = _Copier(manifest, parts)
    num_bytes = copier.num_bytes(splits.values())
    workers = _workers(options.workers, num_bytes // sum(map(len, splits.values())))
    old_files, old_bytes = output.prepare(output_dir, options.overwrite)
    _check_space(output_dir, num_bytes, old_bytes)
    with output.disk_errors(str(output_dir), output_dir):
        for path in old_files:
            path.unlink()
    shards: dict[str, tuple[ShardEntry, ...]] = {}
    for split, places in splits.items():
        max_bytes = int(options.shard_size_mb * MB)
        chunks = ((split, places[i : i + CHUNK_SAMPLES]) for i in range(0, len(places), CHUNK_SAMPLES))
        with output.ShardWriter(output_dir, split, manifest, max_bytes, options.max_samples_per_shard) as writer:
            samples = copier.samples(chunks, workers)
            for sample in track(samples, len(places), f"write {split}", enabled=options.progress):
                writer.add(*sample)
        shards[split] = tuple(writer.entries)
    found = {key: BandStats.model_validate(values) for key, values in copier.stats.result().items()}
    band_stats = dict(sorted((manifest.band_stats | found).items()))
    manifest = manifest.model_copy(update={"splits": shards, "band_stats": band_stats})
    with output.disk_errors(str(output_dir / MANIFEST_NAME), output_dir):
        sync(output_dir)
        write_whole(output_dir / MANIFEST_NAME, manifest.dump())
        sync(output_dir)
    return manifest


def _check_space(folder: Path, needed_bytes: int, freed_bytes: int) -> None:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free + freed_bytes
    if needed_bytes > free_bytes:
        raise ShardError(
            f"{folder}: the shard set needs {needed_bytes / MB:,.0f} MB, the disk has {free_bytes / MB:,.0f} MB; free some "
            "space, give a folder elsewhere or take fewer samples"
        )


def _workers(wanted: int | None, sample_bytes: int) -> int:
    """Threads whose chunks, up to three each at a time, stay within MAX_CHUNK_BYTES."""
    workers = num_cores() if wanted is None else wanted
    return max(1, min(workers, MAX_CHUNK_BYTES // (3 * CHUNK_SAMPLES * sample_bytes)))


class _Copier:
    """Reads samples as the output needs them: the members it keeps, in bytes, and the statistics of its split `train`."""

    def __init__(self, manifest: Manifest, parts: Sequence[ScannedSet]):
        self._manifest, self._parts = manifest, parts
        stored = parts[0].shard_set.manifest
        self._kept = [i for i, entry in enumerate(stored.pixels) if entry in manifest.pixels]
        self._keeps_scalars = stored.scalars_dtype == manifest.scalars_dtype
        self._bits = [stored.modalities.index(name) for name in manifest.modalities]
        self.stats = StatsPass({entry.name: entry.no_data for entry in (*manifest.pixels, *manifest.scalars)})

    def num_bytes(self, splits: Iterable[np.ndarray]) -> int:
        """Bytes of the tars of the output, if each split is one tar."""
        scalars_bytes, total = output.tar_bytes([self._manifest.scalars_dtype.itemsize]), 0
        for places in splits:
            for number, part in enumerate(self._parts):
                sizes = part.index["size"][places["position"][places["part"] == number]][:, self._kept].astype(np.int64)
                total += int((sizes + -sizes % TAR_HEADER_BYTES + TAR_HEADER_BYTES).sum()) + len(sizes) * scalars_bytes
            total += len(TAR_END)
        return total

    def samples(self, chunks: Iterator[tuple[str, np.ndarray]], workers: int | None) -> Iterator[tuple]:
        """The arguments of `ShardWriter.add` for every sample, in order."""
        for samples, moments in in_order(lambda chunk: self._read(*chunk), chunks, workers):
            self.stats.merge(moments)
            yield from samples

    def _read(self, split: str, places: np.ndarray) -> tuple[list[tuple], dict[str, Accumulator]]:
        read: list = [None] * len(places)
        for number, part in enumerate(self._parts):
            mine = np.flatnonzero(places["part"] == number)
            positions = places["position"][mine]
            # In the order of the tars, so that a tar is opened once a chunk and read forwards.
            mine = mine[np.argsort(positions)].tolist()
            samples = [part.sample(int(places["position"][i])) for i in mine]
            for i, sample, stored in zip(mine, samples, part.shard_set.stored(samples), strict=True):
                self._check_headers(part, sample, stored)
                read[i] = part, sample, stored
        moments = self.stats.of_chunk(self._tiles(read)) if split == STATS_SPLIT else {}
        rows = places["row"].tolist()
        return [self._copied(row, *sample) for row, sample in zip(rows, read, strict=True)], moments

    def _tiles(self, read: list[tuple[ScannedSet, Sample, memoryview]]) -> Iterator[Tile]:
        for part, sample, stored in read:
            yield part.shard_set.decode(sample, stored, self.stats.names)

    def _check_headers(self, part: ScannedSet, sample: Sample, stored: memoryview) -> None:
        manifest, start = part.shard_set.manifest, sample.start
        places = zip(manifest.members, sample.index_row["offset"].tolist(), sample.index_row["size"].tolist(), strict=True)
        for member, offset, size in places:
            header = bytes(stored[offset - TAR_HEADER_BYTES - start : offset - start])
            problem = header_problem(header, member_name(sample_key(sample.ordinal), member, manifest.codec), size)
            if problem:
                raise ShardError(f"{part.shard_set.describe(sample)}: {problem}; run `mpmae-shards verify`")

    def _copied(self, row: int, part: ScannedSet, sample: Sample, stored: memoryview) -> tuple[int, int, list[bytes], str]:
        members, presence = sample.members(stored), int(sample.index_row["presence"])
        record = decode_scalars(part.shard_set.manifest, members[-1])
        scalars = bytes(members[-1])
        if not self._keeps_scalars:
            kept = np.zeros((), self._manifest.scalars_dtype)
            for name in self._manifest.scalars_dtype.names:
                kept[name] = record[name]
            scalars = kept.tobytes()
        bits = sum((presence >> old & 1) << new for new, old in enumerate(self._bits))
        tile = f"tile {bytes(record['tile_id']).decode(errors='replace')} of {part.folder}"
        return row, bits, [*(bytes(members[i]) for i in self._kept), scalars], tile
