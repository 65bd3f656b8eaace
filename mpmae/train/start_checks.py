"""Whether all ranks are about to do the same: configuration, shards and code, compared before the first step."""

import hashlib
import importlib.util
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import mpmae
from mpmae.config import RunConfig
from mpmae.engine import World
from mpmae.errors import ConfigError
from mpmae.shard_format import Manifest
from mpmae.train.compatibility import flatten

# where the bytes come from may differ from node to node; which bytes they are is in fingerprints of shards and labelled set
_OF_A_NODE = ("data.shards", "data.storage_options", "data.cache_dir", "data.cache_size_gb", "probe.dataset")
_SOURCES = (".py", ".cu", ".cuh")
_NUM_LISTED = 8


def facts_of(config: RunConfig, ds_config: dict[str, Any] | None, manifest: Manifest) -> dict[str, str]:
    """What has to be the same on every rank, as text by dotted key."""
    tree = flatten(config.model_dump(mode="json")) | flatten({"ds_config": ds_config or {}})
    facts = {key: str(value) for key, value in tree.items() if not key.startswith(_OF_A_NODE)}
    facts["the manifest of data.shards"] = manifest.fingerprint[:16]
    facts["the code of mpmae"] = f"{mpmae.__version__}, sources {source_digest()}"
    facts["python"] = ".".join(platform.python_version_tuple()[:2])
    facts["torch"] = torch.__version__
    if ds_config:
        facts["deepspeed"] = metadata.version("deepspeed")
    return facts


def source_digest() -> str:
    """A hash of the source files that compute: those of mpmae and of its kernels, wherever these are installed."""
    digest = hashlib.sha256()
    for package in ("mpmae", "mpmae.kernels"):
        root = Path(importlib.util.find_spec(package).origin).parent
        for path in sorted(path for path in root.rglob("*") if path.suffix in _SOURCES):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def check_same(facts: dict[str, str], world: World) -> None:
    """Collective. Raises ConfigError on every rank, with the keys and ranks that differ from rank 0."""
    text = "\0".join(f"{key}={value}" for key, value in sorted(facts.items()))
    digests = world.gather_objects(hashlib.sha256(text.encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    problems = differences(world.gather_objects(facts))
    raise ConfigError([*problems, "start every rank with the same command, configuration, code and shards"])


def differences(facts: list[dict[str, str]]) -> list[str]:
    """One text for each key whose value is not the same on all ranks; facts: of each rank."""
    problems = []
    for key in sorted(set().union(*facts)):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, own in enumerate(facts):
            ranks_by_value.setdefault(own.get(key, "(absent)"), []).append(rank)
        if len(ranks_by_value) > 1:
            parts = [f"{value} on {_ranks(ranks)}" for value, ranks in ranks_by_value.items()]
            problems.append(f"{key} differs: {', '.join(parts)}")
    return problems


def idle_gpus_note(world: World) -> str | None:
    """A note when this node has more GPUs than ranks; with fewer, `init_world` refuses."""
    num_gpus = torch.cuda.device_count() if world.device.type == "cuda" else 0
    if num_gpus <= world.local_world_size:
        return None
    return (
        f"{world.local_world_size} ranks on this node, but it has {num_gpus} GPUs: {num_gpus - world.local_world_size} idle"
    )


def _ranks(ranks: list[int]) -> str:
    more = len(ranks) - _NUM_LISTED
    shown = ", ".join(map(str, ranks[:_NUM_LISTED])) + (f" and {more} more" if more > 0 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"
