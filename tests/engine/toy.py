"""A small two-task model whose loss is a share of a global one, and a training run of it on any engine.

Shapes: N samples of a micro batch, C channels.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn

from mpmae.config import RunConfig, validate
from mpmae.engine import LearningRate, create_engine, init_world, load_ds_config, resolve_ds_config
from mpmae.engine.base import Engine
from mpmae.engine.optim import parameter_groups
from mpmae.train.checkpoint import Checkpoints
from mpmae.train.engine_state import load_engine, snapshot_engine, write_engine

GLOBAL_BATCH = 16
PEAK_LR = 0.005
WEIGHT_DECAY = 0.1
DS_FOLDER = Path(__file__).resolve().parents[2] / "configs" / "ds"


class ToyOutput(NamedTuple):
    """Like the real model's output: the loss, a scalar, beside a dict of its terms."""

    loss: torch.Tensor
    losses: dict[str, torch.Tensor]


class ToyBlock(nn.Module):
    """A residual layer; blocks are what engines shard, checkpoint and compile."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x):
        return x + torch.nn.functional.gelu(self.linear(x))


class Toy(nn.Module):
    """Two heads over a trunk, with each kind of parameter that models have: conv, scale, token, norm, scalar, frozen."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.gamma = nn.Parameter(torch.ones(1, 8))
        self.token = nn.Parameter(torch.full((1, 1, 8), 0.02))
        self.frozen = nn.Parameter(torch.full((8,), 0.3), requires_grad=False)
        self.hidden = nn.Linear(8, 24)
        self.blocks = nn.ModuleList(ToyBlock(24) for _ in range(2))
        self.head_a = nn.Linear(24, 4)
        self.head_b = nn.Linear(24, 5)
        self.log_variance = nn.Parameter(torch.zeros(2))
        self.register_buffer("offset", torch.full((1,), 0.25))

    def forward(self, x, target_a, target_b, has_b, num_b):
        """This micro batch's share: mean over all samples for task a, over the `num_b` samples that have b for task b."""
        features = self.norm(self.conv(x).flatten(2).mean(2))
        hidden = torch.nn.functional.gelu(self.hidden(features * self.gamma + self.token[0] + self.frozen))
        for block in self.blocks:
            hidden = block(hidden)
        error_a = (self.head_a(hidden).float() - target_a + self.offset).square().mean(1).sum() / GLOBAL_BATCH
        per_sample_b = nn.functional.cross_entropy(self.head_b(hidden).float(), target_b, reduction="none")
        error_b = (per_sample_b * has_b).sum() / num_b  # zero-weighted, not skipped, where no sample has b
        errors = torch.stack([error_a, error_b])
        share = len(x) / GLOBAL_BATCH
        loss = (torch.exp(-self.log_variance) * errors + share * self.log_variance).sum()
        return ToyOutput(loss, {"a": error_a, "b": error_b})


@dataclass
class Case:
    """One training run."""

    engine: str = "ddp"
    stage: int = 0
    num_micro_steps: int = 1
    clip: float | None = None
    precision: str = "fp32"
    steps: int = 10
    save_at: int | None = None
    in_background: bool = False  # what is saved is copied at once and written after all steps
    load_from: str | None = None
    bad_step: int | None = None
    ds_extra: dict | None = None
    lr_scale: float | None = None  # of the group without weight decay
    ds_file: str | None = None  # in configs/ds, without .json; by default the stage's
    options: dict | None = None  # more keys of the engine section

    @property
    def label(self) -> str:
        name = f"zero{self.stage}" if self.engine == "deepspeed" else self.engine
        return f"{name} x{self.num_micro_steps} clip={self.clip} {self.precision}"


def run_config(case: Case) -> RunConfig:
    train = {"global_batch_size": GLOBAL_BATCH, "precision": case.precision}
    optim = {"clip_grad_norm": case.clip, "lr": PEAK_LR, "weight_decay": WEIGHT_DECAY}
    engine = {"name": case.engine, **(case.options or {})}
    return validate({"train": train, "optim": optim, "engine": engine}, "toy")


def make_engine(case: Case, world, module: type[nn.Module] = Toy) -> Engine:
    torch.manual_seed(1234 + world.rank)  # engines have to start from rank 0's weights
    micro_batch = GLOBAL_BATCH // world.world_size // case.num_micro_steps
    ds_config = None
    if case.engine == "deepspeed":
        ds_config = load_ds_config(DS_FOLDER / f"{case.ds_file or f'zero{case.stage}'}.json")
        if case.stage == 3:  # so that small parameters are partitioned as well
            ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        ds_config |= case.ds_extra or {}
        sizes = (world.world_size, micro_batch, case.num_micro_steps)
        ds_config = resolve_ds_config(ds_config, run_config(case), *sizes)

    def scaled_groups(*arguments: Any) -> list[dict]:
        decayed, exempt = parameter_groups(*arguments)
        return [decayed, exempt | {"lr_scale": case.lr_scale}]

    groups = parameter_groups if case.lr_scale is None else scaled_groups
    with mock.patch("mpmae.engine.optim.parameter_groups", groups):
        return create_engine(run_config(case), module(), world, ds_config, case.num_micro_steps, micro_batch)


