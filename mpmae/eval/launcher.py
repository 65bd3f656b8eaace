"""What the launchers of evaluations have in common: arguments in, one call, an exit status."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mpmae.config_tree import Section, load_tree
from mpmae.engine.world import lost_peer_message
from mpmae.errors import MpmaeError


def launch(
    description: str, schema: type[Section], run: Callable[[Any, bool], None], arguments: Sequence[str] | None = None
) -> int:
    """Read the configuration and `run(config, resume)`; the exit status.

    0: done. 1: another rank stopped. 2: an error that the message explains. 130: interrupted. What is chosen along the way
    is logged on rank 0, warnings on every rank.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file with some of the keys")
    parser.add_argument(
        "--resume", choices=("auto", "never"), default="never", help="auto: go on with what output.dir holds"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys, such as dataset.path=DIR")
    options = parser.parse_intermixed_args(arguments)
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("mpmae").setLevel(logging.WARNING if rank else logging.INFO)
    message, status = "", 0
    try:
        run(load_tree(schema, options.config, options.overrides), options.resume == "auto")
    except MpmaeError as error:
        message, status = str(error), 2
    except KeyboardInterrupt:
        message, status = "interrupted; --resume auto continues", 130
    except RuntimeError as error:
        message, status = lost_peer_message(error), 1
        if message is None:
            raise
    if message:
        print(f"error: {f'rank {rank}: ' if rank else ''}{message}", file=sys.stderr)
    return status
