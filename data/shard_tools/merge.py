"""Several shard sets in, one out."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mpmae.errors import ShardError
from mpmae.shard_format import FORMAT_VERSION, Manifest, SourceInfo
from mpmae.shard_tools.rewrite import RewriteOptions, Selection, check_folders, combined_fingerprint, rewrite
from mpmae.shard_tools.scan import ScannedSet, scan
from mpmae.shard_tools.shard_set import ShardSet
from mpmae.shard_tools.source_checks import examples


def merge(
    output_dir: str | Path,
    shards_dirs: Sequence[str | Path],
    *,
    keep_first: bool = False,
    options: RewriteOptions | None = None,
) -> Manifest:
    """Write the samples of all sets, split by split, as one set; its manifest is returned.

    The row of a sample becomes its row plus the number of source tiles of the sets before its own. keep_first: a tile id
    that is there twice, in whatever splits, is taken from the first set that has it; it is an error otherwise. A statistics
    key that has no tile in split `train` is that of the first set that has the key.

    Raises ShardError for fewer than two sets, sets that do not fit together (every difference at once), a damaged set, or an
    output that cannot be written.
    """
    options, output_dir = options or RewriteOptions(), Path(output_dir)
    problems = options.problems()
    if len(shards_dirs) < 2:
        problems.append(f"{len(shards_dirs)} set to merge; expected at least 2")
    if problems:
        raise ShardError(problems)
    sets = [ShardSet(folder) for folder in shards_dirs]
    check_folders(output_dir, [s.folder for s in sets])
    problems = [problem for other in sets[1:] for problem in _differences(sets[0], other)]
    if problems:
        raise ShardError(problems)
    parts = [scan(s, tuple(s.manifest.splits), options.workers, options.progress) for s in sets]
    kept = _kept(parts, keep_first)
    selection, offset = Selection(), 0
    for number, (part, keep) in enumerate(zip(parts, kept, strict=True)):
        for split in part.shard_set.manifest.splits:
            positions = part.of_split(split)
            positions = positions[keep[positions]]
            selection.add(split, number, positions, part.index["row"][positions] + np.uint64(offset))
        offset += part.shard_set.manifest.source.num_tiles
    return rewrite(output_dir, _manifest([s.manifest for s in sets], options.seed, offset), parts, selection, options)


def _differences(first: ShardSet, other: ShardSet) -> Iterator[str]:
    a, b = first.manifest, other.manifest
    for name in ("tile_size_px", "codec"):
        if getattr(a, name) != getattr(b, name):
            yield f"{other.folder}: {name} {getattr(b, name)}, in {first.folder} {getattr(a, name)}; build one of them again"
    for group in ("pixels", "scalars"):
        ours, theirs = ({entry.name: entry for entry in getattr(manifest, group)} for manifest in (a, b))
        for folder, names in ((other.folder, set(ours) - set(theirs)), (first.folder, set(theirs) - set(ours))):
            if names:
                lacking = f"{folder} has no {', '.join(sorted(names))}"
                yield f"{lacking}; `mpmae-shards subset --modalities` takes them out of the other"
        for name in (name for name in ours if name in theirs):
            for key, value in ours[name]:
                found = getattr(theirs[name], key)
                if found != value and not (key == "shape" and a.tile_size_px != b.tile_size_px):
                    yield f"{other.folder}: {name}.{key} {found}, in {first.folder} {value}"
    if not set(a.modalities) ^ set(b.modalities) and a.modalities != b.modalities:
        yield f"{other.folder}: its modalities are in another order: {', '.join(b.modalities)}"


def _kept(parts: Sequence[ScannedSet], keep_first: bool) -> list[np.ndarray]:
    """Per set, which of its samples go to the output: bool [n] each. ShardError for tiles that are there twice."""
    ids = np.concatenate([part.tile_id for part in parts])
    keep = np.zeros(len(ids), bool)
    keep[np.unique(ids, return_index=True)[1]] = True  # the first of equal ids
    again = ids[~keep]
    if len(again) and not keep_first:
        names = examples(name.decode(errors="replace") for name in again)
        folders = ", ".join(str(part.folder) for part in parts)
        raise ShardError(
            f"{folders}: {len(again)} tile ids are there twice ({names}); keep the first of each with --keep-first, or take "
            "them out with `mpmae-shards subset`"
        )
    return np.split(keep, np.cumsum([len(part.tile_id) for part in parts])[:-1])


def _manifest(manifests: Sequence[Manifest], seed: int, num_tiles: int) -> Manifest:
    band_stats = {}
    for manifest in manifests:
        band_stats = manifest.band_stats | band_stats
    content = [["merge", m.source.name, m.source.fingerprint, m.fingerprint] for m in manifests]
    return manifests[0].model_copy(
        update={
            "format_version": FORMAT_VERSION,
            "source": SourceInfo(
                name=" + ".join(m.source.name for m in manifests),
                fingerprint=combined_fingerprint(content),
                num_tiles=num_tiles,
            ),
            "seed": seed,
            "band_stats": band_stats,
            "splits": {},
        }
    )
