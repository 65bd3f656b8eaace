"""The commands that make shard sets, or their indices, from shard sets: merge, subset and index."""

import argparse
import sys
from pathlib import Path

from mpmae.errors import ShardError
from mpmae.modalities import PRODUCT_LEVELS
from mpmae.shard_format import Manifest
from mpmae.shard_tools.cli_parts import add_command, names
from mpmae.shard_tools.index import rebuild_indices
from mpmae.shard_tools.merge import merge
from mpmae.shard_tools.progress import MB
from mpmae.shard_tools.rewrite import RewriteOptions
from mpmae.shard_tools.subset import Wanted, subset


def add_workers(command: argparse.ArgumentParser) -> None:
    """The option `--workers`."""
    command.add_argument("--workers", type=int, metavar="N", help="threads; one per core if not given")


def _add_output_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, default=0, help="seed of the shuffle within each split")
    command.add_argument(
        "--shard-size-mb", type=float, default=256, help="a tar is cut before it exceeds this many 10^6 bytes"
    )
    command.add_argument("--max-samples-per-shard", type=int, metavar="N", help="a tar is cut after this many samples")
    command.add_argument(
        "--overwrite", action="store_true", help="replace the shard set in OUTPUT; other files there are never removed"
    )
    add_workers(command)


def _options(args: argparse.Namespace) -> RewriteOptions:
    return RewriteOptions(
        seed=args.seed,
        shard_size_mb=args.shard_size_mb,
        max_samples_per_shard=args.max_samples_per_shard,
        overwrite=args.overwrite,
        workers=args.workers,
        progress=True,
    )


def _print_written(manifest: Manifest, output: Path) -> None:
    for split, shards in manifest.splits.items():
        num_bytes = sum(shard.num_bytes for shard in shards)
        print(f"{split}: {manifest.num_samples(split):,} samples in {len(shards):,} shards, {num_bytes / MB:,.1f} MB")
    print(f"shard set of {manifest.source.name} ({len(manifest.modalities)} modalities, {manifest.codec}): {output}")


def add_merge(commands) -> None:
    """The command `merge`."""
    command = add_command(
        commands,
        "merge",
        _run_merge,
        "several shard sets -> one",
        "Write the samples of several shard sets as one, split by split, shuffled over all of them. The sets must have the "
        "same modalities, codec and tile size. Members are copied as they are stored, after the hashes of their tars were "
        "checked; the band statistics are those of the merged split train.",
    )
    command.add_argument("output", type=Path, metavar="OUTPUT", help="folder for the merged set; absent or empty")
    command.add_argument("shards", type=Path, nargs="+", metavar="SET", help="folders of the shard sets, at least two")
    command.add_argument(
        "--keep-first", action="store_true", help="take a tile that is there twice from the first set; else it is an error"
    )
    _add_output_options(command)


def _run_merge(args: argparse.Namespace) -> int:
    _print_written(merge(args.output, args.shards, keep_first=args.keep_first, options=_options(args)), args.output)
    return 0


def _renames(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in names(text)]
    if not all(old and new for old, _, new in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}; expected OLD=NEW, several separated by commas")
    return {old: new for old, _, new in pairs}


def add_subset(commands) -> None:
    """The command `subset`."""
    command = add_command(
        commands,
        "subset",
        _run_subset,
        "a part of a shard set as a set of its own",
        "Write fewer samples or fewer modalities of a shard set as a set of its own. Every option narrows the part. Members "
        "are copied as they are stored, after the hashes of their tars were checked; the band statistics are those of the "
        "split train that is written.",
    )
    command.add_argument("shards", type=Path, metavar="SET", help="folder of the shard set")
    command.add_argument("output", type=Path, metavar="OUTPUT", help="folder for the part; absent or empty")
    command.add_argument("--splits", type=names, metavar="A,B", help="take only these; all if not given")
    command.add_argument("--rename", type=_renames, metavar="OLD=NEW,..", default={}, help="new names of splits")
    command.add_argument("--modalities", type=names, metavar="A,B", help="keep only these, sentinel2 among them")
    command.add_argument("--require", type=names, metavar="A,B", default=(), help="only samples that have all of these")
    command.add_argument("--product-level", choices=PRODUCT_LEVELS, help="only samples of this Sentinel-2 level")
    command.add_argument(
        "--tile-ids", type=Path, metavar="FILE", help="only the tiles whose ids this file lists, one a line"
    )
    size = command.add_mutually_exclusive_group()
    size.add_argument("--num-samples", type=int, metavar="N", help="at most this many of each split, drawn by the seed")
    size.add_argument("--fraction", type=float, metavar="F", help="this part of each split, 0 to 1, drawn by the seed")
    _add_output_options(command)


def _run_subset(args: argparse.Namespace) -> int:
    wanted = Wanted(
        splits=None if args.splits is None else tuple(args.splits),
        modalities=None if args.modalities is None else tuple(args.modalities),
        require=tuple(args.require),
        product_level=args.product_level,
        tile_ids=None if args.tile_ids is None else _lines(args.tile_ids),
        num_samples=args.num_samples,
        fraction=args.fraction,
        rename=args.rename,
    )
    _print_written(subset(args.shards, args.output, wanted, options=_options(args)), args.output)
    return 0


def _lines(path: Path) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ShardError(
            f"{path}: cannot be read as a list of tile ids ({error}); give a text file, one id a line"
        ) from error


def add_index(commands) -> None:
    """The command `index`."""
    command = add_command(
        commands,
        "index",
        _run_index,
        "make lost indices again",
        "Make the index files of a shard set that are lost or damaged again from their tars. An index is written only when "
        "its hash is the one in the manifest. Exit code 1 if one cannot be made.",
    )
    command.add_argument("shards", type=Path, metavar="SHARDS", help="folder of the shard set")
    command.add_argument(
        "--source",
        type=Path,
        metavar="SOURCE",
        help="MMEarth folder of the set, where source rows do not follow from the rest",
    )
    add_workers(command)


def _run_index(args: argparse.Namespace) -> int:
    report = rebuild_indices(args.shards, args.source, args.workers, progress=True)
    for problem in report.problems:
        print(f"problem: {problem}", file=sys.stderr)
    made = ", ".join(report.made) if report.made else "nothing"
    print(f"made {made}; {len(report.problems):,} problems: {args.shards}")
    return 1 if report.problems else 0
