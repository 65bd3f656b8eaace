"""Runs a function on several ranks, each a process of its own: `run_ranks(function, num_ranks, argument)`.

As a script it is one of those processes: python -m tests.engine.spawn MODULE FUNCTION ARGUMENT_PICKLE RESULT_PICKLE.
"""

import atexit
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]


def run_ranks(function: Callable, num_ranks: int, argument: Any, folder: Path, timeout_s: float = 240.0) -> list[Any]:
    """What `function(argument)` returned on each rank. Raises AssertionError with a rank's output if it failed or hung.

    `function` belongs to a module of the tests; it finds RANK, WORLD_SIZE and so on in the environment, as under torchrun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "argument.pkl").write_bytes(pickle.dumps(argument))
    port = _free_port()
    processes, logs = [], []
    for rank in range(num_ranks):
        env = os.environ | _environment(rank, num_ranks, port)
        log = folder / f"rank{rank}.log"
        logs.append(log)
        command = [sys.executable, "-m", "tests.engine.spawn", function.__module__, function.__name__]
        command += [str(folder / "argument.pkl"), str(folder / f"result{rank}.pkl")]
        with log.open("w") as file:
            processes.append(subprocess.Popen(command, cwd=REPO, env=env, stdout=file, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + timeout_s
    try:
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() > deadline:
                raise AssertionError(f"no end after {timeout_s} s:\n" + "\n".join(log.read_text()[-3000:] for log in logs))
            time.sleep(0.05)
        failed = [rank for rank, p in enumerate(processes) if p.poll()]
        if failed:
            raise AssertionError("\n".join(f"rank {rank}:\n{logs[rank].read_text()[-6000:]}" for rank in failed))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    return [pickle.loads((folder / f"result{rank}.pkl").read_bytes()) for rank in range(num_ranks)]


def fork_ranks(function: Callable, num_ranks: int, argument: Any, timeout_s: float = 240.0) -> list[Any]:
    """The same from a process that has imported all it needs, which costs most of a start, but has no process group yet."""
    port, children = _free_port(), {}
    for rank in range(num_ranks):
        result, end = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.environ.update(_environment(rank, num_ranks, port))
                value = pickle.dumps(function(argument))
                atexit._run_exitfuncs()  # leaves the process group
                with os.fdopen(end, "wb") as file:
                    file.write(value)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.close(end)
        children[child] = result
    timer = threading.Timer(timeout_s, lambda: [os.kill(child, signal.SIGKILL) for child in children])
    timer.start()
    values, failed = [], []
    for rank, (child, result) in enumerate(children.items()):
        with os.fdopen(result, "rb") as file:
            text = file.read()
        if os.waitpid(child, 0)[1] or not text:
            failed.append(rank)
            continue
        values.append(pickle.loads(text))
    timer.cancel()
    assert not failed, f"ranks {failed} failed or took longer than {timeout_s} s: see their output above"
    return values


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return {key: str(value) for key, value in (ranks | address).items()}


def _main(module: str, function: str, argument: str, result: str) -> None:
    value = getattr(importlib.import_module(module), function)(pickle.loads(Path(argument).read_bytes()))
    Path(result).write_bytes(pickle.dumps(value))


if __name__ == "__main__":
    _main(*sys.argv[1:])
