import os
import subprocess
import sys

import pytest
import torch

from mpmae.engine import init_world
from mpmae.errors import ConfigError

KEYS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM_KEYS = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_JOB_ID")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for key in (*KEYS, *SLURM_KEYS, "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(key, raising=False)


def test_plain_python_is_a_world_of_one():
    num_threads = torch.get_num_threads()
    world = init_world("deepspeed")
    try:
        assert (world.rank, world.local_rank, world.world_size, world.local_world_size) == (0, 0, 1, 1)
        assert torch.distributed.is_initialized()
        assert all(key in os.environ for key in KEYS), "deepspeed looks for them"
        assert world.agree(True)
        assert not world.agree(False)
        value = torch.ones(3)
        assert torch.equal(world.sum_over_ranks(value), value)
        assert world.sum_over_ranks(value) is not value
        assert world.gather_objects("a") == ["a"]
        assert world.broadcast_object("a") == "a"
        world.barrier()
    finally:
        world.close()
        torch.set_num_threads(num_threads)
    assert not torch.distributed.is_initialized()
    assert not any(key in os.environ for key in KEYS), "children must not take themselves for ranks"


def test_every_group_has_the_bound_of_a_collective():
    """Also those that a library makes for itself, and the store by which NCCL sets up a group."""
    world = init_world(collective_timeout_s=77.0)
    try:
        assert torch.distributed.distributed_c10d._get_default_store().timeout.total_seconds() == 77.0
        for group in (torch.distributed.group.WORLD, torch.distributed.new_group([0])):
            assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 77.0
    finally:
        world.close()


def test_half_an_environment(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="RANK set but not LOCAL_RANK and WORLD_SIZE"):
        init_world()


def test_no_address(monkeypatch):
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(key, "0")
    with pytest.raises(ConfigError, match="not MASTER_ADDR and MASTER_PORT"):
        init_world()


def test_srun_over_nodes_needs_an_address(monkeypatch):
    for key, value in zip(SLURM_KEYS, ("3", "1", "4", "2", "77"), strict=True):
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match="export MASTER_PORT"):
        init_world()


def test_srun_on_one_node(tmp_path):
    """Two tasks with the environment of srun, and no other launcher, find each other."""
    code = (
        "import torch; from mpmae.engine import init_world; w = init_world(); "
        "print(w.rank, w.world_size, w.gather_objects(w.rank), w.sum_over_ranks(torch.tensor(2.0)).item(), "
        "w.agree(w.rank == 1), w.broadcast_object('r%d' % w.rank)); w.close()"
    )
    job = str(os.getpid())
    processes = []
    for rank in range(2):
        values = dict(zip(SLURM_KEYS, (str(rank), str(rank), "2", "1", job), strict=True))
        command = [sys.executable, "-c", code]
        processes.append(subprocess.Popen(command, env=os.environ | values, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert outputs == [f"{rank} 2 [0, 1] 4.0 True r0" for rank in range(2)]
