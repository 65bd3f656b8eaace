"""Where the tiles to embed come from: one protocol, whatever their files.

Shapes: N tiles, T windows of an image, B bands of the encoder, S image side in pixels, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mpmae.eval.encoder_input import EncoderInput

UNKNOWN = -1
_PRESENT = "modalities"


@dataclass(frozen=True)
class ClassColumn:
    """A column of the output that says one class of each tile, or several.

    name: of the column. title: for people. class_names: K. colours: "#rrggbb" of each class, where there are usual ones.
    """

    name: str
    title: str
    class_names: tuple[str, ...]
    colours: tuple[str, ...] = ()
    several: bool = False


@dataclass(frozen=True)
class Tiles:
    """Some tiles, ready for the encoder.

    images: float32 [T, B, S, S] each, as the encoder takes them: normalised, 0 where there is no data, or NaN for an encoder
    that tells it apart; a tile's vector is the mean of its windows'. One
    tensor [N, T, B, S, S] where all have one size.
    ids, splits: N texts. product_levels: "l1c", "l2a", None where it is not known. locations: float64 [N, 2], latitude and
    longitude of the centre in degrees, NaN where unknown. valid_fraction: float32 [N], the fraction of an image's values
    that is data. classes: by column, ids int64 [N] with UNKNOWN where there is none, or bool [N, K] for several.
    """

    ids: Sequence[str]
    splits: Sequence[str]
    product_levels: Sequence[str | None]
    locations: np.ndarray
    images: Tensor | Sequence[Tensor]
    valid_fraction: np.ndarray
    classes: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


class TileSource(Protocol):
    """Tiles in a fixed order, read from several threads.

    title: what it is and where. fingerprint: another one where content or order are others. facts: how an image becomes the
    encoder's input, for people and to tell two outputs apart. columns: the classes there are. num_tiles: by split, in order.
    """

    title: str
    fingerprint: str
    facts: Mapping[str, Any]
    columns: tuple[ClassColumn, ...]
    num_tiles: Mapping[str, int]

    def __len__(self) -> int:
        """Tiles of all chosen splits."""
        ...

    def read(self, positions: np.ndarray) -> Tiles:
        """The tiles at these positions, int64 [N] in 0 .. len - 1. Raises ShardError or DatasetError, naming the file."""
        ...

    def prefetch(self, positions: np.ndarray) -> None:
        """Get the files of these positions, in the order of need, ready ahead of `read`."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


def presence_columns(encoder_input: EncoderInput) -> tuple[ClassColumn, ...]:
    """A column of the modalities that a tile has data of, for an encoder that reads whichever are there."""
    if not encoder_input.tells_no_data:
        return ()
    names = tuple(dict.fromkeys(name for name, _ in encoder_input.channels))
    return (ClassColumn(_PRESENT, "Modalities with data", names, several=True),)


def present_modalities(images: Sequence[Tensor], encoder_input: EncoderInput) -> dict[str, np.ndarray]:
    """`Tiles.classes` of `presence_columns`, from the images [T, B, S, S]: bool [N, K], K modalities."""
    found = {}
    for column in presence_columns(encoder_input):
        channels = [encoder_input.positions_of(name) for name in column.class_names]
        there = [image.isfinite().any(3).any(2).any(0) for image in images]
        found[column.name] = np.array([[bool(flags[rows].any()) for rows in channels] for flags in there])
    return found


def join_tiles(parts: Sequence[Tiles]) -> Tiles:
    """The tiles of all parts after each other."""
    tensors = [part.images for part in parts if torch.is_tensor(part.images)]
    images = [image for part in parts for image in part.images] if len(tensors) < len(parts) else torch.cat(tensors)
    return Tiles(
        ids=[i for part in parts for i in part.ids],
        splits=[s for part in parts for s in part.splits],
        product_levels=[level for part in parts for level in part.product_levels],
        locations=np.concatenate([part.locations for part in parts]),
        images=images,
        valid_fraction=np.concatenate([part.valid_fraction for part in parts]),
        classes={name: np.concatenate([part.classes[name] for part in parts]) for name in parts[0].classes},
    )


def no_tiles(columns: Sequence[ClassColumn]) -> Tiles:
    """No tile of a source with these columns."""
    classes = {c.name: np.empty((0, len(c.class_names)), bool) if c.several else np.empty(0, np.int64) for c in columns}
    return Tiles([], [], [], np.empty((0, 2)), [], np.empty(0, np.float32), classes)
