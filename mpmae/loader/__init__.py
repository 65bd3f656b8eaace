"""Shards to batches: the order (a pure function), random-access reading, and the CPU loader."""

from mpmae.lazy import lazy_exports

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
    "possible_world_sizes",
    "shard_folder",
]
_HOME_OF = dict.fromkeys(__all__, "mpmae.loader.order") | {
    "Augmentation": "mpmae.loader.transform",
    "Batch": "mpmae.loader.batch",
    "CpuLoader": "mpmae.loader.cpu",
    "ShardReader": "mpmae.loader.read",
    "shard_folder": "mpmae.loader.folder",
}
# a model needs the Batch, which is torch alone, and not the codecs of the readers
__getattr__, __dir__ = lazy_exports(__name__, _HOME_OF)
