"""Engines: one protocol for the training step, run by DDP, FSDP2 or DeepSpeed."""

from typing import Any

from torch import nn

from mpmae.config import RunConfig
from mpmae.engine.base import Engine
from mpmae.engine.checks import check_engine
from mpmae.engine.ds_config import load_ds_config, resolve_ds_config
from mpmae.engine.optim import LearningRate, peak_lr
from mpmae.engine.world import World, current_world, init_world, is_lost_peer

__all__ = [
    "Engine",
    "LearningRate",
    "World",
    "check_engine",
    "create_engine",
    "current_world",
    "init_world",
    "is_lost_peer",
    "load_ds_config",
    "peak_lr",
    "resolve_ds_config",
]


def create_engine(
    config: RunConfig,
    module: nn.Module,
    world: World,
    ds_config: dict[str, Any] | None,
    num_micro_steps: int,
    micro_batch_size: int,
) -> Engine:
    """The engine that `config.engine.name` asks for, around `module` (moved to the world's device), with its optimizer.

    `ds_config` is for deepspeed only: what `resolve_ds_config` made for these batch sizes. All ranks start from rank 0's
    weights.
    Raises ConfigError as `check_engine` does, and for a DeepSpeed configuration that is wrong.
    """
    name = config.engine.name
    check_engine(config, ds_config, world.world_size)
    if name == "ddp":
        from mpmae.engine.ddp import DDPEngine

        return DDPEngine(config, module, world, num_micro_steps)
    if name == "fsdp":
        from mpmae.engine.fsdp import FSDPEngine

        return FSDPEngine(config, module, world, num_micro_steps)
    sizes = (ds_config.get("train_micro_batch_size_per_gpu"), ds_config.get("gradient_accumulation_steps"))
    assert sizes == (micro_batch_size, num_micro_steps), "ds_config is not resolved, or for other batch sizes"
    from mpmae.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config, module, world, ds_config, num_micro_steps)
