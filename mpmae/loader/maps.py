"""Stored pixel members to the maps of a batch: un-filter, crop, flip, no-data, normalise or look up, in compiled loops.

Shapes: N samples, C bands, P tile side, H image side (pixels), L product levels, B stored bytes of a member.
"""

from dataclasses import dataclass

import numpy as np

from mpmae import pixel_loops
from mpmae.modalities import NoData
from mpmae.shard_codecs import unpack_stored
from mpmae.shard_format import PixelEntry


@dataclass(frozen=True)
class Views:
    """Per sample: crop offsets int64 [N], flips bool [N]."""

    top: np.ndarray
    left: np.ndarray
    hflip: np.ndarray
    vflip: np.ndarray

    def table(self) -> np.ndarray:
        """The same as int64 [N, 4]: top, left, hflip, vflip."""
        return np.stack([self.top, self.left, self.hflip, self.vflip], axis=1).astype(np.int64)


class _Maps:
    """What both kinds of map share: from stored bytes to what the loops take.

    float16 and foreign byte orders, which the loops cannot read, are unpacked by numpy first; values are the same.
    """

    def __init__(self, entry: PixelEntry):
        dtype = np.dtype(entry.dtype)
        self._entry = entry
        self._by_numpy = dtype == np.float16 or not dtype.isnative
        self.dtype = np.dtype(np.float32) if dtype.kind == "f" and dtype.itemsize == 2 else dtype.newbyteorder("=")
        self._stored_dtype = self.dtype if self._by_numpy else entry.stored_dtype
        self._filtered = entry.filter == "delta-planes" and not self._by_numpy
        self._step = entry.quantisation.step if entry.quantisation and not self._by_numpy else 0.0

    def _source(self, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        if self._by_numpy:
            stored = unpack_stored(self._entry, stored).astype(self.dtype).reshape(len(stored), -1).view(np.uint8)
        return stored, stored.view(self._stored_dtype), self._filtered

    def _room(self, size_px: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        side = self._entry.shape[-1]
        words = np.empty(size_px * side, f"u{self._stored_dtype.itemsize}")
        return words, words.view(self._stored_dtype), np.empty(side, self.dtype)


class ContinuousMaps(_Maps):
    """Normalised maps of one modality. mean, std: float32 [L, C]."""

    def __init__(self, entry: PixelEntry, no_data: NoData, mean: np.ndarray, std: np.ndarray):
        super().__init__(entry)
        self._mean, self._std, self._check_finite = mean, std, no_data.non_finite
        fits = [code for code in no_data.codes if self.dtype.kind == "f" or _fits(code, self.dtype)]
        with np.errstate(over="ignore"):  # float16: as numpy compares
            self.codes = np.array(fits, entry.dtype).astype(self.dtype)

    def fill(self, stored: np.ndarray, views: np.ndarray, levels: np.ndarray, values: np.ndarray, valid: np.ndarray) -> None:
        """Write `values` float32 and `valid` bool, [N, C, H, H], of members `stored`, uint8 [N, B], decompressed.

        views: as `Views.table`. levels: int64 [N], rows of the statistics.
        """
        pixel_loops.normalise_maps(
            *self._source(stored),
            self._step,
            views,
            levels,
            self._mean,
            self._std,
            self.codes,
            self._check_finite,
            self._room(values.shape[-1]),
            values,
            valid,
        )


class CategoricalMaps(_Maps):
    """Maps of class ids of one modality. lookup: int8 [256], from a code of the file to a class id, -1 = no data."""

    def __init__(self, entry: PixelEntry, lookup: np.ndarray):
        super().__init__(entry)
        self.lookup = lookup

    def fill(self, stored: np.ndarray, views: np.ndarray, levels: np.ndarray, values: np.ndarray, valid: np.ndarray) -> None:
        """Write `values` int64 and `valid` bool, as `ContinuousMaps.fill` does; `levels` does not matter."""
        pixel_loops.class_maps(
            *self._source(stored), self._step, views, self.lookup, self._room(values.shape[-1]), values, valid
        )


def _fits(code: int, dtype: np.dtype) -> bool:
    limits = np.iinfo(dtype)
    return limits.min <= code <= limits.max
