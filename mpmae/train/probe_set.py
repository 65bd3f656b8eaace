"""The labelled set of a run's probe: opened, checked and cut to size before the first step.

Shapes: N images that train the probe and then those that judge it, K classes, T windows of an image, C bands, S image side.
"""

import hashlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mpmae.config import ProbeSection, RunConfig
from mpmae.errors import ConfigError, DatasetError, MpmaeError
from mpmae.eval.config import DatasetSection, ImageSection
from mpmae.eval.dataset import LabelledSet
from mpmae.eval.folds import fraction
from mpmae.eval.open_set import open_set
from mpmae.eval.prepare import Preparation
from mpmae.in_order import in_order
from mpmae.models import MPMAE, MultiMAE
from mpmae.shard_format import Manifest
from mpmae.train.probe_encoder import TrainedEncoder, trained_encoder

_SEED = 0  # not the run's: probes of runs with other seeds see the same images
_HELD_OUT = 0.2  # of the training images, where some of them have to judge
_NUM_NAMED = 5
_KEYS = re.compile(r"\b(?:dataset|image)\.(?=(?:format|partition|product_level|normalise|size|fit)\b)")
_OF_EVALUATIONS = re.compile(r"\. Name encoder\.domains [^;.]*")  # advice that a run has no key for


@dataclass(frozen=True)
class ProbeSet:
    """What the probe looks at.

    encoder: whose features are looked at. indices: int64 [N], samples of `labelled`: `num_train` that it is trained on, then
    those that judge it. tuning: of the first, the places of those by which the linear probe's ridge is chosen. classes:
    float32 [N, K], 1 where an image has the class. notes: what to know of the choice.
    """

    labelled: LabelledSet
    encoder: TrainedEncoder
    prepare: Preparation
    indices: np.ndarray
    num_train: int
    tuning: Tensor
    classes: Tensor
    notes: tuple[str, ...]

    @property
    def num_val(self) -> int:
        """Images that judge."""
        return len(self.indices) - self.num_train

    def windows(self, position: int) -> Tensor:
        """The windows [T, C, S, S] of the image at a place in `indices`. Raises DatasetError."""
        return self.prepare(self.labelled.image(int(self.indices[position])))

    def facts(self) -> dict[str, str]:
        """What has to be the same on every rank."""
        digest = hashlib.sha256(repr((self.labelled.task, self.num_train)).encode())
        for index in self.indices.tolist():
            digest.update(self.labelled.sample_id(index).encode() + b"\0")
        digest.update(self.classes.numpy().tobytes())
        return {"images and labels of probe.dataset": digest.hexdigest()[:16]}

    def __str__(self) -> str:
        task = self.labelled.task
        return (
            f"{task.name}: {task.num_classes} classes, {self.num_train:,} images to train on, {self.num_val:,} to judge by"
        )

    def preparation(self) -> str:
        """What is done to the images, in a line."""
        facts = self.prepare.facts
        (stored,), (num_windows,), side = facts["stored_px"][:1], facts["num_windows"][:1], facts["side_px"]
        how = {"resize": "scaled to", "crop": "cut to", "tile": f"as {num_windows} windows of"}[facts["fit"]]
        parts = [f"{stored[0]} x {stored[1]} px" + (f" {how} {side} px" if stored != [side, side] else "")]
        parts += [
            f"{row['stored']} stands in for {row['wanted']}" for row in facts["bands"] if row["wanted"] != row["stored"]
        ]
        parts += [in_our_keys(text) for text in _statistics(facts)]
        parts += [self.encoder.reads] if self.encoder.reads else []
        return "; ".join(parts)


def open_probe_set(config: RunConfig, manifest: Manifest, model: MPMAE | MultiMAE) -> ProbeSet | None:
    """The checked set of `config.probe`, for the bands or domains that `model` reads; None without one.

    Reads all labels and one image. Raises ConfigError or DatasetError: no set, or one without what the probe needs; a band
    that nothing can stand for, or no bands for any domain; a label that no class has; images that cannot be made to fit;
    torchmetrics not installed.
    """
    section = config.probe
    if section.dataset is None:
        return None
    if importlib.util.find_spec("torchmetrics") is None:
        raise ConfigError(
            f"probe.dataset = {section.dataset} needs the package torchmetrics: pip install mpmae[eval]; or leave it out"
        )
    try:
        keys = {key: getattr(section, key) for key in ("format", "partition", "product_level")}
        # as for folds: not every split has to be there, nor every class in each
        labelled = open_set(DatasetSection(path=section.dataset, num_folds=2, **keys), progress=False)
        indices, num_train, classes, notes = _chosen(section, labelled, config.data.num_workers)
        tuning = torch.from_numpy(_held_out(classes[:num_train], labelled.task.kind))
        encoder = trained_encoder(config, manifest, model, labelled.task)
        image = ImageSection(normalise=section.normalise, size=section.size, fit=section.fit)
        prepare = Preparation(labelled.task, encoder.blueprint.input, image)
        notes += [f"probe: {encoder.reads}"] if encoder.reads else []
        found = ProbeSet(labelled, encoder, prepare, indices, num_train, tuning, classes, tuple(notes))
        found.windows(0)
    except MpmaeError as error:
        raise type(error)([f"probe.dataset = {section.dataset}: {in_our_keys(text)}" for text in error.problems]) from error
    return found


