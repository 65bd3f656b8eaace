import pytest
import torch
from torch import nn

from mpmae.config import validate
from mpmae.engine import LearningRate, peak_lr
from mpmae.engine.optim import build_optimizer, parameter_groups
from mpmae.errors import ConfigError

# rows (epoch, rate) of shared/golden/manifest.json `lr_schedule`: lr, min_lr, warmup_epochs, epochs, rows
GOLDEN = [
    (
        0.0024,
        0.0,
        40,
        200,
        [
            (0, 0.0),
            (0.01, 6e-07),
            (1.99, 0.0001194),
            (4.999, 0.00029993999999999995),
            (39.9, 0.0023939999999999994),
            (40, 0.0024),
            (40.5, 0.0023999421707511935),
            (120, 0.0012),
            (199.99, 2.3131885207305912e-11),
        ],
    ),
    (
        0.001,
        1e-05,
        2,
        10,
        [
            (0, 0.0),
            (1.99, 0.000995),
            (2, 0.001),
            (3.25, 0.0009415510258524358),
            (5, 0.00069442829902072),
            (9.99, 1.0003816756172075e-05),
        ],
    ),
    (
        0.001,
        1e-06,
        0,
        5,
        [
            (0, 0.001),
            (0.01, 0.0009999901402976406),
            (2, 0.0006548539888902864),
            (4.999, 1.0000985973447437e-06),
            (5, 1e-06),
        ],
    ),
]


@pytest.mark.parametrize(("peak", "min_lr", "warmup", "total", "rows"), GOLDEN)
def test_learning_rate_is_the_references(peak, min_lr, warmup, total, rows):
    schedule = LearningRate(peak, min_lr, warmup, total)
    for epoch, expected in rows:
        assert schedule(epoch) == pytest.approx(expected, rel=1e-9, abs=1e-18), epoch


def test_learning_rate_per_step():
    schedule = LearningRate(peak=1.0, min_lr=0.1, warmup_steps=10, total_steps=50)
    assert [schedule(step) for step in (0, 1, 9, 10)] == pytest.approx([0.0, 0.1, 0.9, 1.0])
    assert schedule(30) == pytest.approx(0.55)
    assert schedule(50) == schedule(99) == pytest.approx(0.1)


def test_warmup_as_long_as_the_run():
    schedule = LearningRate(1.0, 0.0, 10, 10)
    assert schedule(9) == 0.9
    assert schedule(10) == 0.0


def test_peak_lr():
    assert peak_lr(validate({}, "test")) == pytest.approx(1.5e-4 * 4096 / 256)
    assert peak_lr(validate({"optim": {"lr": 0.5}}, "test")) == 0.5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.gamma = nn.Parameter(torch.zeros(1, 3))
        self.token = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.log_variance = nn.Parameter(torch.zeros(4))
        self.wide = nn.Module()
        self.wide.bias = nn.Parameter(torch.zeros(2, 2))
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_parameter_groups():
    module = Block()
    names = {id(p): name for name, p in module.named_parameters()}
    decayed, exempt = parameter_groups(module, 0.05)
    assert decayed["weight_decay"] == 0.05
    assert exempt["weight_decay"] == 0.0
    assert {names[id(p)] for p in decayed["params"]} == {"dense.weight", "gamma", "token"}
    assert {names[id(p)] for p in exempt["params"]} == {
        "dense.bias",
        "norm.weight",
        "norm.bias",
        "log_variance",
        "wide.bias",
    }


def test_nothing_to_train():
    with pytest.raises(ConfigError, match="no parameter that trains"):
        parameter_groups(nn.Identity(), 0.05)


def test_optimizer_takes_its_settings_from_the_run():
    config = validate({"optim": {"betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.3}}, "test")
    optimizer = build_optimizer(Block(), config.optim)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.9), 1e-6, 0.3)
