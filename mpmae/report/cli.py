"""The command `mpmae-report`: one HTML page of a run."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mpmae.errors import MpmaeError
from mpmae.report.collect import collect
from mpmae.report.page import write_report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is returned (2: an error, told on stderr)."""
    parser = argparse.ArgumentParser(
        prog="mpmae-report", description="Write the report of a pretraining run as one HTML page."
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="the run folder (run.dir)")
    parser.add_argument("--output", type=Path, help="where to write (default: RUN/report.html)")
    parser.add_argument("--tiles", type=_count, metavar="N", default=6, help="validation tiles to reconstruct (default: 6)")
    options = parser.parse_args(argv)
    try:
        path = write_report(collect(options.run_dir, options.tiles), options.output or options.run_dir / "report.html")
    except MpmaeError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    print(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)
