"""Parameter groups, AdamW and the learning rate, the same for every engine."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn, optim

from mpmae.config import OptimSection, RunConfig
from mpmae.errors import ConfigError

REFERENCE_BATCH_SIZE = 256


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW groups of the parameters that train: those with weight decay first, then those without.

    A module may say itself which: `module.decays(name)`. Else exempt are parameters of ndim <= 1 and those named `*.bias`;
    GRN's gamma and beta (ndim 2) and mask tokens are decayed. Source: MMEarth-train, by the rule of timm's
    `param_groups_weight_decay`. To be built before DeepSpeed sees the module: ZeRO-3 leaves every parameter with ndim 1.
    """
    decayed, exempt = [], []
    decays = getattr(module, "decays", None)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_decayed = decays(name) if decays else parameter.ndim > 1 and not name.endswith(".bias")
            (decayed if is_decayed else exempt).append(parameter)
    if not decayed and not exempt:
        raise ConfigError(_nothing_trains(module))
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def layer_decay_groups(
    module: nn.Module, weight_decay: float, layer_decay: float, *, reference_quirks: bool = False
) -> list[dict]:
    """AdamW groups for fine-tuning an encoder: by depth, each with and without weight decay, with an `lr_scale`.

    A module may say itself how deep a parameter lies, `module.layer_depth(name)` up to `module.num_layers`, as a MultiMAE's
    encoder does. A dense ConvNeXt V2 goes by its names:

    module: parameters named stem.*, downsamples.i.*, stages.s.b.* (from `module.stages`, a list of lists of blocks) and
    anything else (norm, head). Depth counts from 0: the stem 0, the blocks 1, 2, ... in order, a downsampling as the block
    after it, the rest one more than the last block; lr_scale = layer_decay ** (depth of the rest - depth). Exempt from
    weight decay are parameters of ndim <= 1, those named `*.bias`, `*.gamma` or `*.beta` (GRN too, unlike in pretraining),
    and those of `module.no_weight_decay()`.
    reference_quirks: depths of the published code, which renamed the layers but not its rule: the stem counts among the rest
    (scale 1), a downsampling as the first block of the stage before it.
    Source: MMEarth-train `optim_factory.py`, layer_decay_type "single". Raises ConfigError for a module without
    stages or without parameters that train, and for a layer_decay outside (0, 1].
    """
    if not 0 < layer_decay <= 1:
        raise ConfigError(f"layer_decay_groups: layer_decay = {layer_decay}, expected a factor in (0, 1]")
    depth_of, last = _depths(module, reference_quirks)
    exempt = module.no_weight_decay() if hasattr(module, "no_weight_decay") else set()
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        depth = depth_of(name)
        decayed = parameter.ndim > 1 and not name.endswith((".bias", ".gamma", ".beta")) and name not in exempt
        settings = {"weight_decay": weight_decay if decayed else 0.0, "lr_scale": layer_decay ** (last - depth)}
        groups.setdefault((depth, decayed), {"params": [], **settings})["params"].append(parameter)
    if not groups:
        raise ConfigError(_nothing_trains(module))
    return [groups[key] for key in sorted(groups)]


def _nothing_trains(module: nn.Module) -> str:
    return f"{type(module).__name__} has no parameter that trains: all have requires_grad=False"


def _depths(module: nn.Module, reference_quirks: bool) -> tuple[Callable[[str], int], int]:
    """How deep a parameter of that name lies, and the depth of what follows the last block."""
    if hasattr(module, "layer_depth"):
        if reference_quirks:
            raise ConfigError(
                f"layer_decay_groups: reference_quirks is for a ConvNeXt V2, not for {type(module).__name__}; leave it out"
            )
        return module.layer_depth, module.num_layers
    stages = getattr(module, "stages", None)
    if stages is None:
        name = type(module).__name__
        raise ConfigError(f"layer_decay_groups: {name} has no stages; expected a dense ConvNeXt V2, as create_encoder gives")
    first_block = [1]  # depth of the first block of each stage, and of what follows the last
    for stage in stages:
        first_block.append(first_block[-1] + len(stage))
    return lambda name: _depth(name.split("."), first_block, reference_quirks), first_block[-1]


def _depth(name: list[str], first_block: list[int], reference_quirks: bool) -> int:
    if name[0] == "stages":
        return first_block[int(name[1])] + int(name[2])
    if name[0] == "downsamples":
        return first_block[int(name[1]) + (0 if reference_quirks else 1)]
    return 0 if name[0] == "stem" and not reference_quirks else first_block[-1]


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
