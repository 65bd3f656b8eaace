"""Runs a function on several ranks of this machine, each a fresh process: `run_ranks(function, num_ranks, argument)`."""

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

# imported once, in the process that all ranks are forked from: starting a rank then takes a fraction of a second
PRELOADED = ["torch.distributed", "mpmae.engine", "mpmae.models", "mpmae.loader"]


def preload(*modules: str) -> None:
    """Import these installed modules too before the first rank starts; one that is absent is passed over."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as the engine does; deepspeed asks when it is imported
    multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOADED, *modules])


def run_ranks(function: Callable[[Any], Any], num_ranks: int, argument: Any, timeout_s: float = 600.0) -> list[Any]:
    """What `function(argument)` gave on each rank, as JSON can hold it.

    The function finds RANK, WORLD_SIZE and so on in its environment, and one thread. Raises TimeoutError after `timeout_s`
    and torch's ProcessRaisedException (with the rank's traceback) or ProcessExitedException when a rank fails; none is left.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory() as folder:
        arguments = (function, num_ranks, port, argument, folder)
        context = multiprocessing.start_processes(_rank, arguments, num_ranks, join=False, start_method="forkserver")
        try:
            while not context.join(timeout=max(0.1, deadline - time.monotonic())):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__} on {num_ranks} ranks: no end after {timeout_s:.0f} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def _rank(rank: int, function: Callable[[Any], Any], num_ranks: int, port: int, argument: Any, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    value = function(argument)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(value))
