"""The run configuration: one typed tree, read as defaults < YAML file < `key=value`.

The defaults of this module are the published recipe of MP-MAE (arXiv 2405.02771, section 4 and the MMEarth-train code), but
for the initial weights (`model.init`), which were measured: see `mpmae.models.init`.
Everything that the DeepSpeed JSON owns (ZeRO stage, buckets, offload, communication) is not here.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_serializer, field_validator
from pydantic_core import PydanticCustomError

from mpmae.config_model import ModelSection, MPMAESection
from mpmae.config_tree import Beta, Float, Int, Location, Section, Text, TextPath, keys_of, load_tree, validate_tree
from mpmae.durations import seconds_of
from mpmae.remote_store import shown

_SECRET_WORDS = {"key", "secret", "password", "passphrase", "token", "sas", "credential", "credentials", "connection"}
_SECRET_WORDS |= {"auth", "authorization", "bearer", "cookie", "cookies", "sig"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of account_key, accountKey, X-Api-Key, SAS
_PUBLIC_TOKENS = ("anon", "cloud", "google_default")


class RunSection(Section):
    """Where the run writes and how it is called."""

    dir: TextPath = Path("runs/pretrain")
    name: Text | None = Field(None, description="name in wandb and the report; the folder's name if absent")


class DataSection(Section):
    """Which samples, in which order and form, and how they are read."""

    shards: Location = Field(Path("build/demo/shards"), description="a folder, or a URL such as s3://bucket/folder")
    storage_options: dict[str, Any] = Field({}, description="arguments of the URL's file system (fsspec), never a secret")
    cache_dir: TextPath | None = Field(None, description="where shards of a URL are kept; None: the user's cache folder")
    cache_size_gb: Float | None = Field(None, gt=0, description="what cache_dir may grow to, in 10^9 bytes")
    train_split: Text = "train"
    val_split: Text = "val"
    order: Literal["exact", "window"] = Field("exact", description="window: reads a few shards at a time, for URLs")
    window_shards: Int | None = Field(None, ge=1, validate_default=True, description="shards mixed at a time, with window")
    hflip: bool = True
    vflip: bool = True
    loader: Literal["cpu", "dali"] = "cpu"
    num_workers: Int = Field(2, ge=1, description="loader threads per rank")
    prefetch: Int = Field(4, ge=1, description="micro batches kept ready")
    host_cache_gb: Float = Field(0.0, ge=0, description="stored samples kept in host memory, per rank")
    device_cache_gb: Float = Field(0.0, ge=0, description="stored samples kept in GPU memory, per rank; dali only")

    @field_serializer("shards")
    def _without_secrets(self, shards: Path | str) -> str:
        """What a URL holds beside its place, such as an access token, stays out of run.json, checkpoints and trackers."""
        return shown(shards) if isinstance(shards, str) else str(shards)

    @field_validator("storage_options", "cache_dir", "cache_size_gb")
    @classmethod
    def _for_urls(cls, value: Any, info: ValidationInfo) -> Any:
        if value and isinstance(info.data.get("shards"), Path):
            raise PydanticCustomError("key_of_a_url", "expected none: data.shards is a folder, not a URL")
        return value

    @field_validator("storage_options")
    @classmethod
    def _nothing_secret(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The run's record holds the configuration, and trackers send it away."""
        if secrets := sorted(_secrets(options)):
            raise PydanticCustomError(
                "secret_in_options",
                "{secrets} would be written to run.json; leave secrets to the environment or the store's own file",
                {"secrets": ", ".join(secrets)},
            )
        return options

    @field_validator("window_shards")
    @classmethod
    def _window_of_an_order(cls, window_shards: int | None, info: ValidationInfo) -> int | None:
        order = info.data.get("order")
        if order == "exact" and window_shards is not None:
            raise PydanticCustomError("window_without_order", "data.order = exact has no window; set data.order = window")
        if order == "window" and window_shards is None:
            raise PydanticCustomError("order_without_window", "data.order = window needs a number of shards, such as 16")
        return window_shards

    @field_validator("device_cache_gb")
    @classmethod
    def _device_of_dali(cls, size: float, info: ValidationInfo) -> float:
        if size and info.data.get("loader") == "cpu":
            raise PydanticCustomError("device_cache_of_cpu", "data.loader = cpu cannot use it; set data.loader = dali")
        return size


