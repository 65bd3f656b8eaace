"""Weights from any checkpoint that this project knows, under our names.

| source                                           | how it is told                                             |
|--------------------------------------------------|------------------------------------------------------------|
| our checkpoint (`step-N`), a run folder          | checkpoint.json, `checkpoints/`: the newest one            |
| an exported folder                               | config.json, model.safetensors or checkpoint.pth           |
| DeepSpeed, any ZeRO stage and number of ranks    | `*mp_rank_00_model_states.pt`                              |
| torch.distributed.checkpoint                     | `.metadata`                                                |
| file: safetensors                                | its suffix                                                 |
| file: pickle (.pth, .pt, .bin, ...)              | the rest; state dict bare, or below one of `_WRAPPED`      |

Whose names a state dict has is told by the names themselves (`names_in.scheme_of`).
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mpmae.checkpoint_format import (
    ENGINE_FOLDER,
    META_NAME,
    MMEARTH_NAME,
    MODEL_NAME,
    all_checkpoints,
    load_meta,
    newest_checkpoint,
)
from mpmae.errors import CheckpointError
from mpmae.models.interop import folders
from mpmae.models.interop.convnext import canonical_convnext
from mpmae.models.interop.multimae import BALANCER, canonical_multimae, config_of
from mpmae.models.interop.multimae_names import MULTIMAE_SCHEMES, VIT
from mpmae.models.interop.names_in import scheme_of, strip_wrappers
from mpmae.models.interop.pickles import load_pickle
from mpmae.models.interop.vit import canonical_vit
from mpmae.models.interop.weights import Weights

CONFIG_NAME = "config.json"
_WRAPPED = ("model", "state_dict", "module")
_WITHIN = "encoder."  # before the names of a MultiMAE's encoder that is part of another model
_Raw = tuple[dict[str, Tensor], dict[str, Any] | None]  # a state dict and the command line of the program that wrote it


def read_weights(source: Mapping[str, Tensor] | str | Path) -> Weights:
    """The weights of a checkpoint: a state dict, a file or a folder (see the module's table). No code of a file is run.

    Raises CheckpointError: unreadable, torn or refused file, no state dict in it, names of no known scheme, copies of the
    shared decoder that differ, weights that are no numbers.
    """
    if isinstance(source, Mapping):
        return _canonical(_unwrapped(source), "the state dict", None)
    path = Path(source)
    if not path.exists():
        raise CheckpointError(f"no checkpoint {path}")
    raw, config, path = _read_folder(path) if path.is_dir() else (_read_file(path), _config_beside(path), path)
    return _canonical(raw, str(path), config)


def _read_folder(folder: Path) -> tuple[_Raw, dict[str, Any] | None, Path]:
    """State dict and command line, config, and the folder that they were found in."""
    if (folder / "checkpoints").is_dir():
        newest = newest_checkpoint(folder / "checkpoints")
        if newest is None:
            raise CheckpointError(f"run folder {folder} has no complete checkpoint in {folder / 'checkpoints'}")
        folder = newest
    elif all_checkpoints(folder):
        folder = newest_checkpoint(folder) or folder
    if (folder / META_NAME).is_file():
        return _read_file(folder / MODEL_NAME), load_meta(folder), folder
    for name in (MODEL_NAME, MMEARTH_NAME):
        if (folder / name).is_file():
            return _read_file(folder / name), _config_beside(folder / name), folder
    tag = folder / "latest"
    candidates = [folder, folder / ENGINE_FOLDER / "deepspeed"]
    if tag.is_file():  # DeepSpeed's own pointer to the newest of several
        candidates.append(folder / tag.read_text(errors="replace").strip())
    for candidate in candidates:
        if folders.is_deepspeed(candidate):
            return (folders.read_deepspeed(candidate), None), None, candidate
        if folders.is_dcp(candidate):
            return (folders.read_dcp(candidate), None), None, candidate
    raise CheckpointError(
        f"folder {folder} is no checkpoint: expected {META_NAME} or {MODEL_NAME} (ours), checkpoints/ (a run), "
        "*mp_rank_00_model_states.pt (DeepSpeed) or .metadata (torch.distributed.checkpoint)"
    )


def _read_file(path: Path) -> _Raw:
    if path.suffix == ".safetensors":
        try:
            return load_file(path), None
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    content, command_line = _unwrapped(load_pickle(path))
    if not isinstance(content, Mapping) or not content or not all(torch.is_tensor(value) for value in content.values()):
        raise CheckpointError(
            f"{path}: no state dict in it; expected one at the top level or under {', '.join(map(repr, _WRAPPED))}"
        )
    return content, command_line


def _unwrapped(content: Any) -> _Raw:
    """The state dict in what a training program saved beside its optimizer, command line, ...; else `content` as it is.

    The log variances of a published MultiMAE are a module of their own, beside the model.
    """
    inside = (content[key] for key in _WRAPPED if isinstance(content, Mapping) and isinstance(content.get(key), Mapping))
    state = next(inside, content)
    if state is content or not isinstance(state, Mapping):
        return (dict(content) if isinstance(content, Mapping) else content), None
    balancer, args = content.get("loss_balancer"), content.get("args")
    log_vars = {strip_wrappers(name): value for name, value in balancer.items()} if isinstance(balancer, Mapping) else {}
    found = {BALANCER: log_vars["log_vars"]} if "log_vars" in log_vars else {}
    return {**state, **found}, vars(args) if isinstance(args, argparse.Namespace) else None


def _config_beside(path: Path) -> dict[str, Any] | None:
    config = path.with_name(CONFIG_NAME)
    if not (path.suffix == ".safetensors" or path.name == MMEARTH_NAME) or not config.is_file():
        return None
    try:
        content = json.loads(config.read_text())
    except ValueError as error:
        raise CheckpointError(f"{config} is not JSON: {error}") from error
    return content if isinstance(content, dict) else None


def _raw_problems(raw: dict[Any, Any], where: str) -> list[str]:
    """What is no name, no tensor, or twice there once `strip_wrappers` has gone over the names."""
    problems = [f"{where}: key {name!r} is no name of a weight" for name in raw if not isinstance(name, str)]
    problems += [f"{where}: {name} is a {type(v).__name__}, no tensor" for name, v in raw.items() if not torch.is_tensor(v)]
    first: dict[str, str] = {}
    for name in raw:
        if isinstance(name, str) and first.setdefault(strip_wrappers(name), name) != name:
            problems.append(f"{where}: {name} and {first[strip_wrappers(name)]} are the same weight; take one of them out")
    return problems


def _canonical(raw: _Raw, where: str, config: dict[str, Any] | None) -> Weights:
    state, command_line = raw
    problems = _raw_problems(state, where)
    if problems:
        raise CheckpointError(problems)
    names = {strip_wrappers(name): value for name, value in state.items()}
    if any(name.startswith(f"{_WITHIN}input_adapters.") for name in names):  # of a model that predicts label maps
        names = {name.removeprefix(_WITHIN): value for name, value in names.items()}
    scheme = scheme_of(names)
    if scheme is None:
        shown = ", ".join(list(names)[:5]) or "none"
        raise CheckpointError(
            f"{where}: {len(names)} names of no known layout ({shown}, ...); expected a ConvNeXt V2 or MP-MAE of "
            "MMEarth-train, facebookresearch/ConvNeXt-V2, timm or this project, or a MultiMAE of EPFL-VILAB/MultiMAE, "
            "multimae-meets-eo or this project"
        )
    if scheme not in MULTIMAE_SCHEMES:
        found = canonical_convnext(names, scheme, where)
    elif scheme == VIT:
        found = canonical_vit(names, _only_domain(config), where)
    else:
        found = canonical_multimae(names, scheme, where, command_line)
        config = config or (command_line and config_of(command_line))
    return Weights(found.state, scheme, where, config, found.unknown, found.reshaped)


def _only_domain(config: dict[str, Any] | None) -> str | None:
    """The input domain of an exported ViT."""
    ours = (config or {}).get("mpmae")
    domains = ours.get("domains_in") if isinstance(ours, dict) else None
    return next(iter(domains)) if domains and len(domains) == 1 else None
