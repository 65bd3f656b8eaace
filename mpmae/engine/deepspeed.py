"""DeepSpeed as an Engine: ZeRO stage 0 to 3. The only module that imports deepspeed.

Where DeepSpeed 0.19.8 needs care:
- Importing it is slow and it logs; both happen when an engine is made, not when this module is imported.
- On a CPU it would compile a shared-memory collective (20 s, and a stale lock hangs without a word): switched off.
- It averages gradients over ranks and divides by the accumulation steps: `backward` multiplies the loss by the world size
  and turns the division off, so that gradients are sums of shares.
- Stage 0 knows no gradient norm and skips no bad step: both are done here. Stages 1-3 skip by themselves and then report
  an infinite norm, also for a NaN.
- What is offloaded to nvme is not restored by its load: refused. float32 weights go to nvme as bfloat16: refused, too.
- Its torch_autocast section would reduce the gradients of Linear and Conv in bf16 whatever communication_data_type says,
  and an autocast around its forward is switched off by it. The autocast of bf16 runs is therefore put inside, around the
  module's own forward. At stages 1-3 the weights themselves are bf16 too (masters are float32), at stage 0 float32.
"""

import contextlib
import functools
import io
import logging
import os
import socket
import warnings
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mpmae.config import RunConfig
from mpmae.engine.base import Engine, as_float32, set_lr, skip_if_not_finite
from mpmae.engine.ds_config import uses_nvme, without_nvme_path, zero_stage
from mpmae.engine.files import save_tensors
from mpmae.engine.optim import build_optimizer
from mpmae.engine.portable import (
    MOMENTS,
    WEIGHT,
    TrainingState,
    adam_state,
    check_fits,
    constants_of,
    load_state,
    parameter_names,
)
from mpmae.engine.world import World, hold_process_group
from mpmae.engine.wrap import wrap_blocks
from mpmae.errors import CheckpointError, ConfigError

_TAG = "deepspeed"
_LOG = logging.getLogger(__name__)


