"""The command `mpmae-checkpoint`: look at a run's checkpoints, convert one, remove old ones."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from mpmae.checkpoint_tools.convert import Target, convert
from mpmae.checkpoint_tools.inspect import checkpoint_of, facts, show
from mpmae.checkpoint_tools.prune import prune
from mpmae.errors import MpmaeError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is returned (2: an error, told on stderr)."""
    options = _parser().parse_args(argv)
    try:
        options.run(options)
    except MpmaeError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mpmae-checkpoint", description=__doc__.split(": ", 1)[1])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspecting = commands.add_parser("inspect", help="what is in a checkpoint, and which of a run are whole")
    inspecting.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT")
    inspecting.add_argument("--json", action="store_true", help="for programs")
    inspecting.set_defaults(run=_inspect)

    converting = commands.add_parser("convert", help="write a checkpoint in another form")
    converting.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT", help="of a run the newest one is taken")
    converting.add_argument(
        "--to", required=True, choices=get_args(Target), help="portable: to resume from; weights: the model"
    )
    converting.add_argument(
        "-o", "--output", required=True, type=Path, metavar="OUT", help="a new folder, or .safetensors file"
    )
    converting.set_defaults(run=_convert)

    pruning = commands.add_parser("prune", help="remove old checkpoints and leftovers of a run")
    pruning.add_argument("path", type=Path, metavar="RUN")
    pruning.add_argument(
        "--keep", required=True, type=int, metavar="N", help="complete checkpoints that stay, the newest ones"
    )
    pruning.add_argument("--abandoned", action="store_true", help="also those that the run went back behind")
    pruning.add_argument("--dry-run", action="store_true", help="only say what would go")
    pruning.set_defaults(run=_prune)
    return parser


def _inspect(options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(facts(options.path), indent=1))
    else:
        show(options.path, Console())


def _convert(options: argparse.Namespace) -> None:
    source = checkpoint_of(options.path)
    print(f"{source} -> {convert(source, options.to, options.output)}")


def _prune(options: argparse.Namespace) -> None:
    pruned = prune(options.path, options.keep, with_abandoned=options.abandoned, dry_run=options.dry_run)
    for path in pruned.removed:
        print(f"{'would remove' if options.dry_run else 'removed'} {path}")
    if not pruned.removed:
        print("nothing to remove")
    if pruned.is_running:
        print(f"notice: {options.path} is in use by a run: unfinished saves were left alone", file=sys.stderr)
