"""The command `mpmae-shards build`."""

import argparse
import json
from pathlib import Path

from mpmae.shard_tools.build import build_from
from mpmae.shard_tools.build_plan import BuildOptions
from mpmae.shard_tools.cli_parts import add_command, names
from mpmae.shard_tools.output import SKIPPED_NAME
from mpmae.shard_tools.progress import MB, say
from mpmae.shard_tools.source_cli import add_format, open_given

DESCRIPTION = """\
Write the shard set of a dataset; by default of an MMEarth folder (NAME.h5, NAME_splits.json, NAME_tile_info.json,
NAME_band_stats.json). The same source and options give the same bytes, with any number of workers and however often the
build was interrupted. Memory stays below 2 GB at any size of MMEarth: 0.6 KB a tile of the source and up to 8 tiles a
worker. A tile that cannot be read stops the build with its name, unless --skip-bad is given."""


def add_build(commands) -> None:
    """Add `build` to the commands of the parser."""
    command = add_command(commands, "build", run_build, "dataset -> shard set", DESCRIPTION)
    command.add_argument("source", type=Path, metavar="SOURCE", help="folder of the dataset")
    command.add_argument("output", type=Path, metavar="OUTPUT", help="folder for the shard set; absent or empty")
    add_format(command)
    command.add_argument(
        "--codec",
        choices=("lz4", "raw", "zstd"),
        default="lz4",
        help="lz4: lossless filter and LZ4, for every loader; raw: plain arrays; zstd: a fifth smaller, cpu loader only",
    )
    command.add_argument(
        "--quantise-sentinel1",
        action="store_true",
        help="store sentinel1 as int16 hundredths of a dB; the largest error is in the manifest",
    )
    command.add_argument("--modalities", type=names, metavar="A,B", help="take only these; all if not given")
    command.add_argument("--splits", type=names, metavar="A,B", help="take only these; all if not given")
    command.add_argument("--seed", type=int, default=0, help="seed of the shuffle within each split")
    command.add_argument(
        "--shard-size-mb",
        type=float,
        default=256,
        help="a tar is cut before it exceeds this many 10^6 bytes; 256 to 1000 suit streaming from remote storage",
    )
    command.add_argument("--max-samples-per-shard", type=int, metavar="N", help="a tar is cut after this many samples")
    command.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="threads that read and encode; one per core if not given, more of them where the disk answers slowly",
    )
    command.add_argument(
        "--resume",
        action="store_true",
        help="go on with an interrupted build of the same source and options; begins one where there is none",
    )
    command.add_argument(
        "--skip-bad",
        action="store_true",
        help=f"leave tiles out that cannot be read and list them in OUTPUT/{SKIPPED_NAME}; the exit code is 0 all the same",
    )
    command.add_argument(
        "--overwrite", action="store_true", help="replace the shard set in OUTPUT; other files there are never removed"
    )


def run_build(args: argparse.Namespace) -> int:
    """Build, and print what was made; the exit code."""
    kept = ("codec", "quantise_sentinel1", "modalities", "splits", "seed", "shard_size_mb", "max_samples_per_shard")
    options = {name: getattr(args, name) for name in (*kept, "workers", "resume", "skip_bad", "overwrite")}
    try:
        BuildOptions(**options).check()  # before a source is opened, which takes a while
        with open_given(args, args.source, args.modalities, need_band_stats=True) as source:
            manifest = build_from(source, args.output, **options)
    except KeyboardInterrupt:
        say(f"finished shards are kept in {args.output}: add --resume to go on")
        raise
    for split, shards in manifest.splits.items():
        num_bytes = sum(shard.num_bytes for shard in shards)
        print(f"{split}: {manifest.num_samples(split):,} samples in {len(shards):,} shards, {num_bytes / MB:,.1f} MB")
    report = args.output / SKIPPED_NAME
    if report.is_file():
        num_skipped = len(json.loads(report.read_bytes())["tiles"])
        text = f"LEFT OUT: {num_skipped:,} tiles that could not be read, listed in {report}"
        print(text)
        say(text)
    print(f"shard set of {manifest.source.name} ({len(manifest.modalities)} modalities, {manifest.codec}): {args.output}")
    return 0