class DeepSpeedEngine(Engine):
    """A deepspeed engine built from a resolved DeepSpeed configuration (`resolve_ds_config`).

    The module's outputs are tensors, or tuples (named ones too), lists and dicts of them: DeepSpeed finds the tensors of
    nothing else, and would then accumulate wrong gradients in bf16. `forward` refuses others with a TypeError.
    `load` takes checkpoints of the same world size, stage and precision; others come in by `load_portable`.
    """

    name = "deepspeed"

    def __init__(self, config: RunConfig, module: nn.Module, world: World, ds_config: dict[str, Any], num_micro_steps: int):
        super().__init__(module, world, num_micro_steps)
        deepspeed = _import_deepspeed()
        hold_process_group("deepspeed")
        self.zero_stage = zero_stage(ds_config)
        self._layout = {
            "engine": self.name,
            "world_size": world.world_size,
            "precision": config.train.precision,
            "zero_optimization": without_nvme_path(ds_config.get("zero_optimization") or {}),
        }
        self._nvme_folder = uses_nvme(ds_config)
        if self._nvme_folder is not None:
            _check_nvme(self._nvme_folder)
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        wrap_blocks(module, config.engine)
        if config.train.precision == "bf16":
            module.forward = _under_autocast(module.forward, world.device.type)
        module.to(world.device)
        optimizer = build_optimizer(module, config.optim)
        self._parameter_names = parameter_names(module, optimizer)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):  # memory reports that no setting turns off; warnings are logged elsewhere
            self._ds, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=ds_config, dist_init_required=False
            )
        _LOG.debug("deepspeed.initialize printed:\n%s", printed.getvalue())
        self._writer = _install_writer(self._ds)
        self._output_is_checked = False

    @property
    def num_state_shards(self) -> int:
        """See Engine."""
        return self.world_size if self.zero_stage else 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See Engine. Raises TypeError when the module returns something in which DeepSpeed finds no tensors."""
        output = self._ds(*args, **kwargs)
        if not self._output_is_checked:
            _check_output(output, type(self._module).__name__)
            self._output_is_checked = torch.is_grad_enabled()  # an evaluation may return something else than training
        return output

    def backward(self, loss: torch.Tensor) -> None:
        """See Engine."""
        self._check_micro_step_left()
        self._ds.backward(loss * self.world_size, scale_wrt_gas=False)
        if not self._is_last_micro_step():
            self._ds.step()  # between accumulated micro steps it only counts
        self._micro_step += 1

    def step(self, lr: float) -> torch.Tensor:
        """See Engine."""
        self._check_all_micro_steps_done()
        set_lr(self._ds.optimizer, lr)
        if self.zero_stage == 0:
            grad_norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
            skip_if_not_finite(self._ds.optimizer, grad_norm)
        self._ds.step()
        if self.zero_stage > 0:
            grad_norm = torch.as_tensor(self._ds.get_global_grad_norm(), device=self.device)
        self._micro_step = 0
        return grad_norm.detach().float()

    def save(self, folder: Path) -> None:
        """See Engine. Each rank writes its ZeRO partition and its random state."""
        names = {"parameter_names": self._parameter_names}
        self._ds.save_checkpoint(str(folder), tag=_TAG, client_state=names, save_latest=False)
        self._writer.raise_error()
        self._save_rng(folder)

    def load(self, folder: Path) -> None:
        """See Engine. What is offloaded to nvme would stay as it is, so that is refused."""
        if self._nvme_folder is not None:
            raise CheckpointError(
                "a run that offloads to nvme cannot be resumed: DeepSpeed does not restore what is there; start a new run "
                "from model.safetensors"
            )
        if not (folder / _TAG).is_dir():
            raise CheckpointError(f"{folder / _TAG} is absent: the checkpoint is of another engine, or incomplete")
        path, _ = self._ds.load_checkpoint(str(folder), tag=_TAG)
        if path is None:
            raise CheckpointError(f"deepspeed found nothing to load in {folder / _TAG}; continue from an older checkpoint")
        self.load_rng(folder)

    @property
    def layout(self) -> dict[str, Any]:
        """See Engine. Partitions fit one world size, stage and precision, and ZeRO-3 cuts by its settings."""
        return self._layout

    @torch.no_grad()
    def load_portable(self, state: TrainingState) -> None:
        """See Engine. One parameter at a time: every rank reads it and keeps its piece."""
        if self.zero_stage == 0:
            load_state(state, self._module, self._ds.optimizer)
            return
        check_fits(state, self._module)
        set_master = _set_master_whole if self.zero_stage < 3 else _set_master_piece
        _set_up_moments(self._ds.optimizer, self.zero_stage, state.num_updates)
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad:
                parts = state.read(name)
                _set_whole(parameter, parts[WEIGHT])
                set_master(parameter, parts)
        for tensor, value in constants_of(state, self._module):
            _set_whole(tensor, value)

    def full_state_dict(self, names: Container[str] | None = None) -> dict[str, torch.Tensor] | None:
        """See Engine. Gathers one parameter at a time, from the float32 masters where there are any."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        state = {}
        for name, tensor in self._module.state_dict(keep_vars=True).items():
            if names is not None and name not in names:
                continue
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                whole = safe_get_full_fp32_param(tensor)
                whole = tensor if whole is None else whole  # stage 0
                state |= as_float32({name: whole}) if self.rank == 0 else {}
            else:
                with GatheredParameters([tensor] if hasattr(tensor, "ds_id") else []):
                    state |= as_float32({name: tensor}) if self.rank == 0 else {}
        return state if self.rank == 0 else None

    def close(self) -> None:
        """See Engine."""
        self._ds.destroy()
        self._module.__dict__.pop("forward", None)
        super().close()


def _set_up_moments(zero: Any, stage: int, num_updates: int) -> None:
    """AdamW's state of the flat masters, its step count set, and where at stages 1 and 2 a parameter's piece of it lies."""
    if getattr(zero, "swap_optimizer", False):
        raise CheckpointError(
            "moments on NVMe cannot be filled from a checkpoint of another engine, stage or number of ranks: continue with "
            "configs/ds/zero3_offload.json, or as the checkpoint was written"
        )
    adam = zero.optimizer
    groups = zero.fp32_partitioned_groups_flat if stage == 3 else [p for g in adam.param_groups for p in g["params"]]
    for flat in groups:
        adam_state(adam, flat, num_updates)
    if stage < 3:
        zero._lazy_init_hp_params_optimizer_state()  # the first step would do it


