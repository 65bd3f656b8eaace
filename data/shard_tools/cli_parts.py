"""What the commands of `mpmae-shards` share."""

import argparse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the defaults that say something: neither None nor a switch that is off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def add_command(commands, name: str, run, help_text: str, description: str) -> argparse.ArgumentParser:
    """A command whose arguments `run` is called with."""
    command = commands.add_parser(name, help=help_text, description=description, formatter_class=HelpFormatter)
    command.set_defaults(run=run)
    return command


def names(text: str) -> list[str]:
    """`a,b` as a list."""
    return [name.strip() for name in text.split(",") if name.strip()]
