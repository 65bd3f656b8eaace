"""What the encoder's features are worth, asked while it is being trained: kNN and a linear probe on a small labelled set.

The weights of the moment run as the encoder that downstream use has (`mpmae.train.probe_encoder`), in float32 under every
precision. Images are cut into batches that do not depend on the number of ranks, so neither do the scores. Nothing of the
training changes: weights are only read, and no random number is drawn. Importing this module needs torchmetrics.

Shapes: N images, T windows of an image, C bands, S image side, D features, K classes.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpmae.config import RunConfig
from mpmae.engine import Engine
from mpmae.errors import DatasetError, MpmaeError
from mpmae.eval.image_encoder import ImageEncoder
from mpmae.eval.knn import knn_shares
from mpmae.eval.linear import Examples, Judge, Standardise, best_fit, ridge
from mpmae.eval.metrics import evaluate
from mpmae.eval.windows import window_means
from mpmae.in_order import in_order
from mpmae.probe_record import LINEAR, knn_method
from mpmae.train.data import num_bytes
from mpmae.train.probe_set import ProbeSet

BATCH_SIZE = 32
STRENGTHS = tuple(10.0**power for power in range(-6, 3))


class Probe:
    """kNN and a linear probe on the features of the moment. The constructor and `run` are collective.

    `tick` is called after every batch. Both raise DatasetError on every rank when one of them cannot read an image.
    notes: what to know beforehand.
    """

    def __init__(self, engine: Engine, probe_set: ProbeSet, config: RunConfig, tick: Callable[[], None]):
        self._engine, self._world, self._set, self._tick = engine, engine.world, probe_set, tick
        self._ks, self._num_workers = config.probe.ks, config.data.num_workers
        num_images, world = len(probe_set.indices), engine.world
        batches = [range(start, min(start + BATCH_SIZE, num_images)) for start in range(0, num_images, BATCH_SIZE)]
        self._num_rounds = -(-len(batches) // world.world_size)
        self._own = batches[world.rank :: world.world_size]
        self._kept: list[list[Tensor]] = []
        self.notes = list(probe_set.notes)
        self._together(self._read_once, config.probe.host_cache_gb)

    @torch.no_grad()
    def run(self, stop_asked: Callable[[], bool]) -> dict[str, Any] | None:
        """What the metrics record gets: scores by method, as fractions, and on what; None when it was given up.

        That is when `stop_asked` says so on any rank, which is asked between batches. Scores are None where features are
        not finite. They are the same on every rank, and all ranks wait for them here: in the next step's forward the wait
        would pass for a slow rank.
        """
        started, device = time.perf_counter(), self._engine.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            features = self._features(self._set.encoder.with_weights(self._engine), stop_asked)
            if features is None:
                return None
            scores = dict.fromkeys([*map(knn_method, self._ks), LINEAR])
            if self._world.rank == 0 and bool(features.isfinite().all()):
                scores = self._scores(features.cpu())
        return {
            **self._world.broadcast_object(scores),
            "metric": self._set.labelled.task.metric,
            "num_train": self._set.num_train,
            "num_val": self._set.num_val,
            "elapsed_s": time.perf_counter() - started,
        }

    def _features(self, encoder: ImageEncoder, stop_asked: Callable[[], bool]) -> Tensor | None:
        """[N, D] float32 on every rank; None when given up."""
        features = torch.zeros(len(self._set.indices), encoder.num_features, device=self._engine.device)
        problem = None
        for number in range(self._num_rounds):
            if self._world.agree(stop_asked()):
                return None
            try:
                if number < len(self._own) and problem is None:
                    own = self._own[number]
                    images = self._kept[number] if number < len(self._kept) else self._read(own)
                    features[own.start : own.stop] = window_means(encoder, images, features.device)
            except MpmaeError as error:
                problem = error
            self._tick()
        self._together(_raise, problem)
        return self._world.sum_over_ranks(features)

    def _scores(self, features: Tensor) -> dict[str, float]:
        """The deciding metric of the validation images, by method."""
        task, num_train, classes = self._set.labelled.task, self._set.num_train, self._set.classes
        train = Examples(features[:num_train], classes[:num_train], task.kind)
        val = Examples(features[num_train:], classes[num_train:], task.kind)

        def judged(scores: Tensor) -> float:
            return evaluate(task.kind, task.num_classes, scores, val.target)[task.metric]

        found = {knn_method(k): judged(knn_shares(train.features, train.classes, val.features, k)) for k in self._ks}
        standardise = Standardise.to(train.features)
        train, val = (Examples(standardise(part.features), part.classes, part.kind) for part in (train, val))
        (fit,) = ridge(train, [self._strength(train, task.metric)])
        return found | {LINEAR: judged(fit.scores(val.features, val.kind))}

    def _strength(self, train: Examples, metric: str) -> float:
        """That of the ridge which does best on a part of the training images that it has not seen."""
        is_judge = torch.zeros(len(train), dtype=torch.bool)
        is_judge[self._set.tuning] = True
        seen, unseen = (Examples(train.features[part], train.classes[part], train.kind) for part in (~is_judge, is_judge))
        return best_fit(ridge(seen, STRENGTHS), Judge(unseen, metric)).settings["strength"]

    def _read_once(self, budget_gb: float) -> None:
        """Read every image of this rank, so that a bad one is told of at the start, and keep those there is room for."""
        room, kept = num_bytes(budget_gb), []
        for positions in self._own:
            images = self._read(positions)
            room -= sum(image.nbytes for image in images)
            if room >= 0:
                kept.append(images)
            self._tick()
        self._kept = kept
        num_kept, num_own = sum(map(len, kept)), sum(map(len, self._own))
        if num_kept < num_own:
            self.notes.append(
                f"probe: {num_kept:,} of {num_own:,} images stay in memory (probe.host_cache_gb = {budget_gb:g}); the "
                "others are read again each time"
            )

    def _read(self, positions: range) -> list[Tensor]:
        return list(in_order(self._set.windows, positions, self._num_workers))

    def _together(self, action: Callable[[Any], None], argument: Any) -> None:
        """`action`; when it fails on any rank, an error on all of them, so that none waits for the others."""
        problems: list[str] = []
        try:
            action(argument)
        except MpmaeError as error:
            problems = error.problems
        found = [problem for of_rank in self._world.gather_objects(problems) for problem in of_rank]
        if found:
            raise DatasetError([f"probe.dataset: {problem}" for problem in dict.fromkeys(found)])


def _raise(error: MpmaeError | None) -> None:
    if error is not None:
        raise error
