"""`finetune`: every run of a fine-tuning evaluation, pretrained beside from scratch, and what they reach."""

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from mpmae.engine.world import World
from mpmae.errors import ConfigError
from mpmae.eval.classification import classification_setup
from mpmae.eval.dataset import LabelledSet, Task
from mpmae.eval.encoders import ImageEncoder, build_encoder, random_twin
from mpmae.eval.finetune_config import FinetuneConfig
from mpmae.eval.open_set import open_set
from mpmae.eval.plan import Run, class_labels, labels_identity, plan_runs
from mpmae.eval.prepare import Preparation
from mpmae.eval.probe import baseline_scores
from mpmae.eval.probe_config import ProbeConfig, ProbeSection
from mpmae.eval.results import print_results, write_results
from mpmae.eval.score_log import held
from mpmae.eval.scores import Score
from mpmae.eval.sweep import sweep
from mpmae.eval.training import Fitted, Setup, fit
from mpmae.eval.training_data import Examples
from mpmae.eval.training_state import RESULT_NAME
from mpmae.eval.tuned import write_tuned_config
from mpmae.eval.worlds import opened_world
from mpmae.export.config import WEIGHTS_NAME
from mpmae.models.interop import Weights, as_weights

# places, speed and what else may differ between the parts of a resumed run; its part of the labels is told apart
_FREE_KEYS = (
    "dataset.path",
    "dataset.label_fractions",
    "encoder.checkpoint",
    "finetune.baselines",
    "finetune.cache_bytes",
    "finetune.keep_weights",
    "finetune.save_interval_s",
)
SetupBuilder = Callable[[FinetuneConfig, Any, ImageEncoder, Preparation, int], Setup]


def finetune(config: FinetuneConfig, *, resume: bool = False, labelled: LabelledSet | None = None) -> list[Score]:
    """Scores on the test split of every run: encoders x label fractions x folds x seeds. Every rank calls it.

    Each run trains on its part of the labels, chooses the epoch on the validation split and reads the test split once.
    output.dir gets scores.json, results.md, results.png and, in runs/, a folder per run: metrics.jsonl, result.json and the
    best weights as model.safetensors with config.json, which `create_encoder` and `mpmae-export` read. resume: continue
    what output.dir holds. labelled: the set, if it is open already. With `config.inputs.subsets` all this once for each
    input: see `mpmae.eval.sweep`. Raises ConfigError, DatasetError, CheckpointError and TrainingError.
    """
    if config.inputs.subsets:
        return sweep(finetune, config, resume=resume, labelled=labelled)
    with opened_world(config.output.device) as world, held(config.output.dir) if world.rank == 0 else nullcontext():
        return _finetune(config, resume, labelled, world)


def _finetune(config: FinetuneConfig, resume: bool, labelled: LabelledSet | None, world: World) -> list[Score]:
    labelled = open_set(config.dataset, progress=world.rank == 0) if labelled is None else labelled
    if labelled.task.kind != "segmentation" and "segmentation" in config.model_fields_set:
        raise ConfigError(
            f"segmentation: {labelled.task.name} has classes of whole images ({labelled.task.kind}), no label maps; leave "
            "the section out, or give a set with label maps as dataset.path"
        )
    labels = class_labels(labelled, config.output.num_workers)
    runs = list(plan_runs(labelled, labels, config.dataset, config.output.seeds))
    weights = None if config.encoder.checkpoint is None else as_weights(config.encoder.checkpoint)
    like = build_encoder(config.encoder, weights, drop_path_rate=config.finetune.drop_path, task=labelled.task)
    preparation = Preparation(labelled.task, like.input, config.image)
    preparation(labelled.image(int(runs[0].splits["train"][0])))  # settles the sizes before anything is trained
    build = _setup_builder(labelled.task.kind)
    cache_bytes = config.finetune.cache_bytes
    examples = Examples(labelled, config.output.num_workers, cache_bytes)
    about = {"set": labelled.task.name, "samples": _ids_hash(labelled), "labels": labels_identity(labelled, labels)}
    fixed = {**_settings(config), **about}
    scores: list[Score] = []
    for run in runs:
        for kind, encoder in _encoders(config, weights, like, run.seed, labelled.task):
            folder = config.output.dir / "runs" / f"{kind}-{_name(run)}"
            own = {"encoder": encoder.fingerprint(), "label_fraction": run.label_fraction, "fold": run.fold}
            setup = build(config, labelled.task, encoder, preparation, run.seed)
            kept = examples if setup.prepares_alike else Examples(labelled, config.output.num_workers, cache_bytes)
            had_ended = (folder / RESULT_NAME).is_file()
            fitted = fit(
                setup,
                kept,
                run.splits,
                config.finetune,
                world,
                folder,
                seed=run.seed,
                resume=resume,
                identity={**fixed, **own},
                title=f"{kind} {_name(run)}",
            )
            scores.append(_score(setup, encoder.label, run, fitted))
            if world.rank == 0:
                if (folder / WEIGHTS_NAME).is_file():
                    source = weights if kind == "pretrained" else None
                    write_tuned_config(folder, setup.model, encoder, source, labelled.task, preparation.facts)
                has_best = not had_ended or (folder / WEIGHTS_NAME).is_file()
                if labelled.task.kind == "segmentation" and has_best:
                    _draw(folder, setup, labelled, run.splits["test"], world, f"{encoder.label}, {_name(run)}")
                write_results(config.output.dir, config, labelled, scores, _facts(preparation, like, labelled.task))
    if world.rank == 0:
        scores += _untrained(config, labelled, labels, runs)
        write_results(config.output.dir, config, labelled, scores, _facts(preparation, like, labelled.task))
        print_results(scores)
    return world.broadcast_object(scores)


