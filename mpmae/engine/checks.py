"""What an engine cannot do, found out before anything is built."""

from typing import Any

from mpmae.config import RunConfig
from mpmae.engine.ds_config import uses_nvme, zero_stage
from mpmae.errors import ConfigError


def check_engine(config: RunConfig, ds_config: dict[str, Any] | None, world_size: int) -> None:
    """ConfigError naming every key that the chosen engine would ignore or cannot follow, and what to use instead.

    `ds_config` is the DeepSpeed configuration, None where none was given.
    """
    engine, problems = config.engine, []
    if engine.name != "deepspeed" and ds_config is not None:
        problems.append(
            f"engine.name = {engine.name} would ignore the DeepSpeed configuration given: set engine.name=deepspeed"
        )
    if engine.name == "deepspeed" and ds_config is None:
        problems.append("engine.name = deepspeed needs a DeepSpeed configuration: add --ds-config configs/ds/zero1.json")
    if engine.name != "fsdp":
        if engine.shard_size is not None:
            problems.append(f"engine.shard_size = {engine.shard_size}: only engine.name = fsdp shards so; drop it")
        if engine.cpu_offload:
            instead = "--ds-config configs/ds/zero3_offload.json" if engine.name == "deepspeed" else "engine.name=fsdp"
            problems.append(f"engine.cpu_offload = true, which engine.name = {engine.name} does not have: use {instead}")
    elif engine.shard_size is not None and world_size % engine.shard_size:
        problems.append(
            f"engine.shard_size = {engine.shard_size} does not divide the {world_size} ranks; expected a divisor, such as "
            f"the number of ranks per node"
        )
    if engine.name != "deepspeed" and engine.nvme_path is not None:
        problems.append(f"engine.nvme_path = {engine.nvme_path}: only engine.name = deepspeed offloads to a disk; drop it")
    if engine.name == "deepspeed" and engine.compile and ds_config is not None and zero_stage(ds_config) == 3:
        problems.append(
            "engine.compile = true at ZeRO stage 3: its hooks inside the blocks change weights under the compiler; use "
            "engine.name=fsdp, or stage 1 or 2 (configs/ds/zero2.json)"
        )
    if ds_config is not None and uses_nvme(ds_config) is not None and config.checkpoint.resume != "never":
        problems.append(
            f"checkpoint.resume = {config.checkpoint.resume}: DeepSpeed does not restore what is offloaded to nvme, so "
            f"such a run cannot be resumed; use configs/ds/zero3_offload.json or engine.name=fsdp"
        )
    if engine.name == "deepspeed" and config.checkpoint.background:
        problems.append(
            "checkpoint.background = true: engine.name = deepspeed saves while the step waits; use engine.name=fsdp or ddp"
        )
    if problems:
        raise ConfigError(problems)
