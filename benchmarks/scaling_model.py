"""A model of the time of a training step over ranks: compute, collectives, loader, and which of them it waits for.

A step is `num_micro_steps` forwards and backwards, then one update. What each engine sends:

    ddp    all-reduce of the gradients in the last backward
    zero1  all-reduce of the gradients after the last backward, all-gather of the weights after the update
    zero2  all-reduce of the gradients in every backward, all-gather of the weights after the update
    zero3, fsdp  all-gather of the weights in every forward and backward, reduce-scatter of the gradients in every backward
    hsdp   as fsdp among the ranks of a node, and an all-reduce of each rank's share of the gradients between nodes

ZeRO-1 and 2 could do with a reduce-scatter: DeepSpeed 0.19.8 (`stage_1_and_2.py`, use_multi_rank_bucket_allreduce)
all-reduces each bucket and keeps its part. Gradients travel as float32, gathered weights in the run's precision.

A phase (forward or backward) of c seconds that sends k equal pieces of p seconds, one ready after each k-th of it, or one
needed before it, ends max(p, c/k + k*p - c) later than it would alone. That is a bound on both sides: a backward gives the
gradients of the deep, wide stages first, so real pieces are ready sooner.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from scaling_links import NOTHING, Cost, Fabric, Group

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp")
DDP_BUCKET_BYTES = 25 * 2**20  # torch's default
ZERO_BUCKET_BYTES = 50_000_000 * 4  # configs/ds: reduce_bucket_size, in float32
FP32_BYTES, MOMENT_BYTES = 4, 8
TERMS = ("compute", "memory bandwidth", "gradient reduction", "parameter gather", "latency", "loader")


class Compute(NamedTuple):
    """Seconds of one rank alone, and the term of `TERMS` that bounds forward and backward."""

    forward_s: float
    backward_s: float
    update_s: float  # of all parameters
    bound: str = "compute"
    update_bound: str = "compute"


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
        """The term that takes most of the step."""
        return max(self.terms_s, key=self.terms_s.__getitem__)


def shard_ranks(engine: str, num_ranks: int, ranks_per_node: int) -> int:
    """Over how many ranks an engine splits what it splits."""
    return {"ddp": 1, "hsdp": min(num_ranks, ranks_per_node)}.get(engine, num_ranks)


def memory(work: Workload, engine: str, num_ranks: int, ranks_per_node: int, micro_batch: int) -> Memory:
    """Bytes of a rank.

    DeepSpeed keeps a float32 copy of its share of the weights beside those of the forward, FSDP2 only that copy. Sharded
    weights are there whole for two units at a time. Source: Rajbhandari et al., "ZeRO", SC 2020, section 3.
    """
    n, count = shard_ranks(engine, num_ranks, ranks_per_node), work.num_parameters
    forward = {"ddp": FP32_BYTES, "zero1": work.item_bytes, "zero2": work.item_bytes, "zero3": work.item_bytes / n}
    masters = {"ddp": 0}
    weights = forward.get(engine, 0) + masters.get(engine, FP32_BYTES / n)
    gradients = FP32_BYTES if engine in ("ddp", "zero1") else FP32_BYTES / n
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
    share = (late_s + (1 - overlap_fraction) * (total_s - late_s)) / piece.total_s
    return Cost(share * piece.latency_s, share * piece.transfer_s)


@dataclass(frozen=True)
class Traffic:
    """What an engine adds to a step beyond computation, by phase."""

    forward_gather: Cost
    backward_gather: Cost
    reduction: Cost  # of every backward
    last_reduction: Cost  # of the last one
    update_gather: Cost


def traffic(work: Workload, engine: str, machine: Machine, num_ranks: int, compute: Compute) -> Traffic:
    """Of one micro step each (the last reduction and the update's gather: of a step)."""
    world = Group(num_ranks, min(num_ranks, machine.ranks_per_node))
    gradient_bytes, weight_bytes = FP32_BYTES * work.num_parameters, work.item_bytes * work.num_parameters

    def reduced(bucket_bytes: float, overlap: bool) -> Cost:
        pieces = max(1, round(gradient_bytes / bucket_bytes))
        piece = machine.fabric.cost("all_reduce", gradient_bytes / pieces, world)
        if not overlap:
            return Cost(pieces * piece.latency_s, pieces * piece.transfer_s)
        return exposed(compute.backward_s, pieces, piece, machine.overlap_fraction)

    if engine == "ddp":
        return Traffic(NOTHING, NOTHING, NOTHING, reduced(DDP_BUCKET_BYTES, overlap=True), NOTHING)
    if engine in ("zero1", "zero2"):
        after = machine.fabric.cost("all_gather", weight_bytes, world)
        if engine == "zero1":
            return Traffic(NOTHING, NOTHING, NOTHING, reduced(ZERO_BUCKET_BYTES, overlap=False), after)
        return Traffic(NOTHING, NOTHING, reduced(ZERO_BUCKET_BYTES, overlap=True), NOTHING, after)

    shard_size = shard_ranks(engine, num_ranks, machine.ranks_per_node)
    shards, units = Group(shard_size, min(shard_size, machine.ranks_per_node)), work.num_units
    gather = machine.fabric.cost("all_gather", weight_bytes / units, shards)
    scatter = machine.fabric.cost("reduce_scatter", gradient_bytes / units, shards)
    replicas = num_ranks // shard_size
    if replicas > 1:
        between = machine.fabric.cost("all_reduce", gradient_bytes / units / shard_size, Group(replicas, 1))
        scatter = Cost(*map(sum, zip(scatter, between, strict=True)))
    forward = exposed(compute.forward_s, units, gather, machine.overlap_fraction)
    both = Cost(*map(sum, zip(gather, scatter, strict=True)))
    backward = exposed(compute.backward_s, units, both, machine.overlap_fraction)
    gather_fraction = gather.total_s / both.total_s if both.total_s else 0.0
    return Traffic(forward, _part(backward, gather_fraction), _part(backward, 1 - gather_fraction), NOTHING, NOTHING)


def _part(cost: Cost, fraction: float) -> Cost:
    return Cost(fraction * cost.latency_s, fraction * cost.transfer_s)


def predict(
    work: Workload, engine: str, machine: Machine, num_ranks: int, micro_batch: int, num_micro_steps: int = 1
) -> Step:
    """The step of `num_ranks` ranks with `micro_batch` samples each and micro step.

    The loader works beside everything else: only what it takes longer is waited for.
    """
    local_ranks = min(num_ranks, machine.ranks_per_node)
    slowdown = machine.slowdown(local_ranks)
    alone = work.compute(micro_batch)
    compute = alone._replace(**{key: slowdown * getattr(alone, key) for key in ("forward_s", "backward_s", "update_s")})
    sent = traffic(work, engine, machine, num_ranks, compute)
    terms = dict.fromkeys(TERMS, 0.0)
    terms[compute.bound] += num_micro_steps * (compute.forward_s + compute.backward_s)
    terms[compute.update_bound] += compute.update_s / shard_ranks(engine, num_ranks, machine.ranks_per_node)
    for term, cost, times in (
        ("parameter gather", sent.forward_gather, num_micro_steps),
        ("parameter gather", sent.backward_gather, num_micro_steps),
        ("parameter gather", sent.update_gather, 1),
        ("gradient reduction", sent.reduction, num_micro_steps),
        ("gradient reduction", sent.last_reduction, 1),
    ):
        terms[term] += times * cost.transfer_s
        terms["latency"] += times * cost.latency_s
    if machine.loader_images_per_s is not None:
        loading_s = local_ranks * micro_batch * num_micro_steps / machine.loader_images_per_s
        terms["loader"] = max(0.0, loading_s - sum(terms.values()))
    used = memory(work, engine, num_ranks, machine.ranks_per_node, micro_batch)
    fits = machine.memory_bytes is None or used.total <= machine.memory_bytes
    return Step(terms, num_ranks * micro_batch * num_micro_steps, used, fits)
