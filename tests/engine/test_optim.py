import pytest
import torch
from torch import nn

from mpmae.config import validate
from mpmae.engine import LearningRate, peak_lr
from mpmae.engine.base import skip_if_not_finite
from mpmae.engine.optim import build_optimizer, layer_decay_groups, parameter_groups
from mpmae.errors import ConfigError


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


class Dense(nn.Module):
    """The names of a dense ConvNeXt V2 with 2 + 1 blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3)})
        self.downsamples = nn.ModuleList([nn.ModuleDict({"norm": nn.LayerNorm(4), "conv": nn.Conv2d(4, 4, 2)})])
        self.stages = nn.ModuleList(nn.ModuleList(Block() for _ in range(depth)) for depth in (2, 1))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("quirks", "depths"),
    [
        (False, {"stem": 0, "stages.0.0": 1, "stages.0.1": 2, "downsamples.0": 3, "stages.1.0": 3, "norm": 4, "head": 4}),
        (True, {"stem": 4, "stages.0.0": 1, "stages.0.1": 2, "downsamples.0": 1, "stages.1.0": 3, "norm": 4, "head": 4}),
    ],
)
def test_layer_decay(quirks, depths):
    """The rate falls with the distance from the head; the published code mistakes stem and downsampling."""
    module = Dense()
    module.stem["conv"].bias.requires_grad_(False)
    names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    groups = layer_decay_groups(module, 0.3, 0.5, reference_quirks=quirks)
    got = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert got.keys() == set(names.values())
    assert len(groups) == len({(g["lr_scale"], g["weight_decay"]) for g in groups})
    for name, (scale, weight_decay) in got.items():
        depth = next(value for prefix, value in depths.items() if name.startswith(prefix + "."))
        assert scale == 0.5 ** (4 - depth), name
        exempt = name.endswith(("bias", "gamma", "beta", "log_variance", "norm.weight"))
        assert weight_decay == (0.0 if exempt else 0.3), name


@pytest.mark.gpu
def test_a_step_on_the_host_waits_for_the_verdict_of_the_gpu():
    module = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    before = module.weight.detach().clone()
    for _ in range(3):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, float("nan"))
        torch.cuda._sleep(100_000_000)  # the norm comes late
        skip_if_not_finite(optimizer, torch.full((), float("nan"), device="cuda"))
        optimizer.step()
    assert torch.equal(module.weight, before)


def test_layer_decay_needs_stages():
    with pytest.raises(ConfigError, match="Linear has no stages"):
        layer_decay_groups(nn.Linear(2, 2), 0.3, 0.9)


@pytest.mark.parametrize("layer_decay", [0, -0.9, 1.1])
def test_layer_decay_is_a_factor(layer_decay):
    with pytest.raises(ConfigError, match=r"expected a factor in \(0, 1\]"):
        layer_decay_groups(Dense(), 0.3, layer_decay)


def test_layer_decay_of_nothing():
    with pytest.raises(ConfigError, match="Dense has no parameter that trains"):
        layer_decay_groups(Dense().requires_grad_(False), 0.3, 0.9)
