"""A pretraining run from configuration to last checkpoint."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import closing

import torch

from mpmae.checkpoint_format import load_meta
from mpmae.config import RunConfig
from mpmae.engine import Engine, World, create_engine, init_world
from mpmae.engine.ds_config import zero_stage
from mpmae.errors import TrainingError
from mpmae.loader import Batch
from mpmae.masking import draw_visible
from mpmae.models import MPMAE
from mpmae.train.checkpoint import Checkpoints, load_engine, write_engine
from mpmae.train.compatibility import check_compatible, checkpoint_meta
from mpmae.train.demo_data import ensure_demo_shards
from mpmae.train.meter import Meter
from mpmae.train.plan import show_plan
from mpmae.train.progress import ProgressLine, make_console
from mpmae.train.record import write_run_json
from mpmae.train.run_dir import check_vacant, claimed, find_start
from mpmae.train.setup import Setup, build_model, set_up
from mpmae.train.track import open_trackers
from mpmae.train.validate import Validator

_COLLECTIVE_PER_STALL = 1.5  # a rank that makes no progress is named by the watchdog before the others give up on it


def pretrain(config: RunConfig) -> None:
    """Run (or continue) a pretraining; every rank calls this once.

    Raises ConfigError, ShardError or CheckpointError before the first step when something does not fit, TrainingError when
    the loss is no longer finite.
    """
    guard = config.guard
    world = init_world(config.engine.name, guard.rendezvous_timeout_s, _COLLECTIVE_PER_STALL * guard.stall_s)
    try:
        if world.rank == 0:
            ensure_demo_shards(config.data.shards)
        world.barrier()
        setup = set_up(config, world.world_size)
        model = build_model(config, setup.manifest)
        with claimed(config, world), closing(Run(config, world, setup, model)) as run:
            run.train()
    finally:
        world.close()


def dry_run(config: RunConfig) -> None:
    """Print what `pretrain` would do for the world size of the environment; writes nothing but the demo shards.

    Raises what `pretrain` would raise before it writes.
    """
    ensure_demo_shards(config.data.shards)
    setup = set_up(config, int(os.environ.get("WORLD_SIZE", "1")))
    model = build_model(config, setup.manifest)
    check_vacant(config)
    console = make_console(quiet=os.environ.get("RANK", "0") != "0")
    show_plan(console, config, setup.plan, setup.manifest, model)
    if setup.ds_config:
        console.print_json(data=setup.ds_config)


class Run:
    """Everything a run holds. The step itself is `_step`."""

    def __init__(self, config: RunConfig, world: World, setup: Setup, model: MPMAE):
        self.config, self.world = config, world
        self.manifest, self.plan, self.loader = setup.manifest, setup.plan, setup.training
        self.console = make_console(quiet=world.rank != 0)
        num_parameters = sum(p.numel() for p in model.parameters())  # before ZeRO-3 takes them apart
        show_plan(self.console, config, self.plan, self.manifest, model)
        self.checkpoints = Checkpoints(config.run.dir / "checkpoints", config.checkpoint.keep_last)
        start = find_start(config, world, self.checkpoints)
        self.start_step = 0
        if start:
            meta, stage = load_meta(start), zero_stage(setup.ds_config) if setup.ds_config else None
            for note in check_compatible(meta, config, self.manifest.fingerprint, world.world_size, stage):
                self.console.print(f"[yellow]note:[/yellow] {note}")
            self.start_step = meta["step"]
            if world.rank == 0:  # killed before its first save, the run must go on from here and not from a later one
                self.checkpoints.set_aside_after(self.start_step)
            self.console.print(f"continuing from {start} at step {self.start_step}")
        batch = self.plan.batch
        self.engine: Engine = create_engine(
            config, model, world, setup.ds_config, batch.num_micro_steps, batch.micro_batch_size
        )
        self.model: MPMAE = self.engine.module
        if start:
            load_engine(self.engine, start)
        self.validator = Validator(self.engine, setup.validation, setup.reference, config)
        self.trackers = None
        if world.rank == 0 and self.start_step < self.plan.total_steps:
            facts = {
                "world_size": world.world_size,
                "num_parameters": num_parameters,
                "total_steps": self.plan.total_steps,
                "steps_per_epoch": self.plan.order.steps_per_epoch,
                "shards_fingerprint": self.manifest.fingerprint,
            }
            write_run_json(config, setup.ds_config, facts, start, self.start_step)
            self.trackers = open_trackers(config, self.start_step)

    def train(self) -> None:
        """All remaining steps, then the last checkpoint and validation."""
        total = self.plan.total_steps
        if self.start_step >= total:
            self.console.print(f"the run is complete: {self.start_step} steps are done, {total} were asked for")
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
            if not math.isfinite(record["grad_norm"]):
                place = f"step {record['step']}"
                self.console.print(f"[yellow]note:[/yellow] {place}: the gradient is not finite, so the step was skipped")
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
        bands = self.model.bands_in
        inputs = {"bands_in": list(bands), "statistics": self.manifest.input_statistics(bands)}
        meta = checkpoint_meta(self.config, epoch, batch_index, *facts, **inputs)
        self.checkpoints.save(step, write_engine(self.engine), meta)
        meter.restart_clock()

    def close(self) -> None:
        """Release files and processes."""
        if self.trackers:
            self.trackers.close()
        self.engine.close()
