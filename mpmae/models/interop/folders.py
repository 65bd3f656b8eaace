"""Reading the weights of sharded checkpoints: DeepSpeed's ZeRO folders and torch.distributed.checkpoint (DCP).

Neither DeepSpeed nor a process group is needed, and the weights are the float32 masters where there are any. Source of the
layouts: the files of DeepSpeed 0.19.8 (ZeRO 0-3) and of torch 2.13's DCP.
"""

import math
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from mpmae.errors import CheckpointError
from mpmae.models.interop.names_in import strip_wrappers
from mpmae.models.interop.pickles import load_dcp_index, load_pickle

_DCP_INDEX = ".metadata"
_MODEL_PREFIXES = ("model.", "module.", "app.model.", "state.model.")


def is_deepspeed(folder: Path) -> bool:
    """Whether a folder holds the files of one DeepSpeed checkpoint (a "tag")."""
    return any(folder.glob("*mp_rank_00_model_states.pt"))


def is_dcp(folder: Path) -> bool:
    """Whether a folder is a torch.distributed.checkpoint."""
    return (folder / _DCP_INDEX).is_file()


def read_deepspeed(folder: Path) -> dict[str, Tensor]:
    """Name -> whole weight of a DeepSpeed folder of any ZeRO stage. Raises CheckpointError."""
    others = [path.name for path in folder.glob("*mp_rank_01_model_states.pt")]
    if others:
        raise CheckpointError(f"{folder}: weights split by tensor parallelism ({others[0]}) cannot be joined here")
    states = load_pickle(sorted(folder.glob("*mp_rank_00_model_states.pt"), key=_rank)[0])
    if not isinstance(states, dict) or not isinstance(states.get("module"), dict):
        raise CheckpointError(f"{folder}: the model states hold no 'module'; expected a DeepSpeed checkpoint")
    paths = sorted(folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"), key=_rank)
    if not paths:
        if states.get("param_shapes"):
            raise CheckpointError(f"{folder}: the files *_optim_states.pt are absent, and with them the float32 weights")
        return dict(states["module"])
    ranks = [_rank(path) for path in paths]
    if ranks != list(range(len(ranks))):
        raise CheckpointError(
            f"{folder}: files *_optim_states.pt of ranks {ranks}, expected 0 to {len(ranks) - 1}, each once"
        )
    loaded = [load_pickle(path) for path in paths]
    try:
        partitions = [content["optimizer_state_dict"] for content in loaded]
        _check_complete(folder, partitions)
        shapes = {name: shape for group in states["param_shapes"] for name, shape in group.items()}
        join = _join_flat_groups if "fp32_flat_groups" in partitions[0] else _join_fragments
        weights = join(partitions, states["param_shapes"])
    except (KeyError, IndexError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: the ZeRO partitions do not fit each other: {error}") from error
    wrong = [name for name, shape in shapes.items() if name not in weights or weights[name].shape != torch.Size(shape)]
    if wrong:
        raise CheckpointError(f"{folder}: the ZeRO partitions do not make up {', '.join(wrong[:5])} ({len(wrong)} weights)")
    return weights | (states.get("frozen_param_fragments") or {})


def _rank(path: Path) -> int:
    match = re.search(r"pp_rank_(\d+)_", path.name)
    return int(match[1]) if match else 0


def _check_complete(folder: Path, partitions: list[dict]) -> None:
    count = partitions[0]["partition_count"]
    expected = max(count) if isinstance(count, (list, tuple)) else int(count)
    if len(partitions) != expected:
        raise CheckpointError(
            f"{folder}: {len(partitions)} files *_optim_states.pt, expected {expected}; copy the whole folder"
        )


def _join_fragments(partitions: list[dict], param_shapes: list[dict]) -> dict[str, Tensor]:
    """ZeRO 1 and 2: every rank says which piece of which weight lies where in its flat partition."""
    weights = {}
    for group, shapes in enumerate(param_shapes):
        for name, shape in shapes.items():
            pieces = []
            for partition in partitions:
                place = partition["param_slice_mappings"][group].get(name)
                if place is not None:
                    pieces.append(partition["single_partition_of_fp32_groups"][group].narrow(0, place.start, place.numel))
            weights[name] = torch.cat(pieces)[: math.prod(shape)].view(torch.Size(shape))
    return weights


def _join_flat_groups(partitions: list[dict], param_shapes: list[dict]) -> dict[str, Tensor]:
    """ZeRO 3: every weight is cut into equal pieces, one a rank, which lie one after the other in the rank's flat groups."""
    flat = [torch.cat(partition["fp32_flat_groups"]) for partition in partitions]
    weights, start = {}, 0
    for shapes in param_shapes:
        for name, shape in shapes.items():
            numel = math.prod(shape)
            piece = math.ceil(numel / len(flat))
            weights[name] = torch.cat([part.narrow(0, start, piece) for part in flat])[:numel].view(torch.Size(shape))
            start += piece
    return weights


class _Reader(FileSystemReader):
    """DCP's own reader, given the index, which it would itself unpickle with whatever is in it."""

    def __init__(self, folder: Path, index: Metadata):
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args, **kwargs) -> Metadata:
        index = self._index
        index.storage_meta = getattr(index, "storage_meta", None) or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


def read_dcp(folder: Path) -> dict[str, Tensor]:
    """Name -> whole weight of a DCP folder: the tensors of its model, without optimizer state. Raises CheckpointError."""
    index = load_dcp_index(folder / _DCP_INDEX)
    try:
        found = {n: entry for n, entry in index.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)}
        prefix = next((p for p in _MODEL_PREFIXES if any(name.startswith(p) for name in found)), "")
        chosen = {name: entry for name, entry in found.items() if name.startswith(prefix)}
        state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in chosen.items()}
        load(state, storage_reader=_Reader(folder, index), no_dist=True)
    except (CheckpointException, Exception) as error:  # DCP's own is not a subclass of Exception
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    return {strip_wrappers(name.removeprefix(prefix)): value for name, value in state.items()}
