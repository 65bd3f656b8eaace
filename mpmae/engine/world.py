"""The processes of a run: who am I, how many are we, and the few collectives that code outside an engine needs."""

import atexit
import os
import re
import socket
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mpmae.engine.rendezvous import meet
from mpmae.errors import ConfigError

_LAUNCHER_KEYS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SLURM_KEYS = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
_FIRST_SLURM_PORT = 15_000
_NUM_SLURM_PORTS = 15_000  # below those that the system gives to outgoing connections
# what gloo, NCCL and the TCP store (which lives on rank 0) say when the other end has gone
_LOST_PEER_WORDS = (
    "connection closed by peer",
    "connection reset",
    "connection was likely closed",
    "remote process exited",
    "broken pipe",
)
# what they say when the kernel has given up on the way to it
_CUT_OFF_WORDS = ("connection timed out", "no route to host", "host is unreachable", "network is unreachable")
# what gloo and NCCL say when a rank is silent
_SILENT_PEER = re.compile(r"timed out waiting (\d+)ms|timeout\(ms\)=(\d+)\) ran for")

# describes a process group whose collectives are no part of a step: a thread's, which each rank runs when it gets to it
BESIDE_TRAINING = "beside the training"

_SETTLE_S = 0.1
_held: list[str] = []


@dataclass(frozen=True)
class World:
    """One process of a run. All methods but `close` are collective: every rank calls them, in the same order."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    backend: str
    added_env: tuple[str, ...] = field(default=(), repr=False)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """A new tensor: the sum over ranks of `tensor`, any shape, the same on every rank. Detached."""
        total = tensor.detach().clone()
        if self.world_size > 1:
            on_device = total.to(self.device)
            dist.all_reduce(on_device)
            total = on_device.to(total.device)
        return total

    def agree(self, flag: bool) -> bool:
        """True on every rank if `flag` is True on any of them."""
        return bool(self.sum_over_ranks(torch.tensor(float(flag))) > 0)

    def gather_objects(self, value: Any) -> list[Any]:
        """The picklable `value` of every rank, by rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's picklable `value`, on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def broadcast_into(self, tensor: torch.Tensor) -> None:
        """Write rank 0's values into a contiguous `tensor` of every rank: the same shape and dtype, on `device`."""
        if self.world_size > 1:
            dist.broadcast(tensor.detach().view(-1).view(torch.uint8), 0)  # bytes: no backend broadcasts every dtype

    def close(self) -> None:
        """Leave the process group, unless something holds it; safe to call twice."""
        if not _held:
            _leave_process_group()
        for key in self.added_env:
            os.environ.pop(key, None)


