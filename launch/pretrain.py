"""Pretrain a masked autoencoder on a shard set.

deepspeed --num_gpus 2 launch/pretrain.py --ds-config configs/ds/zero2.json data.shards=build/demo/shards
torchrun --nproc-per-node 2 launch/pretrain.py --config configs/run/demo.yaml engine.name=ddp
python launch/pretrain.py --dry-run train.global_batch_size=64

Without --config the settings of configs/run/demo.yaml are used, and without data.shards its synthetic set, made on the spot.

Exit status of a rank (torchrun makes 1 of any but 0, so look at run.dir/stopped.json for 75; deepspeed passes it on):
    0    the run is complete
    1    another rank stopped, or an error that nobody foresaw (with a traceback)
    2    an error that the message explains
    75   stopped by SIGTERM, SIGUSR1 or --time-limit, and saved: queue it again with --resume auto
    86   stalled: the watchdog named the rank and wrote all stacks to run.dir/stacks
    130  interrupted (Ctrl-C)
    143  a second SIGTERM, more than 5 s after the first: ended at once, nothing saved
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from mpmae.config import load_config
from mpmae.engine import lost_peer_message
from mpmae.errors import MpmaeError
from mpmae.train import dry_run, pretrain
from mpmae.train.stopping import EXIT_REQUEUE

DEMO_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "run" / "demo.yaml"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DEMO_CONFIG, help="run configuration (default: demo.yaml)")
    parser.add_argument("--ds-config", type=Path, help="DeepSpeed JSON; selects the deepspeed engine")
    parser.add_argument("--resume", help="auto, never or a checkpoint folder (checkpoint.resume)")
    parser.add_argument(
        "--profile", type=steps, nargs="?", const=[10, 12], metavar="FIRST:LAST", help="trace these steps (default: 10:12)"
    )
    parser.add_argument("--time-limit", help="such as 3:50:00: then save and ask to be queued again (guard.time_limit)")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved plan and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys, such as train.max_steps=20")
    return parser.parse_intermixed_args(arguments)


def steps(text: str) -> list[int]:
    """[first, last] from FIRST:LAST."""
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST:LAST, such as 10:12; without steps, put --profile last")
    return [int(part) for part in parts]


def stop(message: str, status: int) -> int:
    """Print why this rank ends; `status`. Every rank speaks, as a fault may be on one of them alone."""
    rank = int(os.environ.get("RANK", "0"))
    print(f"error: {f'rank {rank}: ' if rank else ''}{message}", file=sys.stderr)
    return status


def main() -> int:
    """Read the configuration and run; the exit status, as this file's docstring lists them."""
    options = parse()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    overrides = list(options.overrides)
    if options.ds_config:
        overrides = ["engine.name=deepspeed", *overrides, f"engine.ds_config={options.ds_config}"]
    if options.resume:
        overrides.append(f"checkpoint.resume={options.resume}")
    if options.profile:
        overrides.append(f"log.profile_steps={options.profile}")
    if options.time_limit:
        overrides.append(f"guard.time_limit={options.time_limit}")
    try:
        config = load_config(options.config, overrides)
        stopped = (dry_run if options.dry_run else pretrain)(config)
    except MpmaeError as error:
        return stop(str(error), 2)
    except KeyboardInterrupt:
        return stop("interrupted", 130)
    except RuntimeError as error:
        message = lost_peer_message(error)
        if message is None:
            raise
        return stop(message, 1)
    if stopped:
        saved = f"stopped by {stopped.reason} and saved after step {stopped.step}"
        return stop(f"{saved}; queue it again with --resume auto", EXIT_REQUEUE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
