"""Makes a lost or damaged index again from its tar; kept only when its hash is the one in the manifest.

A tar holds everything of an index but the samples' rows in the source. Those come from the source itself, by tile id, or,
when the set has every tile of its source and only one split lost indices, from what is left: the rows of no other shard, in
the order that the seed gives them.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mpmae.counter_rng import Stream, random_bits
from mpmae.errors import ShardError
from mpmae.files import write_whole
from mpmae.in_order import in_order
from mpmae.index_checks import rows_of
from mpmae.shard_format import ShardEntry, dali_index_name, index_bytes, index_name, sample_key
from mpmae.shard_tools import output
from mpmae.shard_tools.progress import track
from mpmae.shard_tools.shard_set import ShardSet
from mpmae.shard_tools.source import MMEarthSource
from mpmae.shard_tools.tar_walk import walk_samples
from mpmae.shard_tools.tile import decode_members, presence_bits

HASH_CHUNK_BYTES = 1 << 22


@dataclass
class IndexReport:
    """Names of the files that were made again, and what could not be."""

    made: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Lost:
    """A shard without a good index: its split and the number of its first sample there."""

    split: str
    shard: ShardEntry
    first_ordinal: int


def rebuild_indices(
    shards_dir: str | Path, source_dir: str | Path | None = None, workers: int | None = None, progress: bool = False
) -> IndexReport:
    """Write the index files of a set that are absent or not the manifest's; others are left alone.

    source_dir: the MMEarth folder that the set was built from. Raises ShardError without a readable manifest or for a write
    that fails, SourceError for an unusable source.
    """
    shard_set = ShardSet(shards_dir)
    report, good, lost = IndexReport(), {}, []
    for split, shards in shard_set.manifest.splits.items():
        first = 0
        for shard in shards:
            try:
                good[shard.name] = shard_set.index(shard)
                _write_dali_index(shard_set, shard, good[shard.name], first, report)
            except ShardError:  # absent or changed: what this mends
                lost.append(_Lost(split, shard, first))
            first += shard.num_samples
    rows = _rows_by_order(shard_set, good, lost) if source_dir is None else {}
    ids = {} if source_dir is None else _rows_by_id(source_dir)
    results = in_order(lambda entry: _walk(shard_set, entry), lost, workers)
    for entry, (index, tile_ids, problem) in zip(
        lost, track(results, len(lost), "index", unit="shards", enabled=progress), strict=True
    ):
        path = shard_set.folder / index_name(entry.shard.name)
        if not problem and source_dir is not None:
            problem = _take_ids(index, tile_ids, ids, Path(source_dir))
        elif not problem and entry.shard.name in rows:
            index["row"] = rows[entry.shard.name]
        elif not problem:
            problem = "the rows of its samples are not in the tar and do not follow from the other shards; give --source"
        if not problem and hashlib.sha256(index_bytes(index)).hexdigest() != entry.shard.index_sha256:
            problem = f"made from the tar, it is not the manifest's: {_difference(path, shard_set, entry.shard, index)}"
        if problem:
            report.problems.append(f"{path}: {problem}")
            continue
        with output.disk_errors(str(path), shard_set.folder):
            write_whole(path, index_bytes(index))
        report.made.append(path.name)
        _write_dali_index(shard_set, entry.shard, index, entry.first_ordinal, report)
    return report


def _write_dali_index(shard_set: ShardSet, shard: ShardEntry, rows: np.ndarray, first: int, report: IndexReport) -> None:
    path, data = shard_set.folder / dali_index_name(shard.name), output.dali_index(shard_set.manifest, rows, first)
    with output.disk_errors(str(path), shard_set.folder):
        if not path.is_file() or path.read_bytes() != data:
            write_whole(path, data)
            report.made.append(path.name)


def _walk(shard_set: ShardSet, lost: _Lost) -> tuple[np.ndarray, list[bytes], str | None]:
    """The index of a tar but for its rows, the tile ids, and what is wrong with the tar, if anything."""
    manifest, shard, rows, ids = shard_set.manifest, lost.shard, [], []
    try:
        with shard_set.open_tar(shard) as raw:
            digest = hashlib.sha256()
            while chunk := raw.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
            if digest.hexdigest() != shard.sha256:
                raise ShardError(f"the sha256 of {shard.name} is not the manifest's: restore the tar first")
            for i, walked in enumerate(walk_samples(raw, manifest, shard.num_samples, lost.first_ordinal)):
                try:
                    tile = decode_members(manifest, 0, walked.members)
                except ShardError as error:
                    key = sample_key(lost.first_ordinal + i)
                    raise ShardError([f"{shard.name}, sample {key}: {p}" for p in error.problems]) from error
                rows.append((0, presence_bits(manifest, tile.values), walked.offsets, walked.sizes))
                ids.append(tile.tile_id)
    except ShardError as error:
        return np.zeros(0, manifest.index_dtype), [], "; ".join(error.problems)
    except OSError as error:
        return np.zeros(0, manifest.index_dtype), [], f"{shard.name} cannot be read ({error.strerror or error})"
    return np.array(rows, manifest.index_dtype), ids, None


def _rows_by_order(shard_set: ShardSet, good: dict[str, np.ndarray], lost: list[_Lost]) -> dict[str, np.ndarray]:
    """Rows of the lost shards, if they follow from the good ones; empty if not."""
    manifest = shard_set.manifest
    if len({entry.split for entry in lost}) != 1 or shard_set.num_tiles(None) != manifest.source.num_tiles:
        return {}
    split, known = lost[0].split, np.concatenate([np.zeros(0, np.uint64), *(rows["row"] for rows in good.values())])
    missing = np.setdiff1d(np.arange(manifest.source.num_tiles, dtype=np.uint64), known)
    own = [good[shard.name]["row"] for shard in manifest.shards(split) if shard.name in good]
    rows = np.sort(np.concatenate([missing, *own]))
    order = rows[np.argsort(random_bits(manifest.seed, Stream.SHARD_ORDER, 0, rows)[:, 0], kind="stable")]
    if len(order) != manifest.num_samples(split):
        return {}
    return {e.shard.name: order[e.first_ordinal : e.first_ordinal + e.shard.num_samples] for e in lost}


def _rows_by_id(source_dir: str | Path) -> dict[bytes, int]:
    with MMEarthSource(source_dir, need_band_stats=False) as source:
        return {bytes(tile_id): row for row, tile_id in enumerate(source.tile_ids)}


def _take_ids(index: np.ndarray, tile_ids: list[bytes], rows: dict[bytes, int], source: Path) -> str | None:
    unknown = [tile_id for tile_id in tile_ids if tile_id not in rows]
    if unknown:
        return (
            f"{len(unknown)} of its {len(tile_ids)} tiles are not in {source}, first {unknown[0].decode(errors='replace')}"
        )
    index["row"] = [rows[tile_id] for tile_id in tile_ids]
    return None


def _difference(path: Path, shard_set: ShardSet, shard: ShardEntry, index: np.ndarray) -> str:
    """How the new index differs from the file that is there, if that can be read as one."""
    try:
        old = rows_of(path.read_bytes(), shard_set.manifest.index_dtype, shard.num_samples)
    except FileNotFoundError:
        return "the rows or presence bits of the lost one were others; is this the source of the set?"
    except (OSError, ValueError) as error:
        return f"the file there cannot be read as an index ({error})"
    fields = [name for name in index.dtype.names if (old[name] != index[name]).any()]
    if not fields:
        return "it equals the file there: the manifest has another hash"
    sample = int(np.flatnonzero([(old[i] != index[i]) for i in range(len(index))])[0])
    return f"{', '.join(fields)} differ from the file there, first in sample {sample}"
