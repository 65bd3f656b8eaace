"""The command `mpmae-runs`: what became of runs, their curves beside each other, what tells two apart."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mpmae.errors import MpmaeError
from mpmae.runs.curves import AXES, run_curves
from mpmae.runs.folder import find_runs, open_run
from mpmae.runs.listing import difference_table, run_table

_WIDTH = 180


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is returned (2: an error, told on stderr)."""
    options = _parser().parse_args(argv)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    try:
        options.command(options, console)
    except MpmaeError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mpmae-runs", description="Look at pretraining runs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="a table of the runs in or below folders")
    listing.add_argument("folders", type=Path, nargs="*", metavar="FOLDER", default=[Path("runs")], help="default: runs")
    listing.set_defaults(command=_list)
    compare = commands.add_parser("compare", help="the loss curves of runs as a picture")
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    compare.add_argument("-o", "--output", type=Path, default=Path("curves.png"), help="PNG, SVG or PDF (curves.png)")
    compare.add_argument("--x", choices=AXES, default="step", help="the horizontal axis (default: step)")
    compare.add_argument("--window", type=_count, metavar="N", help="records in the running mean (default: 1/50 of them)")
    compare.set_defaults(command=_compare)
    diff = commands.add_parser("diff", help="configuration and environment where two runs differ")
    diff.add_argument("runs", type=Path, nargs=2, metavar="RUN", help="two run folders")
    diff.set_defaults(command=_diff)
    return parser


def _list(options: argparse.Namespace, console: Console) -> None:
    runs = find_runs(options.folders)
    console.print(run_table(runs) if runs else f"no runs below {', '.join(map(str, options.folders))}")


def _compare(options: argparse.Namespace, console: Console) -> None:
    from mpmae.runs.picture import write_picture  # matplotlib takes a second to load

    curves = run_curves([open_run(path) for path in options.runs], options.x, options.window)
    write_picture(curves, options.x, options.output)
    for run in curves:
        if run.num_dropped:
            console.print(f"{run.name}: {run.num_dropped} records are not drawn, since a resumed run did their steps again")
    console.print(f"curves: {options.output}", soft_wrap=True)


def _diff(options: argparse.Namespace, console: Console) -> None:
    table = difference_table(*map(open_run, options.runs))
    console.print("the two runs differ in nothing but their folder" if table is None else table)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)
