"""What there is to know about a checkpoint, or about all of a run, without loading any of it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open

from mpmae.checkpoint_format import (
    MODEL_NAME,
    abandoned,
    all_checkpoints,
    find_problems,
    leftovers,
    load_meta,
    newest_checkpoint,
)
from mpmae.checkpoint_tools.readers import read_layout, shown_layout
from mpmae.errors import CheckpointError

_NUM_FILES = 12


@dataclass(frozen=True)
class Described:
    """A complete checkpoint.

    next_batch: index in its epoch of the global batch that comes next. inputs: what the encoder reads, bands of an MP-MAE or
    domains of a MultiMAE; empty where an early version wrote none. num_parameters: by the first part of their names.
    files: bytes by name.
    """

    path: str
    step: int
    epoch: int
    next_batch: int
    engine: str
    world_size: int
    precision: str
    global_batch_size: int
    model: str
    inputs: tuple[str, ...]
    num_parameters: dict[str, int]
    files: dict[str, int]

    @property
    def num_bytes(self) -> int:
        """All files together."""
        return sum(self.files.values())


@dataclass(frozen=True)
class Listed:
    """A folder in a run's checkpoints. kind: complete, torn, abandoned, or unfinished (a save or removal cut off)."""

    name: str
    kind: str
    num_bytes: int
    problems: tuple[str, ...] = ()


def checkpoint_of(path: Path) -> Path:
    """The newest complete checkpoint of a run, or `path` itself if it is no run. Raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(f"no folder {path}; expected a run, or a checkpoint such as RUN/checkpoints/step-00000020")
    if is_run(path):
        newest = newest_checkpoint(path / "checkpoints")
        if newest is None:
            raise CheckpointError(f"run {path} has no complete checkpoint; `mpmae-checkpoint inspect` shows what there is")
        return newest
    return path


def is_run(path: Path) -> bool:
    """Whether a folder is a run's."""
    return (path / "checkpoints").is_dir()


def describe(checkpoint: Path) -> Described:
    """The facts of a complete checkpoint. Raises CheckpointError."""
    meta = load_meta(checkpoint)
    layout = read_layout(checkpoint)
    try:
        config = meta["config"]
        return Described(
            path=str(checkpoint),
            step=meta["step"],
            epoch=meta["epoch"],
            next_batch=meta["batch_index"],
            engine=shown_layout(layout) if layout else meta["engine"],
            world_size=meta["world_size"],
            precision=config["train"]["precision"],
            global_batch_size=config["train"]["global_batch_size"],
            model=config["model"]["name"],
            inputs=tuple(meta.get("domains_in") or meta.get("bands_in") or ()),
            num_parameters=_num_parameters(checkpoint / MODEL_NAME),
            files=meta["files"],
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint}: checkpoint.json lacks {error}; it is no checkpoint of a run") from error


def list_checkpoints(run_dir: Path) -> list[Listed]:
    """Every folder of a run's checkpoints, whole or not."""
    folder = run_dir / "checkpoints"
    listed = []
    for path in all_checkpoints(folder):
        problems = tuple(find_problems(path))
        listed.append(Listed(path.name, "torn" if problems else "complete", _num_bytes(path), problems))
    listed += [Listed(path.name, "abandoned", _num_bytes(path)) for path in abandoned(folder)]
    listed += [Listed(path.name, "unfinished", _num_bytes(path)) for path in leftovers(folder)]
    return listed


def facts(path: Path) -> dict[str, Any]:
    """What `inspect --json` prints."""
    found: dict[str, Any] = {}
    if path.is_dir() and is_run(path):
        found["checkpoints"] = [vars(entry) for entry in list_checkpoints(path)]
        newest = newest_checkpoint(path / "checkpoints")
        return found | {"newest": vars(describe(newest)) if newest else None}
    return vars(describe(checkpoint_of(path)))


def show(path: Path, console: Console) -> None:
    """Print the checkpoints of a run, and the newest one, or one checkpoint. Raises CheckpointError."""
    if path.is_dir() and is_run(path):
        table = Table(title=f"checkpoints of {path}", title_justify="left", box=None, padding=(0, 2))
        for name, justify in (("checkpoint", "left"), ("state", "left"), ("MB", "right"), ("what is wrong", "left")):
            table.add_column(name, justify=justify)
        for entry in list_checkpoints(path):
            colour = {"complete": "green", "torn": "red"}.get(entry.kind, "yellow")
            problems = "; ".join(entry.problems)
            table.add_row(entry.name, f"[{colour}]{entry.kind}[/{colour}]", _mb(entry.num_bytes), problems)
        console.print(table)
    _show_one(describe(checkpoint_of(path)), console)


def _show_one(found: Described, console: Console) -> None:
    table = Table(title=found.path, title_justify="left", show_header=False, box=None, padding=(0, 2))
    table.add_row("step", f"{found.step:,} (epoch {found.epoch}, next batch {found.next_batch})")
    table.add_row("written by", f"{found.engine}, {found.world_size} ranks, {found.precision}")
    total = sum(found.num_parameters.values())
    parts = ", ".join(f"{name} {count:,}" for name, count in sorted(found.num_parameters.items(), key=lambda i: -i[1])[:4])
    table.add_row("model", f"{found.model}, {total:,} numbers ({parts})")
    if found.inputs:
        table.add_row("reads", ", ".join(found.inputs))
    table.add_row("global batch", f"{found.global_batch_size:,}")
    table.add_row("size", f"{_mb(found.num_bytes)} MB in {len(found.files)} files")
    largest = sorted(found.files.items(), key=lambda item: -item[1])
    for name, num_bytes in largest[:_NUM_FILES]:
        table.add_row("", f"{_mb(num_bytes):>12} MB  {name}")
    if len(largest) > _NUM_FILES:
        rest = largest[_NUM_FILES:]
        table.add_row("", f"{_mb(sum(size for _, size in rest)):>12} MB  in {len(rest)} more")
    console.print(table)


def _num_parameters(path: Path) -> dict[str, int]:
    """Numbers of the whole model by the first part of their names; reads the header alone."""
    counts: dict[str, int] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                group = name.split(".")[0]
                counts[group] = counts.get(group, 0) + math.prod(file.get_slice(name).get_shape())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return counts


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f}"
