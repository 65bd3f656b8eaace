"""What a report is made of: the run's facts, its logs and a few reconstructed tiles, all plain data.

Shapes: C bands, H = W image size in pixels, G = H / patch size patches per side, K length of a tile vector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpmae.errors import ReportError
from mpmae.modalities import MODALITIES
from mpmae.report.embedding_map import EmbeddingMap


@dataclass
class MapTriple:
    """A pixel modality of one tile: what was there, what the model said, and where there is data.

    continuous   `target` and `prediction` [C, H, W], raw units of the modality, one channel per name in `bands`
    categorical  `target` and `prediction` [H, W], class id (position in the spec's classes), -1 = no data

    `valid` is bool with the shape of `target`: True where the target is data; a prediction is no data where it is not finite
    or -1. `note` is shown under the pictures: what a reader must know about how the prediction was brought to raw units.
    `input_only` names the bands that the encoder read and the model does not reconstruct: no prediction is shown of them.
    """

    bands: tuple[str, ...]
    target: np.ndarray
    prediction: np.ndarray
    valid: np.ndarray
    note: str = ""
    input_only: tuple[str, ...] = ()


@dataclass
class VectorPair:
    """A continuous tile modality (era5, lat, lon, month): `target`, `prediction` [K] in raw units, `valid` bool [K]."""

    names: tuple[str, ...]
    target: np.ndarray
    prediction: np.ndarray
    valid: np.ndarray


@dataclass
class ClassGuess:
    """A categorical tile modality (biome, eco_region): the true class's name, None = no data, and the likeliest classes.

    `top` holds (name, probability 0..1), the likeliest first; three of them are shown.
    """

    target: str | None
    top: Sequence[tuple[str, float]]


@dataclass
class TilePicture:
    """One tile with its reconstruction.

    visible: bool [G, G], True = the encoder saw the patch. `inputs` names the modalities the encoder was given; all others
    were predicted from those alone. `place` is free text such as a country; lat and lon are degrees.
    """

    tile_id: str
    product_level: str
    split: str
    visible: np.ndarray
    patch_size_px: int
    maps: Mapping[str, MapTriple]
    vectors: Mapping[str, VectorPair | ClassGuess] = field(default_factory=dict)
    inputs: tuple[str, ...] = ("sentinel2",)
    lat: float | None = None
    lon: float | None = None
    place: str = ""

    @property
    def size_px(self) -> int:
        """Image side in pixels."""
        return len(self.visible) * self.patch_size_px

    @property
    def hidden_pixels(self) -> np.ndarray:
        """Bool [H, W]: True where the patch was hidden from the encoder."""
        return np.kron(~np.asarray(self.visible), np.ones((self.patch_size_px, self.patch_size_px), bool))

    def problems(self) -> list[str]:
        """Everything that does not fit together in this tile, one text each."""
        where, found = f"tile {self.tile_id}", []
        shape = np.shape(self.visible)
        if len(shape) != 2 or shape[0] != shape[1] or np.asarray(self.visible).dtype != bool:
            dtype = np.asarray(self.visible).dtype
            return [f"{where}: `visible` is {dtype} {shape}, expected bool [G, G] with one entry per patch"]
        for name, triple in self.maps.items():
            if name not in MODALITIES or MODALITIES[name].scope != "pixel":
                found.append(f"{where}: {name!r} is not a pixel modality; known names are in mpmae.modalities")
                continue
            side = (self.size_px, self.size_px)
            expected = side if MODALITIES[name].kind == "categorical" else (len(triple.bands), *side)
            for part in ("target", "prediction", "valid"):
                got = np.shape(getattr(triple, part))
                if got != expected:
                    found.append(f"{where}: {name} {part} has shape {list(got)}, expected {list(expected)}")
        for name, pair in self.vectors.items():
            if name not in MODALITIES or MODALITIES[name].scope != "tile":
                found.append(f"{where}: {name!r} is not a tile modality; known names are in mpmae.modalities")
            elif isinstance(pair, ClassGuess) == (MODALITIES[name].kind == "continuous"):
                found.append(f"{where}: {name} is {MODALITIES[name].kind} but comes as a {type(pair).__name__}")
            elif isinstance(pair, VectorPair):
                sizes = {part: np.shape(getattr(pair, part)) for part in ("target", "prediction", "valid")}
                if any(size != (len(pair.names),) for size in sizes.values()):
                    found.append(f"{where}: {name} has {len(pair.names)} names but shapes {sizes}")
        return found


@dataclass
class RunSummary:
    """The run's facts; what is not known is None or an empty dict.

    config: the configuration tree. environment, model, shard_set: label -> value, shown as given (model may hold
    "name" and "num_parameters", shard_set "name", which the page's head repeats).
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    shard_set: Mapping[str, Any] = field(default_factory=dict)
    num_steps: int | None = None
    num_samples_seen: int | None = None
    wall_time_s: float | None = None
    images_per_s: float | None = None
    finished: str = ""


@dataclass
class ReportData:
    """Everything on the page.

    history: the objects of metrics.jsonl, one per step: step, epoch, loss, losses {modality}, lr, grad_norm, images_per_s,
    data_wait_percent, memory_bytes; a key may be missing, a number may be None or NaN. Some have a probe's scores (see
    `mpmae.probe_record`); where there is one of step 0, it has nothing else.
    validation: the objects of validation.jsonl: step, losses {modality}, trivial {modality}, num_samples; `trivial` is the
    loss of a predictor that sees no image.
    notes: sentences shown under the headline numbers. embeddings: a map of vectors that the run's encoder gave.
    """

    title: str
    run: RunSummary = field(default_factory=RunSummary)
    history: Sequence[Mapping[str, Any]] = ()
    validation: Sequence[Mapping[str, Any]] = ()
    tiles: Sequence[TilePicture] = ()
    notes: Sequence[str] = ()
    embeddings: EmbeddingMap | None = None

    def check(self) -> None:
        """ReportError with every inconsistency of every part, or nothing."""
        problems = [problem for tile in self.tiles for problem in tile.problems()]
        for name in ("history", "validation"):
            lines = [i for i, line in enumerate(getattr(self, name)) if not isinstance(line.get("step"), int)]
            if lines:
                problems.append(f"{name}: {len(lines)} objects have no whole `step`, first at position {lines[0]}")
        if problems:
            raise ReportError(problems)
