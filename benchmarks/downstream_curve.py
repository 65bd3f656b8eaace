"""How features of Sentinel-2 pretraining move with its steps, beside random weights: is a short run a poor one?

python benchmarks/downstream_curve.py --tiles DIR --labelled eurosat_ms_270.h5      (one run, probed often; a record)

The run is that of `downstream.py`'s first seed, with its checkpoints kept; each is probed by nearest neighbours and ridge in
the same five folds. Everything is kept in --work, so the same command goes on after an interruption.
"""

import statistics

from downstream import arguments, as_case, probe_config
from downstream_runs import REPO, VARIANTS, pretrain_one, run_config
from record import clean_commit, write_record
from rich.console import Console

from mpmae.checkpoint_format import all_checkpoints, step_of
from mpmae.eval.probe import probe
from mpmae.eval.scores import Score
from mpmae.files import read_jsonl

EVERY_STEPS = 20
METHODS = ("knn", "ridge")


def means(scores: list[Score]) -> dict[str, float]:
    """Mean accuracy of the folds by method."""
    methods = dict.fromkeys(score.method for score in scores)
    return {method: statistics.mean(score.value for score in scores if score.method == method) for method in methods}


def main() -> None:
    """Pretrain if need be, probe each checkpoint, and write the record."""
    options = arguments(__doc__)
    if not options.no_record:
        clean_commit()
    console, variant = Console(), next(iter(VARIANTS))
    often = {"checkpoint.every_steps": EVERY_STEPS, "checkpoint.keep_last": 1000, "train.validate_every_steps": EVERY_STEPS}
    config = run_config(options.work, variant, 0, options.steps, **often, **{"run.dir": options.work / "curve"})
    pretrain_one(config, options.tiles, options.work, console)
    validation = {line["step"]: line["losses"]["sentinel2"] for line in read_jsonl(config.run.dir / "validation.jsonl")}
    points, random_init = [], {}
    for checkpoint in all_checkpoints(config.run.dir / "checkpoints"):
        baselines = () if random_init else ("random_init",)
        scores = probe(probe_config(options, checkpoint, 0, baselines, METHODS), resume=True)
        own = [score for score in scores if score.encoder == str(checkpoint)]
        random_init = random_init or means([score for score in scores if score not in own])
        step = step_of(checkpoint)
        points.append({"step": step, "sentinel2_loss": validation[step], "accuracy": means(own)})
        console.print(points[-1])
    if options.no_record:
        return
    results = {"points": points, "random_init": random_init}
    console.print(f"record: {write_record('downstream curve', as_case(options), results).relative_to(REPO)}")


if __name__ == "__main__":
    main()
