"""The training state in a checkpoint of any engine, world size and ZeRO stage, read by one process.

Neither the engine's package nor a process group is needed, and no code of a file is run. Files are mapped into memory,
and read as far as they are asked for.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mpmae.checkpoint_format import ENGINE_FOLDER, LAYOUT_NAME, MODEL_NAME, load_meta
from mpmae.engine.portable import MOMENTS, PARTS, PORTABLE_NAME, WEIGHT, PortableFile, TrainingState
from mpmae.errors import CheckpointError
from mpmae.models.interop.folders import DcpReader, is_dcp, is_deepspeed
from mpmae.models.interop.pickles import load_dcp_index, load_pickle
from mpmae.models.interop.zero import ZeroPartitions, optimizer_files

DDP_NAME = "ddp.pt"
DCP_FOLDER = "dcp"
DEEPSPEED_FOLDER = "deepspeed"


def open_state(checkpoint: Path) -> TrainingState:
    """The training state of a complete checkpoint (`step-N`). Raises CheckpointError."""
    load_meta(checkpoint)
    engine = checkpoint / ENGINE_FOLDER
    if (engine / PORTABLE_NAME).is_file():
        return PortableFile(engine / PORTABLE_NAME)
    model = checkpoint / MODEL_NAME
    if (engine / DDP_NAME).is_file():
        return _WholeState(engine / DDP_NAME, model)
    if is_dcp(engine / DCP_FOLDER):
        return _DcpState(engine / DCP_FOLDER, model)
    zero = engine / DEEPSPEED_FOLDER
    if is_deepspeed(zero):
        states = next(iter(sorted(zero.glob("*mp_rank_00_model_states.pt"))))
        return _ZeroState(zero, states, model) if optimizer_files(zero) else _WholeState(states, model)
    found = ", ".join(sorted(path.name for path in engine.iterdir())) if engine.is_dir() else "no such folder"
    raise CheckpointError(
        f"{engine}: no engine's state in it ({found}); expected {PORTABLE_NAME}, {DDP_NAME}, {DCP_FOLDER} or "
        f"{DEEPSPEED_FOLDER}"
    )


class _OwnModel(TrainingState):
    """What does not train is the same for all engines: it stands in model.safetensors."""

    def __init__(self, source: Path, model: Path):
        self.source, self._model = str(source), model

    def constants(self) -> dict[str, Tensor]:
        """See TrainingState."""
        try:
            with safe_open(self._model, framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name not in self.shapes}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._model} cannot be read: {error}") from error


class _WholeState(_OwnModel):
    """DDP and ZeRO stage 0: a module's state dict and AdamW's, whose parameters are numbered."""

    def __init__(self, path: Path, model: Path):
        super().__init__(path, model)
        content = load_pickle(path, mapped=True)
        try:
            names = content["parameter_names"]
            self._weights: dict[str, Tensor] = content["module"]
            numbered: dict[int, dict[str, Any]] = content["optimizer"]["state"]
            self._moments = {names[index]: state for index, state in numbered.items()}
            self.shapes = {name: self._weights[name].shape for name in names}
            counts = {int(state["step"]) for state in numbered.values()}
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} lacks {error}: it was written by an early version of this project, or is no checkpoint of it; "
                f"continue it with engine.name=ddp if that wrote it, and save once, or start anew from {model}"
            ) from error
        self.num_updates = _one_count(counts, self.source)

    def read(self, name: str) -> dict[str, Tensor]:
        """See TrainingState."""
        weight = self._weights[name].float()
        moments = self._moments.get(name, {})
        return {WEIGHT: weight} | {m: moments.get(m, torch.zeros_like(weight)) for m in MOMENTS}


class _ZeroState(_OwnModel):
    """ZeRO stages 1 to 3."""

    def __init__(self, folder: Path, states: Path, model: Path):
        super().__init__(folder, model)
        content = load_pickle(states, mapped=True)
        shapes = content.get("param_shapes") if isinstance(content, dict) else None
        if not shapes:
            raise CheckpointError(f"{states} has no param_shapes; expected the model states of a ZeRO checkpoint")
        self._partitions = ZeroPartitions(folder, shapes, mapped=True)
        self.shapes = self._partitions.shapes
        self.num_updates = self._partitions.num_updates()

    def read(self, name: str) -> dict[str, Tensor]:
        """See TrainingState."""
        return {part: self._partitions.read(name, part).float() for part in PARTS}


class _DcpState(_OwnModel):
    """FSDP, through torch.distributed.checkpoint."""

    def __init__(self, folder: Path, model: Path):
        super().__init__(folder, model)
        self._folder = folder
        self._index = load_dcp_index(folder / ".metadata")
        entries = self._index.state_dict_metadata
        self._sizes = {key: entry.size for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        start, end = "optimizer.state.", f".{MOMENTS[0]}"
        moments = [key for key in self._sizes if key.startswith(start) and key.endswith(end)]
        names = [key.removeprefix(start).removesuffix(end) for key in moments]
        absent = [name for name in names if f"module.{name}" not in self._sizes]
        if absent or not names:
            raise CheckpointError(
                f"{folder} has no weights, or no moments, of {absent or 'any'}; expected one of engine fsdp"
            )
        self.shapes = {name: self._sizes[f"module.{name}"] for name in names}
        steps = self._load([f"{start}{name}.step" for name in names])
        self.num_updates = _one_count({int(step) for step in steps.values()}, self.source)

    def read(self, name: str) -> dict[str, Tensor]:
        """See TrainingState."""
        keys = {WEIGHT: f"module.{name}"} | {m: f"optimizer.state.{name}.{m}" for m in MOMENTS}
        loaded = self._load(list(keys.values()))
        return {part: loaded[key].float() for part, key in keys.items()}

    def _load(self, keys: list[str]) -> dict[str, Tensor]:
        try:
            entries = self._index.state_dict_metadata
            state = {key: torch.empty(entries[key].size, dtype=entries[key].properties.dtype) for key in keys}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as is meant
                load(state, storage_reader=DcpReader(self._folder, self._index), no_dist=True)
        except (CheckpointException, Exception) as error:  # DCP's own is not a subclass of Exception
            raise CheckpointError(f"{self._folder} cannot be read: {error}") from error
        return state


def _one_count(counts: set[int], source: str) -> int:
    if len(counts) > 1:
        raise CheckpointError(f"{source}: AdamW has made {sorted(counts)} updates of different weights, expected one number")
    return counts.pop() if counts else 0


def read_layout(checkpoint: Path) -> dict[str, Any]:
    """The `Engine.layout` of a checkpoint; empty where an early version wrote none. Raises CheckpointError."""
    path = checkpoint / ENGINE_FOLDER / LAYOUT_NAME
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; continue from an older checkpoint") from error


def shown_layout(layout: dict[str, Any]) -> str:
    """An `Engine.layout` in few words: "deepspeed (ZeRO 2, 4 ranks, bf16)"."""
    if not layout:
        return "an early version's layout"
    stage = (layout.get("zero_optimization") or {}).get("stage")
    words = [f"ZeRO {stage}"] if stage is not None else []
    words += [f"{layout['world_size']} ranks"] if "world_size" in layout else []
    words += [layout["precision"]] if "precision" in layout else []
    return f"{layout['engine']} ({', '.join(words)})" if words else layout["engine"]
