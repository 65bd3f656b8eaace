"""Shards to batches: the order (a pure function), random-access reading, and the CPU loader."""

from mpmae.loader.batch import Batch
from mpmae.loader.cpu import CpuLoader
from mpmae.loader.folder import shard_folder
from mpmae.loader.order import (
    BatchPlan,
    EpochOrder,
    ExactOrder,
    TrainOrder,
    WindowOrder,
    evaluation_batches,
    evaluation_ids,
    plan_batches,
)
from mpmae.loader.read import ShardReader
from mpmae.loader.transform import Augmentation

__all__ = [
    "Augmentation",
    "Batch",
    "BatchPlan",
    "CpuLoader",
    "EpochOrder",
    "ExactOrder",
    "ShardReader",
    "TrainOrder",
    "WindowOrder",
    "evaluation_batches",
    "evaluation_ids",
    "plan_batches",
    "shard_folder",
]
