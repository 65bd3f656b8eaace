"""Cross-validation folds and label fractions, stratified by class: pure functions of labels and seed.

Shapes: N samples, K classes.
"""

import logging
from collections.abc import Sequence

import numpy as np

from mpmae.errors import DatasetError
from mpmae.eval.reading import few

_LOG = logging.getLogger(__name__)


def folds(labels: np.ndarray, num_folds: int, seed: int) -> list[dict[str, np.ndarray]]:
    """`num_folds` times {"train", "val", "test"}: sorted indices into `labels`; every sample is in one test split.

    labels: classes [N], or classes of each sample [N, K] bool (several labels, or what a label map holds), which are
    stratified by the rarest class that a sample has. val: one part in num_folds of what is not test. Raises DatasetError for
    fewer than 2 folds or fewer samples than folds; logs the classes that are too rare to be in every split.
    """
    strata = _strata(labels)
    if not 2 <= num_folds <= len(strata):
        raise DatasetError(f"num_folds = {num_folds}; expected 2 to {len(strata)}, the number of samples")
    names, counts = np.unique(strata, return_counts=True)
    rare = [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count < num_folds]
    if rare:
        _LOG.warning("fewer samples than %d folds, so absent from some test splits: classes %s", num_folds, few(rare))
    part = _parts(strata, num_folds, np.random.default_rng([seed, 0]))
    split = []
    for fold in range(num_folds):
        rest = np.flatnonzero(part != fold)
        is_val = _parts(strata[rest], num_folds, np.random.default_rng([seed, 1, fold])) == 0
        split.append({"train": rest[~is_val], "val": rest[is_val], "test": np.flatnonzero(part == fold)})
    return split


def fraction(labels: np.ndarray, indices: Sequence[int], fraction: float, seed: int) -> np.ndarray:
    """A stratified part of `indices`, sorted: `fraction` of each class, rounded, and at least one sample of it.

    labels: as for `folds`, of all samples; indices point into it. Of one seed the parts are nested: what 1 % has, 5 % has
    too. Raises DatasetError for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise DatasetError(f"a label fraction of {fraction}; expected more than 0 and at most 1")
    labels, indices = np.asarray(labels), np.sort(np.asarray(indices, np.int64))
    strata = _strata(labels)[indices]
    order = {name: _shuffled(np.flatnonzero(strata == name), seed, int(name)) for name in np.unique(strata)}
    chosen = {int(p) for members in order.values() for p in members[: max(1, round(fraction * len(members)))]}
    if labels.ndim == 2:
        # A class that never is a sample's rarest: its sample is in every part, so that parts stay nested.
        covered = labels[indices[[members[0] for members in order.values()]]].any(0)
        for name in np.flatnonzero(labels[indices].any(0) & ~covered):
            chosen.add(int(_shuffled(np.flatnonzero(labels[indices, name]), seed, int(name))[0]))
    return indices[sorted(chosen)]


def _shuffled(positions: np.ndarray, seed: int, stratum: int) -> np.ndarray:
    """In an order of the stratum's own, so that a part does not change with the other classes."""
    return np.random.default_rng([seed, 2, stratum]).permutation(positions)


def _parts(strata: np.ndarray, num_parts: int, rng: np.random.Generator) -> np.ndarray:
    """The part 0 .. num_parts - 1 of every sample: each stratum is dealt out in turn, going on where the last one ended."""
    part, start = np.empty(len(strata), np.int64), 0
    for name in np.unique(strata):
        members = rng.permutation(np.flatnonzero(strata == name))
        part[members] = (start + np.arange(len(members))) % num_parts
        start += len(members)
    return part


def _strata(labels: np.ndarray) -> np.ndarray:
    """The class of each sample [N]; with several, its rarest one (K where it has none)."""
    labels = np.asarray(labels)
    if labels.ndim == 1:
        return labels.astype(np.int64)
    counts = labels.sum(0)
    rarity = np.where(labels, counts, np.iinfo(np.int64).max)
    return np.where(labels.any(1), rarity.argmin(1), labels.shape[1])
