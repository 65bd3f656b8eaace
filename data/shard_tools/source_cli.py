"""How commands are told of a source that is no MMEarth folder."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mpmae.errors import SourceError
from mpmae.shard_tools.source import MMEarthSource
from mpmae.shard_tools.tile_source import TileSource

MMEARTH = "mmearth"


def add_format(command: argparse.ArgumentParser) -> None:
    """The options `--format` and `--option`."""
    command.add_argument(
        "--format", default=MMEARTH, metavar="NAME", help="format of the source; docs/new_source.md lists them"
    )
    command.add_argument(
        "--option",
        action="append",
        default=[],
        type=_option,
        metavar="KEY=VALUE",
        help="option of the format; may be repeated",
    )


def open_given(args: argparse.Namespace, path: Path, modalities: Sequence[str] | None, need_band_stats: bool) -> TileSource:
    """The source at `path` in the format that the arguments name; SourceError when it cannot be opened.

    modalities (None: all) and need_band_stats are for MMEarth folders.
    """
    if args.format == MMEARTH:
        if args.option:
            raise SourceError(f"--option {args.option[0][0]}: the format {MMEARTH} has no options")
        return MMEarthSource(path, modalities, need_band_stats)
    from mpmae.shard_tools.sources import open_source  # its formats need packages that MMEarth's does not

    return open_source(path, args.format, dict(args.option))


def _option(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r}, expected KEY=VALUE")
    return key, value
