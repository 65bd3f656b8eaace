"""Checks a shard set byte by byte, and against its source value by value.

All problems are collected; each names the shard and, where there is one, the sample and the byte. Shards are hashed and
samples decoded on many threads; memory is bounded by a chunk of samples per thread and 16 bytes per sample of the set.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mpmae.errors import MpmaeError, ShardError
from mpmae.files import TEMP_SUFFIX
from mpmae.in_order import in_order
from mpmae.modalities import PRODUCT_LEVELS
from mpmae.shard_format import SCALARS_MEMBER, ShardEntry, dali_index_name, index_name, member_name, sample_key
from mpmae.shard_tools.output import dali_index
from mpmae.shard_tools.progress import track
from mpmae.shard_tools.shard_set import CHUNK_SAMPLES, Sample, ShardSet
from mpmae.shard_tools.source import MMEarthSource
from mpmae.shard_tools.tar_walk import header_problem, walk_samples
from mpmae.shard_tools.tile import Tile, decode_members, presence_bits
from mpmae.shard_tools.tile_source import TileSource
from mpmae.shard_tools.verify_rows import SeenRows
from mpmae.tar_members import TAR_END, TAR_HEADER_BYTES

HASH_CHUNK_BYTES = 1 << 22


@dataclass
class VerifyReport:
    """What was checked and what was found wrong.

    num_decoded samples were decoded, num_compared of them compared with the source.
    """

    num_shards: int = 0
    num_samples: int = 0
    num_bytes: int = 0
    num_decoded: int = 0
    num_compared: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(
    shards_dir: str | Path,
    source: TileSource | str | Path | None = None,
    *,
    fast: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> VerifyReport:
    """Check hashes, sizes, indices, tar headers, every member, presence bits, and that each tile is there once.

    fast: only what needs no decoding: the hashes and sizes of tars and indices, and what the manifest and the indices say.
    source: a source, or an MMEarth folder; every value of every tile must equal it bit for bit, and the splits must hold the
    same rows. workers: threads (None: one per core).

    Raises ShardError without a readable manifest or when both `fast` and a source are asked for, SourceError for an unusable
    source.
    """
    if fast and source is not None:
        raise ShardError("a fast verify compares no values: leave out `fast` or the source")
    shard_set = ShardSet(shards_dir)
    is_folder = isinstance(source, str | Path)
    with MMEarthSource(source, shard_set.modalities) if is_folder else nullcontext(source) as tile_source:
        return _Check(shard_set, tile_source, fast, workers, progress).run()


@dataclass
class _Found:
    """What one piece of work found; `counts` towards the report, `num_done` towards the progress bar."""

    problems: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    num_done: int = 0

    def count(self, name: str, num: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + num


class _Check:
    def __init__(self, shard_set: ShardSet, source: TileSource | None, fast: bool, workers: int | None, progress: bool):
        self.shard_set, self.manifest, self.folder = shard_set, shard_set.manifest, shard_set.folder
        self.source, self.fast, self.workers, self.progress = source, fast, workers, progress
        self.report = VerifyReport()

    def run(self) -> VerifyReport:
        self._check_folder()
        if self.source is not None:
            self._check_source()
        seen = SeenRows(self.folder, self.manifest)
        results = in_order(lambda work: work[0](*work[1:]), self._work(seen), self.workers)
        for _ in track(self._take(results), self.shard_set.num_tiles(None), "verify", enabled=self.progress):
            pass
        self.report.problems += seen.problems(self.source)
        return self.report

    def _take(self, results: Iterator[_Found]) -> Iterator[None]:
        for found in results:
            self.report.problems += found.problems
            for name, num in found.counts.items():
                setattr(self.report, name, getattr(self.report, name) + num)
            yield from [None] * found.num_done

    def _check_folder(self) -> None:
        listed = {shard.name for shards in self.manifest.splits.values() for shard in shards}
        for path in sorted(self.folder.iterdir()):
            if path.name.endswith(TEMP_SUFFIX) or (path.suffix == ".tar" and path.name not in listed):
                self.report.problems.append(f"{path} does not belong to the set: it is not in the manifest; remove it")

    def _check_source(self) -> None:
        manifest, source, problems = self.manifest, self.source, self.report.problems
        if manifest.source.fingerprint != source.fingerprint:
            problems.append(f"{source.folder} is not, or no longer, the source of the set: its fingerprint differs")
        if source.band_stats is not None and manifest.band_stats != source.band_stats:
            problems.append(f"{source.folder}: its band statistics differ from the manifest's")
        for entry in (*manifest.pixels, *manifest.scalars):
            shape = entry.shape if entry in manifest.pixels else (entry.length,)
            if entry.name not in source.shapes:
                problems.append(f"{source.folder} has no {entry.name}")
                continue
            found = tuple(source.shapes[entry.name]), source.dtypes[entry.name].str
            if found != (shape, entry.dtype):
                problems.append(f"{source.folder}: {entry.name} is {found}, in the set {(shape, entry.dtype)}")

    def _work(self, seen: SeenRows) -> Iterator[tuple]:
        """The pieces of work, as calls that give a _Found: per shard its bytes, then its samples in chunks."""
        for split, shards in self.manifest.splits.items():
            first = 0
            for shard in shards:
                rows, problems = self._load_index(shard, first)
                yield self._check_bytes, shard, rows, first, problems
                if rows is not None:
                    seen.add(split, shard, first, rows["row"])
                if not self.fast and rows is None:
                    yield self._walk, shard, first
                elif not self.fast:
                    samples = [Sample(shard, first + i, row) for i, row in enumerate(rows)]
                    for i in range(0, len(samples), CHUNK_SAMPLES):
                        yield self._check_samples, shard, samples[i : i + CHUNK_SAMPLES]
                first += shard.num_samples

    def _load_index(self, shard: ShardEntry, first_ordinal: int) -> tuple[np.ndarray | None, list[str]]:
        try:
            rows = self.shard_set.index(shard)
        except ShardError as error:
            return None, error.problems
        path, expected = self.folder / dali_index_name(shard.name), dali_index(self.manifest, rows, first_ordinal)
        try:
            if not path.is_file():
                return rows, [f"{path} is missing; make it again with `mpmae-shards index`"]
            if path.stat().st_size != len(expected) or path.read_bytes() != expected:
                problem = f"{path} does not list the members of {index_name(shard.name)}"
                return rows, [f"{problem}; make it again with `mpmae-shards index`"]
        except OSError as error:
            return rows, [f"{path} cannot be read ({error.strerror or error})"]
        return rows, []

    def _check_bytes(self, shard: ShardEntry, rows: np.ndarray | None, first: int, problems: list[str]) -> _Found:
        """Size, hash and end of a tar. A tar that is cut off is told once, with the first sample that it lacks."""
        found = _Found(list(problems), {"num_shards": 1}, shard.num_samples if self.fast else 0)
        path = self.shard_set.path(shard)
        if not path.is_file():
            found.problems.append(f"{path} cannot be read (no such file); restore it or rebuild the set")
            return found
        digest, num_bytes, tail = hashlib.sha256(), 0, b""
        try:
            with path.open("rb", buffering=0) as file:
                while chunk := file.read(HASH_CHUNK_BYTES):
                    digest.update(chunk)
                    num_bytes += len(chunk)
                    tail = (tail + chunk)[-len(TAR_END) :] if len(chunk) < len(TAR_END) else chunk[-len(TAR_END) :]
        except OSError as error:
            found.problems.append(f"{path} cannot be read ({error.strerror or error}); restore it or rebuild the set")
            return found
        found.counts["num_bytes"] = num_bytes
        if self.fast:
            found.counts["num_samples"] = shard.num_samples
        if num_bytes != shard.num_bytes:
            found.problems.append(f"{path}: {num_bytes} bytes, the manifest says {shard.num_bytes}")
            if rows is not None and num_bytes < shard.num_bytes:
                found.problems += self._cut_off(path, rows, first, num_bytes)
        elif digest.hexdigest() != shard.sha256:
            found.problems.append(f"{path}: its sha256 is not the manifest's: its bytes have changed")
        elif tail != TAR_END:
            found.problems.append(f"{path}: does not end after its {shard.num_samples} samples as a tar must")
        return found

    def _cut_off(self, path: Path, rows: np.ndarray, first: int, num_bytes: int) -> list[str]:
        ends = rows["offset"] + rows["size"]
        num_whole = int((ends[:, -1] <= num_bytes).sum())
        if num_whole == len(rows):
            return []
        member = self.manifest.members[int((ends[num_whole] <= num_bytes).sum())]
        where = f"sample {sample_key(first + num_whole)}: the tar is cut off in {member}, at byte {num_bytes}"
        return [f"{path}, {where}; {len(rows) - num_whole} samples are missing"]

    def _check_samples(self, shard: ShardEntry, samples: list[Sample]) -> _Found:
        found, path = _Found(num_done=len(samples)), self.shard_set.path(shard)
        if not path.is_file():  # told with its bytes
            return found
        try:
            with path.open("rb", buffering=0) as file:
                num_bytes = os.fstat(file.fileno()).st_size
                for sample in samples:
                    if sample.end > num_bytes:
                        break
                    file.seek(sample.start)
                    self._check_sample(sample, memoryview(file.read(sample.end - sample.start)), found)
        except OSError as error:
            found.problems.append(f"{path} cannot be read ({error.strerror or error}); restore it or rebuild the set")
        return found

    def _check_sample(self, sample: Sample, stored: memoryview, found: _Found) -> None:
        label, key = f"{self.shard_set.path(sample.shard)}, sample {sample_key(sample.ordinal)}", sample_key(sample.ordinal)
        if len(stored) < sample.end - sample.start:
            found.problems.append(f"{label}: the tar is cut off, at byte {sample.start + len(stored)}")
            return
        found.count("num_samples")
        sizes = sample.index_row["size"].tolist()
        for member, offset, size in zip(self.manifest.members, sample.index_row["offset"].tolist(), sizes, strict=True):
            start = offset - TAR_HEADER_BYTES
            header = bytes(stored[start - sample.start : offset - sample.start])
            problem = header_problem(header, member_name(key, member, self.manifest.codec), size)
            if problem:
                found.problems.append(f"{label}: byte {start}: {problem}")
        tile = self._decode(label, sample.members(stored), int(sample.index_row["row"]), found)
        if tile is not None:
            self._check_tile(label, tile, int(sample.index_row["presence"]), found)

    def _walk(self, shard: ShardEntry, first: int) -> _Found:
        """The samples of a tar whose index is of no use: their members are checked, their rows are unknown."""
        found, path = _Found(num_done=shard.num_samples), self.shard_set.path(shard)
        if not path.is_file():  # told with its bytes
            return found
        try:
            with path.open("rb") as file:
                for i, walked in enumerate(walk_samples(file, self.manifest, shard.num_samples, first)):
                    found.count("num_samples")
                    self._decode(f"{path}, sample {sample_key(first + i)}", walked.members, -1, found)
        except ShardError as error:
            found.problems += [f"{path}: {problem}" for problem in error.problems]
        except OSError as error:
            found.problems.append(f"{path} cannot be read ({error.strerror or error}); restore it or rebuild the set")
        return found

    def _decode(self, label: str, members: list, row: int, found: _Found) -> Tile | None:
        try:
            tile = decode_members(self.manifest, row, members)
        except ShardError as error:
            found.problems += [f"{label}: {problem}" for problem in error.problems]
            return None
        found.count("num_decoded")
        return tile

    def _check_tile(self, label: str, tile: Tile, presence: int, found: _Found) -> None:
        bits = presence_bits(self.manifest, tile.values)
        wrong = [name for i, name in enumerate(self.manifest.modalities) if (bits ^ presence) >> i & 1]
        if wrong:
            found.problems.append(f"{label}: the index is wrong about the presence of {', '.join(wrong)}")
        elif bits != presence:
            found.problems.append(f"{label}: the index sets presence bits of no modality ({presence:#x})")
        if tile.product_level.decode(errors="replace") not in PRODUCT_LEVELS:
            expected = " or ".join(PRODUCT_LEVELS)
            found.problems.append(f"{label}: {SCALARS_MEMBER}: product level {tile.product_level!r}, expected {expected}")
        if self.source is not None and tile.row < self.source.num_tiles:
            self._compare(label, tile, found)

    def _same(self, name: str, values: np.ndarray, original: np.ndarray) -> bool:
        """Whether the bits are equal; for a quantised modality, whether the values are within its stated error."""
        entry = next((entry for entry in self.manifest.pixels if entry.name == name), None)
        if entry is None or entry.quantisation is None:
            return values.tobytes() == original.tobytes()
        valid = np.isfinite(original)
        if (np.isfinite(values) != valid).any():
            return False
        error = np.abs(values[valid].astype(np.float64) - original[valid].astype(np.float64))
        return not error.size or error.max() <= entry.quantisation.max_error

    def _compare(self, label: str, tile: Tile, found: _Found) -> None:
        found.count("num_compared")
        try:
            original = self.source.read_tile(tile.row, [n for n in self.manifest.modalities if n in self.source.shapes])
        except MpmaeError as error:
            found.problems += [f"{label}: {problem}" for problem in error.problems]
            return
        if (tile.tile_id, tile.product_level) != (original.tile_id, original.product_level):
            found.problems.append(
                f"{label}: {SCALARS_MEMBER} say tile {tile.tile_id!r} {tile.product_level!r}, row {tile.row} of the source "
                f"is {original.tile_id!r} {original.product_level!r}"
            )
        different = [name for name, values in original.values.items() if not self._same(name, tile.values[name], values)]
        if different:
            where = self.source.describe(tile.row)
            found.problems.append(f"{label}: {', '.join(different)} not equal to {where} of the source")
