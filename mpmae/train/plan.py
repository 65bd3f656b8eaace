"""The arithmetic of a run, settled before anything is built: batches, steps, rates, memory per rank."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn

from mpmae.config import RunConfig
from mpmae.engine.optim import LearningRate, peak_lr
from mpmae.loader import BatchPlan, ExactOrder, TrainOrder, WindowOrder, plan_batches, possible_world_sizes
from mpmae.shard_format import Manifest
from mpmae.train.data import num_bytes
from mpmae.train.probe_set import ProbeSet

_MAX_SIZES_SHOWN = 12


@dataclass(frozen=True)
class RunPlan:
    """What a run will do."""

    batch: BatchPlan
    order: TrainOrder
    total_steps: int
    warmup_steps: int
    learning_rate: LearningRate
    notes: tuple[str, ...]


def make_order(config: RunConfig, manifest: Manifest) -> TrainOrder:
    """The order of the training split that `config` asks for; ConfigError when the split is too small for a batch."""
    shard_sizes = tuple(shard.num_samples for shard in manifest.shards(config.data.train_split))
    if config.data.order == "window":
        order = WindowOrder(shard_sizes, config.data.window_shards)
    else:
        order = ExactOrder(sum(shard_sizes))
    return TrainOrder(order, config.train.global_batch_size, config.train.seed)


def make_plan(config: RunConfig, manifest: Manifest, world_size: int) -> RunPlan:
    """The plan of `config` on a shard set; ConfigError when sizes do not divide or the split is too small."""
    train = config.train
    batch = plan_batches(train.global_batch_size, train.micro_batch_size, world_size)
    order = make_order(config, manifest)
    total_steps = train.epochs * order.steps_per_epoch
    if train.max_steps is not None:
        total_steps = min(total_steps, train.max_steps)
    warmup_steps = config.optim.warmup_steps
    if warmup_steps is None:
        warmup_steps = round(config.optim.warmup_epochs * order.steps_per_epoch)
    notes = []
    if warmup_steps >= total_steps:
        notes.append(f"the warm-up of {warmup_steps} steps never ends in a run of {total_steps}; set optim.warmup_steps")
    if train.max_steps is not None and total_steps < train.max_steps:
        notes.append(f"train.epochs = {train.epochs} ends the run before train.max_steps = {train.max_steps}")
    dropped = order.num_samples - order.steps_per_epoch * train.global_batch_size
    if dropped:
        notes.append(f"{dropped} of {order.num_samples} samples sit out each epoch (others every time): no whole batch left")
    notes += _cache_notes(config, manifest)
    learning_rate = LearningRate(peak_lr(config), config.optim.min_lr, warmup_steps, total_steps)
    return RunPlan(batch, order, total_steps, warmup_steps, learning_rate, tuple(notes))


def _cache_notes(config: RunConfig, manifest: Manifest) -> list[str]:
    """What to know when a window of remote shards and the one fetched meanwhile do not fit their cache together."""
    if config.data.order != "window" or isinstance(config.data.shards, Path):
        return []
    from mpmae.loader.shard_cache import DEFAULT_MAX_BYTES  # POSIX only, and local sets need none of it

    given = num_bytes(config.data.cache_size_gb)
    limit = DEFAULT_MAX_BYTES if given is None else given
    sizes = sorted((shard.num_bytes for shard in manifest.shards(config.data.train_split)), reverse=True)
    needed = sum(sizes[: 2 * config.data.window_shards])
    if needed <= limit:
        return []
    return [
        f"two windows of {config.data.window_shards} shards have up to {needed / 1e9:.3g} GB, their cache may hold "
        f"{limit / 1e9:.3g}: steps wait for downloads; lower data.window_shards or raise data.cache_size_gb"
    ]


def state_bytes_per_rank(num_parameters: int, world_size: int, stage: int) -> int:
    """Bytes of fp32 weights, gradients and AdamW moments on one rank at a ZeRO stage (0: all on every rank).

    Source: Rajbhandari et al., "ZeRO", SC 2020, section 3, with 4-byte weights and gradients and 8 bytes of moments.
    Activations come on top and depend on the micro batch.
    """
    weights, gradients, moments = (
        size * num_parameters / (world_size if stage >= cut else 1) for size, cut in ((4, 3), (4, 2), (8, 1))
    )
    return round(weights + gradients + moments)


def _could_run_on(config: RunConfig) -> str:
    sizes = possible_world_sizes(config.train.global_batch_size, config.train.micro_batch_size)
    shown = [str(size) for size in sizes]
    if len(shown) > _MAX_SIZES_SHOWN:
        shown[_MAX_SIZES_SHOWN - 1 : -1] = ["..."]
    return ", ".join(shown)


def show_plan(
    console: Console, config: RunConfig, plan: RunPlan, manifest: Manifest, model: nn.Module, probe_set: ProbeSet | None
) -> None:
    """Print the plan as a table."""
    batch, order = plan.batch, plan.order
    table = Table(title="Run plan", show_header=False, title_justify="left", box=None, padding=(0, 2))
    groups: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        groups[name.split(".")[0]] = groups.get(name.split(".")[0], 0) + parameter.numel()
    total = sum(groups.values())
    parts = ", ".join(f"{name} {count:,}" for name, count in sorted(groups.items(), key=lambda item: -item[1])[:4])
    table.add_row("model", f"{config.model.name}, {config.model.img_size} px, patch {config.model.patch_size}")
    table.add_row("parameters", f"{total:,} ({parts})")
    train_shards = manifest.shards(config.data.train_split)
    table.add_row(
        "data",
        f"{config.data.model_dump()['shards']}: {order.num_samples:,} training samples in {len(train_shards)} shards, "
        f"{sum(s.num_bytes for s in train_shards) / 1e6:,.1f} MB",
    )
    windowed = f"windows of {config.data.window_shards} shards; every rank reads from those of the window"
    table.add_row("order", windowed if config.data.order == "window" else "exact; every rank reads from all shards")
    table.add_row(
        "batch",
        f"{batch.global_batch_size} = {batch.micro_batch_size} per micro step x {batch.num_micro_steps} micro steps "
        f"x {batch.world_size} ranks",
    )
    table.add_row("could run on", f"{_could_run_on(config)} ranks, with the same global batches")
    table.add_row("steps", f"{plan.total_steps:,} ({order.steps_per_epoch:,} an epoch), warm-up {plan.warmup_steps:,}")
    table.add_row("peak lr", f"{plan.learning_rate.peak:.3g}")
    table.add_row("engine", f"{config.engine.name}, {config.train.precision}, {batch.world_size} ranks")
    by_stage = ", ".join(f"{s}: {state_bytes_per_rank(total, batch.world_size, s) / 1e6:,.0f} MB" for s in range(4))
    table.add_row("weights, gradients, AdamW per rank", f"by ZeRO stage {by_stage} (fp32; activations not counted)")
    if probe_set is not None:
        table.add_row("probe", f"{probe_set}; every {config.probe.every_steps:,} steps")
        table.add_row("probe's images", probe_set.preparation())
    table.add_row("writes to", str(config.run.dir))
    console.print(table)
    for note in plan.notes:
        console.print(f"[yellow]note:[/yellow] {note}")
