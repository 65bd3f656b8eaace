"""What a result was made with: versions and hardware of this process, and the commit of the source tree."""

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "mpmae",
    "torch",
    "deepspeed",
    "numpy",
    "h5py",
    "cramjam",
    "numba",
    "pydantic",
    "triton",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
)


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
