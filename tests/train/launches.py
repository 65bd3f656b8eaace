"""Starting real runs, as a user would: launch/pretrain.py under python, torchrun and deepspeed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(launcher: str, num_ranks: int, *arguments: str) -> list[str]:
    """The command line of a run under `python`, `torchrun` or `deepspeed`."""
    script = ["launch/pretrain.py", *arguments]
    if launcher == "python":
        return [sys.executable, *script]
    port = str(free_port())
    if launcher == "torchrun":
        options = ["--nproc-per-node", str(num_ranks), "--master-port", port]
        return [sys.executable, "-m", "torch.distributed.run", *options, *script]
    options = ["--num_gpus", str(num_ranks), "--master_port", port]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *options, *script]


def environment() -> dict[str, str]:
    cleared = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return cleared | {"OMP_NUM_THREADS": "1"}


def launch(launcher: str, num_ranks: int, *arguments: str) -> subprocess.CompletedProcess:
    """Run to the end; stdout and stderr are captured together."""
    return subprocess.run(
        command(launcher, num_ranks, *arguments),
        cwd=REPO,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )


def metrics(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def launch_ok(launcher: str, num_ranks: int, run_dir: Path, *arguments: str) -> list[dict]:
    """Run to the end, which must be a good one; the lines of metrics.jsonl."""
    done = launch(launcher, num_ranks, f"run.dir={run_dir}", *arguments)
    assert done.returncode == 0, done.stdout[-4000:]
    return metrics(run_dir)


def kill_after_step(step: int, launcher: str, num_ranks: int, run_dir: Path, *arguments: str) -> None:
    """Start a run and `kill -9` launcher and ranks as soon as metrics.jsonl has `step`."""
    full = command(launcher, num_ranks, f"run.dir={run_dir}", *arguments)
    with (run_dir.parent / "killed.log").open("w") as log:
        process = subprocess.Popen(
            full, cwd=REPO, env=environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + TIMEOUT_S
        try:
            while not any(line["step"] >= step for line in metrics(run_dir)):
                assert process.poll() is None, (run_dir.parent / "killed.log").read_text()[-4000:]
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            kill_tree(process.pid)
            process.wait()


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and everything below it, the top first so that no launcher reacts."""
    below = descendants(pid)
    for each in (pid, *below):
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            continue


def descendants(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *descendants(child)]
    return found
