"""Linear probes on feature vectors: ridge regression, logistic regression, and what all probes share.

Shapes: N training images, M images of another split, D features, K classes. Several classes per image (multi-label) are K
problems of two classes.

Every solver takes a grid, fits all of it on the training images, and the fit with the best deciding metric on the
validation images is kept; of equal ones the more regularised. Features are standardised by the mean and standard deviation
of the training images, so that one grid fits encoders of any scale.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mpmae.eval.metrics import OneMetric

_GRADIENT_TOLERANCE = 1e-7
_MAX_ITERATIONS = 300
_CURVATURE = 0.25  # of a logistic loss, at most


@dataclass(frozen=True)
class Examples:
    """Some images: features [N, D], classes [N, K] of 0 and 1; both float32.

    kind: of the task; "multiclass" has one class in each row.
    """

    features: Tensor
    classes: Tensor
    kind: str

    def __len__(self) -> int:
        return len(self.features)

    @property
    def target(self) -> Tensor:
        """As `mpmae.eval.metrics` takes it: the class [N], or classes [N, K]."""
        return self.classes.argmax(1) if self.kind == "multiclass" else self.classes

    def joined(self, other: "Examples") -> "Examples":
        """These and then the others."""
        return Examples(torch.cat([self.features, other.features]), torch.cat([self.classes, other.classes]), self.kind)


@dataclass(frozen=True)
class Standardise:
    """(x - mean) / std per feature; a feature that does not vary becomes 0."""

    mean: Tensor
    inverse_std: Tensor

    @classmethod
    def to(cls, features: Tensor) -> "Standardise":
        """That of features [N, D]; the deviation over N."""
        mean, std = features.double().mean(0), features.double().std(0, correction=0)
        constant = std <= 1e-7 * mean.abs().clamp_min(1e-12)
        return cls(mean, torch.where(constant, 0.0, 1 / std))

    def __call__(self, features: Tensor) -> Tensor:
        """float32 [N, D]."""
        return ((features.double() - self.mean) * self.inverse_std).float()


@dataclass(frozen=True)
class Fit:
    """One linear map and what it was fitted with.

    weight: [D, K]. bias: [K]. settings: its place in the grid. least_squares: whether outputs estimate 0 and 1 rather than
    logits.
    """

    weight: Tensor
    bias: Tensor
    settings: Mapping[str, Any]
    least_squares: bool = False

    def scores(self, features: Tensor, kind: str) -> Tensor:
        """[M, K] for standardised features: outputs as they are, or probabilities for several labels.

        A least-squares output s becomes sigmoid(4 (s - 1/2)): the same order, 1/2 where it was, and the same slope there.
        """
        outputs = features.to(self.weight) @ self.weight + self.bias
        if kind == "multiclass":
            return outputs.float()
        return torch.sigmoid(4 * (outputs - 0.5) if self.least_squares else outputs).float()


class Judge:
    """The deciding metric of fits on standardised validation images; -inf where it is not defined."""

    def __init__(self, val: Examples, metric: str):
        self._val, self._target = val, val.target
        self._metric = OneMetric(val.kind, val.classes.shape[1], metric, val.features.device)

    def __call__(self, fit: Fit) -> float:
        """A fraction in [0, 1], or -inf."""
        value = self._metric(fit.scores(self._val.features, self._val.kind), self._target)
        return -math.inf if math.isnan(value) else value


def best_fit(fits: Iterable[Fit], judge: Judge) -> Fit:
    """The fit that `judge` puts highest; the first of equal ones, so that a solver gives the most regularised one first."""
    return max(fits, key=judge)


def ridge(train: Examples, strengths: Sequence[float]) -> Iterator[Fit]:
    """Least squares on classes as 0 and 1: mean over images of |xW + b - y|^2, plus strength |W|^2; b is free.

    In closed form, all strengths from one eigendecomposition, in float64. Features: standardised.
    """
    x, y = train.features.double(), train.classes.double()
    bias = y.mean(0)
    values, basis = _principal(x)
    projected = basis.T @ (x.T @ (y - bias)) / len(x)
    for strength in sorted(strengths, reverse=True):
        weight = basis @ (projected / (values + strength)[:, None])
        yield Fit(weight, bias, {"strength": strength}, least_squares=True)


def logistic(train: Examples, strengths: Sequence[float]) -> Iterator[Fit]:
    """Logistic regression: mean over images of the cross-entropy, plus strength / 2 |W|^2; the bias is free.

    Several labels: the sum of their binary cross-entropies, so that each is fitted as if alone. L-BFGS with a strong Wolfe
    search in float64, each strength starting from the solution of the stronger one before; settings say how far the
    gradient came down. Features: standardised. It steps along principal axes, each scaled by its curvature: in the features
    themselves, which are strongly correlated, thousands of iterations do not converge.
    """
    x, y = train.features.double(), train.classes.double()
    values, basis = _principal(x)
    x = x @ basis
    weight, bias = x.new_zeros(x.shape[1], y.shape[1]), x.new_zeros(y.shape[1])
    for strength in sorted(strengths, reverse=True):
        scale = (_CURVATURE * values + strength).rsqrt()[:, None]
        scaled, free = (weight / scale).requires_grad_(), bias.clone().requires_grad_()
        solver = torch.optim.LBFGS(
            [scaled, free],
            max_iter=_MAX_ITERATIONS,
            history_size=20,
            line_search_fn="strong_wolfe",
            tolerance_grad=_GRADIENT_TOLERANCE,
            tolerance_change=0.0,
        )

        def objective(solver=solver, scaled=scaled, free=free, scale=scale, strength=strength) -> Tensor:
            solver.zero_grad()
            along = scaled * scale
            value = class_loss(x @ along + free, y, train.kind) + strength / 2 * along.square().sum()
            value.backward()
            return value

        solver.step(objective)
        objective()
        steepest = max(float((scaled.grad / scale).abs().max()), float(free.grad.abs().max()))
        weight, bias = (scaled * scale).detach(), free.detach()
        yield Fit(basis @ weight, bias, {"strength": strength, "largest_gradient": steepest})


def _principal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [r] of X'X / N and an orthonormal basis [D, r] of the rows of X [N, D], by the smaller Gram matrix.

    Penalised solutions lie in that space.
    """
    wide = x.shape[1] > len(x)
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    there = values > 1e-12 * values.max().clamp_min(torch.finfo(x.dtype).tiny)
    values, vectors = values[there], vectors[:, there]
    return values / len(x), x.T @ vectors / values.sqrt() if wide else vectors


def class_loss(logits: Tensor, classes: Tensor, kind: str) -> Tensor:
    """The mean over images of the cross-entropy, or of the sum of the labels' binary cross-entropies."""
    if kind == "multiclass":
        return F.cross_entropy(logits, classes.argmax(1))
    return F.binary_cross_entropy_with_logits(logits, classes, reduction="sum") / len(logits)
