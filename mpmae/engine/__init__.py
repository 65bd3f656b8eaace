"""Engines: one protocol for the training step, run by DDP or DeepSpeed."""

from typing import Any

from torch import nn

from mpmae.config import RunConfig
from mpmae.engine.base import Engine
from mpmae.engine.ds_config import load_ds_config, resolve_ds_config
from mpmae.engine.optim import LearningRate, peak_lr
from mpmae.engine.world import World, current_world, init_world, lost_peer_message
from mpmae.errors import ConfigError

__all__ = [
    "Engine",
    "LearningRate",
    "World",
    "create_engine",
    "current_world",
    "init_world",
    "load_ds_config",
    "lost_peer_message",
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
    Raises ConfigError: an engine that this version lacks, a DeepSpeed configuration that is absent, unused or wrong.
    """
    name = config.engine.name
    if name == "fsdp":
        raise ConfigError(
            "engine.name=fsdp: this version has ddp and deepspeed (ZeRO-3 in configs/ds/zero3.json shards alike)"
        )
    if name == "ddp":
        if ds_config is not None:
            raise ConfigError("engine.name=ddp would ignore the DeepSpeed configuration given: set engine.name=deepspeed")
        from mpmae.engine.ddp import DDPEngine

        return DDPEngine(config, module, world, num_micro_steps)
    if ds_config is None:
        raise ConfigError("engine.name=deepspeed without a DeepSpeed configuration: add --ds-config configs/ds/zero1.json")
    sizes = (ds_config.get("train_micro_batch_size_per_gpu"), ds_config.get("gradient_accumulation_steps"))
    assert sizes == (micro_batch_size, num_micro_steps), "ds_config is not resolved, or for other batch sizes"
    from mpmae.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config, module, world, ds_config, num_micro_steps)