def init_world(engine_name: str = "ddp", rendezvous_timeout_s: float = 300.0, collective_timeout_s: float = 900.0) -> World:
    """The World of this process, its torch.distributed process group set up: nccl on CUDA, gloo on a CPU.

    Reads RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT (deepspeed launcher, torchrun), or Slurm's variables
    under srun; without any of them it makes a world of one process on a free loopback port, so that plain
    `python launch/pretrain.py` works for every engine.

    engine_name: for the messages only. rendezvous_timeout_s: how long to wait for all ranks to come. collective_timeout_s:
    how long a collective waits for a rank, such as one whose node has lost its link.

    Raises ConfigError on an incomplete environment, a local rank without a GPU, and what `mpmae.engine.rendezvous.meet`
    says of a port that is taken, an address that does not answer and ranks that do not come.
    """
    added = _complete_environment(engine_name)
    rank, local_rank, world_size = (int(os.environ[key]) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    local_world_size = _local_world_size(world_size)
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible on {socket.gethostname()}; "
                f"start at most that many processes per node, or widen CUDA_VISIBLE_DEVICES"
            )
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        if "OMP_NUM_THREADS" not in os.environ:  # ranks that all take every core slow each other down
            torch.set_num_threads(max(1, _num_cores() // local_world_size))
    if not dist.is_initialized():
        store = meet(rank, world_size, rendezvous_timeout_s)
        timeout = timedelta(seconds=collective_timeout_s)
        store.set_timeout(timeout)  # until here what was left of the rendezvous's, which is next to nothing for a late rank
        # what a group gets that DeepSpeed or a device mesh makes without a word about it; half an hour otherwise
        dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    assert (dist.get_rank(), dist.get_world_size()) == (rank, world_size), "a process group of another world is open"
    return World(rank, local_rank, world_size, local_world_size, device, backend, added)


def hold_process_group(holder: str) -> None:
    """Keep the process group until the process ends: the next `init_world` finds it again.

    For libraries that hold on to its subgroups in globals, as DeepSpeed does.
    """
    if not _held:
        atexit.register(_leave_process_group)
    _held.append(holder)


def current_world() -> World:
    """The World of a process group that is already there, or a world of one process if there is none."""
    if not dist.is_initialized():
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        return World(0, 0, 1, 1, device, "none")
    backend = dist.get_backend()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if backend == "nccl" else torch.device("cpu")
    world_size = dist.get_world_size()
    return World(dist.get_rank(), local_rank, world_size, _local_world_size(world_size), device, backend)


def lost_peer_message(error: RuntimeError) -> str | None:
    """What to tell a user when a collective failed because of another rank; None for any other error.

    Told by the words: torch raises a bare RuntimeError for gloo, and its DistBackendError and DistNetworkError also for
    faults of this rank (two ranks on one GPU, a port that is taken), which nothing else would report.
    """
    text = str(error).lower()
    if any(words in text for words in _LOST_PEER_WORDS):
        return "another rank stopped; its message says why"
    if any(words in text for words in _CUT_OFF_WORDS):
        return "another rank cannot be reached: its node or the link to it is gone; see the logs of the other nodes"
    silent = _SILENT_PEER.search(text)
    if silent:
        waited_s = int(silent.group(1) or silent.group(2)) / 1000
        return (
            f"another rank has not answered for {waited_s:g} s: it hangs, or its node or the link to it is gone; see the "
            f"logs of the other nodes (guard.stall_s sets the bound)"
        )
    return None


def _leave_process_group() -> None:
    if dist.is_initialized():
        # A gloo thread drops what it holds of a collective after that has returned: under the group's lock, and with the
        # GIL. A group that is torn down with the GIL held at that moment waits for ever, and an interpreter that ends then
        # aborts ("terminate called without an active exception"; torch 2.13). Asleep, this thread leaves the GIL to it.
        time.sleep(_SETTLE_S)
        dist.destroy_process_group()


def _complete_environment(engine_name: str) -> tuple[str, ...]:
    """Names of the variables that had to be added."""
    present = [key for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if key in os.environ]
    if len(present) == 3:
        missing = [key for key in _LAUNCHER_KEYS if key not in os.environ]
        if missing:
            raise ConfigError(
                f"the launcher set RANK, LOCAL_RANK and WORLD_SIZE but not {' and '.join(missing)} (engine {engine_name}): "
                f"set the address and a free port of rank 0's node, or start with torchrun or deepspeed"
            )
        return ()
    if present:
        missing = [key for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if key not in os.environ]
        raise ConfigError(
            f"{' and '.join(present)} set but not {' and '.join(missing)} (engine {engine_name}): start with torchrun, "
            f"deepspeed or srun, or unset all three to run in one process"
        )
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return _add(_slurm_environment())
    return _add(
        {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_loopback_port()),
        }
    )


def _slurm_environment() -> dict[str, str]:
    absent = [name for name in _SLURM_KEYS.values() if name not in os.environ]
    num_nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
    if num_nodes > 1:
        absent += [key for key in ("MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
    if absent:
        raise ConfigError(
            f"srun started {os.environ['SLURM_STEP_NUM_TASKS']} tasks on {num_nodes} nodes but {', '.join(absent)} are not "
            f"set; in the sbatch script: export MASTER_PORT=29500 "
            f'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
    values = {key: os.environ[name] for key, name in _SLURM_KEYS.items()}
    port = _FIRST_SLURM_PORT + int(os.environ.get("SLURM_JOB_ID", 0)) % _NUM_SLURM_PORTS
    return {**values, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _add(values: dict[str, str]) -> tuple[str, ...]:
    added = tuple(key for key in values if key not in os.environ)
    for key in added:
        os.environ[key] = values[key]
    return added


def _local_world_size(world_size: int) -> int:
    """Ranks on this node; each launcher has its own variable for it (torchrun, deepspeed, srun)."""
    for key in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if key in os.environ:
            return int(os.environ[key])
    per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as "4(x2)" or "4,3"
    digits = per_node.split("(")[0].split(",")[0]
    return int(digits) if digits else world_size


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: what this process may use, not what the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _free_loopback_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
