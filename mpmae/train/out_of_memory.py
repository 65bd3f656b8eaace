"""What to do when memory runs out, computed from the run at hand."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from mpmae.config import RunConfig
from mpmae.engine import World
from mpmae.errors import TrainingError
from mpmae.loader import BatchPlan
from mpmae.train.plan import state_bytes_per_rank

_CPU_WORDS = ("defaultcpuallocator", "can't allocate memory", "not enough memory")


@contextlib.contextmanager
def advice_on_out_of_memory(
    config: RunConfig, batch: BatchPlan, model: nn.Module, stage: int | None, world: World
) -> Iterator[None]:
    """Turn an allocator's error into a TrainingError that says what would fit; stage: ZeRO's, None for another engine."""
    num_parameters = sum(p.numel() for p in model.parameters())  # before ZeRO-3 takes them apart
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(_advice(error, config, batch, num_parameters, stage, world)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _CPU_WORDS)


def _advice(
    error: BaseException, config: RunConfig, batch: BatchPlan, num_parameters: int, stage: int | None, world: World
) -> list[str]:
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    where = f"rank {world.rank} ({world.device}): out of memory at {batch.micro_batch_size} samples a micro step"
    advice = [f"{where}: {first_line}"]
    if smaller := _smaller_micro_batch(batch):
        num_micro_steps = batch.global_batch_size // (smaller * batch.world_size)
        advice.append(
            f"train.micro_batch_size={smaller} holds fewer samples at a time, in {num_micro_steps} micro steps a step"
        )
    if not config.engine.activation_checkpointing:
        advice.append("engine.activation_checkpointing=true keeps fewer activations, and computes them again")
    advice += _sharding(config, num_parameters, stage, batch.world_size)
    return advice


def _smaller_micro_batch(batch: BatchPlan) -> int | None:
    """The largest divisor of a rank's part of the global batch that is at most half of the present size."""
    per_rank = batch.micro_batch_size * batch.num_micro_steps
    return max((size for size in range(1, batch.micro_batch_size // 2 + 1) if per_rank % size == 0), default=None)


def _sharding(config: RunConfig, num_parameters: int, stage: int | None, world_size: int) -> list[str]:
    """What weights, gradients and moments take, and by which engine they would take less."""
    is_sharded = config.engine.name == "fsdp"
    now = 3 if is_sharded else (stage or 0)
    sizes = [state_bytes_per_rank(num_parameters, world_size, each) / 1e6 for each in range(4)]
    table = ", ".join(f"{each}: {size:,.1f} MB" for each, size in enumerate(sizes))
    text = f"weights, gradients and moments take {sizes[now]:,.1f} MB of a rank (by ZeRO stage {table})"
    if now < 3 and world_size > 1:
        return [f"{text}; --ds-config configs/ds/zero{now + 1}.json, or engine.name=fsdp as stage 3, takes less"]
    if is_sharded and not config.engine.cpu_offload:
        return [f"{text}; engine.cpu_offload=true keeps them in host memory"]
    more = "more ranks share them, or --ds-config configs/ds/zero3_offload.json keeps them in host memory"
    return [f"{text}; {more}"]
