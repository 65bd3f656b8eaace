"""The linear probes: each solver against what it should have found, and what is chosen from a grid."""

import pytest
import torch
from torch.nn import functional as F

from mpmae.eval.linear import Examples, Fit, Judge, Standardise, best_fit, class_loss, logistic, ridge
from mpmae.eval.linear_steps import Schedule, gradient_steps


def examples(num: int = 40, num_features: int = 6, kind: str = "multiclass", seed: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, num_features, generator=generator)
    outputs = x[:, :3] + torch.randn(num, 3, generator=generator)
    classes = F.one_hot(outputs.argmax(1), 3) if kind == "multiclass" else outputs > 0
    return Examples(Standardise.to(x)(x), classes.float(), kind)


@pytest.mark.parametrize("num_features", [6, 60])  # fewer and more than images
def test_ridge_is_the_least_squares_solution(num_features):
    train = examples(num_features=num_features)
    num, strength = len(train), 0.3
    x, y = train.features.double(), train.classes.double()
    rows = torch.cat([x, (strength * num) ** 0.5 * torch.eye(num_features, dtype=torch.float64)])
    columns = torch.cat([rows, torch.cat([torch.ones(num, 1), torch.zeros(num_features, 1)]).double()], 1)
    targets = torch.cat([y, torch.zeros(num_features, 3, dtype=torch.float64)])
    solution = torch.linalg.lstsq(columns, targets).solution
    (fit,) = ridge(train, [strength])
    torch.testing.assert_close(fit.weight, solution[:-1], atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(fit.bias, solution[-1], atol=1e-6, rtol=1e-6)  # features are centred to float32


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
@pytest.mark.parametrize("num_features", [6, 60])
def test_logistic_regression_reaches_the_minimum(kind, num_features):
    train = examples(num_features=num_features, kind=kind)
    for fit in logistic(train, [0.01, 0.1, 1.0]):
        weight, bias = fit.weight.clone().requires_grad_(), fit.bias.clone().requires_grad_()
        loss = class_loss(train.features.double() @ weight + bias, train.classes.double(), kind)
        (loss + fit.settings["strength"] / 2 * weight.square().sum()).backward()
        assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 2e-6, fit.settings
        assert fit.settings["largest_gradient"] < 2e-6


def test_several_labels_are_fitted_as_if_alone():
    train = examples(kind="multilabel")
    (together,) = logistic(train, [0.1])
    (alone,) = logistic(Examples(train.features, train.classes[:, 1:2], "multilabel"), [0.1])
    torch.testing.assert_close(together.weight[:, 1:2], alone.weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_a_grid_of_steps_is_that_of_torch_point_by_point(name, kind):
    train = examples(kind=kind)
    schedule = Schedule(name, [0.05], [0.1], epochs=4, batch_size=16, seed=3, stop_after=4)
    weight, bias = (torch.zeros(rows, 3, requires_grad=True) for rows in (6, 1))
    groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    options = {"lr": 0.05}
    optimizer = torch.optim.AdamW(groups, **options) if name == "adamw" else torch.optim.SGD(groups, momentum=0.9, **options)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    order = torch.Generator().manual_seed(3)
    for _ in range(4):
        for rows in torch.randperm(40, generator=order).split(16):
            optimizer.zero_grad()
            class_loss(train.features[rows] @ weight + bias, train.classes[rows], kind).backward()
            optimizer.step()
            cosine.step()
    fit = gradient_steps(train, schedule, None)
    torch.testing.assert_close(fit.weight, weight.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fit.bias, bias.detach()[0], atol=1e-5, rtol=1e-4)


def test_a_point_of_a_grid_does_not_feel_the_others():
    train, judge = examples(), Judge(examples(seed=1), "accuracy")
    wide = Schedule("adamw", [1e-3, 0.05, 0.3], [0.0, 0.1], epochs=5, batch_size=16, seed=0)
    best = gradient_steps(train, wide, judge)
    alone = Schedule("adamw", [best.settings["lr"]], [best.settings["weight_decay"]], 5, 16, 0)
    again = gradient_steps(train, alone, judge)
    assert again.settings == best.settings
    torch.testing.assert_close(again.weight, best.weight, atol=1e-6, rtol=1e-5)
    repeated = gradient_steps(train, wide, judge)
    assert torch.equal(repeated.weight, best.weight)


def test_of_equal_fits_the_first_is_taken_and_the_better_one_wins():
    val = Examples(torch.eye(2), torch.eye(2), "multiclass")
    right, wrong = torch.eye(2), torch.eye(2).flip(1)
    fits = [Fit(w, torch.zeros(2), {"at": at}) for at, w in enumerate([wrong, right, 2 * right])]
    assert best_fit(fits, Judge(val, "accuracy")).settings == {"at": 1}
    assert [fit.settings["strength"] for fit in ridge(examples(), [0.1, 10.0, 1.0])] == [10.0, 1.0, 0.1]
    assert [fit.settings["strength"] for fit in logistic(examples(), [0.1, 1.0])] == [1.0, 0.1]


def test_standardised_features_are_those_of_the_training_images():
    x = torch.tensor([[1.0, 5.0, 1e6], [3.0, 5.0, 1e6]])
    standardise = Standardise.to(x)
    assert standardise(x).tolist() == [[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert standardise(torch.tensor([[7.0, 9.0, 0.0]])).tolist() == [[5.0, 0.0, 0.0]]


def test_least_squares_outputs_keep_their_order_and_their_threshold():
    fit = Fit(torch.eye(2), torch.zeros(2), {}, least_squares=True)
    scores = fit.scores(torch.tensor([[0.5, 0.49], [-0.2, 1.3]]), "multilabel")
    assert scores[0, 0] == 0.5
    assert scores[1, 0] < scores[0, 1] < 0.5 < scores[1, 1]
