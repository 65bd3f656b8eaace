"""Run a command over a test cluster of network namespaces on this machine, and break something meanwhile.

python -m launch.netns run --launcher torchrun launch/pretrain.py run.dir=runs/netns train.max_steps=20
python -m launch.netns run --fault kill-rank:3 --after-s 20 --options "--max-restarts 1" launch/pretrain.py --resume auto
python -m launch.netns run --launcher none sh -c 'echo node $NODE_RANK of $NUM_NODES, master $MASTER_ADDR; ip address'
python -m launch.netns --nodes 3 check

Run it from the repository's root. Faults: kill-rank:R, kill-node:N, cut-link:N, slow-link:N.
"""

import argparse
import shlex
import sys
import time

from launch.netns.cluster import Cluster
from launch.netns.job import Job
from launch.netns.namespaces import NoNamespaces

LAUNCHERS = ("torchrun", "deepspeed", "srun", "none")
FAULTS = ("kill-rank", "kill-node", "cut-link", "slow-link")
SLOW = {"delay_ms": 20.0, "loss_percent": 0.5, "rate_mbit": 50.0}


def fault(text: str) -> tuple[str, int]:
    """Name and number of `NAME:NUMBER`."""
    name, _, number = text.partition(":")
    if name not in FAULTS or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(FAULTS)} with a number, as in kill-rank:3")
    return name, int(number)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    actions = parser.add_subparsers(dest="action", required=True, metavar="check | run")
    actions.add_parser("check", help="say whether this machine allows it, and why not")
    run = actions.add_parser("run", help="start a launcher on every node")
    run.add_argument("--ranks-per-node", type=int, default=2)
    run.add_argument("--launcher", choices=LAUNCHERS, default="torchrun")
    run.add_argument("--options", type=shlex.split, default=[], help="more options of torchrun or deepspeed, in one text")
    run.add_argument("--fault", type=fault)
    run.add_argument("--after-s", type=float, default=20.0, help="seconds from the start to the fault")
    run.add_argument("--timeout-s", type=float, default=3600.0, help="end everything after so long")
    run.add_argument("command", nargs=argparse.REMAINDER, help="script and arguments; with --launcher none, a command")
    return parser.parse_args(arguments)


def break_something(cluster: Cluster, name: str, number: int) -> str:
    """Do the fault; what was done, in words."""
    if name == "slow-link":
        return f"link of node{number}: {cluster.slow_link(number, **SLOW)}"
    {"kill-rank": cluster.kill_rank, "kill-node": cluster.kill_node, "cut-link": cluster.cut_link}[name](number)
    return f"{name} {number}"


def main() -> int:
    """Run; the largest exit status of a node (1 for one that was killed), 3 where namespaces are not allowed."""
    options = parse()
    try:
        with Cluster(options.nodes) as cluster:
            if options.action == "check":
                print(f"{options.nodes} nodes came up: {', '.join(cluster.names)}")
                return 0
            started = time.monotonic()
            with Job(cluster, options.launcher, options.ranks_per_node, options.command, options.options) as job:
                if options.fault:
                    while job.poll() and time.monotonic() < started + options.after_s:
                        time.sleep(0.1)
                    print(f"netns: {break_something(cluster, *options.fault)}", file=sys.stderr)
                statuses = job.wait(options.timeout_s - (time.monotonic() - started))
            ends = ", ".join(f"{name} {status}" for name, status in zip(cluster.names, statuses, strict=True))
            print(f"netns: ended after {time.monotonic() - started:.1f} s with {ends}", file=sys.stderr)
            return max(status if status >= 0 else 1 for status in statuses)
    except NoNamespaces as error:
        print(f"error: no test cluster here: {error}", file=sys.stderr)
        return 3
    except (TimeoutError, ProcessLookupError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
