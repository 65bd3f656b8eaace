"""A labelled set of images, whatever its files: what readers give and protocols take.

Shapes: B stored bands, H x W pixels, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

SPLITS = ("train", "val", "test")
KINDS = ("multiclass", "multilabel", "segmentation")
IGNORED = -1  # in a label map: no label here


@dataclass(frozen=True)
class StoredBand:
    """A band as a set stores it.

    name: Sentinel-2's ("B1" .. "B12", "B8A") where it is one of its bands, else the set's own. wavelength_um: its centre;
    None where it has none (radar, elevation). mean, std: of the set's values, no data left out. modality: the one in
    `mpmae.modalities` that the set says it is of; None where only the name tells. A class map holds its product's codes.
    """

    name: str
    wavelength_um: float | None
    mean: float
    std: float
    modality: str | None = None


@dataclass(frozen=True)
class Task:
    """What is asked of a labelled set.

    kind: one of KINDS. metric: the one that decides and is reported first, a name of `mpmae.eval.metrics`. product_level:
    "l1c" or "l2a", the Sentinel-2 product of the images; None for another sensor or where nothing says. scale: what stored
    values are multiplied by to give reflectance x 10,000, the unit that pretraining statistics have.
    """

    name: str
    kind: str
    class_names: tuple[str, ...]
    bands: tuple[StoredBand, ...]
    metric: str
    product_level: str | None = None
    scale: float = 1.0

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def band_names(self) -> tuple[str, ...]:
        """Names of the stored bands, in the order of an image's channels."""
        return tuple(band.name for band in self.bands)


class LabelledSet(Protocol):
    """Images with labels. Images are read when asked for; a reader is safe to use from several threads.

    splits: split -> indices of its samples, for each of SPLITS that the set has.
    """

    task: Task
    splits: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        """Samples of all splits."""
        ...

    def sample_id(self, index: int) -> str:
        """The sample's name in its set; unique."""
        ...

    def image(self, index: int) -> np.ndarray:
        """float32 [B, H, W] in stored units, NaN where there is no data. Raises DatasetError, naming the file."""
        ...

    def label(self, index: int) -> np.ndarray:
        """The class [] int64, classes [K] bool, or label map [H, W] int64 with IGNORED where there is no label.

        Raises DatasetError for a label that no class has.
        """
        ...

    def location(self, index: int) -> tuple[float, float] | None:
        """(latitude, longitude) of the centre in degrees, or None where it is not known."""
        ...