def _encoders(
    config: FinetuneConfig, weights: Weights | None, like: ImageEncoder, seed: int, task: Task
) -> Iterator[tuple[str, ImageEncoder]]:
    """(what a folder is named, encoder) of each model that a run trains."""
    if weights is not None:
        yield "pretrained", copy.deepcopy(like)
    if weights is None or "random_init" in config.finetune.baselines:
        yield "scratch", random_twin(config.encoder, seed, config.finetune.drop_path, task)


def _facts(preparation: Preparation, like: ImageEncoder, task: Task) -> dict[str, Any]:
    unused = {"pooling"} if task.kind == "segmentation" else set()
    encoder = {key: value for key, value in like.facts.items() if key not in unused}
    return {"preparation": preparation.facts, "encoders": {like.label: encoder}}


def _name(run: Run) -> str:
    """For folders."""
    fold = "" if run.fold is None else f"-fold{run.fold}"
    return f"labels{100 * run.label_fraction:g}{fold}-seed{run.seed}"


def _setup_builder(kind: str) -> SetupBuilder:
    if kind != "segmentation":
        return classification_setup
    from mpmae.eval.segmentation import segmentation_setup

    return segmentation_setup


def _draw(folder: Path, setup: Setup, labelled: LabelledSet, indices: np.ndarray, world: World, title: str) -> None:
    from mpmae.eval.segmentation import draw_predictions

    title = f"{labelled.task.name}, test split: {setup.method}, {title}"
    draw_predictions(folder / "predictions.png", setup, labelled, indices, world.device, title)


def _untrained(config: FinetuneConfig, labelled: LabelledSet, labels: np.ndarray, runs: list[Run]) -> list[Score]:
    """Linear probes of features that nobody trained, for the same runs. They are of whole images: none for label maps."""
    names = [name for name in config.finetune.baselines if name != "random_init"]
    if labelled.task.kind == "segmentation" or not names:
        return []
    shared = {"output": config.output, "dataset": config.dataset, "encoder": config.encoder, "image": config.image}
    return baseline_scores(ProbeConfig(**shared, probe=ProbeSection(methods=("lbfgs",))), names, labelled, labels, runs)


def _score(setup: Setup, label: str, run: Run, fitted: Fitted) -> Score:
    task = setup.task
    chosen = {"best_epoch": fitted.best_epoch, "num_epochs": fitted.num_epochs}
    return Score(
        encoder=label,
        method=setup.method,
        task=task.name,
        split="test",
        metric=task.metric,
        metrics=fitted.test.metrics,
        seed=run.seed,
        num_train=len(run.splits["train"]),
        fold=run.fold,
        label_fraction=run.label_fraction,
        settings={**chosen, "val": fitted.val.metrics, "val_loss": fitted.val.loss, "test_loss": fitted.test.loss},
        per_sample=fitted.test.per_sample,
    )


def _settings(config: FinetuneConfig) -> dict[str, Any]:
    """What a resumed run must share with its beginning, by dotted key."""
    tree = config.model_dump(mode="json", exclude={"output"})
    flat = {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}
    return {key: value for key, value in flat.items() if key not in _FREE_KEYS}


def _ids_hash(labelled: LabelledSet) -> str:
    ids = "\n".join(labelled.sample_id(index) for index in range(len(labelled)))
    return hashlib.sha256(ids.encode()).hexdigest()
