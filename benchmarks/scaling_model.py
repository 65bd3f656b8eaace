"""A model of the time of a training step over ranks: compute, collectives, loader, and which of them it waits for.

A step is `num_micro_steps` forwards and backwards, then one update. What each engine sends:

    ddp    all-reduce of the gradients in the last backward
    zero1  all-reduce of the gradients after the last backward, all-gather of the weights after the update
    zero2  all-reduce of the gradients in every backward, all-gather of the weights after the update
    zero3  all-gather of the weights in every forward and backward, reduce-scatter of the gradients in every backward
    fsdp   as zero3, but the gradients in the last backward only: until then they are whole on every rank
    hsdp   as fsdp among the ranks of a node, and an all-reduce of each rank's share of the gradients between nodes

ZeRO-1 and 2 could do with a reduce-scatter: DeepSpeed 0.19.8 (`stage_1_and_2.py`, use_multi_rank_bucket_allreduce)
all-reduces each bucket and keeps its part. Gradients travel as float32, gathered weights in the run's precision.

A phase (forward or backward) of c seconds that sends k equal pieces of p seconds, one ready after each k-th of it, or one
needed before it, ends max(p, c/k + k*p - c) later than it would alone. A real backward gives most gradients early, as the
deep stages are the wide ones, so that this is rather too late than too early.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from scaling_links import NOTHING, Cost, Fabric, Group, added

ENGINES = ("ddp", "zero1", "zero2", "fsdp", "hsdp", "zero3")  # simplest first
DDP_BUCKET_BYTES = 25 * 2**20  # torch's default
ZERO_BUCKET_BYTES = 50_000_000 * 4  # configs/ds: reduce_bucket_size, in float32
FP32_BYTES, MOMENT_BYTES = 4, 8
TERMS = ("compute", "memory bandwidth", "gradient reduction", "parameter gather", "latency", "loader")


Seconds = Mapping[str, float]  # by names of TERMS


@dataclass(frozen=True)
class Compute:
    """What one rank alone takes for a micro batch, and for the update of all parameters."""

    forward: Seconds
    backward: Seconds
    update: Seconds


@dataclass(frozen=True)
class Workload:
    """A model in a precision. num_units: what weights are gathered by (blocks). item_bytes: of a weight in the forward.

    compute: of a micro batch of so many samples. activation_bytes: saved for the backward, a sample.
    """

    name: str
    num_parameters: int
    num_units: int
    item_bytes: int
    compute: Callable[[int], Compute]
    activation_bytes: float = 0.0


@dataclass(frozen=True)
class Machine:
    """overlap_fraction: the share of a collective beside computation that does not slow that down.

    slowdown: how much longer computation takes with so many ranks on a node. loader_images_per_s: of a node, shared by its
    ranks; None: not counted. memory_bytes: of a rank; None: not counted.
    """

    name: str
    fabric: Fabric
    ranks_per_node: int
    overlap_fraction: float
    slowdown: Callable[[int], float] = field(default=lambda ranks: 1.0)
    loader_images_per_s: float | None = None
    memory_bytes: float | None = None


class Memory(NamedTuple):
    """Bytes of a rank."""

    weights: float
    gradients: float
    moments: float
    activations: float
    gathered: float

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(self)


@dataclass(frozen=True)
class Step:
    """What is predicted of a step; `terms_s` by the names of `TERMS`."""

    terms_s: Mapping[str, float]
    num_images: int
    memory: Memory
    fits: bool

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self.terms_s.values())

    @property
    def images_per_s(self) -> float:
        """Of all ranks."""
        return self.num_images / self.seconds

    @property
    def bottleneck(self) -> str:
        """The loader if it is waited for, since nothing else would then make the step shorter; else the longest term."""
        return "loader" if self.terms_s["loader"] > 0 else max(self.terms_s, key=self.terms_s.__getitem__)


def shard_ranks(engine: str, num_ranks: int, ranks_per_node: int) -> int:
    """Over how many ranks an engine splits what it splits."""
    return {"ddp": 1, "hsdp": min(num_ranks, ranks_per_node)}.get(engine, num_ranks)


def memory(
    work: Workload, engine: str, num_ranks: int, ranks_per_node: int, micro_batch: int, num_micro_steps: int = 1
) -> Memory:
    """Bytes of a rank.

    DeepSpeed keeps a float32 copy of its share of the weights beside those of the forward, FSDP2 only that copy. Sharded
    weights are there whole for two units at a time. Source: Rajbhandari et al., "ZeRO", SC 2020, section 3.
    """
    n, count = shard_ranks(engine, num_ranks, ranks_per_node), work.num_parameters
    forward = {"ddp": FP32_BYTES, "zero1": work.item_bytes, "zero2": work.item_bytes, "zero3": work.item_bytes / n}
    masters = {"ddp": 0}
    weights = forward.get(engine, 0) + masters.get(engine, FP32_BYTES / n)
    whole = engine in ("ddp", "zero1") or (engine in ("fsdp", "hsdp") and num_micro_steps > 1)
    gradients = FP32_BYTES if whole else FP32_BYTES / n
    gathered = 2 * count / work.num_units * work.item_bytes if engine in ("zero3", "fsdp", "hsdp") and n > 1 else 0
    return Memory(
        weights * count, gradients * count, MOMENT_BYTES / n * count, work.activation_bytes * micro_batch, gathered
    )


def exposed(compute_s: float, num_pieces: int, piece: Cost, overlap_fraction: float) -> Cost:
    """What `num_pieces` collectives beside `compute_s` of computation add to it; all of them at an overlap of 0."""
    if piece.total_s == 0:
        return NOTHING
    total_s = num_pieces * piece.total_s
    late_s = max(piece.total_s, compute_s / num_pieces + total_s - compute_s)
    return piece.times((late_s + (1 - overlap_fraction) * (total_s - late_s)) / piece.total_s)


class Sent(NamedTuple):
    """What the collectives of a phase add to a step."""

    gather: Cost = NOTHING
    reduction: Cost = NOTHING


class Traffic(NamedTuple):
    """What an engine adds to a step beyond computation: each forward, each backward but the last, that, the update."""

    forward: Sent = Sent()
    backward: Sent = Sent()
    last_backward: Sent = Sent()
    update: Sent = Sent()


def traffic(work: Workload, engine: str, machine: Machine, num_ranks: int, forward_s: float, backward_s: float) -> Traffic:
    """Of one step; `forward_s` and `backward_s`: the computation beside it."""
    world = Group(num_ranks, min(num_ranks, machine.ranks_per_node))
    gradient_bytes, weight_bytes = FP32_BYTES * work.num_parameters, work.item_bytes * work.num_parameters

    def reduced(bucket_bytes: float) -> Sent:
        pieces = max(1, round(gradient_bytes / bucket_bytes))
        piece = machine.fabric.cost("all_reduce", gradient_bytes / pieces, world)
        overlap = 0.0 if engine == "zero1" else machine.overlap_fraction
        return Sent(reduction=exposed(backward_s, pieces, piece, overlap))

    if engine == "ddp":
        return Traffic(last_backward=reduced(DDP_BUCKET_BYTES))
    if engine in ("zero1", "zero2"):
        reduction = reduced(ZERO_BUCKET_BYTES)
        after = Sent(gather=machine.fabric.cost("all_gather", weight_bytes, world))
        return Traffic(backward=reduction if engine == "zero2" else Sent(), last_backward=reduction, update=after)

    shard_size, units = shard_ranks(engine, num_ranks, machine.ranks_per_node), work.num_units
    shards = Group(shard_size, min(shard_size, machine.ranks_per_node))
    gather = machine.fabric.cost("all_gather", weight_bytes / units, shards)
    scatter = machine.fabric.cost("reduce_scatter", gradient_bytes / units, shards)
    if (num_replicas := num_ranks // shard_size) > 1:
        scatter = added(
            scatter, machine.fabric.cost("all_reduce", gradient_bytes / units / shard_size, Group(num_replicas, 1))
        )
    overlap = machine.overlap_fraction
    gathering = Sent(gather=exposed(backward_s, units, gather, overlap))
    both = exposed(backward_s, units, added(gather, scatter), overlap)
    fraction = gather.total_s / (gather.total_s + scatter.total_s) if scatter.total_s else 1.0
    last = Sent(both.times(fraction), both.times(1 - fraction))
    forward = Sent(gather=exposed(forward_s, units, gather, overlap))
    return Traffic(forward, last if engine == "zero3" else gathering, last)


def predict(
    work: Workload, engine: str, machine: Machine, num_ranks: int, micro_batch: int, num_micro_steps: int = 1
) -> Step:
    """The step of `num_ranks` ranks with `micro_batch` samples each and micro step.

    The loader works beside everything else: only what it takes longer is waited for.
    """
    local_ranks = min(num_ranks, machine.ranks_per_node)
    slowdown, compute = machine.slowdown(local_ranks), work.compute(micro_batch)
    forward_s, backward_s = (slowdown * sum(part.values()) for part in (compute.forward, compute.backward))
    sent = traffic(work, engine, machine, num_ranks, forward_s, backward_s)
    terms = dict.fromkeys(TERMS, 0.0)
    update_ranks = shard_ranks(engine, num_ranks, machine.ranks_per_node)
    for seconds, times in (
        (compute.forward, num_micro_steps),
        (compute.backward, num_micro_steps),
        (compute.update, 1 / update_ranks),
    ):
        for term, value in seconds.items():
            terms[term] += slowdown * times * value
    for phase, times in (
        (sent.forward, num_micro_steps),
        (sent.backward, num_micro_steps - 1),
        (sent.last_backward, 1),
        (sent.update, 1),
    ):
        terms["parameter gather"] += times * phase.gather.transfer_s
        terms["gradient reduction"] += times * phase.reduction.transfer_s
        terms["latency"] += times * (phase.gather.latency_s + phase.reduction.latency_s)
    if machine.loader_images_per_s is not None:
        loading_s = local_ranks * micro_batch * num_micro_steps / machine.loader_images_per_s
        terms["loader"] = max(0.0, loading_s - sum(terms.values()))
    used = memory(work, engine, num_ranks, machine.ranks_per_node, micro_batch, num_micro_steps)
    fits = machine.memory_bytes is None or used.total <= machine.memory_bytes
    return Step(terms, num_ranks * micro_batch * num_micro_steps, used, fits)
