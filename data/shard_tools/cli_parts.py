"""What the commands of `mpmae-shards` share: how they are added, and how lists of names are given."""

import argparse
from collections.abc import Callable


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the defaults that say something: neither None nor a switch that is off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int],
    help_text: str,
    description: str,
) -> argparse.ArgumentParser:
    """The parser of a new command; `run` gets its arguments and gives the exit code."""
    command = commands.add_parser(name, help=help_text, description=description, formatter_class=_HelpFormatter)
    command.set_defaults(run=run)
    return command


def add_workers(command: argparse.ArgumentParser) -> None:
    """The option `--workers`."""
    command.add_argument("--workers", type=int, metavar="N", help="threads; one per core if not given")


def names(text: str) -> tuple[str, ...]:
    """`A,B` as ("A", "B")."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
