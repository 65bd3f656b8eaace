"""What the scaling model is fitted to and checked against: collectives and steps on the ranks of this machine."""

import statistics
import time
from collections import defaultdict
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from engine_cases import Case, StepTime, make_batch, make_engine, make_model, timed_step
from scaling_links import KINDS, Timing

from mpmae.engine import World, init_world


class Sizes(NamedTuple):
    """Of the tensors whose collectives are timed, and for how long each."""

    num_bytes: tuple[int, ...]
    repeats: int
    seconds: float


def collective(kind: str, num_bytes: int, world: World) -> Any:
    """A call that runs one collective over float32 tensors, `num_bytes` of the whole one."""
    n = world.world_size
    per_rank = -(-num_bytes // (4 * n))
    whole, part = torch.ones(per_rank * n), torch.ones(per_rank)
    if kind == "all_reduce":
        return lambda: dist.all_reduce(whole)
    if kind == "all_gather":
        return lambda: dist.all_gather_single(whole, part)
    return lambda: dist.reduce_scatter_single(part, whole)


def time_collectives(sizes: Sizes) -> dict[str, dict[str, list[float]]]:
    """On each rank: seconds of each kind and size, `repeats` means over calls in a row; kinds and sizes take turns."""
    world = init_world("scaling")
    calls = {(kind, size): collective(kind, size, world) for kind in KINDS for size in sizes.num_bytes}
    in_a_row = {}
    for key, call in calls.items():
        call()
        world.barrier()
        started = time.perf_counter()
        call()
        wanted = sizes.seconds / (time.perf_counter() - started)
        in_a_row[key] = int(min(max(world.broadcast_object(wanted), 1), 1000))
    seconds: dict[str, dict[str, list[float]]] = {kind: defaultdict(list) for kind in KINDS}
    for _ in range(sizes.repeats):
        for (kind, size), call in calls.items():
            world.barrier()
            started = time.perf_counter()
            for _ in range(in_a_row[kind, size]):
                call()
            seconds[kind][str(size)].append((time.perf_counter() - started) / in_a_row[kind, size])
    world.close()
    return seconds


def timings(by_rank: list[dict[str, dict[str, list[float]]]]) -> list[Timing]:
    """The median over repeats of the slowest rank."""
    found = []
    for kind, by_size in by_rank[0].items():
        for size in by_size:
            slowest = map(max, zip(*(rank[kind][size] for rank in by_rank), strict=True))
            found.append(Timing(kind, len(by_rank), int(size), statistics.median(slowest)))
    return found


class StepsWanted(NamedTuple):
    """case: its micro batch is the one to check; beside it those of `batches`, in turns. steps: timed, after the warm-up.

    alone: time forward and backward without engine and collectives too, on all ranks at once.
    """

    case: Case
    batches: tuple[int, ...]
    warmup_steps: int
    steps: int
    alone: bool


def time_steps(wanted: StepsWanted) -> dict[str, Any]:
    """On each rank: by micro batch the forward, backward and update seconds of each step; `alone_s`: without an engine."""
    world = init_world("scaling")
    model = make_model(wanted.case)
    batches = {size: make_batch(model, size, world) for size in dict.fromkeys((wanted.case.micro_batch, *wanted.batches))}
    alone_s = []
    for _ in range(wanted.warmup_steps + wanted.steps if wanted.alone else 0):
        world.barrier()
        started = time.perf_counter()
        model(*batches[wanted.case.micro_batch]).loss.backward()
        alone_s.append(time.perf_counter() - started)
    model.zero_grad(set_to_none=True)
    engine = make_engine(wanted.case, world, model)
    steps: dict[int, list[StepTime]] = {size: [] for size in batches}
    for _ in range(wanted.warmup_steps + wanted.steps):
        for size, (batch, visible) in batches.items():
            steps[size].append(timed_step(engine, batch, visible))
    engine.close()
    world.close()
    kept = {str(size): times[wanted.warmup_steps :] for size, times in steps.items()}
    return {"steps": kept, "alone_s": alone_s[wanted.warmup_steps :]}
