"""Leaving a process group right after its last collective neither hangs nor aborts."""

import os
import socket

import torch
from torch.nn.parallel import DistributedDataParallel

from mpmae.engine import init_world
from tests.engine.spawn import run_ranks

NUM_LIVES = 20


def live_often(ports: list[int]) -> int:
    for port in ports:
        os.environ["MASTER_PORT"] = str(port)
        world = init_world()
        module = DistributedDataParallel(torch.nn.Linear(4, 4))
        module(torch.ones(2, 4)).sum().backward()
        assert world.gather_objects({"numbers": list(range(100))})
        world.close()
        del module  # its reducer is the last to hold the group
    return len(ports)


def test_many_short_lives(tmp_path):
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(NUM_LIVES)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    assert run_ranks(live_often, 2, ports, tmp_path, timeout_s=100) == [NUM_LIVES] * 2
