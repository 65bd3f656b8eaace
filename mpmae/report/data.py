"""What a report is made of: the run's facts, its logs and a few reconstructed tiles, all plain data.

Shapes: C bands, H = W size of a map in its own pixels, G patches per side, K length of a tile vector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpmae.domains import map_modality
from mpmae.errors import ReportError
from mpmae.modalities import MODALITIES
from mpmae.report.embedding_map import EmbeddingMap


@dataclass
class MapTriple:
    """A map of one tile, a pixel modality or a view of one: what was there, what the model said, where there is data.

    continuous   `target` and `prediction` [C, H, W], raw units of the modality, one channel per name in `bands`
    categorical  `target` and `prediction` [H, W], class id (position in the spec's classes), -1 = no data

    `valid` is bool with the shape of `target`: True where the target is data; a prediction is no data where it is not finite
    or -1, and None where the map is an input that the model does not reconstruct. `note` is shown under the pictures: what a
    reader must know about how the prediction was brought to raw units. `input_only` names the bands that the encoder read
    and the model does not reconstruct: no prediction is shown of them.
    """

    bands: tuple[str, ...]
    target: np.ndarray
    prediction: np.ndarray | None
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
class FromInputs:
    """What a model says of a tile that sees all patches of some inputs and nothing else.

    inputs: names of the maps that it saw. predictions: by the name of the map, as in `MapTriple`.
    """

    title: str
    inputs: tuple[str, ...]
    predictions: Mapping[str, np.ndarray]


@dataclass
class TilePicture:
    """One tile with its reconstruction.

    visible: bool [G, G], True = the encoder saw the patch; one for all maps, or one for each by its name, where the inputs
    are masked each by itself. maps: by the name of the modality or domain. `inputs` names the maps the encoder was given;
    all others were predicted from those alone. `from_inputs`: predictions of the same maps from single inputs. `place` is
    free text such as a country; lat and lon are degrees.
    """

    tile_id: str
    product_level: str
    split: str
    visible: np.ndarray | Mapping[str, np.ndarray]
    patch_size_px: int
    maps: Mapping[str, MapTriple]
    vectors: Mapping[str, VectorPair | ClassGuess] = field(default_factory=dict)
    inputs: tuple[str, ...] = ("sentinel2",)
    from_inputs: Sequence[FromInputs] = ()
    lat: float | None = None
    lon: float | None = None
    place: str = ""

    @property
    def num_patches_side(self) -> int:
        """G."""
        return len(next(iter(self._visibles().values())))

    @property
    def size_px(self) -> int:
        """Image side in pixels."""
        return self.num_patches_side * self.patch_size_px

    def visible_of(self, name: str) -> np.ndarray:
        """Bool [G, G]: True where the encoder saw the patch of a map."""
        return np.asarray(self.visible[name] if isinstance(self.visible, Mapping) else self.visible)

    def hidden_pixels(self, name: str) -> np.ndarray:
        """Bool [H, W] in the pixels of the map: True where the patch was hidden from the encoder."""
        patch = np.shape(self.maps[name].target)[-1] // self.num_patches_side
        return np.kron(~self.visible_of(name), np.ones((patch, patch), bool))

    def problems(self) -> list[str]:
        """Everything that does not fit together in this tile, one text each."""
        where, found = f"tile {self.tile_id}", []
        if isinstance(self.visible, Mapping) and set(self.visible) != set(self.maps):
            return [f"{where}: `visible` has {', '.join(self.visible) or 'nothing'}, expected {', '.join(self.maps)}"]
        for name, visible in self._visibles().items():
            shape, dtype = np.shape(visible), np.asarray(visible).dtype
            if len(shape) != 2 or shape[0] != shape[1] or dtype.kind != "b":
                found.append(f"{where}: {name} is {dtype} {shape}, expected bool [G, G] with one entry per patch")
        if len({np.shape(visible) for visible in self._visibles().values()}) > 1:
            found.append(f"{where}: `visible` has maps with different numbers of patches")
        if found:
            return found
        for name, triple in self.maps.items():
            spec = map_modality(name)
            if spec is None:
                found.append(f"{where}: {name!r} is not a pixel modality; known names are in mpmae.modalities")
                continue
            side = np.shape(triple.target)[-1]
            if side % self.num_patches_side or self.size_px % side:  # a map may be coarser than the image
                side = self.size_px
            expected = (side, side) if spec.kind == "categorical" else (len(triple.bands), side, side)
            parts = {part: getattr(triple, part) for part in ("target", "prediction", "valid")}
            parts |= {f"from {one.title}": one.predictions[name] for one in self.from_inputs if name in one.predictions}
            for part, values in parts.items():
                if values is not None and np.shape(values) != expected:
                    found.append(f"{where}: {name} {part} has shape {list(np.shape(values))}, expected {list(expected)}")
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

    def _visibles(self) -> dict[str, np.ndarray]:
        """The visible patches by where they stand."""
        if isinstance(self.visible, Mapping):
            return {f"`visible` of {name}": visible for name, visible in self.visible.items()}
        return {"`visible`": self.visible}


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

    history: the objects of metrics.jsonl, one per step: step, epoch, loss, losses {target}, log_variances {target}, lr,
    grad_norm, images_per_s, data_wait_percent, memory_bytes; a key may be missing, a number may be None or NaN. Some have a
    probe's scores (see `mpmae.probe_record`); where there is one of step 0, it has nothing else. A target is a modality, a
    domain or norm_rgb.
    validation: the objects of validation.jsonl: step, losses {target}, trivial {target}, num_samples; `trivial` is the
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
