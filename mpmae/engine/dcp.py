"""Sharded state through torch.distributed.checkpoint (DCP): every rank its shards, readable at any number of ranks.

`write_state` and `read_state` are collective over `group` (all ranks if None); a group of its own lets `write_state` run in
a thread beside a training whose collectives use another.
"""

import copy
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn, optim
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mpmae.errors import CheckpointError


def collect_state(module: nn.Module, optimizer: optim.Optimizer, on_cpu: bool) -> dict[str, Any]:
    """{"module": by name, "optimizer": {"state": by parameter name, "param_groups": with parameter names}}."""
    module_state, optimizer_state = get_state_dict(module, optimizer)
    state = {"module": module_state, "optimizer": optimizer_state}
    return _copied(state) if on_cpu else state


def _copied(tree: Any) -> Any:
    """`tree` with copies of its tensors in host memory; torch's own cpu_offload hands out tensors that are there already."""
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_copied(value) for value in tree]
    return tree.detach().to("cpu", copy=True) if isinstance(tree, torch.Tensor) else copy.copy(tree)


def apply_state(state: dict[str, Any], module: nn.Module, optimizer: optim.Optimizer) -> None:
    """Restore what `collect_state` gave."""
    set_state_dict(module, optimizer, model_state_dict=state["module"], optim_state_dict=state["optimizer"])


def write_state(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Write `state` into `folder`, made if absent, and sync it to the disk.

    Raises on a rank whose own write failed: OSError for the disk, after the last collective. The others return.
    """
    try:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), process_group=group)
    except CheckpointException as error:
        own = error.failures.get(dist.get_rank(group))
        if own is None:
            return
        # torch's archive writer reports a failed write as a RuntimeError of its own, raised while closing
        cause = own[0] if isinstance(own[0], OSError) else own[0].__context__
        raise (cause if isinstance(cause, OSError) else own[0]) from None


def read_state(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Fill the tensors of `state` from `folder`, whatever the world size was. Raises CheckpointError on all ranks."""
    if not (folder / ".metadata").is_file():
        raise CheckpointError(f"{folder / '.metadata'} is absent: the checkpoint is of another engine, or incomplete")
    reader = dcp.FileSystemReader(folder)
    try:
        _check_names(state["module"], reader)
        dcp.load(state, storage_reader=reader, process_group=group)
    except CheckpointException as error:
        causes = "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in sorted(error.failures.items()))
        raise CheckpointError(f"{folder} cannot be read or does not fit the model: {causes}") from None
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{folder / '.metadata'} cannot be read: {error}; continue from an older checkpoint"
        ) from error


def _check_names(module_state: dict[str, Any], reader: dcp.FileSystemReader) -> None:
    """CheckpointError when the checkpoint has more of a module than this one: DCP would leave it unread."""
    saved = {
        name.removeprefix("module.") for name in reader.read_metadata().state_dict_metadata if name.startswith("module.")
    }
    if more := sorted(saved - module_state.keys()):
        raise CheckpointError(
            f"{reader.path} does not fit the model: it also holds {', '.join(more[:5])}{' and more' if more[5:] else ''}"
        )