def global_batch(step: int) -> dict[str, torch.Tensor]:
    """A batch in which only the first 5 samples have task b: the second of two ranks never has one."""
    generator = torch.Generator().manual_seed(1000 + step % 3)
    x = torch.randn(GLOBAL_BATCH, 3, 6, 6, generator=generator)
    return {
        "x": x,
        "target_a": x.mean((2, 3)).repeat(1, 2)[:, :4] * 3,
        "target_b": torch.randint(0, 5, (GLOBAL_BATCH,), generator=generator),
        "has_b": (torch.arange(GLOBAL_BATCH) < 5).float(),
    }


def rows_of(engine: Engine, case: Case, micro_step: int) -> slice:
    """A micro batch's part of the global batch; parts differ in size where the ranks do not divide it."""
    num_parts = engine.world_size * case.num_micro_steps
    part = engine.rank * case.num_micro_steps + micro_step
    return slice(GLOBAL_BATCH * part // num_parts, GLOBAL_BATCH * (part + 1) // num_parts)


def train(engine: Engine, case: Case, first: int, last: int) -> dict[str, list[float]]:
    """Losses, gradient norms and a random draw per step."""
    schedule = LearningRate(PEAK_LR, 0.0, 3, 12)
    record: dict[str, list[float]] = {"loss": [], "grad_norm": [], "draw": []}
    for step in range(first, last):
        batch = global_batch(step)
        total = torch.zeros((), dtype=torch.float64)
        for index in range(case.num_micro_steps):
            part = {key: value[rows_of(engine, case, index)] for key, value in batch.items()}
            if step == case.bad_step and engine.rank == engine.world_size - 1:
                part["x"] = part["x"] * float("nan")
            loss = engine.forward(**part, num_b=5).loss
            engine.backward(loss)
            total += loss.detach().double()
        grad_norm = engine.step(schedule(step + 1))
        record["loss"].append(engine.sum_over_ranks(total).item())
        record["grad_norm"].append(grad_norm.item())
        record["draw"].append(torch.rand(1).item())
    return record


@functools.cache
def reference(clip: float | None, skip: int | None = None, steps: int = 10, lr_scale: float = 1.0) -> dict[str, Any]:
    """The same run in plain torch: whole batch at once, no engine, step `skip` left out altogether."""
    torch.manual_seed(1234)
    module = Toy()
    exempt = {"conv.bias", "norm.weight", "norm.bias", "hidden.bias", "head_a.bias", "head_b.bias", "log_variance"}
    exempt |= {"blocks.0.linear.bias", "blocks.1.linear.bias"}
    named = dict(module.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if name not in exempt | {"frozen"}], "weight_decay": WEIGHT_DECAY},
        {"params": [named[name] for name in sorted(exempt)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), foreach=False)
    schedule = LearningRate(PEAK_LR, 0.0, 3, 12)
    result: dict[str, Any] = {"loss": [], "grad_norm": [], "initial": clone(module)}
    for step in range(steps):
        if step == skip:
            continue
        loss = module(**global_batch(step), num_b=5).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), float("inf") if clip is None else clip)
        for group, scale in zip(optimizer.param_groups, (1.0, lr_scale), strict=True):
            group["lr"] = schedule(step + 1) * scale
        optimizer.step()
        result["loss"].append(loss.item())
        result["grad_norm"].append(norm.item())
        if step == 0:
            result["state_after_first"] = clone(module)
    return result | {"state": clone(module)}


def clone(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def run_cases(cases: list[tuple[Case, str | None]]) -> list[dict[str, Any]]:
    """`run_case` of each in one world."""
    world = init_world("toy")
    results = [run_case(world, case, folder) for case, folder in cases]
    world.close()
    return results


def run_case(world, case: Case, folder: str | None) -> dict[str, Any]:
    """A case's record, full weights and what else was asked for; `folder` is where it saves."""
    engine = make_engine(case, world)
    result: dict[str, Any] = {"initial": engine.full_state_dict()}
    if case.load_from is not None:
        load_engine(engine, Checkpoints(case.load_from, 1, world).latest())
        result |= train(engine, case, case.save_at, case.steps)
    elif case.save_at is not None:
        result |= train(engine, case, 0, case.save_at)
        checkpoints = Checkpoints(folder, 1, world)
        if case.in_background:
            write = snapshot_engine(engine)
            rest = train(engine, case, case.save_at, case.steps)
            checkpoints.save(case.save_at, write, {})
        else:
            checkpoints.save(case.save_at, write_engine(engine), {})
            rest = train(engine, case, case.save_at, case.steps)
        result |= {"rest_" + key: value for key, value in rest.items()}
    else:
        result |= train(engine, case, 0, 1)
        result["state_after_first"] = engine.full_state_dict()
        for key, values in train(engine, case, 1, case.steps).items():
            result[key] += values
    result["state"] = engine.full_state_dict()
    engine.close()
    return result
