"""The command `mpmae-export`: a checkpoint as a folder for another program."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from mpmae.errors import MpmaeError
from mpmae.export.config import Target
from mpmae.export.export import export


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is returned (2: an error, told on stderr)."""
    parser = argparse.ArgumentParser(prog="mpmae-export", description="Write a checkpoint in another program's layout.")
    parser.add_argument("checkpoint", metavar="CKPT", help="file or folder: a run, its checkpoint, .pth, .safetensors, ...")
    parser.add_argument("--to", required=True, choices=get_args(Target), help="the layout")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--licence", metavar="SPDX", help="of the weights, such as CC-BY-4.0 (default: the source's)")
    parser.add_argument("--shards", type=Path, metavar="DIR", help="shard set of the training, for the band statistics")
    parser.add_argument(
        "--domain", metavar="NAME", help="of a MultiMAE, for timm and hf (default: its first continuous one)"
    )
    parser.add_argument("--name", help="the model's name (default: by size and patch)")
    options = parser.parse_args(argv)
    try:
        done = export(
            options.checkpoint,
            options.to,
            options.output,
            licence=options.licence,
            shards=options.shards,
            name=options.name,
            domain=options.domain,
        )
    except MpmaeError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    for notice in done.notices:
        print(f"notice: {notice}", file=sys.stderr)
    for path in sorted(done.folder.iterdir()):
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0
