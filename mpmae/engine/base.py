"""What runs a training step: one protocol for DDP, FSDP2 and DeepSpeed.

A step of the loop, the same for every engine:

    for batch in micro_batches:                # num_micro_steps of them
        loss = engine.forward(batch)           # this micro batch's share of the global loss
        engine.backward(loss)
    grad_norm = engine.step(lr)

The global loss is the sum of all shares over micro steps and ranks, so no result depends on how the global batch is cut.
Every rank must give every parameter a gradient in every micro step: a term that a rank has no data for is multiplied by
zero, not left out. A parameter skipped on some ranks only leaves the others waiting for it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim

from mpmae.engine.files import load_tensors, rng_state, save_tensors, set_rng_state
from mpmae.engine.portable import TrainingState
from mpmae.engine.world import World
from mpmae.engine.wrap import unwrap_blocks
from mpmae.errors import ConfigError


class Engine(ABC):
    """Forward, backward and step of a module over the ranks of a World.

    Methods are collective unless said otherwise: every rank calls them, in the same order.
    """

    name: str
    zero_stage: int | None = None

    def __init__(self, module: nn.Module, world: World, num_micro_steps: int):
        self._module = module
        self.world = world
        self.num_micro_steps = num_micro_steps
        self._micro_step = 0

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return self.world.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.world.world_size

    @property
    def num_state_shards(self) -> int:
        """Ranks that the optimizer's state is split over."""
        return 1

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return self.world.device

    @property
    def module(self) -> nn.Module:
        """The module as it was given, without wrappers. Its parameters may be partitioned (ZeRO-3): see full_state_dict."""
        return self._module

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output under the run's precision. Also for evaluation (under torch.no_grad, module.eval())."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`, a scalar: this micro batch's share of the global loss."""

    @abstractmethod
    def step(self, lr: float) -> torch.Tensor:
        """Update the weights at rate `lr` with the gradients summed over micro steps and ranks, then drop the gradients.

        A parameter group with an `lr_scale` is updated at `lr` times that.
        Returns the L2 norm of the summed gradient before clipping: float32 scalar, detached, the same on every rank. If it
        is not finite (a skipped step), weights and moments are as they were.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write weights, optimizer and random state into `folder`, made if absent, and sync them to the disk.

        Raises OSError on a rank that cannot write, after the last collective: no other rank is left waiting for it.
        """

    def deferred_save(self) -> Callable[[Path], None]:
        """The state as it is now, copied to host memory, as a function that writes what `save` would.

        The function may run in a thread while training goes on: it touches neither the training's state nor its
        collectives. Every rank calls it. Raises ConfigError for an engine that cannot (deepspeed).
        """
        raise ConfigError(f"checkpoint.background=true: engine {self.name} cannot write while it trains; set it to false")

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Restore what `save` wrote under the same `layout`, at the same world size bit by bit. Raises CheckpointError."""

    @property
    @abstractmethod
    def layout(self) -> dict[str, Any]:
        """What has to be the same for `load` to take what `save` wrote: plain data, kept beside it. Not collective."""

    @abstractmethod
    def load_portable(self, state: TrainingState) -> None:
        """Restore weights, moments and step count that another engine, or another number of ranks, has left.

        Exact: bit by bit what was saved. Raises CheckpointError when `state` does not fit the module.
        """

    @abstractmethod
    def full_state_dict(self, names: Container[str] | None = None) -> dict[str, torch.Tensor] | None:
        """The module's whole state on the CPU at rank 0 (floating point as float32), None at the other ranks.

        names: only these.
        """

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """A new tensor: the sum of `tensor` over the ranks."""
        return self.world.sum_over_ranks(tensor)

    def close(self) -> None:
        """Release what the engine holds; the World stays open. Not collective."""
        unwrap_blocks(self._module)
        self._module = None

    def _is_last_micro_step(self) -> bool:
        return self._micro_step == self.num_micro_steps - 1

    def _check_micro_step_left(self) -> None:
        assert self._micro_step < self.num_micro_steps, f"a step has {self.num_micro_steps} micro steps: call step first"

    def _check_all_micro_steps_done(self) -> None:
        assert self._micro_step == self.num_micro_steps, (
            f"step after {self._micro_step} of {self.num_micro_steps} micro steps"
        )

    def _save_rng(self, folder: Path) -> None:
        save_tensors(rng_state(self.device), self._rng_file(folder))

    def _rng_file(self, folder: Path) -> Path:
        return folder / f"rng-{self.rank:05d}-of-{self.world_size:05d}.pt"

    def load_rng(self, folder: Path) -> None:
        """The random state of this rank as `save` of any engine left it. Not collective.

        At another world size the file is absent and each rank keeps the state it was seeded with.
        """
        path = self._rng_file(folder)
        if path.is_file():
            set_rng_state(load_tensors(path), self.device)


def set_lr(optimizer: optim.Optimizer, lr: float) -> None:
    """Set the rate of every group: `lr`, times the group's `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def skip_if_not_finite(optimizer: optim.Optimizer, grad_norm: torch.Tensor) -> None:
    """Make the next step of a fused torch optimizer a no-op if `grad_norm` is not finite.

    Uses the attribute by which torch.amp.GradScaler tells fused optimizers about an overflow. The host waits for
    `grad_norm` only where it makes the step itself, for weights in its memory.
    """
    found_inf = (~torch.isfinite(grad_norm)).to(torch.float32)
    if any(p.device.type == "cpu" for group in optimizer.param_groups for p in group["params"]):
        # the optimizer's own copy to the host is not waited for: the step would read it before it is there (torch 2.13)
        found_inf = found_inf.cpu()
    optimizer.found_inf = found_inf


def update(
    optimizer: optim.Optimizer, parameters: list[nn.Parameter], grad_norm: torch.Tensor, clip: float | None, lr: float
) -> None:
    """One update by the parameters' gradients, clipped to a norm of `clip` (None: not), which are dropped then.

    grad_norm: theirs, over all ranks; where it is not finite, weights and moments stay as they are.
    """
    if clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip, grad_norm)
    set_lr(optimizer, lr)
    skip_if_not_finite(optimizer, grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def as_float32(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU, contiguous, floating-point ones as float32."""
    copies = {}
    for name, tensor in state.items():
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        copies[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    return copies
