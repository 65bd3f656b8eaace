"""What a collective takes: alpha (seconds of latency a hop) and beta (seconds a byte) of the links, and their fit.

Bytes are those of the whole tensor: the sum of an all-reduce, the result of an all-gather, the input of a reduce-scatter.
Source: Thakur et al., "Optimization of Collective Communication Operations in MPICH", 2005, sections 2-4 (ring);
NCCL 2.2x, src/graph/tuning.cc (which hops of a ring cross nodes, the tree, latencies of the Simple protocol).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

KINDS = ("all_reduce", "all_gather", "reduce_scatter")
TREE_BANDWIDTH_FRACTION = 0.92  # of a ring's; NCCL's own figure


class Cost(NamedTuple):
    """Seconds of one collective: those that grow with the ranks alone, and those that grow with the bytes."""

    latency_s: float
    transfer_s: float

    @property
    def total_s(self) -> float:
        """Their sum."""
        return self.latency_s + self.transfer_s

    def times(self, factor: float) -> "Cost":
        """So many of them, one after the other."""
        return Cost(factor * self.latency_s, factor * self.transfer_s)


NOTHING = Cost(0.0, 0.0)


def added(first: Cost, second: Cost) -> Cost:
    """One after the other."""
    return Cost(first.latency_s + second.latency_s, first.transfer_s + second.transfer_s)


@dataclass(frozen=True)
class Link:
    """latency_s: alpha, a hop. bytes_per_s: one over beta, each way."""

    latency_s: float
    bytes_per_s: float


class Group(NamedTuple):
    """The ranks of a collective, `per_node` of them on each node."""

    num_ranks: int
    per_node: int


class Fabric(Protocol):
    """What joins the ranks."""

    def cost(self, kind: str, num_bytes: float, group: Group) -> Cost:
        """Of one collective of `KINDS`, nothing at one rank."""


def ring_hops(kind: str, num_ranks: int) -> int:
    """Hops one after the other: n - 1 to scatter or to gather, both for an all-reduce."""
    return (2 if kind == "all_reduce" else 1) * (num_ranks - 1)


def ring_bytes(kind: str, num_bytes: float, num_ranks: int) -> float:
    """Bytes that each rank sends: (n - 1) / n of the tensor, twice for an all-reduce."""
    return ring_hops(kind, num_ranks) / num_ranks * num_bytes


@dataclass(frozen=True)
class SharedCores:
    """Ranks of one machine whose links are its own cores: past one rank a core everything takes as much longer."""

    links: dict[str, Link]  # by kind
    num_cores: int

    def slowdown(self, num_ranks: int) -> float:
        """How many ranks wait for each core, at least 1."""
        return max(1.0, num_ranks / self.num_cores)

    def cost(self, kind: str, num_bytes: float, group: Group) -> Cost:
        """See Fabric: a ring."""
        link, n = self.links[kind], group.num_ranks
        slowdown = self.slowdown(n)
        return Cost(
            slowdown * ring_hops(kind, n) * link.latency_s,
            slowdown * ring_bytes(kind, num_bytes, n) / link.bytes_per_s,
        )


@dataclass(frozen=True)
class Nodes:
    """Nodes of GPUs: `inside` joins those of a node, `between` is what a node has to the others, shared by its GPUs.

    launch_s: of any collective, before the first hop. An all-reduce takes the faster of ring and tree, the rest the ring.
    """

    gpus_per_node: int
    inside: Link
    between: Link
    launch_s: float

    def cost(self, kind: str, num_bytes: float, group: Group) -> Cost:
        """See Fabric."""
        n = group.num_ranks
        if n == 1:
            return NOTHING
        num_nodes = -(-n // group.per_node)
        bandwidth = self.inside.bytes_per_s
        if num_nodes > 1:
            groups_a_node = self.gpus_per_node // group.per_node  # all at the same time
            bandwidth = min(bandwidth, self.between.bytes_per_s / groups_a_node)
        crossing = ring_hops(kind, num_nodes)
        latency_s = (ring_hops(kind, n) - crossing) * self.inside.latency_s + crossing * self.between.latency_s
        ring = Cost(self.launch_s + latency_s, ring_bytes(kind, num_bytes, n) / bandwidth)
        if kind != "all_reduce":
            return ring
        up = (min(n, group.per_node) - 1) * self.inside.latency_s + math.ceil(math.log2(num_nodes)) * self.between.latency_s
        tree = Cost(self.launch_s + 2 * up, 2 * num_bytes / (TREE_BANDWIDTH_FRACTION * bandwidth))
        return min(ring, tree, key=lambda cost: cost.total_s)


class Timing(NamedTuple):
    """A measured collective of `num_bytes` on `num_ranks`."""

    kind: str
    num_ranks: int
    num_bytes: int
    seconds: float


def fit_two(rows: Iterable[tuple[float, float, float]]) -> tuple[float, float]:
    """a, b >= 0 of seconds = a * x + b * y over rows (x, y, seconds), by the squares of the relative errors.

    Raises ValueError where the rows cannot tell the two apart.
    """
    scaled = [(x / seconds, y / seconds) for x, y, seconds in rows]
    xx, xy, yy = (sum(row[i] * row[j] for row in scaled) for i, j in ((0, 0), (0, 1), (1, 1)))
    x1, y1 = (sum(row[i] for row in scaled) for i in (0, 1))
    determinant = xx * yy - xy * xy
    if determinant <= 1e-9 * xx * yy:
        raise ValueError(f"{len(scaled)} timings do not tell latency and bandwidth apart: measure several sizes")
    a, b = (x1 * yy - y1 * xy) / determinant, (y1 * xx - x1 * xy) / determinant
    if a < 0:
        return 0.0, y1 / yy
    if b < 0:
        return x1 / xx, 0.0
    return a, b


def fit_links(timings: Iterable[Timing], num_cores: int) -> SharedCores:
    """The link of each kind that fits its timings best, all sizes and rank counts at once."""
    timings = list(timings)
    unit = SharedCores(dict.fromkeys(KINDS, Link(1.0, 1.0)), num_cores)  # its costs are the factors of alpha and beta
    links = {}
    for kind in dict.fromkeys(timing.kind for timing in timings):
        rows = [
            (*unit.cost(kind, t.num_bytes, Group(t.num_ranks, t.num_ranks)), t.seconds) for t in timings if t.kind == kind
        ]
        alpha, beta = fit_two(rows)
        links[kind] = Link(alpha, 1 / beta if beta else math.inf)
    return SharedCores(links, num_cores)
