"""Does pretraining help? A few labelled images, classified from features of random and of pretrained encoders.

python benchmarks/downstream.py --tiles DIR --labelled eurosat_ms_270.h5      (pretrains 7 times, probes; writes a record)
python benchmarks/downstream.py --tiles DIR --labelled FILE --steps 4 --seeds 1 --no-record

--tiles is a folder in MMEarth's layout, --labelled an HDF5 file of Sentinel-2 L1C images with classes. For every seed one
encoder is pretrained on Sentinel-2 alone and one on all modalities, for the same number of steps, and for the first seed one
on all maps without the targets of whole tiles. Then kNN and linear probes run in five folds, once a seed, beside the same
encoder with random weights, statistics of the images and random convolutions (`mpmae.eval.probe`). Everything is kept in
--work, so the same command goes on after an interruption.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from downstream_runs import BATCH_SIZE, PEAK_LR, REPO, STEPS, VARIANTS, losses, pretrain_all
from record import clean_commit, write_record
from rich.console import Console

from mpmae.config_tree import validate_tree
from mpmae.eval.probe import probe
from mpmae.eval.probe_config import ProbeConfig
from mpmae.eval.scores import Score
from mpmae.eval.tables import results_table, standings, terminal

NUM_FOLDS = 5
METHODS = ("knn", "ridge", "lbfgs")
BASELINES = ("random_init", "image_statistics", "random_convolutions")


def probe_config(
    options: argparse.Namespace, folder: Path, seed: int, baselines: Sequence[str], methods: Sequence[str] = METHODS
) -> ProbeConfig:
    """The evaluation of one pretraining; baselines take bands and statistics from its checkpoint, so all see the same."""
    tree: dict[str, Any] = {
        "output": {"dir": str(options.work / "probes" / folder.name), "seeds": [seed]},
        "dataset": {"path": str(options.labelled), "product_level": "l1c", "num_folds": NUM_FOLDS},
        "encoder": {"checkpoint": str(folder)},
        "probe": {"methods": list(methods), "baselines": list(baselines)},
    }
    return validate_tree(ProbeConfig, tree, "benchmarks/downstream.py")


def all_scores(options: argparse.Namespace, folders: dict[tuple[str, int], Path]) -> list[Score]:
    """Test scores, baselines first; the encoder of a seed is probed with that seed's folds."""
    baselines, pretrained = [], []
    for (variant, seed), folder in folders.items():
        config = probe_config(options, folder, seed, BASELINES if variant == next(iter(VARIANTS)) else ())
        for score in probe(config, resume=True):
            if score.encoder == str(folder):
                pretrained.append(dataclasses.replace(score, encoder=f"pretrained, {variant}"))
            else:
                baselines.append(score)
    return baselines + pretrained


def as_results(scores: Sequence[Score], folders: dict[tuple[str, int], Path]) -> dict[str, Any]:
    """What the record holds: the table, its rows as numbers, and of which commits the pretrainings are."""
    table, rows = results_table(scores), []
    for row in standings(scores):
        rows.append(dataclasses.asdict(row.summary) | {"over_images": row.images, "gain_on_random_init": row.gain})
    commits = sorted({json.loads((folder / "run.json").read_text())["commit"] for folder in folders.values()})
    return {
        "table": dataclasses.asdict(table),
        "rows": rows,
        "losses": losses(folders),
        "pretraining_commits": commits,
    }


def arguments(description: str) -> argparse.Namespace:
    """The command line of both downstream benchmarks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=Path, required=True, help="folder in MMEarth's layout, for pretraining")
    parser.add_argument("--labelled", type=Path, required=True, help="HDF5 file with images and classes")
    parser.add_argument("--work", type=Path, default=REPO / "build" / "downstream", help="where runs and probes are kept")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--no-record", action="store_true")
    return parser.parse_args()


def as_case(options: argparse.Namespace) -> dict[str, Any]:
    """What the records say of what was run."""
    return {
        "labelled": options.labelled.name,
        "tiles": options.tiles.name,
        "model": "mpmae_atto",
        "steps": options.steps,
        "batch_size": BATCH_SIZE,
        "peak_lr": PEAK_LR,
        "seeds": options.seeds,
        "folds": NUM_FOLDS,
    }


def main() -> None:
    """Pretrain what is not there yet, probe, and write the record."""
    options = arguments(__doc__)
    if not options.no_record:
        clean_commit()
    console = Console()
    folders = pretrain_all(options.tiles, options.work, options.seeds, options.steps, console)
    scores = all_scores(options, folders)
    console.print(terminal(results_table(scores)))
    if not options.no_record:
        path = write_record("downstream", as_case(options), as_results(scores, folders))
        console.print(f"record: {path.relative_to(REPO)}")


if __name__ == "__main__":
    main()
