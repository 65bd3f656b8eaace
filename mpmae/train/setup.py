"""What a run needs before its first step, checked as a whole: `pretrain` and `--dry-run` refuse the same things."""

from dataclasses import dataclass
from typing import Any

import torch

from mpmae.config import RunConfig
from mpmae.config_model import MultiMAESection
from mpmae.domains import modalities_of
from mpmae.engine import check_engine, load_ds_config, resolve_ds_config
from mpmae.errors import ConfigError
from mpmae.loader import ShardReader
from mpmae.models import MPMAE, MultiMAE, create_model
from mpmae.shard_format import Manifest
from mpmae.train.data import Loader, open_folder, open_loader
from mpmae.train.plan import RunPlan, make_plan


@dataclass(frozen=True)
class Setup:
    """The checked parts of a run.

    training: augmented training batches. reference: the same split without augmentation, for class frequencies.
    validation: the validation split. ds_config: the resolved DeepSpeed configuration, None for another engine.
    """

    manifest: Manifest
    plan: RunPlan
    ds_config: dict[str, Any] | None
    training: Loader
    reference: Loader
    validation: Loader


def set_up(config: RunConfig, world_size: int) -> Setup:
    """Everything but model and engine. Raises ConfigError or ShardError for what does not fit; writes nothing."""
    folder = open_folder(config)
    manifest = folder.manifest()
    plan = make_plan(config, manifest, world_size)
    train, val = (ShardReader(folder, split, manifest) for split in (config.data.train_split, config.data.val_split))
    splits = ((train, True), (train, False), (val, False))
    loaders = [open_loader(config, reader, training=training) for reader, training in splits]
    if isinstance(config.model, MultiMAESection):
        for reader in (train, val):
            reader.require_any(modalities_of(config.model.domains_in))
    return Setup(
        manifest,
        plan,
        _resolved_ds_config(config, plan),
        *loaders,
    )


def build_model(config: RunConfig, manifest: Manifest) -> MPMAE | MultiMAE:
    """The model that the configuration describes, for the bands that the shard set has; seeded initial weights."""
    torch.manual_seed(config.train.seed)
    settings = config.model.model_dump()
    available = {entry.name: entry.bands for entry in manifest.pixels}
    return create_model(settings.pop("name"), **settings, bands_available=available)


def _resolved_ds_config(config: RunConfig, plan: RunPlan) -> dict[str, Any] | None:
    """The DeepSpeed configuration with nothing left open; None for another engine."""
    path, batch = config.engine.ds_config, plan.batch
    if config.checkpoint.background and config.engine.name == "deepspeed":
        raise ConfigError(
            "checkpoint.background = true: deepspeed's save is itself collective, so it cannot run beside a step; set it to "
            "false, or engine.name to ddp or fsdp"
        )
    raw = load_ds_config(path) if path else None
    check_engine(config, raw, batch.world_size)
    if raw is None:
        return None
    return resolve_ds_config(raw, config, batch.world_size, batch.micro_batch_size, batch.num_micro_steps, path)
