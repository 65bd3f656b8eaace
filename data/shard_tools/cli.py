"""The command `mpmae-shards`: build, verify, stats, inspect, merge, subset, index and synth."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mpmae.errors import MpmaeError
from mpmae.files import write_whole
from mpmae.shard_files import load_manifest
from mpmae.shard_format import MANIFEST_NAME
from mpmae.shard_tools.build_cli import add_build
from mpmae.shard_tools.cli_parts import add_command
from mpmae.shard_tools.inspect import print_summary, summarise
from mpmae.shard_tools.output import disk_errors
from mpmae.shard_tools.progress import MB
from mpmae.shard_tools.sets_cli import add_index, add_merge, add_subset, add_workers
from mpmae.shard_tools.shard_set import ShardSet
from mpmae.shard_tools.source_cli import add_format, open_given
from mpmae.shard_tools.stats import band_stats
from mpmae.shard_tools.synth import synth
from mpmae.shard_tools.verify import verify

EXIT_PROBLEMS, EXIT_ERROR, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is returned.

    0: done. 1: `verify` found problems. 2: an error, told on stderr. 130: interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except MpmaeError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted: what was being written is unfinished", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mpmae-shards",
        description="Turn a dataset of co-registered tiles into a shard set; check, describe, join and cut shard sets.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_build(commands)
    _add_verify(commands)
    _add_stats(commands)
    _add_inspect(commands)
    add_merge(commands)
    add_subset(commands)
    add_index(commands)
    _add_synth(commands)
    return parser


def _add_verify(commands) -> None:
    command = add_command(
        commands,
        "verify",
        _run_verify,
        "check every byte of a shard set",
        "Check hashes, indices, tar headers, every member and presence bits; with --source compare every value with the "
        "source, bit for bit (a quantised modality within its stated error); with --fast only the hashes and what the "
        "indices say. Exit code 1 if anything is wrong.",
    )
    command.add_argument("shards", type=Path, metavar="SHARDS", help="folder of the shard set")
    depth = command.add_mutually_exclusive_group()
    depth.add_argument("--fast", action="store_true", help="decode nothing: as fast as the disk and sha256 on all cores")
    depth.add_argument("--source", type=Path, metavar="SOURCE", help="what the set was built from")
    add_format(command)
    add_workers(command)


def _run_verify(args: argparse.Namespace) -> int:
    options = {"fast": args.fast, "workers": args.workers, "progress": True}
    if args.source is None:
        report = verify(args.shards, **options)
    else:
        modalities = load_manifest(args.shards).modalities
        with open_given(args, args.source, modalities, need_band_stats=True) as source:
            report = verify(args.shards, source, **options)
    for problem in report.problems:
        print(f"problem: {problem}", file=sys.stderr)
    checked = f"{report.num_samples:,} samples in {report.num_shards:,} shards, {report.num_bytes / MB:,.1f} MB"
    if args.source and report.ok:
        checked += f", {report.num_compared:,} equal to the source"
    if args.fast:
        checked += ", hashes only"
    print(f"{'ok' if report.ok else f'{len(report.problems):,} problems'}: {checked}: {args.shards}")
    return 0 if report.ok else EXIT_PROBLEMS


def _add_stats(commands) -> None:
    command = add_command(
        commands,
        "stats",
        _run_stats,
        "band statistics of a source or a shard set",
        "Mean, standard deviation (of the population), minimum and maximum of every band over its valid values, in the "
        "layout of band_stats.json. A band without values or without spread gets std 1.",
    )
    command.add_argument("source", type=Path, metavar="SOURCE_OR_SHARDS", help="folder of a dataset or a shard set")
    command.add_argument("--split", default="train", help="split to use; `all` for every tile")
    command.add_argument("--output", type=Path, metavar="FILE", help="write to FILE instead of stdout; replaces it")
    add_format(command)
    add_workers(command)


def _run_stats(args: argparse.Namespace) -> int:
    split = None if args.split == "all" else args.split
    if (args.source / MANIFEST_NAME).is_file():
        stats = band_stats(ShardSet(args.source), split, progress=True, workers=args.workers)
    else:
        with open_given(args, args.source, None, need_band_stats=False) as source:
            stats = band_stats(source, split, progress=True, workers=args.workers)
    text = json.dumps(stats, indent=1) + "\n"
    if args.output is None:
        print(text, end="")
        return 0
    with disk_errors(str(args.output), args.output.parent):
        write_whole(args.output, text)
    print(f"band statistics of {len(stats)} modalities over {args.split}: {args.output}")
    return 0


def _add_inspect(commands) -> None:
    command = add_command(
        commands,
        "inspect",
        _run_inspect,
        "table and pictures of a shard set",
        "Print what a shard set holds; with --png draw a few of its tiles, with --histograms the values of its bands.",
    )
    command.add_argument("shards", type=Path, metavar="SHARDS", help="folder of the shard set")
    command.add_argument("--png", type=Path, metavar="FILE", help="draw a contact sheet")
    command.add_argument("--histograms", type=Path, metavar="FILE", help="draw the valid values of every band (PNG)")
    command.add_argument("--split", help="split to draw; the first with samples if not given")
    command.add_argument("--num-tiles", type=int, default=6, help="tiles on the contact sheet")


def _run_inspect(args: argparse.Namespace) -> int:
    console = Console()
    print_summary(summarise(args.shards), console if console.is_terminal else Console(width=140))
    if args.png:
        from mpmae.shard_tools.contact_sheet import contact_sheet  # matplotlib takes a second to import

        contact_sheet(args.shards, args.png, args.split, args.num_tiles)
        print(f"contact sheet: {args.png}")
    if args.histograms:
        from mpmae.shard_tools.histograms import histograms  # as above

        histograms(args.shards, args.histograms, args.split)
        print(f"histograms: {args.histograms}")
    return 0


def _add_synth(commands) -> None:
    command = add_command(
        commands,
        "synth",
        _run_synth,
        "write a synthetic MMEarth folder",
        "Write a synthetic dataset in MMEarth's layout whose modalities show the same landscapes.",
    )
    command.add_argument("output", type=Path, metavar="OUTPUT", help="folder for the dataset; absent or empty")
    command.add_argument("--num-tiles", type=int, default=512, help="tiles in all; 80 %% train, 10 %% val, 10 %% test")
    command.add_argument("--tile-size-px", type=int, default=64, help="tile side in pixels, a multiple of 4")
    command.add_argument("--seed", type=int, default=0, help="each tile is a function of the seed and its number")


def _run_synth(args: argparse.Namespace) -> int:
    folder = synth(args.output, num_tiles=args.num_tiles, tile_size_px=args.tile_size_px, seed=args.seed)
    print(f"synthetic MMEarth folder of {args.num_tiles:,} tiles of {args.tile_size_px} px: {folder}")
    print(f"next: mpmae-shards build {folder} SHARDS")
    return 0