def _secrets(options: Mapping[str, Any], above: str = "") -> set[str]:
    """Dotted names of the options that sound like a secret; the public tokens of gcsfs do not count."""
    found = set()
    for name, value in options.items():
        if isinstance(value, Mapping):
            found |= _secrets(value, f"{above}{name}.")
        elif _SECRET_WORDS & {word.lower() for word in _WORD.findall(str(name))} and value not in _PUBLIC_TOKENS:
            found.add(f"{above}{name}")
    return found


class TrainSection(Section):
    """How long, how much at once, in which precision."""

    epochs: Int = Field(200, gt=0)
    max_steps: Int | None = Field(None, gt=0, description="end the run, and its schedule, after this many steps")
    global_batch_size: Int = Field(4096, gt=0, le=10**12)
    micro_batch_size: Int | None = Field(None, gt=0, description="samples per rank and micro step; None: no accumulation")
    seed: Int = Field(0, ge=0, lt=2**63)
    precision: Literal["fp32", "bf16"] = "fp32"
    validate_every_steps: Int | None = Field(None, gt=0, description="None: only at the end")
    val_samples: Int | None = Field(4096, gt=0, description="at most this many validation tiles, of few shards; None: all")
    deterministic: bool = Field(False, description="the same bits every time on the same ranks; slower on a GPU")


