"""A linear probe by gradient steps on mini-batches: a grid of rates and weight decays trained side by side.

Shapes: N training images, n images of a batch, D features, K classes, G points of the grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from mpmae.eval.linear import Examples, Fit, Judge, class_loss

OPTIMIZERS = ("adamw", "sgd")
_MOMENTUM = 0.9
_BETAS, _EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Schedule:
    """How the steps go: each rate of `lrs` is the peak of a half cosine down to 0 over all `epochs`, step by step.

    batch_size: images; all of them where the set has no more. seed: of the order of the images. stop_after: epochs after
    which the weights are taken, None for those with the best validation metric.
    """

    optimizer: str
    lrs: Sequence[float]
    weight_decays: Sequence[float]
    epochs: int
    batch_size: int
    seed: int
    stop_after: int | None = None


def gradient_steps(train: Examples, schedule: Schedule, judge: Judge | None) -> Fit:
    """The fit of the grid and of all epochs that `judge` puts highest, for standardised features.

    Of equal ones that with the larger weight decay, then the smaller rate, then the fewer epochs. Weights start at 0, and
    all points see the same batches. Without a judge the weights after `schedule.stop_after` epochs, of a grid of one point.
    """
    grid = sorted(product(schedule.weight_decays, schedule.lrs), key=lambda point: (-point[0], point[1]))
    x, y = train.features, train.classes
    num, size, num_classes = len(x), min(schedule.batch_size, len(x)), y.shape[1]
    weight = torch.zeros(x.shape[1] + 1, len(grid), num_classes, device=x.device, requires_grad=True)  # the last row: bias
    x = torch.cat([x, x.new_ones(num, 1)], 1)
    stepper = _Stepper(weight, grid, schedule.optimizer)
    total = schedule.epochs * math.ceil(num / size)
    order = torch.Generator().manual_seed(schedule.seed)
    best: list[tuple[float, Fit]] = [(-math.inf, _fit(weight, grid, at, 0)) for at in range(len(grid))]
    for epoch in range(1, (schedule.stop_after or schedule.epochs) + 1):
        for rows in torch.randperm(num, generator=order).to(x.device).split(size):
            logits = (x[rows] @ weight.flatten(1)).unflatten(1, weight.shape[1:])
            targets = y[rows].repeat_interleave(len(grid), 0)
            loss = len(grid) * class_loss(logits.flatten(0, 1), targets, train.kind)  # the sum over the grid
            (gradient,) = torch.autograd.grad(loss, weight)
            stepper.step(gradient, (1 + math.cos(math.pi * stepper.num_steps / total)) / 2)
        for at in range(len(grid)) if judge else ():
            reached = judge(_fit(weight, grid, at, epoch))
            if reached > best[at][0]:
                best[at] = reached, _fit(weight.clone(), grid, at, epoch)
    if judge is None:
        return _fit(weight, grid, 0, epoch)
    return max(best, key=lambda entry: entry[0])[1]


class _Stepper:
    """AdamW, or SGD with momentum, with a rate and a weight decay of its own for each point of the grid.

    As torch.optim's; biases are not decayed.
    """

    def __init__(self, weight: Tensor, grid: Sequence[tuple[float, float]], optimizer: str):
        decays, lrs = (torch.tensor(column, device=weight.device)[:, None] for column in zip(*grid, strict=True))
        decayed = torch.ones(len(weight), 1, 1, device=weight.device)
        decayed[-1] = 0.0
        self._weight, self._lrs, self._decays, self._adamw = weight, lrs, decayed * decays, optimizer == "adamw"
        self._first, self._second = torch.zeros_like(weight), torch.zeros_like(weight)
        self.num_steps = 0

    @torch.no_grad()
    def step(self, gradient: Tensor, factor: float) -> None:
        """One step at `factor` of the peak rates."""
        self.num_steps += 1
        lrs = factor * self._lrs
        if not self._adamw:
            self._first.mul_(_MOMENTUM).add_(gradient + self._decays * self._weight)
            self._weight.sub_(lrs * self._first)
            return
        self._first.lerp_(gradient, 1 - _BETAS[0])
        self._second.lerp_(gradient.square(), 1 - _BETAS[1])
        rms = (self._second / (1 - _BETAS[1] ** self.num_steps)).sqrt_().add_(_EPS)
        self._weight.mul_(1 - lrs * self._decays)
        self._weight.sub_(lrs / (1 - _BETAS[0] ** self.num_steps) * self._first / rms)


def _fit(weight: Tensor, grid: Sequence[tuple[float, float]], at: int, epoch: int) -> Fit:
    decay, lr = grid[at]
    of_point = weight.detach()[:, at]
    return Fit(of_point[:-1], of_point[-1], {"lr": lr, "weight_decay": decay, "epochs": epoch})
