"""FSDP2 (torch's `fully_shard`) as an Engine: weights, gradients and moments sharded over the ranks.

Where FSDP2 of torch 2.13 needs care:
- It averages gradients, by an operation that gloo lacks if told another divisor: told to sum, it only adds.
- A 0-dimensional parameter cannot be sharded: it stays whole on each rank, and its gradient is summed here.
- After an evaluation the root's gathered weights stay registered, and would survive a load: `forward` drops them.
- With weights in host memory a DTensor's collectives would hand host tensors to NCCL: norms and gathers go by the device.
"""

from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mpmae.config import RunConfig
from mpmae.engine.base import Engine, as_float32, update
from mpmae.engine.dcp import apply_state, collect_state, read_state, write_state
from mpmae.engine.files import rng_state, save_tensors
from mpmae.engine.optim import build_optimizer
from mpmae.engine.portable import TrainingState, load_state
from mpmae.engine.world import BESIDE_TRAINING, World
from mpmae.engine.wrap import blocks_of, wrap_blocks

DCP_FOLDER = "dcp"


class FSDPEngine(Engine):
    """`fully_shard` around every block and around the rest; one shard group of all ranks, or several (HSDP).

    Weights, reduced gradients and moments are float32. In bf16 the forward runs under autocast on weights gathered as bf16,
    and gradients are reduced and accumulated in float32. Checkpoints load at any world size and shard size.
    """

    name = "fsdp"

    def __init__(self, config: RunConfig, module: nn.Module, world: World, num_micro_steps: int):
        super().__init__(module, world, num_micro_steps)
        self._autocast_dtype = torch.bfloat16 if config.train.precision == "bf16" else None
        self._clip_grad_norm = config.optim.clip_grad_norm
        mesh = _make_mesh(world, config.engine.shard_size)
        self._shard_group = mesh.get_group("shard")
        for tensor in (*module.parameters(), *module.buffers()):
            _take_from_rank_0(tensor, world)
        wrap_blocks(module, config.engine)
        whole = {p for p in module.parameters() if p.ndim == 0}
        self._shard(module, whole, mesh, config.engine.cpu_offload)
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._optimizer = build_optimizer(module, config.optim)
        self._writing_group: dist.ProcessGroup | None = None

    def _shard(self, module: nn.Module, whole: set[nn.Parameter], mesh: DeviceMesh, cpu_offload: bool) -> None:
        for parameter in whole:
            parameter.data = parameter.data.to(self.device)
        pinned = self.device.type == "cuda"
        policy = {
            "mesh": mesh,
            # inputs are left as they are: targets stay float32, and autocast chooses for the rest
            "mp_policy": MixedPrecisionPolicy(self._autocast_dtype, torch.float32, cast_forward_inputs=False),
            "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if cpu_offload else OffloadPolicy(),
        }
        for unit in (*(block for _, block in blocks_of(module)), module):
            fully_shard(unit, ignored_params=whole, **policy)
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)

    @property
    def num_state_shards(self) -> int:
        """See Engine."""
        return self._shard_group.size()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See Engine."""
        if torch.is_grad_enabled():
            self._module.set_requires_gradient_sync(self._is_last_micro_step())
        with torch.autocast(self.device.type, self._autocast_dtype, enabled=self._autocast_dtype is not None):
            output = self._module(*args, **kwargs)
        if not torch.is_grad_enabled():
            self._module.reshard()
        return output

    def backward(self, loss: torch.Tensor) -> None:
        """See Engine."""
        self._check_micro_step_left()
        loss.backward()
        self._micro_step += 1

    def step(self, lr: float) -> torch.Tensor:
        """See Engine."""
        self._check_all_micro_steps_done()
        grad_norm = self._reduced_grad_norm()
        update(self._optimizer, self._parameters, grad_norm, self._clip_grad_norm, lr)
        self._micro_step = 0
        return grad_norm

    @torch.no_grad()
    def _reduced_grad_norm(self) -> torch.Tensor:
        """The norm over all shards, after summing what is not sharded over the ranks."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        shards = [g.to_local() for g in gradients if isinstance(g, DTensor)]
        square = nn.utils.get_total_norm(shards).to(self.device, torch.float64).square()
        dist.all_reduce(square, group=self._shard_group)
        whole = [g for g in gradients if not isinstance(g, DTensor)]
        if whole:
            summed = torch.stack(whole)
            dist.all_reduce(summed)
            for gradient, value in zip(whole, summed, strict=True):
                gradient.copy_(value)
            square += summed.double().square().sum()
        return square.sqrt().float()

    def snapshot(self, on_cpu: bool = False) -> dict[str, Any]:
        """Weights, buffers and optimizer as torch.distributed.checkpoint takes them: {"module": ..., "optimizer": ...}.

        Named as in the module, moments by parameter name, each rank with its shards. on_cpu: copies in host memory, which
        later steps leave alone; else the live tensors.
        """
        self._create_moments()
        return collect_state(self._module, self._optimizer, on_cpu)

    def save(self, folder: Path) -> None:
        """See Engine. Each rank writes its shards, one of the ranks what all hold alike."""
        write_state(self.snapshot(), folder / DCP_FOLDER)
        self._save_rng(folder)

    def load(self, folder: Path) -> None:
        """See Engine."""
        state = self.snapshot()
        read_state(state, folder / DCP_FOLDER)
        apply_state(state, self._module, self._optimizer)
        self.load_rng(folder)

    def deferred_save(self) -> Callable[[Path], None]:
        """See Engine. The ranks agree on who writes what over a process group of their own, beside the training's."""
        if self._writing_group is None:
            self._writing_group = dist.new_group(backend="gloo", group_desc=BESIDE_TRAINING)
        state, rng = self.snapshot(on_cpu=True), rng_state(self.device)

        def write(folder: Path) -> None:
            write_state(state, folder / DCP_FOLDER, self._writing_group)
            save_tensors(rng, self._rng_file(folder))

        return write

    @property
    def layout(self) -> dict[str, Any]:
        """See Engine. Any number of ranks, in any number of shard groups, loads it."""
        return {"engine": self.name}

    def load_portable(self, state: TrainingState) -> None:
        """See Engine. One parameter at a time: every rank reads it and keeps its shard."""
        load_state(state, self._module, self._optimizer, _place)

    def _create_moments(self) -> None:
        """Moments of 0 before the first step: a step that is told to change nothing, since torch would count its own."""
        if self._optimizer.state:
            return
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.found_inf = torch.ones(())
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def full_state_dict(self, names: Container[str] | None = None) -> dict[str, torch.Tensor] | None:
        """See Engine. Gathers one parameter at a time."""
        state = {}
        for name, tensor in self._module.state_dict().items():
            if names is not None and name not in names:
                continue
            whole = tensor.to(self.device).full_tensor() if isinstance(tensor, DTensor) else tensor
            state |= as_float32({name: whole}) if self.rank == 0 else {}
        return state if self.rank == 0 else None


def _place(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Write this rank's shard of a whole tensor."""
    if isinstance(tensor, DTensor):
        sharded = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor, value = tensor.to_local(), sharded.to_local()
    tensor.copy_(value)


def _make_mesh(world: World, shard_size: int | None) -> DeviceMesh:
    """One dimension (shard), or two (replicate, shard) with neighbouring ranks in one shard group."""
    shard_size = shard_size or world.world_size
    if shard_size == world.world_size:
        return init_device_mesh(world.device.type, (shard_size,), mesh_dim_names=("shard",))
    sizes = (world.world_size // shard_size, shard_size)
    return init_device_mesh(world.device.type, sizes, mesh_dim_names=("replicate", "shard"))


@torch.no_grad()
def _take_from_rank_0(tensor: torch.Tensor, world: World) -> None:
    on_device = tensor.detach().to(world.device).flatten()
    world.broadcast_into(on_device)
    tensor.copy_(on_device.view_as(tensor))
