"""The scaling model's predictions: each preset on 1 to 1024 GPUs with the engine that it says is fastest."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scaling_hardware import CLUSTERS, Cluster, gpu_workload
from scaling_model import ENGINES, Machine, Step, Workload, predict

GPU_COUNTS = tuple(2**i for i in range(11))
WEAK_MICRO_BATCH = STRONG_MAX_MICRO_BATCH = 256
STRONG_GLOBAL_BATCH = 4096
AS_GOOD = 0.97  # less tells engines apart than the model can


@dataclass(frozen=True)
class Point:
    """A predicted cell. efficiency_percent: images/s a GPU, of those at the fewest GPUs that the model fits on."""

    cluster: str
    scaling: str
    model: str
    num_gpus: int
    engine: str
    micro_batch: int
    num_micro_steps: int
    fits: bool
    images_per_s: float
    efficiency_percent: float
    bottleneck: str
    step_s: float
    terms_s: dict[str, float]
    memory_bytes: dict[str, float]


def batches(scaling: str, num_gpus: int) -> tuple[int, int]:
    """Micro batch and micro steps of a GPU: fixed when weak; of the published global batch when strong."""
    if scaling == "weak":
        return WEAK_MICRO_BATCH, 1
    per_gpu = STRONG_GLOBAL_BATCH // num_gpus
    micro_batch = min(per_gpu, STRONG_MAX_MICRO_BATCH)
    return micro_batch, per_gpu // micro_batch


def fastest(work: Workload, machine: Machine, num_gpus: int, micro_batch: int, num_micro_steps: int) -> tuple[str, Step]:
    """The simplest of the engines that fit and are within `AS_GOOD` of the fastest; the leanest when none fits."""
    steps = {engine: predict(work, engine, machine, num_gpus, micro_batch, num_micro_steps) for engine in ENGINES}
    fitting = {engine: step for engine, step in steps.items() if step.fits}
    if fitting:
        enough = AS_GOOD * max(step.images_per_s for step in fitting.values())
        return next(item for item in fitting.items() if item[1].images_per_s >= enough)
    return min(steps.items(), key=lambda item: item[1].memory.total)


def curve(work: Workload, cluster: Cluster, machine: Machine, scaling: str) -> list[Point]:
    """A model's points over `GPU_COUNTS`."""
    points: list[Point] = []
    alone = None
    for num_gpus in GPU_COUNTS:
        micro_batch, num_micro_steps = batches(scaling, num_gpus)
        engine, step = fastest(work, machine, num_gpus, micro_batch, num_micro_steps)
        rate = step.images_per_s / num_gpus
        alone = rate if alone is None and step.fits else alone
        memory = step.memory._asdict() | {"total": step.memory.total}
        points.append(
            Point(
                cluster.name,
                scaling,
                work.name,
                num_gpus,
                engine,
                micro_batch,
                num_micro_steps,
                step.fits,
                step.images_per_s,
                100 * rate / alone if alone else 0.0,
                step.bottleneck,
                step.seconds,
                dict(step.terms_s),
                memory,
            )
        )
    return points


def predictions(models: Sequence[str], loader_images_per_core_s: float) -> list[dict[str, Any]]:
    """All points of all clusters, weak and strong, as a record holds them."""
    points = []
    for cluster in CLUSTERS:
        machine = cluster.machine(loader_images_per_core_s)
        for name in models:
            work = gpu_workload(name, cluster.gpu)
            for scaling in ("weak", "strong"):
                points += curve(work, cluster, machine, scaling)
    return [asdict(point) for point in points]