def _set_whole(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Set a weight as the module has it, in its own precision; with ZeRO-3 every rank keeps its piece."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([tensor] if hasattr(tensor, "ds_id") else [], modifier_rank=0):
        tensor.data.copy_(value)


def _set_master_whole(parameter: torch.Tensor, parts: dict[str, torch.Tensor]) -> None:
    """Set this rank's piece of a parameter's float32 master and moments: stages 1 and 2."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    safe_set_full_fp32_param(parameter, parts[WEIGHT])
    for moment in MOMENTS:
        safe_set_full_optimizer_state(parameter, parts[moment], moment)


def _set_master_piece(parameter: torch.Tensor, parts: dict[str, torch.Tensor]) -> None:
    """The same at stage 3, whose functions for whole tensors fail where the ranks do not divide one (deepspeed 0.19.8)."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    length, rank = parameter.ds_tensor.numel(), dist.get_rank(parameter.ds_process_group)

    def piece(value: torch.Tensor) -> torch.Tensor:
        own = value.flatten()[rank * length : (rank + 1) * length]
        return nn.functional.pad(own, (0, length - own.numel()))

    safe_set_local_fp32_param(parameter, piece(parts[WEIGHT]))
    for moment in MOMENTS:
        safe_set_local_optimizer_state(parameter, piece(parts[moment]), moment)


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for one and warns on every rank that there is none
    # deepspeed 0.19.8 calls collectives by names that torch 2.13 deprecates; nothing here can act on that
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.")
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            f"engine.name=deepspeed, but deepspeed cannot be imported ({error}): pip install 'mpmae[deepspeed]', "
            f"or run with engine.name=ddp"
        ) from error
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _check_nvme(folder: Path) -> None:
    """ConfigError where DeepSpeed could not reach the disk: it would say so in the middle of an import, or of a step."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    problems = []
    if not AsyncIOBuilder().is_compatible(verbose=False):
        problems.append(
            "offloading to nvme needs libaio with its headers, and neither is found on this node: install libaio-dev "
            "(libaio-devel), name them in CFLAGS and LDFLAGS, or offload to host memory (configs/ds/zero3_offload.json)"
        )
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        problems.append(
            f"engine.nvme_path = {folder} is no folder that this process can write to, on {socket.gethostname()}"
        )
    if problems:
        raise ConfigError(problems)


def _check_output(output: Any, module_name: str) -> None:
    """TypeError for an object that DeepSpeed does not look into: its hooks would miss the tensors in it."""
    if isinstance(output, dict):
        parts = output.values()
    elif isinstance(output, (tuple, list)):
        parts = output
    elif output is None or isinstance(output, (torch.Tensor, bool, int, float, str)):
        return
    else:
        raise TypeError(
            f"{module_name}.forward returned a {type(output).__name__}, in which DeepSpeed finds no tensors, so that its "
            f"gradients would be wrong; return tensors in tuples (a NamedTuple), lists or dicts"
        )
    for part in parts:
        _check_output(part, module_name)


def _under_autocast(forward: Any, device_type: str) -> Any:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device_type, torch.bfloat16):
            return forward(*args, **kwargs)

    return wrapped


def _install_writer(ds: Any) -> Any:
    """Make `ds` write files by `save_tensors`, and keep a failed write from leaving the other ranks in a barrier.

    DeepSpeed's save has collectives after its writes, so an OSError is kept until they are over.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class Writer(TorchCheckpointEngine):
        error: OSError | None = None

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            try:
                Path(path).mkdir(parents=True, exist_ok=exist_ok)
            except OSError as error:
                self.error = error

        def save(self, state_dict: Any, path: str) -> None:
            try:
                save_tensors(state_dict, path)
            except OSError as error:
                self.error = error

        def raise_error(self) -> None:
            error, self.error = self.error, None
            if error is not None:
                raise error

    ds.checkpoint_engine = Writer()
    ds._copy_recovery_script = lambda save_path: None  # scripts of DeepSpeed: model.safetensors makes them unnecessary
    return ds.checkpoint_engine
