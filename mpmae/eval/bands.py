"""Which stored band an encoder reads for each band it wants: the same by name, else the nearest by wavelength.

Shapes: B stored bands.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mpmae.errors import DatasetError
from mpmae.eval.dataset import StoredBand, Task
from mpmae.modalities import spec_of

_LOG = logging.getLogger(__name__)

# Centre wavelengths in um as GEO-Bench states them (ServiceNow/geo-bench, `geobench/dataset.py`).
SENTINEL2_UM = {
    "B1": 0.443,
    "B2": 0.49,
    "B3": 0.56,
    "B4": 0.665,
    "B5": 0.705,
    "B6": 0.74,
    "B7": 0.783,
    "B8": 0.842,
    "B8A": 0.865,
    "B9": 0.945,
    "B10": 1.375,
    "B11": 1.61,
    "B12": 2.19,
}
_COLOURS_UM = {"red": 0.665, "green": 0.56, "blue": 0.49, "nir": 0.842}
_NUMBER = re.compile(r"(?=b|.* - )b?0?(\d{1,2})(a?)(?: - .*)?", re.IGNORECASE)  # a bare number may count channels
_FAR_UM = 0.3  # a band this far off shows something else: worth a warning


@dataclass(frozen=True)
class BandRow:
    """One band that the encoder wants, and the stored one it is given.

    position: of the stored band among the set's. distance_um: between their wavelengths; 0 for the same band, None where
    the stored one has the name but no wavelength.
    """

    wanted: str
    stored: str
    position: int
    distance_um: float | None

    @property
    def is_filled(self) -> bool:
        """Whether another band stands in for the wanted one."""
        return self.wanted != self.stored


@dataclass(frozen=True)
class BandMatch:
    """For each band of the encoder, in its order, where it comes from."""

    rows: tuple[BandRow, ...]

    @property
    def positions(self) -> list[int]:
        """Of the stored bands, in the order of the encoder's channels."""
        return [row.position for row in self.rows]

    def table(self) -> str:
        """The rows as lines of text: wanted, stored, distance."""
        lines = [f"  {'wanted':<8}{'stored':<28}distance"]
        for row in self.rows:
            distance = "same" if not row.is_filled else f"{row.distance_um:.3f} um"
            lines.append(f"  {row.wanted:<8}{row.stored:<28}{distance}")
        return "\n".join(lines)


def sentinel2_name(text: str) -> str | None:
    """Sentinel-2's name of a band ("B4", "B8A") that is written "B04", "b4", "04 - Red" or "08A - ..."; else None."""
    found = _NUMBER.fullmatch(text.strip())
    if found is None:
        return None
    name = f"B{int(found[1])}{found[2].upper()}"
    return name if name in SENTINEL2_UM else None


def plain_band(text: str) -> tuple[str, float | None]:
    """Name and centre wavelength (um) of a band that only has a name: Sentinel-2's, a colour, or what it says and None."""
    name = sentinel2_name(text)
    if name is not None:
        return name, SENTINEL2_UM[name]
    return text, _COLOURS_UM.get(text.strip().lower())


def match_bands(task: Task, wanted: Sequence[str]) -> BandMatch:
    """The stored band for each Sentinel-2 band in `wanted`, logged as a table.

    The one of the same name; else that with the nearest wavelength, of two equally near ones the shorter, of two of the same
    wavelength the first stored. Bands without a wavelength (radar, elevation, cloud masks, 8-bit colour) never stand in.
    Raises DatasetError for a name that is not Sentinel-2's, and for a set without any wavelength.
    Source: MMEarth-train, `BAND_NAMES_v1_full.json`, whose rows this gives for the tasks that lack bands.
    """
    unknown = [name for name in wanted if name not in SENTINEL2_UM]
    if unknown or not wanted:
        raise DatasetError(
            f"{task.name}: the encoder wants the bands {', '.join(unknown) or 'none at all'}; expected names of Sentinel-2: "
            f"{', '.join(spec_of('sentinel2').bands)}"
        )
    names = list(task.band_names)
    missing = [name for name in wanted if name not in names]
    spectral = [(position, band) for position, band in enumerate(task.bands) if band.wavelength_um is not None]
    if missing and not spectral:
        raise DatasetError(
            f"{task.name}: no stored band can stand for {', '.join(missing)}: none of {', '.join(names)} has a wavelength. "
            "Name the bands as Sentinel-2's (B2, B8A) or red, green, blue, nir, or evaluate an encoder of these bands"
        )
    match = BandMatch(tuple(_row(name, names, task.bands, spectral) for name in wanted))
    _LOG.info("%s: bands of the encoder, and what is stored\n%s", task.name, match.table())
    far = [f"{row.stored} for {row.wanted}" for row in match.rows if (row.distance_um or 0) > _FAR_UM]
    if far:
        _LOG.warning(
            "%s: stand-ins more than %s um off show something else: %s; an encoder of fewer bands (encoder.bands_in) may do "
            "better",
            task.name,
            _FAR_UM,
            ", ".join(far),
        )
    return match


def _row(wanted: str, names: list[str], bands: Sequence[StoredBand], spectral: list[tuple[int, StoredBand]]) -> BandRow:
    if wanted in names:
        position = names.index(wanted)
        return BandRow(wanted, wanted, position, None if bands[position].wavelength_um is None else 0.0)

    def nearness(candidate: tuple[int, StoredBand]) -> tuple[float, float, int]:
        position, band = candidate
        return round(abs(band.wavelength_um - SENTINEL2_UM[wanted]), 6), band.wavelength_um, position

    position, band = min(spectral, key=nearness)
    return BandRow(wanted, band.name, position, nearness((position, band))[0])
