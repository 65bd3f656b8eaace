"""Starting real runs, as a user would: launch/pretrain.py under python, torchrun and deepspeed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(launcher: str, num_ranks: int, *arguments: str, fault: str = "") -> list[str]:
    """The command line of a run under `python`, `torchrun` or `deepspeed`; fault: as tests/train/faulty.py takes it."""
    script = ["launch/pretrain.py", *arguments]
    if fault:
        script = ["tests/train/faulty.py", *fault.split(), *arguments]
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


def launch(launcher: str, num_ranks: int, *arguments: str, fault: str = "") -> subprocess.CompletedProcess:
    """Run to the end; stdout and stderr are captured together."""
    return subprocess.run(
        command(launcher, num_ranks, *arguments, fault=fault),
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


@contextlib.contextmanager
def running(full: list[str], run_dir: Path, step: int) -> Iterator[subprocess.Popen]:
    """A started command whose metrics.jsonl has `step` by now; its output is in `output_of`. Killed whole at the end."""
    log = output_of(run_dir)
    with log.open("w") as file:
        process = subprocess.Popen(
            full, cwd=REPO, env=environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.monotonic() + TIMEOUT_S
    below: set[int] = set()
    try:
        while not any(line["step"] >= step for line in metrics(run_dir)):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        below = set(descendants(process.pid))
        yield process
    finally:
        kill_tree(process.pid)
        for left in below:  # of a launcher that ended before its ranks
            kill(left)
        process.wait()


def output_of(run_dir: Path) -> Path:
    return run_dir.parent / "output.log"


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The processes that run the script itself, by rank."""
    script = "launch/pretrain.py", "tests/train/faulty.py"
    ranks = {}
    for pid in [process.pid, *descendants(process.pid)]:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if any(word in script for word in words[1:3]):
            environ = Path(f"/proc/{pid}/environ").read_text().split("\0")
            ranks[next((int(each[5:]) for each in environ if each.startswith("RANK=")), 0)] = pid
    return [pid for _, pid in sorted(ranks.items())]


def kill_after_step(step: int, launcher: str, num_ranks: int, run_dir: Path, *arguments: str) -> None:
    """Start a run and `kill -9` launcher and ranks as soon as metrics.jsonl has `step`."""
    with running(command(launcher, num_ranks, f"run.dir={run_dir}", *arguments), run_dir, step):
        pass


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and everything below it, the top first so that no launcher reacts."""
    for each in (pid, *descendants(pid)):
        kill(each)


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *descendants(child)]
    return found
