"""run.json: what exactly ran, where and from which commit."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mpmae.config import RunConfig
from mpmae.files import write_whole

_PACKAGES = ("mpmae", "torch", "deepspeed", "numpy", "h5py", "cramjam", "numba", "pydantic")


def environment() -> dict[str, Any]:
    """Versions and hardware of this process."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def commit(ignored: Sequence[str] = ()) -> dict[str, Any]:
    """Commit of the source tree and whether it has uncommitted changes; None values outside a git checkout.

    Changes in the folders `ignored` (relative to the top of the checkout) do not count.
    """

    def git(*arguments: str) -> str | None:
        try:
            folder = Path(__file__).resolve().parent
            done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--", ":/", *(f":(top,exclude){folder}" for folder in ignored))
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _without_secrets(argument: str, config: RunConfig) -> str:
    return argument.replace(str(config.data.shards), config.model_dump(mode="json")["data"]["shards"])


def write_run_json(
    config: RunConfig, ds_config: dict[str, Any] | None, facts: dict[str, Any], resumed_from: Path | None, start_step: int
) -> None:
    """Write run.json into the run folder, whole or not at all; that of an earlier launch stays as run-until-step-N.json."""
    record = {
        "command": [_without_secrets(argument, config) for argument in sys.argv],
        "config": config.model_dump(mode="json"),
        "ds_config": ds_config,
        "environment": environment(),
        **commit(),
        **facts,
        "resumed_from": str(resumed_from) if resumed_from else None,
    }
    path = config.run.dir / "run.json"
    if path.exists():
        path.rename(path.with_name(f"run-until-step-{start_step:08d}.json"))
    write_whole(path, json.dumps(record, indent=1) + "\n")
