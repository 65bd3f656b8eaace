"""What an engine cannot do, found out before anything is built."""

from typing import Any

from mpmae.config import RunConfig
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
    if problems:
        raise ConfigError(problems)
