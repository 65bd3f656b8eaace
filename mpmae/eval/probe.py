"""`probe`: what the features of an encoder are good for without training it, beside features that nobody trained."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from torch import Tensor

from mpmae.errors import ConfigError
from mpmae.eval.baselines import baseline_source, encoder_source
from mpmae.eval.dataset import LabelledSet
from mpmae.eval.devices import find_device
from mpmae.eval.encoders import RANDOM_INIT, ImageEncoder, open_encoder
from mpmae.eval.features import Source, kept_features, set_identity
from mpmae.eval.methods import Division, method_names, run_method
from mpmae.eval.open_set import open_set
from mpmae.eval.plan import Run, class_labels, labels_identity, plan_runs
from mpmae.eval.probe_config import ProbeConfig
from mpmae.eval.results import CONFIG_NAME, print_results, write_results
from mpmae.eval.score_log import Key, open_log
from mpmae.eval.scores import Score
from mpmae.eval.sweep import sweep
from mpmae.eval.tables import percent
from mpmae.files import write_whole

_ENCODER = "encoder"
_LABELS = {"image_statistics": "image statistics", "random_convolutions": "random convolutions", "random_init": RANDOM_INIT}
# what may grow or move between the parts of a resumed evaluation: single scores do not depend on it
_FREE_KEYS = {
    "output": None,
    "dataset": {"path", "label_fractions"},
    "probe": {"methods", "ks", "baselines", "features_dir"},
}


def probe(config: ProbeConfig, *, resume: bool = False, labelled: LabelledSet | None = None) -> list[Score]:
    """Scores on the test split: encoder and baselines x methods x label fractions x folds x seeds.

    Settings are chosen on the validation split; each run reads the test labels once. output.dir gets scores.json,
    results.md, results.png, config.yaml, scores.jsonl (as they are reached) and features/. resume: go on with what is in
    output.dir; methods, fractions, seeds and baselines may have been added. labelled: the set, if it is open already. With
    `config.inputs.subsets` all this once for each input: see `mpmae.eval.sweep`. Raises ConfigError, DatasetError and
    CheckpointError.
    """
    if config.inputs.subsets:
        return sweep(probe, config, resume=resume, labelled=labelled)
    device = find_device(config.output.device)
    labelled = open_set(config.dataset) if labelled is None else labelled
    task = labelled.task
    if task.kind == "segmentation":
        raise ConfigError(f"{task.name} asks for label maps, which have no single feature vector; use launch/finetune.py")
    encoder = None if config.encoder.checkpoint is None else open_encoder(config.encoder, task=task)
    labels = class_labels(labelled, config.output.num_workers)
    identity = _identity(config, labelled, labels, encoder)
    with open_log(config.output.dir, identity, resume) as log:
        write_whole(config.output.dir / CONFIG_NAME, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        features = _Features(config, labelled, encoder, identity["set"], device)
        runs = list(plan_runs(labelled, labels, config.dataset, config.output.seeds))
        console, asked = Console(stderr=True, highlight=False), []
        for number, run in enumerate(runs, 1):
            for name in features.names:
                keys = [_key(features.label(name), method, run) for method in method_names(config.probe)]
                asked += keys
                missing = [key for key in keys if key not in log.scores]
                for key in missing:
                    log.add(_score(config, labelled, labels, features.of(name, run), run, key, device))
                if missing:
                    reached = "  ".join(f"{key[1]} {percent(log.scores[key].value)}" for key in keys)
                    console.print(
                        f"{number}/{len(runs)} {_said(run)}, {keys[0][0]}: {reached}", markup=False, soft_wrap=True
                    )
        scores = [log.scores[key] for key in sorted(asked, key=lambda key: _place(key, features, config))]
        facts = {"inputs": features.facts, "encoders": features.encoders, "identity": identity}
        write_results(config.output.dir, config, labelled, scores, facts)
    print_results(scores)
    return scores


def baseline_scores(
    config: ProbeConfig, names: Sequence[str], labelled: LabelledSet, labels: np.ndarray, runs: Sequence[Run]
) -> list[Score]:
    """Scores of the baselines `names` in runs that another evaluation has planned; features are kept as by `probe`."""
    device = find_device(config.output.device)
    features = _Features(config, labelled, None, set_identity(labelled), device)
    return [
        _score(config, labelled, labels, features.of(name, run), run, _key(features.label(name), method, run), device)
        for run in runs
        for name in names
        for method in method_names(config.probe)
    ]


class _Features:
    """Features of the encoder and of the baselines as runs ask for them; those of the last seed and fold stay in memory.

    names: "encoder" and baselines. facts: by label, what is known of the input and the features. encoders: by label, what
    encoders read and how they are pooled.
    """

    def __init__(
        self, config: ProbeConfig, labelled: LabelledSet, encoder: ImageEncoder | None, identity: str, device: torch.device
    ):
        self._config, self._labelled, self._encoder, self._identity = config, labelled, encoder, identity
        self._device = device
        self._folder = config.probe.features_dir or config.output.dir / "features"
        baselines = list(dict.fromkeys(config.probe.baselines))
        if encoder is None and "random_init" not in baselines:
            baselines.insert(0, "random_init")  # it is the encoder asked for
        self.names = [*([] if encoder is None else [_ENCODER]), *baselines]
        self._held: dict[str, tuple[tuple, Tensor]] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.encoders: dict[str, dict[str, Any]] = {}

    def label(self, name: str) -> str:
        """What stands in tables."""
        return self._encoder.label if name == _ENCODER else _LABELS[name]

    def of(self, name: str, run: Run) -> Tensor:
        """[N, D] of all images."""
        part = {"random_init": (run.seed,), "random_convolutions": (run.seed, run.fold)}.get(name, ())
        if name not in self._held or self._held[name][0] != part:
            source = self._source(name, run)
            output = self._config.output
            found = kept_features(
                self._folder, source, self._labelled, self._identity, device=self._device, num_workers=output.num_workers
            )
            self._held[name] = part, found
            prepared = getattr(source.prepare, "facts", {"bands": "all, as stored", "statistics": "of the set"})
            if isinstance(source.featuriser, ImageEncoder):
                self.encoders[self.label(name)] = source.featuriser.facts
            self.facts[self.label(name)] = {"num_features": found.shape[1], "input": prepared}
        return self._held[name][1]

    def _source(self, name: str, run: Run) -> Source:
        if name == _ENCODER:
            return encoder_source(self._encoder, self._labelled.task, self._config.image)
        return baseline_source(name, self._labelled, run.unlabelled, self._config.encoder, self._config.image, run.seed)


def _score(
    config: ProbeConfig,
    labelled: LabelledSet,
    labels: np.ndarray,
    features: Tensor,
    run: Run,
    key: Key,
    device: torch.device,
) -> Score:
    task, (encoder, method, *_) = labelled.task, key
    division = Division.of(features, labels, run.splits, task.kind, task.num_classes)
    outcome = run_method(method, division, config.probe, task.metric, run.seed, device)
    correct = [] if outcome.correct is None else outcome.correct.tolist()
    ids = [labelled.sample_id(int(index)) for index in run.splits["test"]] if correct else []
    return Score(
        encoder=encoder,
        method=method,
        task=task.name,
        split="test",
        metric=task.metric,
        metrics=outcome.metrics,
        seed=run.seed,
        num_train=len(run.splits["train"]),
        fold=run.fold,
        label_fraction=run.label_fraction,
        settings=outcome.settings,
        per_sample={name: float(value) for name, value in zip(ids, correct, strict=True)},
    )


def _identity(
    config: ProbeConfig, labelled: LabelledSet, labels: np.ndarray, encoder: ImageEncoder | None
) -> dict[str, Any]:
    """What every score of an evaluation depends on."""
    tree = config.model_dump(mode="json")
    settings = {
        f"{section}.{key}": value
        for section, keys in tree.items()
        for key, value in keys.items()
        if section not in _FREE_KEYS or (_FREE_KEYS[section] is not None and key not in _FREE_KEYS[section])
    }
    weights = None if encoder is None else encoder.fingerprint()
    return {**settings, "set": set_identity(labelled), "labels": labels_identity(labelled, labels), "weights": weights}


def _key(label: str, method: str, run: Run) -> Key:
    return label, method, run.seed, run.fold, run.label_fraction


def _place(key: Key, features: _Features, config: ProbeConfig) -> tuple:
    """Where a score stands in a table: by method, then encoder, then label fraction."""
    encoder, method, seed, fold, share = key
    labels = [features.label(name) for name in features.names]
    return method_names(config.probe).index(method), labels.index(encoder), share, seed, fold or 0


def _said(run: Run) -> str:
    fold = "" if run.fold is None else f", fold {run.fold}"
    return f"seed {run.seed}{fold}, {100 * run.label_fraction:g} % of the labels ({len(run.splits['train'])})"
