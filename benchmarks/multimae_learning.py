"""A MultiMAE trained from scratch on real tiles: does the loss of every domain fall, and below what knows only means?

python benchmarks/multimae_learning.py --tiles DIR      (a run of 400 steps; writes a record)

The run is kept in --work, so the same command goes on after an interruption.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from downstream_runs import REPO, pretrain_one
from record import clean_commit, write_record
from rich.console import Console

from mpmae.config import RunConfig, load_config
from mpmae.files import read_jsonl

STEPS, BATCH_SIZE, PEAK_LR = 400, 32, 1e-3
NUM_POINTS = 20


def run_config(work: Path, model: str, steps: int) -> RunConfig:
    """The published recipe with another size, batch and rate."""
    every = max(1, steps // NUM_POINTS)
    changes = {
        "model.name": model,
        "run.dir": work / f"{model}-{steps}",
        "data.shards": work / "shards",
        "data.num_workers": 1,
        "optim.lr": PEAK_LR,
        "optim.warmup_steps": steps // 10,
        "train.max_steps": steps,
        "train.global_batch_size": BATCH_SIZE,
        "train.validate_every_steps": every,
        "train.precision": "fp32",
        "checkpoint.every_steps": every,
        "checkpoint.keep_last": 1,
        "checkpoint.resume": "auto",
    }
    return load_config(
        REPO / "configs/run/multimae_base_mmearth64.yaml", [f"{key}={value}" for key, value in changes.items()]
    )


def curves(folder: Path) -> dict[str, Any]:
    """By target: the training loss, a mean over the steps before each validation, and validation and trivial losses."""
    steps, validation = read_jsonl(folder / "metrics.jsonl"), read_jsonl(folder / "validation.jsonl")
    found, before = {}, 0
    for line in validation:
        for name, loss in line["losses"].items():
            part = [step["losses"][name] for step in steps if before < step["step"] <= line["step"]]
            row = found.setdefault(name, {"training": [], "validation": [], "trivial": line["trivial"][name]})
            row["training"].append(statistics.mean(value for value in part if value is not None))
            row["validation"].append(loss)
        before = line["step"]
    return {"steps": [line["step"] for line in validation], "targets": found}


def main() -> None:
    """Train if need be, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=Path, required=True, help="folder in MMEarth's layout")
    parser.add_argument("--work", type=Path, default=REPO / "build" / "multimae", help="where shards and run are kept")
    parser.add_argument("--model", default="multimae_tiny")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    if not options.no_record:
        clean_commit()
    console = Console()
    config = run_config(options.work, options.model, options.steps)
    pretrain_one(config, options.tiles, options.work, console)
    results = curves(config.run.dir)
    results["pretraining_commit"] = json.loads((config.run.dir / "run.json").read_text())["commit"]
    for name, row in results["targets"].items():
        console.print(f"{name}: {row['validation'][0]:.3f} -> {row['validation'][-1]:.3f}, trivial {row['trivial']:.3f}")
    if not options.no_record:
        case = {"tiles": options.tiles.name, "model": options.model, "batch_size": BATCH_SIZE, "peak_lr": PEAK_LR}
        path = write_record("multimae learning", case | {"steps": options.steps}, results)
        console.print(f"record: {path.relative_to(REPO)}")


if __name__ == "__main__":
    main()
