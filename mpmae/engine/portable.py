"""The training state of a run, free of any engine's layout: what every engine can load and every checkpoint can give.

Per parameter that trains, by the module's own name and in its whole shape: the float32 weight and AdamW's two moments;
besides, the number of updates that AdamW has made, and what the model holds that does not train. Read one parameter at a
time, so that no process holds all of it.

On the disk (`write_state`, `PortableFile`): one safetensors file with `weight/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME` of
each parameter and `constant/NAME` of the rest.
"""

import json
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn, optim

from mpmae.errors import CheckpointError

PORTABLE_NAME = "state.safetensors"
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
PARTS = (WEIGHT, *MOMENTS)
_CONSTANT = "constant"
_FORMAT = "mpmae-training-state"
_DTYPES = {  # names of the safetensors format
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TrainingState(ABC):
    """A source of training state; for one process, not collective.

    shapes: whole shape of each parameter that trains, by name. num_updates: of AdamW (its `step`; skipped steps not
    counted). source: what it is read from, for messages.
    """

    shapes: dict[str, torch.Size]
    num_updates: int
    source: str

    @abstractmethod
    def read(self, name: str) -> dict[str, Tensor]:
        """The PARTS of a parameter: float32, on the CPU, whole. Raises CheckpointError."""

    @abstractmethod
    def constants(self) -> dict[str, Tensor]:
        """Buffers and frozen weights by name, on the CPU. Raises CheckpointError."""


class PortableFile(TrainingState):
    """The state in a file that `write_state` wrote. Raises CheckpointError: absent, unreadable, or something else."""

    def __init__(self, path: Path):
        self.source, self._path = str(path), path
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        about = self._file.metadata() or {}
        if about.get("format") != _FORMAT:
            raise CheckpointError(f"{path} holds no training state: format {about.get('format')!r}, expected {_FORMAT!r}")
        self.num_updates = int(about["num_updates"])
        self._keys = list(self._file.keys())
        names = sorted(key.removeprefix(f"{WEIGHT}/") for key in self._keys if key.startswith(f"{WEIGHT}/"))
        self.shapes = {name: torch.Size(self._file.get_slice(f"{WEIGHT}/{name}").get_shape()) for name in names}

    def read(self, name: str) -> dict[str, Tensor]:
        """See TrainingState."""
        return {part: self._get(f"{part}/{name}") for part in PARTS}

    def constants(self) -> dict[str, Tensor]:
        """See TrainingState."""
        keys = [key for key in self._keys if key.startswith(f"{_CONSTANT}/")]
        return {key.removeprefix(f"{_CONSTANT}/"): self._get(key) for key in keys}

    def _get(self, key: str) -> Tensor:
        try:
            return self._file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._path} lacks {key}, or is damaged: {error}") from error


def write_state(state: TrainingState, path: Path) -> None:
    """Write a file that `PortableFile` reads, one parameter in memory at a time, and sync it. Raises OSError."""
    constants = state.constants()
    entries = [(f"{part}/{name}", shape, torch.float32) for name, shape in state.shapes.items() for part in PARTS]
    entries += [(f"{_CONSTANT}/{name}", tensor.shape, tensor.dtype) for name, tensor in constants.items()]
    about = {"format": _FORMAT, "num_updates": str(state.num_updates)}

    def tensors() -> Iterator[Tensor]:
        for name in state.shapes:
            parts = state.read(name)
            yield from (parts[part] for part in PARTS)
        yield from constants.values()

    _write_safetensors(path, entries, about, tensors())


def _write_safetensors(
    path: Path, entries: list[tuple[str, torch.Size, torch.dtype]], about: dict[str, str], tensors: Iterator[Tensor]
) -> None:
    """A safetensors file from tensors that come one by one; its own writer wants all of them in memory.

    Layout: length of the header in 8 bytes, little-endian; the header, JSON padded with blanks to a multiple of 8; the data.
    """
    header, end = {"__metadata__": about}, 0
    for key, shape, dtype in entries:
        start, end = end, end + shape.numel() * dtype.itemsize
        header[key] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (key, shape, dtype), tensor in zip(entries, tensors, strict=True):
            assert (tensor.shape, tensor.dtype) == (shape, dtype), key
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


def check_fits(state: TrainingState, module: nn.Module) -> None:
    """Raises CheckpointError with every parameter that `state` and `module` do not share, or not in one shape."""
    # ZeRO-3 leaves a parameter empty, and says its whole shape beside it
    wanted = {n: torch.Size(getattr(p, "ds_shape", p.shape)) for n, p in module.named_parameters() if p.requires_grad}
    problems = [f"{name} is absent" for name in wanted.keys() - state.shapes.keys()]
    problems += [f"{name} is not in the model, or does not train" for name in state.shapes.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {list(state.shapes[name])}, expected {list(shape)}"
        for name, shape in wanted.items()
        if state.shapes.get(name, shape) != shape
    ]
    if problems:
        raise CheckpointError([f"{state.source} does not fit the model: {problem}" for problem in sorted(problems)])


@torch.no_grad()
def load_state(
    state: TrainingState,
    module: nn.Module,
    optimizer: optim.Optimizer,
    place: Callable[[Tensor, Tensor], object] = Tensor.copy_,
) -> None:
    """Load `state` into a module and its AdamW, whose parameters are the module's own.

    `place` writes a whole tensor into one of the module's or AdamW's, which may hold a shard of it. Raises CheckpointError.
    """
    check_fits(state, module)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parts = state.read(name)
            place(parameter, parts[WEIGHT])
            moments = adam_state(optimizer, parameter, state.num_updates)
            for moment in MOMENTS:
                place(moments[moment], parts[moment])
    for tensor, value in constants_of(state, module):
        place(tensor, value)


def constants_of(state: TrainingState, module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Each buffer and frozen weight of the module with its value in `state`. Raises CheckpointError where there is none."""
    values = state.constants()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not tensor.requires_grad:
            if name not in values:
                raise CheckpointError(f"{state.source} does not fit the model: {name}, which does not train, is absent")
            yield tensor, values[name]


def adam_state(optimizer: optim.Optimizer, parameter: Tensor, num_updates: int) -> dict[str, Tensor]:
    """The AdamW state of `parameter` with its step count set; moments that are absent are made, 0."""
    state = optimizer.state[parameter]
    # fused AdamW counts on the device, in float32
    state["step"] = torch.tensor(float(num_updates), device=parameter.device)
    for moment in MOMENTS:
        if moment not in state:
            state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def parameter_names(module: nn.Module, optimizer: optim.Optimizer) -> list[str]:
    """Names of the optimizer's parameters in the order in which its state dict numbers them."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
