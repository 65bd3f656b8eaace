"""Parameter groups, AdamW and the learning rate, the same for every engine."""

import math
from dataclasses import dataclass

from torch import nn, optim

from mpmae.config import OptimSection, RunConfig
from mpmae.errors import ConfigError

REFERENCE_BATCH_SIZE = 256


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW groups of the parameters that train: those with weight decay first, then those without.

    Exempt are parameters of ndim <= 1 and those named `*.bias`; GRN's gamma and beta (ndim 2) and mask tokens are decayed.
    Source: MMEarth-train, by the rule of timm's `param_groups_weight_decay`. To be built before DeepSpeed sees the module:
    ZeRO-3 leaves every parameter with ndim 1.
    """
    decayed, exempt = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (exempt if parameter.ndim <= 1 or name.endswith(".bias") else decayed).append(parameter)
    if not decayed and not exempt:
        raise ConfigError(f"{type(module).__name__} has no parameter that trains: all have requires_grad=False")
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, config: OptimSection) -> optim.AdamW:
    """AdamW over `parameter_groups`. Its rate is 0 until `Engine.step` sets it.

    Fused, as that kernel can leave weights and moments alone on a non-finite gradient without asking the host.
    """
    groups = parameter_groups(module, config.weight_decay)
    return optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def peak_lr(config: RunConfig) -> float:
    """The rate at the end of the warm-up: `optim.lr`, or `optim.blr` scaled linearly by the global batch over 256."""
    if config.optim.lr is not None:
        return config.optim.lr
    return config.optim.blr * config.train.global_batch_size / REFERENCE_BATCH_SIZE


@dataclass(frozen=True)
class LearningRate:
    """The rate of a step: linear from 0 to `peak` over the warm-up, then a half-cycle cosine to `min_lr`.

    `warmup_steps`, `total_steps` and the argument share one unit (steps; epochs serve as well) and may be fractions. Past
    the end the rate stays `min_lr`. Source: MMEarth-train, `adjust_learning_rate`.
    """

    peak: float
    min_lr: float
    warmup_steps: float
    total_steps: float

    def __call__(self, step: float) -> float:
        """The rate used by step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        length = self.total_steps - self.warmup_steps
        progress = min((step - self.warmup_steps) / length, 1.0) if length > 0 else 1.0
        return self.min_lr + (self.peak - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
