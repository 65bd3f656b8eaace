"""An MMEarth folder in, a shard set out.

The samples of each split are shuffled as a whole by a permutation that is a pure function of the seed and the rows, so the
same source and options give the same bytes. Format: `mpmae.shard_format`.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from mpmae.counter_rng import Stream, random_bits
from mpmae.errors import ShardError, SourceError
from mpmae.files import sync, write_whole
from mpmae.modalities import MODALITIES
from mpmae.shard_format import MANIFEST_NAME, TAR_END, Codec, Manifest, ScalarEntry, ShardEntry, SourceInfo, pixel_entry
from mpmae.shard_tools import output
from mpmae.shard_tools.progress import track
from mpmae.shard_tools.source import MMEarthSource
from mpmae.shard_tools.tile import encode_members, presence_bits

MB = 10**6
NUM_TRIAL_TILES = 16
ESTIMATE_MARGIN = 1.1


def build(
    source_dir: str | Path,
    output_dir: str | Path,
    *,
    codec: Codec = "lz4",
    modalities: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    seed: int = 0,
    shard_size_mb: float = 256,
    max_samples_per_shard: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Write the shard set of an MMEarth folder; the manifest, written last, is returned.

    modalities, splits: which to take (None: all there are). shard_size_mb: a tar is cut before it exceeds this (10^6 bytes);
    a sample is never split. overwrite: replace the shard set in `output_dir`; files of other origin are never removed.

    Raises SourceError for a source that is not as it must be (tile and modality named), ShardError for an output folder
    that is not empty, too small a disk, or a failed write. An interrupted build leaves no manifest.
    """
    output_dir = Path(output_dir)
    _check_options(codec, shard_size_mb, max_samples_per_shard, seed)
    with MMEarthSource(source_dir, modalities) as source:
        if output_dir.resolve() == source.folder.resolve():
            raise ShardError(f"{output_dir} is the source folder; give another folder for the shard set")
        orders = {split: _order(source.rows(split), seed) for split in _chosen_splits(source, splits)}
        manifest = _empty_manifest(source, codec, seed)
        old_files, old_bytes = output.prepare(output_dir, overwrite)
        _check_space(source, manifest, orders, output_dir, old_bytes)
        with output.disk_errors(str(output_dir), output_dir, output.BUILD_AGAIN):
            output_dir.mkdir(parents=True, exist_ok=True)
            for path in old_files:
                path.unlink()
        max_bytes = int(shard_size_mb * MB)
        shards: dict[str, tuple[ShardEntry, ...]] = {}
        for split, rows in orders.items():
            with output.ShardWriter(output_dir, split, manifest, max_bytes, max_samples_per_shard) as writer:
                for row in track(rows, len(rows), f"build {split}", enabled=progress):
                    writer.add(int(row), *_encode(source, manifest, row), source.describe(row))
            shards[split] = tuple(writer.entries)
        manifest = manifest.model_copy(update={"splits": shards})
        with output.disk_errors(str(output_dir / MANIFEST_NAME), output_dir, output.BUILD_AGAIN):
            sync(output_dir)
            write_whole(output_dir / MANIFEST_NAME, manifest.dump().encode())
            sync(output_dir)
    return manifest


def _check_options(codec: str, shard_size_mb: float, max_samples: int | None, seed: int) -> None:
    problems = []
    if codec not in get_args(Codec):
        problems.append(f"codec {codec!r}; expected {' or '.join(get_args(Codec))}")
    if not 0 < shard_size_mb < float("inf"):
        problems.append(f"shard_size_mb {shard_size_mb}; expected a number above 0")
    if max_samples is not None and max_samples < 1:
        problems.append(f"max_samples_per_shard {max_samples}; expected at least 1")
    if seed < 0:
        problems.append(f"seed {seed}; expected at least 0")
    if problems:
        raise ShardError(problems)


def _chosen_splits(source: MMEarthSource, wanted: Sequence[str] | None) -> list[str]:
    unknown = [split for split in wanted or () if split not in source.splits]
    if unknown:
        raise SourceError(f"{source.folder} has no split {', '.join(unknown)}; it has {', '.join(source.splits)}")
    chosen = [split for split in source.splits if wanted is None or split in wanted]
    if not any(len(source.splits[split]) for split in chosen):
        raise SourceError(f"{source.folder}: the splits {', '.join(chosen)} have no tiles")
    return chosen


def _order(rows: np.ndarray, seed: int) -> np.ndarray:
    keys = random_bits(seed, Stream.SHARD_ORDER, 0, rows)[:, 0]
    return rows[np.argsort(keys, kind="stable")]


def _empty_manifest(source: MMEarthSource, codec: Codec, seed: int) -> Manifest:
    pixels = []
    for name in source.pixels:
        spec = MODALITIES[name]
        pixels.append(pixel_entry(name, spec.kind, source.dtypes[name], source.shapes[name], spec.bands, codec))
    scalars = [
        ScalarEntry(
            name=name,
            dtype=source.dtypes[name].str,
            length=source.shapes[name][0],
            encoding="one_hot" if MODALITIES[name].one_hot else "plain",
            no_data=source.no_data(name),
        )
        for name in source.scalars
    ]
    return Manifest(
        source=SourceInfo(name=source.name, fingerprint=source.fingerprint, num_tiles=source.num_tiles),
        tile_size_px=source.tile_size_px,
        codec=codec,
        seed=seed,
        pixels=tuple(pixels),
        scalars=tuple(scalars),
        band_stats=source.band_stats,
        splits={},
    )


def _encode(source: MMEarthSource, manifest: Manifest, row: int) -> tuple[int, list[bytes]]:
    tile = source.read_tile(row)
    try:
        members = encode_members(manifest, tile)
    except ValueError as error:
        raise SourceError(
            f"{source.h5_path}: {source.describe(row)}: {error}; mend it or take it out of the splits"
        ) from error
    return presence_bits(manifest, tile.values), members


def _check_space(
    source: MMEarthSource, manifest: Manifest, orders: dict[str, np.ndarray], folder: Path, freed_bytes: int
) -> None:
    """ShardError when the set does not fit on the disk, by an estimate from a few tiles spread over the splits."""
    rows = np.concatenate(list(orders.values()))
    trial = rows[np.linspace(0, len(rows) - 1, min(NUM_TRIAL_TILES, len(rows))).astype(int)]
    per_sample = [output.tar_bytes([len(data) for data in _encode(source, manifest, row)[1]]) for row in trial]
    needed_bytes = int(np.mean(per_sample) * len(rows) * ESTIMATE_MARGIN) + len(TAR_END)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free + freed_bytes
    if needed_bytes > free_bytes:
        raise ShardError(
            f"{folder}: the shard set needs about {needed_bytes / MB:,.0f} MB (from {len(trial)} of {len(rows)} tiles, plus "
            f"{ESTIMATE_MARGIN - 1:.0%}), the disk has {free_bytes / MB:,.0f} MB; free some space, give a folder elsewhere "
            "or take fewer modalities"
        )
