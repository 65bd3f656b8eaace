"""A part of a shard set as a set of its own: fewer samples, fewer modalities, other names of splits."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mpmae.counter_rng import Stream, random_bits
from mpmae.errors import ShardError
from mpmae.modalities import PRODUCT_LEVELS
from mpmae.shard_format import FORMAT_VERSION, Manifest, SourceInfo
from mpmae.shard_tools.rewrite import RewriteOptions, Selection, check_folders, combined_fingerprint, rewrite
from mpmae.shard_tools.scan import ScannedSet, scan
from mpmae.shard_tools.shard_set import ShardSet
from mpmae.shard_tools.source_checks import examples

_SPLIT_NAME = re.compile(r"[A-Za-z0-9_]+")


@dataclass(frozen=True)
class Wanted:
    """Which part of a set; every field narrows it, None and empty ones do not.

    splits: of the set. modalities: to keep, sentinel2 among them. require: only samples in which all of these are present.
    product_level: only samples of this Sentinel-2 level. tile_ids: only these tiles. num_samples: at most so many of each
    split; fraction: so much of each split; both are drawn by the seed, after all the rest, and a larger number includes the
    samples of a smaller one. rename: new names of splits; two that get one name are joined.
    """

    splits: tuple[str, ...] | None = None
    modalities: tuple[str, ...] | None = None
    require: tuple[str, ...] = ()
    product_level: str | None = None
    tile_ids: tuple[str, ...] | None = None
    num_samples: int | None = None
    fraction: float | None = None
    rename: Mapping[str, str] = field(default_factory=dict)

    def problems(self, manifest: Manifest, folder: Path) -> list[str]:
        """What of it the set does not have or makes no sense, one text each."""
        found = []
        for what, names in (("splits", self.splits or ()), ("rename", tuple(self.rename))):
            unknown = [name for name in names if name not in manifest.splits]
            if unknown:
                found.append(f"{what}: {folder} has no split {', '.join(unknown)}; it has {', '.join(manifest.splits)}")
        for what, names in (("modalities", self.modalities or ()), ("require", self.require)):
            unknown = [name for name in names if name not in manifest.modalities]
            if unknown:
                found.append(f"{what}: {folder} has no {', '.join(unknown)}; it has {', '.join(manifest.modalities)}")
        if self.modalities is not None and "sentinel2" not in self.modalities:
            found.append("modalities: sentinel2 is not among them; a model needs it as its input")
        if self.product_level not in (None, *PRODUCT_LEVELS):
            found.append(f"product_level {self.product_level!r}; expected {' or '.join(PRODUCT_LEVELS)}")
        if self.num_samples is not None and self.fraction is not None:
            found.append("num_samples and fraction are both given; give one")
        if self.num_samples is not None and self.num_samples < 1:
            found.append(f"num_samples {self.num_samples}; expected at least 1")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            found.append(f"fraction {self.fraction}; expected a number above 0, at most 1")
        wrong = [name for name in self.rename.values() if not _SPLIT_NAME.fullmatch(name)]
        if wrong:
            found.append(f"rename: {', '.join(map(repr, wrong))}; expected names of letters, digits and _")
        return found


def subset(
    shards_dir: str | Path, output_dir: str | Path, wanted: Wanted, *, options: RewriteOptions | None = None
) -> Manifest:
    """Write the wanted part of a set as a set of its own; its manifest is returned. Rows stay those of the source.

    Raises ShardError for what the set does not have (all at once), tile ids that it lacks, a damaged set, no samples, or an
    output that cannot be written.
    """
    options, output_dir = options or RewriteOptions(), Path(output_dir)
    shard_set = ShardSet(shards_dir)
    manifest = shard_set.manifest
    problems = options.problems() + wanted.problems(manifest, shard_set.folder)
    if problems:
        raise ShardError(problems)
    check_folders(output_dir, [shard_set.folder])
    splits = [split for split in manifest.splits if wanted.splits is None or split in wanted.splits]
    part = scan(shard_set, splits, options.workers, options.progress)
    passes = _passes(part, wanted)
    selection = Selection()
    for split in splits:
        positions = part.of_split(split)
        positions = _drawn(part, positions[passes[positions]], wanted, options.seed)
        selection.add(wanted.rename.get(split, split), 0, positions, part.index["row"][positions])
    return rewrite(output_dir, _manifest(manifest, wanted, options.seed), [part], selection, options)


def _passes(part: ScannedSet, wanted: Wanted) -> np.ndarray:
    """Which samples have what is required, bool [n]."""
    modalities = part.shard_set.manifest.modalities
    passes = np.ones(len(part.index), bool)
    for name in wanted.require:
        passes &= (part.index["presence"] >> np.uint64(modalities.index(name)) & np.uint64(1)).astype(bool)
    if wanted.product_level is not None:
        passes &= part.product_level == wanted.product_level.encode()
    if wanted.tile_ids is not None:
        ids = np.array([tile_id.encode() for tile_id in wanted.tile_ids], "S")
        lacking = ids[~np.isin(ids, part.tile_id)]
        if len(lacking):
            names = examples(tile_id.decode() for tile_id in lacking)
            where = f"{part.folder}, splits {', '.join(dict.fromkeys(split for split, _, _ in part.shards))}"
            raise ShardError(f"{where}: {len(lacking)} of {len(ids)} tile ids are not there ({names})")
        passes &= np.isin(part.tile_id, ids)
    return passes


def _drawn(part: ScannedSet, positions: np.ndarray, wanted: Wanted, seed: int) -> np.ndarray:
    """The first samples of the seed's shuffle, as many as are wanted of a split."""
    num = len(positions)
    if wanted.num_samples is not None:
        num = min(num, wanted.num_samples)
    if wanted.fraction is not None:
        num = round(num * wanted.fraction)
    keys = random_bits(seed, Stream.SHARD_ORDER, 0, part.index["row"][positions])[:, 0]
    return positions[np.argsort(keys, kind="stable")[:num]]


def _manifest(manifest: Manifest, wanted: Wanted, seed: int) -> Manifest:
    names = manifest.modalities if wanted.modalities is None else wanted.modalities
    own = vars(wanted) | {"rename": dict(wanted.rename)}
    return manifest.model_copy(
        update={
            "format_version": FORMAT_VERSION,
            "source": SourceInfo(
                name=f"subset of {manifest.source.name}",
                fingerprint=combined_fingerprint(["subset", manifest.fingerprint, own, seed]),
                num_tiles=manifest.source.num_tiles,
            ),
            "seed": seed,
            "pixels": tuple(entry for entry in manifest.pixels if entry.name in names),
            "scalars": tuple(entry for entry in manifest.scalars if entry.name in names),
            "band_stats": {
                key: stats
                for key, stats in manifest.band_stats.items()
                if key in names or (key.startswith("sentinel2_l") and "sentinel2" in names)
            },
            "splits": {},
        }
    )
