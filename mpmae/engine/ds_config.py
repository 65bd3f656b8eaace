"""The DeepSpeed JSON: read, checked against the run configuration and filled in. DeepSpeed itself is not needed here.

The JSON owns ZeRO stage, buckets, offload and communication; the run configuration owns batch sizes, precision, clipping,
optimizer and schedule. What both need says "auto" in the JSON. DeepSpeed drops a forgotten "auto" or a misspelt section
without a word, so both are errors here.

Source: deepspeed 0.19.8, `runtime/config.py`, `runtime/constants.py`.
"""

import copy
import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpmae.config import RunConfig
from mpmae.errors import ConfigError

AUTO = "auto"

_KNOWN = [
    "activation_checkpointing",
    "aio",
    "bf16",
    "checkpoint",
    "comet",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "data_types",
    "dataloader_drop_last",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "gradient_accumulation_steps",
    "gradient_allreduce_op",
    "gradient_clipping",
    "gradient_predivide_factor",
    "log_level",
    "managed_gradient_accumulation",
    "memory_breakdown",
    "prescale_gradients",
    "seq_parallel_communication_data_type",
    "sparse_gradients",
    "steps_per_print",
    "tensorboard",
    "timers",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "wall_clock_breakdown",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
]

_REFUSED = {
    "optimizer": "the run configuration owns it: set optim.*",
    "scheduler": "the run configuration owns it: set optim.*",
    "fp16": "float16 is not supported; set train.precision=bf16",
    "amp": "NVIDIA apex AMP is gone from DeepSpeed; set train.precision=bf16",
    "bfloat16": "an old name: write bf16",
    "torch_autocast": "the run configuration owns the precision: set train.precision=bf16, which autocasts at every stage",
    "elasticity": "DeepSpeed has removed it; how a run goes on at another world size: docs/multi_node.md",
    "autotuning": "it changes the batch size behind the run configuration",
    "data_efficiency": "the loader owns order and content of the batches",
    "curriculum_learning": "the loader owns order and content of the batches",
    "pipeline": "only data parallelism is supported",
    "tensor_parallel": "only data parallelism is supported",
    "expert_parallel": "only data parallelism is supported",
    "hybrid_engine": "it is for inference during training, which this project does not do",
    "compression_training": "it replaces modules of the model",
    "weight_quantization": "it replaces modules of the model",
    "datastates_ckpt": "it writes in the background, and a checkpoint here is complete when save returns",
    "nebula": "it writes in the background, and a checkpoint here is complete when save returns",
}

_OFFLOADS = ("offload_optimizer", "offload_param")

