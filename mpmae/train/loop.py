"""A pretraining run from configuration to last checkpoint."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from typing import Any

import torch

from mpmae.checkpoint_format import load_meta
from mpmae.config import RunConfig
from mpmae.cost import model_cost
from mpmae.cost.peaks import device_peak
from mpmae.engine import Engine, World, create_engine, init_world
from mpmae.engine.ds_config import zero_stage
from mpmae.errors import DatasetError, TrainingError
from mpmae.loader import Batch
from mpmae.models import MPMAE, MultiMAE
from mpmae.probe_record import summary
from mpmae.train.checkpoint import Checkpoints
from mpmae.train.compatibility import check_compatible, checkpoint_meta, shard_hashes
from mpmae.train.demo_data import ensure_demo_shards
from mpmae.train.determinism import deterministic
from mpmae.train.engine_state import load_engine
from mpmae.train.meter import Finished, Meter
from mpmae.train.numerics import NumericsGuard, RecentSamples, too_many_skipped, with_loud_gradient, write_bad_batch
from mpmae.train.out_of_memory import advice_on_out_of_memory
from mpmae.train.plan import show_plan
from mpmae.train.probe_set import ProbeSet, open_probe_set
from mpmae.train.profile import StepProfile
from mpmae.train.progress import ProgressLine, make_console
from mpmae.train.record import write_run_json
from mpmae.train.run_dir import check_vacant, claimed, find_start
from mpmae.train.saving import Saver
from mpmae.train.setup import Setup, build_model, set_up
from mpmae.train.speed import Speed
from mpmae.train.start_checks import check_same, facts_of, idle_gpus_note
from mpmae.train.stopping import REASONS, TIME_LIMIT, Stop, StopRequests, TimeLimit, forget_stop, stop_before_restart
from mpmae.train.track import open_trackers
from mpmae.train.validate import Validator
from mpmae.train.watchdog import FIRST_TIME_FACTOR, STACKS_FOLDER, Watchdog

_COLLECTIVE_PER_STALL = FIRST_TIME_FACTOR + 0.5  # the watchdog names who holds the run up before the others give up on it


def pretrain(config: RunConfig) -> Stop | None:
    """Run (or continue) a pretraining; every rank calls this once. None when complete, else why it is to be queued again.

    Raises ConfigError, ShardError or CheckpointError before the first step when something does not fit or ranks differ,
    TrainingError when too many steps in a row had no finite loss and gradient, or memory ran out. A stalled run ends the
    process (see `mpmae.train.watchdog`).
    """
    guard = config.guard
    with deterministic(config.train.deterministic), StopRequests(guard.time_limit) as requests:
        world = init_world(config.engine.name, guard.rendezvous_timeout_s, _COLLECTIVE_PER_STALL * guard.stall_s)
        try:
            with Watchdog(world, guard.stall_s, config.run.dir / STACKS_FOLDER) as watchdog:
                return _pretrain(config, world, requests, watchdog)
        finally:
            world.close()


def _pretrain(config: RunConfig, world: World, requests: StopRequests, watchdog: Watchdog) -> Stop | None:
    if world.rank == 0:
        ensure_demo_shards(config.data.shards)
    world.barrier()
    if stopped := world.broadcast_object(stop_before_restart(config.run.dir)):
        return stopped
    setup = set_up(config, world.world_size)
    check_same(facts_of(config, setup.ds_config, setup.manifest), world)
    model = build_model(config, setup.manifest)
    probe_set = open_probe_set(config, setup.manifest, model)
    check_same(probe_set.facts() if probe_set else {}, world)
    stage = zero_stage(setup.ds_config) if setup.ds_config else None
    with (
        claimed(config, world),
        advice_on_out_of_memory(config, setup.plan.batch, model, stage, world),
        closing(Run(config, world, setup, model, probe_set, requests, watchdog)) as run,
    ):
        return run.train()


def dry_run(config: RunConfig) -> None:
    """Print what `pretrain` would do for the world size of the environment; writes nothing but the demo shards.

    Raises what `pretrain` would raise before it writes.
    """
    ensure_demo_shards(config.data.shards)
    setup = set_up(config, int(os.environ.get("WORLD_SIZE", "1")))
    model = build_model(config, setup.manifest)
    probe_set = open_probe_set(config, setup.manifest, model)
    check_vacant(config)
    console = make_console(quiet=os.environ.get("RANK", "0") != "0")
    show_plan(console, config, setup.plan, setup.manifest, model, probe_set)
    if setup.ds_config:
        console.print_json(data=setup.ds_config)


class Run:
    """Everything a run holds. The step itself is `_step`."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        setup: Setup,
        model: MPMAE | MultiMAE,
        probe_set: ProbeSet | None,
        requests: StopRequests,
        watchdog: Watchdog,
    ):
        self.config, self.world, self.requests, self.watchdog = config, world, requests, watchdog
        self.manifest, self.plan, self.loader = setup.manifest, setup.plan, setup.training
        self.console = make_console(quiet=world.rank != 0)
        device = world.device
        capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None
        cost = model_cost(model, config.train.precision, capability)  # before ZeRO-3 takes the parameters apart
        show_plan(self.console, config, self.plan, self.manifest, model, probe_set)
        if note := idle_gpus_note(world):
            self._note(note)
        self.checkpoints = Checkpoints(config.run.dir / "checkpoints", config.checkpoint.keep_last)
        start = find_start(config, world, self.checkpoints)
        self.start_step, guard_state = 0, None
        if start:
            meta, stage = load_meta(start), zero_stage(setup.ds_config) if setup.ds_config else None
            facts = (self.manifest.fingerprint, world.world_size, stage, shard_hashes(self.manifest))
            for note in check_compatible(meta, config, *facts):
                self._note(note)
            self.start_step, guard_state = meta["step"], meta.get("guard")
            self.console.print(f"continuing from {start} at step {self.start_step}")
        batch = self.plan.batch
        self.engine: Engine = create_engine(
            config, model, world, setup.ds_config, batch.num_micro_steps, batch.micro_batch_size
        )
        self.model: MPMAE | MultiMAE = self.engine.module
        if start:
            for note in load_engine(self.engine, start):
                self._note(note)
            if world.rank == 0:  # killed before its first save, the run must go on from here and not from a later one
                self.checkpoints.set_aside_after(self.start_step)
        peak = device_peak(device, config.train.precision)
        self.speed = Speed(cost, batch, peak, self.engine.num_state_shards, config.optim.clip_grad_norm is not None)
        self.validator = Validator(self.engine, setup.validation, setup.reference, config, self.watchdog.tick)
        self.probe = None
        if probe_set and self.start_step < self.plan.total_steps:
            from mpmae.train.probe import Probe  # needs torchmetrics, an optional dependency

            self.probe = Probe(self.engine, probe_set, config, self.watchdog.tick)
            for note in self.probe.notes:
                self._note(note)
        self.meter = Meter(self.engine, tuple(self.model.target_modalities), self.speed, self.plan.total_steps, len(REASONS))
        self.numerics = NumericsGuard(config.guard, config.optim.clip_grad_norm, guard_state)
        self.recent_samples = RecentSamples(num_steps=self.meter.lag + 1)
        self.time_limit = TimeLimit(requests.time_limit_s, num_laps=self.meter.lag + 2)
        self.saver = Saver(self.engine, self.checkpoints, config.checkpoint.background, self.time_limit.saved)
        self.trackers = None
        if world.rank == 0:
            forget_stop(config.run.dir)
        if world.rank == 0 and self.start_step < self.plan.total_steps:
            facts = {
                "world_size": world.world_size,
                "num_parameters": cost.num_parameters,
                "flops_per_image": cost.flops,
                "peak_flops_per_s": peak._asdict() if peak else None,
                "total_steps": self.plan.total_steps,
                "steps_per_epoch": self.plan.order.steps_per_epoch,
                "shards_fingerprint": self.manifest.fingerprint,
            }
            write_run_json(config, setup.ds_config, facts, start, self.start_step)
            self.trackers = open_trackers(config, self.start_step)

    def train(self) -> Stop | None:
        """All remaining steps, then the last checkpoint and validation; or less, when asked to stop."""
        total = self.plan.total_steps
        if self.start_step >= total:
            self.console.print(f"the run is complete: {self.start_step} steps are done, {total} were asked for")
            return None
        progress = ProgressLine(self.console, total, self.start_step)
        profile = StepProfile(self.config, self.world, self.start_step, self.console)
        with closing(progress), closing(self._micro_batches()) as micro_batches, profile:
            if self.start_step == 0 and (scores := self._probe(0)) and self.trackers:
                self.trackers.log("metrics", {"step": 0, **scores})
            self.meter.restart_clock()
            for step in range(self.start_step, total):
                self._step(step, micro_batches)
                self.saver.poll()
                if profile.step_done():
                    self.meter.restart_clock()
                # no record may lag behind a validation, as trackers take steps in order, nor a request to stop behind a save
                probes = self._probes_after(step + 1)
                validates = self._due(step + 1, self.config.train.validate_every_steps)
                saves = self._due(step + 1, self.config.checkpoint.every_steps)
                reason = self._publish(progress, everything=probes or validates or saves)
                stops = reason is not None and step + 1 < total
                if validates and not stops:
                    self._validate(step + 1)
                if saves or stops:
                    self._publish(progress, everything=True)
                    self._save(step + 1, is_last=stops or step + 1 == total)
                if stops:
                    return self._leave(Stop(reason, step + 1))
        return self._leave(None)

    def _micro_batches(self) -> Iterator[tuple[int, Batch]]:
        return self.loader.training(self.plan.order, self.plan.batch, self.world.rank, self.start_step)

    def _step(self, step: int, micro_batches: Iterator[tuple[int, Batch]]) -> None:
        """One optimizer step over one global batch."""
        device = self.engine.device
        self.model.train()
        for micro_step in range(self.plan.batch.num_micro_steps):
            with self._phase("data", step, micro_step):
                epoch, batch = next(micro_batches)
            self.recent_samples.add(step + 1, batch.sample_ids)
            with self._phase("forward", step, micro_step):
                drawn = self.model.draw(self.config.train.seed, epoch, batch.sample_ids).to(device, non_blocking=True)
                out = self.engine.forward(batch.to(device), drawn)
            with self._phase("backward", step, micro_step):
                self.engine.backward(with_loud_gradient(out.loss))
            num_present = {name: batch.num_present[modality] for name, modality in self.model.target_modalities.items()}
            self.meter.add(out.loss, out.losses, out.log_vars, num_present)
        lr = self.plan.learning_rate(step)
        with self._phase("optimizer", step, micro_step):
            grad_norm = self.engine.step(lr)
        self.meter.finish_step(step + 1, epoch, lr, grad_norm, votes=self._votes())
        self.watchdog.note("publish", step, micro_step)

    def _phase(self, name: str, step: int, micro_step: int) -> AbstractContextManager[None]:
        """What the watchdog, the meter and a profiler's trace know this part of a step by."""
        self.watchdog.note(name, step, micro_step)
        return self.meter.phase(name)

    def _votes(self) -> list[int]:
        """Why this rank wants to stop, as numbers in REASONS."""
        is_up = self.time_limit.is_up(num_saves=1 + self.saver.is_saving)
        return self.requests.votes() + [REASONS.index(TIME_LIMIT)] * is_up

    def _publish(self, progress: ProgressLine, everything: bool) -> str | None:
        """Write out the records that are ready; why the ranks stop, once any of them has asked for it.

        Raises TrainingError when too many steps in a row were skipped.
        """
        reason = None
        for finished in self.meter.ready(everything):
            record = finished.record
            reason = next((name for name, num in zip(REASONS, finished.num_votes, strict=True) if num), reason)
            for note in self.numerics.check(record):
                self._note(note)
            if self._probes_after(record["step"]) and reason is None and not self.numerics.is_exhausted:
                record |= self._probe(record["step"])
            if self.trackers:
                if self.saver.num_failed:
                    record["checkpoint_failed"] = self.saver.num_failed
                self.trackers.log("metrics", record)
                progress.update(record)
            if self.numerics.is_exhausted:
                raise self._too_many_skipped(finished)
        return reason

    def _too_many_skipped(self, last: Finished) -> TrainingError:
        """The error, once the last batch is written down. Collective: every rank comes here after the same step."""
        own = {"loss": last.own_loss, "losses": last.own_losses}
        shares = self.world.gather_objects(own | {"sample_ids": self.recent_samples.of(last.record["step"])})
        if self.world.rank == 0:
            write_bad_batch(self.config.run.dir, last.record, shares)
        return TrainingError(too_many_skipped(self.config.run.dir, last.record, shares))

    def _due(self, step: int, every: int | None) -> bool:
        return step == self.plan.total_steps or (every is not None and step % every == 0)

    def _probes_after(self, step: int) -> bool:
        return self.probe is not None and self._due(step, self.config.probe.every_steps)

    def _probe(self, step: int) -> dict[str, dict[str, Any]]:
        """What the probe adds to the record of a step; nothing without one, and when it failed or was given up."""
        if self.probe is None:
            return {}
        self.watchdog.note("probe")
        try:
            scores = self.probe.run(lambda: bool(self.requests.votes()))
            problem = "the run is asked to stop"
        except DatasetError as error:  # the training is worth more than a point of a curve
            scores, problem = None, str(error)
        self.meter.restart_clock()
        if scores is None:
            self._note(f"no probe after step {step:,}: {problem}")
            return {}
        self.console.print(f"probe after step {step:,}: {summary({'probe': scores})}")
        return {"probe": scores}

    def _validate(self, step: int) -> None:
        self.watchdog.note("validate")
        record = {"step": step, **self.validator.run()}
        if self.trackers:
            self.trackers.log("validation", record)
        self.meter.restart_clock()

    def _save(self, step: int, *, is_last: bool) -> None:
        self.watchdog.note("save")
        epoch, batch_index = divmod(step, self.plan.order.steps_per_epoch)
        facts = (self.manifest.fingerprint, self.world.world_size, self.engine.zero_stage)
        inputs = self.model.input_record(self.manifest) | {"shards": shard_hashes(self.manifest)}
        meta = checkpoint_meta(self.config, epoch, batch_index, *facts, **inputs, guard=self.numerics.state())
        self.saver.save(step, meta, is_last=is_last)
        self.meter.restart_clock()

    def _leave(self, stop: Stop | None) -> Stop | None:
        """`stop`, once stopped.json says it and all is sent; all ranks leave together.

        A launcher ends the others soon after the first has left (srun: 30 s), and wandb may take longer than that.
        """
        if stop:
            self.requests.over()
            if self.world.rank == 0:
                stop.write(self.config.run.dir)
        self._close_trackers()
        self.world.barrier()
        return stop

    def _note(self, text: str) -> None:
        self.console.print(f"[yellow]note:[/yellow] {text}")

    def close(self) -> None:
        """Release files and processes."""
        self._close_trackers()
        self.saver.close()
        self.engine.close()

    def _close_trackers(self) -> None:
        trackers, self.trackers = self.trackers, None
        if trackers:
            trackers.close()
