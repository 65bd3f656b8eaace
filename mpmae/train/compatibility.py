"""Whether a checkpoint may be continued under the present configuration, and the record that this is judged by."""

from typing import Any

from mpmae.config import RunConfig
from mpmae.errors import CheckpointError

# where the bytes come from and how; which bytes is in the fingerprint of the shards
_READING = (
    *("shards", "storage_options", "cache_dir", "cache_size_gb"),
    *("loader", "num_workers", "prefetch", "host_cache_gb", "device_cache_gb"),
)
_FREE = (
    "run",
    "log",
    "guard",
    "checkpoint",
    "engine",
    "train.deterministic",
    "model.init",
    *(f"data.{key}" for key in _READING),
)
_ORDER = ("train.global_batch_size", "train.seed", "data.train_split", "data.order", "data.window_shards")
_FORBIDDEN = ("model", *_ORDER)


def checkpoint_meta(
    config: RunConfig,
    epoch: int,
    batch_index: int,
    shards_fingerprint: str,
    world_size: int,
    zero_stage: int | None,
    **more: Any,
) -> dict[str, Any]:
    """The `meta` of `Checkpoints.save`: plain data that `check_compatible` reads.

    `epoch` and `batch_index` say which global batch comes next; `zero_stage` is the engine's; `more` is kept as given.
    """
    return {
        **more,
        "epoch": epoch,
        "batch_index": batch_index,
        "config": config.model_dump(mode="json"),
        "shards_fingerprint": shards_fingerprint,
        "world_size": world_size,
        "engine": config.engine.name,
        "zero_stage": zero_stage,
    }


def check_compatible(
    meta: dict[str, Any],
    config: RunConfig,
    shards_fingerprint: str,
    world_size: int,
    zero_stage: int | None = None,
) -> list[str]:
    """Notes on what differs harmlessly between a checkpoint's `meta` and the run that wants to continue it.

    Raises CheckpointError with every difference that forbids it: model or modalities, shards, what the order of the
    samples follows from (split, global batch size, seed, mode), engine; for deepspeed also world size, ZeRO stage and
    precision.
    """
    notes, problems = [], []
    now = flatten(config.model_dump(mode="json"))
    # what the checkpoint's version did not know yet, it did as the default says
    defaults = RunConfig().model_dump(mode="json")
    before = flatten({section: defaults.get(section, {}) | keys for section, keys in meta["config"].items()})
    for key in sorted(now.keys() | before.keys()):
        was, wanted = before.get(key, "(absent)"), now.get(key, "(absent)")
        if was == wanted or _below(key, _FREE):
            continue
        change = f"{key}: {was!r} in the checkpoint, {wanted!r} now"
        (problems if _below(key, _FORBIDDEN) else notes).append(change)

    if meta["shards_fingerprint"] != shards_fingerprint:
        problems.append(
            f"data.shards: the shards have changed since the checkpoint (fingerprint {meta['shards_fingerprint'][:12]}, now "
            f"{shards_fingerprint[:12]}); point data.shards at the same shard set"
        )
    if meta["engine"] != config.engine.name:
        problems.append(f"engine.name: {meta['engine']!r} in the checkpoint, {config.engine.name!r} now")
    elif config.engine.name == "deepspeed":
        if meta["zero_stage"] != zero_stage:
            problems.append(
                f"ZeRO stage {meta['zero_stage']} in the checkpoint, {zero_stage} now: stages do not convert; use "
                f"--ds-config configs/ds/zero{meta['zero_stage']}.json"
            )
        if meta["world_size"] != world_size:
            problems.append(
                f"world size {meta['world_size']} in the checkpoint, {world_size} now: ZeRO partitions fit no other; "
                f"start {meta['world_size']} ranks"
            )
        precision = [note for note in notes if note.startswith("train.precision:")]
        problems += [f"{note}; ZeRO partitions are of one precision" for note in precision]
        notes = [note for note in notes if note not in precision]
    elif meta["world_size"] != world_size:
        notes.append(
            f"world size {meta['world_size']} in the checkpoint, {world_size} now: sums run in another order, so the loss "
            f"curve agrees to rounding only, and each rank's random state starts anew"
        )
    if problems:
        raise CheckpointError([*problems, "to change any of these, start a new run, from model.safetensors if you like"])
    return notes


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by dotted key; an empty dict is a leaf."""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{path}.{key}" if path else key)
    return flat


def _below(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)
