"""Run folders as a run leaves them, without running anything."""

import json
import os
from pathlib import Path

import numpy as np

from mpmae.config import load_config
from mpmae.modalities import TARGETS

NOW = 1_800_000_000.0


def make_run(
    folder: Path,
    num_steps: int = 40,
    total_steps: int = 40,
    modalities=TARGETS,
    seed: int = 0,
    idle_s: float = 5.0,
    resumed_at: int | None = None,
    probes: dict[int, dict] | None = None,
    settings: tuple[str, ...] = (),
    **facts,
) -> Path:
    """A folder with run.json, metrics.jsonl and validation.jsonl; the curves fall and have noise, spikes and gaps.

    probes: scores by step; of step 0 in a line of its own.
    """
    rng = np.random.default_rng(seed)
    config = load_config(None, [f"run.dir={folder}", "train.global_batch_size=64", *settings])
    folder.mkdir(parents=True)
    (folder / ".lock").touch()
    record = {
        "config": config.model_dump(mode="json"),
        "environment": {"python": "3.11.7", "gpu": None, "packages": {"torch": "2.13.0"}},
        "ds_config": None,
        "commit": "0123456789abcdef",
        "dirty": False,
        "world_size": 2,
        "total_steps": total_steps,
        "num_parameters": 7_000_000,
        **facts,
    }
    (folder / "run.json").write_text(json.dumps(record))
    lines = [_line(step, step / num_steps, modalities, rng, resumed_at) for step in range(1, num_steps + 1)]
    probes = {step: {"probe": scores} for step, scores in (probes or {}).items()}
    before = [{"step": 0, **probes[0]}] if 0 in probes else []
    _write(folder / "metrics.jsonl", [*before, *(line | probes.get(line["step"], {}) for line in lines)])
    every = max(1, num_steps // 5)
    _write(folder / "validation.jsonl", [{**line, "loss": line["loss"] + 0.05} for line in lines[every - 1 :: every]])
    if resumed_at:
        (folder / f"run-until-step-{resumed_at:08d}.json").write_text("{}")
        _write(folder / "metrics.dropped.jsonl", lines[resumed_at : resumed_at + 3])
    for path in folder.iterdir():
        os.utime(path, (NOW - idle_s, NOW - idle_s))
    return folder


def _line(step, progress, modalities, rng, resumed_at):
    losses = {
        name: (1 + index) * (0.3 + np.exp(-4 * progress)) * rng.lognormal(0, 0.1) for index, name in enumerate(modalities)
    }
    if "canopy_height_eth" in losses and step % 7 == 0:
        losses["canopy_height_eth"] = None
    loss = sum(value or 0 for value in losses.values()) / len(losses) * (6 if rng.random() < 0.002 else 1)
    launched = resumed_at if resumed_at and step > resumed_at else 0
    rates = {"images_per_s": 100.0 + step % 3, "running_s": 36.0 * (step - launched)}
    return {"step": step, "loss": loss, "losses": losses, **rates}


def _write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
