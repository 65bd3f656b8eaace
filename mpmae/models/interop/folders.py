"""Reading the weights of sharded checkpoints: DeepSpeed's ZeRO folders and torch.distributed.checkpoint (DCP).

Neither DeepSpeed nor a process group is needed, and the weights are the float32 masters where there are any. Source of the
layouts: the files of DeepSpeed 0.19.8 (ZeRO 0-3) and of torch 2.13's DCP.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from mpmae.errors import CheckpointError
from mpmae.models.interop.names_in import strip_wrappers
from mpmae.models.interop.pickles import load_dcp_index, load_pickle
from mpmae.models.interop.zero import ZeroPartitions, optimizer_files, rank_of

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
    states = load_pickle(sorted(folder.glob("*mp_rank_00_model_states.pt"), key=rank_of)[0])
    if not isinstance(states, dict) or not isinstance(states.get("module"), dict):
        raise CheckpointError(f"{folder}: the model states hold no 'module'; expected a DeepSpeed checkpoint")
    if not optimizer_files(folder):
        if states.get("param_shapes"):
            raise CheckpointError(f"{folder}: the files *_optim_states.pt are absent, and with them the float32 weights")
        return dict(states["module"])
    partitions = ZeroPartitions(folder, states.get("param_shapes"))
    weights = {name: partitions.read(name) for name in partitions.shapes}
    return weights | (states.get("frozen_param_fragments") or {})


class DcpReader(FileSystemReader):
    """DCP's own reader, given the index, which it would itself unpickle with whatever is in it."""

    def __init__(self, folder: Path, index: Metadata):
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args, **kwargs) -> Metadata:
        """The index."""
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
        load(state, storage_reader=DcpReader(folder, index), no_dist=True)
    except (CheckpointException, Exception) as error:  # DCP's own is not a subclass of Exception
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    return {strip_wrappers(name.removeprefix(prefix)): value for name, value in state.items()}
