"""The processes of an evaluation."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from mpmae.engine.world import World, init_world
from mpmae.eval.devices import find_device


@contextmanager
def opened_world(device: str) -> Iterator[World]:
    """The ranks of the launcher that started this process, or a world of this process alone on `device`; left at the end.

    device: "auto", "cpu", "cuda" or "cuda:N"; with several ranks each has the device of its local rank. Within another such
    block the ranks stay. Raises ConfigError.
    """
    if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1"))) == 1:
        yield World(0, 0, 1, 1, find_device(device), "none")
        return
    is_ours = not dist.is_initialized()
    world = init_world()
    try:
        yield world
    finally:
        if is_ours:
            world.close()
