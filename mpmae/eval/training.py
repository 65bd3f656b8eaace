"""One loop for all fine-tuning: `fit` trains what a `Setup` describes and tests its best epoch, once.

Shapes: N samples, B input bands, S image side in pixels, T windows of an image, M windows of a batch.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn, optim

from mpmae.counter_rng import Stream, random_bits
from mpmae.engine.base import update
from mpmae.engine.optim import REFERENCE_BATCH_SIZE, LearningRate
from mpmae.engine.world import World
from mpmae.errors import ConfigError, TrainingError
from mpmae.eval.dataset import SPLITS, Task
from mpmae.eval.finetune_config import FinetuneSection
from mpmae.eval.metrics import Metrics
from mpmae.eval.training_data import Batch, Example, Examples, shuffled, split_steps, stack
from mpmae.eval.training_progress import EpochLine
from mpmae.eval.training_state import RunState


class Setup(Protocol):
    """What a kind of task brings to the loop: the model, what it learns from, and how its outputs become predictions.

    The loop calls, for each epoch: `begin_epoch`; for each micro batch `augment`, `model`, `loss`; then for the validation
    split `model` and `predict`. `prepare` runs in threads, everything else in the main one. A new kind of task is one class
    with these parts; see `mpmae.eval.finetune.ClassificationSetup` for the smallest.

    task: of the labelled set. method: for scores. prepares_alike: whether `prepare` gives the same in all runs on a set, so
    that they can share what is kept; else only within a run. model: images [M, B, S, S] -> outputs; on the loop's device
    from its first step on, in training or evaluation mode as the loop sets it.
    """

    task: Task
    method: str
    prepares_alike: bool
    model: nn.Module

    def prepare(self, image: np.ndarray, label: np.ndarray) -> tuple[Tensor, Tensor]:
        """(images [T, B, S, S], targets [T, ...]) of a sample as the set stores it; the same every time, no randomness.

        Windows of one image go through the model as samples of their own. All images of a run have the same S.
        """
        ...

    def begin_epoch(self, epoch: int) -> list[dict[str, Any]]:
        """AdamW groups of the parameters that train from this epoch on: a phase begins. Empty where nothing changes.

        Called once for each epoch, in order, from 0 (also for those that a resumed run has behind it). It sets
        `requires_grad` too. Groups as `mpmae.engine.optim.layer_decay_groups` gives them: params, weight_decay, lr_scale.
        """
        ...

    def augment(self, batch: Batch, epoch: int) -> Batch:
        """A training batch with random changes and soft targets; what is drawn depends on seed, epoch and `batch.keys`."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of the losses of all terms, number of terms), two scalars, for augmented or plain targets.

        The step follows the gradient of sum / number over the whole global batch, however it is cut into micro batches
        and ranks. A term is what counts equally: a window of a classified image, a pixel with a label.
        """
        ...

    def predict(self, outputs: Tensor, examples: Sequence[Example]) -> Iterator[tuple[Tensor, Tensor]]:
        """(scores, target) for `mpmae.eval.metrics.Metrics.update` from the outputs [M, ...] of all windows of `examples`.

        One pair for the batch, or several (label maps of several sizes). For kind "multiclass" the rows are the examples
        in their order.
        """
        ...


@dataclass(frozen=True)
class Result:
    """What a model reaches on a split.

    metrics: name -> fraction in [0, 1]. loss: the mean over its terms. per_sample: 1 or 0 by sample id, for multiclass.
    """

    metrics: dict[str, float]
    loss: float
    per_sample: dict[str, float] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Fitted:
    """What a run reached. best_epoch: counted from 0, the first with the best validation metric. num_epochs: trained."""

    best_epoch: int
    num_epochs: int
    val: Result
    test: Result


def fit(
    setup: Setup,
    examples: Examples,
    splits: Mapping[str, np.ndarray],
    section: FinetuneSection,
    world: World,
    folder: Path,
    *,
    seed: int,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    title: str = "",
    quiet: bool = False,
) -> Fitted:
    """Train on splits["train"], choose the epoch on splits["val"], test that one on splits["test"]; every rank calls it.

    The model has the weights of the best epoch afterwards. folder gets metrics.jsonl (a line per epoch), state.pt and, in
    the end, result.json. seed: of order, augmentation and drop path. resume: continue from state.pt where there is one;
    what has ended is not run again. identity: plain data that must not change between the parts of a resumed run.
    Raises ConfigError (a resumed run of other settings, fewer samples than ranks), DatasetError and TrainingError.
    """
    _check(splits, section, world)
    own = {"seed": seed, "num_samples": {name: len(splits[name]) for name in SPLITS}}
    state = RunState(folder, world, {**(identity or {}), **own}, resume)
    ended = state.result()
    if ended is not None:
        return _ended(ended, state, setup.model)
    with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
        trainer = _Trainer(setup, examples, splits, section, world, seed)
        trainer.restore(state)
        quiet = quiet or world.rank > 0
        with closing(EpochLine(title, setup.task.metric, section.epochs, trainer.epoch, quiet)) as line:
            while not trainer.done:
                record = trainer.run_epoch()
                state.log(record)
                line.update(record)
                trainer.save(state, section.save_interval_s)
        fitted = trainer.finish()
    task = {"task": setup.task.name, "metric": setup.task.metric, "class_names": setup.task.class_names}
    state.finish({**task, **asdict(fitted)}, setup.model.state_dict() if section.keep_weights else None)
    return fitted


class _Trainer:
    """The moving parts of `fit`: epochs one by one."""

    def __init__(
        self,
        setup: Setup,
        examples: Examples,
        splits: Mapping[str, np.ndarray],
        section: FinetuneSection,
        world: World,
        seed: int,
    ):
        self._setup, self._examples, self._splits = setup, examples, splits
        self._section, self._world, self._seed = section, world, seed
        self._model = setup.model.to(world.device)
        peak = section.lr if section.lr is not None else section.blr * section.batch_size / REFERENCE_BATCH_SIZE
        self._lr = LearningRate(peak, section.min_lr, section.warmup_epochs, section.epochs)
        self._optimizer: optim.AdamW | None = None
        self.epoch = 0
        self._best: dict[str, Any] | None = None

    @property
    def done(self) -> bool:
        """Whether the last epoch is over, or none has been the best for `patience_epochs`."""
        patience = self._section.patience_epochs
        waited = 0 if self._best is None else self.epoch - 1 - self._best["epoch"]
        return self.epoch >= self._section.epochs or (patience is not None and waited >= patience)

    def restore(self, state: RunState) -> None:
        """Continue where `state` ends."""
        saved = state.load()
        if saved is None:
            return
        for epoch in range(saved["num_epochs"]):
            self._begin_epoch(epoch)
        self._model.load_state_dict(saved["model"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self.epoch, self._best = saved["num_epochs"], saved["best"]

    def save(self, state: RunState, interval_s: float) -> None:
        """Write what the next epoch needs, unless that was done less than `interval_s` ago."""
        state.save(self._model, self._optimizer, {"num_epochs": self.epoch, "best": self._best}, interval_s)

    def run_epoch(self) -> dict[str, Any]:
        """Train for an epoch, validate, keep the weights if they are the best so far; the epoch's record."""
        epoch, begun = self.epoch, time.monotonic()
        self._begin_epoch(epoch)
        bits = random_bits(self._seed, Stream.DROP_PATH, epoch, np.array([self._world.rank]))
        torch.manual_seed(int(bits[0, 0] >> np.uint64(1)))
        loss, grad_norm, lr = self._train(epoch)
        val = self._evaluate(self._splits["val"])
        value = val.metrics[self._setup.task.metric]
        if self._best is None or value > self._best["value"] or (math.isnan(self._best["value"]) and not math.isnan(value)):
            weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._model.state_dict().items()}
            self._best = {"epoch": epoch, "value": value, "val": asdict(val), "weights": weights}
        self.epoch = epoch + 1
        metrics = {f"val_{name}": number for name, number in val.metrics.items()}
        rates = {"lr": lr, "grad_norm": grad_norm, "epoch_s": time.monotonic() - begun}
        return {"epoch": epoch, "loss": loss, "val_loss": val.loss, **metrics, "best_epoch": self._best["epoch"], **rates}

    def finish(self) -> Fitted:
        """The test of the best epoch's weights."""
        best = self._best
        if best is None or math.isnan(best["value"]):
            raise TrainingError(
                f"{self._setup.task.metric} of the validation split is not a number in any of {self.epoch} epochs, so that "
                "no epoch can be chosen; does the split have samples of every class?"
            )
        self._model.load_state_dict(best["weights"])
        return Fitted(best["epoch"], self.epoch, Result(**best["val"]), self._evaluate(self._splits["test"]))

    def _begin_epoch(self, epoch: int) -> None:
        groups = self._setup.begin_epoch(epoch)
        if self._optimizer is None:
            self._optimizer = optim.AdamW(groups, lr=0.0, betas=self._section.betas, fused=True)
            return
        for group in groups:
            self._optimizer.add_param_group(group)

    def _train(self, epoch: int) -> tuple[float, float, float]:
        """(mean loss, mean norm of the gradients, last rate) of an epoch over all ranks."""
        self._model.train()
        order = shuffled(self._splits["train"], self._seed, epoch)
        section, world = self._section, self._world
        steps = split_steps(order, section.batch_size, section.micro_batch_size, world.rank, world.world_size)
        totals, norms, lr = torch.zeros(2, dtype=torch.float64), [], 0.0
        totals = totals.to(world.device)
        with closing(self._examples.read(self._setup.prepare, [piece for step in steps for piece in step])) as pieces:
            for number, step in enumerate(steps):
                lr = self._lr(epoch + number / len(steps))
                step_totals, norm = self._step([next(pieces) for _ in step], epoch, lr)
                totals += step_totals
                norms.append(norm)
        loss = float(totals[0] / totals[1].clamp(min=1))
        grad_norm = float(torch.stack(norms).mean())
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise TrainingError(
                f"epoch {epoch}: mean loss {loss}, mean gradient norm {grad_norm}: the training has diverged; lower "
                "finetune.blr, set finetune.clip_grad_norm, or use finetune.precision=fp32"
            )
        return loss, grad_norm, lr

    def _step(self, pieces: list[list[Example]], epoch: int, lr: float) -> tuple[Tensor, Tensor]:
        """One optimizer step: ([sum of losses, number of terms] over all ranks, norm of the gradient)."""
        totals = torch.zeros(2, dtype=torch.float64, device=self._world.device)
        for piece in pieces:
            if piece:
                batch = self._setup.augment(stack(piece, self._world.device), epoch)
                with self._autocast():
                    loss, num_terms = self._setup.loss(self._model(batch.images), batch.targets)
                loss.backward()
                totals += torch.stack([loss.detach().double(), num_terms.to(totals)])
        totals = self._world.sum_over_ranks(totals)
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        _average_gradients(parameters, totals[1].clamp(min=1), self._world)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        update(self._optimizer, parameters, norm, self._section.clip_grad_norm, lr)
        return totals, norm.detach()

    def _evaluate(self, indices: np.ndarray) -> Result:
        """Metrics of the model over `indices`, of all ranks together, each sample read once."""
        world, task = self._world, self._setup.task
        own = indices[world.rank :: world.world_size]
        size = self._section.micro_batch_size or self._section.batch_size
        pieces = [own[start : start + size] for start in range(0, len(own), size)]
        metrics = Metrics(task.kind, task.num_classes, world.device, over_ranks=world.world_size > 1)
        correct: dict[str, float] = {}
        totals = torch.zeros(2, dtype=torch.float64, device=world.device)
        self._model.eval()
        with torch.inference_mode(), closing(self._examples.read(self._setup.prepare, pieces)) as batches:
            for examples in batches:
                batch = stack(examples, world.device)
                with self._autocast():
                    outputs = self._model(batch.images)
                    loss, num_terms = self._setup.loss(outputs, batch.targets)
                totals += torch.stack([loss.double(), num_terms.to(totals)])
                for scores, target in self._setup.predict(outputs.float(), examples):
                    metrics.update(scores, target.to(scores.device))
                    if task.kind == "multiclass":
                        hits = (scores.argmax(1) == target.to(scores.device)).float().tolist()
                        names = [self._examples.dataset.sample_id(example.index) for example in examples]
                        correct |= zip(names, hits, strict=True)
        totals = world.sum_over_ranks(totals)
        for other in world.gather_objects(correct):
            correct |= other
        return Result(metrics.compute(), float(totals[0] / totals[1].clamp(min=1)), dict(sorted(correct.items())))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._world.device.type, torch.bfloat16, enabled=self._section.precision == "bf16")


