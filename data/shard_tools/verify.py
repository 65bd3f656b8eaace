"""Checks a shard set byte by byte, and against its source value by value.

All problems are collected; each names the shard and, where there is one, the sample.
"""

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mpmae.errors import MpmaeError, ShardError
from mpmae.files import TEMP_SUFFIX
from mpmae.shard_format import (
    SCALARS_MEMBER,
    TAR_END,
    TAR_HEADER_BYTES,
    Manifest,
    ShardEntry,
    dali_index_name,
    index_name,
    load_index,
    load_manifest,
    member_name,
    sample_key,
)
from mpmae.shard_tools.output import dali_index
from mpmae.shard_tools.progress import track
from mpmae.shard_tools.source import MMEarthSource
from mpmae.shard_tools.tile import Tile, decode_members, presence_bits

HASH_CHUNK_BYTES = 1 << 22


@dataclass
class VerifyReport:
    """What was checked and what was found wrong; `num_compared` samples were compared with the source."""

    num_shards: int = 0
    num_samples: int = 0
    num_bytes: int = 0
    num_compared: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(shards_dir: str | Path, source_dir: str | Path | None = None, progress: bool = False) -> VerifyReport:
    """Check hashes, sizes, indices, tar headers, every member, presence bits, and that each tile is there once.

    With `source_dir`, every value of every tile must equal the source bit for bit, and the splits must hold the same rows.
    Raises ShardError without a readable manifest, SourceError for an unusable source.
    """
    manifest = load_manifest(shards_dir)
    if source_dir is None:
        return _Check(Path(shards_dir), manifest, None, progress).run()
    with MMEarthSource(source_dir, manifest.modalities) as source:
        return _Check(Path(shards_dir), manifest, source, progress).run()