_FIXED = {  # set otherwise, these break the engine's contract
    "gradient_allreduce_op": ("mean", "the engine scales the loss for an average over ranks"),
    "managed_gradient_accumulation": (True, "the engine counts micro steps with it"),
    "checkpoint.writer": (None, "it may write in the background, and a checkpoint here is complete when save returns"),
    "checkpoint.use_node_local_storage": (False, "a checkpoint is one folder that all ranks see"),
}


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """The JSON object in the file at `path`, as it stands. Raises ConfigError: absent, not JSON, or a key given twice."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no DeepSpeed configuration {path}; see configs/ds/")
    twice: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice.extend(sorted({key for key in keys if keys.count(key) > 1}))
        return dict(pairs)

    try:
        raw = json.loads(path.read_text(), object_pairs_hook=collect)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if twice:
        raise ConfigError(f"{path}: given twice in one section: {', '.join(twice)}; keep one of each")
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: the top level is a {type(raw).__name__}, expected an object as in configs/ds/")
    return raw


def zero_stage(ds_config: dict[str, Any]) -> int:
    """ZeRO stage 0-3 of a DeepSpeed configuration; 0 if it does not say."""
    return _get(ds_config, "zero_optimization.stage", 0)


def resolve_ds_config(
    raw: dict[str, Any],
    config: RunConfig,
    world_size: int,
    micro_batch_size: int,
    num_micro_steps: int,
    where: str | Path = "the DeepSpeed configuration",
) -> dict[str, Any]:
    """A copy of `raw` in which nothing is left open; what DeepSpeed gets and what run.json records.

    Filled in, whether "auto" or absent: the three batch sizes, gradient_clipping (0.0 for none: DeepSpeed's own default is
    to clip at 1.0), bf16.enabled, nvme_path of what is offloaded to nvme (from engine.nvme_path), and float32 for gradient
    accumulation and communication. Resolving twice changes nothing.

    At stage 0 bf16 stays off in the JSON under train.precision=bf16: the engine's autocast over float32 weights does it,
    as DeepSpeed's own bf16 without ZeRO updates its first step wrongly.

    Raises ConfigError with every problem, `where` (the file) named: refused or unknown sections, values that contradict the
    run configuration, an "auto" that nothing fills.
    """
    problems = [_explain_key(key) for key in raw if key not in _KNOWN]
    problems += [
        f"{key} = {_show(_get(raw, key, allowed))}: only {_show(allowed)} works here: {why}"
        for key, (allowed, why) in _FIXED.items()
        if _get(raw, key, allowed) not in (allowed, AUTO)
    ]
    stage = zero_stage(raw)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        problems.append(f"zero_optimization.stage = {_show(stage)}: expected 0, 1, 2 or 3")
        stage = 0

    resolved = copy.deepcopy(raw)
    for key, (value, owner) in _owned(config, stage, world_size, micro_batch_size, num_micro_steps).items():
        given = _get(raw, key, AUTO)
        if given == AUTO:
            problems += _set(resolved, key, value)
        elif isinstance(given, bool) != isinstance(value, bool) or given != value:
            problems.append(f"{key} = {_show(given)}, but {owner} gives {_show(value)}: write {_show(AUTO)}")
    for key, value in _defaults(raw).items():
        if _get(raw, key, AUTO) == AUTO:
            problems += _set(resolved, key, value)

    problems += _fill_nvme_path(resolved, config.engine.nvme_path) + _offload_problems(resolved, stage, config)

    for path in _autos(resolved):
        known = [*_owned(config, 0, 1, 1, 1), *_defaults(raw)]
        problems.append(f"{path} is {_show(AUTO)} and nothing fills it: give a value; filled are {', '.join(known)}")
    if problems:
        raise ConfigError([f"{where}: {problem}" for problem in problems])
    return resolved


def _owned(
    config: RunConfig, stage: int, world_size: int, micro_batch_size: int, num_micro_steps: int
) -> dict[str, tuple[Any, str]]:
    """Per dotted key: its only right value, and who says so."""
    batch = f"{micro_batch_size} samples x {num_micro_steps} micro steps x {world_size} ranks"
    precision = f"train.precision={config.train.precision} at ZeRO stage {stage}"
    return {
        "train_batch_size": (micro_batch_size * num_micro_steps * world_size, batch),
        "train_micro_batch_size_per_gpu": (micro_batch_size, batch),
        "gradient_accumulation_steps": (num_micro_steps, batch),
        "gradient_clipping": (config.optim.clip_grad_norm or 0.0, f"optim.clip_grad_norm={config.optim.clip_grad_norm}"),
        "bf16.enabled": (config.train.precision == "bf16" and stage >= 1, precision),
    }


def _defaults(raw: dict[str, Any]) -> dict[str, Any]:
    """Per dotted key: what is written where the JSON leaves it open."""
    values = {"communication_data_type": "fp32", "data_types.grad_accum_dtype": "fp32"}
    if _get(raw, "zero_optimization.offload_optimizer.device", "none") not in ("none", None):
        # DeepSpeedCPUAdam would be compiled at start-up; torch's fused AdamW does the same on the CPU
        values["zero_force_ds_cpu_optimizer"] = False
    return values


def _fill_nvme_path(resolved: dict[str, Any], folder: Path | None) -> list[str]:
    """Sets the folder of what is offloaded to nvme; returns the problems."""
    problems, num_used = [], 0
    for part in _OFFLOADS:
        section = f"zero_optimization.{part}"
        if _get(resolved, f"{section}.device", None) != "nvme":
            continue
        given = _get(resolved, f"{section}.nvme_path", AUTO)
        if given == AUTO and folder is None:
            problems.append(f"{section} goes to nvme, but where to: set engine.nvme_path to a folder on a local NVMe disk")
            _set(resolved, f"{section}.nvme_path", "(not set)")
        elif given == AUTO:
            _set(resolved, f"{section}.nvme_path", str(folder))
        elif folder is not None and given != str(folder):
            problems.append(f"{section}.nvme_path = {_show(given)}, but engine.nvme_path = {folder}: write {_show(AUTO)}")
        num_used += 1
    if folder is not None and not num_used:
        problems.append(f"engine.nvme_path = {folder}, but nothing is offloaded to nvme; see configs/ds/zero3_nvme.json")
    return problems


def _offload_problems(resolved: dict[str, Any], stage: int, config: RunConfig) -> list[str]:
    """What DeepSpeed would leave where it is, or round, without a word."""
    devices = {part: _get(resolved, f"zero_optimization.{part}.device", None) for part in _OFFLOADS}
    problems = []
    if devices["offload_optimizer"] == "cpu" and stage == 0:
        problems.append("zero_optimization.offload_optimizer: expected stage 1, 2 or 3, stage 0 offloads nothing")
    if devices["offload_optimizer"] == "nvme" and stage < 3:
        problems.append(f"zero_optimization.offload_optimizer: stage {stage} cannot use nvme, expected 3, or device cpu")
    if devices["offload_param"] == "nvme" and config.train.precision == "fp32":
        problems.append(
            "zero_optimization.offload_param: DeepSpeed writes float32 weights to nvme as bfloat16; "
            "set train.precision=bf16, or offload them to cpu"
        )
    if devices["offload_param"] in ("cpu", "nvme") and stage < 3:
        problems.append(f"zero_optimization.offload_param: stage {stage} keeps whole weights, expected stage 3")
    return problems


def uses_nvme(ds_config: dict[str, Any]) -> Path | None:
    """The folder that a resolved configuration offloads to, None if it does not."""
    for part in _OFFLOADS:
        if _get(ds_config, f"zero_optimization.{part}.device", None) == "nvme":
            return Path(_get(ds_config, f"zero_optimization.{part}.nvme_path", ""))
    return None


def without_nvme_path(zero_optimization: dict[str, Any]) -> dict[str, Any]:
    """The section without the folder that is offloaded to: another one on every node and in every job, and no matter."""
    section = copy.deepcopy(zero_optimization)
    for part in _OFFLOADS:
        if isinstance(section.get(part), dict):
            section[part].pop("nvme_path", None)
    return section


def _explain_key(key: str) -> str:
    if key in _REFUSED:
        return f"section {key} is refused: {_REFUSED[key]}"
    close = difflib.get_close_matches(key, _KNOWN, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(_KNOWN)}"
    return f"unknown key {key}, which DeepSpeed would ignore{hint}"


def _get(tree: Any, dotted: str, default: Any) -> Any:
    for key in dotted.split("."):
        if not isinstance(tree, dict) or key not in tree:
            return default
        tree = tree[key]
    return tree


def _set(tree: dict[str, Any], dotted: str, value: Any) -> list[str]:
    """Sets in place; returns the problem if a section on the way is no section."""
    *sections, last = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            return [f"{section} = {_show(tree)}: expected a section with {last}"]
    tree[last] = value
    return []


def _autos(tree: Any, path: str = "") -> Iterator[str]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _autos(value, f"{path}.{key}" if path else key)
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from _autos(value, f"{path}[{index}]")
    elif tree == AUTO:
        yield path


def _show(value: Any) -> str:
    return json.dumps(value)
