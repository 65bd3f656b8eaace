"""What a measured kernel is, and the one place that knows how the kernels and parts of the model are called.

A way gives the outputs of its operator; where one works on the grid, `packed` brings them into the packed layout for the
comparison, outside of what is timed. Shapes as in `mpmae.kernels`.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from gpu_timing import Run
from torch import Tensor, nn

from mpmae.cost.operators import Work
from mpmae.kernels import tile_slots
from mpmae.loader.batch import Batch
from mpmae.models.blocks import Sites
from mpmae.models.encoder import Pixels, SparseEncoder
from mpmae.models.mpmae import MPMAE

MASK_RATIO = 0.6
BACKEND_VARIABLE = "MPMAE_KERNELS"
BACKENDS = ("cuda", "triton", "reference")


class Unavailable(Exception):
    """A way cannot run here."""


class Setting(NamedTuple):
    """Where and how large: samples of a depthwise and of any other case, G, and channels or None for the models' own.

    with_compile: whether the compiled baselines take part.
    """

    device: torch.device
    dtype: torch.dtype
    depthwise_samples: int
    samples: int
    num_patches_side: int
    channels: int | None
    with_compile: bool

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normally distributed numbers on the device."""
        return (torch.randn(*shape, device=self.device) * scale).to(dtype)

    def compiled(self, function: Callable) -> Callable:
        """`function` compiled anew for each shape; Unavailable where compiling was not asked for."""
        if not self.with_compile:
            raise Unavailable("compiling was not asked for")
        return torch.compile(function, dynamic=False)


def full_setting(device: torch.device) -> Setting:
    """The sizes of a record; the depthwise activations of the smallest model are then several times the L2."""
    return Setting(device, torch.bfloat16, 4096, 1024, 7, None, True)


def tiny_setting(device: torch.device) -> Setting:
    """Sizes that a CPU does at once."""
    return Setting(device, torch.bfloat16, 2, 2, 3, 8, False)


def same(function: Callable) -> Callable:
    """`function` as it is, where another would be compiled."""
    return function


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """The tensors of a run's outputs, flat."""
    if torch.is_tensor(outputs):
        return (outputs,)
    return tuple(tensor for part in outputs for tensor in as_tuple(part))


@dataclass(frozen=True)
class Way:
    """One way to compute an operator; `ours` must give the same bits twice and is held against the goals."""

    run: Run
    packed: Callable[[Any], tuple[Tensor, ...]] = as_tuple
    ours: bool = False


@dataclass
class Case:
    """An operator on one problem.

    work: the least it must do. expected: its outputs in float32. probe: the samples at which `expected` gives the first
    `num_activations` outputs; None for all. facts: sizes, for the record. ways: by name, the baselines too. missing:
    name -> why a way cannot run here. goals: fraction of the copy bandwidth ("memory", where memory sets the floor) or of
    the matrix rate ("matrix") to reach.
    """

    work: Work
    expected: Run
    facts: dict[str, Any]
    probe: list[int] | None = None
    num_activations: int = 0
    goals: dict[str, float] = field(default_factory=dict)
    ways: dict[str, Way] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, make: Callable[[], Way]) -> None:
        """Add a way, or why it is missing."""
        try:
            self.ways[name] = make()
        except Unavailable as reason:
            self.missing[name] = str(reason)


def backends(device: torch.device) -> tuple[str, ...]:
    """The backends of the depthwise convolution to ask for on a device."""
    return BACKENDS if device.type == "cuda" else BACKENDS[-1:]


def depthwise_module(backend: str) -> ModuleType:
    """The functions forward, backward_input and backward_weight of a backend."""
    return _found(lambda: importlib.import_module("mpmae.kernels.depthwise").implementation(backend))


def per_tap_module() -> tuple[ModuleType, ModuleType]:
    """The way of MinkowskiEngine, a launch for each tap and float32 atomics: `kernels_baseline`, and its launcher."""
    runtime = _found(lambda: importlib.import_module("mpmae.kernels.cuda_runtime"))
    return _found(lambda: importlib.import_module("kernels_baseline")), runtime


def pointwise_module(name: str, y: Tensor, options: Any) -> ModuleType:
    """`forward` and `backward` for `y` as in `mpmae.kernels.pointwise.formulas`; name: "fused" or "wide"."""
    module = _found(lambda: importlib.import_module(f"mpmae.kernels.pointwise.{name}"))
    refusal = module.supports(y, options)
    if refusal:
        raise Unavailable(refusal)
    return module


def _found(look_up: Callable[[], ModuleType]) -> ModuleType:
    try:
        return look_up()
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"{type(error).__name__}: {error}") from error


@contextmanager
def forced(backend: str | None) -> Iterator[None]:
    """The ops of the model take this backend; None: the dispatcher's choice."""
    before = os.environ.pop(BACKEND_VARIABLE, None)
    if backend is not None:
        os.environ[BACKEND_VARIABLE] = backend
    try:
        yield
    finally:
        os.environ.pop(BACKEND_VARIABLE, None)
        if before is not None:
            os.environ[BACKEND_VARIABLE] = before


def stem(encoder: SparseEncoder, image: Tensor, visible: Tensor) -> Tensor:
    """The stem's output [N, V*64, C] for `image` [N, B, S, S] without gaps."""
    slots = tile_slots(visible, encoder.num_patches_side)
    return encoder.stem(image, Pixels(None, visible, slots, encoder.site_index(visible, encoder.patch_size), None))


def downsample(part: nn.Module, x: Tensor) -> Tensor:
    """A downsampling's output [N, K/4, C_out] for `x` [N, K, C]."""
    return part(x, None, None)


def pixel_losses(model: MPMAE, grid: Tensor, batch: Batch, hidden: Tensor) -> Tensor:
    """The loss, a scalar, of a model with pixel modalities alone, from the decoder's output [N, L, D]."""
    return model._loss(batch, {}, hidden, grid)[0]


def block(encoder: SparseEncoder, stage: int, x: Tensor, visible: Tensor) -> Tensor:
    """The first block of a stage on `x` [N, K, C]."""
    slots = tile_slots(visible, encoder.num_patches_side)
    return encoder.stages[stage][0](x, Sites(visible, slots, encoder.tile_sides[stage], None))