class _Check:
    def __init__(self, folder: Path, manifest: Manifest, source: MMEarthSource | None, progress: bool):
        self.folder, self.manifest, self.source, self.progress = folder, manifest, source, progress
        self.report = VerifyReport()

    def run(self) -> VerifyReport:
        self._check_folder()
        if self.source is not None:
            self._check_source()
        seen: dict[int, str] = {}
        for split in self.manifest.splits:
            samples = self._samples(split)
            rows, num_read = {}, 0
            for sample, row in track(samples, self.manifest.num_samples(split), f"verify {split}", enabled=self.progress):
                if row in seen:
                    self._problem(f"{sample}: row {row} is in the set twice, first as {seen[row]}")
                seen[row] = rows[row] = sample
                num_read += 1
            if self.source is not None:
                self._check_rows(split, rows, whole=num_read == self.manifest.num_samples(split))
        return self.report

    def _problem(self, text: str) -> None:
        self.report.problems.append(text)

    def _check_folder(self) -> None:
        listed = {shard.name for shards in self.manifest.splits.values() for shard in shards}
        for path in sorted(self.folder.iterdir()):
            if path.name.endswith(TEMP_SUFFIX) or (path.suffix == ".tar" and path.name not in listed):
                self._problem(f"{path} does not belong to the set: it is not in the manifest; remove it")

    def _check_source(self) -> None:
        manifest, source = self.manifest, self.source
        if manifest.source.fingerprint != source.fingerprint:
            self._problem(f"{source.folder} is not, or no longer, the source of the set: its fingerprint differs")
        if manifest.band_stats != source.band_stats:
            self._problem(f"{source.folder}: its band statistics differ from the manifest's")
        for entry in (*manifest.pixels, *manifest.scalars):
            shape = entry.shape if entry in manifest.pixels else (entry.length,)
            found = source.shapes[entry.name], source.dtypes[entry.name].str
            if found != (shape, entry.dtype):
                self._problem(f"{source.folder}: {entry.name} is {found}, in the set {(shape, entry.dtype)}")

    def _check_rows(self, split: str, rows: dict[int, str], whole: bool) -> None:
        if split not in self.source.splits:
            self._problem(f"{self.source.folder} has no split {split!r}")
            return
        expected = set(self.source.splits[split].tolist())
        # The rows of samples that could not be read are unknown, and those samples are reported already.
        for row in sorted(expected - rows.keys()) if whole else ():
            self._problem(f"split {split} lacks {self.source.describe(row)} of the source")
        for row in sorted(rows.keys() - expected):
            self._problem(f"{rows[row]}: row {row} is not in split {split} of the source")

    def _samples(self, split: str) -> Iterator[tuple[str, int]]:
        first_ordinal = 0
        for shard in self.manifest.shards(split):
            self.report.num_shards += 1
            path = self.folder / shard.name
            try:
                self._check_bytes(path, shard)
                index = self._check_index(path, shard, first_ordinal)
                with path.open("rb") as file:
                    yield from self._walk(file, path, shard, index, first_ordinal)
            except OSError as error:
                self._problem(f"{path} cannot be read ({error.strerror or error}); restore it or rebuild the set")
            first_ordinal += shard.num_samples

    def _check_bytes(self, path: Path, shard: ShardEntry) -> None:
        digest, num_bytes = hashlib.sha256(), 0
        with path.open("rb") as file:
            while chunk := file.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
                num_bytes += len(chunk)
        self.report.num_bytes += num_bytes
        if num_bytes != shard.num_bytes:
            self._problem(f"{path}: {num_bytes} bytes, the manifest says {shard.num_bytes}")
        elif digest.hexdigest() != shard.sha256:
            self._problem(f"{path}: its sha256 is not the manifest's: its bytes have changed")

    def _check_index(self, path: Path, shard: ShardEntry, first_ordinal: int) -> np.ndarray | None:
        index_path, dali_path = (path.with_name(name(shard.name)) for name in (index_name, dali_index_name))
        try:
            rows = load_index(index_path, self.manifest, shard)
        except ShardError as error:
            self.report.problems += error.problems
            return None
        if not dali_path.is_file():
            self._problem(f"{dali_path} is missing; restore it or rebuild the set")
        elif dali_path.read_bytes() != dali_index(self.manifest, rows, first_ordinal):
            self._problem(f"{dali_path} does not list the members of {index_path.name}")
        return rows

    def _walk(
        self, file: BinaryIO, path: Path, shard: ShardEntry, index: np.ndarray | None, first_ordinal: int
    ) -> Iterator[tuple[str, int]]:
        """Every sample of a tar that can be read, as its label and row.

        The index helps past a damaged header to the next sample; without one the tar alone is checked and has no rows.
        """
        num_bytes = path.stat().st_size
        for i in range(shard.num_samples):
            key = sample_key(first_ordinal + i)
            label = f"{path}, sample {key}"
            members = self._read_members(file, label, key, None if index is None else index[i])
            if members is None:
                num_left = shard.num_samples - i - 1
                next_byte = num_bytes if index is None or not num_left else int(index[i + 1]["offset"][0]) - TAR_HEADER_BYTES
                if next_byte >= num_bytes:
                    self._problem(f"{path}: {num_left} samples after {key} are missing or cannot be found")
                    return
                file.seek(next_byte)
                continue
            self.report.num_samples += 1
            if index is None:
                self._decode(label, -1, members)
                continue
            row = int(index[i]["row"])
            tile = self._decode(label, row, members)
            if tile is not None:
                self._check_tile(label, tile, int(index[i]["presence"]))
            yield label, row
        if file.read() != TAR_END:
            self._problem(f"{path}: does not end after its {shard.num_samples} samples as a tar must")

    def _read_members(self, file: BinaryIO, label: str, key: str, index_row: np.void | None) -> list[bytes] | None:
        members = []
        for j, member in enumerate(self.manifest.members):
            header, offset = file.read(TAR_HEADER_BYTES), file.tell()
            try:
                info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
            except (tarfile.HeaderError, UnicodeDecodeError) as error:
                self._problem(f"{label}: no tar header of {member} at byte {offset - len(header)} ({error})")
                return None
            expected_name = member_name(key, member, self.manifest.codec)
            if info.name != expected_name or not info.isreg():
                self._problem(f"{label}: tar member {info.name!r}, expected the file {expected_name!r}")
            if index_row is not None and (offset, info.size) != (index_row["offset"][j], index_row["size"][j]):
                listed = f"{index_row['size'][j]} at {index_row['offset'][j]}"
                self._problem(f"{label}: {member} has {info.size} bytes at {offset}, its index says {listed}")
            data = file.read(info.size)
            padding = file.read(-info.size % TAR_HEADER_BYTES)
            if len(data) != info.size or len(padding) != -info.size % TAR_HEADER_BYTES:
                self._problem(f"{label}: the tar is cut off in {member}, at byte {file.tell()}")
                return None
            members.append(data)
        return members

    def _decode(self, label: str, row: int, members: list[bytes]) -> Tile | None:
        try:
            return decode_members(self.manifest, row, members)
        except ShardError as error:
            self.report.problems += [f"{label}: {problem}" for problem in error.problems]
            return None

    def _check_tile(self, label: str, tile: Tile, presence: int) -> None:
        found = presence_bits(self.manifest, tile.values)
        wrong = [name for i, name in enumerate(self.manifest.modalities) if (found ^ presence) >> i & 1]
        if wrong:
            self._problem(f"{label}: the index is wrong about the presence of {', '.join(wrong)}")
        elif found != presence:
            self._problem(f"{label}: the index sets presence bits of no modality ({presence:#x})")
        if tile.row >= self.manifest.source.num_tiles:
            self._problem(f"{label}: row {tile.row}, but the source has {self.manifest.source.num_tiles} tiles")
        elif self.source is not None and tile.row < self.source.num_tiles:
            self._compare(label, tile)

    def _compare(self, label: str, tile: Tile) -> None:
        self.report.num_compared += 1
        try:
            original = self.source.read_tile(tile.row)
        except MpmaeError as error:
            self.report.problems += [f"{label}: {problem}" for problem in error.problems]
            return
        if (tile.tile_id, tile.product_level) != (original.tile_id, original.product_level):
            self._problem(
                f"{label}: {SCALARS_MEMBER} say tile {tile.tile_id!r} {tile.product_level!r}, row {tile.row} of the source "
                f"is {original.tile_id!r} {original.product_level!r}"
            )
        different = [
            name for name in self.manifest.modalities if tile.values[name].tobytes() != original.values[name].tobytes()
        ]
        if different:
            where = self.source.describe(tile.row)
            self._problem(f"{label}: {', '.join(different)} not equal to {where} of the source")
