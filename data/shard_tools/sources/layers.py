"""How a layer of a foreign set becomes a modality of ours: band names and order, dtype, no-data codes, orbits.

Shapes: C bands of ours, F bands of the file, H x W image in pixels.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mpmae.modalities import MODALITIES, NoData, no_data_rule

ORBITS = ("asc", "desc")
RADAR = ("sentinel1", "sentinel1_rtc")
# Band sets whose files do not name them, by their number: Sentinel-2 in the order of its products.
_S2_FILE_ORDER = ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12"]
_S2_UNNAMED = {13: _S2_FILE_ORDER, 12: [band for band in _S2_FILE_ORDER if band != "B10"]}
_NOON = 12.0


@dataclass(frozen=True)
class Layer:
    """A modality as the source delivers it.

    bands: C names in the order of the modality table. order: position of each in the file; for radar, which the file has
    once per pass, of the polarisation. dtype: little-endian, what tiles have.
    """

    name: str
    bands: tuple[str, ...]
    order: tuple[int, ...]
    dtype: np.dtype

    @property
    def no_data(self) -> NoData:
        """How absent values are written."""
        return no_data_rule(self.name, self.dtype)

    def empty(self, *size: int) -> np.ndarray:
        """A tile [C, *size] of nothing but absent values."""
        return np.full((len(self.bands), *size), absent_value(self.no_data), self.dtype)

    def convert(self, values: np.ndarray, fills: Sequence[float | None] = (), orbit: str = "") -> np.ndarray:
        """The file's values [F, H, W] as ours [C, H, W].

        fills: what the file writes for absent values, one for all bands or one per file band; values that are not finite
        count too. orbit: whose bands a radar layer of several passes fills; the others stay absent.

        Raises ValueError for a wrong number of bands or values that the dtype cannot hold.
        """
        needed = max(self.order) + 1
        if len(values) < needed:
            raise ValueError(f"{len(values)} bands, expected at least {needed}")
        absent = absent_value(self.no_data)
        result = np.empty((len(self.bands), *values.shape[1:]), self.dtype)
        for i, (band, position) in enumerate(zip(self.bands, self.order, strict=True)):
            if orbit and self.name in RADAR and not band.startswith(f"{orbit}_"):
                result[i] = absent
                continue
            plane = values[position]
            gone = np.zeros(plane.shape, bool) if plane.dtype.kind != "f" else ~np.isfinite(plane)
            fill = fills[position] if len(fills) > 1 else fills[0] if fills else None
            if fill is not None and fill == fill:
                gone |= plane == fill
            result[i] = self._cast(plane, gone)
            result[i][gone] = absent
        return result

    def _cast(self, plane: np.ndarray, gone: np.ndarray) -> np.ndarray:
        if plane.dtype == self.dtype:
            return plane
        if self.dtype.kind == "f":
            return plane.astype(self.dtype)
        limits, kept = np.iinfo(self.dtype), plane[~gone]
        if kept.size and (kept.min() < limits.min or kept.max() > limits.max):
            raise ValueError(f"values from {kept.min()} to {kept.max()}, which {self.dtype.name} cannot hold")
        return np.where(gone, 0, plane).astype(self.dtype)


def make_layer(name: str, file_bands: Sequence[str] | None, num_file_bands: int, dtype: np.dtype, orbit: str = "") -> Layer:
    """The layer of modality `name` from what its file says.

    file_bands: names as the file has them (B01 or B1, vv or asc_VV), None where it has none. orbit: asc or desc when the
    set's radar is of one pass, else both passes get bands.

    Raises ValueError naming the bands that are not known.
    """
    names = list(file_bands) if file_bands is not None else _unnamed(name, num_file_bands)
    positions = _positions(name, names, orbit)
    spec_bands = MODALITIES[name].bands
    unknown = [given for given in names if not _targets(name, given, orbit)]
    if unknown or not positions:
        raise ValueError(f"bands {', '.join(unknown) or 'none'}, expected some of {', '.join(spec_bands)}")
    repeated = [given for i, given in enumerate(names) if i not in positions.values()]
    if repeated:
        raise ValueError(f"bands {', '.join(repeated)} given twice")
    bands = tuple(band for band in spec_bands if band in positions)
    return Layer(name, bands, tuple(positions[band] for band in bands), stored_dtype(name, dtype))


def _unnamed(name: str, num_file_bands: int) -> list[str]:
    spec = MODALITIES[name]
    names = _S2_UNNAMED.get(num_file_bands) if name == "sentinel2" else list(spec.bands)
    if name in RADAR and num_file_bands == 2:
        names = ["VV", "VH"]
    if names is None or len(names) != num_file_bands:
        raise ValueError(f"{num_file_bands} bands without names, expected {' '.join(spec.bands)}")
    return names


def _positions(name: str, names: Sequence[str], orbit: str) -> dict[str, int]:
    return {band: i for i, given in reversed(list(enumerate(names))) for band in _targets(name, given, orbit)}


def _targets(name: str, given: str, orbit: str) -> list[str]:
    """Our bands that a file's band fills."""
    bands = MODALITIES[name].bands
    if name in RADAR and given.upper() in ("VV", "VH", "HH", "HV"):
        passes = [orbit] if orbit else ORBITS
        return [band for band in bands if band in [f"{p}_{given.upper()}" for p in passes]]
    match = re.fullmatch(r"[Bb]0?(\d+[Aa]?)", given)
    canonical = f"B{match[1].upper()}" if match and name == "sentinel2" else given
    if len(bands) == 1:
        return list(bands)
    return [band for band in bands if band.lower() == canonical.lower()]


def stored_dtype(name: str, dtype: np.dtype) -> np.dtype:
    """The dtype that tiles of `name` have when the file has `dtype`: at most 4 bytes, integers for classes.

    Half and double floats become float32, 64-bit integers int32, and classes of any odd type uint8. Raises ValueError for
    what holds no numbers.
    """
    dtype = np.dtype(dtype)
    if dtype.kind not in "iufb":
        raise ValueError(f"dtype {dtype}, expected numbers")
    if MODALITIES[name].kind == "categorical" and (dtype.kind in "fb" or dtype.itemsize > 4):
        return np.dtype("u1")
    if dtype.kind == "f":
        return np.dtype("<f4")
    if dtype.kind == "b" or dtype.itemsize > 4:
        return np.dtype("<i4")
    return dtype.newbyteorder("<")


def absent_value(rule: NoData) -> float:
    """The value that writes an absent one."""
    assert rule.codes or rule.non_finite, "a modality without a way to be absent"
    return rule.codes[0] if rule.codes else -np.inf


def orbit_of(utc_hour: float, lon_deg: float) -> str:
    """The direction of a Sentinel-1 pass from its time: asc in the local afternoon, desc in the local morning.

    The orbit crosses the equator northwards at 18:00 local solar time (Sentinel-1 mission, SentiWiki) and southwards at
    06:00; on the way to 75 degrees of latitude the local time of a pass shifts by less than 3 hours.
    """
    return ORBITS[0] if (utc_hour + lon_deg / 15) % 24 >= _NOON else ORBITS[1]


def same_size(sizes: Mapping[str, tuple[int, int]]) -> str:
    """What is wrong with the image sizes of the modalities: nothing or that they differ."""
    if len(set(sizes.values())) <= 1:
        return ""
    return "images of different sizes: " + ", ".join(f"{name} {h} x {w} px" for name, (h, w) in sizes.items())
