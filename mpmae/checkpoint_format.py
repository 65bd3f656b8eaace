"""The layout of a run's checkpoints, shared by those who write and those who read them.

    run.dir/checkpoints/
      latest                     text: step-00000020
      step-00000020/
        checkpoint.json          step, data position, configuration, ...; the files and their sizes; written last
        model.safetensors        the whole model, float32
        engine/                  optimizer, ZeRO partitions, random state; layout.json says what can load them as they are
      step-00000030.partial/     a save that is under way, or that a crash cut off
      step-00000040.abandoned/   what a run that went back to an earlier step had reached before

A folder without `.partial` is whole. Reading it needs no deepspeed.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from mpmae.errors import CheckpointError

FORMAT_VERSION = 1
META_NAME = "checkpoint.json"
MODEL_NAME = "model.safetensors"
MMEARTH_NAME = "checkpoint.pth"  # of an export in the layout of the published pretraining code
ENGINE_FOLDER = "engine"
LAYOUT_NAME = "layout.json"
LATEST_NAME = "latest"
PARTIAL = ".partial"
ABANDONED = ".abandoned"
_LOG = logging.getLogger(__name__)


def folder_name(step: int) -> str:
    """The name of the checkpoint folder of a step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step of a folder named like a checkpoint, else None."""
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else None


def all_checkpoints(folder: Path) -> list[Path]:
    """Folders named like checkpoints, oldest first."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir() and step_of(p) is not None), key=step_of)


def abandoned(folder: Path) -> list[Path]:
    """Checkpoints that a run has gone back behind, the one written first first."""
    found = [p for p in folder.glob(f"step-*{ABANDONED}") if p.is_dir()]
    return sorted(found, key=lambda path: (path.stat().st_mtime, path.name))


def leftovers(folder: Path) -> list[Path]:
    """Folders of saves and removals that are under way, or that a crash cut off."""
    return sorted(p for p in folder.glob(f"step-*{PARTIAL}") if p.is_dir())


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint folder of any kind; cut off, it no longer looks like a checkpoint. Raises OSError."""
    partial = path if path.name.endswith(PARTIAL) else path.with_name(path.name + PARTIAL)
    if partial != path:
        path.rename(partial)
    shutil.rmtree(partial)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None. A torn one is passed over with a warning that names it."""
    for path in reversed(all_checkpoints(folder)):
        problems = find_problems(path)
        if not problems:
            return path
        _LOG.warning("checkpoint %s is torn, looking for an older one: %s", path, "; ".join(problems))
    return None


def load_meta(checkpoint: str | Path) -> dict[str, Any]:
    """checkpoint.json of a complete checkpoint. Raises CheckpointError: absent, torn, or of a newer version."""
    path = Path(checkpoint)
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint {path}; checkpoint.resume takes a folder such as checkpoints/step-00000020")
    problems = find_problems(path)
    if problems:
        raise CheckpointError([f"checkpoint {path} is torn: {problem}; use an older one" for problem in problems])
    return json.loads((path / META_NAME).read_text())


def find_problems(checkpoint: Path) -> list[str]:
    """What keeps a folder from being a complete checkpoint; empty if it is one."""
    path = checkpoint / META_NAME
    try:
        meta = json.loads(path.read_text())
        version, files = meta["format_version"], meta["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{META_NAME} is absent or unreadable ({type(error).__name__}: {error})"]
    if not isinstance(files, dict):
        return [f"{META_NAME} lists no files"]
    if version != FORMAT_VERSION:
        return [f"{META_NAME} has format version {version}, this program reads {FORMAT_VERSION}"]
    problems = []
    for name, num_bytes in files.items():
        file = checkpoint / name
        if not file.is_file():
            problems.append(f"{name} is absent")
        elif file.stat().st_size != num_bytes:
            problems.append(f"{name} has {file.stat().st_size} bytes, expected {num_bytes}")
    return problems
