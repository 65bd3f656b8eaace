"""Whether a checkpoint may be continued under the present configuration, and the record that this is judged by."""

from typing import Any

from mpmae.config import RunConfig
from mpmae.errors import CheckpointError
from mpmae.shard_format import Manifest

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
# relative, of a run's losses, against the uninterrupted run: measured by tests/train/test_elastic.py, tests/engine
CURVE_BOUND = 1e-5
PRECISION_BOUND = 5e-3
_HASH_LENGTH = 12
_NUM_SHOWN = 5


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


def shard_hashes(manifest: Manifest) -> dict[str, dict[str, str]]:
    """Per split and shard the start of its hash: enough to name the shards that are no longer those of a checkpoint."""
    return {
        split: {shard.name: shard.sha256[:_HASH_LENGTH] for shard in shards} for split, shards in manifest.splits.items()
    }


def check_compatible(
    meta: dict[str, Any],
    config: RunConfig,
    shards_fingerprint: str,
    world_size: int,
    zero_stage: int | None = None,
    shards: dict[str, dict[str, str]] | None = None,
) -> list[str]:
    """Notes on what differs harmlessly between a checkpoint's `meta` and the run that wants to continue it.

    `shards`: `shard_hashes` of the run's set, to say which of them differ.
    Raises CheckpointError with every difference that forbids it: model or modalities, shards, what the order of the
    samples follows from (split, global batch size, seed, mode). Engine, ZeRO stage, number of ranks and precision are free.
    """
    notes, problems = [], []
    now = flatten(config.model_dump(mode="json"))
    # what the checkpoint's version did not know yet, it did as the default says
    family = {"name": meta["config"].get("model", {}).get("name", RunConfig().model.name)}
    defaults = RunConfig.model_validate({"model": family}).model_dump(mode="json")
    sections = defaults | meta["config"]
    before = flatten({section: defaults.get(section, {}) | keys for section, keys in sections.items()})
    is_other_model = now["model.name"] != before["model.name"]
    for key in sorted(now.keys() | before.keys()):
        was, wanted = before.get(key, "(absent)"), now.get(key, "(absent)")
        if was == wanted or _below(key, _FREE):
            continue
        if is_other_model and "(absent)" in (was, wanted):  # what only one family of models has says nothing more
            continue
        change = f"{key}: {was!r} in the checkpoint, {wanted!r} now"
        if key == "train.precision":
            change += f": the losses go on to within about {PRECISION_BOUND:g}"
        (problems if _below(key, _FORBIDDEN) else notes).append(change)

    if meta["shards_fingerprint"] != shards_fingerprint:
        problems.append(
            f"data.shards: the shards have changed since the checkpoint (fingerprint {meta['shards_fingerprint'][:12]}, now "
            f"{shards_fingerprint[:12]}): {_changed_shards(meta.get('shards'), shards)}; point data.shards at the same set"
        )
    if meta["world_size"] != world_size:
        notes.append(
            f"world size {meta['world_size']} in the checkpoint, {world_size} now: the same global batches, summed in "
            f"another order, so the losses agree to {CURVE_BOUND:g} in float32; each rank's random state starts anew"
        )
    if problems:
        raise CheckpointError([*problems, "to change any of these, start a new run, from model.safetensors if you like"])
    return notes


def _changed_shards(before: dict[str, dict[str, str]] | None, now: dict[str, dict[str, str]] | None) -> str:
    """Which shards differ, in words."""
    if before is None or now is None:
        return "the checkpoint does not name them"
    old, new = (
        {f"{split}/{name}": digest for split, names in shards.items() for name, digest in names.items()}
        for shards in (before, now)
    )
    changes = {
        "changed": [name for name in old.keys() & new.keys() if old[name] != new[name]],
        "gone": old.keys() - new.keys(),
        "new": new.keys() - old.keys(),
    }
    shown = []
    for word, names in changes.items():
        if names:
            more = f", ... ({len(names)})" if len(names) > _NUM_SHOWN else ""
            shown.append(f"{word} {', '.join(sorted(names)[:_NUM_SHOWN])}{more}")
    return "; ".join(shown) or "the shards are the same, their order, statistics or modality tables are not"


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
