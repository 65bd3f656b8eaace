"""Which initial weights train better: both `init`s of `create_model` on a real shard set, several seeds, two peak rates.

python benchmarks/init.py --shards build/real        (12 short runs; writes a record)
python benchmarks/init.py --shards build/real --steps 10 --seeds 1 --no-record

Each run is `mpmae.train.pretrain` with the demo's settings, on one rank; its folder is kept in --work by commit, so the same
command goes on after an interruption. The figure that counts is the relative loss on the validation split at the end: loss
over that of the trivial predictor (means and class frequencies), averaged over the modalities that the split has. An init is
judged at the better of its two rates. `convnextv2` trains no worse when its mean over the seeds is not above that of
`reference` by more than the larger of their two standard deviations.
"""

import argparse
import itertools
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from record import clean_commit, write_record
from rich.console import Console
from rich.table import Table

from mpmae.config import RunConfig, load_config
from mpmae.modalities import MODALITIES
from mpmae.models.init import INITS
from mpmae.provenance import commit
from mpmae.shard_files import load_manifest
from mpmae.train import pretrain
from mpmae.train.track import read_jsonl

REPO = Path(__file__).resolve().parents[1]
RATES = (5e-4, 1.5e-4)
NUM_POINTS = 10
NOTE = (
    "The published rule (blr 1.5e-4 scaled by the global batch over 256) gives a peak rate of about 1e-5 at batch 16, at "
    "which a run this short hardly moves; fixed peak rates are compared instead. The number of steps is what two shared "
    "CPU cores do in an hour. A short run on few tiles says which init starts to train sooner, not which is better after "
    "200 epochs."
)


