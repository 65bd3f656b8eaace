"""GPUs, nodes and networks of the scaling model: datasheet figures, and what share of them the model assumes.

Nothing here is measured by this project. Sources: NVIDIA's datasheets of H200 SXM (2024) and A100 SXM4 40 GB (2021), dense
rates without sparsity, NVLink one way; DGX user guides for cores and network ports; latencies of NVLink and InfiniBand from
NCCL 2.2x, src/graph/tuning.cc, Simple protocol. Ethernet's latency (TCP through the host) is a guess.
"""

import functools
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scaling_links import Link, Nodes
from scaling_model import Compute, Machine, Workload

from mpmae.cost import Cost, model_cost
from mpmae.cost.operators import Work
from mpmae.engine.wrap import blocks_of
from mpmae.models.encoder import FIRST_TILE_SIDE
from mpmae.models.mpmae import MPMAE
from mpmae.models.presets import create_model

ASSUMED = {  # what is reached of the datasheet
    "matrix units": 0.4,
    "vector units": 0.4,
    "device memory": 0.7,
    "links": 0.8,
    "device memory for weights and activations": 0.9,
    "cores for the loader": 0.8,
}
OVERLAP_FRACTION = 0.9
LAUNCH_S = 5e-6  # of a kernel from Python, no CUDA graph
LAUNCHES_PER_BLOCK, OTHER_LAUNCHES = 20, 150  # of forward and backward; a third of them forward
NCCL_LAUNCH_S, NVLINK_S, INFINIBAND_S, ETHERNET_S = 8.4e-6, 3.4e-6, 14e-6, 50e-6
ACTIVATION_ITEMS = 10  # a site and channel: block input, depthwise result, four times the channels before and after GELU
BATCH_BYTES = 448_556  # a sample of all twelve modalities at 56 px on the device
BF16_BYTES = 2


@dataclass(frozen=True)
class Gpu:
    """Datasheet figures; capability: of its kernels (`mpmae.cost`)."""

    name: str
    capability: int
    matrix_flops_per_s: float  # bf16
    vector_flops_per_s: float  # float32
    bytes_per_s: float
    memory_bytes: float


@dataclass(frozen=True)
class Cluster:
    """Nodes of eight GPUs. nvlink, network: bytes/s one way, of a GPU and of a whole node."""

    name: str
    gpu: Gpu
    nvlink_bytes_per_s: float
    network: str
    network_bytes_per_s: float
    network_s: float
    cores_per_node: int
    gpus_per_node: int = 8

    def machine(self, loader_images_per_core_s: float) -> Machine:
        """As the model takes it, with a loader that gives so much on each core."""
        share = ASSUMED["links"]
        inside = Link(NVLINK_S, share * self.nvlink_bytes_per_s)
        between = Link(self.network_s, share * self.network_bytes_per_s)
        return Machine(
            self.name,
            Nodes(self.gpus_per_node, inside, between, NCCL_LAUNCH_S),
            self.gpus_per_node,
            OVERLAP_FRACTION,
            loader_images_per_s=ASSUMED["cores for the loader"] * self.cores_per_node * loader_images_per_core_s,
            memory_bytes=ASSUMED["device memory for weights and activations"] * self.gpu.memory_bytes,
        )


H200 = Gpu("H200 SXM", 9, 989.5e12, 67e12, 4.8e12, 141e9)
A100 = Gpu("A100 SXM4 40 GB", 8, 312e12, 19.5e12, 1.555e12, 40e9)
CLUSTERS = (
    Cluster("8 x H200, 400 Gb/s InfiniBand a GPU", H200, 450e9, "InfiniBand", 8 * 50e9, INFINIBAND_S, 112),
    Cluster("8 x A100, 100 Gb/s Ethernet a node", A100, 300e9, "Ethernet", 12.5e9, ETHERNET_S, 128),
)


def work_s(gpu: Gpu, work: Work, num_images: int, parameter_bytes: float) -> tuple[str, float]:
    """The term that bounds a part of the model, and its seconds: a roofline at the assumed shares."""
    matrix_s = work.matrix_flops / (ASSUMED["matrix units"] * gpu.matrix_flops_per_s)
    vector_s = work.vector_flops / (ASSUMED["vector units"] * gpu.vector_flops_per_s)
    flops_s = num_images * (matrix_s + vector_s)
    bytes_s = (num_images * work.num_bytes + parameter_bytes) / (ASSUMED["device memory"] * gpu.bytes_per_s)
    return ("compute", flops_s) if flops_s >= bytes_s else ("memory bandwidth", bytes_s)


def gpu_compute(gpu: Gpu, cost: Cost, num_blocks: int, num_images: int) -> Compute:
    """Of a micro batch: each part by its roofline; what the host takes longer to launch it is latency.

    Weights are read in the forward, read again and their gradients written in the backward.
    """
    num_launches = LAUNCHES_PER_BLOCK * num_blocks + OTHER_LAUNCHES
    passes = []
    for way, fraction in (("forward", 1 / 3), ("backward", 2 / 3)):
        terms = {"compute": 0.0, "memory bandwidth": 0.0}
        for part in cost.parts.values():
            term, seconds = work_s(gpu, getattr(part, way), num_images, fraction * part.parameter_bytes)
            terms[term] += seconds
        launching_s = fraction * num_launches * LAUNCH_S
        passes.append(terms | {"latency": max(0.0, launching_s - sum(terms.values()))})
    update_s = cost.optimizer_bytes() / (ASSUMED["device memory"] * gpu.bytes_per_s)
    return Compute(*passes, {"memory bandwidth": update_s})


@functools.cache
def meta_model(name: str) -> MPMAE:
    """A preset without its numbers."""
    with torch.device("meta"):
        return create_model(name)


def num_units(model: MPMAE) -> int:
    """What weights are gathered by: the blocks, and the rest as one."""
    return 1 + sum(1 for _ in blocks_of(model))


def activation_bytes(model: MPMAE) -> float:
    """What a sample keeps for the backward in bf16, and its batch: a count of the blocks' inputs and hidden features."""
    shown, items = model.num_visible, 0
    for stage, blocks in enumerate(model.encoder.stages):
        num_sites = shown * (FIRST_TILE_SIDE >> stage) ** 2
        items += num_sites * sum(block.dwconv.in_channels for block in blocks)
    items += model.num_patches * sum(block.dwconv.in_channels for block in model.decoder.blocks)
    return ACTIVATION_ITEMS * BF16_BYTES * items + BATCH_BYTES


def gpu_workload(name: str, gpu: Gpu) -> Workload:
    """A preset at the published geometry (56 px, patch 8) in bf16."""
    model = meta_model(name)
    cost = model_cost(model, "bf16", gpu.capability)
    units = num_units(model)
    return Workload(
        name,
        cost.num_parameters,
        units,
        BF16_BYTES,
        lambda micro_batch: gpu_compute(gpu, cost, units, micro_batch),
        activation_bytes(model),
    )


def assumptions() -> dict[str, Any]:
    """All figures that the predictions rest on, as a record holds them."""
    return {
        "clusters": [asdict(cluster) for cluster in CLUSTERS],
        "reached_fraction": ASSUMED,
        "overlap_fraction": OVERLAP_FRACTION,
        "launch_s": LAUNCH_S,
        "launches_per_block": LAUNCHES_PER_BLOCK,
        "other_launches": OTHER_LAUNCHES,
        "hop_s": {"NVLink": NVLINK_S, "InfiniBand": INFINIBAND_S, "Ethernet": ETHERNET_S},
        "collective_launch_s": NCCL_LAUNCH_S,
        "activation_items": ACTIVATION_ITEMS,
    }
