"""A pretraining run from configuration to last checkpoint."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from mpmae.config import RunConfig
from mpmae.engine import Engine, World, create_engine, init_world, load_ds_config
from mpmae.engine.ds_config import resolve_ds_config, zero_stage
from mpmae.errors import ConfigError, TrainingError
from mpmae.loader import Augmentation, Batch, CpuLoader, ShardReader
from mpmae.masking import draw_visible
from mpmae.models import MPMAE, create_model
from mpmae.shard_format import Manifest, load_manifest
from mpmae.train.checkpoint import Checkpoints, load_engine, load_meta, write_engine
from mpmae.train.compatibility import check_compatible, checkpoint_meta
from mpmae.train.demo_data import ensure_demo_shards
from mpmae.train.meter import Meter
from mpmae.train.plan import RunPlan, make_plan, show_plan
from mpmae.train.progress import ProgressLine, make_console
from mpmae.train.record import write_run_json
from mpmae.train.track import open_trackers
from mpmae.train.validate import Validator


def pretrain(config: RunConfig) -> None:
    """Run (or continue) a pretraining; every rank calls this once.

    Raises ConfigError, ShardError or CheckpointError before the first step when something does not fit, TrainingError when
    the loss is no longer finite.
    """
    world = init_world(config.engine.name)
    try:
        with closing(Run(config, world)) as run:
            run.train()
    finally:
        world.close()


def dry_run(config: RunConfig) -> None:
    """Print what `pretrain` would do for the world size of the environment; writes nothing but the demo shards."""
    ensure_demo_shards(config.data.shards)
    manifest = load_manifest(config.data.shards)
    plan = make_plan(config, manifest, int(os.environ.get("WORLD_SIZE", "1")))
    ds_config = resolved_ds_config(config, plan)
    console = make_console(quiet=os.environ.get("RANK", "0") != "0")
    show_plan(console, config, plan, manifest, build_model(config, manifest))
    if ds_config:
        console.print_json(data=ds_config)


def resolved_ds_config(config: RunConfig, plan: RunPlan) -> dict[str, Any] | None:
    """The DeepSpeed configuration with nothing left open; None for another engine. ConfigError where it does not fit."""
    path = config.engine.ds_config
    if config.engine.name != "deepspeed":
        if path:
            raise ConfigError(f"engine.ds_config = {path}, but engine.name = {config.engine.name} would ignore it; drop one")
        return None
    if path is None:
        raise ConfigError("engine.name = deepspeed needs a DeepSpeed configuration: --ds-config configs/ds/zero2.json")
    batch = plan.batch
    raw = load_ds_config(path)
    return resolve_ds_config(raw, config, batch.world_size, batch.micro_batch_size, batch.num_micro_steps, path)


def build_model(config: RunConfig, manifest: Manifest) -> MPMAE:
    """The model that the configuration describes, for the bands that the shard set has; seeded initial weights."""
    torch.manual_seed(config.train.seed)
    settings = config.model.model_dump()
    available = {entry.name: entry.bands for entry in manifest.pixels}
    return create_model(settings.pop("name"), **settings, bands_available=available)


class Run:
    """Everything a run holds. The step itself is `_step`."""

    def __init__(self, config: RunConfig, world: World):
        self.config, self.world = config, world
        self.console = make_console(quiet=world.rank != 0)
        if world.rank == 0:
            ensure_demo_shards(config.data.shards)
        world.barrier()
        self.manifest = load_manifest(config.data.shards)
        self.plan: RunPlan = make_plan(config, self.manifest, world.world_size)
        self.checkpoints = Checkpoints(config.run.dir / "checkpoints", config.checkpoint.keep_last)
        self.ds_config = resolved_ds_config(config, self.plan)
        start = self._find_start()
        model = build_model(config, self.manifest)
        num_parameters = sum(p.numel() for p in model.parameters())  # before ZeRO-3 takes them apart
        show_plan(self.console, config, self.plan, self.manifest, model)
        batch = self.plan.batch
        self.engine: Engine = create_engine(
            config, model, world, self.ds_config, batch.num_micro_steps, batch.micro_batch_size
        )
        self.model: MPMAE = self.engine.module
        self.start_step = 0
        if start:
            load_engine(self.engine, start)
            self.start_step = load_meta(start)["step"]
            self.console.print(f"continuing from {start} at step {self.start_step}")
        train, val = config.data.train_split, config.data.val_split
        self.loader = self._loader(train, Augmentation(hflip=config.data.hflip, vflip=config.data.vflip))
        plain = Augmentation.none()
        self.validator = Validator(self.engine, self._loader(val, plain), self._loader(train, plain), config)
        if world.rank == 0:
            config.run.dir.mkdir(parents=True, exist_ok=True)
            facts = {
                "world_size": world.world_size,
                "num_parameters": num_parameters,
                "total_steps": self.plan.total_steps,
                "steps_per_epoch": self.plan.order.steps_per_epoch,
                "shards_fingerprint": self.manifest.fingerprint,
            }
            write_run_json(config, self.ds_config, facts, start)
        self.trackers = open_trackers(config, self.start_step) if world.rank == 0 else None

    def _loader(self, split: str, augmentation: Augmentation) -> CpuLoader:
        data, model = self.config.data, self.config.model
        return CpuLoader(
            ShardReader(data.shards, split, self.manifest),
            tuple(dict.fromkeys(("sentinel2", *model.modalities_out))),
            model.img_size,
            seed=self.config.train.seed,
            augmentation=augmentation,
            num_workers=data.num_workers,
            prefetch=data.prefetch,
        )

    def _find_start(self) -> Path | None:
        """The checkpoint to continue from, checked against this run; ConfigError when the folder holds another run."""
        resume, folder = self.config.checkpoint.resume, self.config.run.dir
        if resume == "never":
            if folder.exists() and any(folder.iterdir()):
                raise ConfigError(
                    f"run.dir = {folder} is not empty; pass --resume auto to continue the run in it, or another run.dir"
                )
            return None
        start = Path(resume)
        if resume == "auto":
            start = self.world.broadcast_object(self.checkpoints.latest() if self.world.rank == 0 else None)
        if start:
            stage = zero_stage(self.ds_config) if self.ds_config else None
            known = (self.config, self.manifest.fingerprint, self.world.world_size, stage)
            for note in check_compatible(load_meta(start), *known):
                self.console.print(f"[yellow]note:[/yellow] {note}")
        return start

    def train(self) -> None:
        """All remaining steps, then the last checkpoint and validation."""
        total = self.plan.total_steps
        if self.start_step >= total:
            self.console.print(f"the run is complete: {self.start_step} of {total} steps are done")
            return
        meter = Meter(self.engine, self.model.modalities_out, self.plan.batch.global_batch_size)
        progress = ProgressLine(self.console, total, self.start_step, self.world.world_size)
        with closing(progress), closing(self._micro_batches()) as micro_batches:
            for step in range(self.start_step, total):
                self._step(step, micro_batches, meter)
                self._publish(meter, progress, everything=step + 1 == total)
                if self._due(step + 1, self.config.train.validate_every_steps):
                    self._validate(step + 1, meter)
                if self._due(step + 1, self.config.checkpoint.every_steps):
                    self._publish(meter, progress, everything=True)
                    self._save(step + 1, meter)

    def _micro_batches(self) -> Iterator[tuple[int, Batch]]:
        return self.loader.training(self.plan.order, self.plan.batch, self.world.rank, self.start_step)

    def _step(self, step: int, micro_batches: Iterator[tuple[int, Batch]], meter: Meter) -> None:
        """One optimizer step over one global batch."""
        self.model.train()
        for _ in range(self.plan.batch.num_micro_steps):
            started = time.perf_counter()
            epoch, batch = next(micro_batches)
            meter.waited(time.perf_counter() - started)
            visible = self._visible(epoch, batch)
            out = self.engine.forward(batch.to(self.engine.device), visible)
            self.engine.backward(out.loss)
            meter.add(out.loss, out.losses, batch.num_present)
        lr = self.plan.learning_rate(step)
        grad_norm = self.engine.step(lr)
        meter.finish_step(step + 1, epoch, lr, grad_norm)

    def _visible(self, epoch: int, batch: Batch) -> torch.Tensor:
        visible = draw_visible(
            self.config.train.seed, epoch, batch.sample_ids, self.model.num_patches, self.model.num_visible
        )
        return visible.to(self.engine.device, non_blocking=True)

    def _publish(self, meter: Meter, progress: ProgressLine, everything: bool) -> None:
        """Write out the records that are ready; TrainingError when one is not finite."""
        for record in meter.ready(everything):
            if self.trackers:
                self.trackers.log("metrics", record)
                progress.update(record)
            if not math.isfinite(record["loss"]):
                bad = [name for name, loss in record["losses"].items() if loss is not None and not math.isfinite(loss)]
                raise TrainingError(
                    f"step {record['step']}: the loss is {record['loss']} (modalities: {', '.join(bad) or 'none alone'}); "
                    f"lower optim.blr, set optim.clip_grad_norm, or resume from a checkpoint in {self.config.run.dir}"
                )

    def _due(self, step: int, every: int | None) -> bool:
        return step == self.plan.total_steps or (every is not None and step % every == 0)

    def _validate(self, step: int, meter: Meter) -> None:
        record = {"step": step, **self.validator.run()}
        if self.trackers:
            self.trackers.log("validation", record)
        meter.restart_clock()

    def _save(self, step: int, meter: Meter) -> None:
        epoch, batch_index = divmod(step, self.plan.order.steps_per_epoch)
        facts = (self.manifest.fingerprint, self.world.world_size, self.engine.zero_stage)
        meta = checkpoint_meta(self.config, epoch, batch_index, *facts)
        self.checkpoints.save(step, write_engine(self.engine), meta)
        meter.restart_clock()

    def close(self) -> None:
        """Release files and processes."""
        if self.trackers:
            self.trackers.close()
        self.engine.close()
