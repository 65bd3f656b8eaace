"""The run configuration: one typed tree, read as defaults < YAML file < `key=value`.

The defaults of this module are the published recipe of MP-MAE (arXiv 2405.02771, section 4 and the MMEarth-train code).
Everything that the DeepSpeed JSON owns (ZeRO stage, buckets, offload, communication) is not here.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mpmae.errors import ConfigError
from mpmae.modalities import TARGETS


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunSection(_Section):
    """Where the run writes and how it is called."""

    dir: Path = Path("runs/pretrain")
    name: str | None = Field(None, description="name in wandb and the report; the folder's name if absent")


class DataSection(_Section):
    """Which samples, in which form."""

    shards: Path = Path("build/demo/shards")
    train_split: str = "train"
    val_split: str = "val"
    hflip: bool = True
    vflip: bool = True
    num_workers: int = Field(2, ge=1, description="loader threads per rank")
    prefetch: int = Field(4, ge=1, description="micro batches kept ready")


class ModelSection(_Section):
    """What is trained; names and meanings as in `mpmae.create_model`."""

    name: str = "mpmae_atto"
    img_size: int = Field(56, gt=0)
    patch_size: int = Field(8, gt=0)
    bands_in: tuple[str, ...] | None = Field(None, description="Sentinel-2 bands the encoder reads; None: all but B10")
    modalities_out: dict[str, tuple[str, ...] | None] | tuple[str, ...] = Field(
        TARGETS, description="targets, as names or as {name: bands or null}"
    )
    mask_ratio: float = Field(0.6, gt=0, lt=1)
    stem: Literal["mmearth", "convnext"] = "mmearth"
    loss_weighting: Literal["uncertainty", "unweighted"] = "uncertainty"
    norm_pix_loss: bool = True
    decoder_dim: int = Field(512, gt=0)
    decoder_depth: int = Field(1, gt=0)
    grn_scope: Literal["sample", "batch"] | None = Field(None, description="None: batch with reference_quirks, else sample")
    init: Literal["reference", "convnextv2"] = "reference"
    reference_quirks: bool = False


class TrainSection(_Section):
    """How long, how much at once, in which precision."""

    epochs: int = Field(200, gt=0)
    max_steps: int | None = Field(None, gt=0, description="end the run, and its schedule, after this many steps")
    global_batch_size: int = Field(4096, gt=0)
    micro_batch_size: int | None = Field(None, gt=0, description="samples per rank and micro step; None: no accumulation")
    seed: int = Field(0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    validate_every_steps: int | None = Field(None, gt=0, description="None: only at the end")
    val_samples: int | None = Field(4096, gt=0, description="at most this many validation tiles, spread evenly; None: all")


class OptimSection(_Section):
    """AdamW with warm-up and half-cycle cosine, per step."""

    blr: float = Field(1.5e-4, gt=0, description="lr = blr * global batch / 256")
    lr: float | None = Field(None, gt=0, description="the peak rate itself; wins over blr")
    min_lr: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup_epochs: float = Field(40, ge=0)
    warmup_steps: int | None = Field(None, ge=0, description="wins over warmup_epochs")
    clip_grad_norm: float | None = Field(None, gt=0)


class CheckpointSection(_Section):
    """When to save and what to continue from."""

    every_steps: int = Field(1000, gt=0)
    keep_last: int = Field(3, gt=0)
    resume: str = Field("never", description="never, auto (the newest complete one in run.dir) or a checkpoint folder")


class EngineSection(_Section):
    """What runs the step."""

    name: Literal["ddp", "deepspeed", "fsdp"] = "ddp"
    ds_config: Path | None = Field(None, description="DeepSpeed JSON (`--ds-config`); deepspeed only")


class LogSection(_Section):
    """Where metrics go besides metrics.jsonl and the terminal."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "mpmae"
    tensorboard: bool = False


class RunConfig(_Section):
    """The whole tree."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    checkpoint: CheckpointSection = CheckpointSection()
    engine: EngineSection = EngineSection()
    log: LogSection = LogSection()


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Defaults, then the YAML file at `path`, then `overrides` such as `train.max_steps=20`.

    Raises ConfigError with every problem at once: file absent or not YAML, unknown key (with the closest match), bad value.
    """
    tree = _read_yaml(Path(path)) if path else {}
    problems: list[str] = []
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            problems.append(f"override {text!r} is not of the form key=value, such as train.max_steps=20")
            continue
        try:
            parsed = yaml.safe_load(value) if value.strip() else None
        except yaml.YAMLError as error:
            problems.append(f"override {text!r}: the value is not YAML ({error})")
            continue
        if not _set(tree, key.strip().split("."), parsed):
            problems.append(f"override {text!r}: {key!r} goes through a value that is not a section")
    if problems:
        raise ConfigError(problems)
    return validate(tree, str(path) if path else "the configuration")


def validate(tree: dict[str, Any], where: str) -> RunConfig:
    """RunConfig of a plain tree; ConfigError listing every problem, `where` naming the source."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError([_explain(e, where) for e in error.errors()]) from error


def known_keys() -> list[str]:
    """All keys, dotted."""
    return [f"{section}.{key}" for section, f in RunConfig.model_fields.items() for key in f.annotation.model_fields]


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"no configuration file {path}; see configs/run/")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{path}: the top level is a {type(tree).__name__}, expected sections such as `train:`")
    return tree or {}


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> bool:
    for key in keys[:-1]:
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            return False
    tree[keys[-1]] = value
    return True


def _explain(error: dict[str, Any], where: str) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, [*known_keys(), *RunConfig.model_fields], n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else f"; known sections: {', '.join(RunConfig.model_fields)}"
        return f"{where}: unknown key {key}{hint}"
    return f"{where}: {key} = {error['input']!r}: {error['msg']}"
