"""The images of a labelled set, prepared as its evaluations prepare them.

Shapes: N tiles, T windows of an image, B bands of the encoder, S image side in pixels, K classes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpmae.embed.source import UNKNOWN, ClassColumn, Tiles, presence_columns, present_modalities
from mpmae.errors import DatasetError
from mpmae.eval.config import ImageSection
from mpmae.eval.dataset import LabelledSet
from mpmae.eval.encoder_input import EncoderInput
from mpmae.eval.prepare import Preparation
from mpmae.loader import evaluation_ids

_COLUMN = {  # by kind of task: name and title of the column
    "multiclass": ("label", "Label"),
    "multilabel": ("label", "Labels"),
    "segmentation": ("most_frequent_label", "Label, most frequent class"),
}


class LabelledTiles:
    """A `TileSource` of a GEO-Bench task, an HDF5 file or a table of GeoTIFFs; see `mpmae.eval.open_set`.

    splits, max_samples: as of `ShardTiles`; a set without splits has one called "all". Raises DatasetError.
    """

    def __init__(
        self,
        labelled: LabelledSet,
        path: Path,
        encoder_input: EncoderInput,
        image: ImageSection,
        splits: Sequence[str] = (),
        max_samples: int | None = None,
    ):
        self._set, self._input, task = labelled, encoder_input, labelled.task
        there = dict(self._set.splits) or {"all": np.arange(len(self._set))}
        unknown = [name for name in splits if name not in there]
        if unknown:
            raise DatasetError(f"{path}: no split {', '.join(unknown)}; it has {', '.join(there)}")
        chosen = {name: there[name] for name in there if not splits or name in splits}
        every = np.concatenate(list(chosen.values()))
        names = np.repeat(list(chosen), [len(indices) for indices in chosen.values()])
        positions = evaluation_ids([len(every)], max_samples)
        self._indices, self._splits = every[positions], names[positions].tolist()
        self.num_tiles = {name: self._splits.count(name) for name in chosen}
        self._prepare = Preparation(task, encoder_input, image)
        for index in self._indices[:1].tolist():  # decides the size of all
            self._prepare(self._set.image(index))
        self.facts = _facts(self._prepare.facts)
        self.title = f"{task.name} ({path})"
        self.fingerprint = _fingerprint(self._set, self._indices, self._splits)
        name, title = _COLUMN[task.kind]
        label = ClassColumn(name, title, task.class_names, several=task.kind == "multilabel")
        self.columns = (label, *presence_columns(encoder_input))

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, positions: np.ndarray) -> Tiles:
        """The images at these positions, int64 [N]. Raises DatasetError naming the file."""
        indices = self._indices[positions].tolist()
        stored = [self._set.image(index) for index in indices]
        places = [self._set.location(index) for index in indices]
        labels = [self._class(self._set.label(index)) for index in indices]
        images = [self._prepare(image) for image in stored]
        seen = [image.numpy() for image in images] if self._input.tells_no_data else stored
        return Tiles(
            ids=[self._set.sample_id(index) for index in indices],
            splits=[self._splits[position] for position in positions.tolist()],
            product_levels=[self._set.task.product_level] * len(indices),
            locations=np.array([(np.nan, np.nan) if place is None else place for place in places], np.float64),
            images=images,
            valid_fraction=np.array([np.isfinite(image).mean() for image in seen], np.float32),
            classes={self.columns[0].name: np.stack(labels), **present_modalities(images, self._input)},
        )

    def prefetch(self, positions: np.ndarray) -> None:
        """Nothing: the files are here."""

    def close(self) -> None:
        """Nothing: the set closes its files itself."""

    def _class(self, label: np.ndarray) -> np.ndarray:
        if self._set.task.kind != "segmentation":
            return label
        counts = np.bincount(label[label >= 0], minlength=1)
        return np.int64(counts.argmax() if counts.any() else UNKNOWN)


def _facts(prepared: Mapping[str, Any]) -> dict[str, Any]:
    rows = [(row["wanted"], row["stored"]) for row in prepared["bands"]]
    several = prepared.get("statistics_of")
    return {
        "bands": [wanted if wanted == stored else f"{wanted} from {stored}" for wanted, stored in rows],
        "statistics": _whose(prepared) if several is None else {name: _whose(entry) for name, entry in several.items()},
        "image": f"{prepared['fit']}, {prepared['side_px']} px",
    }


def _whose(entry: Mapping[str, Any]) -> str:
    return f"the {entry['statistics']}'s ({entry.get('statistics_reason') or entry['reason']})"


def _fingerprint(labelled: LabelledSet, indices: np.ndarray, splits: Sequence[str]) -> str:
    """A hash of the task with its band statistics, the chosen samples' names and splits, and the first one's image."""
    digest = hashlib.sha256(repr(labelled.task).encode())
    for index, split in zip(indices.tolist(), splits, strict=True):
        digest.update(f"\0{labelled.sample_id(index)}\0{split}".encode())
    for index in indices[:1].tolist():
        digest.update(labelled.image(index).tobytes())
    return digest.hexdigest()
