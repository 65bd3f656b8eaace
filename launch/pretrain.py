"""Pretrain a masked autoencoder on a shard set.

deepspeed --num_gpus 2 launch/pretrain.py --ds-config configs/ds/zero2.json data.shards=build/demo/shards
torchrun --nproc-per-node 2 launch/pretrain.py --config configs/run/demo.yaml engine.name=ddp
python launch/pretrain.py --dry-run train.global_batch_size=64

Without --config the settings of configs/run/demo.yaml are used, and without data.shards its synthetic set, made on the spot.
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

DEMO_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "run" / "demo.yaml"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DEMO_CONFIG, help="run configuration (default: demo.yaml)")
    parser.add_argument("--ds-config", type=Path, help="DeepSpeed JSON; selects the deepspeed engine")
    parser.add_argument("--resume", help="auto, never or a checkpoint folder (checkpoint.resume)")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved plan and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration keys, such as train.max_steps=20")
    return parser.parse_intermixed_args(arguments)


def stop(message: str, status: int) -> int:
    """Print why this rank ends; `status`. Every rank speaks, as a fault may be on one of them alone."""
    rank = int(os.environ.get("RANK", "0"))
    print(f"error: {f'rank {rank}: ' if rank else ''}{message}", file=sys.stderr)
    return status


def main() -> int:
    """Read the configuration and run; the exit status: 0, 1 another rank stopped, 2 an error, 130 interrupted."""
    options = parse()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    overrides = list(options.overrides)
    if options.ds_config:
        overrides = ["engine.name=deepspeed", *overrides, f"engine.ds_config={options.ds_config}"]
    if options.resume:
        overrides.append(f"checkpoint.resume={options.resume}")
    try:
        config = load_config(options.config, overrides)
        (dry_run if options.dry_run else pretrain)(config)
    except MpmaeError as error:
        return stop(str(error), 2)
    except KeyboardInterrupt:
        return stop("interrupted", 130)
    except RuntimeError as error:
        message = lost_peer_message(error)
        if message is None:
            raise
        return stop(message, 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