class OptimSection(Section):
    """AdamW with warm-up and half-cycle cosine, per step."""

    blr: Float = Field(1.5e-4, gt=0, description="lr = blr * global batch / 256")
    lr: Float | None = Field(None, gt=0, description="the peak rate itself; wins over blr")
    min_lr: Float = Field(0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Float = Field(1e-8, gt=0)
    weight_decay: Float = Field(0.05, ge=0)
    warmup_epochs: Float = Field(40, ge=0)
    warmup_steps: Int | None = Field(None, ge=0, description="wins over warmup_epochs")
    clip_grad_norm: Float | None = Field(None, gt=0)

    @field_validator("min_lr")
    @classmethod
    def _below_the_peak(cls, min_lr: float, info: ValidationInfo) -> float:
        lr = info.data.get("lr")
        if lr is not None and min_lr > lr:
            raise PydanticCustomError("min_lr_above_lr", "expected at most optim.lr = {lr}", {"lr": lr})
        return min_lr


class CheckpointSection(Section):
    """When to save and what to continue from."""

    every_steps: Int = Field(1000, gt=0)
    keep_last: Int = Field(3, gt=0)
    resume: Text = Field("never", description="never, auto (the newest complete one in run.dir) or a checkpoint folder")
    background: bool = Field(False, description="write while training goes on; ddp and fsdp only")


class EngineSection(Section):
    """What runs the step."""

    name: Literal["ddp", "deepspeed", "fsdp"] = "ddp"
    ds_config: TextPath | None = Field(None, description="DeepSpeed JSON (`--ds-config`); deepspeed only")
    shard_size: Int | None = Field(None, gt=0, description="fsdp: ranks that share a copy of the weights (HSDP); None: all")
    cpu_offload: bool = Field(False, description="fsdp: weights, gradients and moments in host memory")
    nvme_path: TextPath | None = Field(None, description="deepspeed: folder on a local disk for offloads to nvme")
    activation_checkpointing: bool = Field(False, description="compute blocks again in the backward: less memory, more time")
    compile: bool = Field(False, description="torch.compile of the blocks; not with ZeRO-3")


class GuardSection(Section):
    """What ends a run early, and what is watched."""

    time_limit: Text | None = Field(None, description="such as 3:50:00 (h:m:s): then save and ask to be queued again")
    max_skipped_steps: Int = Field(
        10, gt=0, description="end after so many steps in a row without a finite loss and gradient"
    )
    spike_factor: Float | None = Field(
        3.0, gt=1, description="say so when the losses, each over its recent median, have such a mean over the modalities"
    )
    stall_s: Float = Field(600.0, gt=0, description="name the rank that has made no progress for so long, and end")
    rendezvous_timeout_s: Float = Field(300.0, gt=0, description="wait so long at the start for all ranks to come")

    @field_validator("time_limit")
    @classmethod
    def _a_duration(cls, time_limit: str | None) -> str | None:
        try:
            time_limit is None or seconds_of(time_limit)
        except ValueError as error:
            raise PydanticCustomError("no_duration", "{problem}", {"problem": str(error)}) from None
        return time_limit


class ProbeSection(Section):
    """What the features are worth while training goes on: kNN and a linear probe on a small labelled set."""

    dataset: TextPath | None = Field(None, description="GEO-Bench task's folder, HDF5 file or CSV; None: no probe")
    format: Literal["auto", "geobench", "h5", "geotiff"] = Field("auto", description="auto: told by what lies there")
    partition: Text = Field("default", description="geobench: NAME_partition.json")
    product_level: Literal["auto", "l1c", "l2a", "none"] = Field(
        "auto", description="Sentinel-2 product of the images; auto: what the set says or is known for; none: not known"
    )
    every_steps: Int = Field(1000, gt=0, description="besides before the first step and after the last")
    max_samples: Int = Field(1000, ge=2, description="at most this many images to train on, and as many to judge by")
    ks: tuple[Annotated[Int, Field(gt=0)], ...] = Field((5, 20), min_length=1, description="numbers of neighbours")
    normalise: Literal["auto", "pretraining", "dataset"] = Field(
        "auto", description="statistics; auto: the shards' for the set's product level where both are known"
    )
    size: Int | None = Field(None, gt=0, description="side in pixels that the encoder sees; None: the stored one")
    fit: Literal["resize", "tile", "crop"] = Field("resize", description="what makes an image of another size fit")
    host_cache_gb: Float = Field(
        4.0, ge=0, description="prepared images kept in host memory, per rank; others are read again"
    )


class LogSection(Section):
    """Where metrics go besides metrics.jsonl and the terminal."""

    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: Text = "mpmae"
    tensorboard: bool = False
    profile_steps: tuple[Int, Int] | None = Field(None, description="[first, last]: steps that torch's profiler traces")

    @field_validator("profile_steps")
    @classmethod
    def _in_order(cls, steps: tuple[int, int] | None) -> tuple[int, int] | None:
        if steps is not None and not 1 <= steps[0] <= steps[1]:
            raise PydanticCustomError("steps_out_of_order", "expected 1 <= first <= last, such as [10, 12]")
        return steps


class RunConfig(Section):
    """The whole tree."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    model: ModelSection = MPMAESection()
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    checkpoint: CheckpointSection = CheckpointSection()
    engine: EngineSection = EngineSection()
    guard: GuardSection = GuardSection()
    probe: ProbeSection = ProbeSection()
    log: LogSection = LogSection()


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Defaults, then the YAML file at `path`, then `overrides` such as `train.max_steps=20`. Raises ConfigError."""
    return load_tree(RunConfig, path, overrides)


def validate(tree: dict[str, Any], where: str, origins: Mapping[str, str] | None = None) -> RunConfig:
    """RunConfig of a plain tree that `where` names in messages. Raises ConfigError."""
    return validate_tree(RunConfig, tree, where, origins)


def known_keys() -> list[str]:
    """All keys, dotted."""
    return keys_of(RunConfig)
