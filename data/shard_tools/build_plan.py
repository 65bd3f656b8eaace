"""What a build is asked for, checked, and what follows from it before a tile is read: splits, orders, the manifest's head.

Shapes: N tiles of a split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from mpmae.errors import ShardError, SourceError
from mpmae.modalities import MODALITIES
from mpmae.shard_format import Codec, Manifest, ScalarEntry, SourceInfo, pixel_entry
from mpmae.shard_tools.output import option_problems
from mpmae.shard_tools.tile_source import TileSource

QUANTISE_STEP_DB = 0.01


@dataclass(frozen=True)
class BuildOptions:
    """How a shard set is made.

    modalities, splits: which to take (None: all there are). shard_size_mb: a tar is cut before it exceeds this (10^6 bytes);
    a sample is never split. quantise_sentinel1: store it as hundredths of a dB, with the error bound in the manifest.
    workers: threads (None: one per core); the bytes do not depend on it. resume: go on with an interrupted build of the same
    source and options; begins one where there is none, leaves a finished set as it is. skip_bad: leave tiles out that cannot
    be read, and list them in skipped.json. overwrite: replace the shard set that is there; files of other origin are never
    removed. progress: tell on stderr how far it is.
    """

    codec: Codec = "lz4"
    modalities: Sequence[str] | None = None
    splits: Sequence[str] | None = None
    seed: int = 0
    shard_size_mb: float = 256
    max_samples_per_shard: int | None = None
    quantise_sentinel1: bool = False
    workers: int | None = None
    resume: bool = False
    skip_bad: bool = False
    overwrite: bool = False
    progress: bool = True

    def check(self) -> None:
        """Raises ShardError with every option that cannot be."""
        problems = []
        if self.codec not in get_args(Codec):
            problems.append(f"codec {self.codec!r}; expected {' or '.join(get_args(Codec))}")
        problems += option_problems(self.shard_size_mb, self.max_samples_per_shard, self.seed, self.workers)
        if self.resume and self.overwrite:
            problems.append("resume goes on with what overwrite removes; expected at most one of them")
        if problems:
            raise ShardError(problems)


def chosen_splits(source: TileSource, wanted: Sequence[str] | None) -> list[str]:
    """The splits to take, in the order of the source. Raises SourceError for one that it lacks, or without any tile."""
    unknown = [split for split in wanted or () if split not in source.splits]
    if unknown:
        raise SourceError(f"{source.where} has no split {', '.join(unknown)}; it has {', '.join(source.splits)}")
    chosen = [split for split in source.splits if wanted is None or split in wanted]
    if not any(len(source.splits[split]) for split in chosen):
        raise SourceError(f"{source.where}: the splits {', '.join(chosen)} have no tiles")
    return chosen


def empty_manifest(source: TileSource, options: BuildOptions) -> Manifest:
    """The manifest without its shards. Raises SourceError for a modality that the source lacks."""
    names = (*source.pixels, *source.scalars)
    unknown = [name for name in options.modalities or () if name not in names]
    if options.quantise_sentinel1 and "sentinel1" not in names:
        unknown.append("sentinel1, which is to be quantised")
    if unknown:
        raise SourceError(f"{source.where} has no modality {', '.join(unknown)}; it has {', '.join(names)}")
    chosen = names if options.modalities is None else options.modalities
    pixels = []
    for name in (name for name in source.pixels if name in chosen):
        quantise = {"quantise_step": QUANTISE_STEP_DB} if options.quantise_sentinel1 and name == "sentinel1" else {}
        form = source.dtypes[name], source.shapes[name], source.bands[name], options.codec
        pixels.append(pixel_entry(name, MODALITIES[name].kind, *form, **quantise))
    scalars = [
        ScalarEntry(
            name=name,
            dtype=source.dtypes[name].str,
            length=source.shapes[name][0],
            encoding="one_hot" if MODALITIES[name].one_hot else "plain",
            no_data=source.no_data(name),
        )
        for name in source.scalars
        if name in chosen
    ]
    stats = source.band_stats or {}
    return Manifest(
        source=SourceInfo(name=source.name, fingerprint=source.fingerprint, num_tiles=source.num_tiles),
        tile_size_px=source.tile_size_px,
        codec=options.codec,
        seed=options.seed,
        pixels=tuple(pixels),
        scalars=tuple(scalars),
        band_stats={key: value for key, value in stats.items() if key in chosen or key.rpartition("_")[0] in chosen},
        splits={},
    )