def run_config(options: argparse.Namespace, folder: Path, init: str, lr: float, seed: int) -> RunConfig:
    """The demo's configuration with what this comparison varies."""
    every = max(1, options.steps // NUM_POINTS)
    changes = {
        "run.dir": folder / f"{init}-lr{lr:g}-seed{seed}",
        "data.shards": options.shards,
        "model.init": init,
        "optim.lr": lr,
        "train.seed": seed,
        "train.max_steps": options.steps,
        "train.validate_every_steps": every,
        "checkpoint.every_steps": every,
        "checkpoint.keep_last": 1,
        "checkpoint.resume": "auto",
        "engine.name": "ddp",
    }
    return load_config(REPO / "configs/run/demo.yaml", [f"{key}={value}" for key, value in changes.items()])


def finished(config: RunConfig) -> bool:
    """Whether the run's folder holds the validation of its last step."""
    lines = read_jsonl(config.run.dir / "validation.jsonl")
    return bool(lines) and lines[-1]["step"] == config.train.max_steps


def relative(losses: dict[str, float | None], trivial: dict[str, float | None]) -> dict[str, float]:
    """Loss over the trivial predictor's, by modality; those without a validation tile are left out."""
    return {name: loss / trivial[name] for name, loss in losses.items() if loss is not None}


def outcome(config: RunConfig) -> dict[str, Any]:
    """What a finished run's folder says: training loss in blocks, validation points, relative losses at the end."""
    metrics = read_jsonl(config.run.dir / "metrics.jsonl")
    block = max(1, config.train.max_steps // (2 * NUM_POINTS))
    training = [(part[-1]["step"], statistics.mean(line["loss"] for line in part)) for part in blocks_of(metrics, block)]
    points = []
    for line in read_jsonl(config.run.dir / "validation.jsonl"):
        ratios = relative(line["losses"], line["trivial"])
        pixel = [ratio for name, ratio in ratios.items() if MODALITIES[name].scope == "pixel"]
        point = {
            "step": line["step"],
            "relative": statistics.mean(ratios.values()),
            "relative_pixel": statistics.mean(pixel),
        }
        point["relative_total"] = sum(line["losses"][n] for n in ratios) / sum(line["trivial"][n] for n in ratios)
        points.append(point | {"by_modality": ratios})
    return {
        "init": config.model.init,
        "lr": config.optim.lr,
        "seed": config.train.seed,
        "training": {"step": [step for step, _ in training], "loss": [loss for _, loss in training]},
        "validation": points,
        "max_grad_norm": max(line["grad_norm"] for line in metrics),
        "images_per_s": statistics.median(line["images_per_s"] for line in metrics),
    }


def blocks_of(lines: list[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    """Consecutive blocks of `size` lines; a rest is left out."""
    return [lines[i : i + size] for i in range(0, len(lines) - size + 1, size)]


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds by init and rate, the better rate of each init, and the verdict."""
    table: dict[str, dict[str, Any]] = {}
    for init, lr in dict.fromkeys((run["init"], run["lr"]) for run in runs):
        ends = [run["validation"][-1] for run in runs if (run["init"], run["lr"]) == (init, lr)]
        row = {}
        for key in ("relative", "relative_pixel", "relative_total"):
            values = [end[key] for end in ends]
            row[key] = {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}
            row[key]["seeds"] = values
        names = ends[0]["by_modality"]
        row["by_modality"] = {name: statistics.mean(end["by_modality"][name] for end in ends) for name in names}
        table.setdefault(init, {})[f"{lr:g}"] = row
    best = {init: min(rates, key=lambda lr, r=rates: r[lr]["relative"]["mean"]) for init, rates in table.items()}
    reference, ours = (table[init][best[init]]["relative"] for init in ("reference", "convnextv2"))
    allowed = max(reference["std"], ours["std"])
    no_worse = ours["mean"] <= reference["mean"] + allowed
    return {"by_init": table, "best_lr": best, "convnextv2_no_worse": no_worse}


def show(console: Console, summary: dict[str, Any]) -> None:
    """Print the comparison."""
    table = Table(title="validation loss over the trivial predictor's, mean over modalities")
    for column in ("init", "peak lr", "mean", "std", "seeds"):
        table.add_column(column)
    for init, rates in summary["by_init"].items():
        for lr, row in rates.items():
            values = row["relative"]
            mark = " *" if summary["best_lr"][init] == lr else ""
            seeds = " ".join(f"{value:.4f}" for value in values["seeds"])
            table.add_row(init, lr + mark, f"{values['mean']:.4f}", f"{values['std']:.4f}", seeds)
    console.print(table)
    console.print(f"convnextv2 trains no worse: {summary['convnextv2_no_worse']}")


def main() -> None:
    """Do the runs that are not there yet, then write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=REPO / "build" / "init", help="where the runs are kept")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    source = commit() if options.no_record else clean_commit()
    manifest = load_manifest(options.shards)
    key = f"{(source['commit'] or 'none')[:10]}-{manifest.fingerprint[:8]}-{options.steps}steps"
    console = Console(width=160, highlight=False)
    configs = [  # seed by seed, so that a noisy spell or an interruption does not fall on one init alone
        run_config(options, options.work / key, init, lr, seed)
        for seed, lr, init in itertools.product(range(options.seeds), RATES, INITS)
    ]
    for number, config in enumerate(configs):
        console.rule(f"run {number + 1}/{len(configs)}: {config.run.dir.name}", align="left")
        if finished(config):
            console.print("done before")
            continue
        pretrain(config)
        shutil.rmtree(config.run.dir / "checkpoints")
    runs = [outcome(config) for config in configs]
    summary = summarise(runs)
    show(console, summary)
    if options.no_record:
        return
    first = configs[0]
    case = {
        "model": first.model.name,
        "img_size": first.model.img_size,
        "patch_size": first.model.patch_size,
        "engine": first.engine.name,
        "ranks": 1,
        "precision": first.train.precision,
        "global_batch_size": first.train.global_batch_size,
        "steps": options.steps,
        "warmup_steps": first.optim.warmup_steps,
        "peak_lrs": RATES,
        "seeds": list(range(options.seeds)),
        "shards": {"name": manifest.source.name, "fingerprint": manifest.fingerprint},
        "num_samples": {split: manifest.num_samples(split) for split in (first.data.train_split, first.data.val_split)},
        "note": NOTE,
    }
    results = json.loads(json.dumps({**summary, "runs": runs}))
    print(f"record: {write_record('initial weights', case, results)}")


if __name__ == "__main__":
    main()