def in_our_keys(text: str) -> str:
    """A message of an evaluation, with the keys of a run instead of its own."""
    text = _OF_EVALUATIONS.sub("", text)
    return _KEYS.sub("probe.", re.sub(r"\bdataset\.path\b", "probe.dataset", text))


def _statistics(facts: Mapping[str, Any]) -> list[str]:
    """Whose statistics are used and why, for each modality where there are several."""
    several = facts.get("statistics_of")
    if several is None:
        return [f"statistics of {facts['statistics']}: {facts['statistics_reason']}"]
    return [f"{name} by statistics of {entry['statistics']}: {entry['reason']}" for name, entry in several.items()]


def _chosen(section: ProbeSection, labelled: LabelledSet, num_workers: int) -> tuple[np.ndarray, int, Tensor, list[str]]:
    """Samples to train on and then to judge by, how many of them train, their classes [N, K], and notes."""
    task, splits, notes = labelled.task, labelled.splits, []
    if task.kind not in ("multiclass", "multilabel"):
        raise ConfigError(f"{task.name} is a {task.kind} task; the probe takes images with classes (multiclass, multilabel)")
    if "train" not in splits:
        raise DatasetError(
            f"{task.name} has no train split, only {', '.join(splits) or 'none'}; the probe is trained on one"
        )
    parts = [_some(splits[name], section.max_samples) for name in ("train", "val") if len(splits.get(name, ()))]
    indices = np.concatenate(parts)
    classes = _classes(labelled, indices, num_workers)
    num_train = len(parts[0])
    if len(parts) == 1:
        taken = _held_out(classes, task.kind)
        order = np.concatenate([np.setdiff1d(np.arange(len(indices)), taken), taken])
        indices, classes, num_train = indices[order], classes[order], len(indices) - len(taken)
        notes.append(f"{task.name} has no val split: {len(taken)} images of its train split judge the probe")
    present = classes[:num_train].any(0)
    if present.sum() < 2:
        raise DatasetError(
            f"{task.name}: its {num_train} images to train on (probe.max_samples = {section.max_samples}) are of "
            f"{int(present.sum())} class; expected two at least"
        )
    unseen = [name for name, is_there in zip(task.class_names, present.tolist(), strict=True) if not is_there]
    if unseen:
        shown = ", ".join(unseen[:_NUM_NAMED]) + (", ..." if len(unseen) > _NUM_NAMED else "")
        notes.append(f"{task.name}: no image to train on has the classes {shown}, which the probe can therefore never name")
    return indices, num_train, classes, notes


def _some(indices: np.ndarray, max_samples: int) -> np.ndarray:
    """At most so many of them, ascending; the same ones every time."""
    if len(indices) <= max_samples:
        return np.sort(indices)
    return np.sort(np.random.default_rng(_SEED).choice(indices, max_samples, replace=False))


def _held_out(classes: Tensor, kind: str) -> np.ndarray:
    """Ascending places of a stratified part of the images with these classes [N, K]; no class goes into it whole."""
    labels = (classes.argmax(1) if kind == "multiclass" else classes.bool()).numpy()
    everything = np.arange(len(labels))
    taken = np.setdiff1d(everything, fraction(labels, everything, 1 - _HELD_OUT, _SEED))
    if not len(taken):
        raise DatasetError(
            f"none of {len(labels)} images can be held out, as no class has more than two; label more, or raise "
            "probe.max_samples"
        )
    return taken


def _classes(labelled: LabelledSet, indices: np.ndarray, num_workers: int) -> Tensor:
    """float32 [N, K], from the labels."""
    labels = torch.stack([torch.as_tensor(label) for label in in_order(labelled.label, indices.tolist(), num_workers)])
    return (F.one_hot(labels, labelled.task.num_classes) if labels.ndim == 1 else labels).float()
