"""Tiles cut from the images of a set: what every adapter here shares.

An adapter lists its images and reads a square out of one; this class turns that into a `TileSource`: it cuts the images into
tiles, names them, divides them into splits, and encodes place and month as MMEarth does.

Shapes: I images, N tiles, C bands, P tile side in pixels.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpmae.errors import SourceError
from mpmae.modalities import MODALITIES, NoData, no_data_rule
from mpmae.shard_tools.source_checks import NUM_EXAMPLES, examples
from mpmae.shard_tools.sources.foreign import UnreadableError
from mpmae.shard_tools.sources.layers import Layer
from mpmae.shard_tools.tile import Tile, TileError

PIXEL_M = 10.0
MAX_ID_BYTES = 100
_PLACE_NAMES = ("lat", "lon", "month")
_METRES_PER_DEGREE = 111_320.0


@dataclass(frozen=True)
class Images:
    """The images of a set.

    keys: bytes array [I], unique. sizes_px: int64 [I, 2] of (height, width) on the 10 m grid, or [1, 2] for all. moments:
    how many times each place was taken; every one is an image of its own with the same key. splits: names of the splits;
    split_of: per image its index there.
    """

    keys: np.ndarray
    sizes_px: np.ndarray
    moments: int
    splits: tuple[str, ...]
    split_of: np.ndarray


@dataclass(frozen=True)
class Cut:
    """A square of an image: which image and moment, its upper left corner and side in pixels."""

    image: int
    moment: int
    top: int
    left: int
    side: int


@dataclass(frozen=True)
class Place:
    """Where the centre of a tile lies (degrees) and in which month it was taken; NaN and None where unknown."""

    lat_deg: float = math.nan
    lon_deg: float = math.nan
    month: int | None = None


class ImageSource(ABC):
    """A `TileSource` over images; subclasses give `_read` and `_place`."""

    def __init__(
        self,
        path: Path,
        *,
        images: Images,
        layers: Mapping[str, Layer],
        tile_size_px: int,
        product_level: str,
        content: object,
        has_place: bool,
        notes: Sequence[str] = (),
    ):
        """`content` is what the fingerprint covers: options, names and sizes of files."""
        self.name, self.where, self.folder = path.name, path, path
        self.tile_size_px = tile_size_px
        self._images, self._layers = images, {n: layers[n] for n in MODALITIES if n in layers}
        self._product_level = product_level.encode()
        self.pixels = tuple(self._layers)
        self.scalars = _PLACE_NAMES if has_place else ()
        self.bands = {name: layer.bands for name, layer in self._layers.items()}
        self.dtypes = {name: layer.dtype for name, layer in self._layers.items()} | {
            name: np.dtype("<f4") for name in self.scalars
        }
        self.shapes = {name: (len(bands), tile_size_px, tile_size_px) for name, bands in self.bands.items()}
        self.shapes |= dict.fromkeys(self.scalars, (2,))
        self.band_stats = None
        self._cuts = np.broadcast_to(images.sizes_px // tile_size_px, (len(images.keys), 2))
        self._starts = np.concatenate([[0], np.cumsum(self._cuts.prod(axis=1) * images.moments)])
        self.num_tiles = int(self._starts[-1])
        self._notes = (*notes, *_edge_notes(images.sizes_px, tile_size_px))
        self._check()
        self.splits = self._split_rows()
        described = json.dumps([content, self.num_tiles, self.pixels], sort_keys=True)
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()

    def _check(self) -> None:
        problems, keys = [], self._images.keys
        if not self.num_tiles:
            raise SourceError(f"{self.where}: no image holds a tile of {self.tile_size_px} px; give a smaller tile_size_px")
        unique, counts = np.unique(keys, return_counts=True)
        if (counts > 1).any():
            twice = unique[counts > 1]
            problems.append(f"{self.where}: {len(twice)} image names more than once ({_some(twice)}); names must differ")
        # Whichever image it is, a suffix grows with the number of its tiles alone.
        most = self._cuts.max(axis=0)
        suffix = self._suffix(int(self._cuts.prod(axis=1).argmax()), self._images.moments - 1, *map(int, most))
        long = unique[np.char.str_len(unique) + len(suffix) > MAX_ID_BYTES]
        if len(long):
            problems.append(
                f"{self.where}: {len(long)} image names make tile ids of more than {MAX_ID_BYTES} bytes ({_some(long)})"
            )
        if (np.ascontiguousarray(keys).view(np.uint8) > 127).any():
            strange = [key for key in unique.tolist() if not key.isascii()]
            problems.append(f"{self.where}: {len(strange)} image names are not ASCII ({_some(strange)})")
        if problems:
            raise SourceError(problems)

    def _split_rows(self) -> dict[str, np.ndarray]:
        per_image = np.diff(self._starts)
        split_of_tile = np.repeat(self._images.split_of, per_image)
        return {name: np.flatnonzero(split_of_tile == i) for i, name in enumerate(self._images.splits)}

    def __enter__(self) -> "ImageSource":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027 - part of the interface, and right as it is for all adapters
        """Let go of the files; the adapters here hold none open between reads."""

    def notes(self) -> tuple[str, ...]:
        """What a user should know of the source, such as samples without a counterpart or pixels dropped; a line each."""
        return self._notes

    def no_data(self, name: str) -> NoData:
        """How modality `name` writes absent values."""
        return no_data_rule(name, self.dtypes[name])

    def describe(self, row: int) -> str:
        """How messages call the tile at `row`."""
        return f"tile {self._tile_id(self._cut(row))} (row {row})"

    def read_tile(self, row: int, names: Sequence[str] | None = None) -> Tile:
        """The tile at `row` with the modalities `names` (None: all), a missing one filled with its no-data code.

        Raises SourceError naming the tile and the modality when it cannot be read.
        """
        cut = self._cut(row)
        values: dict[str, np.ndarray] = {}
        wanted = (*self.pixels, *self.scalars) if names is None else names
        for name in wanted:
            if name in _PLACE_NAMES:
                continue
            values[name] = self._read_layer(row, cut, name)
        if any(name in _PLACE_NAMES for name in wanted):
            try:
                place = self._place(cut)
            except UnreadableError as error:
                raise self._unreadable(row, "place and date", error) from error
            encoded = _encode_place(place)
            values |= {name: encoded[name] for name in wanted if name in encoded}
        return Tile(int(row), self._tile_id(cut).encode(), self._product_level, {name: values[name] for name in wanted})

    def _read_layer(self, row: int, cut: Cut, name: str) -> np.ndarray:
        try:
            values = self._read(name, cut)
        except UnreadableError as error:
            raise self._unreadable(row, name, error) from error
        return self._layers[name].empty(cut.side, cut.side) if values is None else values

    def _unreadable(self, row: int, name: str, error: UnreadableError) -> TileError:
        return TileError(
            f"{self.where}: {self.describe(row)}, {name}: {error}; download the file again or leave the tile out",
            modality=name,
        )

    @abstractmethod
    def _read(self, name: str, cut: Cut) -> np.ndarray | None:
        """Modality `name` of a tile, [C, P, P] in its layer's dtype; None where the set has none. Raises UnreadableError."""

    @abstractmethod
    def _place(self, cut: Cut) -> Place:
        """Where and when the tile was taken. Raises UnreadableError."""

    def _cut(self, row: int) -> Cut:
        if not 0 <= row < self.num_tiles:
            raise IndexError(f"row {row} of {self.num_tiles}")
        image = int(np.searchsorted(self._starts, row, side="right")) - 1
        down, across = map(int, self._cuts[image])
        moment, cell = divmod(int(row) - int(self._starts[image]), down * across)
        i, j = divmod(cell, across)
        return Cut(image, moment, i * self.tile_size_px, j * self.tile_size_px, self.tile_size_px)

    def _tile_id(self, cut: Cut) -> str:
        key = bytes(self._images.keys[cut.image]).decode(errors="replace")
        return key + self._suffix(cut.image, cut.moment, cut.top // cut.side, cut.left // cut.side)

    def _suffix(self, image: int, moment: int, i: int, j: int) -> str:
        season = f"_t{moment}" if self._images.moments > 1 else ""
        return season + (f"_r{i}c{j}" if self._cuts[image].prod() > 1 else "")


def offset_place(place: Place, cut: Cut, height_px: int, width_px: int) -> Place:
    """The centre of a tile from the centre of its image, whose pixels are 10 m and whose rows run north to south.

    The grid is taken as parallel to the meridians: UTM turns by up to 3 degrees, which moves the edge of a 2.6 km image by
    less than 70 m.
    """
    down_m = (cut.top + cut.side / 2 - height_px / 2) * PIXEL_M
    right_m = (cut.left + cut.side / 2 - width_px / 2) * PIXEL_M
    lat = place.lat_deg - down_m / _METRES_PER_DEGREE
    lon = place.lon_deg + right_m / (_METRES_PER_DEGREE * max(math.cos(math.radians(place.lat_deg)), 0.01))
    return Place(lat, (lon + 180) % 360 - 180, place.month)


def seeded_splits(groups: np.ndarray, val_fraction: float, seed: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Split names and, per image, its index there: a share of the `groups` (bytes [I]) is val, drawn by a hash of its name.

    All images of a group, and so all tiles of an image, land in one split.
    """
    unique, group_of = np.unique(groups, return_inverse=True)
    draws = [hashlib.blake2b(b"%d:" % seed + bytes(group), digest_size=8).digest() for group in unique]
    is_val = np.zeros(len(unique), bool)
    is_val[np.argsort(np.array(draws, "S8"), kind="stable")[: round(val_fraction * len(unique))]] = True
    return ("train", "val"), is_val[group_of].astype(np.int64)


def _encode_place(place: Place) -> dict[str, np.ndarray]:
    """lat, lon and month as MMEarth has them: (sin, cos) of the angle, float32; -inf where unknown."""
    angles = {
        "lat": math.radians(place.lat_deg),
        "lon": math.radians(place.lon_deg),
        "month": math.nan if place.month is None else 2 * math.pi * place.month / 12,
    }
    return {
        name: np.array([math.sin(angle), math.cos(angle)] if math.isfinite(angle) else [-np.inf, -np.inf], np.float32)
        for name, angle in angles.items()
    }


def _edge_notes(sizes_px: np.ndarray, tile_size_px: int) -> list[str]:
    rest = sizes_px % tile_size_px
    cut = rest.any(axis=1)
    if not cut.any():
        return []
    used = ((sizes_px - rest).prod(axis=1)).sum() / sizes_px.prod(axis=1).sum()
    which = "the images" if cut.all() else f"{cut.sum()} of {len(cut)} images"
    return [
        f"{which} are no multiple of {tile_size_px} px: up to {rest[:, 1].max()} px at the right and {rest[:, 0].max()} px "
        f"at the lower edge are dropped, {100 * (1 - used):.1f} % of all pixels"
    ]


def _some(keys: Sequence[bytes]) -> str:
    return examples(key.decode(errors="replace") for key in keys[: NUM_EXAMPLES + 1])
