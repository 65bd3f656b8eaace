"""Engines around a model on synthetic batches, for the benchmarks that time steps over ranks of this machine."""

import importlib.util
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from synthetic import random_visible, synthetic_batch

from mpmae.config import RunConfig, validate
from mpmae.engine import Engine, World, create_engine, load_ds_config, resolve_ds_config
from mpmae.loader import Batch
from mpmae.models.mpmae import MPMAE
from mpmae.models.presets import create_model

DS_FOLDER = Path(__file__).resolve().parents[1] / "configs" / "ds"
MASK_RATIO, LEARNING_RATE = 0.6, 1e-5
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp")


@dataclass(frozen=True)
class Case:
    """model: a size. engine: of `ENGINES`. micro_batch: samples per rank. float32, published geometry (56 px, patch 8)."""

    model: str
    engine: str
    num_ranks: int
    micro_batch: int
    activation_checkpointing: bool = False

    @property
    def name(self) -> str:
        """One line."""
        checkpointing = ", activation checkpointing" if self.activation_checkpointing else ""
        return f"{self.model}, {self.engine}{checkpointing}, {self.num_ranks} rank{'s' * (self.num_ranks > 1)}"


def absent(case: Case) -> str | None:
    """Why this version of mpmae cannot run a case; None if it can."""
    if case.engine == "fsdp" and not _has("mpmae.engine.fsdp"):
        return "this version has no fsdp engine"
    if case.engine.startswith("zero") and not _has("deepspeed"):
        return "deepspeed is not installed"
    if case.activation_checkpointing and not _has("mpmae.engine.wrap"):
        return "this version has no activation checkpointing"
    return None


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def config_of(case: Case) -> RunConfig:
    """The run configuration of a case."""
    name = "deepspeed" if case.engine.startswith("zero") else case.engine
    return validate(
        {
            "model": {"name": f"mpmae_{case.model}"},
            "train": {"global_batch_size": case.num_ranks * case.micro_batch},
            "engine": {"name": name, "activation_checkpointing": case.activation_checkpointing},
        },
        case.name,
    )


def make_model(case: Case) -> MPMAE:
    """With random weights, the same on every rank."""
    torch.manual_seed(0)
    return create_model(f"mpmae_{case.model}", mask_ratio=MASK_RATIO)


def make_engine(case: Case, world: World, model: MPMAE) -> Engine:
    """The engine, with the settings of configs/ds where it is deepspeed's."""
    config, ds_config = config_of(case), None
    if config.engine.name == "deepspeed":
        raw = load_ds_config(DS_FOLDER / f"{case.engine}.json")
        ds_config = resolve_ds_config(raw, config, world.world_size, case.micro_batch, 1)
    return create_engine(config, model, world, ds_config, 1, case.micro_batch)


def make_batch(model: MPMAE, num_samples: int, world: World) -> tuple[Batch, torch.Tensor]:
    """A random batch of all targets, and its visible patches."""
    batch = synthetic_batch(model, num_samples, world.device, seed=world.rank)
    return batch, random_visible(num_samples, model.num_patches, MASK_RATIO, world.device)


class StepTime(NamedTuple):
    """Seconds: forward, backward, update, from the moment on that all ranks were ready to the end of each."""

    forward_s: float
    backward_s: float
    update_s: float

    @property
    def total_s(self) -> float:
        """Of the step."""
        return sum(self)


def timed_step(engine: Engine, batch: Batch, visible: torch.Tensor) -> StepTime:
    """One step of one micro step, timed on this rank."""
    engine.world.barrier()
    _finish(engine.device)
    marks = [time.perf_counter()]
    out = engine.forward(batch, visible)
    _finish(engine.device)
    marks.append(time.perf_counter())
    engine.backward(out.loss)
    _finish(engine.device)
    marks.append(time.perf_counter())
    engine.step(LEARNING_RATE)
    _finish(engine.device)
    marks.append(time.perf_counter())
    return StepTime(*(end - start for start, end in itertools.pairwise(marks)))


def _finish(device: torch.device) -> None:
    """Wait for what was launched on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
