"""The pretraining runs that `downstream.py` compares: which, and how long."""

import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console

from mpmae.config import RunConfig, load_config
from mpmae.files import read_jsonl
from mpmae.modalities import MODALITIES, TARGETS
from mpmae.shard_tools.build import build
from mpmae.train import pretrain

REPO = Path(__file__).resolve().parents[1]
STEPS, BATCH_SIZE, PEAK_LR = 300, 32, 1e-3
_MAPS = tuple(name for name in TARGETS if MODALITIES[name].scope == "pixel")
VARIANTS = {"Sentinel-2 only": ("sentinel2",), "all modalities": TARGETS, "all maps": _MAPS}
ONE_SEED = ("all maps",)  # tells what the tile targets do; one run is enough for that


def run_config(work: Path, variant: str, seed: int, steps: int = STEPS, **more: Any) -> RunConfig:
    """The configuration of one pretraining. more: dotted keys that differ."""
    changes = {
        "model.modalities_out": f"[{', '.join(VARIANTS[variant])}]",
        "run.dir": work / f"{variant.replace(' ', '-').lower()}-seed{seed}",
        "data.shards": work / "shards",
        "data.num_workers": 1,
        "optim.lr": PEAK_LR,
        "optim.warmup_steps": steps // 10,
        "train.seed": seed,
        "train.max_steps": steps,
        "train.global_batch_size": BATCH_SIZE,
        "train.val_samples": None,
        "checkpoint.every_steps": max(1, steps // 4),
        "checkpoint.keep_last": 1,
        "checkpoint.resume": "auto",
        "engine.name": "ddp",
        **more,
    }
    overrides = [f"{key}={'null' if value is None else value}" for key, value in changes.items()]
    return load_config(REPO / "configs/run/demo.yaml", overrides)


def pretrain_all(source: Path, work: Path, seeds: int, steps: int, console: Console) -> dict[tuple[str, int], Path]:
    """The run folders by variant and seed; runs that are not finished are begun or continued."""
    folders = {}
    for variant in VARIANTS:
        for seed in range(1 if variant in ONE_SEED else seeds):
            config = run_config(work, variant, seed, steps)
            pretrain_one(config, source, work, console)
            folders[variant, seed] = config.run.dir
    return folders


def pretrain_one(config: RunConfig, source: Path, work: Path, console: Console) -> None:
    """Begin or continue a run that is not finished. SystemExit when it was stopped."""
    if not (work / "shards" / "manifest.json").exists():
        build(source, work / "shards")
    if _is_finished(config):
        return
    console.rule(f"pretraining, {config.run.dir.name}")
    if stopped := pretrain(config):
        raise SystemExit(f"stopped by {stopped.reason} after step {stopped.step}; the same command goes on")


def losses(folders: dict[tuple[str, int], Path]) -> dict[str, dict[str, dict[str, float]]]:
    """Variant -> modality -> losses at the end, mean of the seeds: training (last tenth of the steps), validation, trivial.

    A training loss far below that of the validation split has been learnt by heart. Modalities without a tile are left out.
    """
    found: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for (variant, _), folder in folders.items():
        steps, last = read_jsonl(folder / "metrics.jsonl"), read_jsonl(folder / "validation.jsonl")[-1]
        for name, loss in last["losses"].items():
            trained = [
                step["losses"][name] for step in steps[-max(1, len(steps) // 10) :] if step["losses"][name] is not None
            ]
            if loss is not None and trained:
                row = sum(trained) / len(trained), loss, last["trivial"][name]
                found.setdefault(variant, {}).setdefault(name, []).append(row)
    keys = ("training", "validation", "trivial")
    return {
        variant: {
            name: dict(zip(keys, map(statistics.mean, zip(*rows, strict=True)), strict=True)) for name, rows in names.items()
        }
        for variant, names in found.items()
    }


def _is_finished(config: RunConfig) -> bool:
    record = config.run.dir / "run.json"
    if record.exists():
        steps = json.loads(record.read_text())["config"]["train"]["max_steps"]
        if steps != config.train.max_steps:
            asked = config.train.max_steps
            raise SystemExit(f"{config.run.dir} is a run of {steps} steps, not {asked}; give another --work")
    lines = read_jsonl(config.run.dir / "validation.jsonl")
    return bool(lines) and lines[-1]["step"] == config.train.max_steps
