"""Data parallelism of plain torch, and one process."""

from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mpmae.config import RunConfig
from mpmae.engine.base import Engine, as_float32, update
from mpmae.engine.files import copied_to_host, load_tensors, rng_state, save_tensors
from mpmae.engine.optim import build_optimizer
from mpmae.engine.portable import TrainingState, load_state, parameter_names
from mpmae.engine.world import World
from mpmae.engine.wrap import wrap_blocks
from mpmae.errors import CheckpointError

_STATE_FILE = "ddp.pt"


class DDPEngine(Engine):
    """DistributedDataParallel with float32 weights; bf16 by autocast. One rank runs the module without the wrapper.

    Checkpoints load at any world size.
    """

    name = "ddp"

    def __init__(self, config: RunConfig, module: nn.Module, world: World, num_micro_steps: int):
        super().__init__(module.to(world.device), world, num_micro_steps)
        wrap_blocks(module, config.engine)
        self._autocast_dtype = torch.bfloat16 if config.train.precision == "bf16" else None
        self._clip_grad_norm = config.optim.clip_grad_norm
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._optimizer = build_optimizer(module, config.optim)
        self._ddp = None
        if world.world_size > 1:
            self._ddp = DistributedDataParallel(module, gradient_as_bucket_view=True)
            self._ddp.broadcast_buffers = False  # no module here changes its buffers, so the first broadcast is enough

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See Engine."""
        call = self._module
        if self._ddp is not None and torch.is_grad_enabled():
            call = self._ddp
            # what DistributedDataParallel.no_sync toggles; it has to hold over forward and backward of a micro step
            call.require_backward_grad_sync = self._is_last_micro_step()
        with torch.autocast(self.device.type, self._autocast_dtype, enabled=self._autocast_dtype is not None):
            return call(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """See Engine. DDP averages over ranks: the factor makes it a sum, exactly so where it is a power of two."""
        self._check_micro_step_left()
        (loss * self.world_size).backward()
        self._micro_step += 1

    def step(self, lr: float) -> torch.Tensor:
        """See Engine."""
        self._check_all_micro_steps_done()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        grad_norm = nn.utils.get_total_norm(gradients)
        update(self._optimizer, self._parameters, grad_norm, self._clip_grad_norm, lr)
        self._micro_step = 0
        return grad_norm.detach().float()

    def save(self, folder: Path) -> None:
        """See Engine. Rank 0 writes the state, each rank its random state."""
        folder.mkdir(parents=True, exist_ok=True)
        self._save_rng(folder)
        if self.rank == 0:
            save_tensors(self._state(), folder / _STATE_FILE)

    def deferred_save(self) -> Callable[[Path], None]:
        """See Engine."""
        rng = rng_state(self.device)
        state = copied_to_host(self._state()) if self.rank == 0 else None

        def write(folder: Path) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            save_tensors(rng, self._rng_file(folder))
            if state is not None:
                save_tensors(state, folder / _STATE_FILE)

        return write

    def _state(self) -> dict[str, Any]:
        return {
            "module": self._module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "parameter_names": parameter_names(self._module, self._optimizer),
        }

    def load(self, folder: Path) -> None:
        """See Engine."""
        state = load_tensors(folder / _STATE_FILE)
        try:
            self._module.load_state_dict(state["module"])
            self._optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{folder / _STATE_FILE} does not fit the model: {error}") from error
        self.load_rng(folder)

    @property
    def layout(self) -> dict[str, Any]:
        """See Engine. Any number of ranks loads it."""
        return {"engine": self.name}

    def load_portable(self, state: TrainingState) -> None:
        """See Engine."""
        load_state(state, self._module, self._optimizer)

    def full_state_dict(self, names: Container[str] | None = None) -> dict[str, torch.Tensor] | None:
        """See Engine."""
        state = self._module.state_dict()
        return as_float32({n: state[n] for n in state if names is None or n in names}) if self.rank == 0 else None

    def close(self) -> None:
        """See Engine. What reduces the gradients holds the process group, and must not be the last to do so."""
        self._ddp = None
        super().close()