def _average_gradients(parameters: list[nn.Parameter], num_terms: Tensor, world: World) -> None:
    """Replace the gradients by their sum over all ranks, divided by the terms of all ranks.

    All in one message: a rank without a sample in the last batch takes part with zeros, which hooks on its backward pass
    could not.
    """
    gradients = []
    for parameter in parameters:
        if parameter.grad is None and world.world_size > 1:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    if world.world_size > 1:
        total = world.sum_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = total.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
    torch._foreach_div_(gradients, num_terms.float())


def _check(splits: Mapping[str, np.ndarray], section: FinetuneSection, world: World) -> None:
    problems = []
    if section.warmup_epochs >= section.epochs:
        problems.append(
            f"finetune.warmup_epochs = {section.warmup_epochs:g} of {section.epochs} epochs: the rate would never come down "
            "again; lower it, or train longer"
        )
    for name in SPLITS:
        num = len(splits.get(name, ()))
        if num == 0:
            problems.append(f"split {name} has no samples; fine-tuning needs {', '.join(SPLITS)}")
        elif name != "train" and num < world.world_size:
            problems.append(f"split {name} has {num} samples for {world.world_size} ranks; start fewer ranks")
    if problems:
        raise ConfigError(problems)


def _ended(tree: Mapping[str, Any], state: RunState, model: nn.Module) -> Fitted:
    weights = state.weights()
    if weights is not None:
        model.load_state_dict(weights)
    return Fitted(tree["best_epoch"], tree["num_epochs"], Result(**tree["val"]), Result(**tree["test"]))
