"""What all golden cases share: the fill recipe, a case's files, tolerances and what was found.

The format is described in the README of the golden set.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from mpmae.modalities import spec_of
from mpmae.models.presets import SIZES


@dataclass(frozen=True)
class Tolerance:
    """Largest deviation: of predictions absolute, of everything else relative."""

    prediction: float
    loss: float
    grad_norm: float
    trajectory: float


TOLERANCES = {torch.float64: Tolerance(1e-6, 1e-9, 1e-7, 1e-7), torch.float32: Tolerance(5e-5, 1e-5, 1e-3, 1e-4)}
STORED_AS_FLOAT32 = 1.2e-7  # spacing of float32: the least that can be asked of a number stored in it


def fill(seed: int, name: str, shape: list[int] | tuple[int, ...], loc: float, scale: float) -> torch.Tensor:
    """Weights of the recipe: uniform with mean `loc` and standard deviation `scale`, float32."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    uniform = (np.random.Philox(key=key).random_raw(math.prod(shape)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return torch.from_numpy((loc + scale * (2 * uniform - 1) * math.sqrt(3)).astype(np.float32).reshape(shape))


def size_of(dims: tuple[int, ...], depths: tuple[int, ...]) -> str:
    """The name of the size with these channels and depths of the stages, such as "atto"."""
    names = [name for name, size in SIZES.items() if size == (dims, depths)]
    if not names:
        raise ValueError(f"no size of ours has channels {list(dims)} and depths {list(depths)}; known: {SIZES}")
    return names[0]


def bands_of(name: str, num_bands: int) -> tuple[str, ...]:
    """Names for the channels of a modality's array: the usual bands, or as many of them as there are."""
    spec = spec_of(name)
    return spec.bands[:num_bands] if num_bands > len(spec.model_bands) else spec.model_bands[:num_bands]


@dataclass
class Case:
    """One golden case: its manifest entry, its arrays and its inputs (maybe those of another case)."""

    folder: Path
    name: str
    entry: dict = field(init=False)
    arrays: dict[str, np.ndarray] = field(init=False)
    inputs: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self):
        self.entry = read_manifest(self.folder)["cases"][self.name]
        self.arrays = load_file(self.folder / self.entry["file"])
        source = self.entry.get("inputs_from", self.name)
        self.inputs = self.arrays if source == self.name else load_file(self.folder / f"{source}.safetensors")

    @property
    def stem(self) -> str:
        """Our name of the stem."""
        return "convnext" if self.entry["config"]["orig"] else "mmearth"


def read_manifest(folder: Path) -> dict:
    """manifest.json of a golden set."""
    return json.loads((folder / "manifest.json").read_text())


@dataclass
class Findings:
    """Worst deviation per kind and what broke a tolerance."""

    worst: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, kind: str, what: str, error: float, tolerance: float) -> None:
        self.worst[kind] = max(self.worst.get(kind, 0.0), error if math.isfinite(error) else math.inf)
        if not error <= tolerance:
            self.failures.append(f"{what}: {error:.3g} > {tolerance:.3g}")

    def relative(self, kind: str, what: str, got: float, expected: float, tolerance: float) -> None:
        """NaN where the published code has NaN is right."""
        both_nan = math.isnan(got) and math.isnan(expected)
        self.add(kind, what, 0.0 if both_nan else abs(got - expected) / max(abs(expected), 1e-12), tolerance)

    def array(self, kind: str, what: str, got: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
        if self.same(f"shape of {what}", list(got.shape), list(expected.shape)):
            got, wanted = got.detach().double(), torch.from_numpy(expected).double()
            error = torch.where(got.isnan() & wanted.isnan(), 0, got - wanted).abs().max().item()
            self.add(kind, what, error, tolerance)

    def activation(self, what: str, got: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
        """As `array`, relative to the largest magnitude where that is above 1: float32 stores it no finer."""
        scale = max(1.0, float(np.abs(expected).max()))
        self.array("activation", what, got / scale, expected / scale, tolerance)

    def same(self, what: str, got: object, expected: object) -> bool:
        if got != expected:
            self.failures.append(f"{what}: {got}, expected {expected}")
        return got == expected
