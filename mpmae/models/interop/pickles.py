"""Reading pickled files without running what is in them.

torch's `weights_only` reader builds tensors and plain containers and refuses everything else. The few harmless classes that
known checkpoints hold beside their tensors are let through as stand-ins: data without behaviour, so that neither DeepSpeed
nor the program that wrote the file has to be installed.
"""

import argparse
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from mpmae.errors import CheckpointError


class Fragment:
    """Stand-in of `deepspeed.utils.tensor_fragment.fragment_address`: attributes numel and start."""

    numel: int
    start: int


class _Ignored:
    """Stand-in of an object whose content nobody reads."""


# what the published checkpoints (their command line, whose data_dir MMEarth-train's main_pretrain.py makes a Path) and
# DeepSpeed's files hold; source: that code and the files of DeepSpeed 0.19.8. Python 3.13 calls the module of Path otherwise
HARMLESS = [
    argparse.Namespace,
    *((pathlib.PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((pathlib.PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
    (Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]
_DCP_CLASSES = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        dcp.Metadata,
        dcp.MetadataIndex,
        dcp.TensorStorageMetadata,
        dcp.BytesStorageMetadata,
        dcp.ChunkStorageMetadata,
        dcp.TensorProperties,
        dcp.StorageMeta,
        dcp._MEM_FORMAT_ENCODING,
        _StorageInfo,
        torch.Size,
    )
} | {  # where the checkpoint was saved; Python 3.13 calls the module otherwise
    (module, f"{flavour}Path"): pathlib.PurePosixPath
    for module in ("pathlib", "pathlib._local")
    for flavour in ("Posix", "Windows")
}


def load_pickle(path: Path, *, mapped: bool = False) -> Any:
    """What a pickled file holds: tensors (on the CPU) in plain containers; mapped: read when they are used.

    Raises CheckpointError for a file that is damaged or holds anything else; no code of it is run.
    """
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not start.startswith((b"PK", b"\x80")):  # a zip archive, or a pickle of protocol 2 and later
        raise CheckpointError(f"{path} is no file of torch.save: it starts with {start!r}; was the download complete?")
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain data, and was not read, since that could run code: "
            f"{_first_line(error)}. If you trust its author, take the weights out of it where nothing can be harmed: "
            "torch.save(torch.load(FILE, weights_only=False)['model'], 'weights.pth')"
        ) from error
    except Exception as error:  # a damaged file fails anywhere: struct.error, IndexError, AssertionError, MemoryError, ...
        raise CheckpointError(
            f"{path} cannot be read as a pickle of tensors: {_first_line(error)}; it is cut off, damaged or no such file"
        ) from error


class _PlainUnpickler(pickle.Unpickler):
    """Finds the classes of a DCP index only."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _DCP_CLASSES:
            return _DCP_CLASSES[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a DCP index")


def load_dcp_index(path: Path) -> dcp.Metadata:
    """The index (`.metadata`) of a torch.distributed.checkpoint folder. Raises CheckpointError; runs no code of the file."""
    try:
        with path.open("rb") as file:
            index = _PlainUnpickler(file).load()
    except Exception as error:  # a damaged file fails anywhere
        raise CheckpointError(f"{path} is not a readable DCP index, and was not run: {_first_line(error)}") from error
    if not isinstance(index, dcp.Metadata):
        raise CheckpointError(f"{path} holds a {type(index).__name__}, expected the index of a DCP checkpoint")
    for place in (getattr(index, "storage_data", None) or {}).values():
        file = pathlib.PurePosixPath(str(getattr(place, "relative_path", "")))
        if file.is_absolute() or ".." in file.parts:
            raise CheckpointError(f"{path} names {file}, which is outside of the checkpoint's folder")
    return index


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    useful = [line.strip() for line in text.splitlines() if "Unsupported" in line or "GLOBAL" in line]
    return (useful or text.splitlines())[0].strip()
